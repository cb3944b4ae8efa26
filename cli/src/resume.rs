//! A stream that goes on through another gateway when its own is lost: no token twice, none missing.

use crate::local::{Gateway, gateway};
use crate::tls::ClientTlsArgs;
use anyhow::{Context, anyhow};
use std::time::Duration;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;
use unmask_proto::rich;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::{GenerateRequest, GenerateResponse, Resume, Started};

/// Largest message of a stream (bytes).
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Rounds over all gateways without a new token before the last error counts.
const ROUNDS_MAX: usize = 3;
/// Between two rounds.
const ROUND_PAUSE: Duration = Duration::from_millis(500);

/// What has come of a stream so far: all that another gateway needs to go on.
#[derive(Debug, Default)]
pub struct Received {
    started: Option<Started>,
    ids: Vec<u32>,
    passes: u32,
}

impl Received {
    /// Takes note of an event; whether it is news (the second `Started` of a resumed stream is not).
    fn take(&mut self, event: &Event) -> bool {
        match event {
            Event::Started(started) => {
                let first = self.started.is_none();
                self.started.get_or_insert_with(|| started.clone());
                return first;
            }
            Event::Commit(commit) => {
                self.ids.extend(&commit.token_ids);
                self.passes += commit.steps;
            }
            Event::Draft(_) | Event::Finish(_) => {}
        }
        true
    }

    /// Whether a gateway that says so goes on to the same tokens.
    fn goes_on(&self, started: &Started) -> bool {
        self.started.as_ref().is_none_or(|first| first.numerics_id == started.numerics_id)
    }

    /// The request that goes on from here.
    fn request(&self, original: &GenerateRequest) -> GenerateRequest {
        let Some(started) = &self.started else { return original.clone() };
        let resume = Resume {
            request_id: started.request_id.clone(),
            received_token_ids: self.ids.clone(),
            settings: started.settings.clone(),
            passes_used: self.passes,
            numerics_id: started.numerics_id.clone(),
        };
        GenerateRequest { decoding: None, resume: Some(resume), model: started.model.clone(), ..original.clone() }
    }
}

/// A request and the gateways that may serve it.
pub struct Resuming {
    gateways: Vec<Gateway>,
    request: GenerateRequest,
    received: Received,
    events: Option<Streaming<GenerateResponse>>,
    /// Gateways tried since the last token.
    tried: usize,
    /// Times it went on through another gateway.
    pub resumed: usize,
}

impl Resuming {
    /// A request to one of `gateways`, the first that answers.
    pub fn new(gateways: Vec<Gateway>, request: GenerateRequest) -> Self {
        let gateways = gateways.into_iter().map(|client| client.max_decoding_message_size(MESSAGE_BYTES_MAX)).collect();
        Self { gateways, request, received: Received::default(), events: None, tried: 0, resumed: 0 }
    }

    /// The same over lazy connections to `endpoints`.
    ///
    /// # Errors
    /// An address is malformed, there is none, or certificates cannot be used.
    pub fn through(endpoints: &[String], tls: &ClientTlsArgs, request: GenerateRequest) -> anyhow::Result<Self> {
        let gateways: anyhow::Result<Vec<_>> = endpoints.iter().map(|endpoint| gateway(endpoint, tls)).collect();
        let gateways = gateways?;
        gateways.first().context("--endpoint: give at least one")?;
        Ok(Self::new(gateways, request))
    }

    /// The next event, up to and including the finish.
    ///
    /// # Errors
    /// The request was refused, or no gateway goes on with it.
    pub async fn next(&mut self) -> anyhow::Result<Event> {
        loop {
            let status = match self.read().await {
                Ok(Event::Started(started)) if !self.received.goes_on(&started) => other_tokens(&started),
                Ok(event) => {
                    // Only what is final is progress: a request that breaks whoever begins it must come to an end.
                    if matches!(event, Event::Commit(_)) {
                        self.tried = 0;
                    }
                    if self.received.take(&event) {
                        return Ok(event);
                    }
                    continue;
                }
                Err(status) => status,
            };
            self.events = None;
            self.tried += 1;
            let last = self.tried >= ROUNDS_MAX * self.gateways.len();
            if !elsewhere(&status) || self.gateways.len() == 1 || last {
                return Err(anyhow!(status));
            }
            tracing::warn!(%status, tokens = self.received.ids.len(), "going on through another gateway");
            self.gateways.rotate_left(1);
            self.resumed += usize::from(self.received.started.is_some());
            if self.tried.is_multiple_of(self.gateways.len()) {
                tokio::time::sleep(ROUND_PAUSE).await;
            }
        }
    }

    async fn read(&mut self) -> Result<Event, Status> {
        let events = match &mut self.events {
            Some(events) => events,
            None => {
                let request = self.received.request(&self.request);
                self.events.insert(self.gateways[0].generate(request).await?.into_inner())
            }
        };
        loop {
            match events.message().await? {
                Some(GenerateResponse { event: Some(event) }) => return Ok(event),
                // An event that this version does not know.
                Some(GenerateResponse { event: None }) => {}
                None => return Err(Status::unavailable("the stream ended without a finish")),
            }
        }
    }
}

/// A gateway took the request to a group that computes other bits.
fn other_tokens(started: &Started) -> Status {
    let message = format!("the gateway has only groups with other tokens (numerics {})", started.numerics_id);
    rich::status(Code::Unavailable, "OTHER_NUMERICS", message)
}

/// Whether another gateway may do better: this one is gone, goes, or has no room. Errors with a reason were made by a
/// gateway, those without by a connection that broke.
fn elsewhere(status: &Status) -> bool {
    let named = status.get_details_error_info().is_some();
    match status.code() {
        Code::Unavailable => true,
        Code::ResourceExhausted => status.get_details_retry_info().is_some(),
        Code::Unknown | Code::Internal | Code::Cancelled => !named,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use unmask_proto::v1::{Commit, Decoding, ResolvedSettings};

    #[test]
    fn what_was_received_becomes_the_request_that_goes_on() {
        let decoding = Some(Decoding { seed: Some(7), ..Decoding::default() });
        let original = GenerateRequest { suffix: Some("s".into()), decoding, ..GenerateRequest::default() };
        let mut received = Received::default();
        assert_eq!(received.request(&original), original);
        let settings = Some(ResolvedSettings { seed: 9, ..ResolvedSettings::default() });
        let started = Started { request_id: "r".into(), model: "m".into(), settings, ..Started::default() };
        assert!(received.take(&Event::Started(started.clone())));
        let other = Started { request_id: "other".into(), ..started };
        assert!(received.goes_on(&other) && !received.take(&Event::Started(other.clone())));
        assert!(!received.goes_on(&Started { numerics_id: "others".into(), ..other }));
        for ids in [vec![1, 2], vec![3]] {
            assert!(received.take(&Event::Commit(Commit { token_ids: ids, steps: 2, ..Commit::default() })));
        }
        let next = received.request(&original);
        let resume = next.resume.unwrap();
        assert_eq!((resume.request_id.as_str(), &resume.received_token_ids[..]), ("r", &[1, 2, 3][..]));
        assert_eq!((resume.passes_used, resume.settings.unwrap().seed), (4, 9));
        assert_eq!((next.model.as_str(), next.decoding, next.suffix.as_deref()), ("m", None, Some("s")));
    }

    #[test]
    fn refusals_stay_and_broken_connections_move_on() {
        assert!(elsewhere(&Status::unavailable("x")) && elsewhere(&Status::unknown("transport error")));
        let full = rich::retryable(Code::ResourceExhausted, "TOO_MANY_STREAMS", "x", ROUND_PAUSE);
        assert!(elsewhere(&full) && !elsewhere(&Status::resource_exhausted("x")));
        let named = rich::status(Code::Internal, "COMMIT_GAP", "x");
        assert!(!elsewhere(&named) && !elsewhere(&Status::invalid_argument("x")));
    }
}
