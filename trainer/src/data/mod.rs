//! Training documents: where they come from and how they become token ids.
//!
//! [`corpus`] reads source trees and JSONL, [`bpe`] trains the tokenizer, [`mixture`] draws documents and cuts them.

pub mod bpe;
pub mod corpus;
pub mod mixture;

pub use mixture::{Mixture, MixtureConfig};

use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use std::collections::HashSet;

/// Of the different `keys`, those that are held out: one in `one_in`, at least one of several, by SHA-256.
pub(crate) fn held_out(keys: impl Iterator<Item = String>, one_in: usize) -> HashSet<String> {
    let mut all: Vec<String> = keys.collect::<HashSet<_>>().into_iter().collect();
    all.sort_by_cached_key(|key| Sha256::digest(key));
    let count = (all.len() / one_in).max(1).min(all.len().saturating_sub(1));
    all.into_iter().take(count).collect()
}

/// A set of training documents.
pub trait Documents: Sync {
    /// Number of documents.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Token ids of document `index`, freshly cut (random token boundaries, prefix-suffix-middle order) by `rng`, ending
    /// with one end-of-sequence.
    fn encode(&self, index: usize, rng: &mut ChaCha8Rng) -> Vec<u32>;

    /// Settings they are drawn by: a run is resumed with the same ones.
    fn settings(&self) -> String {
        String::new()
    }
}
