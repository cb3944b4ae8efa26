//! What a run reports: one JSON line per logged step in `log.jsonl`, and a progress bar on a terminal or a log line
//! elsewhere.

use std::{
    fs::File,
    io::{IsTerminal, Write},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

/// Time between log lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// One training step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done.
    pub step: usize,
    /// Mean cross-entropy of masked tokens, nats.
    pub mask_loss: f64,
    /// Mean cross-entropy of next tokens on the clean half, nats.
    pub next_loss: f64,
    /// Block size of the step.
    pub block_size: usize,
    /// Learning rate.
    pub rate: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f32,
    /// Text tokens seen since the start.
    pub tokens: u64,
    /// Text tokens per second in this step.
    pub tokens_per_second: f64,
    /// 6 x parameters x rows per second (head: scored rows only), without attention.
    pub gflops: f64,
}

/// Held-out loss, nats per token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps done.
    pub step: usize,
    /// Per block size.
    pub mask_loss: Vec<BlockLoss>,
    /// Next-token loss on clean text.
    pub next_loss: f64,
}

/// Held-out loss of one block size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockLoss {
    /// Block size.
    pub block_size: usize,
    /// Mean loss of masked tokens when a share of (i + 1/2) / 10 of each block is masked.
    pub by_noise: Vec<f64>,
    /// Mean of `by_noise`: a bound of the text's cross-entropy per token.
    pub mean: f64,
}

/// One round of on-policy training, measured before its steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundRecord {
    /// Steps done before the round.
    pub step: usize,
    /// Share of the guard's tasks that pass, decoded as the model's defaults say.
    pub pass_rate: f64,
    /// Committed tokens per pass on them.
    pub tpf: f64,
    /// Prompts of the round.
    pub prompts: usize,
    /// Prompts with a rollout that passes.
    pub kept: usize,
    /// Tokens per pass of the rollouts that are learnt from.
    pub kept_tpf: f64,
    /// Per threshold, cautious first: share of rollouts that pass.
    pub passing: Vec<f64>,
}

/// A line of `log.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A step.
    Step(StepRecord),
    /// A measurement.
    Eval(EvalRecord),
    /// A round of on-policy training.
    Round(RoundRecord),
}

/// The log file and the bar.
pub struct Progress {
    log: File,
    bar: Option<ProgressBar>,
    steps: usize,
    line: Option<Instant>,
}

impl Progress {
    /// Goes on with `out/log.jsonl` of a run that has done `done` steps. Lines of steps after them, which are taken again,
    /// go, and one that was cut off.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn new(out: &Path, steps: usize, done: usize) -> anyhow::Result<Progress> {
        std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
        let path = out.join("log.jsonl");
        keep_done(&path, done).with_context(|| path.display().to_string())?;
        let log = File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())?;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps as u64).with_position(done as u64);
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed}<{eta} {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Ok(Progress { log, bar, steps, line: None })
    }

    /// Reports a step.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn step(&mut self, record: StepRecord) -> anyhow::Result<()> {
        let message = format!(
            "mask {:.3} next {:.3} rate {:.1e} {:.0} tokens/s {:.0} GFLOP/s",
            record.mask_loss, record.next_loss, record.rate, record.tokens_per_second, record.gflops
        );
        let step = record.step;
        self.write(&Record::Step(record))?;
        if let Some(bar) = &self.bar {
            bar.set_position(step as u64);
            bar.set_message(message);
        } else if step == self.steps || self.line.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            self.line = Some(Instant::now());
            tracing::info!("step {step}/{}: {message}", self.steps);
        }
        Ok(())
    }

    /// Says what goes on before the first step.
    pub fn preparing(&mut self, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message);
        } else if self.line.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            self.line = Some(Instant::now());
            tracing::info!("{message}");
        }
    }

    /// Reports a measurement.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn eval(&mut self, record: EvalRecord) -> anyhow::Result<()> {
        let blocks: Vec<String> = record.mask_loss.iter().map(|b| format!("{}: {:.3}", b.block_size, b.mean)).collect();
        let message =
            format!("held out after step {}: mask {{{}}} next {:.3}", record.step, blocks.join(", "), record.next_loss);
        match &self.bar {
            Some(bar) => bar.suspend(|| tracing::info!("{message}")),
            None => tracing::info!("{message}"),
        }
        self.write(&Record::Eval(record))
    }

    /// Reports a round.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn round(&mut self, record: RoundRecord) -> anyhow::Result<()> {
        let message = format!(
            "after step {}: {:.1}% pass at {:.2} tokens per pass; {} of {} prompts kept at {:.2}",
            record.step,
            100.0 * record.pass_rate,
            record.tpf,
            record.kept,
            record.prompts,
            record.kept_tpf
        );
        match &self.bar {
            Some(bar) => bar.suspend(|| tracing::info!("{message}")),
            None => tracing::info!("{message}"),
        }
        self.write(&Record::Round(record))
    }

    fn write(&mut self, record: &Record) -> anyhow::Result<()> {
        // In one piece: who is killed leaves whole lines.
        self.log.write_all((serde_json::to_string(record)? + "\n").as_bytes()).context("log.jsonl")
    }
}

impl Record {
    /// Whether a run that goes on after `done` steps does not come to this again.
    fn is_of(&self, done: usize) -> bool {
        match self {
            Record::Step(StepRecord { step, .. }) | Record::Eval(EvalRecord { step, .. }) => *step <= done,
            // Measured before the steps of its round.
            Record::Round(RoundRecord { step, .. }) => *step < done,
        }
    }
}

/// Leaves the lines of the first `done` steps in a log.
fn keep_done(path: &Path, done: usize) -> anyhow::Result<()> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        text => text?,
    };
    let kept = text.lines().filter(|line| serde_json::from_str::<Record>(line).is_ok_and(|record| record.is_of(done)));
    let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
    if kept != text {
        let whole = path.with_extension("jsonl.part");
        std::fs::write(&whole, kept)?;
        std::fs::rename(&whole, path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn step(step: usize) -> StepRecord {
        StepRecord {
            step,
            mask_loss: 1.0,
            next_loss: 1.0,
            block_size: 4,
            rate: 0.1,
            gradient_norm: 1.0,
            tokens: 1,
            tokens_per_second: 1.0,
            gflops: 1.0,
        }
    }

    fn round(step: usize) -> RoundRecord {
        RoundRecord { step, pass_rate: 1.0, tpf: 1.0, prompts: 1, kept: 1, kept_tpf: 1.0, passing: vec![1.0] }
    }

    #[test]
    fn a_log_goes_on_where_its_run_does() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log.jsonl");
        let mut log = Progress::new(dir.path(), 9, 0).unwrap();
        log.round(round(0)).unwrap();
        for i in 1..=3 {
            log.step(step(i)).unwrap();
        }
        log.eval(EvalRecord { step: 2, mask_loss: Vec::new(), next_loss: 1.0 }).unwrap();
        log.round(round(2)).unwrap();
        drop(log);
        let whole = std::fs::read_to_string(&file).unwrap();
        // Killed in the middle of a line, after the checkpoint of step 2.
        std::fs::write(&file, format!("{whole}{{\"kind\":\"st")).unwrap();
        let mut log = Progress::new(dir.path(), 9, 2).unwrap();
        log.step(step(3)).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let records: Vec<Record> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let eval = Record::Eval(EvalRecord { step: 2, mask_loss: Vec::new(), next_loss: 1.0 });
        let [one, two, three] = [1, 2, 3].map(|i| Record::Step(step(i)));
        assert_eq!(records, [Record::Round(round(0)), one, two, eval, three]);
    }
}
