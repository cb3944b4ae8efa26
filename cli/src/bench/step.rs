//! `unmask bench step`: forward passes of drawn or real weights, each operation against its roofline floor.
//!
//! The floor of an operation is the larger of its bytes over the read bandwidth and its arithmetic over the roof of
//! its type (Williams et al. 2009, "Roofline"); the floor of a step is the sum over its operations, logits included.

use super::machine::Machine;
use super::memory::{anonymous_bytes, watched};
use super::roof::{Meter, Roof};
use super::shapes::Shape;
use crate::args::Dtype;
use crate::output;
use anyhow::ensure;
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use unmask_engine::model::{Link, Operation};
use unmask_engine::{LoadOptions, Model, ModelConfig};
use unmask_kernels::{Bans, Draw, Isa, KvType, PAGE_SLOTS, Record, Row, RowTable, WeightType};

/// Rows of one sequence: a block. More rows are more sequences.
pub(super) const BLOCK: usize = 16;
/// Steps measured for each row of the table: at least, and until this time is used up.
const STEPS_MIN: usize = 7;
const STEPS_MAX: usize = 301;
const TIME: Duration = Duration::from_secs(2);

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:
  unmask bench step --shape qwen3-0.6b --dtype bf16,int8 --rows 1,16
  unmask bench step --shape models/python-tasks-3m --rows 1,4,8,16,32,64 --context 256 --json";

/// `unmask bench step`
#[derive(Debug, Args)]
pub struct StepArgs {
    /// qwen3-0.6b, smollm2-135m or llama-8b-layer with drawn weights, or folder or name of a model
    #[arg(long)]
    pub shape: Shape,
    /// Types of the weights
    #[arg(long, value_enum, value_delimiter = ',', default_value = "bf16,int8")]
    pub dtype: Vec<Dtype>,
    /// Rows of a step
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,16,32,64", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub rows: Vec<u32>,
    /// Positions before each block
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(0..=32768))]
    pub context: u32,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print a JSON array
    #[arg(long)]
    pub json: bool,
}

/// One measured kind of step.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    shape: String,
    dtype: &'static str,
    isa: &'static str,
    threads: usize,
    rows: u32,
    context: u32,
    /// Median (milliseconds).
    ms: f64,
    /// Distance of the quartiles, as a share of the median.
    spread: f64,
    steps: usize,
    /// What the roof allows (milliseconds).
    floor_ms: f64,
    rows_per_s: f64,
    /// Floor over measured time.
    fraction_of_roof: f64,
    /// Of a watched step, outside its operations (microseconds, median).
    overhead_us: f64,
    operations: Vec<Part>,
    memory: Memory,
    machine: Machine,
    roof: Roof,
}

/// One kind of operation, all layers together.
#[derive(Debug, Clone, Serialize)]
pub struct Part {
    operation: &'static str,
    ms: f64,
    floor_ms: f64,
    rows_per_s: f64,
    fraction_of_roof: f64,
}

/// Anonymous resident memory; zero where the system does not tell.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    packed_weights_bytes: usize,
    kv_bytes: usize,
    /// Largest while the weights were packed.
    loading_bytes: u64,
    /// After the steps.
    serving_bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// The model does not load, or results depend on what else is in a step.
pub fn run(args: &StepArgs) -> anyhow::Result<ExitCode> {
    let isa = Isa::detect()?;
    let machine = Machine::here();
    let threads = if args.threads == 0 { machine.cores } else { args.threads };
    let meter = Meter::new(isa, threads);
    let roof = meter.roof();
    let mut all = Vec::new();
    for dtype in args.dtype.iter().map(|dtype| dtype.weights()) {
        let options = LoadOptions { dtype, kv_type: KvType::Bf16, threads, isa: Some(isa), ..LoadOptions::default() };
        let before = anonymous_bytes();
        let positions = args.context + BLOCK as u32;
        let (model, peak) = watched(|| args.shape.load(&options, positions));
        let model = model?;
        ensure!(
            positions <= model.config().context_length,
            "--context {}: the model has {} positions, {BLOCK} of them for the block",
            args.context,
            model.config().context_length
        );
        let mut scene = Scene::new(&model, *args.rows.iter().max().unwrap_or(&1), args.context);
        scene.check()?;
        for &rows in &args.rows {
            let (roof, times) = meter.beside(&roof, model.weight_bytes(), || scene.measure_operations(rows as usize));
            let memory = Memory {
                packed_weights_bytes: model.weight_bytes(),
                kv_bytes: scene.kv.bytes(),
                loading_bytes: peak.saturating_sub(before),
                serving_bytes: anonymous_bytes().saturating_sub(before),
            };
            let floors =
                floors(model.config(), model.weight_bytes(), &roof, dtype, rows as usize, args.context as usize);
            all.push(report(args, &model, &machine, &roof, rows, &times, &floors, memory));
        }
    }
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&all)?) } else { table(&all) };
    output::out(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Buffers of the measured steps.
pub(super) struct Scene<'a> {
    model: &'a Model,
    kv: unmask_kernels::KvCache,
    scratch: unmask_engine::model::Scratch,
    tables: Vec<Vec<u32>>,
    context: u32,
}

/// When operations ended, of a step whose operations are watched.
struct Clock {
    watches: bool,
    last: Instant,
    spent: BTreeMap<Operation, Duration>,
}

/// Time of a step (milliseconds), and of its operations.
type Watched = (f64, BTreeMap<Operation, Duration>);

/// Times of steps.
struct Times {
    /// Of whole steps (milliseconds).
    steps: Vec<f64>,
    /// Of other steps, which take a little longer for being watched.
    watched: Vec<Watched>,
}

impl Link for Clock {
    type Error = Infallible;

    fn all_reduce(&mut self, _: &mut [f32]) -> Result<(), Infallible> {
        Ok(())
    }

    fn watches(&self) -> bool {
        self.watches
    }

    fn after(&mut self, operation: Operation) {
        if !self.watches {
            return;
        }
        let now = Instant::now();
        *self.spent.entry(operation).or_default() += now - self.last;
        self.last = now;
    }
}

impl<'a> Scene<'a> {
    pub(super) fn new(model: &'a Model, rows: u32, context: u32) -> Self {
        let sequences = (rows as usize).div_ceil(BLOCK);
        let pages = (context as usize + BLOCK).div_ceil(PAGE_SLOTS);
        let table = |sequence| (sequence * pages..(sequence + 1) * pages).map(|page| page as u32).collect();
        Scene {
            model,
            kv: model.new_kv(sequences * pages),
            scratch: model.new_scratch(rows as usize),
            tables: (0..sequences).map(table).collect(),
            context,
        }
    }

    /// One step of `rows` rows, all of them scored.
    fn step(&mut self, rows: usize, records: &mut Vec<Record>, watches: bool) -> Clock {
        let config = self.model.config();
        let blocks = (0..rows).map(|row| (row / BLOCK, row % BLOCK));
        let ids: Vec<u32> = (0..rows as u32).map(|row| (row * 7919 + 13) % config.vocab_rows).collect();
        let table: Vec<Row> = blocks
            .map(|(sequence, at)| {
                let end = self.context + BLOCK.min(rows - sequence * BLOCK) as u32;
                Row { sequence: sequence as u32, position: self.context + at as u32, end }
            })
            .collect();
        let tables: Vec<&[u32]> = self.tables.iter().map(Vec::as_slice).collect();
        let outputs: Vec<u32> = (0..rows as u32).collect();
        let (bans, draws) =
            (Bans { vocab: config.vocab_rows as usize, ..Bans::default() }, vec![Draw::default(); rows]);
        records.resize(rows, Record::default());
        let rows = RowTable { rows: &table, tables: &tables };
        let mut clock = Clock { watches, last: Instant::now(), spent: BTreeMap::new() };
        match self.model.pass(&ids, &rows, &outputs, &mut self.kv, &mut self.scratch, &mut clock) {
            Ok(()) => {}
            Err(never) => match never {},
        }
        self.model.reduce(&self.scratch, &bans, &draws, records);
        clock.after(Operation::Head);
        clock
    }

    /// A block's records may not depend on the blocks beside it (I4).
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let (mut alone, mut together) = (Vec::new(), Vec::new());
        let all = self.tables.len() * BLOCK;
        let rows = BLOCK.min(self.scratch.rows_max());
        self.step(rows, &mut alone, false);
        self.step(all.min(self.scratch.rows_max()), &mut together, true);
        ensure!(alone[..rows] == together[..rows], "records depend on the other rows of a step: not measured");
        ensure!(alone.iter().all(|record| record.max.is_finite()), "logits are not finite: not measured");
        Ok(())
    }

    /// Times of steps of `rows` rows (milliseconds).
    pub(super) fn measure(&mut self, rows: usize) -> Vec<f64> {
        self.turns(rows, |scene, records| scene.timed(rows, records, false).0)
    }

    /// Times of steps of `rows` rows, in turn with those of steps whose operations are watched.
    fn measure_operations(&mut self, rows: usize) -> Times {
        let turns =
            self.turns(rows, |scene, records| (scene.timed(rows, records, false).0, scene.timed(rows, records, true)));
        let (steps, watched) = turns.into_iter().unzip();
        Times { steps, watched }
    }

    /// Milliseconds of a step, and what its operations took.
    fn timed(&mut self, rows: usize, records: &mut Vec<Record>, watches: bool) -> Watched {
        let start = Instant::now();
        let clock = self.step(rows, records, watches);
        (start.elapsed().as_secs_f64() * 1e3, clock.spent)
    }

    /// What turns give, until there are enough.
    fn turns<T>(&mut self, rows: usize, mut turn: impl FnMut(&mut Self, &mut Vec<Record>) -> T) -> Vec<T> {
        let mut records = Vec::new();
        self.step(rows, &mut records, false);
        let (begun, mut all) = (Instant::now(), Vec::new());
        while all.len() < STEPS_MIN || (begun.elapsed() < TIME && all.len() < STEPS_MAX) {
            all.push(turn(self, &mut records));
        }
        all
    }
}

/// Floors per operation (milliseconds).
pub(super) fn floors(
    config: &ModelConfig,
    weight_bytes: usize,
    roof: &Roof,
    dtype: WeightType,
    rows: usize,
    context: usize,
) -> BTreeMap<Operation, f64> {
    let gbps = roof.read_gbps(weight_bytes);
    let at_least = |bytes: f64, operations: f64, gops: f64| (bytes / gbps).max(operations / gops) / 1e6;
    let product = |n: usize, k: usize, times: u32| {
        let weights = (n * k * times as usize) as f64;
        at_least(weights * dtype.bytes() as f64, 2.0 * rows as f64 * weights, roof.gops(dtype))
    };
    let (hidden, ffn, heads) = (config.hidden as usize, config.ffn as usize, &config.heads);
    let sequences = rows.div_ceil(BLOCK);
    let kept = (sequences * context + rows) * 2 * heads.kv_heads * heads.head_dim * KvType::Bf16.bytes();
    let scores = 4 * heads.out_width() * rows * (context + BLOCK.min(rows));
    let layers = f64::from(config.layers);
    BTreeMap::from([
        (
            Operation::Attention,
            product(heads.qkv_width(), hidden, config.layers)
                + at_least(layers * kept as f64, layers * scores as f64, roof.f32_gflops)
                + product(hidden, heads.out_width(), config.layers),
        ),
        (Operation::FeedForward, product(2 * ffn, hidden, config.layers) + product(hidden, ffn, config.layers)),
        (Operation::Head, product(config.vocab_rows as usize, hidden, 1)),
    ])
}

#[allow(clippy::too_many_arguments)]
fn report(
    args: &StepArgs,
    model: &Model,
    machine: &Machine,
    roof: &Roof,
    rows: u32,
    times: &Times,
    floors: &BTreeMap<Operation, f64>,
    memory: Memory,
) -> Measured {
    let per_second = |ms: f64| f64::from(rows) * 1e3 / ms;
    let Times { steps: times, watched } = times;
    let kinds: Vec<Operation> = watched.first().into_iter().flat_map(|(_, spent)| spent.keys().copied()).collect();
    let parts = kinds.into_iter().map(|kind| {
        let spent = watched.iter().filter_map(|(_, spent)| spent.get(&kind));
        let ms = median(spent.map(|time| time.as_secs_f64() * 1e3));
        let floor_ms = floors.get(&kind).copied().unwrap_or(0.0);
        let (rows_per_s, fraction_of_roof) = (per_second(ms), floor_ms / ms);
        Part { operation: kind.name(), ms, floor_ms, rows_per_s, fraction_of_roof }
    });
    let outside = |(ms, spent): &(f64, BTreeMap<_, Duration>)| {
        ms * 1e3 - spent.values().map(|t| t.as_secs_f64() * 1e6).sum::<f64>()
    };
    let overhead = watched.iter().map(outside);
    let (ms, floor_ms) = (median(times.iter().copied()), floors.values().sum::<f64>());
    Measured {
        shape: args.shape.name().into(),
        dtype: model.dtype().name(),
        isa: model.isa().name(),
        threads: model.threads(),
        rows,
        context: args.context,
        ms,
        spread: (quantile(times, 0.75) - quantile(times, 0.25)) / ms,
        steps: times.len(),
        floor_ms,
        rows_per_s: per_second(ms),
        fraction_of_roof: floor_ms / ms,
        overhead_us: median(overhead),
        operations: parts.collect(),
        memory,
        machine: machine.clone(),
        roof: roof.clone(),
    }
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(((values.len().max(1) - 1) as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile(&values.collect::<Vec<_>>(), 0.5)
}

fn table(all: &[Measured]) -> String {
    let mut text = String::new();
    let Some(first) = all.first() else { return text };
    let cpu = first.machine.cpu.as_deref().unwrap_or("unknown processor");
    let _ =
        writeln!(text, "{}, {} threads of {cpu}, {}, context {}", first.shape, first.threads, first.isa, first.context);
    for m in all {
        let _ = writeln!(
            text,
            "\n{} {:>3} rows  {:>8.3} ms (spread {:.1}%)  floor {:.3} ms  {:.0}% of the roof  {:.0} rows/s  overhead {:.0} us",
            m.dtype,
            m.rows,
            m.ms,
            100.0 * m.spread,
            m.floor_ms,
            100.0 * m.fraction_of_roof,
            m.rows_per_s,
            m.overhead_us
        );
        for part in &m.operations {
            let share = if part.floor_ms > 0.0 { format!("{:.0}%", 100.0 * part.fraction_of_roof) } else { "-".into() };
            let _ = writeln!(
                text,
                "  {:<12} {:>8.3} ms  floor {:>8.3}  {share:>5}",
                part.operation, part.ms, part.floor_ms
            );
        }
    }
    if let Some(m) = all.last() {
        let mib = |bytes: u64| bytes >> 20;
        let _ = writeln!(
            text,
            "\nanonymous memory: packed weights {} MiB, keys and values {} MiB; {} MiB at most while loading, {} MiB after",
            mib(m.memory.packed_weights_bytes as u64),
            mib(m.memory.kv_bytes as u64),
            mib(m.memory.loading_bytes),
            mib(m.memory.serving_bytes)
        );
    }
    text
}
