//! Owns the engine: takes requests between steps, steps, delivers. It runs as a thread; a simulation runs it as a task.
//!
//! Everybody else holds a [`Handle`]. A reader that drops its stream frees its rows before the next step; a reader
//! that is slow pauses its own request only, and loses its pages to others when it stays so; a panic over one request
//! ends that request, one in the forward pass ends those the engine holds, neither ends the thread.

use crate::delivery::{Delivery, Flow, Reading, Terms};
use crate::group::CANARY_INTERVAL;
use crate::mapping;
use crate::pace::{Pace, Pacer, Step};
use crate::watchdog::Watched;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use unmask_engine::group::CommError;
use unmask_engine::{Engine, Event, Load, Request, RequestId, StepReport};
use unmask_proto::rich;

/// Letters that wait for the runner; a request that finds it full is refused.
const MAILBOX_MAX: usize = 1024;
/// Letters taken between two steps.
const LETTERS_PER_STEP_MAX: usize = 256;
/// How often readers of paused requests are looked at while nothing else runs.
const PAUSED_POLL: Duration = Duration::from_millis(5);

/// A letter to the runner.
enum Letter {
    Submit(Box<Submission>),
    /// Something outside the mailbox changed: a reader has gone, or the runner is to stop.
    Wake,
    #[cfg(test)]
    Panic,
    /// In a step that may take so long, until the other end says something.
    #[cfg(test)]
    Hang(Duration, std::sync::mpsc::Receiver<()>),
}

struct Submission {
    request: Request,
    terms: Terms,
    reply: oneshot::Sender<Result<Reading, Status>>,
}

/// Everybody's side of the runner.
#[derive(Clone)]
pub(crate) struct Handle {
    letters: mpsc::Sender<Letter>,
    load: watch::Receiver<Load>,
    pace: watch::Receiver<Pace>,
    failure: watch::Receiver<Option<CommError>>,
    hangs: CancellationToken,
    next_id: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Handle {
    /// A number no other request has.
    pub(crate) fn next_id(&self) -> RequestId {
        RequestId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Hands a request to the engine; answers when the engine took it (between two steps) or refused.
    ///
    /// # Errors
    /// The engine's refusal, RESOURCE_EXHAUSTED when the mailbox is full, UNAVAILABLE when the runner has stopped or hangs.
    pub(crate) async fn submit(&self, request: Request, terms: Terms) -> Result<Reading, Status> {
        let (reply, answer) = oneshot::channel();
        let letter = Letter::Submit(Box::new(Submission { request, terms, reply }));
        self.letters.try_send(letter).map_err(|error| match error {
            TrySendError::Full(_) => rich::retryable(
                Code::ResourceExhausted,
                "MAILBOX_FULL",
                format!("{MAILBOX_MAX} requests wait for the engine's attention"),
                mapping::RETRY_AFTER,
            ),
            TrySendError::Closed(_) => stopped(),
        })?;
        tokio::select! {
            biased;
            answer = answer => answer.map_err(|_| stopped())?,
            () = self.hangs.cancelled() => Err(hanging()),
        }
    }

    /// Makes the runner look around. Cheap; a full mailbox means that it is about to look anyway.
    pub(crate) fn wake(&self) {
        let _ = self.letters.try_send(Letter::Wake);
    }

    /// Ends every request with UNAVAILABLE and the thread with them.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// Why the engine's group is over, if it is.
    pub(crate) fn failure(&self) -> Option<CommError> {
        self.failure.borrow().clone()
    }

    /// Tells when the engine's group is over.
    pub(crate) fn watch_failure(&self) -> watch::Receiver<Option<CommError>> {
        self.failure.clone()
    }

    /// Whether the engine's thread hangs, and when it is found to: nothing that it holds ends by itself.
    pub(crate) fn hangs(&self) -> &CancellationToken {
        &self.hangs
    }

    /// How fast requests were decoded so far.
    pub(crate) fn pace(&self) -> Pace {
        *self.pace.borrow()
    }

    /// The engine's load as of the last step.
    pub(crate) fn load(&self) -> Load {
        *self.load.borrow()
    }

    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn watch_load(&self) -> watch::Receiver<Load> {
        self.load.clone()
    }

    #[cfg(test)]
    pub(crate) fn panic(&self) {
        let _ = self.letters.try_send(Letter::Panic);
    }

    #[cfg(test)]
    pub(crate) fn hang(&self, limit: Duration) -> std::sync::mpsc::Sender<()> {
        let (end, ended) = std::sync::mpsc::channel();
        let _ = self.letters.try_send(Letter::Hang(limit, ended));
        end
    }
}

/// The status of requests whose runner is gone: another group may take them.
pub(crate) fn stopped() -> Status {
    rich::retryable(Code::Unavailable, "WORKER_STOPPING", "the worker is stopping", mapping::RETRY_AFTER)
}

/// The status of requests whose runner hangs: another group may take them.
pub(crate) fn hanging() -> Status {
    rich::retryable(Code::Unavailable, "GROUP_LOST", "the worker's engine hangs", mapping::RETRY_AFTER)
}

/// How long a reader may take nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Then its request loses its pages until the reader goes on.
    pub preempt: Duration,
    /// Then the request ends.
    pub give_up: Duration,
}

/// Starts the thread.
///
/// # Errors
/// When the system gives no thread.
pub(crate) fn start(engine: Engine, patience: Patience) -> io::Result<(Handle, JoinHandle<()>)> {
    let (runner, handle) = Runner::new(engine, patience);
    let waiting = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let watched = runner.watched(&handle);
    std::thread::Builder::new().name("unmask-watchdog".into()).spawn(move || watched.watch())?;
    let run = move || waiting.block_on(runner.run(|_| Duration::ZERO));
    let thread = std::thread::Builder::new().name("unmask-engine".into()).spawn(run)?;
    Ok((handle, thread))
}

pub(crate) struct Runner {
    /// Why the engine's group is over, for everybody.
    failure: watch::Sender<Option<CommError>>,
    /// When every rank last computed something.
    proven: Instant,
    patience: Patience,
    /// Zero of the clock by which the engine compares deadlines.
    origin: Instant,
    engine: Engine,
    mailbox: mpsc::Receiver<Letter>,
    load: watch::Sender<Load>,
    pace: watch::Sender<Pace>,
    pacer: Pacer,
    deliveries: BTreeMap<RequestId, Delivery>,
    /// Reused between steps.
    events: Vec<Event>,
    stop: Arc<AtomicBool>,
}

/// What follows a turn.
enum Turn {
    /// The next one, at once: this step carried rows.
    Next(StepReport),
    /// The next one when a letter comes, or by then.
    Wait(Option<Instant>),
    Stop,
}

impl Runner {
    pub(crate) fn new(engine: Engine, patience: Patience) -> (Self, Handle) {
        let (letters, mailbox) = mpsc::channel(MAILBOX_MAX);
        let (load, loads) = watch::channel(engine.load());
        let stop = Arc::new(AtomicBool::new(false));
        let (failed, failure) = watch::channel(None);
        let next_id = Arc::new(AtomicU64::new(1));
        let (pace, paces) = watch::channel(Pace::default());
        let hangs = CancellationToken::new();
        let handle = Handle { letters, load: loads, pace: paces, failure, hangs, next_id, stop: Arc::clone(&stop) };
        let now = Instant::now();
        let runner = Self {
            failure: failed,
            proven: now,
            patience,
            origin: now,
            engine,
            mailbox,
            load,
            pace,
            pacer: Pacer::default(),
            deliveries: BTreeMap::new(),
            events: Vec::new(),
            stop,
        };
        (runner, handle)
    }

    /// For the watchdog's thread.
    fn watched(&self, handle: &Handle) -> Watched<Letter> {
        Watched {
            pulse: Arc::clone(self.engine.pulse()),
            letters: handle.letters.downgrade(),
            limit: self.engine.step_limit().base,
            failure: self.failure.clone(),
            hangs: handle.hangs.clone(),
        }
    }

    /// Turns until it is stopped. A step that carried rows takes as long as it takes, and `cost` on top.
    pub(crate) async fn run(mut self, cost: impl Fn(StepReport) -> Duration) {
        let mut letter = None;
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn(letter.take()))) {
                Ok(Turn::Next(report)) => {
                    let cost = cost(report);
                    if !cost.is_zero() {
                        sleep(cost).await;
                    }
                }
                Ok(Turn::Wait(until)) => match self.wait(until).await {
                    Some(come) => letter = come,
                    None => break,
                },
                Ok(Turn::Stop) => break,
                // The ranks of a group would wait for the rest of the step.
                Err(_) if self.engine.ranks() > 1 => {
                    self.end_group(&CommError::Aborted);
                    break;
                }
                Err(_) => self.start_over(),
            }
        }
        for delivery in std::mem::take(&mut self.deliveries).into_values() {
            delivery.end(Err(stopped()));
        }
    }

    /// Letters, readers, one step.
    fn turn(&mut self, first: Option<Letter>) -> Turn {
        if let Some(letter) = first {
            self.open(letter);
        }
        for _ in 0..LETTERS_PER_STEP_MAX {
            match self.mailbox.try_recv() {
                Ok(letter) => self.open(letter),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Turn::Stop,
            }
        }
        if self.stop.load(Ordering::Acquire) {
            return Turn::Stop;
        }
        self.look_at_readers(Instant::now());
        let carried = if self.engine.has_work() { self.step() } else { None };
        if carried.is_some() {
            self.proven = Instant::now();
        } else if self.until_canary().is_some_and(|left| left.is_zero()) {
            self.engine.probe(1);
            self.proven = Instant::now();
        }
        if let Some(error) = self.engine.failure().cloned() {
            self.end_group(&error);
            return Turn::Stop;
        }
        self.load.send_replace(self.engine.load());
        self.pace.send_replace(self.pacer.pace);
        carried.map_or_else(
            || {
                self.pacer.idle();
                Turn::Wait(self.next_clock())
            },
            Turn::Next,
        )
    }

    /// Time until an idle group has to prove that every rank computes.
    fn until_canary(&self) -> Option<Duration> {
        (self.engine.ranks() > 1).then(|| CANARY_INTERVAL.saturating_sub(self.proven.elapsed()))
    }

    /// A rank is lost: what was committed stands, the rest goes on in another group.
    fn end_group(&mut self, error: &CommError) {
        tracing::error!(%error, requests = self.deliveries.len(), "the group is over");
        for delivery in std::mem::take(&mut self.deliveries).into_values() {
            let message = format!("the worker's group is over: {error}");
            delivery.end(Err(rich::retryable(Code::Unavailable, "GROUP_LOST", message, mapping::RETRY_AFTER)));
        }
        self.failure.send_replace(Some(error.clone()));
    }

    fn open(&mut self, letter: Letter) {
        self.engine.pulse().beat();
        match letter {
            Letter::Submit(submission) => self.submit(*submission),
            Letter::Wake => {}
            #[cfg(test)]
            Letter::Panic => panic!("as a test wants it"),
            #[cfg(test)]
            Letter::Hang(limit, end) => {
                let _step = self.engine.pulse().step(limit);
                let _ = end.recv();
            }
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { mut request, terms, reply } = submission;
        let id = request.id;
        let since_origin = |at: Instant| at.saturating_duration_since(self.origin).as_millis() as u64;
        request.deadline = terms.deadline.map(since_origin);
        // A request is looked at as a whole before the engine changes: a panic leaves it as it was.
        let submitted = catch_unwind(AssertUnwindSafe(|| self.engine.submit(request)));
        let Ok(submitted) = submitted else {
            let _ = reply.send(Err(failed()));
            return;
        };
        let answer = match submitted {
            Ok(()) => {
                let (delivery, reading) = Delivery::new(terms);
                self.deliveries.insert(id, delivery);
                Ok(reading)
            }
            Err(refusal) => Err(mapping::refused(&refusal)),
        };
        // Whoever asked may have gone; then the reading is dropped and the request is found abandoned.
        let _ = reply.send(answer);
    }

    /// Ends what is over by the clock or by its reader; pauses and resumes the others.
    fn look_at_readers(&mut self, now: Instant) {
        let (engine, patience) = (&mut self.engine, self.patience);
        let mut over = Vec::new();
        for (&id, delivery) in &mut self.deliveries {
            if delivery.abandoned() {
                over.push((id, Ok(())));
                continue;
            }
            if delivery.terms.deadline.is_some_and(|deadline| now >= deadline) {
                over.push((id, Err(deadline_exceeded())));
                continue;
            }
            let was = delivery.flow();
            if !delivery.finished() && delivery.terms.time_limit.is_some_and(|limit| now >= limit) {
                engine.cancel(id);
                delivery.time_over(now);
            }
            delivery.flush(now);
            match (was, delivery.flow()) {
                _ if delivery.complete() => over.push((id, Ok(()))),
                (_, Flow::Full(since)) if now.saturating_duration_since(since) >= patience.give_up => {
                    over.push((id, Err(reader_stalled(patience.give_up))));
                }
                // Of one that has none left it takes nothing.
                (_, Flow::Full(since)) if now.saturating_duration_since(since) >= patience.preempt => {
                    engine.preempt(id);
                }
                (Flow::Full(_), Flow::Open) => engine.pause(id, false),
                _ => {}
            }
        }
        for (id, result) in over {
            self.engine.cancel(id);
            self.end(id, result);
        }
    }

    /// One step and its events; `None` when no request could take rows.
    fn step(&mut self) -> Option<StepReport> {
        let began = Instant::now();
        let report = self.engine.step(&mut self.events);
        let now = Instant::now();
        let mut events = std::mem::take(&mut self.events);
        let carried = report.rows > 0 || !events.is_empty();
        if report.rows > 0 {
            let tokens =
                events.iter().map(|event| if let Event::Commit { tokens, .. } = event { tokens.len() } else { 0 });
            let revisions = self.deliveries.values().map(|delivery| delivery.terms.policy_revision);
            let tokens = tokens.sum::<usize>() as u64;
            self.pacer.step(Step { began, ended: now, tokens, requests: report.requests }, revisions);
        }
        for event in events.drain(..) {
            let id = event.id();
            if let Event::Failed { .. } = event {
                self.end(id, Err(failed()));
                continue;
            }
            let Some(delivery) = self.deliveries.get_mut(&id) else { continue };
            let was = delivery.flow();
            delivery.take(event, now);
            if delivery.complete() {
                self.end(id, Ok(()));
            } else if was == Flow::Open && delivery.flow() != Flow::Open {
                self.engine.pause(id, true);
            }
        }
        self.events = events;
        carried.then_some(report)
    }

    fn end(&mut self, id: RequestId, result: Result<(), Status>) {
        if let Some(delivery) = self.deliveries.remove(&id) {
            delivery.end(result);
        }
    }

    /// When the clock next has something to say.
    fn next_clock(&self) -> Option<Instant> {
        let now = Instant::now();
        let clocks = self.deliveries.values().flat_map(|delivery| {
            let limit = if delivery.finished() { None } else { delivery.terms.time_limit };
            [delivery.terms.deadline, limit]
        });
        let poll = self.deliveries.values().any(|d| d.flow() != Flow::Open).then_some(now + PAUSED_POLL);
        let canary = self.until_canary().map(|left| now + left);
        clocks.chain([poll, canary]).flatten().min()
    }

    /// Sleeps until a letter comes or the clock says so; `None` when nobody can write any more.
    async fn wait(&mut self, until: Option<Instant>) -> Option<Option<Letter>> {
        let letter = match until {
            Some(until) => match timeout_at(until, self.mailbox.recv()).await {
                Ok(letter) => letter,
                Err(_) => return Some(None),
            },
            None => self.mailbox.recv().await,
        };
        letter.map(Some)
    }

    /// After a panic nothing the engine holds can be trusted: its requests end, a new engine begins.
    fn start_over(&mut self) {
        tracing::error!(requests = self.deliveries.len(), "a step panicked; starting over with an empty engine");
        for delivery in std::mem::take(&mut self.deliveries).into_values() {
            delivery.end(Err(failed()));
        }
        self.events.clear();
        self.engine = self.engine.anew();
        self.load.send_replace(self.engine.load());
    }
}

/// The status of a request that met a bug.
fn failed() -> Status {
    rich::status(Code::Internal, "STEP_PANICKED", "a step of the engine failed")
}

/// The status of a request whose `grpc-timeout` passed.
pub(crate) fn deadline_exceeded() -> Status {
    rich::status(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "the deadline of the call passed")
}

fn reader_stalled(limit: Duration) -> Status {
    let message = format!("nothing was read for {} ms: the request was given up", limit.as_millis());
    rich::status(Code::Aborted, "READER_STALLED", message)
}

#[cfg(test)]
mod tests;
