//! A worker for simulations: the service, membership and runner of [`crate::run`] as tasks of the caller's runtime, over a
//! model that is loaded already, with steps that take as long as a table says.

use crate::descriptor::{self, TokenizerFiles};
use crate::join;
use crate::membership::Readiness;
use crate::runner::{Patience, Runner};
use crate::service::Serving;
use crate::{Config, Host, WorkerError, limits, mapping};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use unmask_engine::{Engine, Event, Limits, Load, LoadOptions, Model, Reason, RequestId, StepReport};
use unmask_proto::network::Incoming;
use unmask_proto::v1::{Hello, RunRequest};

/// Steps that any request of a simulation ends within.
const STEPS_MAX: usize = 100_000;

/// A model with its tokenizer. Clones share it.
#[derive(Clone)]
pub struct Loaded {
    model: Arc<Model>,
    tokenizer: Arc<TokenizerFiles>,
}

impl Loaded {
    /// Reads a model's folder; it computes on the caller's thread.
    ///
    /// # Errors
    /// [`WorkerError`] when model or tokenizer cannot be loaded.
    pub fn read(folder: &Path) -> Result<Self, WorkerError> {
        let tokenizer = Arc::new(TokenizerFiles::read(folder)?);
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let load = |source| WorkerError::Load { path: folder.to_owned(), source };
        Ok(Self { model: Arc::new(Model::load(folder, &options).map_err(load)?), tokenizer })
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.model.config().name
    }

    /// Memory of one page of keys and values (bytes).
    pub fn page_bytes(&self) -> u64 {
        self.model.page_bytes() as u64
    }

    /// Tokens and reason of a request that has an engine to itself; `None` when the engine refuses it.
    pub fn alone(&self, message: RunRequest) -> Option<(Vec<u32>, Reason)> {
        let request = mapping::request(message, RequestId(1), &self.model.config().decode.policy).ok()?;
        let mut engine =
            Engine::new(Arc::clone(&self.model), Limits { pages: 64, cached_pages: 0, ..Limits::default() });
        engine.submit(request).ok()?;
        let (mut tokens, mut events) = (Vec::new(), Vec::new());
        for _ in 0..STEPS_MAX {
            engine.step(&mut events);
            for event in events.drain(..) {
                match event {
                    Event::Commit { tokens: fresh, .. } => tokens.extend(fresh),
                    Event::Finished { reason, .. } => return Some((tokens, reason)),
                    _ => {}
                }
            }
        }
        None
    }
}

/// How long steps take.
#[derive(Debug, Clone, Copy)]
pub struct StepCost {
    /// Every step.
    pub base: Duration,
    /// Each row of it.
    pub per_row: Duration,
}

impl StepCost {
    fn of(self, report: StepReport) -> Duration {
        self.base + self.per_row * report.rows
    }
}

/// Serves as [`crate::run`] does; `observe` hears of every change of the engine's load.
///
/// # Errors
/// [`WorkerError`] when the settings do not fit or the listener fails.
pub async fn run(
    loaded: Loaded,
    cost: StepCost,
    observe: impl Fn(Load) + Send + 'static,
    config: Config,
    incoming: Incoming,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let Loaded { model, tokenizer } = loaded;
    let listening = incoming.local_addr().map_err(|source| WorkerError::System { action: "listening", source })?;
    let endpoint = config.endpoint(listening)?;
    let limits = limits(&config, &model);
    let patience = Patience { preempt: config.preempt_limit, give_up: config.stall_limit };
    let (runner, handle) = Runner::new(Engine::new(Arc::clone(&model), limits), patience);
    let mut loads = handle.watch_load();
    tokio::spawn(runner.run(move |report| cost.of(report)));
    tokio::spawn(async move {
        while loads.changed().await.is_ok() {
            observe(*loads.borrow_and_update());
        }
    });
    let hello = Hello {
        worker_id: config.worker_id.clone().unwrap_or_else(|| endpoint.clone()),
        endpoint,
        model: Some(descriptor::describe(&model, &tokenizer)),
        ..Hello::default()
    };
    let serving = Serving {
        runner: handle,
        model_name: model.config().name.clone(),
        default_policy: model.config().decode.policy,
        tokenizer: TokenizerFiles::clone(&tokenizer),
        policy_revision: AtomicU64::new(0),
        loaded: None,
    };
    let host = Host::new(config, Readiness::Ready, Some(serving));
    let end_join = CancellationToken::new();
    let joined = tokio::spawn(join::run(host.joiner(hello), end_join.clone()));
    let served = host.serve(incoming, shutdown).await;
    end_join.cancel();
    joined.await?;
    served
}
