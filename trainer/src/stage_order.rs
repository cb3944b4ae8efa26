//! Constrained-order training (Seed Diffusion, section 3.2): of many sampled orders per text the one of highest ELBO is
//! kept, of all texts the best share, and the model learns from the states on those paths.
//!
//! Left open by the paper and chosen here: how many orders, which share, and that orders are compared at the same number
//! of passes (more passes always score higher).

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::digest,
    config::{MaskStage, RawMaskStage},
    noise,
    order::{Sampling, best_orders},
    progress::Progress,
    stage_mask::step_with_replay,
    stream::{Purpose, generator},
    training::{Sources, Summary, Training},
    trajectory::{Trajectory, read, states, write},
};

/// Texts whose orders are sampled together.
const TEXTS_AT_ONCE: usize = 32;

/// Settings as written. Unknown keys are errors.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawOrder {
    /// Texts to find orders for.
    pub texts: usize,
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
    let mut training = Training::start(config, sources, digest(config, own))?;
    let mut progress = Progress::new(&raw.out, raw.steps, training.state.step)?;
    let file = raw.out.join("orders.jsonl");
    let paths = if file.exists() { read(&file)? } else { find(stage, &training, sources, &file)? };
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

/// Samples orders for `texts` training documents, block sizes in turn, and writes the best share.
fn find(
    stage: &OrderStage,
    training: &Training<'_>,
    sources: Sources<'_>,
    file: &Path,
) -> anyhow::Result<Vec<Trajectory>> {
    let OrderStage { own, stage: config } = stage;
    let raw = &config.raw;
    let sampling = Sampling { orders: own.orders, temperature: own.temperature, mask: sources.vocabulary.mask };
    let mut stream = crate::stream::Stream::new(sources.train, raw.seed, raw.batch.length, 0);
    let mut kept = Vec::new();
    for (index, &block) in raw.batch.block_sizes.iter().enumerate() {
        let mut rng = generator(raw.seed, Purpose::Prompts, index as u64);
        let mut found = Vec::new();
        let wanted = own.texts.div_ceil(raw.batch.block_sizes.len());
        while found.len() < wanted {
            let texts: Vec<_> = (0..TEXTS_AT_ONCE.min(wanted - found.len()))
                .map(|_| noise::fill(stream.next_document(), block, sources.vocabulary.end))
                .collect();
            found.extend(best_orders(training.model(), &texts, block, sampling, training.spread(), &mut rng)?);
            tracing::info!("orders of {} of {wanted} texts in blocks of {block}", found.len());
        }
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        found.truncate(((wanted as f64 * own.keep).ceil() as usize).max(1));
        kept.extend(found.into_iter().map(|(path, _)| path));
    }
    write(&kept, file)?;
    Ok(kept)
}
