//! How a model judges tokens that are already visible: what it repairs, what it spoils, and whether its confidence can
//! be believed.

use candle_core::{D, Tensor};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::{
    layout::{Batch, Example},
    model::Model,
    noise::{Filled, edit::edit_all, mask_all},
};

/// Documents per forward pass.
const DOCUMENTS_AT_ONCE: usize = 16;
/// Bins of confidence in the calibration error.
const BINS: usize = 10;

/// Counts over corrupted documents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Repair {
    /// Positions per block.
    pub block_size: usize,
    /// A visible token changes when another is likelier than this.
    pub tau_edit: f32,
    /// Visible tokens that are wrong.
    pub wrong: usize,
    /// Share of them that become right.
    pub repair_rate: f64,
    /// Visible tokens that are right.
    pub right: usize,
    /// Share of them that change.
    pub false_edit_rate: f64,
    /// Expected calibration error over all positions (Guo et al. 2017, ten bins of confidence).
    pub calibration_error: f64,
    /// The same over masked positions of the documents, masked as in training instead of edited.
    pub masked_calibration_error: f64,
}

/// Judgement of one position.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Judged {
    visible: u32,
    target: u32,
    token: u32,
    confidence: f32,
}

/// Corrupts `documents` with `share` edits per token and lets the model judge every position in one pass; then, for the
/// calibration alone, with masks.
///
/// # Errors
/// When a token or position is out of the model's range.
pub fn repair(
    model: &Model,
    documents: Vec<Filled>,
    block: usize,
    share: f64,
    tau_edit: f32,
    rng: &mut ChaCha8Rng,
) -> anyhow::Result<Repair> {
    let edited = edit_all(documents.clone(), block, share, None, rng);
    let masked = mask_all(documents, block, model.mask(), rng);
    let (edited, masked) = (judge(model, &edited)?, judge(model, &masked)?);
    Ok(Repair { masked_calibration_error: calibration_error(&masked), ..summary(&edited, block, tau_edit) })
}

/// The judgement of what is scored.
fn judge(model: &Model, examples: &[Example]) -> anyhow::Result<Vec<Judged>> {
    let mut judged = Vec::new();
    for part in examples.chunks(DOCUMENTS_AT_ONCE) {
        let batch = Batch::new(part, (1.0, 0.0));
        let (tokens, confidences) = predictions(model, &batch)?;
        let rows = part.iter().flat_map(|Example { noisy, clean, scored, .. }| noisy.iter().zip(clean).zip(scored));
        let scored = rows.filter(|(_, scored)| **scored).map(|(row, _)| row);
        let all = scored.zip(tokens.into_iter().zip(confidences));
        judged.extend(all.map(|((&visible, &target), (token, confidence))| Judged {
            visible,
            target,
            token,
            confidence,
        }));
    }
    Ok(judged)
}

fn summary(judged: &[Judged], block_size: usize, tau_edit: f32) -> Repair {
    let after = |j: &Judged| if j.token != j.visible && j.confidence > tau_edit { j.token } else { j.visible };
    let (wrong, right): (Vec<&Judged>, Vec<&Judged>) = judged.iter().partition(|j| j.visible != j.target);
    let repaired = wrong.iter().filter(|j| after(j) == j.target).count();
    let spoilt = right.iter().filter(|j| after(j) != j.target).count();
    let rate = |part: usize, all: usize| part as f64 / all.max(1) as f64;
    Repair {
        block_size,
        tau_edit,
        wrong: wrong.len(),
        repair_rate: rate(repaired, wrong.len()),
        right: right.len(),
        false_edit_rate: rate(spoilt, right.len()),
        calibration_error: calibration_error(judged),
        masked_calibration_error: 0.0,
    }
}

/// How far confidence is from the share of right tokens, over bins of confidence.
fn calibration_error(judged: &[Judged]) -> f64 {
    let mut bins = [(0.0f64, 0usize); BINS];
    for j in judged {
        let bin = &mut bins[((j.confidence * BINS as f32) as usize).min(BINS - 1)];
        *bin = (bin.0 + f64::from(j.confidence), bin.1 + usize::from(j.token == j.target));
    }
    let error: f64 = bins.iter().map(|&(confidence, hits)| (confidence - hits as f64).abs()).sum();
    error / judged.len().max(1) as f64
}

/// The likeliest token of every scored noisy row, the mask never, and its probability.
fn predictions(model: &Model, batch: &Batch) -> anyhow::Result<(Vec<u32>, Vec<f32>)> {
    let hidden = model.hidden(batch, false)?;
    let rows = Tensor::new(batch.targets.rows.as_slice(), hidden.device())?;
    let probabilities = log_softmax(&model.logits(&hidden.index_select(&rows, 0)?)?)?.exp()?;
    let tokens = probabilities.argmax(D::Minus1)?.to_vec1()?;
    Ok((tokens, probabilities.max(D::Minus1)?.to_vec1()?))
}

fn log_softmax(logits: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let total = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    shifted.broadcast_sub(&total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_count_what_changes() {
        let judged = |visible, target, token, confidence| Judged { visible, target, token, confidence };
        let all = [
            judged(5, 6, 6, 0.95), // repaired
            judged(5, 6, 6, 0.5),  // not confident enough
            judged(7, 7, 8, 0.95), // spoilt
            judged(7, 7, 7, 0.95),
        ];
        let found = summary(&all, 4, 0.9);
        assert_eq!((found.wrong, found.right), (2, 2));
        assert_eq!((found.repair_rate, found.false_edit_rate), (0.5, 0.5));
        // Bin 0.9: three of mean 0.95, two right; bin 0.5: one of 0.5, right.
        assert!((found.calibration_error - ((2.85f64 - 2.0) + 0.5) / 4.0).abs() < 1e-6, "{found:?}");
    }
}
