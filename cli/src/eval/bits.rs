//! How well a model predicts text that it has not seen: bits per byte of its next tokens.

use anyhow::Context;
use serde::Serialize;
use std::sync::Arc;
use unmask_engine::{Model, Reach, raw};
use unmask_text::{Specials, Tokenizer};
use unmask_trainer::data::corpus::Document;

/// Tokens predicted together: the context they have.
const WINDOW: usize = 512;

/// Of a set of documents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bits {
    /// Documents.
    pub documents: usize,
    /// Bytes of the tokens that were predicted.
    pub bytes: usize,
    /// Tokens predicted, each from at most the 511 before it; the first of a window is not.
    pub tokens: usize,
    /// Sum of -log2 p(token | those before it) over the bytes of those tokens.
    pub bits_per_byte: f64,
}

/// Bits per byte of `documents`, autoregressively.
///
/// # Errors
/// A document cannot be tokenised, or the model's rows cannot be had.
pub fn bits(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    documents: &[Document],
    mut done: impl FnMut(usize),
) -> anyhow::Result<Bits> {
    let config = model.config();
    let banned = config.family.excludes_mask().then_some(config.mask_id).flatten();
    let mut all = Bits { documents: documents.len(), bytes: 0, tokens: 0, bits_per_byte: 0.0 };
    let mut bits = 0.0;
    for (index, document) in documents.iter().enumerate() {
        let ids = tokenizer.encode(&document.text, Specials::AsText, false).context("a document of --code")?;
        for window in ids.chunks(WINDOW.min(config.context_length as usize)) {
            let rows = raw::logits(model, window, Reach::Causal, 1)?;
            for (row, &next) in rows.chunks(config.vocab_rows as usize).zip(&window[1..]) {
                bits += surprise(row, next, banned);
            }
            all.tokens += window.len() - 1;
            all.bytes += tokenizer.decode(&window[1..], false).len();
        }
        done(index + 1);
    }
    all.bits_per_byte = bits / all.bytes.max(1) as f64;
    Ok(all)
}

/// -log2 of the softmax of `row` at `id`.
fn surprise(row: &[f32], id: u32, banned: Option<u32>) -> f64 {
    let kept = || row.iter().enumerate().filter(|(i, _)| Some(*i as u32) != banned).map(|(_, &x)| f64::from(x));
    let top = kept().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = kept().map(|x| (x - top).exp()).sum();
    (sum.ln() + top - f64::from(row[id as usize])) / std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_in_bits_and_leaves_the_mask_out() {
        assert!((surprise(&[0.0; 4], 2, None) - 2.0).abs() < 1e-12);
        assert!((surprise(&[0.0, 50.0, 0.0], 2, Some(1)) - 1.0).abs() < 1e-12);
        assert!(surprise(&[0.0, 50.0], 1, None) < 1e-12);
    }
}
