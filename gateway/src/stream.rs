//! A worker's events to a client's: order, no position twice, stop strings, text. Pure.

use std::sync::Arc;
use thiserror::Error;
use unmask_proto::failpoints::{Bug, planted};
use unmask_proto::v1::{Commit, Draft};
use unmask_text::{Detokenizer, StopMatcher, Tokenizer};

/// Stands for a masked position in the text of a draft.
const MASK_SHADE: char = '\u{2591}';

/// A worker skipped positions.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the worker's commit begins at position {begins}, expected {expected}")]
pub(crate) struct Gap {
    begins: u32,
    expected: u32,
}

/// What a client has of a stream, and what is held back from it.
pub(crate) struct Assembler {
    tokenizer: Arc<Tokenizer>,
    prompt_tokens: u32,
    /// Text that the output begins with and the client has, for it typed it; what is still to come of it.
    typed: String,
    /// Generated ids the client has, in order.
    ids: Vec<u32>,
    /// Passes spent on them.
    passes: u32,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    stopped: bool,
}

impl Assembler {
    /// A stream that begins behind `prompt_tokens`, its text behind `typed`.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, prompt_tokens: u32, typed: &str, stops: Vec<String>) -> Self {
        Self {
            detokenizer: Detokenizer::new(Arc::clone(&tokenizer)),
            tokenizer,
            prompt_tokens,
            typed: typed.to_owned(),
            ids: Vec::new(),
            passes: 0,
            stops: StopMatcher::new(stops),
            stopped: false,
        }
    }

    /// The client has `received`, of as many passes, and all text that could be released with it.
    pub(crate) fn resume(&mut self, received: &[u32], passes: u32) {
        self.passes += passes;
        self.take_ids(received);
    }

    /// Generated ids the client has, in order.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Passes spent on them.
    pub(crate) fn passes(&self) -> u32 {
        self.passes
    }

    /// Whether a stop string has been found: nothing follows but the end.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Takes ids up to the one that completes a stop string; returns their number and the text they release.
    fn take_ids(&mut self, ids: &[u32]) -> (usize, String) {
        let mut released = String::new();
        for (taken, &id) in ids.iter().enumerate() {
            if self.stopped {
                return (taken, released);
            }
            // One by one, so that the token that completes a stop string is known.
            let text = self.detokenizer.push(&[id]);
            let (text, found) = self.stops.push(untyped(&mut self.typed, &text));
            released += &text;
            self.ids.push(id);
            self.stopped = found;
        }
        (ids.len(), released)
    }

    /// What is new in a commit, with its text; `None` when nothing is.
    ///
    /// # Errors
    /// Positions are missing before it.
    pub(crate) fn commit(&mut self, commit: Commit) -> Result<Option<Commit>, Gap> {
        let begins = commit.first_position;
        let expected = if planted(Bug::NoDedupe) { begins } else { self.prompt_tokens + self.ids.len() as u32 };
        let Some(known) = expected.checked_sub(begins) else { return Err(Gap { begins, expected }) };
        let fresh = commit.token_ids.get(known as usize..).unwrap_or_default();
        if fresh.is_empty() || self.stopped {
            return Ok(None);
        }
        let (taken, text) = self.take_ids(fresh);
        self.passes += commit.steps;
        let token_ids = fresh[..taken].to_vec();
        Ok(Some(Commit { first_position: expected, token_ids, text, ..commit }))
    }

    /// The part of a draft that is not yet committed, with its text; `None` when nothing is.
    pub(crate) fn draft(&self, mut draft: Draft) -> Option<Draft> {
        let expected = self.prompt_tokens + self.ids.len() as u32;
        // A draft with a gap before it is one of a run that broke off: the next commit will tell.
        let known = expected.checked_sub(draft.first_position)? as usize;
        if known >= draft.token_ids.len() || draft.masked.len() != draft.token_ids.len() || self.stopped {
            return None;
        }
        draft.token_ids.drain(..known);
        draft.masked.drain(..known);
        draft.first_position = expected;
        let positions: Vec<(u32, bool)> = draft.token_ids.iter().copied().zip(draft.masked.iter().copied()).collect();
        for run in positions.chunk_by(|a, b| a.1 == b.1) {
            if run[0].1 {
                draft.text.extend(std::iter::repeat_n(MASK_SHADE, run.len()));
            } else {
                let ids: Vec<u32> = run.iter().map(|(id, _)| *id).collect();
                draft.text += &self.tokenizer.decode(&ids, true);
            }
        }
        Some(draft)
    }

    /// Text held back until the end was known.
    pub(crate) fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        let (mut text, found) = self.stops.push(untyped(&mut self.typed, &self.detokenizer.finish()));
        if !found {
            text += &self.stops.finish();
        }
        text
    }
}

/// What of `text` was not typed, once `typed` is spelled; takes what is spelled now from it.
fn untyped<'a>(typed: &mut String, text: &'a str) -> &'a str {
    let spelled: usize = text.chars().zip(typed.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
    typed.drain(..spelled);
    if spelled < text.len() {
        // The rest is new, and where it is not what was typed (ids of another stream), nothing else is waited for.
        typed.clear();
    }
    &text[spelled..]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;
    use std::sync::LazyLock;
    use unmask_text::Specials;

    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar/tokenizer.json");
        Arc::new(Tokenizer::from_files(&std::fs::read(path).unwrap(), None, None).unwrap())
    });
    const PROMPT: u32 = 7;

    fn ids(text: &str) -> Vec<u32> {
        TOKENIZER.encode(text, Specials::AsText, false).unwrap()
    }

    fn assembler(stops: &[&str], received: &[u32]) -> Assembler {
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut assembler = Assembler::new(Arc::clone(&TOKENIZER), PROMPT, "", stops);
        assembler.resume(received, 0);
        assembler
    }

    fn commit(first_position: u32, token_ids: &[u32]) -> Commit {
        Commit { first_position, token_ids: token_ids.to_vec(), steps: 1, ..Commit::default() }
    }

    #[test]
    fn what_came_before_is_dropped_and_gaps_are_errors() {
        let all = ids("hello, big world");
        let mut stream = assembler(&[], &[]);
        assert_eq!(stream.commit(commit(PROMPT, &all[..4])).unwrap().unwrap().token_ids, all[..4]);
        assert_eq!(stream.commit(commit(PROMPT, &all[..4])), Ok(None));
        assert_eq!(stream.commit(commit(PROMPT + 1, &all[1..3])), Ok(None));
        let overlap = stream.commit(commit(PROMPT + 2, &all[2..6])).unwrap().unwrap();
        assert_eq!((overlap.first_position, &overlap.token_ids[..]), (PROMPT + 4, &all[4..6]));
        assert!(stream.commit(commit(PROMPT + 7, &all[7..])).is_err());
        assert_eq!((stream.ids(), stream.passes()), (&all[..6], 2));
    }

    #[test]
    fn a_stop_string_over_two_commits_cuts_text_and_tokens() {
        let all = ids("abcENDdef");
        let end = (1..=all.len()).find(|&n| TOKENIZER.decode(&all[..n], true).contains("END")).unwrap();
        for cut in 1..all.len() {
            let mut stream = assembler(&["END"], &[]);
            let mut text = String::new();
            let mut taken = Vec::new();
            for (from, part) in [(0, &all[..cut]), (cut, &all[cut..])] {
                if let Some(commit) = stream.commit(commit(PROMPT + from as u32, part)).unwrap_or_default() {
                    text += &commit.text;
                    taken.extend(commit.token_ids);
                }
            }
            assert!(stream.stopped());
            assert_eq!((text + &stream.finish(), &taken[..]), ("abc".into(), &all[..end]));
        }
    }

    #[test]
    fn what_was_typed_is_not_said_again() {
        let all = ids("hello, hello");
        for typed in ["h", "hel", "hello,"] {
            // A stop string counts in what is new only.
            let mut stream = Assembler::new(Arc::clone(&TOKENIZER), PROMPT, typed, vec!["hel".into()]);
            let mut text = String::new();
            for (at, id) in (PROMPT..).zip(&all) {
                if stream.stopped() {
                    break;
                }
                text += &stream.commit(commit(at, &[*id])).unwrap().map_or(String::new(), |commit| commit.text);
            }
            assert_eq!(text + &stream.finish(), "hello, "[typed.len()..]);
            let mut resumed = Assembler::new(Arc::clone(&TOKENIZER), PROMPT, typed, Vec::new());
            resumed.resume(&all[..3], 1);
            let rest = resumed.commit(commit(PROMPT + 3, &all[3..])).unwrap().unwrap().text;
            let had = TOKENIZER.decode(&all[..3], true).len().max(typed.len());
            assert_eq!(rest + &resumed.finish(), "hello, hello"[had..]);
        }
        // Of a model that does otherwise nothing is lost.
        let mut stream = Assembler::new(Arc::clone(&TOKENIZER), PROMPT, "help", Vec::new());
        let text = stream.commit(commit(PROMPT, &all)).unwrap().unwrap().text;
        assert_eq!(text + &stream.finish(), "lo, hello");
    }

    #[test]
    fn drafts_show_what_is_open() {
        let filled = ids("x = 1");
        let mut stream = assembler(&[], &[]);
        stream.commit(commit(PROMPT, &filled[..1])).unwrap();
        let n = filled.len();
        let draft = Draft {
            first_position: PROMPT - 1,
            token_ids: [&[3], &filled[..], &[9]].concat(),
            masked: [vec![false; n + 1], vec![true]].concat(),
            step: 2,
            text: String::new(),
        };
        let shown = stream.draft(draft.clone()).unwrap();
        let rest = TOKENIZER.decode(&filled[1..], true);
        assert_eq!((shown.first_position, shown.text), (PROMPT + 1, format!("{rest}{MASK_SHADE}")));
        assert_eq!(shown.token_ids.len(), shown.masked.len());
        assert_eq!(stream.draft(Draft { first_position: PROMPT + 9, ..draft.clone() }), None);
        assert_eq!(stream.draft(Draft { masked: Vec::new(), ..draft }), None);
    }

    proptest! {
        /// I5: however commits overlap and wherever a stream is resumed, every position comes once, in order, and the
        /// text is that of the whole.
        #[test]
        fn pieces_overlaps_and_resumption_change_nothing(
            text in "[aé漢😀E N\\n]{1,24}", noise in prop::collection::vec(0u32..290, 0..4),
            cuts in prop::collection::vec((0usize..60, 0usize..4), 1..8), stop in "[aéEN]{1,3}",
        ) {
            let mut all = ids(&text);
            all.extend(noise);
            let mut whole = assembler(&[&stop], &[]);
            let once = whole.commit(commit(PROMPT, &all)).unwrap().unwrap();
            let expected = once.text + &whole.finish();
            let mut stream = assembler(&[&stop], &[]);
            let mut released = String::new();
            let mut received: Vec<u32> = Vec::new();
            let ends = cuts.into_iter().map(|(cut, back)| (cut.min(all.len()), back)).chain([(all.len(), 1)]);
            for (end, back) in ends {
                let from = received.len().saturating_sub(back);
                if let Some(commit) = stream.commit(commit(PROMPT + from as u32, &all[from..end.max(from)])).unwrap() {
                    prop_assert_eq!(commit.first_position as usize, PROMPT as usize + received.len());
                    received.extend(&commit.token_ids);
                    released += &commit.text;
                }
                prop_assert!(expected.starts_with(&released));
                stream = assembler(&[&stop], &received);
            }
            prop_assert_eq!(&received, &once.token_ids);
            prop_assert_eq!(stream.stopped(), whole.stopped());
            prop_assert_eq!(released + &stream.finish(), expected);
        }
    }
}
