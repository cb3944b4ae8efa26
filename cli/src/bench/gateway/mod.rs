//! `unmask bench gateway`: what the gateway itself costs. A real gateway, in a process of its own, between a client and a worker
//! without an engine; the same requests to the worker directly are what it is compared with.
//!
//! Modules in reading order:
//! - [`worker`]: the worker, which commits at the times of a table
//! - [`stage`]: worker, controller, and the gateway's process
//! - [`client`]: requests, and their tokens held against what must come
//! - [`report`]: medians and spreads

pub mod client;
pub mod report;
pub mod stage;
pub mod worker;

use super::machine::Machine;
use super::serve::prompts::Prompts;
use super::serve::schedule::Extent;
use crate::output;
use anyhow::{Context, ensure};
use clap::Args;
use client::{Client, Questions, Seen, Way};
use indicatif::{ProgressBar, ProgressStyle};
use report::{FORMAT, Idle, Latency, Report, Sample, Saturated};
use stage::{GatewayProcess, Stage};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use unmask_controller::policy::Profile;
use worker::{BLOCK, BLOCKS_MAX, STREAMS_MAX, Table};

/// Requests before anything is measured: they open connections and fetch the tokenizer.
const WARM_UP: u64 = 64;
/// Streams at saturation.
const SATURATION_STREAMS: u64 = 64;
/// From the last Started to the look at the gateway's memory.
const SETTLE: Duration = Duration::from_millis(500);

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:
  unmask bench gateway
  unmask bench gateway --streams 1,64,500 --repeats 9 --json
  unmask bench gateway --profile models/python-tasks-3m/profile.json

What each number means: docs/benchmarks.md";

/// `unmask bench gateway`
#[derive(Debug, Args)]
pub struct GatewayBenchArgs {
    /// Streams at a time when latency is measured
    #[arg(long, value_delimiter = ',', default_value = "1,500", value_parser = clap::value_parser!(u64).range(1..=STREAMS_MAX as u64))]
    pub streams: Vec<u64>,
    /// Requests of each latency measurement; at least twice as many as streams are measured
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub requests: u64,
    /// Tokens of an answer, in blocks of 16
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=i64::from(BLOCK * BLOCKS_MAX)))]
    pub tokens: u32,
    /// Step times of the worker, from `unmask profile`; default: 5 ms for one block to 50 ms for 512
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Seconds at saturation, where a step takes no time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub saturation_s: u64,
    /// Streams that are open and idle when memory is measured
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=STREAMS_MAX as u64))]
    pub idle: u64,
    /// How often everything is measured; each time with a new gateway
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub repeats: u32,
    /// Folder or name of the model whose tokenizer is used; the bundled one when absent
    #[arg(long)]
    pub model: Option<String>,
    /// Of prompts and tokens
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The report as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// The gateway does not start, or a stream has other tokens than it must.
pub fn run(args: &GatewayBenchArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let report = runtime.block_on(bench(args));
    // The services of the stage have nobody left.
    runtime.shutdown_background();
    let report = report?;
    output::out(&if args.json { format!("{}\n", serde_json::to_string(&report)?) } else { report.table() })?;
    Ok(ExitCode::SUCCESS)
}

async fn bench(args: &GatewayBenchArgs) -> anyhow::Result<Report> {
    let (tokenizer, files) = stage::tokenizer(args.model.as_deref())?;
    let timed = Stage::start(table(args)?, &tokenizer, &files).await?;
    let free = Stage::start(Table::Zero, &tokenizer, &files).await?;
    let questions = Questions { prompts: Prompts::built_in(), seed: args.seed, tokens: args.tokens, tokenizer };
    let bench = Bench { args, questions: Arc::new(questions) };
    let bar = ProgressBar::new(u64::from(args.repeats) * (args.streams.len() as u64 + 2));
    bar.set_style(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {elapsed}")?);
    let (mut idle, mut latency, mut saturated) = (Vec::new(), vec![Vec::new(); args.streams.len()], Vec::new());
    for repeat in 0..args.repeats {
        let gateway = timed.gateway().await?;
        bar.set_message(format!("{} idle streams", args.idle));
        idle.push(bench.idle(&timed, &gateway).await.context("idle streams")?);
        bar.inc(1);
        for (&streams, samples) in args.streams.iter().zip(&mut latency) {
            bar.set_message(format!("{streams} streams"));
            let sample = bench.latency(&timed, &gateway, streams, repeat).await;
            samples.push(sample.with_context(|| format!("{streams} streams"))?);
            bar.inc(1);
        }
        drop(gateway);
        bar.set_message("saturation");
        saturated.push(bench.saturate(&free).await.context("saturation")?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Report {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::here(),
        table: args.profile.as_ref().map_or_else(|| "built-in".into(), |path| path.display().to_string()),
        tokens: args.tokens,
        block_size: BLOCK,
        repeats: args.repeats,
        seed: args.seed,
        latency: args.streams.iter().zip(&latency).map(|(&streams, all)| Latency::of(streams, all)).collect(),
        saturated: report::Throughput::of(SATURATION_STREAMS, &saturated),
        idle: report::Memory::of(args.idle, &idle),
    })
}

fn table(args: &GatewayBenchArgs) -> anyhow::Result<Table> {
    let Some(path) = &args.profile else { return Table::built_in() };
    let text = std::fs::read_to_string(path).with_context(|| format!("--profile: cannot read {}", path.display()))?;
    Ok(Table::Times(Profile::parse(&text).map(Box::new).with_context(|| path.display().to_string())?))
}

struct Bench<'a> {
    args: &'a GatewayBenchArgs,
    questions: Arc<Questions>,
}

impl Bench<'_> {
    fn client(&self, stage: &Stage, way: Way) -> Client {
        Client { way, questions: Arc::clone(&self.questions), worker: stage.worker.clone() }
    }

    fn through(&self, stage: &Stage, gateway: &GatewayProcess, streams: u64) -> anyhow::Result<Client> {
        Ok(self.client(stage, Way::gateway(&gateway.address, streams as usize)?))
    }

    fn direct(&self, stage: &Stage, streams: u64) -> anyhow::Result<Client> {
        Ok(self.client(stage, Way::direct(&stage.worker_address.to_string(), streams as usize)?))
    }

    /// A gateway's memory before streams are open, and while they are.
    async fn idle(&self, stage: &Stage, gateway: &GatewayProcess) -> anyhow::Result<Idle> {
        let client = self.through(stage, gateway, self.args.idle)?;
        client.closed(SATURATION_STREAMS, Extent::Requests(WARM_UP)).await?;
        tokio::time::sleep(SETTLE).await;
        let before = gateway.resident_bytes()?;
        stage.worker.hold(true);
        let mut open = Vec::new();
        for index in 0..self.args.idle {
            open.push(client.begin(index).await?);
        }
        tokio::time::sleep(SETTLE).await;
        let after = gateway.resident_bytes()?;
        stage.worker.hold(false);
        // They were idle and not dead: every one goes on to its own tokens.
        for one in open {
            client.finish(one).await?;
        }
        Ok(Idle { before, after })
    }

    /// The same requests both ways; who is first changes from repeat to repeat.
    async fn latency(
        &self,
        stage: &Stage,
        gateway: &GatewayProcess,
        streams: u64,
        repeat: u32,
    ) -> anyhow::Result<[Sample; 2]> {
        // The first of each stream are not counted: they begin all at once.
        let extent = Extent::Requests(streams + self.args.requests.max(2 * streams));
        let (direct, through) = (self.direct(stage, streams)?, self.through(stage, gateway, streams)?);
        let sample = async |client: &Client| {
            let (mut seen, _) = client.closed(streams, extent).await?;
            seen.retain(|one| one.index >= streams);
            anyhow::Ok(Sample::of(&seen))
        };
        if repeat.is_multiple_of(2) {
            let first = sample(&direct).await?;
            return Ok([first, sample(&through).await?]);
        }
        let first = sample(&through).await?;
        Ok([sample(&direct).await?, first])
    }

    /// As many requests as there is room for, both ways, through a new gateway.
    async fn saturate(&self, stage: &Stage) -> anyhow::Result<Saturated> {
        let gateway = stage.gateway().await?;
        let extent = Extent::Duration(Duration::from_secs(self.args.saturation_s));
        let rate = |seen: &[Seen], took: Duration| seen.len() as f64 / took.as_secs_f64();
        let direct = self.direct(stage, SATURATION_STREAMS)?;
        let (seen, took) = direct.closed(SATURATION_STREAMS, extent).await?;
        let direct_per_s = rate(&seen, took);
        let through = self.through(stage, &gateway, SATURATION_STREAMS)?;
        through.closed(SATURATION_STREAMS, Extent::Requests(WARM_UP)).await?;
        let before = gateway.cpu()?;
        let (seen, took) = through.closed(SATURATION_STREAMS, extent).await?;
        let cpu = gateway.cpu()?.saturating_sub(before);
        ensure!(!seen.is_empty(), "no request was answered in {} s", self.args.saturation_s);
        Ok(Saturated {
            direct_per_s,
            gateway_per_s: rate(&seen, took),
            cpu_us: cpu.as_secs_f64() * 1e6 / seen.len() as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::args::Cli;
    use clap::Parser;

    #[test]
    fn every_example_parses() {
        let examples: Vec<&str> = EXAMPLES.lines().filter(|line| line.trim().starts_with("unmask ")).collect();
        assert_eq!(examples.len(), 3);
        for example in examples {
            Cli::try_parse_from(example.split_whitespace()).unwrap();
        }
    }
}
