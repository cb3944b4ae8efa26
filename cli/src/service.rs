//! `unmask gateway`, `controller`, `worker`: one service each, from a file and flags.

use crate::args::Dtype;
use crate::local::bind_http;
use crate::models::OverrideArgs;
use crate::tls::ServiceTlsArgs;
use crate::{models, output};
use anyhow::{Context, ensure};
use clap::Args;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use unmask_engine::LoadOptions;
use unmask_gateway::Listeners;
use unmask_proto::network::Incoming;
use unmask_proto::tls::{Links, Protocol};
use unmask_worker::group::{RankConfig, run_rank};

/// `unmask gateway`
#[derive(Debug, Args)]
pub struct GatewayArgs {
    /// Settings as TOML
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// host:port to listen on
    #[arg(long, default_value = "127.0.0.1:7700")]
    pub listen: String,
    /// host:port of the OpenAI-compatible HTTP interface; none where neither this nor the file says
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Option<String>,
    /// host:port of the controller, or of its replicas with commas between
    #[arg(long)]
    pub controller: Option<String>,
    /// Certificates
    #[command(flatten)]
    pub tls: ServiceTlsArgs,
}

/// `unmask controller`
#[derive(Debug, Args)]
pub struct ControllerArgs {
    /// Settings as TOML
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// host:port to listen on
    #[arg(long, default_value = "127.0.0.1:7701")]
    pub listen: String,
    /// embedded:FOLDER, or etcd://HOST:PORT,.. for several replicas (in builds with the cargo feature etcd)
    #[arg(long)]
    pub store: Option<String>,
    /// host:port at which the others reach this replica; the address it listens on where absent
    #[arg(long)]
    pub advertise: Option<String>,
    /// Certificates
    #[command(flatten)]
    pub tls: ServiceTlsArgs,
}

/// `unmask worker`
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// Settings as TOML
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// host:port to listen on
    #[arg(long, default_value = "127.0.0.1:7702")]
    pub listen: String,
    /// host:port of the controller, or of its replicas with commas between
    #[arg(long)]
    pub controller: Option<String>,
    /// Folder or name of the model
    #[arg(long)]
    pub model: Option<String>,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: Dtype,
    /// Threads of the forward pass; all cores where neither this nor the file says
    #[arg(long)]
    pub threads: Option<usize>,
    /// Ranks that share the model, as threads of this worker: 1, 2, 4 or 8
    #[arg(long, value_name = "RANKS")]
    pub tensor_parallel: Option<usize>,
    /// host:port of every rank, where ranks are processes: this worker's first, the others run `unmask rank`
    #[arg(long, value_delimiter = ',', value_name = "ADDRESSES")]
    pub rank_addresses: Option<Vec<String>>,
    /// Bring no model: serve what `unmask apply` wants
    #[command(flatten)]
    pub pool: PoolArgs,
    /// What the checkpoint does not say
    #[command(flatten)]
    pub overrides: OverrideArgs,
    /// Certificates
    #[command(flatten)]
    pub tls: ServiceTlsArgs,
}

/// Runs a gateway until it is told to stop.
///
/// # Errors
/// Settings, all at once; a port in use; the service's own.
pub fn gateway(args: GatewayArgs) -> anyhow::Result<ExitCode> {
    let mut raw: unmask_gateway::RawConfig = read(args.config.as_deref())?;
    raw.controller = args.controller.or(raw.controller);
    raw.http = args.http.or(raw.http);
    args.tls.over(&mut raw.tls, &mut raw.insecure);
    let config = unmask_gateway::Config::try_from(raw)?;
    serve(&args.listen, "gateway", config.links.clone(), |grpc, stop| async move {
        let http = match &config.http {
            Some(address) => Some(config.links.incoming(bind_http(address).await?, Protocol::Http)?),
            None => None,
        };
        if let Some(http) = &http {
            let scheme = if config.links.tls.is_some() { "https" } else { "http" };
            output::note(&format!("HTTP on {scheme}://{}/v1", http.local_addr()?));
        }
        unmask_gateway::run(config, Listeners { grpc, http }, stop.cancelled_owned()).await?;
        anyhow::Ok(())
    })
}

/// Runs a controller until it is told to stop.
///
/// # Errors
/// As [`gateway`].
pub fn controller(args: ControllerArgs) -> anyhow::Result<ExitCode> {
    let mut raw: unmask_controller::RawConfig = read(args.config.as_deref())?;
    raw.store = args.store.or(raw.store);
    raw.advertise = args.advertise.or(raw.advertise);
    args.tls.over(&mut raw.tls, &mut raw.insecure);
    let config = unmask_controller::Config::try_from(raw)?;
    serve(&args.listen, "controller", config.links.clone(), |incoming, stop| {
        unmask_controller::run(config, incoming, stop.cancelled_owned())
    })
}

/// Who a worker is, and what one of the pool offers.
#[derive(Debug, Args)]
pub struct PoolArgs {
    /// Stable name of this worker; the address it is reached at where absent
    #[arg(long)]
    pub worker_id: Option<String>,
    /// host:port at which gateways reach this worker; the address it listens on where absent
    #[arg(long)]
    pub advertise: Option<String>,
    /// Bring no model, but place for one rank of whatever is wanted (unmask apply)
    #[arg(long, conflicts_with_all = ["model", "tensor_parallel", "rank_addresses"])]
    pub pool: bool,
    /// With --pool: memory for weights, keys and values, as 16GiB; this machine's where absent
    #[arg(long, requires = "pool", value_parser = crate::apply::parse_bytes)]
    pub memory: Option<u64>,
    /// With --pool: ranks of a group share a zone
    #[arg(long, requires = "pool")]
    pub zone: Option<String>,
    /// With --pool: host:port to listen on for other ranks; a free port where absent
    #[arg(long, requires = "pool")]
    pub rank_listen: Option<String>,
    /// With --pool: host:port at which other ranks reach this worker; the address it listens on where absent
    #[arg(long, requires = "pool")]
    pub rank_advertise: Option<String>,
}

/// Runs a worker until it is told to stop.
///
/// # Errors
/// As [`gateway`].
pub fn worker(args: WorkerArgs) -> anyhow::Result<ExitCode> {
    let mut raw: unmask_worker::RawConfig = read(args.config.as_deref())?;
    raw.controller = args.controller.or(raw.controller);
    raw.worker_id = args.pool.worker_id.or(raw.worker_id);
    raw.advertise = args.pool.advertise.or(raw.advertise);
    if args.pool.pool {
        let pool = raw.pool.get_or_insert_default();
        pool.memory_bytes = args.pool.memory.or(pool.memory_bytes);
        pool.zone = args.pool.zone.or(pool.zone.take());
        pool.rank_listen = args.pool.rank_listen.or(pool.rank_listen.take());
        pool.rank_advertise = args.pool.rank_advertise.or(pool.rank_advertise.take());
    } else if let Some(name) = &args.model {
        raw.model = Some(models::find(Some(name))?);
    } else if raw.model.is_none() && raw.pool.is_none() {
        raw.model = Some(models::find(None)?);
    }
    raw.threads = args.threads.or(raw.threads);
    raw.tensor_parallel = args.tensor_parallel.or(raw.tensor_parallel);
    raw.rank_addresses = args.rank_addresses.or(raw.rank_addresses);
    args.tls.over(&mut raw.tls, &mut raw.insecure);
    let mut config = unmask_worker::Config::try_from(raw)?;
    config.load = args.overrides.load_options(args.dtype, config.load.threads);
    serve(&args.listen, "worker", config.links.clone(), |incoming, stop| {
        unmask_worker::run(config, incoming, stop.cancelled_owned())
    })
}

/// Draws an API key, and prints it with what a gateway's file has of it.
///
/// # Errors
/// Nobody reads the output.
pub fn key() -> anyhow::Result<ExitCode> {
    let key: String = (0..4).map(|_| format!("{:016x}", rand::random::<u64>())).collect();
    let digest = unmask_gateway::tenants::digest(&key);
    output::out(&format!(
        "{key}\n\nFor the client:           {}={key}\nFor the gateway's file:   [[tenants]]\n{:26}name = \"somebody\"\n{:26}keys = \
         [\"{digest}\"]\n",
        crate::local::API_KEY_VARIABLE,
        "",
        ""
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// `unmask rank`
#[derive(Debug, Args)]
pub struct RankArgs {
    /// Folder or name of the model; the worker's
    #[arg(long)]
    pub model: Option<String>,
    /// Which rank this is, from 1
    #[arg(long)]
    pub rank: usize,
    /// host:port of every rank, the worker's first
    #[arg(long, value_delimiter = ',', required = true)]
    pub addresses: Vec<String>,
    /// Incarnation of the group
    #[arg(long, default_value_t = 1)]
    pub epoch: u64,
    /// Type of the weights; the worker's
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: Dtype,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

/// Runs a rank until its group ends.
///
/// # Errors
/// The model does not load, the group does not form, or another rank is lost.
pub fn rank(args: &RankArgs) -> anyhow::Result<ExitCode> {
    let ranks = args.addresses.len();
    ensure!([2, 4, 8].contains(&ranks), "--addresses: must be 2, 4 or 8, are {ranks}");
    ensure!((1..ranks).contains(&args.rank), "--rank: must be 1 to {}, is {}", ranks - 1, args.rank);
    let load = LoadOptions { dtype: args.dtype.weights(), threads: args.threads, ..LoadOptions::default() };
    let model = models::find(args.model.as_deref())?;
    let addresses = args.addresses.clone();
    run_rank(RankConfig { model, load, addresses, rank: args.rank, epoch: args.epoch })?;
    Ok(ExitCode::SUCCESS)
}

fn read<T: DeserializeOwned + Default>(path: Option<&Path>) -> anyhow::Result<T> {
    let Some(path) = path else { return Ok(T::default()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("--config: cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

fn serve<E, F>(
    listen: &str,
    name: &str,
    links: Links,
    run: impl FnOnce(Incoming, CancellationToken) -> F,
) -> anyhow::Result<ExitCode>
where
    anyhow::Error: From<E>,
    F: Future<Output = Result<(), E>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}: choose another with --listen"))?;
        let incoming = links.incoming(listener, Protocol::Grpc)?;
        output::note(&format!("{name} listens on {}", incoming.local_addr()?));
        let mut terminate = signal(SignalKind::terminate())?;
        let stop = CancellationToken::new();
        let service = run(incoming, stop.clone());
        tokio::pin!(service);
        // It ends with the runtime.
        tokio::spawn(async move { links.follow().await });
        tokio::select! {
            ended = &mut service => ended?,
            _ = tokio::signal::ctrl_c() => {
                stop.cancel();
                service.await?;
            }
            _ = terminate.recv() => {
                stop.cancel();
                service.await?;
            }
        }
        Ok(ExitCode::SUCCESS)
    });
    // Neither what hangs nor a model of its own that still loads holds up the end.
    runtime.shutdown_background();
    ended
}
