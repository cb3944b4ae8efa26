//! `unmask bench serve`: load on the whole path, client to worker, and what it did to those who asked.
//!
//! Modules in reading order:
//! - [`args`]: what may be typed
//! - [`schedule`], [`prompts`]: when and what to ask, functions of the seed
//! - [`target`], [`observe`], [`load`], [`progress`]: asking
//! - [`summary`], [`report`]: what came of it

pub mod args;
pub mod load;
pub mod observe;
pub mod progress;
pub mod prompts;
pub mod report;
pub mod schedule;
pub mod summary;
pub mod target;

use super::machine::Machine;
use crate::local::{Cluster, Listeners};
use crate::screen::to_json;
use crate::{INTERRUPTED, output};
use anyhow::{Context, bail, ensure};
use args::{LOADS_MAX, REQUESTS_MAX, ServeArgs};
use observe::observe;
use progress::Progress;
use prompts::Prompts;
use report::{FORMAT, ModelFacts, Report};
use schedule::{Extent, Schedule};
use serde_json::{Map, Value};
use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use summary::{Ended, Load, Slo, Summary};
use target::{Questions, Target};
use tokio_util::sync::CancellationToken;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::{Decoding, ResolvedSettings, Started};

/// Settings that the report repeats.
const SETTINGS: [&str; 4] = ["block_size", "policy", "max_tokens", "temperature"];

/// A load point, drawn.
enum Point {
    Open { rate: f64, arrivals: &'static str, schedule: Schedule },
    Closed { streams: u64, extent: Extent },
}

/// Runs the command.
///
/// # Errors
/// The flags do not fit together, the cluster cannot start or be reached, or no request succeeded.
pub fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let points = points(&args)?;
    let prompts = args.prompts.as_deref().map_or_else(|| Ok(Prompts::built_in()), Prompts::read)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let stop = CancellationToken::new();
    let report = runtime.block_on(async {
        let interrupt = stop.clone();
        tokio::spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                interrupt.cancel();
            }
        });
        bench(&args, &points, prompts, &stop).await
    });
    // Whatever still runs has nobody waiting for it.
    runtime.shutdown_background();
    let Some(report) = report? else { return Ok(ExitCode::from(INTERRUPTED)) };
    output::out(&if args.json { report.json()? } else { report.table() })?;
    if stop.is_cancelled() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if report.runs.iter().all(|run| run.requests.ok == 0) {
        let failed = report.runs.iter().flat_map(|run| &run.requests.failed).next();
        match failed {
            Some((code, failures)) => bail!("no request succeeded: {} ({code})", failures.first),
            None => bail!("no request was answered before the end"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Draws every load point.
fn points(args: &ServeArgs) -> anyhow::Result<Vec<Point>> {
    let count = if args.closed.is_empty() { args.rate.len() } else { args.closed.len() };
    ensure!(count <= LOADS_MAX, "{count} load points are more than the {LOADS_MAX} of one run");
    let extent = args.requests.map_or(Extent::Duration(args.duration), Extent::Requests);
    if !args.closed.is_empty() {
        return Ok(args.closed.iter().map(|&streams| Point::Closed { streams, extent }).collect());
    }
    let draw = |&rate: &f64| {
        let schedule = Schedule::draw(args.arrivals, rate, args.burst_size, extent, args.seed, REQUESTS_MAX)?;
        ensure!(
            !schedule.starts.is_empty(),
            "no request comes in {:?} at {rate} requests/s: raise --duration",
            args.duration
        );
        Ok(Point::Open { rate, arrivals: args.arrivals.name(), schedule })
    };
    args.rate.iter().map(draw).collect()
}

/// Measures against the gateway that was named or a cluster in this process; nothing when interrupted before.
async fn bench(
    args: &ServeArgs,
    points: &[Point],
    prompts: Prompts,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Report>> {
    if let Some(endpoint) = &args.endpoint {
        return measure(args, points, prompts, endpoint, stop).await;
    }
    let data = tempfile::tempdir().context("cannot make a temporary folder for the controller's state")?;
    let listeners = Listeners::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).await?;
    let mut cluster = Cluster::start(listeners, &args.model, data.path().to_owned())?;
    tokio::select! {
        ready = cluster.ready() => ready?,
        () = stop.cancelled() => return Ok(None),
    };
    let endpoint = format!("http://{}", cluster.gateway);
    let report = tokio::select! {
        report = measure(args, points, prompts, &endpoint, stop) => report?,
        failure = cluster.failed() => return Err(failure),
    };
    if let Err(error) = cluster.stop().await {
        // What was measured stands.
        output::error(&error);
    }
    Ok(report)
}

async fn measure(
    args: &ServeArgs,
    points: &[Point],
    prompts: Prompts,
    endpoint: &str,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Report>> {
    let streams = args.closed.iter().copied().max().unwrap_or(args.concurrency_max);
    // A local model may be a folder; the cluster in this process serves no other.
    let model = args.endpoint.as_ref().and(args.model.model.as_deref());
    let target = tokio::select! {
        target = Target::connect(endpoint, &args.tls, model, streams, questions(args, prompts)) => target?,
        () = stop.cancelled() => return Ok(None),
    };
    warm_up(&target, args.warmup, stop).await;
    let slo = Slo { first_block: args.slo_first_block_ms.map(bound), block: args.slo_block_ms.map(bound) };
    let mut runs = Vec::new();
    for point in points {
        if stop.is_cancelled() {
            break;
        }
        let recording = match point {
            Point::Open { rate, arrivals, schedule } => {
                let load = Load::Open { rate: *rate, arrivals };
                let progress = Progress::new(report::name(&load), Some(schedule.starts.len() as u64));
                load::open(&target, load, schedule, args.concurrency_max as usize, stop, progress).await
            }
            Point::Closed { streams, extent } => {
                let load = Load::Closed { streams: *streams };
                let progress = Progress::new(report::name(&load), args.requests);
                load::closed(&target, load, *streams as usize, *extent, stop, progress).await
            }
        };
        let ended = recording.ended;
        runs.push(Summary::of(&recording, slo));
        if ended == Ended::Interrupted {
            break;
        }
    }
    Ok((!runs.is_empty()).then(|| report(args, &target, runs)))
}

fn questions(args: &ServeArgs, prompts: Prompts) -> Questions {
    let decoding = Decoding {
        max_tokens: args.max_tokens,
        block_size: args.block_size,
        policy: args.policy.as_ref().map(|policy| policy.0),
        ..Decoding::default()
    };
    Questions { seed: args.seed, prompts, decoding, timeout: args.timeout }
}

fn bound(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

/// Requests that are not counted: they fill caches and pools. That one fails will show in the run.
async fn warm_up(target: &Target, count: u64, stop: &CancellationToken) {
    let progress = &mut Progress::new("warm-up".into(), Some(count));
    for index in 0..count {
        progress.sent(1);
        let seen = observe(target.ask(index), Instant::now(), Duration::ZERO, stop.clone()).await;
        progress.ended(&seen.outcome, 0);
        if stop.is_cancelled() {
            break;
        }
    }
    progress.clear();
}

fn report(args: &ServeArgs, target: &Target, runs: Vec<Summary>) -> Report {
    let mut machine = Machine::here();
    let local = args.endpoint.is_none();
    let threads = if args.model.threads == 0 { machine.cores } else { args.model.threads };
    if !local {
        // The kernels run elsewhere.
        machine.isa = None;
    }
    let facts = target.model.descriptor.clone().unwrap_or_default();
    Report {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION"),
        machine,
        cluster: args.endpoint.clone().unwrap_or_else(|| "in process".into()),
        threads: local.then_some(threads),
        model: ModelFacts {
            name: target.model.name.clone(),
            dtype: facts.dtype,
            parameters: facts.parameters,
            numerics_id: facts.numerics_id,
        },
        settings: settings(target.resolved()),
        prompts: args.prompts.as_ref().map_or_else(|| "built-in".into(), |path| path.display().to_string()),
        seed: args.seed,
        warmup: args.warmup,
        concurrency_max: args.concurrency_max,
        runs,
    }
}

/// Those of [`SETTINGS`], as `unmask generate --json` writes them; null when no request was served.
fn settings(resolved: Option<&ResolvedSettings>) -> Value {
    let Some(resolved) = resolved else { return Value::Null };
    let started = Started { settings: Some(resolved.clone()), ..Started::default() };
    let all = to_json(&Event::Started(started));
    let all = &all["started"]["settings"];
    SETTINGS.iter().map(|key| ((*key).to_owned(), all[*key].clone())).collect::<Map<_, _>>().into()
}
