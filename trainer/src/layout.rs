//! From documents to rows: every example becomes its noisy tokens followed by its clean tokens, at the same positions
//! (the vectorised layout of BD3-LM, Arriola et al. 2025, with a token-causal clean half). A prompt is clean only.

use std::sync::Arc;

use crate::ops::{attention::Document, head::Targets};

/// One document with one corruption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Right tokens, those of the prompt included.
    pub clean: Vec<u32>,
    /// Corrupted tokens of the positions after the prompt; a multiple of `block` of them.
    pub noisy: Vec<u32>,
    /// Whether the noisy row is scored against the clean token.
    pub scored: Vec<bool>,
    /// Positions per block.
    pub block: usize,
    /// Clean positions that are text: the clean row at `p` is scored against token `p + 1` while `p + 1 < length`.
    pub length: usize,
}

impl Example {
    /// A document without noisy rows: every token is scored as the next one.
    pub fn next_tokens(clean: Vec<u32>) -> Example {
        Example { length: clean.len(), clean, noisy: Vec::new(), scored: Vec::new(), block: 1 }
    }

    /// Positions before the first block.
    pub fn prompt(&self) -> usize {
        self.clean.len() - self.noisy.len()
    }

    /// Rows it becomes.
    pub fn rows(&self) -> usize {
        self.clean.len() + self.noisy.len()
    }
}

/// Documents of one micro-batch as rows.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token per row.
    pub ids: Arc<[u32]>,
    /// Position per row.
    pub positions: Arc<[u32]>,
    /// Where each document's rows are.
    pub documents: Arc<[Document]>,
    /// What is scored: first all noisy targets, then all next-token targets.
    pub targets: Arc<Targets>,
    /// Number of noisy targets.
    pub noisy_targets: usize,
}

/// How many rows are scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Noisy rows.
    pub noisy: usize,
    /// Clean rows.
    pub next: usize,
}

impl Counts {
    /// Targets of these examples.
    pub fn of(examples: &[Example]) -> Counts {
        let noisy = examples.iter().map(|e| e.scored.iter().filter(|&&s| s).count()).sum();
        let next = examples.iter().map(|e| e.length.saturating_sub(1)).sum();
        Counts { noisy, next }
    }

    /// Weights of each noisy and each next-token target, so that the loss over all micro-batches is
    /// `mean(noisy) + lambda * mean(next)`.
    pub fn weights(&self, lambda: f32) -> (f32, f32) {
        ((self.noisy.max(1) as f32).recip(), lambda / self.next.max(1) as f32)
    }
}

impl Batch {
    /// Lays the examples out; every noisy target weighs `weights.0` and every next-token target `weights.1`.
    pub fn new(examples: &[Example], weights: (f32, f32)) -> Batch {
        let (mut ids, mut positions, mut documents) = (Vec::new(), Vec::new(), Vec::new());
        let (mut noisy, mut next) = (Vec::new(), Vec::new());
        for example in examples {
            let (start, length, prompt) = (ids.len(), example.clean.len(), example.prompt());
            documents.push(Document { start, prompt, length, block: example.block });
            ids.extend_from_slice(&example.noisy);
            ids.extend_from_slice(&example.clean);
            positions.extend((prompt as u32..length as u32).chain(0..length as u32));
            let scored = example.scored.iter().enumerate().filter(|&(_, &scored)| scored);
            noisy.extend(scored.map(|(i, _)| ((start + i) as u32, example.clean[prompt + i])));
            if weights.1 > 0.0 {
                let first = start + example.noisy.len();
                next.extend((1..example.length).map(|p| ((first + p - 1) as u32, example.clean[p])));
            }
        }
        let noisy_targets = noisy.len();
        let mut targets = Targets { weights: vec![weights.0; noisy_targets], ..Targets::default() };
        targets.weights.resize(noisy_targets + next.len(), weights.1);
        (targets.rows, targets.tokens) = noisy.into_iter().chain(next).unzip();
        Batch {
            ids: ids.into(),
            positions: positions.into(),
            documents: documents.into(),
            targets: Arc::new(targets),
            noisy_targets,
        }
    }
}

/// Splits examples, in order, into micro-batches of about equal size with at most `rows` rows each (more only for a
/// single example), their number a multiple of `threads` where possible.
pub fn micro_batches(examples: &[Example], rows: usize, threads: usize) -> Vec<&[Example]> {
    let total: usize = examples.iter().map(Example::rows).sum();
    let parts = total.div_ceil(rows.max(1)).next_multiple_of(threads.max(1));
    let mut split = Vec::with_capacity(parts);
    let (mut start, mut seen) = (0, 0);
    for (index, example) in examples.iter().enumerate() {
        seen += example.rows();
        if seen * parts >= total * (split.len() + 1) || index + 1 == examples.len() {
            split.push(&examples[start..=index]);
            start = index + 1;
        }
    }
    split
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(length: usize) -> Example {
        let clean: Vec<u32> = (10..10 + length as u32).collect();
        let scored = (0..length).map(|p| p % 3 == 0).collect();
        Example { noisy: vec![1; length], clean, scored, block: 4, length: length - 1 }
    }

    #[test]
    fn rows_positions_and_targets() {
        let batch = Batch::new(&[example(4), example(8)], (0.5, 0.25));
        assert_eq!(batch.ids.len(), 24);
        assert_eq!(batch.positions[8..12], [0, 1, 2, 3]);
        assert_eq!(batch.documents[1], Document { start: 8, prompt: 0, length: 8, block: 4 });
        assert_eq!(batch.noisy_targets, 2 + 3);
        assert_eq!(batch.targets.rows, [0, 3, 8, 11, 14, 4, 5, 16, 17, 18, 19, 20, 21]);
        assert_eq!(batch.targets.tokens[5..7], [11, 12]);
        assert_eq!(batch.targets.weights[4..6], [0.5, 0.25]);
    }

    #[test]
    fn a_prompt_has_clean_rows_only() {
        let mut example = example(6);
        example.noisy.drain(..2);
        example.scored = vec![true, false, true, false];
        let batch = Batch::new(&[example], (0.5, 0.25));
        assert_eq!(batch.ids.len(), 10);
        assert_eq!(batch.positions[..], [2, 3, 4, 5, 0, 1, 2, 3, 4, 5]);
        assert_eq!(batch.targets.rows, [0, 2, 4, 5, 6, 7]);
        assert_eq!(batch.targets.tokens, [12, 14, 11, 12, 13, 14]);
    }

    #[test]
    fn next_tokens_have_clean_rows_only() {
        let batch = Batch::new(&[Example::next_tokens(vec![7, 8, 9])], (0.5, 0.25));
        assert_eq!((&batch.ids[..], &batch.positions[..], batch.noisy_targets), (&[7, 8, 9][..], &[0, 1, 2][..], 0));
        assert_eq!((&batch.targets.rows[..], &batch.targets.tokens[..]), (&[0, 1][..], &[8, 9][..]));
    }

    #[test]
    fn micro_batches_cover_everything_in_order() {
        let examples: Vec<Example> = (1..40).map(|i| example(4 * (i % 7 + 1))).collect();
        let parts = micro_batches(&examples, 100, 2);
        assert!(parts.iter().all(|p| !p.is_empty()));
        assert_eq!(parts.concat(), examples);
    }
}
