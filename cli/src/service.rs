//! `unmask gateway`, `controller`, `worker`: one service each, from a file and flags.

use crate::args::{ControllerArgs, GatewayArgs, WorkerArgs};
use crate::{models, output};
use anyhow::Context;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::path::Path;
use std::process::ExitCode;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Runs a gateway until it is told to stop.
///
/// # Errors
/// Settings, all at once; a port in use; the service's own.
pub fn gateway(args: GatewayArgs) -> anyhow::Result<ExitCode> {
    let mut raw: unmask_gateway::RawConfig = read(args.config.as_deref())?;
    raw.controller = args.controller.or(raw.controller);
    let config = unmask_gateway::Config::try_from(raw)?;
    serve(&args.listen, "gateway", |listener, stop| unmask_gateway::run(config, listener, stop.cancelled_owned()))
}

/// Runs a controller until it is told to stop.
///
/// # Errors
/// As [`gateway`].
pub fn controller(args: ControllerArgs) -> anyhow::Result<ExitCode> {
    let mut raw: unmask_controller::RawConfig = read(args.config.as_deref())?;
    raw.store = args.store.or(raw.store);
    let config = unmask_controller::Config::try_from(raw)?;
    serve(&args.listen, "controller", |listener, stop| unmask_controller::run(config, listener, stop.cancelled_owned()))
}

/// Runs a worker until it is told to stop.
///
/// # Errors
/// As [`gateway`].
pub fn worker(args: WorkerArgs) -> anyhow::Result<ExitCode> {
    let mut raw: unmask_worker::RawConfig = read(args.config.as_deref())?;
    raw.controller = args.controller.or(raw.controller);
    if let Some(name) = &args.model {
        raw.model = Some(models::find(Some(name))?);
    } else if raw.model.is_none() {
        raw.model = Some(models::find(None)?);
    }
    let mut config = unmask_worker::Config::try_from(raw)?;
    config.load.dtype = args.dtype.weights();
    serve(&args.listen, "worker", |listener, stop| unmask_worker::run(config, listener, stop.cancelled_owned()))
}

fn read<T: DeserializeOwned + Default>(path: Option<&Path>) -> anyhow::Result<T> {
    let Some(path) = path else { return Ok(T::default()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("--config: cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

fn serve<E, F>(
    listen: &str,
    name: &str,
    run: impl FnOnce(TcpListener, CancellationToken) -> F,
) -> anyhow::Result<ExitCode>
where
    E: std::error::Error + Send + Sync + 'static,
    F: Future<Output = Result<(), E>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}: choose another with --listen"))?;
        output::note(&format!("{name} listens on {}", listener.local_addr()?));
        let mut terminate = signal(SignalKind::terminate())?;
        let stop = CancellationToken::new();
        let service = run(listener, stop.clone());
        tokio::pin!(service);
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
    })
}
