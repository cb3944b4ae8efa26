//! Text from tokens as they come, never half a character.

use crate::Tokenizer;
use std::sync::Arc;

/// Turns tokens into text piece by piece: the pieces together are the text of all tokens.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Bytes of a character that is not complete; at most three.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Nothing pending. Special tokens give no text.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, pending: Vec::new() }
    }

    /// Text that can no longer change. Bytes that can never become a character give U+FFFD.
    pub fn push(&mut self, ids: &[u32]) -> String {
        for &id in ids.iter().filter(|&&id| !self.tokenizer.is_special(id)) {
            self.pending.extend_from_slice(self.tokenizer.token_bytes(id));
        }
        let mut text = String::new();
        let mut from = 0;
        loop {
            match std::str::from_utf8(&self.pending[from..]) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = from + error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[from..valid]));
                    let Some(bad) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    from = valid + bad;
                }
            }
        }
    }

    /// What is left: an incomplete character as U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}
