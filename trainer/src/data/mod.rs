//! Training documents: where they come from and how they become token ids.
//!
//! [`corpus`] reads source trees and JSONL, [`bpe`] trains the tokenizer, [`mixture`] draws documents and cuts them.

pub mod bpe;
pub mod corpus;
pub mod mixture;

pub use mixture::{Mixture, MixtureConfig};

use rand_chacha::ChaCha8Rng;

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
}
