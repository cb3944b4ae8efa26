//! Membership: joins the controller, reports, takes assignments; joins again when the stream breaks.
//!
//! It has an OS thread and runtime of its own: a busy machine must not make a worker look dead. While no
//! controller answers, the worker serves on in the epoch it has.

use crate::membership::{Membership, Order, Readiness, Standing};
use crate::service::{Present, Serving};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};
use unmask_engine::Load;
use unmask_proto::controllers::Controllers;
use unmask_proto::failpoints::{Bug, planted};
use unmask_proto::network::Network;
use unmask_proto::rich;
use unmask_proto::v1::controller_service_client::ControllerServiceClient;
use unmask_proto::v1::{Hello, JoinRequest, JoinResponse, Leave, Report, WorkerState, join_request::Message};

/// Time between reports; the controller's time-to-live is five of them.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for a connection and for the Join stream to open.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Messages the stream may hold back; when it is full the connection is stuck and is given up.
const OUTBOUND_MAX: usize = 8;
/// First pause before joining again; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause before joining again: a worker asks three replicas, two of which are gone, within the time-to-live that a
/// new leader gives it.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A stream that lasted this long starts the pauses anew.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// Longest wait for the controller to acknowledge a Leave.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// Who joins where.
pub(crate) struct Joiner {
    pub controllers: Controllers,
    pub network: Network,
    /// All but the epoch.
    pub hello: Hello,
    pub membership: Arc<Membership>,
    pub serving: Present,
}

/// Starts the thread. It says Leave and ends when `membership` drains, or just ends when `stop` is cancelled.
///
/// # Errors
/// When the system gives no thread or no runtime.
pub(crate) fn start(joiner: Joiner, stop: CancellationToken) -> io::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("unmask-join".into()).spawn(move || {
        runtime.block_on(run(joiner, stop));
    })
}

/// The thread's work.
pub(crate) async fn run(joiner: Joiner, stop: CancellationToken) {
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = joiner.run() => {}
    }
}

impl Joiner {
    async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        // One redirect is followed at once; where replicas point to each other, the next waits its turn.
        let mut redirected = false;
        let mut highest_term = 0;
        let mut readiness = self.membership.watch();
        loop {
            let began = Instant::now();
            match self.serve(&mut highest_term).await {
                Ok(()) => return,
                Err(status) => {
                    let controller = self.controllers.current().to_owned();
                    if self.controllers.failed(&status) && !std::mem::replace(&mut redirected, true) {
                        tracing::info!(controller, leader = self.controllers.current(), "another replica leads");
                        continue;
                    }
                    tracing::warn!(controller, %status, "not a member; joining again");
                }
            }
            if began.elapsed() >= STABLE_AFTER {
                backoff = BACKOFF_MIN;
            }
            tokio::select! {
                biased;
                // Nobody to take leave of.
                _ = readiness.wait_for(|standing| standing.readiness == Readiness::Draining) => return,
                () = tokio::time::sleep(backoff) => {}
            }
            backoff = (2 * backoff).min(BACKOFF_MAX);
            redirected = false;
        }
    }

    /// One stream, to its end. `Ok` when the worker has left.
    async fn serve(&self, highest_term: &mut u64) -> Result<(), Status> {
        let (out, mut answers) = timeout(CONNECT_LIMIT, self.open())
            .await
            .map_err(|_| rich::status(Code::Unavailable, "CONTROLLER_SILENT", "no answer in time"))??;
        let (mut standing, mut serving) = (self.membership.watch(), self.serving.clone());
        let mut reports = interval(REPORT_INTERVAL);
        reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if standing.borrow().readiness == Readiness::Draining {
                return self.leave(out, answers).await;
            }
            tokio::select! {
                biased;
                answer = answers.message() => {
                    let answer = answer?.ok_or_else(closed)?;
                    if self.take(answer, highest_term)?.is_break() {
                        continue;
                    }
                    self.report(&out)?;
                }
                _ = reports.tick() => self.report(&out)?,
                // What is served, before that it is.
                _ = serving.changed() => self.announce(&out)?,
                _ = standing.changed() => self.report(&out)?,
            }
        }
    }

    async fn open(&self) -> Result<(mpsc::Sender<JoinRequest>, Streaming<JoinResponse>), Status> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.controllers.current()))
            .map_err(|error| rich::status(Code::InvalidArgument, "BAD_CONTROLLER", error.to_string()))?
            .http2_keep_alive_interval(REPORT_INTERVAL)
            .keep_alive_timeout(CONNECT_LIMIT)
            // Else a stream whose client has been dropped counts as idle, and a controller that hangs is not noticed.
            .keep_alive_while_idle(true);
        let channel = self
            .network
            .connect(&endpoint)
            .await
            .map_err(|error| rich::status(Code::Unavailable, "NO_CONTROLLER", with_sources(&error)))?;
        let (out, requests) = mpsc::channel(OUTBOUND_MAX);
        send(&out, Message::Hello(Hello { epoch: self.membership.epoch(), ..self.hello.clone() }))?;
        self.announce(&out)?;
        let answers = ControllerServiceClient::new(channel).join(ReceiverStream::new(requests)).await?.into_inner();
        Ok((out, answers))
    }

    /// Takes an assignment; `Break` when there was none to take.
    fn take(&self, answer: JoinResponse, highest_term: &mut u64) -> Result<ControlFlow<()>, Status> {
        if answer.term < *highest_term && !planted(Bug::NoTermCheck) {
            let message = format!("term {} after {highest_term}: a leader of the past", answer.term);
            return Err(rich::status(Code::FailedPrecondition, "STALE_TERM", message));
        }
        *highest_term = answer.term;
        if answer.drain {
            tracing::info!(term = answer.term, "told to drain");
            self.membership.drain();
        }
        let Some(assignment) = answer.assignment else { return Ok(ControlFlow::Break(())) };
        let (epoch, seat) = (assignment.epoch, assignment.seat);
        let taken = match self.hello.capacity {
            Some(_) => self.membership.order(Order { epoch, seat }),
            None => self.membership.raise_epoch(epoch),
        };
        if !taken {
            let message = format!("epoch {epoch} is below {}", self.membership.epoch());
            return Err(rich::status(Code::FailedPrecondition, "STALE_EPOCH", message));
        }
        tracing::info!(group = assignment.group_id, epoch, term = answer.term, "assigned");
        Ok(ControlFlow::Continue(()))
    }

    /// Says what an assigned group serves, where this worker leads one.
    fn announce(&self, out: &mpsc::Sender<JoinRequest>) -> Result<(), Status> {
        let loaded = self.serving.borrow().as_ref().and_then(|serving| serving.loaded.clone());
        loaded.map_or(Ok(()), |loaded| send(out, Message::Loaded(loaded)))
    }

    fn report(&self, out: &mpsc::Sender<JoinRequest>) -> Result<(), Status> {
        let (load, policy_revision, pace) = match self.serving.borrow().as_ref() {
            Some(serving) => {
                let Serving { runner, policy_revision, .. } = &**serving;
                (runner.load(), policy_revision.load(Ordering::Relaxed), Some(runner.pace().message()))
            }
            None => (Load::default(), 0, None),
        };
        let Standing { epoch, readiness } = self.membership.standing();
        let (mut problem, mut loaded_percent) = (String::new(), 0);
        let state = match readiness {
            Readiness::Spare => WorkerState::Spare,
            Readiness::Loading(percent) => {
                loaded_percent = percent;
                WorkerState::Loading
            }
            Readiness::Ready => WorkerState::Ready,
            Readiness::Fenced(why) => {
                problem = why;
                WorkerState::Fenced
            }
            Readiness::Draining => WorkerState::Draining,
        };
        let report = Report {
            epoch,
            state: state.into(),
            problem,
            loaded_percent,
            policy_revision,
            pace,
            outstanding_rows: load.outstanding_rows,
            active_requests: load.active as u32,
            queued_requests: load.queued as u32,
        };
        send(out, Message::Report(report))
    }

    async fn leave(&self, out: mpsc::Sender<JoinRequest>, mut answers: Streaming<JoinResponse>) -> Result<(), Status> {
        self.report(&out)?;
        send(&out, Message::Leave(Leave {}))?;
        drop(out);
        // The controller ends the stream once the routes are without this worker.
        let ended = timeout(LEAVE_LIMIT, async { while let Ok(Some(_)) = answers.message().await {} }).await;
        if ended.is_err() {
            tracing::warn!("the controller did not acknowledge that this worker leaves");
        }
        Ok(())
    }
}

fn send(out: &mpsc::Sender<JoinRequest>, message: Message) -> Result<(), Status> {
    out.try_send(JoinRequest { message: Some(message) })
        .map_err(|_| rich::status(Code::Unavailable, "CONTROLLER_STUCK", "the stream takes no more reports"))
}

fn closed() -> Status {
    rich::status(Code::Unavailable, "CONTROLLER_CLOSED", "the controller ended the stream")
}

/// A transport error says little without its sources.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
