//! gRPC: checks what comes in, hands it to the task, streams what comes back.

use crate::admin;
use crate::core::{Event, Heartbeat, Joining, Measured, Pace, Readiness, StreamId};
use crate::lead::Standing;
use crate::policy::{Profile, Quality, ReadError};
use crate::shell::{ANSWERS_MAX, Handle, Input, Outbound, stopping};
use futures::stream::{BoxStream, StreamExt as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};
use unmask_proto::controllers::{is_host_port, not_leader};
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::admin_service_server::AdminService;
use unmask_proto::v1::controller_service_server::ControllerService;
use unmask_proto::v1::{
    ApplyRequest, ApplyResponse, DrainRequest, DrainResponse, GetStatusRequest, GetStatusResponse, Hello, JoinRequest,
    JoinResponse, Loaded, Report, SetPolicyRequest, SetPolicyResponse, WatchRoutesRequest, WatchRoutesResponse,
    WorkerState, join_request,
};
use unmask_proto::watch;

/// Most Join streams at once: every member, and as many that come back before their old stream is noticed.
const JOIN_STREAMS_MAX: usize = 2 * crate::core::MEMBERS_MAX;
/// Most gateways that watch at once.
const WATCHERS_MAX: usize = 1024;
/// Longest wait for a stream's first message.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait of a call for an election to end.
const ELECTION_WAIT: Duration = Duration::from_secs(1);
/// Longest worker id, endpoint or model name (bytes).
const NAME_BYTES_MAX: usize = 256;
/// Longest reason of a fenced worker (characters); the rest is left out.
const PROBLEM_CHARS_MAX: usize = 1024;
/// When a refused caller may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// ControllerService and AdminService.
#[derive(Clone)]
pub(crate) struct Service {
    standing: watch::Receiver<Standing>,
    next_stream: Arc<AtomicU64>,
    joins: Arc<Semaphore>,
    watchers: Arc<Semaphore>,
}

impl Service {
    pub(crate) fn new(standing: watch::Receiver<Standing>) -> Self {
        Self {
            standing,
            next_stream: Arc::new(AtomicU64::new(1)),
            joins: Arc::new(Semaphore::new(JOIN_STREAMS_MAX)),
            watchers: Arc::new(Semaphore::new(WATCHERS_MAX)),
        }
    }

    /// The task, while this replica leads. Waits a little while nobody is known to.
    async fn leading(&self) -> Result<Handle, Status> {
        let mut standing = self.standing.clone();
        let known = |standing: &Standing| !matches!(standing, Standing::Following(None));
        let found = tokio::time::timeout(ELECTION_WAIT, standing.wait_for(known)).await;
        match found.ok().and_then(Result::ok).as_deref() {
            Some(Standing::Leading(handle)) => Ok(handle.clone()),
            Some(Standing::Following(leader)) => Err(not_leader(leader.as_deref())),
            None => Err(not_leader(None)),
        }
    }
}

fn permit(of: &Arc<Semaphore>, what: &str) -> Result<OwnedSemaphorePermit, Status> {
    Arc::clone(of).try_acquire_owned().map_err(|_| {
        rich::retryable(Code::ResourceExhausted, "TOO_MANY_STREAMS", format!("too many {what} streams"), RETRY_AFTER)
    })
}

#[tonic::async_trait]
impl ControllerService for Service {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;

    async fn join(&self, request: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        let Handle { inputs, over, .. } = self.leading().await?;
        let permit = permit(&self.joins, "Join")?;
        let inbound = request.into_inner();
        let stream = StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let (answers, receiver) = mpsc::channel(ANSWERS_MAX);
        // The response opens at once: a client may wait for it before it sends its first message.
        tokio::spawn(async move {
            let _permit = permit;
            member_stream(stream, inbound, answers, inputs, over).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type WatchRoutesStream = BoxStream<'static, Result<WatchRoutesResponse, Status>>;

    async fn watch_routes(
        &self,
        _request: Request<WatchRoutesRequest>,
    ) -> Result<Response<Self::WatchRoutesStream>, Status> {
        let Handle { routes, over, .. } = self.leading().await?;
        let permit = permit(&self.watchers, "WatchRoutes")?;
        let tables = WatchStream::new(routes);
        let tables = tables.filter_map(move |table| {
            // Held as long as the stream.
            let _ = &permit;
            std::future::ready(table.map(|table| Ok(WatchRoutesResponse::clone(&table))))
        });
        let ended = futures::stream::once(over.clone().cancelled_owned()).map(|()| Err(stopping()));
        let until_over = tables.take_until(over.cancelled_owned());
        Ok(Response::new(until_over.chain(ended).boxed()))
    }
}

#[tonic::async_trait]
impl AdminService for Service {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let (answer, answered) = oneshot::channel();
        let inputs = self.leading().await?.inputs;
        inputs.send(Input::Status(answer)).await.map_err(|_| stopping())?;
        Ok(Response::new(answered.await.map_err(|_| stopping())?))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        self.command(Event::Drain(request.into_inner().worker_id)).await?;
        Ok(Response::new(DrainResponse {}))
    }

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let revision = self.command(admin::read_desired(request.into_inner())?).await?;
        Ok(Response::new(ApplyResponse { revision }))
    }

    async fn set_policy(&self, request: Request<SetPolicyRequest>) -> Result<Response<SetPolicyResponse>, Status> {
        let revision = self.command(admin::read(request.into_inner())?).await?;
        Ok(Response::new(SetPolicyResponse { revision }))
    }
}

impl Service {
    async fn command(&self, event: Event) -> Result<u64, Status> {
        let (answer, answered) = oneshot::channel();
        let inputs = self.leading().await?.inputs;
        inputs.send(Input::Command(event, answer)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }
}

/// Serves a Join stream to its end.
async fn member_stream(
    stream: StreamId,
    mut inbound: Streaming<JoinRequest>,
    answers: mpsc::Sender<Result<JoinResponse, Status>>,
    inputs: mpsc::Sender<Input>,
    over: CancellationToken,
) {
    let greeted = tokio::select! {
        biased;
        greeted = read_hello(&mut inbound) => greeted,
        () = over.cancelled() => Err(stopping()),
    };
    let joining = match greeted {
        Ok(joining) => joining,
        Err(status) => {
            let _ = answers.try_send(Err(status));
            return;
        }
    };
    // From here on the task holds the answers and can end the stream by letting go of them.
    let (weak, ended) = (answers.downgrade(), CancellationToken::new());
    let outbound = Outbound { answers, _stops_reader: ended.clone().drop_guard() };
    if inputs.send(Input::Hello(stream, Box::new(joining), outbound)).await.is_err() {
        return;
    }
    let read = tokio::select! {
        biased;
        read = read_reports(stream, &mut inbound, &inputs) => read,
        () = over.cancelled() => Err(stopping()),
        () = ended.cancelled() => Ok(()),
    };
    if let (Err(status), Some(answers)) = (read, weak.upgrade()) {
        let _ = answers.try_send(Err(status));
    }
    // Fails when the task is gone.
    let _ = inputs.send(Input::Event(Event::StreamClosed(stream))).await;
}

async fn read_hello(inbound: &mut Streaming<JoinRequest>) -> Result<Joining, Status> {
    let first = tokio::time::timeout(HELLO_LIMIT, inbound.message())
        .await
        .map_err(|_| rich::status(Code::DeadlineExceeded, "NO_HELLO", "no Hello came in time"))??;
    let Some(JoinRequest { message: Some(join_request::Message::Hello(hello)) }) = first else {
        return Err(rich::status(Code::InvalidArgument, "NO_HELLO", "the first message must be a Hello"));
    };
    validate(hello).map_err(|violations| rich::invalid(&violations))
}

async fn read_reports(
    stream: StreamId,
    inbound: &mut Streaming<JoinRequest>,
    inputs: &mpsc::Sender<Input>,
) -> Result<(), Status> {
    while let Some(JoinRequest { message }) = inbound.message().await? {
        let event = match message {
            Some(join_request::Message::Report(report)) => Event::Report(stream, heartbeat(&report)?),
            Some(join_request::Message::Loaded(loaded)) => read_loaded(stream, loaded)?,
            Some(join_request::Message::Leave(_)) => Event::Leave(stream),
            Some(join_request::Message::Hello(_)) => {
                return Err(rich::status(Code::InvalidArgument, "SECOND_HELLO", "a stream has one Hello"));
            }
            None => return Err(rich::invalid(&[Violation::new("message", "is empty")])),
        };
        inputs.send(Input::Event(event)).await.map_err(|_| stopping())?;
    }
    Ok(())
}

fn read_loaded(stream: StreamId, loaded: Loaded) -> Result<Event, Status> {
    let Some(model) = loaded.model.filter(|model| (1..=NAME_BYTES_MAX).contains(&model.name.len())) else {
        return Err(rich::invalid(&[Violation::new("loaded.model.name", "is missing, or too long")]));
    };
    let measured = measured(&model.name, &loaded.profile_json, &loaded.quality_json);
    Ok(Event::Loaded(stream, loaded.epoch, Box::new(model), measured))
}

fn validate(hello: Hello) -> Result<Joining, Vec<Violation>> {
    let mut found = Vec::new();
    let model = hello.model.unwrap_or_default();
    let own = match &hello.capacity {
        None => ("hello.model.name", &model.name),
        Some(capacity) => ("hello.capacity.rank_address", &capacity.rank_address),
    };
    for (field, value) in [("hello.worker_id", &hello.worker_id), ("hello.endpoint", &hello.endpoint), own] {
        if value.is_empty() {
            found.push(Violation::new(field, "is missing"));
        } else if value.len() > NAME_BYTES_MAX {
            let description = format!("has {} bytes, at most {NAME_BYTES_MAX} are taken", value.len());
            found.push(Violation::new(field, description));
        }
    }
    if !hello.endpoint.is_empty() && !is_host_port(&hello.endpoint) {
        found.push(Violation::new("hello.endpoint", format!("must be host:port, is `{}`", hello.endpoint)));
    }
    if !found.is_empty() {
        return Err(found);
    }
    let measured = measured(&hello.worker_id, &hello.profile_json, &hello.quality_json);
    let Hello { worker_id, endpoint, epoch, capacity, .. } = hello;
    Ok(Joining { worker_id, endpoint, model, capacity, epoch, measured })
}

/// Measurements serve a choice; a worker whose cannot be read serves without.
fn measured(worker_id: &str, profile: &str, quality: &str) -> Option<Arc<Measured>> {
    if profile.is_empty() || quality.is_empty() {
        return None;
    }
    let read = || Ok(Measured { profile: Profile::parse(profile)?, quality: Quality::parse(quality)? });
    let read: Result<Measured, ReadError> = read();
    read.inspect_err(|error| tracing::warn!(worker_id, %error, "its measurements are left out")).ok().map(Arc::new)
}

fn heartbeat(report: &Report) -> Result<Heartbeat, Status> {
    let readiness = match report.state() {
        WorkerState::Loading => Readiness::Loading,
        WorkerState::Ready => Readiness::Ready,
        WorkerState::Draining => Readiness::Draining,
        WorkerState::Spare => Readiness::Spare,
        WorkerState::Fenced => Readiness::Fenced,
        WorkerState::Unspecified => {
            return Err(rich::invalid(&[Violation::new("report.state", "must be said")]));
        }
    };
    let (active, outstanding_rows) = (report.active_requests, report.outstanding_rows);
    let requests = active.saturating_add(report.queued_requests);
    let problem = report.problem.chars().take(PROBLEM_CHARS_MAX).collect();
    let Report { epoch, loaded_percent, policy_revision, .. } = *report;
    let said = report.pace.unwrap_or_default();
    let seconds = |micros: u64| Duration::from_micros(micros).as_secs_f64();
    let pace = Pace {
        revision: said.revision,
        tokens: said.tokens,
        steps: said.steps,
        step_s: seconds(said.step_us),
        busy_s: seconds(said.busy_us),
        request_s: seconds(said.request_us),
    };
    Ok(Heartbeat {
        epoch,
        readiness,
        outstanding_rows,
        requests,
        active,
        problem,
        loaded_percent,
        policy_revision,
        pace,
    })
}
