//! Connections to workers, and what their errors mean.

use crate::budget::RetryBudget;
use crate::dice::Dice;
use crate::route::Route;
use crate::routes::Routes;
use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_types::{FieldViolation, StatusExt as _};
use unmask_proto::network::Network;
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::worker_service_client::WorkerServiceClient;
use unmask_proto::v1::{FetchTokenizerRequest, FetchTokenizerResponse, RunRequest, RunResponse};

/// Longest wait for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// How often workers are pinged.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for the answer to a ping: a hung worker is given up after this and the interval.
const PING_LIMIT: Duration = Duration::from_secs(3);
/// What one stream may have under way (bytes): a reader that pauses holds back no more than this.
const STREAM_WINDOW: u32 = 64 << 10;
/// What all streams of a connection may have under way (bytes): more than 1024 paused ones hold, so that they do not
/// hold up the others.
const CONNECTION_WINDOW: u32 = 128 << 20;
/// Longest wait for tokenizer files.
const FETCH_LIMIT: Duration = Duration::from_secs(20);
/// Largest answer with tokenizer files (bytes).
const FETCH_BYTES_MAX: usize = 256 << 20;

/// Connections to workers, opened on first use, kept while a route leads there.
pub(crate) struct Workers {
    network: Network,
    channels: Mutex<HashMap<String, Channel>>,
}

impl Workers {
    /// Reached over `network`.
    pub(crate) fn new(network: Network) -> Self {
        Self { network, channels: Mutex::default() }
    }

    fn client(&self, endpoint: &str, routes: &Routes) -> Result<WorkerServiceClient<Channel>, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(endpoint) {
            return Ok(WorkerServiceClient::new(channel.clone()));
        }
        let table = routes.table();
        channels.retain(|known, _| table.routes.iter().any(|route| route.endpoint == *known));
        let dialled = Endpoint::from_shared(format!("http://{endpoint}"))
            .map_err(|error| rich::status(Code::Unavailable, "BAD_ENDPOINT", format!("`{endpoint}`: {error}")))?
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_LIMIT)
            // Else streams count as idle once the channel is forgotten, and a worker that then hangs is not noticed.
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let channel = self.network.channel(&dialled);
        channels.insert(endpoint.to_owned(), channel.clone());
        Ok(WorkerServiceClient::new(channel))
    }

    /// Starts a request on a worker; the deadline travels with it.
    pub(crate) async fn run(
        &self,
        route: &Route,
        routes: &Routes,
        message: RunRequest,
        deadline: Option<Instant>,
    ) -> Result<Streaming<RunResponse>, Status> {
        let mut request = Request::new(message);
        if let Some(deadline) = deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        let mut client = self.client(&route.endpoint, routes)?;
        Ok(client.run(request).await?.into_inner())
    }

    /// Tokenizer files of a route's model.
    pub(crate) async fn fetch_tokenizer(
        &self,
        route: &Route,
        routes: &Routes,
    ) -> Result<FetchTokenizerResponse, Status> {
        let request = FetchTokenizerRequest { digest: route.model.tokenizer_digest.clone() };
        let mut client = self.client(&route.endpoint, routes)?.max_decoding_message_size(FETCH_BYTES_MAX);
        let fetched = tokio::time::timeout(FETCH_LIMIT, client.fetch_tokenizer(request)).await;
        Ok(fetched.map_err(|_| Status::unavailable("it sent no tokenizer in time"))??.into_inner())
    }
}

/// What an error of a worker means for the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The request is at fault, or no other group would do better: the client gets the error.
    Final,
    /// This group takes nothing at present: another one may, now.
    Busy,
    /// This group or the way to it broke: go on elsewhere.
    Broken,
}

/// Judges an error. Errors that a worker made itself name a reason; those of a broken connection do not.
pub(crate) fn judge(status: &Status) -> Verdict {
    let named = status.get_details_error_info().is_some();
    match status.code() {
        Code::Unavailable | Code::FailedPrecondition => Verdict::Broken,
        Code::ResourceExhausted if named => Verdict::Busy,
        Code::Internal | Code::Unknown | Code::Cancelled | Code::Aborted | Code::DataLoss if !named => Verdict::Broken,
        _ => Verdict::Final,
    }
}

/// What a client has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Generate,
    /// To go on with a stream that broke off.
    Resume,
    Edit,
}

/// An error as a client gets it: without what belongs to the inner connection, fields by the names of its own request.
pub(crate) fn forward(status: &Status, method: Method) -> Status {
    if let Some(bad) = status.get_details_bad_request().filter(|_| status.code() == Code::InvalidArgument) {
        let named = |found: FieldViolation| Violation::new(method.field(&found.field), found.description);
        return rich::invalid(&bad.field_violations.into_iter().map(named).collect::<Vec<_>>());
    }
    Status::with_details(status.code(), status.message(), status.details().to_vec().into())
}

impl Method {
    /// The field of the client's request that a field of `RunRequest` was made from.
    fn field(self, field: &str) -> String {
        let under = |settings: &str| match field.strip_prefix("settings.") {
            Some(rest) => format!("{settings}{rest}"),
            None => field.to_owned(),
        };
        match (self, field) {
            (Method::Edit, "prompt_ids" | "settings.max_tokens") => "spans".into(),
            (Method::Edit, _) if field.starts_with("settings.draft") => "spans".into(),
            (Method::Edit, _) => under(""),
            (_, "prompt_ids") => "input".into(),
            (_, "suffix_ids") => "suffix".into(),
            (_, "committed_ids") => "resume.received_token_ids".into(),
            (Method::Generate, _) => under("decoding."),
            (Method::Resume, _) => under("resume.settings."),
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Everything on the way to workers.
pub(crate) struct Upstream {
    pub routes: Arc<Routes>,
    pub workers: Workers,
    retries: Mutex<RetryBudget>,
}

impl Upstream {
    /// With no routes yet; workers are reached over `network`.
    pub(crate) fn new(network: Network, dice: Arc<Dice>) -> Self {
        let retries = Mutex::new(RetryBudget::new(Instant::now().into_std()));
        Self { routes: Arc::new(Routes::new(dice)), workers: Workers::new(network), retries }
    }

    /// Re-submissions that this gateway may make.
    pub(crate) fn retries(&self) -> MutexGuard<'_, RetryBudget> {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn broken_connections_go_elsewhere_and_refusals_do_not() {
        assert_eq!(judge(&Status::unknown("transport error")), Verdict::Broken);
        assert_eq!(judge(&rich::status(Code::Internal, "STEP_PANICKED", "")), Verdict::Final);
        assert_eq!(judge(&rich::status(Code::Aborted, "READER_STALLED", "")), Verdict::Final);
        assert_eq!(judge(&rich::status(Code::Unavailable, "WORKER_DRAINING", "")), Verdict::Broken);
        assert_eq!(judge(&rich::status(Code::FailedPrecondition, "STALE_EPOCH", "")), Verdict::Broken);
        assert_eq!(judge(&rich::status(Code::ResourceExhausted, "QUEUE_FULL", "")), Verdict::Busy);
        assert_eq!(judge(&Status::invalid_argument("")), Verdict::Final);
        assert_eq!(judge(&Status::deadline_exceeded("")), Verdict::Final);
    }

    #[test]
    fn clients_hear_of_the_fields_that_they_sent() {
        let fields = ["settings.max_tokens", "settings.draft.fixed", "settings.nfe_cap", "prompt_ids", "suffix_ids"];
        let refused = rich::invalid(&fields.map(|field| Violation::new(field, "is wrong")));
        let expected = [
            (Method::Generate, ["decoding.max_tokens", "decoding.draft.fixed", "decoding.nfe_cap", "input", "suffix"]),
            (
                Method::Resume,
                [
                    "resume.settings.max_tokens",
                    "resume.settings.draft.fixed",
                    "resume.settings.nfe_cap",
                    "input",
                    "suffix",
                ],
            ),
            (Method::Edit, ["spans", "spans", "nfe_cap", "spans", "suffix_ids"]),
        ];
        for (method, names) in expected {
            let status = forward(&refused, method);
            assert_eq!(status.code(), Code::InvalidArgument);
            assert_eq!(status.message(), names.map(|name| format!("{name}: is wrong")).join("; "));
            let bad = status.get_details_bad_request().unwrap();
            assert_eq!(bad.field_violations.into_iter().map(|found| found.field).collect::<Vec<_>>(), names);
        }
        let status = forward(&rich::status(Code::NotFound, "UNKNOWN_MODEL", "no model"), Method::Generate);
        assert_eq!(status.get_details_error_info().unwrap().reason, "UNKNOWN_MODEL");
        assert_eq!(status.message(), "no model");
    }
}
