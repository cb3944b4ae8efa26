//! The one task that owns the state: takes events in order, decides, carries out actions.

use crate::admin;
use crate::config::Config;
use crate::core::{Action, Ending, Event, Joining, State, StreamId, decide};
use crate::ledger::{Ledger, Recovered};
use crate::store::Store;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};
use unmask_proto::network::Network;
use unmask_proto::rich;
use unmask_proto::v1::{Assignment, GetStatusResponse, JoinResponse, Seat, WatchRoutesResponse};

/// Events that wait for the task; senders wait when it is full.
const EVENTS_MAX: usize = 1024;
/// Unread answers of one Join stream; a worker that reads none of them is let go.
pub(crate) const ANSWERS_MAX: usize = 16;
/// Before each look for a worker whose stream broke off. A process that is killed closes its sockets one after the other,
/// and the one on which it listens may be the last.
const PROBE_PAUSES: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(20), Duration::from_millis(200), Duration::from_secs(1)];
/// Longest answer to one look.
const PROBE_LIMIT: Duration = Duration::from_secs(1);
/// Workers that are looked for at once; of others silence decides.
const PROBES_MAX: usize = 64;
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
    /// Anything else of a stream.
    Event(Event),
    /// What somebody asked for; answered with the revision of what it changed once it is stored.
    Command(Event, oneshot::Sender<Result<u64, Status>>),
    /// What there is.
    Status(oneshot::Sender<GetStatusResponse>),
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
    network: Network,
    /// Looks for workers whose streams broke off, at most [`PROBES_MAX`]; they end with the stream of one that is gone.
    probes: JoinSet<Option<StreamId>>,
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
        let Recovered { epoch_floor, groups, settings, desired, placed } = recovered;
        let state = State::new(config.member_ttl, epoch_floor, groups, settings).with_pool(desired, placed);
        let handle = Handle { inputs: sender, routes: watching, over: over.clone() };
        let (streams, network, probes) = (HashMap::new(), config.network.clone(), JoinSet::new());
        (Self { state, ledger, tick: config.tick(), inputs, routes, streams, network, probes, leading, over }, handle)
    }

    pub(crate) async fn run(mut self) {
        let start = Instant::now();
        let mut ticks = interval(self.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let over = self.over.clone();
        // However this ends, a panic included: nobody must wait for a task that is gone.
        let _end = over.clone().drop_guard();
        loop {
            let input = tokio::select! {
                biased;
                () = over.cancelled() => break,
                // Before ticks: a heartbeat that waits here was heard of in time.
                input = self.inputs.recv() => match input {
                    Some(input) => input,
                    None => break,
                },
                Some(probed) = self.probes.join_next() => match probed {
                    Ok(Some(stream)) => Input::Event(Event::Refused(stream)),
                    _ => continue,
                },
                _ = ticks.tick() => Input::Event(Event::Tick),
            };
            // A process that was paused must not act on what it knew before.
            if Instant::now() >= *self.leading.borrow() {
                break;
            }
            self.take(input, start.elapsed()).await;
        }
        for outbound in self.streams.into_values() {
            // Full or gone: then the end of the channel says the same.
            let _ = outbound.answers.try_send(Err(stopping()));
        }
    }

    async fn take(&mut self, input: Input, now: Duration) {
        let event = match input {
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
            Input::Status(answer) => {
                // Whoever asked may have gone.
                let _ = answer.send(admin::status(&self.state, self.ledger.term(), now));
                return;
            }
            Input::Command(event, answer) => {
                let _ = answer.send(self.command(event, now).await);
                return;
            }
        };
        let actions = decide(&mut self.state, event, now);
        self.carry_out(actions).await;
    }

    async fn command(&mut self, event: Event, now: Duration) -> Result<u64, Status> {
        admin::check(&self.state, &event)?;
        let asked = match &event {
            Event::SetPolicy(model, _) => Some(model.clone()),
            _ => None,
        };
        let actions = decide(&mut self.state, event, now);
        if !self.carry_out(actions).await {
            return Err(not_stored());
        }
        Ok(match asked {
            Some(model) => self.state.settings().get(&model).map_or(0, |settings| settings.revision),
            None => self.state.pool().revision,
        })
    }

    /// Whether everything was stored. What cannot be stored must not be acted on, and is in memory already: the
    /// leadership ends, and the next one begins with what the store has.
    async fn carry_out(&mut self, actions: Vec<Action>) -> bool {
        for action in actions {
            match action {
                Action::Persist(fact) => {
                    if let Err(error) = self.ledger.record(&fact).await {
                        tracing::error!(%error, ?fact, "cannot store; stepping down");
                        self.over.cancel();
                        return false;
                    }
                }
                Action::Assign { stream, group_id, epoch, seat } => self.assign(stream, group_id, epoch, seat),
                Action::Close(stream, ending) => self.close(stream, ended(ending)),
                Action::Probe { stream, endpoint } => self.probe(stream, endpoint),
                Action::TellToDrain(stream) => self.answer(stream, JoinResponse { drain: true, ..self.empty() }),
                Action::PublishRoutes { revision, routes, settings } => {
                    tracing::debug!(revision, routes = routes.len(), "routes");
                    let policies = admin::policies(&settings);
                    let table = WatchRoutesResponse { term: self.ledger.term(), revision, routes, policies };
                    self.routes.send_replace(Some(Arc::new(table)));
                }
            }
        }
        true
    }

    fn probe(&mut self, stream: StreamId, endpoint: String) {
        if self.probes.len() < PROBES_MAX {
            let network = self.network.clone();
            self.probes.spawn(async move { nobody_there(&network, &endpoint).await.then_some(stream) });
        }
    }

    fn empty(&self) -> JoinResponse {
        JoinResponse { term: self.ledger.term(), ..JoinResponse::default() }
    }

    fn assign(&mut self, stream: StreamId, group_id: String, epoch: u64, seat: Option<Seat>) {
        tracing::info!(group_id, epoch, "assigns");
        let assignment = Some(Assignment { group_id, epoch, seat });
        self.answer(stream, JoinResponse { assignment, ..self.empty() });
    }

    fn answer(&mut self, stream: StreamId, answer: JoinResponse) {
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

/// Whether a machine says that nobody listens at an address.
async fn nobody_there(network: &Network, address: &str) -> bool {
    for pause in PROBE_PAUSES {
        sleep(pause).await;
        if timeout(PROBE_LIMIT, network.refuses(address)).await == Ok(true) {
            return true;
        }
    }
    false
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

fn not_stored() -> Status {
    rich::retryable(Code::Unavailable, "STORE_UNAVAILABLE", "the store takes no writes", RETRY_AFTER)
}

fn unavailable(why: &str) -> Option<Status> {
    Some(rich::retryable(Code::Unavailable, "CONTROLLER_UNAVAILABLE", why, RETRY_AFTER))
}

/// The status of streams that end because the controller stops, or leads no longer.
pub(crate) fn stopping() -> Status {
    rich::retryable(Code::Unavailable, "CONTROLLER_STOPPING", "this controller leads no longer", RETRY_AFTER)
}
