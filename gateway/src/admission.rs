//! How much is under way at a time, and who waits: the limits of a gateway around the queue of [`Fair`].
//!
//! While fewer rows and streams are under way than the limits say, the next one that waits begins, whatever its size: room
//! is never left unused, and no large request waits for ever behind small ones. So rows under way exceed their limit by less
//! than one request, not counting streams that began elsewhere, which do not wait.

use crate::fair::{Asked, Fair, Place};
use crate::relay::stopping;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout};
use tonic::{Code, Status};
use unmask_proto::rich;

/// Soonest and latest that a refused request is told to come again.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(500);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// What a request that ends leaves of those before it, in the mean of how long requests take.
const MEMORY: f64 = 15.0 / 16.0;

/// Limits of a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of work under way: prompts and the most they may generate.
    pub rows_max: u64,
    /// Streams under way.
    pub streams_max: usize,
    /// Requests that wait.
    pub queue_max: usize,
    /// Longest wait of one.
    pub queue_wait: Duration,
}

/// A request that wants to begin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask {
    pub tenant: u64,
    /// Of the tenant, at least 1.
    pub weight: u32,
    pub rows: u64,
    /// Larger is sooner.
    pub priority: i32,
    pub deadline: Option<Instant>,
    /// Its stream began elsewhere: it does not wait.
    pub begun: bool,
}

/// Lets requests begin.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: Limits,
    state: Mutex<State>,
    /// The last stream ended.
    emptied: Notify,
}

type Answer = Result<Ticket, Status>;

#[derive(Debug)]
struct State {
    waiting: Fair<oneshot::Sender<Answer>>,
    /// Under way.
    rows: u64,
    streams: usize,
    /// Of requests that ended, the last ones counting most: rows times seconds, and rows.
    row_seconds: f64,
    ended_rows: f64,
    closed: bool,
}

impl State {
    fn room(&self, limits: &Limits) -> bool {
        self.rows < limits.rows_max && self.streams < limits.streams_max
    }

    fn begin(&mut self, rows: u64) {
        self.rows += rows;
        self.streams += 1;
    }

    fn end(&mut self, rows: u64, after: Duration) {
        self.rows -= rows;
        self.streams -= 1;
        self.row_seconds = self.row_seconds * MEMORY + rows as f64 * after.as_secs_f64();
        self.ended_rows = self.ended_rows * MEMORY + rows as f64;
    }

    /// How long until so many rows have begun, by Little's law: rows under way end at the rate of their number by the
    /// mean time that one takes. `None` while nothing has ended.
    fn wait(&self, rows: u64) -> Option<Duration> {
        let seconds = (self.ended_rows > 0.0).then(|| self.row_seconds / self.ended_rows)?;
        Duration::try_from_secs_f64(rows as f64 * seconds / self.rows.max(1) as f64).ok()
    }

    /// A refusal that says when what waits now will have begun.
    fn refusal(&self, reason: &str, message: String) -> Status {
        let wait = self.wait(self.waiting.rows()).unwrap_or_default();
        refusal(reason, message, wait)
    }
}

fn refusal(reason: &str, message: String, wait: Duration) -> Status {
    let after = wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX);
    rich::retryable(Code::ResourceExhausted, reason, message, after)
}

impl Admission {
    /// Nothing is under way.
    pub(crate) fn new(limits: Limits) -> Self {
        let waiting = Fair::new();
        let state = State { waiting, rows: 0, streams: 0, row_seconds: 0.0, ended_rows: 0.0, closed: false };
        Self { limits, state: Mutex::new(state), emptied: Notify::new() }
    }

    /// Waits for its turn. Dropping this leaves the queue.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED with when to try again: DEADLINE_UNREACHABLE at once, when the turn is not expected before the
    /// deadline; QUEUE_FULL when too many wait and its tenant has the most waiting; QUEUE_TIMEOUT after the longest wait;
    /// TOO_MANY_STREAMS for a stream that began elsewhere. UNAVAILABLE when the gateway stops.
    pub(crate) async fn enter(self: &Arc<Self>, ask: Ask) -> Answer {
        if ask.begun {
            return self.go_on(ask.rows);
        }
        let (place, answer) = self.line_up(&ask)?;
        let _leaves = Leaving { admission: self, place };
        match timeout(self.limits.queue_wait, answer).await {
            Ok(Ok(answer)) => answer,
            // What waits too long is dropped on either side.
            Ok(Err(_)) | Err(_) => {
                let message = format!("waited for {} ms, the limit", self.limits.queue_wait.as_millis());
                let refused = self.state().refusal("QUEUE_TIMEOUT", message);
                Err(refused)
            }
        }
    }

    /// Takes nothing new, and refuses who waits.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        while let Some(answer) = state.waiting.shed() {
            // Nobody listens any more where the client has gone.
            let _ = answer.send(Err(stopping()));
        }
    }

    /// Until no stream is under way.
    pub(crate) async fn emptied(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.state().streams == 0 {
                return;
            }
            emptied.await;
        }
    }

    fn go_on(self: &Arc<Self>, rows: u64) -> Answer {
        let mut state = self.state();
        if state.closed {
            return Err(stopping());
        }
        if state.streams >= self.limits.streams_max {
            let message = format!("the gateway serves {} streams, its limit: try again later", state.streams);
            return Err(state.refusal("TOO_MANY_STREAMS", message));
        }
        state.begin(rows);
        Ok(self.ticket(rows))
    }

    fn line_up(self: &Arc<Self>, ask: &Ask) -> Result<(Place, oneshot::Receiver<Answer>), Status> {
        let now = Instant::now();
        let Ask { tenant, weight, rows, priority, deadline, begun: _ } = *ask;
        let (deadline, until) = (deadline.map(Instant::into_std), (now + self.limits.queue_wait).into_std());
        let asked = Asked { tenant, weight, rows, priority, deadline, until };
        let mut state = self.state();
        if state.closed {
            return Err(stopping());
        }
        if let (false, Some(deadline)) = (state.room(&self.limits), ask.deadline) {
            let wait = state.wait(state.waiting.ahead(&asked)).unwrap_or_default();
            if now + wait > deadline {
                let message = format!("its turn comes in about {} ms, after its deadline", wait.as_millis());
                return Err(refusal("DEADLINE_UNREACHABLE", message, wait));
            }
        }
        let (sender, answer) = oneshot::channel();
        let place = state.waiting.push(&asked, sender);
        let begin = self.admit(&mut state);
        while state.waiting.len() > self.limits.queue_max {
            let refused = state.refusal("QUEUE_FULL", format!("{} requests wait, the limit", self.limits.queue_max));
            let Some(shed) = state.waiting.shed() else { break };
            let _ = shed.send(Err(refused));
        }
        drop(state);
        self.tell(begin);
        Ok((place, answer))
    }

    /// Takes out of the queue what there is room for.
    fn admit(&self, state: &mut State) -> Vec<(oneshot::Sender<Answer>, u64)> {
        let mut begin = Vec::new();
        while state.room(&self.limits) {
            let Some((answer, rows)) = state.waiting.pop(Instant::now().into_std()) else { break };
            state.begin(rows);
            begin.push((answer, rows));
        }
        begin
    }

    /// Not while the state is locked: a ticket that nobody takes ends at once.
    fn tell(self: &Arc<Self>, begin: Vec<(oneshot::Sender<Answer>, u64)>) {
        for (answer, rows) in begin {
            let _ = answer.send(Ok(self.ticket(rows)));
        }
    }

    fn ticket(self: &Arc<Self>, rows: u64) -> Ticket {
        Ticket { admission: Arc::clone(self), rows, since: Instant::now() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue, given up when its request goes away.
struct Leaving<'a> {
    admission: &'a Admission,
    place: Place,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // Nothing is there when its turn has come.
        let _ = self.admission.state().waiting.cancel(self.place);
    }
}

/// A stream that is under way, until this is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    admission: Arc<Admission>,
    rows: u64,
    since: Instant,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        state.end(self.rows, self.since.elapsed());
        let begin = self.admission.admit(&mut state);
        if state.streams == 0 {
            self.admission.emptied.notify_waiters();
        }
        drop(state);
        self.admission.tell(begin);
    }
}

#[cfg(test)]
mod tests;
