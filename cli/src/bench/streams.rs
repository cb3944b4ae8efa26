//! `unmask bench streams`: many requests in one engine against the bare forward pass of as many rows. What lies between
//! them is scheduling, policies, sampling and commits.

use super::machine::Machine;
use super::shapes::Shape;
use super::step::{BLOCK, Scene, median};
use crate::args::Dtype;
use crate::output;
use anyhow::{Context, ensure};
use clap::Args;
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use unmask_engine::policy::{Order, Policy, Quota};
use unmask_engine::{Engine, LoadOptions, Model, Request, RequestId, Settings};
use unmask_kernels::{KvType, PAGE_SLOTS};

/// Passes of a block.
const STEPS_PER_BLOCK: u32 = 4;
/// Blocks that each stream decodes before and while it is measured.
const BLOCKS: u32 = 10;

/// Most rows of a step.
const ROWS_MAX: u32 = 16_384;

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:
  unmask bench streams --shape smollm2-135m --streams 8,32
  unmask bench streams --shape models/python-tasks-3m --dtype bf16 --streams 8,32 --context 128 --json";

/// `unmask bench streams`
#[derive(Debug, Args)]
pub struct StreamsArgs {
    /// qwen3-0.6b, smollm2-135m or llama-8b-layer with drawn weights, or folder or name of a model
    #[arg(long)]
    pub shape: Shape,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: Dtype,
    /// Requests decoded together
    #[arg(long, value_delimiter = ',', default_value = "8,32", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub streams: Vec<u32>,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=8192))]
    pub context: u32,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print a JSON array
    #[arg(long)]
    pub json: bool,
}

/// One measured number of streams.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    shape: String,
    dtype: &'static str,
    threads: usize,
    streams: u32,
    /// Of an engine step without stored rows.
    rows: u32,
    context: u32,
    /// Steps measured.
    steps: usize,
    /// Engine step of those rows (milliseconds, median).
    engine_ms: f64,
    /// Forward pass of those rows, all scored, at the middle of the contexts seen (milliseconds, median).
    bare_ms: f64,
    rows_per_s: f64,
    /// Bare time over the engine's.
    fraction_of_bare: f64,
    /// Over all steps, those with stored rows too.
    all_rows_per_s: f64,
    machine: Machine,
}

/// Runs the command.
///
/// # Errors
/// The model does not load or its context is too short.
pub fn run(args: &StreamsArgs) -> anyhow::Result<ExitCode> {
    let machine = Machine::here();
    let threads = if args.threads == 0 { machine.cores } else { args.threads };
    let options = LoadOptions { dtype: args.dtype.weights(), kv_type: KvType::Bf16, threads, ..LoadOptions::default() };
    let positions = args.context + BLOCKS * BLOCK as u32;
    let model = Arc::new(args.shape.load(&options, positions)?);
    ensure!(
        positions <= model.config().context_length,
        "--context {}: the model has {} positions, {} of them for the answer",
        args.context,
        model.config().context_length,
        BLOCKS * BLOCK as u32
    );
    let measure = |&streams| measure(args, &model, streams, &machine);
    let all = args.streams.iter().map(measure).collect::<anyhow::Result<Vec<_>>>()?;
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&all)?) } else { table(&all) };
    output::out(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &StreamsArgs, model: &Arc<Model>, streams: u32, machine: &Machine) -> anyhow::Result<Measured> {
    let rows = streams * BLOCK as u32;
    let (times, all_rows_per_s) = engine_steps(args, model, streams)?;
    let mut scene = Scene::new(model, rows, args.context + BLOCKS * BLOCK as u32 / 2);
    scene.check()?;
    let bare_ms = median(scene.measure(rows as usize).into_iter());
    let engine_ms = median(times.iter().copied());
    Ok(Measured {
        shape: args.shape.name().into(),
        dtype: model.dtype().name(),
        threads: model.threads(),
        streams,
        rows,
        context: args.context,
        steps: times.len(),
        engine_ms,
        bare_ms,
        rows_per_s: f64::from(rows) * 1e3 / engine_ms,
        fraction_of_bare: bare_ms / engine_ms,
        all_rows_per_s,
        machine: machine.clone(),
    })
}

/// Times of the steps in which every stream had its open rows and nothing else (milliseconds), and rows a second over
/// all steps since the last prompt was read.
fn engine_steps(args: &StreamsArgs, model: &Arc<Model>, streams: u32) -> anyhow::Result<(Vec<f64>, f64)> {
    let rows = streams * BLOCK as u32;
    // A request is admitted only while every active one could take a page more.
    let pages = ((args.context + BLOCKS * BLOCK as u32).div_ceil(PAGE_SLOTS as u32) + 1) * streams;
    let limits = unmask_engine::Limits {
        // All prompts in one step, so that all blocks begin together and most steps store nothing.
        rows_max: (streams * (args.context + BLOCK as u32)).clamp(unmask_engine::Limits::default().rows_max, ROWS_MAX),
        pages: pages as usize,
        ..unmask_engine::Limits::default()
    };
    let mut engine = Engine::new(Arc::clone(model), limits);
    for stream in 0..streams {
        engine.submit(request(args.context, stream, model.config().tokenizer_size)).context("a stream")?;
    }
    let (mut events, mut times) = (Vec::new(), Vec::new());
    let (mut all_rows, mut all_seconds, mut reading) = (0u64, 0.0, true);
    while engine.has_work() {
        let start = Instant::now();
        let report = engine.step(&mut events);
        let seconds = start.elapsed().as_secs_f64();
        events.clear();
        if reading {
            reading = report.open_rows < rows;
            continue;
        }
        if report.requests < streams {
            break;
        }
        all_rows += u64::from(report.rows);
        all_seconds += seconds;
        if (report.open_rows, report.kept_rows) == (rows, 0) {
            times.push(seconds * 1e3);
        }
    }
    ensure!(!times.is_empty(), "--context: prompts of {streams} streams do not fit a step of {ROWS_MAX} rows");
    Ok((times, all_rows as f64 / all_seconds))
}

fn request(context: u32, stream: u32, ids: u32) -> Request {
    Request {
        raw: true,
        ..Request::new(
            RequestId(u64::from(stream)),
            (0..context).map(|i| (i * 7919 + stream * 613 + 13) % ids).collect(),
            Settings::new(
                BLOCKS * BLOCK as u32 - BLOCK as u32,
                BLOCK as u32,
                Policy::Fixed { steps: STEPS_PER_BLOCK, order: Order::Confidence, quota: Quota::Block },
            ),
        )
    }
}

fn table(all: &[Measured]) -> String {
    let mut text = String::new();
    let Some(first) = all.first() else { return text };
    let cpu = first.machine.cpu.as_deref().unwrap_or("unknown processor");
    let Measured { shape, dtype, threads, context, .. } = first;
    let _ = writeln!(text, "{shape}, {dtype}, {threads} threads of {cpu}, prompts of {context}, blocks of {BLOCK}");
    for m in all {
        let _ = writeln!(
            text,
            "{:>3} streams  {:>5} rows  engine {:>8.3} ms  bare {:>8.3} ms  {:>3.0}% of bare  {:.0} rows/s ({:.0} with stores)",
            m.streams,
            m.rows,
            m.engine_ms,
            m.bare_ms,
            100.0 * m.fraction_of_bare,
            m.rows_per_s,
            m.all_rows_per_s
        );
    }
    text
}
