//! On-policy training (Seed Diffusion, section 3.3): the model learns from its own shortest denoising paths that lead to
//! programs which pass their tests.
//!
//! Where the paper minimises the length of paths by a score-function gradient, this is expert iteration. First the model
//! learns, under random masks, the answers that it gives autoregressively and that pass: of the many ways to write a program
//! one is left, which is what tokens that fall together must agree on. Then each round decodes prompts at several
//! thresholds, keeps per prompt the passing path of fewest passes, and trains on its states. A share of corrupted
//! documents goes beside both.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use unmask_engine::Model;

use crate::{
    config::{MaskStage, RawMaskStage},
    examiner::{Decoded, Examiner},
    layout::Example,
    measure::{self, Point},
    progress::{Progress, RoundRecord},
    rollout::Prompt,
    stage_mask::step_with_replay,
    stream::{Purpose, generator},
    tasks::Task,
    training::{Sources, Summary, Training},
    trajectory::{Trajectory, states},
};

/// Settings as written. Unknown keys are errors.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawOnPolicy {
    /// Tasks with tests, in HumanEval's format, instead of generated ones. A fifth of the prompts is only for the guard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks: Option<PathBuf>,
    /// Prompts answered autoregressively before the first round.
    pub answers: usize,
    /// Steps that learn from these answers.
    pub answer_steps: usize,
    /// Share of their examples that masks alone must foretell, as drafts of `self_speculative` do; the others are states
    /// of a random order.
    #[serde(default)]
    pub draft_share: f64,
    /// Steps between rollouts.
    pub round_steps: usize,
    /// Prompts per round.
    pub prompts: usize,
    /// Share of prompts cut at a random character; they are decoded at the first threshold only, and their answers must
    /// run and define a function.
    pub cut_share: f64,
    /// Confidence thresholds of the rollouts, the most cautious first.
    pub thresholds: Vec<f32>,
    /// Share of a step's tokens that are documents corrupted as in the curriculum.
    pub replay: f64,
    /// Tasks whose pass rate is watched.
    pub guard_tasks: usize,
    /// Training stops when their pass rate falls by more than this (percentage points); below zero it has to rise.
    pub guard_points: f64,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub struct OnPolicyStage {
    own: RawOnPolicy,
    stage: MaskStage,
}

impl OnPolicyStage {
    /// Checks everything.
    ///
    /// # Errors
    /// All problems, one per line, each beginning with its key.
    pub fn new(own: RawOnPolicy, stage: RawMaskStage) -> anyhow::Result<OnPolicyStage> {
        let share = |key: &str, value: f64| {
            (!(0.0..=1.0).contains(&value)).then(|| format!("on_policy.{key}: must be in [0, 1], is {value}"))
        };
        let counts = [("round_steps", own.round_steps), ("prompts", own.prompts), ("guard_tasks", own.guard_tasks)];
        let mut problems: Vec<String> = counts
            .into_iter()
            .filter(|(_, count)| *count == 0)
            .map(|(key, _)| format!("on_policy.{key}: must be at least 1"))
            .chain(
                [("cut_share", own.cut_share), ("replay", own.replay), ("draft_share", own.draft_share)]
                    .into_iter()
                    .filter_map(|(key, value)| share(key, value)),
            )
            .collect();
        if own.thresholds.is_empty() || own.thresholds.iter().any(|tau| !(*tau > 0.0 && *tau <= 1.0)) {
            problems.push(format!("on_policy.thresholds: at least one, each in (0, 1], not {:?}", own.thresholds));
        }
        if !own.guard_points.is_finite() {
            problems.push(format!("on_policy.guard_points: must be a number, is {}", own.guard_points));
        }
        if own.answer_steps > 0 && own.answers == 0 {
            problems.push("on_policy.answers: must be at least 1 where answer_steps is".into());
        }
        Ok(OnPolicyStage { own, stage: stage.validate_later(problems)? })
    }
}

/// Runs the stage to its last step, or until the guard stops it; the exported model is the last one that the guard
/// let pass, at first the one it starts from. Continues from the newest checkpoint in `out`, if there is one.
///
/// # Errors
/// As [`train_mask`](crate::train_mask), and when the engine cannot load the model or Python cannot be run.
pub fn train_on_policy(stage: &OnPolicyStage, sources: Sources<'_>) -> anyhow::Result<Summary> {
    let started = Instant::now();
    let OnPolicyStage { own, stage: config } = stage;
    let raw = &config.raw;
    let mut training = Training::start(config, sources, own)?;
    let mut progress = Progress::new(&raw.out, raw.steps, training.state.step)?;
    let rounds = Rounds::open(own, config, sources)?;
    let least = rounds.initial_pass_rate()? - own.guard_points / 100.0;
    if training.state.step == 0 {
        training.export(&raw.out.join("model"))?;
    }
    rounds.learn_answers(&mut training, &mut progress)?;
    while training.state.step < raw.steps {
        let step = training.state.step;
        let (record, paths) = rounds.roll(&training, step)?;
        let fell = record.pass_rate < least;
        progress.round(record)?;
        if fell {
            tracing::warn!("the pass rate is below {:.1}%: the model before this round is kept", 100.0 * least);
            let eval = training.measure()?;
            return Ok(training.summary(eval, started));
        }
        training.export(&raw.out.join("model"))?;
        ensure!(!paths.is_empty(), "no rollout passes: start from a model that solves some of its tasks");
        for _ in 0..own.round_steps.min(raw.steps - step) {
            let mask = sources.vocabulary.mask;
            rounds.learn(&mut training, &mut progress, |tokens, block, rng| {
                states(&paths, tokens, block, 0.0, mask, rng)
            })?;
        }
        training.save()?;
    }
    let (record, _) = rounds.roll(&training, raw.steps)?;
    let fell = record.pass_rate < least;
    progress.round(record)?;
    let eval = training.measure()?;
    progress.eval(eval.clone())?;
    if fell { Ok(training.summary(eval, started)) } else { training.finish(eval, started) }
}

/// What every round needs.
struct Rounds<'a> {
    own: &'a RawOnPolicy,
    config: &'a MaskStage,
    sources: Sources<'a>,
    examiner: Examiner<'a>,
    guard: Vec<Task>,
}

impl<'a> Rounds<'a> {
    fn open(own: &'a RawOnPolicy, config: &'a MaskStage, sources: Sources<'a>) -> anyhow::Result<Rounds<'a>> {
        let examiner = Examiner::open(config, sources, own.cut_share, own.tasks.as_deref())?;
        let guard = examiner.watched(own.guard_tasks)?;
        Ok(Rounds { own, config, sources, examiner, guard })
    }

    /// One step of the examples that `make` makes of so many tokens, and of the replay share.
    fn learn(
        &self,
        training: &mut Training<'a>,
        progress: &mut Progress,
        make: impl FnOnce(usize, usize, &mut ChaCha8Rng) -> Vec<Example>,
    ) -> anyhow::Result<()> {
        let Rounds { own, config, sources, .. } = self;
        progress.step(step_with_replay(training, config, sources.vocabulary, own.replay, make)?)
    }

    /// Answers prompts autoregressively (once: they are kept in `out/answers.jsonl`) and learns from those that pass.
    fn learn_answers(&self, training: &mut Training<'a>, progress: &mut Progress) -> anyhow::Result<()> {
        let Rounds { own, config, sources, .. } = self;
        let steps = own.answer_steps.min(config.raw.steps);
        if training.state.step >= steps {
            return Ok(());
        }
        let file = config.raw.out.join("answers.jsonl");
        let answers = self.examiner.answers(training, own.answers, &file)?;
        let vocabulary = sources.vocabulary;
        while training.state.step < steps {
            self.learn(training, progress, |tokens, block, rng| {
                let (mut examples, mut seen) = (Vec::new(), 0);
                while seen < tokens {
                    let answer = &answers[rng.random_range(0..answers.len())];
                    seen += answer.tokens.len();
                    let path = match rng.random_bool(own.draft_share) {
                        true => answer.drafted(block, vocabulary.end, rng),
                        false => answer.in_random_order(block, vocabulary.end, rng),
                    };
                    examples.push(path.example(vocabulary.mask, rng));
                }
                examples
            })?;
            if training.state.step.is_multiple_of(config.raw.checkpoint.every) || training.state.step == steps {
                training.save()?;
            }
        }
        Ok(())
    }

    /// Share of the guard's tasks that pass before this stage, decoded as this stage's defaults say.
    fn initial_pass_rate(&self) -> anyhow::Result<f64> {
        let start = self.config.raw.init.checkpoint.as_ref().context("stage.init.checkpoint: is missing")?;
        let decode = &self.config.raw.decode;
        let (block, tau) = (decode.block_size as u32, decode.tau as f32);
        let point =
            if decode.self_speculative { Point::self_speculative(block, tau) } else { Point::threshold(block, tau) };
        Ok(measure::measure(&self.examiner.load(start)?, &self.examiner.tokenizer, &self.guard, point, |_| {})?
            .pass_rate)
    }

    /// Measures the guard, decodes the prompts of the round that begins after `step`, and keeps the shortest paths.
    fn roll(&self, training: &Training<'_>, step: usize) -> anyhow::Result<(RoundRecord, Vec<Trajectory>)> {
        let model = self.examiner.served(training)?;
        let row = measure::measure(&model, &self.examiner.tokenizer, &self.guard, Point::of(&model), |_| {})?;
        let mut rng = generator(self.config.raw.seed, Purpose::Prompts, step as u64);
        let first = (step / self.own.round_steps * self.own.prompts) as u64;
        let prompts = self.examiner.prompts(first, self.own.prompts, &mut rng)?;
        let sizes = &self.config.raw.batch.block_sizes;
        let mut best: Vec<Option<(f64, u32, Trajectory)>> = vec![None; prompts.len()];
        let mut tally = vec![(0u32, 0u32); self.own.thresholds.len()];
        for (offset, &block) in sizes.iter().enumerate() {
            let mine: Vec<usize> = (offset..prompts.len()).step_by(sizes.len()).collect();
            for (rank, &threshold) in self.own.thresholds.iter().enumerate() {
                let point = Point::threshold(block as u32, threshold);
                let taken: Vec<usize> =
                    mine.iter().copied().filter(|&i| rank == 0 || prompts[i].task.is_some()).collect();
                self.keep_best(&model, &prompts, &taken, point, &mut best, &mut tally[rank])?;
            }
        }
        let kept: Vec<(f64, u32, Trajectory)> = best.into_iter().flatten().collect();
        let (tokens, passes) = kept.iter().fold((0.0, 0), |(t, p), (tokens, passes, _)| (t + tokens, p + passes));
        let record = RoundRecord {
            step,
            pass_rate: row.pass_rate,
            tpf: row.tpf,
            prompts: prompts.len(),
            kept: kept.len(),
            kept_tpf: tokens / f64::from(passes.max(1)),
            passing: tally.iter().map(|&(passed, all)| f64::from(passed) / f64::from(all.max(1))).collect(),
        };
        Ok((record, kept.into_iter().map(|(_, _, path)| path).collect()))
    }

    /// Decodes the prompts `taken` at `point`, and puts the paths that pass in fewer passes than what is there in `best`.
    fn keep_best(
        &self,
        model: &Arc<Model>,
        prompts: &[Prompt],
        taken: &[usize],
        point: Point,
        best: &mut [Option<(f64, u32, Trajectory)>],
        tally: &mut (u32, u32),
    ) -> anyhow::Result<()> {
        let decoded = self.examiner.decode(model, prompts, taken, point)?;
        tally.0 += decoded.iter().filter(|decoded| decoded.passed).count() as u32;
        tally.1 += taken.len() as u32;
        let end = self.sources.vocabulary.end;
        for Decoded { index, prompt, rollout, passed } in decoded {
            let shorter = best[index].as_ref().is_none_or(|(_, passes, _)| rollout.passes < *passes);
            if !passed || !shorter {
                continue;
            }
            if let Some(path) = rollout.trajectory(&prompt, point.block_size as usize, end) {
                best[index] = Some((rollout.answer.len() as f64, rollout.passes, path));
            }
        }
        Ok(())
    }
}
