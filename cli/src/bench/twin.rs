//! `unmask bench twin`: a model against autoregressive decoding, on the same held-out tasks, in one process, alternately.
//!
//! `ceiling` is what the passes saved give on this machine where a pass costs nothing outside the model: tokens per pass
//! times the time of a pass of as many rows as the baseline's had (one, for one stream) over that of as many as the model's
//! passes had, the prompts' left out.

use super::machine::Machine;
use super::roof::{Meter, Roof};
use super::step::{Scene, floors, median};
use crate::models;
use crate::{args::Dtype, models::OverrideArgs, output, raw::load};
use anyhow::ensure;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use unmask_engine::Model;
use unmask_kernels::Isa;
use unmask_text::Tokenizer;
use unmask_trainer::measure::{self, Point, paired_difference, wilson};
use unmask_trainer::rollout::{Given, Prompt, Run, roll_out, verify};
use unmask_trainer::tasks::{Part, Task, Tasks, verify::with_expected_results};

/// Tasks that one side decodes before the other has its turn.
const TURN: usize = 50;
/// Positions before the block when passes are timed alone: about the middle of an answer.
const CONTEXT: u32 = 96;

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:
  unmask bench twin
  unmask bench twin --model models/python-tasks-3m --tasks 1000 --streams 1,8 --json";

/// `unmask bench twin`
#[derive(Debug, Args)]
pub struct TwinArgs {
    /// Folder or name of the model
    #[arg(long, default_value = "models/python-tasks-3m")]
    pub model: String,
    /// Folder or name of another model to decode autoregressively; the same weights where absent
    #[arg(long)]
    pub twin: Option<String>,
    /// Held-out tasks
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub tasks: u64,
    /// Of the tasks
    #[arg(long, default_value_t = 9)]
    pub seed: u64,
    /// Requests decoded together; each number is measured by itself
    #[arg(long, value_delimiter = ',', default_value = "1,8", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: Vec<u16>,
    /// Block size; the model's default where absent
    #[arg(long)]
    pub block_size: Option<u32>,
    /// Fill what reaches this confidence (`threshold`) instead of the model's default policy
    #[arg(long)]
    pub threshold: Option<f32>,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: Dtype,
    /// Print a JSON array, one object per number of streams
    #[arg(long)]
    pub json: bool,
}

/// One comparison.
#[derive(Debug, Serialize)]
struct Compared {
    /// The model that decodes autoregressively: another, or the same.
    baseline: String,
    streams: u16,
    tasks: usize,
    policy: &'static str,
    block_size: u32,
    threshold: f32,
    /// Tokens per second, diffusion over autoregressive.
    ratio: f64,
    /// Passes, autoregressive over diffusion.
    pass_ratio: f64,
    /// What bare passes give: TPF x T(mean rows of the baseline, one for one stream) / T(mean rows).
    ceiling: f64,
    /// Pass rate of diffusion minus autoregressive, 95% interval of the pairs.
    pass_difference: [f64; 2],
    diffusion: Side,
    twin: Side,
    /// A bare pass of as many rows as diffusion's had.
    diffusion_step: Step,
    /// The same of the baseline: one row for one stream.
    twin_step: Step,
    machine: Machine,
}

/// One way to decode.
#[derive(Debug, Serialize)]
struct Side {
    tokens_per_s: f64,
    pass_rate: f64,
    /// 95% (Wilson).
    pass_rate_interval: [f64; 2],
    tpf: f64,
    /// Passes of all requests.
    passes: u64,
    tokens: u64,
    seconds: f64,
}

/// A bare forward pass.
#[derive(Debug, Clone, Copy, Serialize)]
struct Step {
    rows: u32,
    ms: f64,
    floor_ms: f64,
}

/// What one side did so far.
#[derive(Default)]
struct Tally {
    passed: Vec<bool>,
    passes: u64,
    tokens: u64,
    steps: u64,
    /// Rows that are not the prompts'.
    rows: u64,
    seconds: f64,
}

/// Runs the command.
///
/// # Errors
/// The models cannot be loaded or are not for these tasks' prompts; Python cannot be run.
pub fn run(args: &TwinArgs) -> anyhow::Result<ExitCode> {
    let load = |name: &str| load(name, args.dtype, &OverrideArgs::default());
    let model = load(&args.model)?;
    let baseline = args.twin.as_ref().map_or_else(|| Ok(Arc::clone(&model)), |twin| load(twin))?;
    let default = Point::of(&model);
    let block_size = args.block_size.unwrap_or(default.block_size);
    let point =
        args.threshold.map_or(Point { block_size, ..default }, |threshold| Point::threshold(block_size, threshold));
    let tokenizer_of = |name: &str| measure::tokenizer(&models::find(Some(name))?);
    let (tokenizer, twins) = (tokenizer_of(&args.model)?, tokenizer_of(args.twin.as_ref().unwrap_or(&args.model))?);
    let tasks = Tasks::new()?;
    let drawn: Vec<Task> = (0..args.tasks).map(|i| tasks.draw(args.seed, Part::HeldOut, i)).collect();
    let tasks = with_expected_results(&drawn)?;
    ensure!(!tasks.is_empty(), "no task has a solution that runs");
    let meter = Meter::new(Isa::detect()?, model.threads());
    let roof = meter.roof();
    let mut all = Vec::new();
    for &streams in &args.streams {
        let sides = [(&model, &tokenizer, point), (&baseline, &twins, Point::AUTOREGRESSIVE)];
        let [diffusion, twin] = alternate(&sides, &tasks, streams)?;
        let steps = [(&model, &diffusion), (&baseline, &twin)]
            .map(|(model, tally)| step(&meter, &roof, model, tally.mean_rows()));
        let baseline = args.twin.as_ref().unwrap_or(&args.model).clone();
        all.push(compare(baseline, point, streams, [&diffusion, &twin], steps));
    }
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&all)?) } else { table(&all) };
    output::out(&text)?;
    Ok(ExitCode::SUCCESS)
}

type Decoder<'a> = (&'a Arc<Model>, &'a Tokenizer, Point);

/// Both sides over all tasks, in turns.
fn alternate(sides: &[Decoder<'_>; 2], tasks: &[Task], streams: u16) -> anyhow::Result<[Tally; 2]> {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")?;
    let bar = ProgressBar::new(tasks.len() as u64).with_style(style).with_message(format!("{streams} streams"));
    let mut tallies = [Tally::default(), Tally::default()];
    for turn in tasks.chunks(TURN) {
        for (tally, side) in tallies.iter_mut().zip(sides) {
            tally.take(side, turn, streams)?;
        }
        bar.inc(turn.len() as u64);
    }
    bar.finish_and_clear();
    Ok(tallies)
}

impl Tally {
    fn take(&mut self, &(model, tokenizer, point): &Decoder<'_>, tasks: &[Task], streams: u16) -> anyhow::Result<()> {
        let given: Vec<Given> =
            tasks.iter().map(|task| Given::of(&task.prompt, tokenizer, model, point)).collect::<Result<_, _>>()?;
        let start = Instant::now();
        let Run { rollouts, steps, rows } = roll_out(model, &given, point, usize::from(streams), |_| {})?;
        self.seconds += start.elapsed().as_secs_f64();
        let prompt_rows: usize = given.iter().map(|prompt| prompt.ids.len()).sum();
        (self.steps, self.rows) = (self.steps + steps, self.rows + rows.saturating_sub(prompt_rows as u64));
        let prompts: Vec<Prompt> =
            tasks.iter().map(|task| Prompt { text: task.prompt.clone(), task: Some(task.clone()) }).collect();
        let answers: Vec<(&Prompt, String)> = prompts
            .iter()
            .zip(given.iter().zip(&rollouts))
            .map(|(p, (g, r))| (p, g.text(&r.answer, tokenizer)))
            .collect();
        self.passed.extend(verify(&answers)?);
        for rollout in &rollouts {
            self.passes += u64::from(rollout.passes);
            self.tokens += rollout.answer.len() as u64;
        }
        Ok(())
    }

    fn solved(&self) -> usize {
        self.passed.iter().filter(|passed| **passed).count()
    }

    fn mean_rows(&self) -> u32 {
        (self.rows as f64 / self.steps.max(1) as f64).round().max(1.0) as u32
    }

    fn side(&self) -> Side {
        let n = self.passed.len();
        Side {
            tokens_per_s: self.tokens as f64 / self.seconds,
            pass_rate: self.solved() as f64 / n as f64,
            pass_rate_interval: wilson(self.solved(), n),
            tpf: self.tokens as f64 / self.passes.max(1) as f64,
            passes: self.passes,
            tokens: self.tokens,
            seconds: self.seconds,
        }
    }
}

fn compare(
    baseline: String,
    point: Point,
    streams: u16,
    [diffusion, twin]: [&Tally; 2],
    [diffusion_step, twin_step]: [Step; 2],
) -> Compared {
    let only = |a: &Tally, b: &Tally| a.passed.iter().zip(&b.passed).filter(|(a, b)| **a && !**b).count();
    let n = diffusion.passed.len();
    let (ours, theirs) = (diffusion.side(), twin.side());
    Compared {
        baseline,
        streams,
        tasks: n,
        policy: point.name(),
        block_size: point.block_size,
        threshold: point.threshold,
        ratio: ours.tokens_per_s / theirs.tokens_per_s,
        pass_ratio: theirs.passes as f64 / ours.passes.max(1) as f64,
        ceiling: ours.tpf * twin_step.ms / diffusion_step.ms,
        pass_difference: paired_difference(only(diffusion, twin), only(twin, diffusion), n),
        diffusion: ours,
        twin: theirs,
        diffusion_step,
        twin_step,
        machine: Machine::here(),
    }
}

/// Time of a bare pass, beside its floor.
fn step(meter: &Meter, roof: &Roof, model: &Model, rows: u32) -> Step {
    let mut scene = Scene::new(model, rows, CONTEXT);
    let (roof, times) = meter.beside(roof, model.weight_bytes(), || scene.measure(rows as usize));
    let floors = floors(model.config(), model.weight_bytes(), &roof, model.dtype(), rows as usize, CONTEXT as usize);
    Step { rows, ms: median(times.into_iter()), floor_ms: floors.values().sum() }
}

fn table(all: &[Compared]) -> String {
    let mut text = String::new();
    for c in all {
        let Compared { streams, tasks, policy, block_size, threshold, ratio, pass_ratio, ceiling, .. } = c;
        text += &format!("{streams} stream(s), {tasks} held-out tasks, {policy}, block {block_size} at {threshold}\n");
        text += "                  tokens/s  passes    TPF   pass rate\n";
        for (name, side) in [("diffusion", &c.diffusion), ("autoregressive", &c.twin)] {
            let [low, high] = side.pass_rate_interval.map(|end| 100.0 * end);
            let rate = 100.0 * side.pass_rate;
            text += &format!(
                "  {name:15} {:8.0} {:7} {:6.2}   {rate:5.1}% ({low:.1} to {high:.1})\n",
                side.tokens_per_s, side.passes, side.tpf
            );
        }
        let [low, high] = c.pass_difference.map(|end| 100.0 * end);
        text += &format!("  {pass_ratio:.2}x fewer passes; {ratio:.2}x the tokens/s, {ceiling:.2}x by bare passes; ");
        text += &format!("pass rate {low:+.1} to {high:+.1} points\n");
        text += &format!(
            "  a pass of {} row(s): {:.3} ms (floor {:.3}); of {} rows: {:.3} ms (floor {:.3})\n\n",
            c.twin_step.rows,
            c.twin_step.ms,
            c.twin_step.floor_ms,
            c.diffusion_step.rows,
            c.diffusion_step.ms,
            c.diffusion_step.floor_ms
        );
    }
    text
}
