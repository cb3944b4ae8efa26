//! WorkerService: checks epoch, model and deadline, hands requests to the runner, streams what comes back.

use crate::delivery::{Reading, Terms};
use crate::descriptor::TokenizerFiles;
use crate::mapping;
use crate::membership::{Membership, Readiness};
use crate::runner::{self, Handle};
use futures::stream::{BoxStream, StreamExt as _};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};
use unmask_engine::Policy;
use unmask_proto::failpoints::{Bug, planted};
use unmask_proto::rich;
use unmask_proto::timeout::{self, TIMEOUT_MAX};
use unmask_proto::v1::worker_service_server::WorkerService;
use unmask_proto::v1::{FetchTokenizerRequest, FetchTokenizerResponse, RunRequest, RunResponse};

/// What the service serves.
pub(crate) struct Service {
    pub runner: Handle,
    pub membership: Arc<Membership>,
    pub model_name: String,
    pub default_policy: Policy,
    pub tokenizer: Arc<TokenizerFiles>,
    /// Streams that are open, waited for at shutdown.
    pub open: watch::Sender<usize>,
}

/// Counts a stream as open until it is dropped, and tells the runner then.
struct OpenStream {
    open: watch::Sender<usize>,
    runner: Handle,
}

impl OpenStream {
    fn new(open: &watch::Sender<usize>, runner: &Handle) -> Self {
        open.send_modify(|count| *count += 1);
        Self { open: open.clone(), runner: runner.clone() }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.open.send_modify(|count| *count -= 1);
        self.runner.wake();
    }
}

#[tonic::async_trait]
impl WorkerService for Service {
    type RunStream = BoxStream<'static, Result<RunResponse, Status>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let arrived = Instant::now();
        // Counted before the state is read: who drains sees this stream, or this stream sees the draining.
        let open = OpenStream::new(&self.open, &self.runner);
        let deadline = grpc_timeout(request.metadata())?.map(|timeout| arrived + timeout);
        let message = request.into_inner();
        self.check(&message)?;
        let terms = terms(&message, arrived, deadline);
        let (request_id, epoch) = (message.request_id.clone(), message.epoch);
        let request = mapping::request(message, self.runner.next_id(), &self.default_policy)
            .map_err(|violations| rich::invalid(&violations))?;
        let reading = self.runner.submit(request, terms).await?;
        tracing::debug!(request_id, epoch, "runs");
        Ok(Response::new(stream(reading, open)))
    }

    async fn fetch_tokenizer(
        &self,
        request: Request<FetchTokenizerRequest>,
    ) -> Result<Response<FetchTokenizerResponse>, Status> {
        let digest = request.into_inner().digest;
        if !digest.is_empty() && digest != self.tokenizer.digest {
            let message = format!("no tokenizer `{digest}` here, only `{}`", self.tokenizer.digest);
            return Err(rich::status(Code::NotFound, "UNKNOWN_TOKENIZER", message));
        }
        Ok(Response::new(self.tokenizer.response()))
    }
}

impl Service {
    fn check(&self, message: &RunRequest) -> Result<(), Status> {
        if self.membership.readiness() == Readiness::Draining {
            return Err(rich::retryable(
                Code::Unavailable,
                "WORKER_DRAINING",
                "the worker finishes what it holds and takes nothing new",
                mapping::RETRY_AFTER,
            ));
        }
        if !message.model.is_empty() && message.model != self.model_name {
            let message = format!("no model `{}` here, only `{}`", message.model, self.model_name);
            return Err(rich::status(Code::NotFound, "UNKNOWN_MODEL", message));
        }
        let epoch = self.membership.epoch();
        if message.epoch != 0 && message.epoch != epoch && !planted(Bug::NoEpochCheck) {
            let message = format!("epoch {} is not this group's, which is {epoch}", message.epoch);
            return Err(rich::status(Code::FailedPrecondition, "STALE_EPOCH", message));
        }
        Ok(())
    }
}

fn terms(message: &RunRequest, arrived: Instant, deadline: Option<Instant>) -> Terms {
    let settings = message.settings.as_ref();
    let time_limit = settings.map(|settings| settings.time_limit_ms).filter(|&millis| millis > 0);
    let block_size = settings.map_or(1, |settings| settings.block_size).max(1);
    let committed = message.committed_ids.len() as u32;
    Terms {
        arrived,
        deadline,
        time_limit: time_limit.map(|millis| arrived + Duration::from_millis(millis).min(TIMEOUT_MAX)),
        prompt_tokens: message.prompt_ids.len() as u32,
        committed,
        passes_used: message.passes_used,
        blocks_recomputed: committed / block_size,
        policy_revision: settings.map_or(0, |settings| settings.policy_revision),
    }
}

/// Events, then the status when there is one.
fn stream(reading: Reading, open: OpenStream) -> BoxStream<'static, Result<RunResponse, Status>> {
    let end = futures::stream::once(reading.end).filter_map(move |end| {
        // Held as long as the stream.
        let _ = &open;
        std::future::ready(match end {
            Ok(Ok(())) => None,
            Ok(Err(status)) => Some(Err(status)),
            Err(_) => Some(Err(runner::stopped())),
        })
    });
    ReceiverStream::new(reading.events).map(Ok).chain(end).boxed()
}

/// The `grpc-timeout` of a call.
fn grpc_timeout(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    metadata.get("grpc-timeout").map(|value| timeout::read(value.to_str().ok())).transpose()
}
