//! What the tokenizer's files say of ids, without a tokenizer; and the ids that follow from it.

use super::family::Family;
use super::json::{Reader, ids, read_object};
use super::{Infill, LoadError, Overrides};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// Highest id a tokenizer may have.
const ID_MAX: u64 = 1 << 24;
/// Fewest ids of a vocabulary: some must be left when mask and markers are banned.
pub(super) const VOCABULARY_MIN: u64 = 8;

/// Ids of a tokenizer.
#[derive(Default)]
pub(super) struct Tokens {
    /// Added tokens, text to id.
    added: HashMap<String, u32>,
    /// One past the highest id; 0 without a tokenizer.
    size: u32,
}

impl Tokens {
    /// Reads `tokenizer.json` and `tokenizer_config.json`, as far as they are there.
    pub(super) fn read(dir: &Path) -> Result<Tokens, LoadError> {
        let mut tokens = Tokens::default();
        let path = dir.join("tokenizer.json");
        if let Some(object) = read_object(&path)? {
            let mut problems = Vec::new();
            match object.get("model").and_then(|model| model.get("vocab")) {
                Some(Value::Object(vocab)) => vocab.iter().for_each(|(text, id)| {
                    tokens.see(text, Some(id), &mut problems);
                }),
                Some(Value::Array(pieces)) => tokens.size = u32::try_from(pieces.len()).unwrap_or(u32::MAX),
                _ => {}
            }
            for token in object.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
                tokens.add(token.get("content"), token.get("id"), &mut problems);
            }
            refuse(&path, problems)?;
        }
        let path = dir.join("tokenizer_config.json");
        if let Some(object) = read_object(&path)? {
            let mut problems = Vec::new();
            for (id, token) in object.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
                let id = id.parse::<u64>().map(Value::from).unwrap_or_else(|_| Value::from(id.as_str()));
                tokens.add(token.get("content"), Some(&id), &mut problems);
            }
            refuse(&path, problems)?;
        }
        Ok(tokens)
    }

    fn add(&mut self, text: Option<&Value>, id: Option<&Value>, problems: &mut Vec<String>) {
        let Some(text) = text.and_then(Value::as_str) else {
            problems.push("an added token has no content".into());
            return;
        };
        if let Some(id) = self.see(text, id, problems) {
            self.added.insert(text.to_owned(), id);
        }
    }

    /// Counts an id.
    fn see(&mut self, text: &str, id: Option<&Value>, problems: &mut Vec<String>) -> Option<u32> {
        match id.and_then(Value::as_u64).filter(|&id| id <= ID_MAX) {
            Some(id) => {
                self.size = self.size.max(id as u32 + 1);
                Some(id as u32)
            }
            None => {
                problems.push(format!("the id of token {text:?} must be a whole number from 0 to {ID_MAX}"));
                None
            }
        }
    }

    /// Ids that may win: those of the tokenizer, as far as the head has rows.
    pub(super) fn usable(&self, r: &mut Reader<'_>, vocab_rows: u32) -> u32 {
        let (size, origin) = match self.size {
            0 => (vocab_rows, "config.json"),
            size => (size.min(vocab_rows), "tokenizer"),
        };
        if u64::from(size) < VOCABULARY_MIN {
            r.problem(format!("the tokenizer has {size} ids, at least {VOCABULARY_MIN} are needed"));
        }
        r.note("tokenizer_size", size, origin);
        size
    }

    /// The mask token: override, then config, then the tokenizer's token of the family's text.
    pub(super) fn mask_id(
        &self,
        r: &mut Reader<'_>,
        family: Family,
        overrides: &Overrides,
        vocab_rows: u32,
    ) -> Option<u32> {
        let Some(text) = family.mask_token else {
            if overrides.mask_id.is_some() {
                r.problem(format!("the override of mask_token_id: {} models have no mask token", family.name()));
            }
            return None;
        };
        let configured = r.id("mask_token_id");
        let (id, origin) = match (overrides.mask_id, configured, self.added.get(text)) {
            (Some(id), ..) => (id, "override"),
            (_, Some(id), Some(&other)) if id != other => {
                r.problem(format!("mask_token_id is {id}, but the tokenizer's {text} is {other}: override it"));
                return None;
            }
            (_, Some(id), _) => (id, "config.json"),
            (_, _, Some(&id)) => (id, "tokenizer"),
            _ => {
                r.problem(format!("mask_token_id is missing, and the tokenizer has no {text}: override it"));
                return None;
            }
        };
        within(r, "mask_token_id", id, vocab_rows);
        r.note("mask_token_id", id, origin);
        Some(id)
    }
}

/// Tokens that end an output: those of `generation_config.json`, which has the longer list, else of `config.json`.
pub(super) fn eos_ids(r: &mut Reader<'_>, generation: &Map<String, Value>, vocab_rows: u32) -> Vec<u32> {
    let listed = generation.get("eos_token_id").filter(|value| !value.is_null());
    let (value, origin) = match listed {
        Some(value) => (value, "generation_config.json"),
        None => match r.value("eos_token_id") {
            Some(value) => (value, "config.json"),
            None => {
                r.note("eos_token_id", "none", "family default");
                return Vec::new();
            }
        },
    };
    let Some(found) = ids(value) else {
        r.problem(format!("eos_token_id ({origin}) must be an id or a list of ids, is {value}"));
        return Vec::new();
    };
    for &id in &found {
        within(r, "eos_token_id", id, vocab_rows);
    }
    r.note("eos_token_id", format!("{found:?}"), origin);
    found
}

/// Markers of the prefix-suffix-middle order.
pub(super) fn infill(r: &mut Reader<'_>, vocab_rows: u32) -> Option<Infill> {
    let infill: Infill = r.own("infill")?;
    for (key, id) in [("prefix", infill.prefix), ("suffix", infill.suffix), ("middle", infill.middle)] {
        within(r, &format!("infill.{key}"), id, vocab_rows);
    }
    Some(infill)
}

fn within(r: &mut Reader<'_>, key: &str, id: u32, vocab_rows: u32) {
    // Without a vocabulary size, that is the problem to report.
    if id >= vocab_rows && r.value("vocab_size").is_some() {
        r.problem(format!("{key} {id} is outside the vocabulary of {vocab_rows}"));
    }
}

fn refuse(path: &Path, problems: Vec<String>) -> Result<(), LoadError> {
    if problems.is_empty() { Ok(()) } else { Err(LoadError::config(path, problems)) }
}
