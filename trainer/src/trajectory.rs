//! Denoising paths: in which pass each position of a text fell, and examples made of the states on the way.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{layout::Example, noise::edit::edited};

/// A text and the order in which its masks fell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trajectory {
    /// Prompt, answer, and end-of-sequence to the end of the last block.
    pub tokens: Vec<u32>,
    /// Tokens before the filling (the text's own end-of-sequence included).
    pub length: usize,
    /// Positions per block.
    pub block: usize,
    /// For each position from the first block on: the pass of its block in which it fell, counted from 1; 0 where it was
    /// given. A whole number of blocks, the last of `tokens`.
    pub reveal: Vec<u16>,
}

impl Trajectory {
    /// An example of one state per block, drawn evenly from the states before each of its passes: what had not fallen is
    /// masked and scored.
    pub fn example(&self, mask: u32, rng: &mut ChaCha8Rng) -> Example {
        let mut noisy = self.tokens[self.tokens.len() - self.reveal.len()..].to_vec();
        let mut scored = vec![false; noisy.len()];
        let blocks = noisy.chunks_exact_mut(self.block).zip(scored.chunks_exact_mut(self.block));
        for ((tokens, scored), reveal) in blocks.zip(self.reveal.chunks_exact(self.block)) {
            let passes = reveal.iter().copied().max().unwrap_or(0);
            let done = if passes == 0 { 0 } else { rng.random_range(0..passes) };
            for ((token, scored), &fell) in tokens.iter_mut().zip(scored).zip(reveal) {
                if fell > done {
                    (*token, *scored) = (mask, true);
                }
            }
        }
        Example { clean: self.tokens.clone(), noisy, scored, block: self.block, length: self.length }
    }

    /// [`Trajectory::example`] with `edits` edits among what is visible (Seed Diffusion's augmentation `f`, section 3.2);
    /// positions that were not given are all scored. New tokens come from the text itself.
    pub fn edited_example(&self, edits: usize, mask: u32, rng: &mut ChaCha8Rng) -> Example {
        let mut example = self.example(mask, rng);
        let right = &self.tokens[example.prompt()..];
        let wrong = edited(right, self.block, edits, right, rng);
        for (i, &fell) in self.reveal.iter().enumerate().filter(|(_, fell)| **fell > 0) {
            if !example.scored[i] {
                example.noisy[i] = wrong[i];
            }
            example.scored[i] = fell > 0;
        }
        example
    }
}

/// A prompt and its answer, without an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// Prompt, answer, one end-of-sequence.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
}

impl Answer {
    /// A path on which the answer's tokens fall one per pass in random order.
    pub fn in_random_order(&self, block: usize, end: u32, rng: &mut ChaCha8Rng) -> Trajectory {
        let mut tokens = self.tokens.clone();
        let length = tokens.len();
        tokens.resize(length.next_multiple_of(block), end);
        let first = self.prompt / block * block;
        let mut reveal = vec![0u16; tokens.len() - first];
        for (index, reveal) in reveal.chunks_exact_mut(block).enumerate() {
            let given = self.prompt.saturating_sub(first + index * block);
            let mut order: Vec<u16> = (1..=(block - given) as u16).collect();
            order.shuffle(rng);
            reveal[given..].copy_from_slice(&order);
        }
        Trajectory { tokens, length, block, reveal }
    }
}

impl Answer {
    /// A path on which whole blocks fall at once, the first of them at a random place of the answer's beginning: what is
    /// asked of masks that draft (`self_speculative`), which begin where the last draft ended.
    pub fn drafted(&self, block: usize, end: u32, rng: &mut ChaCha8Rng) -> Trajectory {
        let first = (self.prompt + rng.random_range(0..block)).min(self.tokens.len() - 1);
        let mut tokens = self.tokens.clone();
        let length = tokens.len();
        tokens.resize(first + (length - first).next_multiple_of(block), end);
        let reveal = vec![1; tokens.len() - first];
        Trajectory { tokens, length, block, reveal }
    }
}

/// Writes one JSON object per line; the file appears whole or not at all.
///
/// # Errors
/// The file cannot be written.
pub fn write<T: Serialize>(items: &[T], file: &Path) -> anyhow::Result<()> {
    let half = file.with_extension("part");
    let mut out = BufWriter::new(File::create(&half).with_context(|| half.display().to_string())?);
    for item in items {
        serde_json::to_writer(&mut out, item)?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    std::fs::rename(&half, file).with_context(|| file.display().to_string())
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// The file cannot be read or is of something else.
pub fn read<T: DeserializeOwned>(file: &Path) -> anyhow::Result<Vec<T>> {
    let lines = BufReader::new(File::open(file).with_context(|| file.display().to_string())?).lines();
    lines.map(|line| serde_json::from_str(&line?).with_context(|| file.display().to_string())).collect()
}

/// States of random paths with blocks of `block` positions, or of any where there are none, together about `tokens`
/// tokens; each with a number of edits up to `alpha` per token.
pub fn states(
    paths: &[Trajectory],
    tokens: usize,
    block: usize,
    alpha: f64,
    mask: u32,
    rng: &mut ChaCha8Rng,
) -> Vec<Example> {
    let mut own: Vec<&Trajectory> = paths.iter().filter(|path| path.block == block).collect();
    if own.is_empty() {
        own = paths.iter().collect();
    }
    let (mut examples, mut seen) = (Vec::new(), 0);
    while seen < tokens && !own.is_empty() {
        let path = own[rng.random_range(0..own.len())];
        seen += path.length;
        examples.push(if alpha > 0.0 {
            let edits = rng.random_range(0.0..=alpha) * path.reveal.len() as f64;
            path.edited_example(edits as usize, mask, rng)
        } else {
            path.example(mask, rng)
        });
    }
    examples
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;

    proptest! {
        /// Whole blocks are masked, from somewhere in the first block's length of the answer to its end.
        #[test]
        fn drafts_are_masks_alone(prompt in 1usize..20, answer in 1usize..20, seed: u64) {
            let tokens: Vec<u32> = (10..10 + (prompt + answer) as u32).collect();
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let example = Answer { tokens: tokens.clone(), prompt }.drafted(8, 0, &mut rng).example(1, &mut rng);
            prop_assert!((prompt..prompt + 8).contains(&example.prompt()) && example.prompt() < tokens.len());
            prop_assert!(example.noisy.iter().all(|token| *token == 1) && example.scored.iter().all(|scored| *scored));
            prop_assert_eq!(example.noisy.len() % 8, 0);
            prop_assert_eq!(&example.clean[..tokens.len()], &tokens[..]);
            prop_assert!(example.clean.len() < tokens.len() + 8);
        }

        #[test]
        fn answers_fall_one_token_per_pass(prompt in 1usize..20, answer in 1usize..20, seed: u64) {
            let tokens: Vec<u32> = (10..10 + (prompt + answer) as u32).collect();
            let path = Answer { tokens: tokens.clone(), prompt }.in_random_order(8, 0, &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert_eq!(&path.tokens[..tokens.len()], &tokens[..]);
            prop_assert_eq!(path.tokens.len() % 8, 0);
            let first = path.tokens.len() - path.reveal.len();
            for (i, block) in path.reveal.chunks(8).enumerate() {
                let given = prompt.saturating_sub(first + 8 * i);
                let mut fell: Vec<u16> = block[given..].to_vec();
                fell.sort_unstable();
                prop_assert_eq!(fell, (1..=(8 - given) as u16).collect::<Vec<_>>());
                prop_assert!(block[..given].iter().all(|fell| *fell == 0));
            }
        }

        /// A state masks exactly what falls at or after some pass of the block, and never what was given.
        #[test]
        fn states_are_those_of_the_path(reveal in proptest::collection::vec(0u16..5, 8..=8), seed: u64) {
            let tokens: Vec<u32> = (10..22).collect();
            let path = Trajectory { tokens, length: 11, block: 4, reveal: reveal.clone() };
            let example = path.example(1, &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert_eq!(example.prompt(), 4);
            for block in 0..2 {
                let at = 4 * block..4 * block + 4;
                let (fell, scored) = (&reveal[at.clone()], &example.scored[at.clone()]);
                let first = fell.iter().zip(scored).filter(|(_, s)| **s).map(|(f, _)| *f).min();
                prop_assert_eq!(first.is_some(), fell.iter().any(|f| *f > 0), "a block with masks has a state");
                for (i, (&fell, &scored)) in fell.iter().zip(scored).enumerate() {
                    prop_assert_eq!(scored, first.is_some_and(|first| fell >= first));
                    prop_assert_eq!(example.noisy[at.start + i], if scored { 1 } else { 14 + (at.start + i) as u32 });
                }
            }
        }
    }
}
