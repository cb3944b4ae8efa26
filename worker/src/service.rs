//! WorkerService: checks epoch, model and deadline, hands requests to the runner, streams what comes back.

use crate::delivery::{Reading, Terms};
use crate::descriptor::TokenizerFiles;
use crate::mapping;
use crate::membership::{Membership, Readiness, Standing};
use crate::runner::{self, Handle};
use futures::stream::{BoxStream, StreamExt as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
use unmask_proto::v1::{FetchTokenizerRequest, FetchTokenizerResponse, Loaded, RunRequest, RunResponse};

/// A model that is served, by the group that this worker leads.
pub(crate) struct Serving {
    pub runner: Handle,
    pub model_name: String,
    pub default_policy: Policy,
    pub tokenizer: TokenizerFiles,
    /// Latest revision of the model's policy among the requests taken.
    pub policy_revision: AtomicU64,
    /// What the controller is told of it, where it was the controller that assigned it.
    pub loaded: Option<Loaded>,
}

/// What is served at present, if anything.
pub(crate) type Present = watch::Receiver<Option<Arc<Serving>>>;

/// What the service serves.
pub(crate) struct Service {
    pub serving: Present,
    pub membership: Arc<Membership>,
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
        let serving = self.serving()?;
        // Counted before the state is read: who drains sees this stream, or this stream sees the draining.
        let open = OpenStream::new(&self.open, &serving.runner);
        let deadline = grpc_timeout(request.metadata())?.map(|timeout| arrived + timeout);
        let message = request.into_inner();
        self.check(&message, &serving)?;
        let terms = terms(&message, arrived, deadline);
        let (request_id, epoch) = (message.request_id.clone(), message.epoch);
        let request = mapping::request(message, serving.runner.next_id(), &serving.default_policy)
            .map_err(|violations| rich::invalid(&violations))?;
        let revision = terms.policy_revision;
        let reading = serving.runner.submit(request, terms).await?;
        serving.policy_revision.fetch_max(revision, Ordering::Relaxed);
        tracing::debug!(request_id, epoch, "runs");
        Ok(Response::new(stream(reading, open)))
    }

    async fn fetch_tokenizer(
        &self,
        request: Request<FetchTokenizerRequest>,
    ) -> Result<Response<FetchTokenizerResponse>, Status> {
        let digest = request.into_inner().digest;
        let serving = self.serving()?;
        if !digest.is_empty() && digest != serving.tokenizer.digest {
            let message = format!("no tokenizer `{digest}` here, only `{}`", serving.tokenizer.digest);
            return Err(rich::status(Code::NotFound, "UNKNOWN_TOKENIZER", message));
        }
        Ok(Response::new(serving.tokenizer.response()))
    }
}

impl Service {
    fn serving(&self) -> Result<Arc<Serving>, Status> {
        self.serving.borrow().clone().ok_or_else(|| {
            let message = "this worker leads no group at present";
            rich::retryable(Code::Unavailable, "NOT_SERVING", message, mapping::RETRY_AFTER)
        })
    }

    fn check(&self, message: &RunRequest, serving: &Serving) -> Result<(), Status> {
        let Standing { epoch, readiness } = self.membership.standing();
        if readiness == Readiness::Draining {
            return Err(rich::retryable(
                Code::Unavailable,
                "WORKER_DRAINING",
                "the worker finishes what it holds and takes nothing new",
                mapping::RETRY_AFTER,
            ));
        }
        // First: who comes by an old route meant another group, perhaps of another model.
        if message.epoch != 0 && message.epoch != epoch && !planted(Bug::NoEpochCheck) {
            let message = format!("epoch {} is not this group's, which is {epoch}", message.epoch);
            return Err(rich::status(Code::FailedPrecondition, "STALE_EPOCH", message));
        }
        if !message.model.is_empty() && message.model != serving.model_name {
            let message = format!("no model `{}` here, only `{}`", message.model, serving.model_name);
            return Err(rich::status(Code::NotFound, "UNKNOWN_MODEL", message));
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
        begins: message.prompt_ids.len() as u32,
        prompt_tokens: (message.prompt_ids.len() + message.suffix_ids.len()) as u32,
        committed,
        passes_used: message.passes_used,
        blocks_recomputed: committed / block_size,
        policy_revision: settings.map_or(0, |settings| settings.policy_revision),
    }
}

/// Events, then the status when there is one.
fn stream(reading: Reading, open: OpenStream) -> BoxStream<'static, Result<RunResponse, Status>> {
    let hangs = open.runner.hangs().clone();
    let events = ReceiverStream::new(reading.events).take_until(hangs.clone().cancelled_owned());
    let end = async move {
        tokio::select! {
            biased;
            end = reading.end => end.unwrap_or_else(|_| Err(runner::stopped())),
            () = hangs.cancelled() => Err(runner::hanging()),
        }
    };
    let end = futures::stream::once(end).filter_map(move |end| {
        // Held as long as the stream.
        let _ = &open;
        std::future::ready(end.err().map(Err))
    });
    events.map(Ok).chain(end).boxed()
}

/// The `grpc-timeout` of a call.
fn grpc_timeout(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    metadata.get("grpc-timeout").map(|value| timeout::read(value.to_str().ok())).transpose()
}
