//! The one task that owns the state: takes events in order, decides, carries out actions.

use crate::config::Config;
use crate::core::{Action, Ending, Event, Joining, State, StreamId, decide};
use crate::ledger::{Ledger, Recovered};
use crate::store::Store;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};
use unmask_proto::rich;
use unmask_proto::v1::{Assignment, JoinResponse, WatchRoutesResponse};

/// Events that wait for the task; senders wait when it is full.
const EVENTS_MAX: usize = 1024;
/// Unread answers of one Join stream; a worker that reads none of them is let go.
pub(crate) const ANSWERS_MAX: usize = 16;
/// When a refused worker may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The task's end of one Join stream. Dropping it ends the stream in both directions.
pub(crate) struct Outbound {
    /// Answers, at most [`ANSWERS_MAX`] unread.
    pub answers: mpsc::Sender<Result<JoinResponse, Status>>,
    /// Stops the reader of the stream.
    pub _stops_reader: DropGuard,
}

/// What the service tells the task.
pub(crate) enum Input {
    /// A stream opened, with its first message.
    Hello(StreamId, Box<Joining>, Outbound),
    /// Anything else.
    Event(Event),
}

/// The service's side of the task.
#[derive(Clone)]
pub(crate) struct Handle {
    pub inputs: mpsc::Sender<Input>,
    /// The last published table; `None` before the first.
    pub routes: watch::Receiver<Option<Arc<WatchRoutesResponse>>>,
    /// The leadership is over.
    pub over: CancellationToken,
}

/// The task.
pub(crate) struct Shell<S> {
    state: State,
    ledger: Ledger<S>,
    tick: Duration,
    inputs: mpsc::Receiver<Input>,
    routes: watch::Sender<Option<Arc<WatchRoutesResponse>>>,
    streams: HashMap<StreamId, Outbound>,
    /// Until when this replica surely leads.
    leading: watch::Receiver<Instant>,
    over: CancellationToken,
}

impl<S: Store> Shell<S> {
    pub(crate) fn new(
        config: &Config,
        ledger: Ledger<S>,
        recovered: Recovered,
        leading: watch::Receiver<Instant>,
        over: CancellationToken,
    ) -> (Self, Handle) {
        let (sender, inputs) = mpsc::channel(EVENTS_MAX);
        let (routes, watching) = watch::channel(None);
        let state = State::new(config.member_ttl, recovered.epoch_floor, recovered.groups);
        let handle = Handle { inputs: sender, routes: watching, over: over.clone() };
        let streams = HashMap::new();
        (Self { state, ledger, tick: config.tick(), inputs, routes, streams, leading, over }, handle)
    }

    pub(crate) async fn run(mut self) {
        let start = Instant::now();
        let mut ticks = interval(self.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let over = self.over.clone();
        loop {
            let event = tokio::select! {
                biased;
                () = over.cancelled() => break,
                // Before ticks: a heartbeat that waits here was heard of in time.
                input = self.inputs.recv() => match input {
                    Some(input) => self.take(input),
                    None => break,
                },
                _ = ticks.tick() => Event::Tick,
            };
            // A process that was paused must not act on what it knew before.
            if Instant::now() >= *self.leading.borrow() {
                break;
            }
            let actions = decide(&mut self.state, event, start.elapsed());
            self.carry_out(actions).await;
        }
        for outbound in self.streams.into_values() {
            // Full or gone: then the end of the channel says the same.
            let _ = outbound.answers.try_send(Err(stopping()));
        }
        self.over.cancel();
    }

    fn take(&mut self, input: Input) -> Event {
        match input {
            Input::Hello(stream, joining, outbound) => {
                self.streams.insert(stream, outbound);
                Event::Hello(stream, joining)
            }
            Input::Event(event) => {
                if let Event::StreamClosed(stream) = event {
                    self.streams.remove(&stream);
                }
                event
            }
        }
    }

    async fn carry_out(&mut self, actions: Vec<Action>) {
        let mut stored = true;
        for action in actions {
            match action {
                Action::Persist(fact) => {
                    if let Err(error) = self.ledger.record(&fact).await {
                        tracing::error!(%error, ?fact, "cannot store");
                        stored = false;
                    }
                }
                // An epoch that is not stored could be handed out twice.
                Action::Assign { stream, .. } if !stored => {
                    self.close(stream, unavailable("the store takes no writes"))
                }
                Action::Assign { stream, group_id, epoch } => self.assign(stream, group_id, epoch),
                Action::Close(stream, ending) => self.close(stream, ended(ending)),
                Action::PublishRoutes { revision, routes } => {
                    tracing::debug!(revision, routes = routes.len(), "routes");
                    let table = WatchRoutesResponse { term: self.ledger.term(), revision, routes };
                    self.routes.send_replace(Some(Arc::new(table)));
                }
            }
        }
    }

    fn assign(&mut self, stream: StreamId, group_id: String, epoch: u64) {
        tracing::info!(group_id, epoch, "assigns");
        let assignment = Some(Assignment { group_id, epoch });
        let answer = JoinResponse { term: self.ledger.term(), assignment };
        if let Some(outbound) = self.streams.get(&stream)
            && outbound.answers.try_send(Ok(answer)).is_err()
        {
            self.streams.remove(&stream);
        }
    }

    fn close(&mut self, stream: StreamId, status: Option<Status>) {
        if let (Some(outbound), Some(status)) = (self.streams.remove(&stream), status) {
            let _ = outbound.answers.try_send(Err(status));
        }
    }
}

/// The status a stream ends with; `None` ends it well.
fn ended(ending: Ending) -> Option<Status> {
    match ending {
        Ending::Left => None,
        Ending::Superseded => Some(rich::status(
            Code::Aborted,
            "SUPERSEDED",
            "the worker joined again, or another worker has its endpoint",
        )),
        Ending::Silent => unavailable("no report within the time-to-live: join again"),
        Ending::Full => {
            Some(rich::retryable(Code::ResourceExhausted, "TOO_MANY_MEMBERS", "the controller is full", RETRY_AFTER))
        }
    }
}

fn unavailable(why: &str) -> Option<Status> {
    Some(rich::retryable(Code::Unavailable, "CONTROLLER_UNAVAILABLE", why, RETRY_AFTER))
}

/// The status of streams that end because the controller stops, or leads no longer.
pub(crate) fn stopping() -> Status {
    rich::retryable(Code::Unavailable, "CONTROLLER_STOPPING", "this controller leads no longer", RETRY_AFTER)
}
