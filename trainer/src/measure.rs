//! Quality of a model: how often it writes programs that pass their tests, and in how few passes.

use crate::rollout::{Given, Rollout, STREAMS, roll_out};
use crate::tasks::Task;
use crate::tasks::verify::{Limits, Outcome, Program, run};
use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use unmask_engine::Model;
use unmask_engine::policy::{Comparison, Policy};
use unmask_text::Tokenizer;

/// Two-sided 95% of the normal distribution.
const Z_95: f64 = 1.96;

/// A way to decode.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Positions decoded together; 1 is autoregressive.
    pub block_size: u32,
    /// Confidence threshold; of drafts: how likely they must be right.
    pub threshold: f32,
    /// What the threshold decides.
    pub rule: Rule,
}

/// What is done with what a model proposes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// What reaches the threshold is filled.
    Threshold,
    /// And visible tokens change.
    JointEdit(Edits),
    /// Masks draft, causal rows decide.
    SelfSpeculative,
}

/// How visible tokens of the open block change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edits {
    /// When another token is likelier than this.
    pub tau: f32,
    /// Passes that may follow the fall of a block's last mask.
    pub post_steps: u32,
}

impl Point {
    /// The autoregressive baseline.
    pub const AUTOREGRESSIVE: Point = Point::threshold(1, 1.0);

    /// Blocks in which everything above a threshold is filled.
    pub const fn threshold(block_size: u32, threshold: f32) -> Point {
        Point { block_size, threshold, rule: Rule::Threshold }
    }

    /// Drafts `block_size` positions ahead that causal rows decide.
    pub const fn self_speculative(block_size: u32, threshold: f32) -> Point {
        Point { block_size, threshold, rule: Rule::SelfSpeculative }
    }

    /// Its name in reports: that of its policy.
    pub fn name(self) -> &'static str {
        match self.rule {
            _ if self.block_size == 1 => "autoregressive",
            Rule::Threshold => "threshold",
            Rule::JointEdit(_) => "joint_edit",
            Rule::SelfSpeculative => "self_speculative",
        }
    }

    /// The way a model decodes unless told otherwise.
    pub fn of(model: &Model) -> Point {
        let decode = model.config().decode;
        match decode.policy {
            Policy::Threshold { tau, .. } => Point::threshold(decode.block_size, tau),
            Policy::SelfSpeculative { tau } => Point::self_speculative(decode.block_size, tau),
            _ => Point::AUTOREGRESSIVE,
        }
    }

    /// The engine's policy.
    pub(crate) fn policy(self) -> Policy {
        if self.block_size == 1 {
            return Policy::Autoregressive;
        }
        let tau = self.threshold;
        match self.rule {
            Rule::JointEdit(Edits { tau: tau_edit, post_steps: max_post_steps }) => {
                Policy::JointEdit { tau, tau_edit, max_post_steps, at_least: 1 }
            }
            Rule::Threshold => Policy::Threshold { tau, comparison: Comparison::Strict, quota_steps: None },
            Rule::SelfSpeculative => Policy::SelfSpeculative { tau },
        }
    }
}

/// One measured row of `quality.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Name of the policy.
    pub policy: String,
    /// Positions decoded together.
    pub block_size: u32,
    /// Confidence threshold; absent for the baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    /// Type of the weights.
    pub dtype: String,
    /// Tasks.
    pub n: usize,
    /// Share of tasks whose tests pass.
    pub pass_rate: f64,
    /// Lower end of its 95% interval (Wilson 1927).
    pub pass_rate_low: f64,
    /// Share of programs that Python can parse.
    pub parse_rate: f64,
    /// Committed tokens per pass.
    pub tpf: f64,
    /// Rows of a pass, those of prompts left out.
    #[serde(default)]
    pub rows: f64,
}

/// What a model directory says of its quality.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    /// "unmask.quality/1"
    pub format: String,
    /// How the rows were measured.
    pub command: String,
    /// One per way to decode.
    pub rows: Vec<Row>,
    /// Prompts cut at every character, and how many were completed to running functions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_prompts: Option<Cuts>,
}

/// Outcome of [`cuts`], in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cuts {
    /// Cut prompts.
    pub n: usize,
    /// Of them completed to programs that run and define a function.
    pub running: usize,
}

/// Reads tasks in HumanEval's format, one JSON object per line.
///
/// # Errors
/// The file cannot be read, or a line is malformed (with its number).
pub fn read_tasks(path: &Path) -> anyhow::Result<Vec<Task>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parse = |(i, line)| serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), i + 1));
    text.lines().filter(|line| !line.is_empty()).enumerate().map(parse).collect()
}

/// The tokenizer of a model's folder.
///
/// # Errors
/// Files are missing or unusable.
pub fn tokenizer(dir: &Path) -> anyhow::Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let json = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Tokenizer::from_files(&json, None, None)?)
}

/// Completes prompts of text greedily; in order.
fn complete(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    prompts: &[String],
    point: Point,
    done: impl FnMut(usize),
) -> anyhow::Result<Completed> {
    let prompts: Vec<Given> =
        prompts.iter().map(|text| Given::of(text, tokenizer, model, point)).collect::<Result<_, _>>()?;
    let run = roll_out(model, &prompts, point, STREAMS, done)?;
    let rows = run.rows.saturating_sub(prompts.iter().map(|prompt| prompt.ids.len() as u64).sum());
    let answers = prompts.iter().zip(run.rollouts).map(|(p, rollout)| (p.text(&rollout.answer, tokenizer), rollout));
    Ok(Completed { answers: answers.collect(), rows })
}

struct Completed {
    /// Text and how it came about, in order of the prompts.
    answers: Vec<(String, Rollout)>,
    /// Rows of all passes, those of prompts left out.
    rows: u64,
}

/// Measures one way to decode over `tasks`.
///
/// # Errors
/// A prompt does not fit the model, or Python cannot be run.
pub fn measure(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    tasks: &[Task],
    point: Point,
    done: impl FnMut(usize),
) -> anyhow::Result<Row> {
    ensure!(!tasks.is_empty(), "there are no tasks to measure on");
    let prompts: Vec<String> = tasks.iter().map(|task| task.prompt.clone()).collect();
    let Completed { answers, rows } = complete(model, tokenizer, &prompts, point, done)?;
    let programs: Vec<Program> = tasks.iter().zip(&answers).map(|(task, (text, _))| Program::of(task, text)).collect();
    let passed = count(&run(&programs, &Limits::default())?);
    let sources = prompts.iter().zip(&answers).map(|(prompt, (text, _))| Program::parsing(&format!("{prompt}{text}")));
    let parsed = count(&run(&sources.collect::<Vec<_>>(), &Limits::default())?);
    let (tokens, passes) = answers.iter().fold((0, 0), |(t, p), (_, a)| (t + a.answer.len(), p + a.passes));
    let autoregressive = point.block_size == 1;
    Ok(Row {
        policy: point.name().into(),
        block_size: point.block_size,
        threshold: (!autoregressive).then_some(point.threshold),
        dtype: model.dtype().name().into(),
        n: tasks.len(),
        pass_rate: passed as f64 / tasks.len() as f64,
        pass_rate_low: wilson(passed, tasks.len())[0],
        parse_rate: parsed as f64 / tasks.len() as f64,
        tpf: tokens as f64 / f64::from(passes.max(1)),
        rows: rows as f64 / f64::from(passes.max(1)),
    })
}

/// A cut prompt and what the model made of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CutPrompt {
    /// What the user typed.
    pub prompt: String,
    /// What the model wrote.
    pub answer: String,
    /// Whether both together run and define a function.
    pub running: bool,
}

/// Prompts cut at every character, completed to programs that should run and define a function. A user's prompt may end
/// anywhere, also inside what the tokenizer would merge.
///
/// # Errors
/// As [`measure`].
pub fn cuts(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    tasks: &[Task],
    point: Point,
    done: impl FnMut(usize),
) -> anyhow::Result<Vec<CutPrompt>> {
    let prompts: Vec<String> = tasks
        .iter()
        .flat_map(|task| {
            let ends = task.prompt.char_indices().skip(1).map(|(at, _)| at).chain([task.prompt.len()]);
            ends.map(|end| task.prompt[..end].to_owned()).collect::<Vec<_>>()
        })
        .collect();
    let answers = complete(model, tokenizer, &prompts, point, done)?.answers;
    let programs: Vec<Program> =
        prompts.iter().zip(&answers).map(|(prompt, (text, _))| Program::defining(&format!("{prompt}{text}"))).collect();
    let outcomes = run(&programs, &Limits::default())?;
    let all = prompts.into_iter().zip(answers).zip(outcomes);
    Ok(all.map(|((prompt, (answer, _)), o)| CutPrompt { prompt, answer, running: o == Outcome::Passed }).collect())
}

fn count(outcomes: &[Outcome]) -> usize {
    outcomes.iter().filter(|outcome| **outcome == Outcome::Passed).count()
}

/// The 95% interval of a share (Wilson 1927).
pub fn wilson(passed: usize, n: usize) -> [f64; 2] {
    let (n, p) = (n as f64, passed as f64 / n as f64);
    let centre = p + Z_95 * Z_95 / (2.0 * n);
    let spread = Z_95 * (p * (1.0 - p) / n + Z_95 * Z_95 / (4.0 * n * n)).sqrt();
    [centre - spread, centre + spread].map(|end| (end / (1.0 + Z_95 * Z_95 / n)).clamp(0.0, 1.0))
}

/// The 95% interval of the difference of two shares of the same `n` tasks, from the tasks that only one solves (normal
/// approximation of McNemar's pairs).
pub fn paired_difference(only_first: usize, only_second: usize, n: usize) -> [f64; 2] {
    let (b, c, n) = (only_first as f64, only_second as f64, n as f64);
    let spread = Z_95 * ((b + c) - (b - c) * (b - c) / n).max(0.0).sqrt();
    [(b - c - spread) / n, (b - c + spread) / n]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        assert!((wilson(60, 60)[0] - 0.9398).abs() < 1e-3);
        assert!((wilson(50, 100)[0] - 0.4038).abs() < 1e-3 && (wilson(50, 100)[1] - 0.5962).abs() < 1e-3);
        assert_eq!(wilson(0, 10)[0], 0.0);
    }

    #[test]
    fn a_paired_difference_counts_tasks_that_one_side_alone_solves() {
        let [low, high] = paired_difference(12, 8, 1000);
        assert!((low + high - 0.008).abs() < 1e-12 && low < 0.0 && high > 0.008 / 2.0, "{low} {high}");
        assert_eq!(paired_difference(0, 0, 10), [0.0, 0.0]);
    }
}
