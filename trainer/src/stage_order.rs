//! Constrained-order training (Seed Diffusion, section 3.2): of many sampled orders per text the one of highest ELBO is
//! kept, of all texts the best share, and the model learns from the states on those paths.
//!
//! Left open by the paper and chosen here: how many orders, which share, and that orders are compared at the same number
//! of passes (more passes always score higher).

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::Vocabulary,
    config::{MaskStage, RawMaskStage},
    examiner::Examiner,
    order::{Sampling, best_orders},
    progress::Progress,
    stage_mask::step_with_replay,
    stream::{Purpose, Stream, generator},
    training::{Sources, Summary, Training},
    trajectory::{Answer, Trajectory, read, states, write},
};

/// Share of the prompts to be answered that are cut at a random character.
const CUT_SHARE: f64 = 0.3;
/// Texts whose orders are sampled together.
const TEXTS_AT_ONCE: usize = 32;

/// Settings as written. Unknown keys are errors.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawOrder {
    /// Texts to find orders for.
    pub texts: usize,
    /// Prompts whose autoregressive answers that pass their tests are the texts; 0 takes documents.
    #[serde(default)]
    pub answers: usize,
    /// Tasks with tests, in HumanEval's format, whose prompts are answered instead of those of generated ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks: Option<PathBuf>,
    /// Orders sampled per text.
    pub orders: usize,
    /// Share of the texts kept, those of highest ELBO per token among texts of their block size.
    pub keep: f64,
    /// Of the noise that makes orders differ.
    pub temperature: f32,
    /// Largest number of edits per visible token.
    pub alpha: f64,
    /// Share of a step's tokens that are documents corrupted as in the curriculum.
    pub replay: f64,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub struct OrderStage {
    own: RawOrder,
    stage: MaskStage,
}

impl OrderStage {
    /// Checks everything.
    ///
    /// # Errors
    /// All problems, one per line, each beginning with its key.
    pub fn new(own: RawOrder, stage: RawMaskStage) -> anyhow::Result<OrderStage> {
        let counts = [("texts", own.texts), ("orders", own.orders)];
        let shares = [("keep", own.keep), ("alpha", own.alpha), ("replay", own.replay)];
        let few = counts.into_iter().filter(|(_, count)| *count == 0);
        let outside = shares.into_iter().filter(|(_, share)| !(0.0..=1.0).contains(share));
        let mut problems: Vec<String> = few
            .map(|(key, _)| format!("order.{key}: must be at least 1"))
            .chain(outside.map(|(key, share)| format!("order.{key}: must be in [0, 1], is {share}")))
            .collect();
        if !(own.temperature >= 0.0 && own.temperature.is_finite()) {
            problems.push(format!("order.temperature: must be at least 0, is {}", own.temperature));
        }
        if own.tasks.is_some() && own.answers == 0 {
            problems.push("order.tasks: is for answers, of which order.answers takes none".into());
        }
        Ok(OrderStage { own, stage: stage.validate_later(problems)? })
    }
}

/// Finds orders (once: they are kept in `out/orders.jsonl`), then trains on their states to the last step. Continues from
/// the newest checkpoint in `out`, if there is one.
///
/// # Errors
/// As [`train_mask`](crate::train_mask).
pub fn train_order(stage: &OrderStage, sources: Sources<'_>) -> anyhow::Result<Summary> {
    let started = Instant::now();
    let OrderStage { own, stage: config } = stage;
    let raw = &config.raw;
    let mut training = Training::start(config, sources, own)?;
    let mut progress = Progress::new(&raw.out, raw.steps, training.state.step)?;
    let file = raw.out.join("orders.jsonl");
    let paths = if file.exists() { read(&file)? } else { find(stage, &training, sources, &mut progress, &file)? };
    while training.state.step < raw.steps {
        let mask = sources.vocabulary.mask;
        progress.step(step_with_replay(
            &mut training,
            config,
            sources.vocabulary,
            own.replay,
            |tokens, block, rng| states(&paths, tokens, block, own.alpha, mask, rng),
        )?)?;
        let step = training.state.step;
        if step.is_multiple_of(raw.checkpoint.every) || step == raw.steps {
            training.save()?;
        }
    }
    let eval = training.measure()?;
    progress.eval(eval.clone())?;
    training.finish(eval, started)
}

/// Samples orders for `texts` training documents, or answers of the model itself, block sizes in turn, and writes the
/// best share.
fn find(
    stage: &OrderStage,
    training: &Training<'_>,
    sources: Sources<'_>,
    progress: &mut Progress,
    file: &Path,
) -> anyhow::Result<Vec<Trajectory>> {
    let OrderStage { own, stage: config } = stage;
    let raw = &config.raw;
    let Vocabulary { mask, end, .. } = *sources.vocabulary;
    let sampling = Sampling { orders: own.orders, temperature: own.temperature, mask, end };
    progress.preparing("collecting texts to find orders for".into());
    let mut texts = texts(stage, training, sources)?;
    let mut kept = Vec::new();
    for (index, &block) in raw.batch.block_sizes.iter().enumerate() {
        let mut rng = generator(raw.seed, Purpose::Prompts, index as u64);
        let mut found = Vec::new();
        let wanted = own.texts.div_ceil(raw.batch.block_sizes.len());
        while found.len() < wanted {
            let some: Vec<_> = texts.by_ref().take(TEXTS_AT_ONCE.min(wanted - found.len())).collect();
            found.extend(best_orders(training.model(), &some, block, sampling, training.spread(), &mut rng)?);
            progress.preparing(format!("orders of {} of {wanted} texts in blocks of {block}", found.len()));
        }
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        found.truncate(((wanted as f64 * own.keep).ceil() as usize).max(1));
        kept.extend(found.into_iter().map(|(path, _)| path));
    }
    write(&kept, file)?;
    Ok(kept)
}

/// Texts without end: documents, or the answers again and again.
fn texts<'a>(
    stage: &OrderStage,
    training: &Training<'_>,
    sources: Sources<'a>,
) -> anyhow::Result<Box<dyn Iterator<Item = Answer> + 'a>> {
    let OrderStage { own, stage: config } = stage;
    let raw = &config.raw;
    if own.answers > 0 {
        let file = raw.out.join("answers.jsonl");
        let answers =
            Examiner::open(config, sources, CUT_SHARE, own.tasks.as_deref())?.answers(training, own.answers, &file)?;
        return Ok(Box::new(answers.into_iter().cycle()));
    }
    let mut stream = Stream::new(sources.train, raw.seed, raw.batch.length, 0);
    Ok(Box::new(std::iter::repeat_with(move || Answer { tokens: stream.next_document(), prompt: 0 })))
}
