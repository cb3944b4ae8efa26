//! `unmask up`: everything on this machine until it is told to stop.

use crate::args::UpArgs;
use crate::local::{Cluster, Listeners};
use crate::output;
use anyhow::Context;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use unmask_worker::config::default_profile_dir;

/// Runs the command.
///
/// # Errors
/// A port is in use, another process uses the data folder, the model cannot be loaded, or a service fails.
pub fn run(args: UpArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(up(args))
}

async fn up(args: UpArgs) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let listeners = Listeners::bind(args.host, args.port).await?;
    let data_dir = args.data_dir.map_or_else(default_data_dir, Ok)?;
    std::fs::create_dir_all(&data_dir).with_context(|| format!("--data-dir: cannot create {}", data_dir.display()))?;
    let mut cluster = Cluster::start_profiled(listeners, &args.model, data_dir, default_profile_dir())?;
    let told = async {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
    };
    tokio::pin!(told);
    tokio::select! {
        ready = cluster.ready() => drop(ready?),
        () = &mut told => return cluster.stop().await.map(|()| ExitCode::SUCCESS),
    }
    let (gateway, controller, worker) = (cluster.gateway, cluster.controller, cluster.worker);
    let ready = if args.json {
        let endpoints = serde_json::json!({
            "gateway": gateway.to_string(), "controller": controller.to_string(), "worker": worker.to_string(),
        });
        format!("{endpoints}\n")
    } else {
        format!(
            "gateway     {gateway}   (gRPC, package unmask.v1)\ncontroller  {controller}\nworker      {worker}\n\nTry: \
             unmask generate --endpoint http://{gateway} \"def is_prime(n):\"\n"
        )
    };
    output::out(&ready)?;
    tokio::select! {
        failure = cluster.failed() => return Err(failure),
        () = &mut told => {}
    }
    output::note("stopping");
    cluster.stop().await?;
    Ok(ExitCode::SUCCESS)
}

/// `unmask` under the user's state folder.
fn default_data_dir() -> anyhow::Result<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let folder = state.filter(|path| path.is_absolute()).or(home);
    Ok(folder.context("neither XDG_STATE_HOME nor HOME is set: give --data-dir")?.join("unmask"))
}
