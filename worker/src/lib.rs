//! The worker: a gRPC service around an engine, and its membership with the controller.
//!
//! It knows the engine, the wire between gateway and worker, and the clock. It does not know text: requests come in
//! token ids and answers leave in token ids.
//!
//! Modules in reading order:
//! - [`config`]: raw and validated settings
//! - `service`: gRPC; checks epoch, model, deadline
//! - `runner`: the thread that owns the engine; `watchdog`: notices when it hangs
//! - [`group`]: ranks that share a model, and how long they may take
//! - `delivery`: one request's way back to its reader
//! - `mapping`: messages to engine types and back
//! - `membership`, `join`: readiness and epoch; reports to the controller
//! - `pool`: takes the seats that the controller assigns
//! - `profile`: step times of the model on this device, kept on disk
//! - `simulated`: all this over a simulated clock and network
//! - `descriptor`: what the worker says of its model, tokenizer files

pub mod config;
mod delivery;
mod descriptor;
pub mod group;
mod join;
mod mapping;
mod membership;
mod pace;
mod pool;
mod profile;
mod runner;
mod service;
#[cfg(feature = "simulation")]
pub mod simulated;
mod watchdog;

pub use config::{Config, ConfigError, Pool, Ranks, RawConfig, RawPool, Role};
pub use descriptor::TokenizerFilesError;

use crate::descriptor::TokenizerFiles;
use crate::group::Formed;
use crate::join::Joiner;
use crate::membership::{Membership, Readiness};
use crate::pool::Pooled;
use crate::runner::Patience;
use crate::service::{Present, Service, Serving};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use unmask_engine::group::CommError;
use unmask_engine::pages::Pages;
use unmask_engine::profile::Profile;
use unmask_engine::request::BLOCK_SIZE_MAX;
use unmask_engine::{Engine, Limits, LoadError, Model};
use unmask_proto::network::Incoming;
use unmask_proto::v1::worker_service_server::WorkerServiceServer;
use unmask_proto::v1::{self, Capacity, Hello, ModelDescriptor};

/// Longest request (bytes): a prompt of a million ids is about 3 MiB.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Open streams per connection; a gateway opens further connections beyond.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// How often idle connections are pinged, and how long an answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Longest wait at shutdown for connections to close once their streams have ended.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for the end of a thread that nobody watches: a step of a rank, of many rows.
const JOIN_LIMIT: Duration = Duration::from_secs(30);
/// Between looks whether a thread has ended.
const JOIN_POLL: Duration = Duration::from_millis(2);

/// Why a worker did not start, or stopped.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The model cannot be loaded.
    #[error("model {path}: {source}")]
    Load {
        /// Its folder.
        path: std::path::PathBuf,
        /// Why.
        source: LoadError,
    },
    /// The tokenizer's files cannot be served.
    #[error("tokenizer: {0}")]
    Tokenizer(#[from] TokenizerFilesError),
    /// The model does not compute.
    #[error("the model's first block failed: {0}")]
    Canary(String),
    /// A rank of the group is lost, or the group did not form.
    #[error("the group is over: {0}")]
    Group(CommError),
    /// The thread that computes does not move any more.
    #[error("the engine hangs, so the worker ends: {0}; start it again")]
    Hangs(CommError),
    /// Settings do not fit together.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The system refused a thread or an address.
    #[error("{action}: {source}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The listener failed.
    #[error("serving gRPC: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// A task of the worker's own panicked.
    #[error("loading the model panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

/// Serves and reports until `shutdown` completes or the controller wants it to, then drains: it leaves the controller, refuses
/// what is new, finishes what it holds up to the drain limit, and ends the rest with UNAVAILABLE. A worker with a model of
/// its own loads it first; one of the pool loads what it is assigned.
///
/// # Errors
/// [`WorkerError`] when model or tokenizer cannot be loaded, the settings do not fit, or the listener fails. Of the pool, what goes
/// wrong with a model is reported to the controller instead.
pub async fn run(
    config: Config,
    incoming: impl Into<Incoming>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let incoming = incoming.into();
    let listening = incoming.local_addr().map_err(|source| WorkerError::System { action: "listening", source })?;
    let endpoint = config.endpoint(listening)?;
    let hello =
        Hello { worker_id: config.worker_id.clone().unwrap_or_else(|| endpoint.clone()), endpoint, ..Hello::default() };
    match config.role.clone() {
        Role::Model { dir, ranks } => run_own(config, dir, ranks, hello, incoming, shutdown).await,
        Role::Pool(pool) => run_pooled(config, &pool, listening, hello, incoming, shutdown).await,
    }
}

/// A group of its own.
async fn run_own(
    config: Config,
    dir: PathBuf,
    ranks: Ranks,
    hello: Hello,
    incoming: Incoming,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    tokio::pin!(shutdown);
    let loading = tokio::task::spawn_blocking({
        let config = config.clone();
        move || load(&config, &dir, &ranks)
    });
    let loaded = tokio::select! {
        loaded = loading => loaded??.with(hello),
        () = &mut shutdown => return Ok(()),
    };
    serve_own(config, loaded, incoming, shutdown).await
}

async fn serve_own(
    config: Config,
    loaded: Loaded,
    incoming: Incoming,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let Loaded { serving, hello, engine_thread, followers } = loaded;
    let runner = serving.runner.clone();
    let host = Host::new(config, Readiness::Ready, Some(serving));
    let mut failure = runner.watch_failure();
    let over = async {
        tokio::select! {
            biased;
            () = shutdown => {}
            _ = failure.wait_for(Option::is_some) => {}
        }
    };
    let served = host.attend(hello, incoming, over).await;
    join_engine(&runner, engine_thread).await.map_err(WorkerError::Hangs)?;
    futures::future::join_all(followers.into_iter().map(|thread| join_thread("rank", thread))).await;
    runner.failure().map_or(served, |error| Err(WorkerError::Group(error)))
}

/// One of the pool.
async fn run_pooled(
    config: Config,
    pool: &Pool,
    listening: SocketAddr,
    hello: Hello,
    incoming: Incoming,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let (listener, rank_address) = pool::meeting_place(pool, listening)?;
    let capacity = Capacity { memory_bytes: pool.memory_bytes, zone: pool.zone.clone(), rank_address };
    let hello = Hello { capacity: Some(capacity), ..hello };
    let host = Host::new(config, Readiness::Spare, None);
    let pooled = Pooled::new(&host, listener);
    let end = CancellationToken::new();
    let mut seated = tokio::spawn(pooled.run(end.clone()));
    let mut ended = None;
    let over = async {
        tokio::select! {
            biased;
            () = shutdown => {}
            hangs = &mut seated => ended = Some(hangs),
        }
    };
    let served = host.attend(hello, incoming, over).await;
    end.cancel();
    let hangs = match ended {
        Some(hangs) => hangs?,
        None => seated.await?,
    };
    hangs.map_or(served, |error| Err(WorkerError::Hangs(error)))
}

/// What every worker has, whatever it serves.
struct Host {
    config: Config,
    membership: Arc<Membership>,
    serving: watch::Sender<Option<Arc<Serving>>>,
    /// Streams that are open.
    open: watch::Sender<usize>,
}

impl Host {
    fn new(config: Config, readiness: Readiness, serving: Option<Serving>) -> Self {
        let membership = Arc::new(Membership::new(readiness));
        Self { config, membership, serving: watch::Sender::new(serving.map(Arc::new)), open: watch::Sender::new(0) }
    }

    /// Joins and serves until `over` or until told to drain, then drains.
    async fn attend(
        &self,
        hello: Hello,
        incoming: Incoming,
        over: impl Future<Output = ()>,
    ) -> Result<(), WorkerError> {
        let end_join = CancellationToken::new();
        let joining = join::start(self.joiner(hello), end_join.clone()).map_err(no_thread)?;
        let served = self.serve(incoming, over).await;
        end_join.cancel();
        join_thread("join", joining).await;
        served
    }

    fn joiner(&self, hello: Hello) -> Joiner {
        Joiner {
            controllers: self.config.controllers.clone(),
            network: self.config.network.clone(),
            hello,
            membership: Arc::clone(&self.membership),
            serving: self.serving.subscribe(),
        }
    }

    /// Serves until `over` or until told to drain, then drains.
    async fn serve(&self, incoming: Incoming, over: impl Future<Output = ()>) -> Result<(), WorkerError> {
        let service = Service {
            serving: self.serving.subscribe(),
            membership: Arc::clone(&self.membership),
            open: self.open.clone(),
        };
        let mut standing = self.membership.watch();
        let over = async {
            tokio::select! {
                biased;
                () = over => {}
                () = async { drop(standing.wait_for(|standing| standing.readiness == Readiness::Draining).await) } => {}
            }
        };
        let drain = Drain {
            open: self.open.clone(),
            serving: self.serving.subscribe(),
            membership: Arc::clone(&self.membership),
            limit: self.config.drain_limit,
        };
        serve(service, incoming, over, drain).await
    }
}

/// What has to happen before the last connection closes.
struct Drain {
    open: watch::Sender<usize>,
    serving: Present,
    membership: Arc<Membership>,
    limit: Duration,
}

impl Drain {
    /// Waits for open streams up to the limit, then ends the rest.
    async fn run(&self) {
        let mut open = self.open.subscribe();
        let drained = tokio::time::timeout(self.limit, open.wait_for(|open| *open == 0)).await.is_ok();
        if !drained {
            tracing::warn!(streams = *self.open.borrow(), "the drain limit passed; ending the rest");
        }
        self.stop();
    }

    fn stop(&self) {
        if let Some(serving) = self.serving.borrow().as_ref() {
            serving.runner.stop();
        }
    }
}

async fn serve(
    service: Service,
    incoming: Incoming,
    shutdown: impl Future<Output = ()>,
    drain: Drain,
) -> Result<(), WorkerError> {
    type Served = WorkerServiceServer<Service>;
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<Served>().await;
    let close = CancellationToken::new();
    let server = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_INTERVAL))
        .add_service(health)
        .add_service(WorkerServiceServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_incoming_shutdown(incoming, close.clone().cancelled_owned());
    tokio::pin!(server, shutdown);
    let served = tokio::select! {
        biased;
        served = &mut server => served,
        () = &mut shutdown => {
            tracing::info!("draining");
            drain.membership.drain();
            reporter.set_not_serving::<Served>().await;
            reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
            let ended = tokio::select! {
                biased;
                served = &mut server => Some(served),
                () = drain.run() => None,
            };
            close.cancel();
            match ended {
                Some(served) => served,
                None => tokio::time::timeout(CLOSE_LIMIT, server).await.unwrap_or(Ok(())),
            }
        }
    };
    drain.stop();
    Ok(served?)
}

/// What [`load`] makes.
struct Loaded {
    serving: Serving,
    /// What a group of its own says of its model.
    hello: Hello,
    engine_thread: JoinHandle<()>,
    followers: Vec<JoinHandle<()>>,
}

impl Loaded {
    /// With who says it.
    fn with(self, Hello { worker_id, endpoint, .. }: Hello) -> Self {
        Self { hello: Hello { worker_id, endpoint, ..self.hello }, ..self }
    }
}

/// Everything that takes long, for a thread that may block.
fn load(config: &Config, dir: &Path, ranks: &Ranks) -> Result<Loaded, WorkerError> {
    let tokenizer = TokenizerFiles::read(dir)?;
    let formed = group::lead(dir, &config.load, ranks, |model| limits(config, model))?;
    let Formed { model, mut engine, followers } = formed;
    // Before anything is served: requests would make the steps slow, and the steps the requests.
    let profile = match (&config.profile_dir, ranks) {
        (None, _) => None,
        (Some(_), Ranks::Processes { .. }) => Some(profile::measured(&mut engine)),
        (Some(kept), _) => Some(profile::obtain(&mut engine, kept)),
    };
    let profile = profile.transpose().map_err(WorkerError::Group)?;
    let (serving, described, engine_thread) = start(config, dir, None, tokenizer, &model, engine, profile.as_ref())?;
    let v1::Loaded { model, profile_json, quality_json, .. } = described;
    let hello = Hello { model, profile_json, quality_json, ..Hello::default() };
    Ok(Loaded { serving, hello, engine_thread, followers })
}

/// Starts the thread of an engine; what is served, and what the controller has to know of it. An assigned model has the
/// name and the epoch of its assignment.
fn start(
    config: &Config,
    dir: &Path,
    assigned: Option<(String, u64)>,
    tokenizer: TokenizerFiles,
    model: &Arc<Model>,
    engine: Engine,
    profile: Option<&Profile>,
) -> Result<(Serving, v1::Loaded, JoinHandle<()>), WorkerError> {
    let (model_name, epoch) = assigned.unwrap_or_else(|| (model.config().name.clone(), 0));
    let loaded = v1::Loaded {
        epoch,
        model: Some(ModelDescriptor { name: model_name.clone(), ..descriptor::describe(model, &tokenizer) }),
        profile_json: profile.and_then(|profile| serde_json::to_string(profile).ok()).unwrap_or_default(),
        quality_json: descriptor::quality(dir),
    };
    let limits = limits(config, model);
    tracing::info!(
        model = model_name,
        parameters = model.parameters(),
        numerics = model.numerics_id(),
        pages = limits.pages,
        "ready"
    );
    let patience = Patience { preempt: config.preempt_limit, give_up: config.stall_limit };
    let (runner, thread) = runner::start(engine, patience).map_err(no_thread)?;
    let default_policy = model.config().decode.policy;
    let announced = (epoch > 0).then(|| loaded.clone());
    Ok((
        Serving {
            runner,
            model_name,
            default_policy,
            tokenizer,
            policy_revision: AtomicU64::new(0),
            loaded: announced,
        },
        loaded,
        thread,
    ))
}

fn no_thread(source: io::Error) -> WorkerError {
    WorkerError::System { action: "starting a thread", source }
}

/// The engine's limits: as many pages as the memory for keys and values allows, and no more than can be used.
fn limits(config: &Config, model: &Model) -> Limits {
    let page_bytes = model.page_bytes().max(1) as u64;
    let afforded = usize::try_from(config.kv_bytes / page_bytes).unwrap_or(usize::MAX);
    let per_request = Pages::needed(model.config().context_length.saturating_add(BLOCK_SIZE_MAX));
    let pages = afforded.min(per_request.saturating_mul(config.active_max)).max(1);
    Limits {
        rows_max: config.rows_max,
        active_max: config.active_max,
        queue_max: config.queue_max,
        pages,
        cached_pages: pages,
    }
}

/// Waits for a thread that has been told to end, up to [`JOIN_LIMIT`]; whether it did.
async fn join_thread(name: &'static str, thread: JoinHandle<()>) -> bool {
    let ended = tokio::time::timeout(JOIN_LIMIT, finished(&thread)).await.is_ok();
    if !ended {
        tracing::error!(name, "a thread did not end in time");
    } else if thread.join().is_err() {
        tracing::error!(name, "a thread panicked");
    }
    ended
}

/// Waits for the thread of an engine that has been told to stop, until its watchdog says that it hangs.
async fn join_engine(runner: &runner::Handle, thread: JoinHandle<()>) -> Result<(), CommError> {
    tokio::select! {
        biased;
        () = finished(&thread) => {
            if thread.join().is_err() {
                tracing::error!("the engine's thread panicked");
            }
            Ok(())
        }
        () = runner.hangs().cancelled() => {
            let mut failure = runner.watch_failure();
            let known = failure.wait_for(Option::is_some).await;
            Err(known.ok().and_then(|known| known.clone()).unwrap_or(CommError::Aborted))
        }
    }
}

/// Nobody waits in `join`: whoever does holds up the end of the process while the thread hangs.
async fn finished(thread: &JoinHandle<()>) {
    while !thread.is_finished() {
        tokio::time::sleep(JOIN_POLL).await;
    }
}

#[cfg(test)]
mod tests;
