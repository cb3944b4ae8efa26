//! The mask corruption: how much of each block is masked, and which tokens. [`edit`] has the other corruption.

pub mod edit;

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::layout::Example;

/// A document ready to be corrupted: its tokens filled with end-of-sequence to the end of the last block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Tokens, a multiple of the block.
    pub tokens: Vec<u32>,
    /// Tokens before the filling (the document's own end-of-sequence included).
    pub length: usize,
}

/// Fills up a document.
pub fn fill(mut tokens: Vec<u32>, block: usize, end: u32) -> Filled {
    let length = tokens.len();
    tokens.resize(length.next_multiple_of(block), end);
    Filled { tokens, length }
}

/// Masked shares for `count` blocks: a shifted regular grid over (0, 1), shuffled (low discrepancy, as in BD3-LM), never
/// below `1 / block` (the floor of Stable-DiffCoder).
pub fn levels(count: usize, block: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let shift: f32 = rng.random();
    let mut levels: Vec<f32> = (0..count).map(|i| (i as f32 + shift) / count as f32).collect();
    levels.shuffle(rng);
    for level in &mut levels {
        *level = level.clamp((block as f32).recip(), 1.0);
    }
    levels
}

/// Masks each token of each block with the block's probability from `levels`, and at least one token per block. The
/// masked rows are scored.
pub fn mask(filled: Filled, block: usize, levels: &[f32], mask: u32, rng: &mut ChaCha8Rng) -> Example {
    let Filled { tokens, length } = filled;
    let mut scored = vec![false; tokens.len()];
    for (scored, &level) in scored.chunks_exact_mut(block).zip(levels) {
        for scored in scored.iter_mut() {
            *scored = rng.random::<f32>() < level;
        }
        if !scored.contains(&true) {
            scored[rng.random_range(0..block)] = true;
        }
    }
    let noisy = tokens.iter().zip(&scored).map(|(&token, &scored)| if scored { mask } else { token }).collect();
    Example { clean: tokens, noisy, scored, block, length }
}

/// Corrupts a whole step: the levels are spread over all of its blocks.
pub fn mask_all(filled: Vec<Filled>, block: usize, mask_id: u32, rng: &mut ChaCha8Rng) -> Vec<Example> {
    let blocks = filled.iter().map(|f| f.tokens.len() / block).sum();
    let levels = levels(blocks, block, rng);
    let mut rest = levels.as_slice();
    let mut examples = Vec::with_capacity(filled.len());
    for document in filled {
        let (own, others) = rest.split_at(document.tokens.len() / block);
        rest = others;
        examples.push(mask(document, block, own, mask_id, rng));
    }
    examples
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;

    use super::*;

    proptest! {
        #[test]
        fn every_block_has_a_mask_and_the_share_is_right(blocks in 1usize..60, power in 0u32..5, seed: u64) {
            let block = 2usize.pow(power + 1);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let tokens: Vec<u32> = (0..blocks * block - 1).map(|i| 10 + i as u32).collect();
            let filled = fill(tokens, block, 0);
            prop_assert_eq!(filled.length + 1, filled.tokens.len());
            let examples = mask_all(vec![filled.clone(), filled], block, 1, &mut rng);
            for example in &examples {
                for b in 0..blocks {
                    prop_assert!(example.scored[b * block..(b + 1) * block].contains(&true));
                }
                for p in 0..example.clean.len() {
                    prop_assert_eq!(example.noisy[p], if example.scored[p] { 1 } else { example.clean[p] });
                }
            }
        }

        #[test]
        fn levels_cover_the_range_evenly(count in 1usize..300, seed: u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut drawn = levels(count, 1_000_000, &mut rng);
            drawn.sort_by(f32::total_cmp);
            for (i, level) in drawn.iter().enumerate() {
                prop_assert!((level * count as f32 - i as f32).abs() <= 1.01);
            }
        }
    }
}
