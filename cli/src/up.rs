//! `unmask up`: everything on this machine until it is told to stop.

use crate::args::UpArgs;
use crate::local::{Cluster, Listeners};
use crate::output;
use anyhow::{Context, ensure};
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
    let ended = runtime.block_on(up(args));
    // Neither what hangs nor a model of its own that still loads holds up the end.
    runtime.shutdown_background();
    ended
}

async fn up(args: UpArgs) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let listeners = Listeners::bind(args.host, args.port).await?;
    let listeners = listeners.with_http(args.http.as_deref(), args.host, args.port).await?;
    let reached = listeners.addresses()?.into_iter().find(|address| !address.ip().is_loopback());
    ensure!(
        args.insecure || reached.is_none(),
        "{} is reached from other machines, and links would be plain: run gateway, controller and worker with certificates \
         (docs/cluster.md, TLS), or give --insecure when everybody on the network can be trusted",
        reached.map_or_else(String::new, |address| address.to_string())
    );
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
    let ready = if args.json { endpoints_json(&cluster) } else { endpoints(&cluster) };
    output::out(&ready)?;
    tokio::select! {
        failure = cluster.failed() => return Err(failure),
        () = &mut told => {}
    }
    output::note("stopping");
    cluster.stop().await?;
    Ok(ExitCode::SUCCESS)
}

fn endpoints_json(cluster: &Cluster) -> String {
    let endpoints = serde_json::json!({
        "gateway": cluster.gateway.to_string(), "http": cluster.http.map(|address| address.to_string()),
        "controller": cluster.controller.to_string(), "worker": cluster.worker.to_string(),
    });
    format!("{endpoints}\n")
}

fn endpoints(cluster: &Cluster) -> String {
    let Cluster { gateway, controller, worker, .. } = cluster;
    let (mut http, mut curl) = (String::new(), String::new());
    if let Some(address) = cluster.http {
        http = format!("HTTP        http://{address}/v1   (as OpenAI's)\n");
        curl = format!(
            "     curl http://{address}/v1/completions -H 'Content-Type: application/json' \\\n       \
             -d '{{\"prompt\": \"def is_prime(n):\"}}'\n"
        );
    }
    format!(
        "gateway     {gateway}   (gRPC, package unmask.v1)\n{http}controller  {controller}\nworker      {worker}\n\nTry: \
         unmask generate --endpoint http://{gateway} \"def is_prime(n):\"\n{curl}"
    )
}

/// `unmask` under the user's state folder.
fn default_data_dir() -> anyhow::Result<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let folder = state.filter(|path| path.is_absolute()).or(home);
    Ok(folder.context("neither XDG_STATE_HOME nor HOME is set: give --data-dir")?.join("unmask"))
}
