//! Pre-tokenizers within a limit of time.
//!
//! The tokenizers crate takes a pattern that gives up for one that finds nothing more, and lets it try a million ways
//! at every character. Here both are errors; all else is that crate's.

use fancy_regex::{Regex, RegexBuilder};
use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;
use std::cell::Cell;
use std::time::{Duration, Instant};
use tokenizers::pattern::{Invert, Pattern};
use tokenizers::tokenizer::Result;
use tokenizers::{Offsets, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, SplitDelimiterBehavior};

/// How often a pattern may turn back to match at one place; those of known models do so once per blank of a run.
const BACKTRACKS_MAX: usize = 10_000;
/// Time that a file's patterns may take for a text, however short.
const TIME_MAX: Duration = Duration::from_secs(2);
/// And besides, per byte of it; those of known models take a tenth where nothing is optimised.
const TIME_PER_BYTE: Duration = Duration::from_micros(10);

/// The steps of a file, one after the other.
#[derive(Clone)]
pub(crate) struct Steps(Vec<Step>);

#[derive(Clone)]
enum Step {
    Split { pattern: Limited, behavior: SplitDelimiterBehavior, invert: bool },
    Other(Box<PreTokenizerWrapper>),
}

/// A pattern that matches every character: the pattern itself, or else a group of one character.
#[derive(Clone)]
struct Limited(Regex);

/// One text's time.
struct Timed<'a> {
    pattern: &'a Limited,
    left: &'a Cell<Duration>,
}

impl<'de> Deserialize<'de> for Steps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut steps = Vec::new();
        collect(Value::deserialize(deserializer)?, &mut steps).map_err(D::Error::custom)?;
        Ok(Steps(steps))
    }
}

fn collect(json: Value, steps: &mut Vec<Step>) -> std::result::Result<(), String> {
    let wrong = |error: &dyn std::fmt::Display| format!("pre_tokenizer: {error}");
    match json["type"].as_str() {
        Some("Sequence") => {
            let inner = json["pretokenizers"].as_array().ok_or_else(|| wrong(&"a Sequence has no pretokenizers"))?;
            inner.iter().try_for_each(|step| collect(step.clone(), steps))
        }
        Some("Split") => {
            let pattern = match (json["pattern"]["Regex"].as_str(), json["pattern"]["String"].as_str()) {
                (Some(regex), None) => regex.to_owned(),
                (None, Some(text)) => fancy_regex::escape(text).into_owned(),
                _ => return Err(wrong(&"a Split has no pattern")),
            };
            let behavior = serde_json::from_value(json["behavior"].clone()).map_err(|error| wrong(&error))?;
            let invert = json["invert"].as_bool().ok_or_else(|| wrong(&"invert of a Split is no boolean"))?;
            // Alone first: half a group must not become a whole one.
            Regex::new(&pattern).map_err(|error| wrong(&error))?;
            let whole = format!("(?:{pattern})|((?s:.))");
            let built = RegexBuilder::new(&whole).backtrack_limit(BACKTRACKS_MAX).build();
            steps.push(Step::Split { pattern: Limited(built.map_err(|error| wrong(&error))?), behavior, invert });
            Ok(())
        }
        _ => {
            let other = serde_json::from_value(json).map_err(|error| wrong(&error))?;
            steps.push(Step::Other(Box::new(other)));
            Ok(())
        }
    }
}

impl PreTokenizer for Steps {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        let bytes: usize = text
            .get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::None)
            .iter()
            .map(|(piece, ..)| piece.len())
            .sum();
        let left = Cell::new(TIME_MAX + TIME_PER_BYTE * u32::try_from(bytes).unwrap_or(u32::MAX));
        for step in &self.0 {
            match step {
                Step::Split { pattern, behavior, invert } => text.split(|_, piece| {
                    let timed = Timed { pattern, left: &left };
                    if *invert { piece.split(Invert(timed), *behavior) } else { piece.split(timed, *behavior) }
                })?,
                Step::Other(other) => other.pre_tokenize(text)?,
            }
        }
        Ok(())
    }
}

impl Pattern for Timed<'_> {
    fn find_matches(&self, inside: &str) -> Result<Vec<(Offsets, bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let started = Instant::now();
        let (mut found, mut unmatched, mut at) = (Vec::new(), 0, 0);
        // Where an empty match would only repeat the one before.
        let mut last = None;
        while at < inside.len() {
            let captures = self.pattern.0.captures_from_pos(inside, at);
            let captures =
                captures.map_err(|error| format!("a pattern of tokenizer.json gives up at byte {at}: {error}"))?;
            let next = at + inside[at..].chars().next().map_or(1, char::len_utf8);
            let whole = captures.as_ref().and_then(|captures| captures.get(0));
            let is_one = captures.as_ref().is_some_and(|captures| captures.get(captures.len() - 1).is_some());
            match whole.filter(|whole| !is_one && whole.start() == at) {
                Some(whole) if whole.end() > at || last != Some(at) => {
                    if unmatched < at {
                        found.push(((unmatched, at), false));
                    }
                    found.push(((at, whole.end()), true));
                    (unmatched, last) = (whole.end(), Some(whole.end()));
                    at = whole.end().max(next);
                }
                _ => at = next,
            }
            if started.elapsed() > self.left.get() {
                return Err(format!("the patterns of tokenizer.json take too long for this text: byte {at}").into());
            }
        }
        if unmatched < inside.len() {
            found.push(((unmatched, inside.len()), false));
        }
        self.left.set(self.left.get().saturating_sub(started.elapsed()));
        Ok(found)
    }
}
