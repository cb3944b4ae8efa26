//! The worker: a gRPC service around an engine, and its membership with the controller.
//!
//! It knows the engine, the wire between gateway and worker, and the clock. It does not know text: requests come in
//! token ids and answers leave in token ids.
//!
//! Modules in reading order:
//! - [`config`]: raw and validated settings
//! - `service`: gRPC; checks epoch, model, deadline
//! - `runner`: the thread that owns the engine
//! - [`group`]: ranks that share a model, and how long they may take
//! - `delivery`: one request's way back to its reader
//! - `mapping`: messages to engine types and back
//! - `membership`, `join`: readiness and epoch; reports to the controller
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
mod profile;
mod runner;
mod service;
#[cfg(feature = "simulation")]
pub mod simulated;

pub use config::{Config, ConfigError, Ranks, RawConfig};
pub use descriptor::TokenizerFilesError;

use crate::descriptor::TokenizerFiles;
use crate::group::Formed;
use crate::join::Joiner;
use crate::membership::{Membership, Readiness};
use crate::runner::{Handle, Patience};
use crate::service::Service;
use std::future::Future;
use std::io;
use std::sync::Arc;
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
use unmask_engine::{Engine, Event, Limits, LoadError, Model, Request, RequestId, Settings};
use unmask_proto::network::Incoming;
use unmask_proto::v1::worker_service_server::WorkerServiceServer;

/// Longest request (bytes): a prompt of a million ids is about 3 MiB.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Open streams per connection; a gateway opens further connections beyond.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// How often idle connections are pinged, and how long an answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Longest wait at shutdown for connections to close once their streams have ended.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Steps the canary may take: a block's denoise passes and more.
const CANARY_STEPS_MAX: usize = 4 * BLOCK_SIZE_MAX as usize;
/// Longest wait at shutdown for a step to end.
const STEP_LIMIT: Duration = Duration::from_secs(10);

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

/// Loads the model, serves and reports until `shutdown` completes or the controller wants it to, then drains: it leaves the controller, refuses
/// what is new, finishes what it holds up to the drain limit, and ends the rest with UNAVAILABLE.
///
/// # Errors
/// [`WorkerError`] when model or tokenizer cannot be loaded, the settings do not fit, or the listener fails.
pub async fn run(
    config: Config,
    incoming: impl Into<Incoming>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let incoming = incoming.into();
    let listening = incoming.local_addr().map_err(|source| WorkerError::System { action: "listening", source })?;
    let endpoint = config.endpoint(listening)?;
    tokio::pin!(shutdown);
    let loading = tokio::task::spawn_blocking({
        let config = config.clone();
        move || load(&config)
    });
    let Loaded { model, tokenizer, profile, runner, engine_thread, followers } = tokio::select! {
        loaded = loading => loaded??,
        () = &mut shutdown => return Ok(()),
    };
    let membership = Arc::new(Membership::new());
    let end_join = CancellationToken::new();
    let joiner = Joiner {
        controllers: config.controllers.clone(),
        network: config.network.clone(),
        worker_id: config.worker_id.clone().unwrap_or_else(|| endpoint.clone()),
        endpoint,
        model: descriptor::describe(&model, &tokenizer),
        profile_json: profile.and_then(|profile| serde_json::to_string(&profile).ok()).unwrap_or_default(),
        quality_json: descriptor::quality(&config.model),
        membership: Arc::clone(&membership),
        runner: runner.clone(),
    };
    let join_thread = join::start(joiner, end_join.clone()).map_err(no_thread)?;
    let open = watch::Sender::new(0);
    let service = Service {
        runner: runner.clone(),
        membership: Arc::clone(&membership),
        model_name: model.config().name.clone(),
        default_policy: model.config().decode.policy,
        tokenizer: Arc::new(tokenizer),
        open: open.clone(),
    };
    let mut failure = runner.watch_failure();
    let mut readiness = membership.watch();
    let over = async {
        tokio::select! {
            biased;
            () = &mut shutdown => {}
            _ = readiness.wait_for(|readiness| *readiness == Readiness::Draining) => {}
            _ = failure.wait_for(Option::is_some) => {}
        }
    };
    let drain = Drain { open, runner: runner.clone(), membership, limit: config.drain_limit };
    let served = serve(service, incoming, over, drain).await;
    end_join.cancel();
    let followers = followers.into_iter().map(|thread| ("rank", thread));
    join_threads([("join", join_thread), ("engine", engine_thread)].into_iter().chain(followers).collect()).await;
    runner.failure().map_or(served, |error| Err(WorkerError::Group(error)))
}

/// What has to happen before the last connection closes.
struct Drain {
    open: watch::Sender<usize>,
    runner: Handle,
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
        self.runner.stop();
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
    drain.runner.stop();
    Ok(served?)
}

/// What [`load`] makes.
struct Loaded {
    model: Arc<Model>,
    tokenizer: TokenizerFiles,
    profile: Option<Profile>,
    runner: Handle,
    engine_thread: JoinHandle<()>,
    followers: Vec<JoinHandle<()>>,
}

/// Everything that takes long, for a thread that may block.
fn load(config: &Config) -> Result<Loaded, WorkerError> {
    let tokenizer = TokenizerFiles::read(&config.model)?;
    let formed = group::lead(&config.model, &config.load, &config.ranks, |model| limits(config, model))?;
    let Formed { model, mut engine, followers } = formed;
    let limits = limits(config, &model);
    canary(&mut engine).map_err(WorkerError::Canary)?;
    // Before anything is served: requests would make the steps slow, and the steps the requests.
    let alone = config.profile_dir.as_ref().filter(|_| engine.ranks() == 1);
    let profile = alone.map(|dir| profile::obtain(&model, dir));
    tracing::info!(
        model = model.config().name,
        parameters = model.parameters(),
        numerics = model.numerics_id(),
        pages = limits.pages,
        "ready"
    );
    let patience = Patience { preempt: config.preempt_limit, give_up: config.stall_limit };
    let (runner, engine_thread) = runner::start(engine, limits, patience).map_err(no_thread)?;
    Ok(Loaded { model, tokenizer, profile, runner, engine_thread, followers })
}

fn no_thread(source: io::Error) -> WorkerError {
    WorkerError::System { action: "starting a thread", source }
}

/// Computes one token: a worker that is ready has proven it.
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
    }
    Err(format!("no end after {CANARY_STEPS_MAX} steps"))
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

/// Waits for the threads to end: they have been told to.
async fn join_threads(threads: Vec<(&'static str, JoinHandle<()>)>) {
    let joined = tokio::task::spawn_blocking(move || {
        for (name, thread) in threads {
            if thread.join().is_err() {
                tracing::error!(name, "a thread panicked");
            }
        }
    });
    if tokio::time::timeout(STEP_LIMIT, joined).await.is_err() {
        tracing::error!("a thread did not end in time");
    }
}
