//! Tokens and text: tokenizer, chat template, incremental detokeniser.
//!
//! It knows `tokenizer.json` of any byte-level BPE model, its chat template, and when text can no longer change. It does
//! not know models, requests or networks.
//!
//! Modules in reading order: `outline` (what a `tokenizer.json` may hold), `split` (its patterns within a limit
//! of time), [`tokenizer`], `heal` (the end of a prompt that its model spells), [`detokenize`] (never half a
//! character), [`stop`] (stop strings over a stream), `template` (chat templates within limits), [`chat`] (in which what
//! users wrote stays text).

pub mod chat;
pub mod detokenize;
mod heal;
mod outline;
mod split;
pub mod stop;
mod template;
pub mod tokenizer;

pub use chat::Message;
pub use detokenize::Detokenizer;
pub use heal::Tail;
pub use stop::StopMatcher;
pub use tokenizer::{Specials, Tokenizer};

use thiserror::Error;

/// Why text could not become tokens.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TextError {
    /// `tokenizer.json` or its companion cannot be used.
    #[error("{file}: {reason}")]
    Tokenizer {
        /// Which file.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The text cannot be encoded.
    #[error("cannot encode the text: {0}")]
    Encode(String),
    /// The model has no chat template.
    #[error("the model has no chat template: send text instead of messages")]
    NoChatTemplate,
    /// The template refused the messages, or is broken.
    #[error("chat template: {0}")]
    Template(String),
}
