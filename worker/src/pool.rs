//! A worker of the pool: takes the seats that it is assigned, one after the other.
//!
//! A seat is one rank of a group. Weights stay in memory from one seat to the next where it needs the same: a group that forms
//! anew after a rank was lost loads nothing but what is new. The last order counts; whatever is under way for an earlier
//! one is given up.

use crate::config::{Config, Pool};
use crate::descriptor::TokenizerFiles;
use crate::group::{engine, follow_rank, form, listen, load_share};
use crate::membership::{Membership, Order, Readiness};
use crate::service::Serving;
use crate::{Host, WorkerError, join_engine, join_thread, limits, no_thread, profile, start};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use unmask_engine::group::{AbortHandle, Comm, CommError};
use unmask_engine::model::{Progress, Share, WeightType};
use unmask_engine::profile::Profile;
use unmask_engine::{LoadOptions, Model};
use unmask_proto::v1::Seat;

/// Listens for other ranks; how they reach it.
pub(crate) fn meeting_place(pool: &Pool, listening: SocketAddr) -> Result<(TcpListener, String), WorkerError> {
    let address = pool.rank_listen.clone().unwrap_or_else(|| SocketAddr::new(listening.ip(), 0).to_string());
    let listener = listen(&address)?;
    let failed = |source| WorkerError::System { action: "listening for other ranks", source };
    let address = listener.local_addr().map_err(failed)?;
    match &pool.rank_advertise {
        Some(advertised) => Ok((listener, advertised.clone())),
        None if address.ip().is_unspecified() => Err(WorkerError::Config(crate::ConfigError(vec![format!(
            "pool.rank_advertise: is needed when listening on {address}: give the host:port other ranks reach this worker at"
        )]))),
        None => Ok((listener, address.to_string())),
    }
}

/// The last order, and those to come.
type Orders = unmask_proto::watch::Receiver<Option<Order>>;

/// Takes seats.
pub(crate) struct Pooled {
    config: Config,
    membership: Arc<Membership>,
    serving: watch::Sender<Option<Arc<Serving>>>,
    open: watch::Sender<usize>,
    listener: Arc<TcpListener>,
    /// Weights of the last seat.
    held: Option<Held>,
}

/// Weights in memory, and what they are.
struct Held {
    dir: PathBuf,
    dtype: WeightType,
    share: Share,
    model: Arc<Model>,
    /// Step times of a group with these weights: those of the next one are much the same.
    profile: Option<Profile>,
}

impl Pooled {
    pub(crate) fn new(host: &Host, listener: TcpListener) -> Self {
        Self {
            config: host.config.clone(),
            membership: Arc::clone(&host.membership),
            serving: host.serving.clone(),
            open: host.open.clone(),
            listener: Arc::new(listener),
            held: None,
        }
    }

    /// Follows orders until `end`, or until its engine hangs: then it says how, and nothing can be computed here any more.
    pub(crate) async fn run(mut self, end: CancellationToken) -> Option<CommError> {
        let mut orders = self.membership.orders();
        // Ends what an order has under way.
        let changed = async |orders: &mut Orders| {
            tokio::select! {
                _ = orders.changed() => {}
                () = end.cancelled() => {}
            }
        };
        while !end.is_cancelled() {
            let order = orders.borrow_and_update().clone();
            let Some(Order { epoch, seat: Some(seat) }) = order else {
                changed(&mut orders).await;
                continue;
            };
            let (under_way, taken_seat) = (Arc::new(UnderWay::default()), seat.clone());
            let mut taking = spawn_blocking({
                let (config, listener, held) = (self.config.clone(), Arc::clone(&self.listener), self.held.take());
                let (membership, under_way) = (Arc::clone(&self.membership), Arc::clone(&under_way));
                move || Taking { config, listener, membership, epoch, seat, under_way }.run(held)
            });
            let taken = tokio::select! {
                taken = &mut taking => taken,
                () = changed(&mut orders) => {
                    under_way.call_off();
                    taking.await
                }
            };
            let taken = taken.map_err(WorkerError::from).and_then(|(held, taken)| {
                self.held = held;
                taken
            });
            let left = match taken {
                Ok(taken) if under_way.is_called_off() => taken.give_up().await,
                Ok(Taken::Leads { serving, thread, abort }) => {
                    let order = (epoch, &taken_seat);
                    self.lead(order, serving, thread, abort, changed(&mut orders)).await
                }
                Ok(Taken::Follows { thread, ended, abort }) => {
                    let order = (epoch, &taken_seat);
                    self.follow(order, thread, ended, abort, changed(&mut orders)).await
                }
                Err(error) => {
                    tracing::warn!(%error, epoch, "no seat in the group");
                    self.membership.stand(epoch, Readiness::Fenced(error.to_string()));
                    if !under_way.is_called_off() {
                        changed(&mut orders).await;
                    }
                    Ok(())
                }
            };
            if let Err(hangs) = left {
                return Some(hangs);
            }
        }
        None
    }

    /// Serves until the group is over and another order has come.
    ///
    /// # Errors
    /// The engine hangs.
    async fn lead(
        &self,
        (epoch, seat): (u64, &Seat),
        serving: Arc<Serving>,
        thread: JoinHandle<()>,
        abort: AbortHandle,
        ordered: impl Future<Output = ()>,
    ) -> Result<(), CommError> {
        let runner = serving.runner.clone();
        self.serving.send_replace(Some(serving));
        self.membership.stand(epoch, Readiness::Ready);
        let mut failure = runner.watch_failure();
        let over = async { drop(failure.wait_for(Option::is_some).await) };
        tokio::pin!(ordered);
        tokio::select! {
            () = &mut ordered => {}
            () = over => {
                self.serving.send_replace(None);
                let why = runner.failure().map_or_else(String::new, |error| error.to_string());
                self.membership.stand(epoch, Readiness::Fenced(why));
                if !runner.hangs().is_cancelled() {
                    ordered.await;
                }
            }
        }
        if runner.failure().is_none() && self.is_planned(seat) {
            let mut open = self.open.subscribe();
            self.finish(async { drop(open.wait_for(|open| *open == 0).await) }).await;
        }
        self.serving.send_replace(None);
        abort.abort();
        runner.stop();
        join_engine(&runner, thread).await
    }

    /// Whether the last order ends a group that works: it makes a spare, or wants other weights. Else a group forms anew
    /// because it lost a rank.
    fn is_planned(&self, seat: &Seat) -> bool {
        let (orders, weights) = (self.membership.orders(), |seat: &Seat| (seat.path.clone(), seat.dtype.clone()));
        let order = orders.borrow();
        order.as_ref().is_some_and(|order| order.seat.as_ref().is_none_or(|next| weights(next) != weights(seat)))
    }

    /// What is under way may finish until `done`, up to the drain limit or an order for another seat.
    async fn finish(&self, done: impl Future<Output = ()>) {
        let mut orders = self.membership.orders();
        let epoch = orders.borrow().as_ref().map_or(0, |order| order.epoch);
        let another =
            |order: &Option<Order>| order.as_ref().is_some_and(|order| order.epoch > epoch && order.seat.is_some());
        tokio::select! {
            () = done => {}
            () = async { drop(orders.wait_for(another).await) } => {}
            () = tokio::time::sleep(self.config.drain_limit) => {}
        }
    }

    /// Computes its share until the group is over and another order has come.
    ///
    /// # Errors
    /// The rank hangs.
    async fn follow(
        &self,
        (epoch, seat): (u64, &Seat),
        thread: JoinHandle<()>,
        mut ended: oneshot::Receiver<String>,
        abort: AbortHandle,
        ordered: impl Future<Output = ()>,
    ) -> Result<(), CommError> {
        self.membership.stand(epoch, Readiness::Ready);
        tokio::pin!(ordered);
        tokio::select! {
            () = &mut ordered => {
                if self.is_planned(seat) {
                    // Until rank 0 has finished.
                    self.finish(async { drop((&mut ended).await) }).await;
                }
            }
            why = &mut ended => {
                let why = why.unwrap_or_else(|_| "the rank's thread panicked".into());
                tracing::warn!(why, epoch, "the group is over");
                self.membership.stand(epoch, Readiness::Fenced(why));
                ordered.await;
            }
        }
        abort.abort();
        join_rank(thread).await
    }
}

/// Waits for the thread of a rank whose group has been ended: whatever it waits for is over, so one that goes on hangs.
async fn join_rank(thread: JoinHandle<()>) -> Result<(), CommError> {
    join_thread("rank", thread).await.then_some(()).ok_or(CommError::Aborted)
}

/// A seat that is taken.
enum Taken {
    Leads { serving: Arc<Serving>, thread: JoinHandle<()>, abort: AbortHandle },
    Follows { thread: JoinHandle<()>, ended: oneshot::Receiver<String>, abort: AbortHandle },
}

impl Taken {
    /// Ends what was just taken: something else is wanted by now.
    ///
    /// # Errors
    /// The engine or the rank hangs.
    async fn give_up(self) -> Result<(), CommError> {
        match self {
            Taken::Leads { serving, thread, abort } => {
                abort.abort();
                serving.runner.stop();
                join_engine(&serving.runner, thread).await
            }
            Taken::Follows { thread, abort, .. } => {
                abort.abort();
                join_rank(thread).await
            }
        }
    }
}

/// What a seat is taken by, for another thread to call off.
#[derive(Default)]
struct UnderWay {
    off: AtomicBool,
    /// Of the group, once its ranks have met: they may wait for one that hangs.
    group: OnceLock<AbortHandle>,
}

impl UnderWay {
    fn call_off(&self) {
        self.off.store(true, Ordering::SeqCst);
        self.end_group();
    }

    fn is_called_off(&self) -> bool {
        self.off.load(Ordering::SeqCst)
    }

    fn met(&self, group: AbortHandle) {
        // There is one group to a seat.
        let _ = self.group.set(group);
        if self.is_called_off() {
            self.end_group();
        }
    }

    fn end_group(&self) {
        if let Some(group) = self.group.get() {
            group.abort();
        }
    }
}

/// Everything that takes long, for a thread that may block.
struct Taking {
    config: Config,
    listener: Arc<TcpListener>,
    membership: Arc<Membership>,
    epoch: u64,
    seat: Seat,
    under_way: Arc<UnderWay>,
}

impl Taking {
    /// Loads what is missing, meets the other ranks, and proves that the group computes. Weights stay whatever happens.
    fn run(self, held: Option<Held>) -> (Option<Held>, Result<Taken, WorkerError>) {
        let mut held = match self.load(held) {
            Ok(held) => held,
            Err(error) => return (None, Err(error)),
        };
        let off = self.under_way.is_called_off();
        let taken = if off { Err(WorkerError::Group(CommError::Aborted)) } else { self.take(&mut held) };
        (Some(held), taken)
    }

    fn load(&self, held: Option<Held>) -> Result<Held, WorkerError> {
        let Seat { path, dtype, rank, rank_addresses, .. } = &self.seat;
        let unknown = || WorkerError::Config(crate::ConfigError(vec![format!("dtype: `{dtype}` is unknown")]));
        let dtype = WeightType::named(dtype).ok_or_else(unknown)?;
        let (dir, share) = (PathBuf::from(path), Share { rank: *rank as usize, ranks: rank_addresses.len() });
        let same = |held: &Held| held.dir == dir && held.dtype == dtype && held.share == share;
        if let Some(held) = held.filter(same) {
            tracing::info!(path, rank, "the weights are here");
            return Ok(held);
        }
        let (membership, epoch) = (Arc::clone(&self.membership), self.epoch);
        let progress = Progress(Arc::new(move |done, of| {
            membership.stand(epoch, Readiness::Loading(100 * done / of.max(1)));
        }));
        let options = LoadOptions { dtype, share, progress: Some(progress), ..self.config.load.clone() };
        Ok(Held { model: load_share(&dir, &options)?, dir, dtype, share, profile: None })
    }

    fn take(self, held: &mut Held) -> Result<Taken, WorkerError> {
        let Self { config, listener, epoch, seat, under_way, .. } = self;
        let Share { rank, ranks } = held.share;
        let mut comm = match ranks {
            1 => None,
            _ => Some(form(&seat.rank_addresses, rank, epoch, &listener, &under_way.off).map_err(WorkerError::Group)?),
        };
        let group = || comm.as_ref().map_or(AbortHandle::Solo, Comm::abort_handle);
        let abort = group();
        under_way.met(group());
        if let Some(comm) = comm.take_if(|_| rank > 0) {
            let (model, (end, ended)) = (Arc::clone(&held.model), oneshot::channel());
            let body = move || {
                let result = follow_rank(model, comm);
                let why = result.map_or_else(|error| error.to_string(), |()| "rank 0 ended the group".into());
                let _ = end.send(why);
            };
            let thread = std::thread::Builder::new().name(format!("unmask-rank-{rank}")).spawn(body);
            return Ok(Taken::Follows { thread: thread.map_err(no_thread)?, ended, abort });
        }
        let tokenizer = TokenizerFiles::read(&held.dir)?;
        let mut engine = engine(&held.model, limits(&config, &held.model), comm)?;
        // What cannot be read is measured.
        let told = Profile::parse(&seat.profile_json).ok();
        held.profile = held.profile.take().or(told);
        if let (Some(kept), None) = (&config.profile_dir, &held.profile) {
            let profile = if ranks == 1 { profile::obtain(&mut engine, kept) } else { profile::measured(&mut engine) };
            held.profile = Some(profile.map_err(WorkerError::Group)?);
        }
        let assigned = Some((seat.model, epoch));
        let profile = held.profile.as_ref();
        let (serving, _, thread) = start(&config, &held.dir, assigned, tokenizer, &held.model, engine, profile)?;
        Ok(Taken::Leads { serving: Arc::new(serving), thread, abort })
    }
}
