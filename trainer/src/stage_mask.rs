//! The curriculum: block diffusion over masked tokens with next-token loss on the clean half, then, where asked for, over
//! edited tokens too (Seed Diffusion, section 3.1).

use std::time::Instant;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::{
    checkpoint::Vocabulary,
    config::MaskStage,
    layout::Example,
    noise::{self, Filled},
    progress::{Progress, StepRecord},
    stream::Stream,
    training::{Sources, Summary, Training},
};

/// Trains to the last step of the configuration and exports the model to `out/model`. Continues from the newest
/// checkpoint in `out`, if there is one.
///
/// # Errors
/// When there is no data, a file cannot be read or written, or checkpoints of another configuration are in `out`.
pub fn train_mask(config: &MaskStage, sources: Sources<'_>) -> anyhow::Result<Summary> {
    run(config, sources, config.raw.steps)
}

/// [`train_mask`] that stops after `last` steps of the schedule (a resumed run goes on from there).
///
/// # Errors
/// As [`train_mask`].
pub fn run(config: &MaskStage, sources: Sources<'_>, last: usize) -> anyhow::Result<Summary> {
    let started = Instant::now();
    let raw = &config.raw;
    let mut training = Training::start(config, sources, &())?;
    let mut progress = Progress::new(&raw.out, raw.steps, training.state.step)?;
    if training.state.step == 0 && raw.init.checkpoint.is_some() {
        progress.eval(training.measure()?)?;
    }
    let mut eval = None;
    while training.state.step < last {
        let step = training.state.step;
        progress.step(training.step(|stream, block, rng| {
            corrupted(config, step, stream, raw.batch.tokens, block, sources.vocabulary, rng)
        })?)?;
        let step = training.state.step;
        let end = step == last;
        if end || step.is_multiple_of(raw.eval.every) {
            let record = training.measure()?;
            progress.eval(record.clone())?;
            eval = Some(record);
        }
        if end || step.is_multiple_of(raw.checkpoint.every) {
            training.save()?;
        }
    }
    let eval = match eval {
        Some(eval) => eval,
        None => training.measure()?,
    };
    training.finish(eval, started)
}

/// One step of later stages: the examples that `make` makes of so many tokens in blocks of a size, and beside them a
/// `share` of corrupted documents.
pub(crate) fn step_with_replay(
    training: &mut Training<'_>,
    config: &MaskStage,
    vocabulary: &Vocabulary,
    share: f64,
    make: impl FnOnce(usize, usize, &mut ChaCha8Rng) -> Vec<Example>,
) -> anyhow::Result<StepRecord> {
    let (step, tokens) = (training.state.step, config.raw.batch.tokens);
    let replay = (tokens as f64 * share) as usize;
    training.step(|stream, block, rng| {
        let mut examples = make(tokens - replay, block, rng);
        if replay > 0 {
            examples.extend(corrupted(config, step, stream, replay, block, vocabulary, rng));
        }
        examples
    })
}

/// Documents of step `step` with together at least `tokens` tokens: masked, or edited once the curriculum is that far;
/// as they are where there are no blocks.
fn corrupted(
    config: &MaskStage,
    step: usize,
    stream: &mut Stream<'_>,
    tokens: usize,
    block: usize,
    vocabulary: &Vocabulary,
    rng: &mut ChaCha8Rng,
) -> Vec<Example> {
    let raw = &config.raw;
    if raw.batch.block_sizes.is_empty() {
        return stream.step(tokens).into_iter().map(Example::next_tokens).collect();
    }
    match &raw.edits {
        Some(edits) if step >= edits.first(raw.steps) => {
            let (share, masks) = (rng.random_range(0.0..=edits.alpha), rng.random_bool(edits.masked));
            let filled = filled(stream, tokens, block, vocabulary);
            noise::edit::edit_all(filled, block, share, masks.then_some(vocabulary.mask), rng)
        }
        _ => noise::mask_all(filled(stream, tokens, block, vocabulary), block, vocabulary.mask, rng),
    }
}

fn filled(stream: &mut Stream<'_>, tokens: usize, block: usize, vocabulary: &Vocabulary) -> Vec<Filled> {
    stream.step(tokens).into_iter().map(|tokens| noise::fill(tokens, block, vocabulary.end)).collect()
}
