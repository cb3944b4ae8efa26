//! Ranks: those that are threads of this worker, those that are processes, and how long they may take.

use crate::WorkerError;
use crate::config::Ranks;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use unmask_engine::group::{Comm, CommError, FollowError, Pace, StepLimit, TcpRank, follow, threads};
use unmask_engine::model::Share;
use unmask_engine::request::BLOCK_SIZE_MAX;
use unmask_engine::{Engine, Event, Limits, LoadOptions, Model, Request, RequestId, Settings};

/// Longest wait for all ranks of a group to load and come together.
const FORM_LIMIT: Duration = Duration::from_secs(600);
/// Part of a step's limit that every step has, for what a busy machine does in between.
const STEP_BASE: Duration = Duration::from_secs(2);
/// A step may take this many times what such a step took when the group was formed.
const STEP_FACTOR: u32 = 10;
/// Rows of the longer measured step.
const PROBE_ROWS: u32 = 64;
/// Times a step is measured.
const PROBES: usize = 3;
/// An idle group proves at this interval that every rank computes.
pub(crate) const CANARY_INTERVAL: Duration = Duration::from_secs(2);
/// Longest silence of rank 0 that another rank accepts.
const IDLE_LIMIT: Duration = Duration::from_secs(10);

/// Steps the canary may take: a block's denoise passes and more.
const CANARY_STEPS_MAX: usize = 4 * BLOCK_SIZE_MAX as usize;
/// Groups whose addresses are given form or fail.
static NEVER: AtomicBool = AtomicBool::new(false);

/// Before anything is measured.
const PACE: Pace = Pace { now: Instant::now, step: StepLimit::UNMEASURED, idle: FORM_LIMIT };

/// A rank of a group of processes that is not rank 0.
#[derive(Debug, Clone)]
pub struct RankConfig {
    /// Folder of the model.
    pub model: std::path::PathBuf,
    /// How to load it; the share is this rank's.
    pub load: LoadOptions,
    /// host:port of every rank, in order.
    pub addresses: Vec<String>,
    /// Which of them this is, at least 1.
    pub rank: usize,
    /// Incarnation of the group.
    pub epoch: u64,
}

/// Why a rank ended.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// The model, or an address.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The group.
    #[error("rank {rank}: {error}")]
    Follow {
        /// This rank.
        rank: usize,
        /// Why.
        error: FollowError,
    },
}

/// Serves as a rank other than 0 until rank 0 ends the group.
///
/// # Errors
/// [`RankError`]: the model does not load, the group does not form, or another rank fails.
pub fn run_rank(config: RankConfig) -> Result<(), RankError> {
    let (rank, ranks) = (config.rank, config.addresses.len());
    let lost = |error: CommError| RankError::Follow { rank, error: error.into() };
    let listener = listen(&config.addresses[rank])?;
    let load = LoadOptions { share: Share { rank, ranks }, ..config.load.clone() };
    let model = load_share(&config.model, &load)?;
    let comm = form(&config.addresses, rank, config.epoch, &listener, &NEVER).map_err(lost)?;
    tracing::info!(rank, ranks, epoch = config.epoch, "the group is formed");
    follow_rank(model, comm).map_err(|error| RankError::Follow { rank, error })
}

/// The engine of a worker, and the ranks that are threads beside it.
pub(crate) struct Formed {
    pub(crate) model: Arc<Model>,
    pub(crate) engine: Engine,
    pub(crate) followers: Vec<JoinHandle<()>>,
}

/// Loads rank 0's share and brings the group together; a worker of one rank holds the whole model.
pub(crate) fn lead(
    dir: &Path,
    load: &LoadOptions,
    ranks: &Ranks,
    limits: impl Fn(&Model) -> Limits,
) -> Result<Formed, WorkerError> {
    let (comm, followers, threads) = match ranks {
        Ranks::One => (None, Vec::new(), load.threads),
        Ranks::Threads(count) => {
            let threads = threads_each(load.threads, *count);
            let (leader, followers) = start_threads(dir, load, *count, threads)?;
            (Some(leader), followers, threads)
        }
        Ranks::Processes { addresses, epoch } => {
            let listener = listen(&addresses[0])?;
            let comm = form(addresses, 0, *epoch, &listener, &NEVER).map_err(WorkerError::Group)?;
            (Some(comm), Vec::new(), load.threads)
        }
    };
    let share = Share { rank: 0, ranks: comm.as_ref().map_or(1, Comm::ranks) };
    let model = load_share(dir, &LoadOptions { share, threads, ..load.clone() })?;
    let engine = engine(&model, limits(&model), comm)?;
    Ok(Formed { model, engine, followers })
}

/// The engine of rank 0, which has computed one token: a group that is ready has proven it.
pub(crate) fn engine(model: &Arc<Model>, limits: Limits, comm: Option<Comm>) -> Result<Engine, WorkerError> {
    let mut engine = match comm {
        None => Engine::new(Arc::clone(model), limits),
        Some(comm) => Engine::leading(Arc::clone(model), limits, comm, PACE).map_err(WorkerError::Group)?,
    };
    let limit = measure(&mut engine)?;
    engine.set_step_limit(limit);
    let (ranks, base_ms, row_us) = (engine.ranks(), limit.base.as_millis(), limit.per_row.as_micros());
    tracing::info!(ranks, base_ms, row_us, "step limit");
    canary(&mut engine).map_err(WorkerError::Canary)?;
    Ok(engine)
}

/// Computes one token.
fn canary(engine: &mut Engine) -> Result<(), String> {
    let config = engine.model().config();
    let request = Request::new(
        RequestId(0),
        vec![config.eos_ids.first().copied().unwrap_or(0)],
        Settings::new(1, config.decode.block_size, config.decode.policy),
    );
    engine.submit(request).map_err(|refusal| refusal.to_string())?;
    let mut events = Vec::new();
    for _ in 0..CANARY_STEPS_MAX {
        engine.step(&mut events);
        if events.drain(..).any(|event| matches!(event, Event::Finished { .. })) {
            return Ok(());
        }
        if let Some(error) = engine.failure() {
            return Err(error.to_string());
        }
    }
    Err(format!("no end after {CANARY_STEPS_MAX} steps"))
}

/// A follower's part of a group until rank 0 ends it.
pub(crate) fn follow_rank(model: Arc<Model>, comm: Comm) -> Result<(), FollowError> {
    follow(model, comm, Pace { idle: IDLE_LIMIT + CANARY_INTERVAL, ..PACE })
}

/// Base plus ten times what steps take, by the shortest of a few.
fn measure(engine: &mut Engine) -> Result<StepLimit, WorkerError> {
    let mut time = |rows| {
        let times = (0..PROBES).map(|_| {
            let start = Instant::now();
            engine.probe(rows);
            start.elapsed()
        });
        let best = times.min().unwrap_or_default();
        engine.failure().cloned().map_or(Ok(best), |error| Err(WorkerError::Group(error)))
    };
    let (one, many) = (time(1)?, time(PROBE_ROWS)?);
    let per_row = many.saturating_sub(one) / (PROBE_ROWS - 1);
    Ok(StepLimit { base: STEP_BASE + STEP_FACTOR * one, per_row: STEP_FACTOR * per_row })
}

/// Threads of one rank: all ranks together take what one would.
fn threads_each(threads: usize, ranks: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    (if threads == 0 { cores } else { threads } / ranks).max(1)
}

/// Ranks 1.. as threads of this process.
fn start_threads(
    dir: &Path,
    load: &LoadOptions,
    ranks: usize,
    threads_each: usize,
) -> Result<(Comm, Vec<JoinHandle<()>>), WorkerError> {
    let mut comms = threads(ranks).into_iter().map(Comm::Threads);
    let leader = comms.next().unwrap_or(Comm::Solo);
    let mut followers = Vec::new();
    for comm in comms {
        let rank = comm.rank();
        let load = LoadOptions { share: Share { rank, ranks }, threads: threads_each, ..load.clone() };
        let dir = dir.to_owned();
        let body = move || {
            let result = load_share(&dir, &load)
                .map_err(RankError::from)
                .and_then(|model| follow(model, comm, PACE).map_err(|error| RankError::Follow { rank, error }));
            if let Err(error) = result {
                tracing::error!(%error, "a rank ended");
            }
        };
        let started = std::thread::Builder::new().name(format!("unmask-rank-{rank}")).spawn(body);
        followers.push(started.map_err(|source| WorkerError::System { action: "starting a thread", source })?);
    }
    Ok((leader, followers))
}

pub(crate) fn load_share(dir: &Path, load: &LoadOptions) -> Result<Arc<Model>, WorkerError> {
    let loaded = Model::load(dir, load);
    loaded.map(Arc::new).map_err(|source| WorkerError::Load { path: dir.to_owned(), source })
}

pub(crate) fn listen(address: &str) -> Result<TcpListener, WorkerError> {
    TcpListener::bind(address).map_err(|source| WorkerError::System { action: "listening for other ranks", source })
}

/// Brings the ranks of an epoch together; `stop` gives up.
pub(crate) fn form(
    addresses: &[String],
    rank: usize,
    epoch: u64,
    listener: &TcpListener,
    stop: &AtomicBool,
) -> Result<Comm, CommError> {
    let resolved: Result<Vec<SocketAddr>, CommError> = addresses
        .iter()
        .map(|address| {
            let found = address.to_socket_addrs().ok().and_then(|mut all| all.next());
            found.ok_or_else(|| CommError::Io(format!("{address} cannot be resolved")))
        })
        .collect();
    Ok(Comm::Tcp(TcpRank::form(rank, epoch, listener, &resolved?, Instant::now() + FORM_LIMIT, stop)?))
}
