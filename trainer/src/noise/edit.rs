//! The edit corruption (Seed Diffusion, section 3.1): visible tokens that are wrong.
//!
//! The paper leaves open how edits that change the length line up with targets; here each insert is paired with a delete
//! in its block, so that only the tokens between them shift and the target of a position stays its own token.

use rand::{Rng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Filled;
use crate::layout::Example;

/// Draws before an edit that changes nothing is given up.
const DRAWS_MAX: usize = 8;

/// How edits are drawn, as written. Unknown keys are errors.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawEdits {
    /// Share of the stage's steps that have edits, its last ones.
    #[serde(default = "default_share")]
    pub share: f64,
    /// Largest number of edits per token; each step draws between 0 and this.
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// Share of the steps with edits that have masks too.
    #[serde(default = "default_masked")]
    pub masked: f64,
    /// Largest learning rate of these steps, whose schedule begins anew; absent: the optimizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Their steps of linear warm-up; absent: the optimizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_up: Option<usize>,
}

impl RawEdits {
    /// Steps without edits before them, of `steps`.
    pub fn first(&self, steps: usize) -> usize {
        steps - (self.share * steps as f64).round() as usize
    }
}

fn default_share() -> f64 {
    0.2
}

fn default_alpha() -> f64 {
    0.1
}

fn default_masked() -> f64 {
    0.5
}

/// `tokens` after `edits` edits (substitutions count one, an insert with its delete two) spread over its blocks. New
/// tokens are taken half from the same text, half from `pool`, never `mask`.
pub fn edited(tokens: &[u32], block: usize, edits: usize, pool: &[u32], rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut changed = tokens.to_vec();
    let mut left = edits;
    while left > 0 {
        let start = rng.random_range(0..tokens.len() / block) * block;
        let own = &mut changed[start..start + block];
        if left >= 2 && block >= 2 && rng.random() {
            let (from, to) = (rng.random_range(0..block), rng.random_range(0..block));
            if from < to {
                own[from..=to].rotate_left(1);
            } else {
                own[to..=from].rotate_right(1);
            }
            own[to] = fresh(own[to], tokens, pool, rng);
            left -= 2;
        } else {
            let at = rng.random_range(0..block);
            own[at] = fresh(own[at], tokens, pool, rng);
            left -= 1;
        }
    }
    changed
}

/// Another token than `old`, where the texts have one.
fn fresh(old: u32, text: &[u32], pool: &[u32], rng: &mut ChaCha8Rng) -> u32 {
    for _ in 0..DRAWS_MAX {
        let from = if rng.random() || pool.is_empty() { text } else { pool };
        match from.choose(rng) {
            Some(&token) if token != old => return token,
            _ => {}
        }
    }
    old
}

/// A step's documents with edits, `floor(share * length)` each, and every position scored: what is visible may be wrong.
/// With `masks` also masked, by the mask corruption's levels.
pub fn edit_all(
    filled: Vec<Filled>,
    block: usize,
    share: f64,
    masks: Option<u32>,
    rng: &mut ChaCha8Rng,
) -> Vec<Example> {
    let pool: Vec<u32> = filled.iter().flat_map(|document| &document.tokens[..document.length]).copied().collect();
    let noisy: Vec<Vec<u32>> =
        filled.iter().map(|f| edited(&f.tokens, block, (share * f.length as f64) as usize, &pool, rng)).collect();
    let mut examples = super::mask_all(filled, block, masks.unwrap_or_default(), rng);
    for (example, edited) in examples.iter_mut().zip(noisy) {
        for ((token, scored), edited) in example.noisy.iter_mut().zip(&mut example.scored).zip(edited) {
            if masks.is_none() || !*scored {
                *token = edited;
            }
            *scored = true;
        }
    }
    examples
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;

    use super::*;

    proptest! {
        /// Edits stay in their block, keep its length, and are at most as many as asked for (Levenshtein).
        #[test]
        fn edits_are_bounded(blocks in 1usize..6, power in 1u32..4, edits in 0usize..6, seed: u64) {
            let block = 2usize.pow(power);
            let tokens: Vec<u32> = (0..blocks * block).map(|i| 10 + i as u32).collect();
            let changed = edited(&tokens, block, edits, &[7, 8, 9], &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert_eq!(changed.len(), tokens.len());
            let distance: usize =
                tokens.chunks(block).zip(changed.chunks(block)).map(|(a, b)| levenshtein(a, b)).sum();
            prop_assert!(distance <= edits, "{} edits, distance {}", edits, distance);
        }

        #[test]
        fn every_position_is_scored_and_masks_are_extra(seed: u64, with_masks: bool) {
            let tokens: Vec<u32> = (10..42).collect();
            let filled = vec![super::super::fill(tokens.clone(), 8, 0); 20];
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut wrong = 0;
            for example in edit_all(filled, 8, 0.1, with_masks.then_some(1), &mut rng) {
                prop_assert!(example.scored.iter().all(|scored| *scored));
                prop_assert_eq!(example.clean, tokens.clone());
                prop_assert_eq!(example.noisy.contains(&1), with_masks);
                wrong += example.noisy.iter().zip(&tokens).filter(|(a, b)| a != b && **a != 1).count();
            }
            prop_assert!(wrong > 0);
        }
    }

    /// One text's edits may undo each other, as in the paper: the number of edits only bounds the distance.
    #[test]
    fn edits_may_cancel() {
        let tokens: Vec<u32> = (10..42).collect();
        let filled = super::super::fill(tokens.clone(), 8, 0);
        let mut rng = ChaCha8Rng::seed_from_u64(5664424826646181230);
        assert_eq!(edit_all(vec![filled], 8, 0.1, None, &mut rng)[0].noisy, tokens);
    }

    fn levenshtein(a: &[u32], b: &[u32]) -> usize {
        let mut row: Vec<usize> = (0..=b.len()).collect();
        for (i, x) in a.iter().enumerate() {
            let mut corner = i;
            row[0] = i + 1;
            for (j, y) in b.iter().enumerate() {
                let next = (corner + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
                corner = std::mem::replace(&mut row[j + 1], next);
            }
        }
        row[b.len()]
    }
}
