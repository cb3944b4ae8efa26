//! Where causal rows decide: one token per pass, or as many as a draft foretold.

use super::Batch;
use super::life::{Life, State};
use crate::opening::{Choice, Opening};
use crate::plan::Grant;
use crate::policy::speculate::{confirmed, worth_checking};
use crate::policy::{Candidate, Policy};
use crate::request::{BlockTrace, Event, Fill, Reason};
use std::ops::Range;
use unmask_kernels::Row;

impl Life {
    /// Positions of the masks that draft what follows the draft: none behind a stop token, where nothing is read.
    fn masks(&self) -> Range<u32> {
        let start = (self.tokens.len() + self.draft.len()) as u32;
        let stops = self.draft.last().is_some_and(|&token| self.is_stop(token));
        start..if stops { start } else { (start + self.drafted).min(self.canvas_end) }
    }

    /// What alone may stand in the next position.
    pub(super) fn opening(&self) -> Option<(&Opening, &[Choice])> {
        let opening = self.request.opening.as_ref()?;
        opening.after(&self.tokens[self.request.prompt.len()..]).map(|choices| (opening, choices))
    }

    /// Of `outputs`, those whose logits decide beside their records.
    pub(super) fn gathered(&self, outputs: &Range<usize>) -> Range<usize> {
        let first = usize::from(self.opening().is_some());
        let count = if self.request.settings.needs_logits() { outputs.len() } else { first };
        outputs.start..(outputs.start + count).min(outputs.end)
    }

    /// Rows behind the last kept one.
    pub(super) fn rows_ahead(&self) -> u32 {
        (self.draft.len() + self.masks().len()) as u32
    }

    /// Appends what stands behind the kept rows in the batch: the draft, then masks.
    pub(super) fn push_ahead(&self, sequence: u32, batch: &mut Batch) {
        let len = self.tokens.len() as u32;
        batch.outputs.push(batch.rows.len() as u32 - 1);
        batch.draws.push(self.draw(len, 0));
        for (position, &token) in (len..).zip(&self.draft) {
            batch.outputs.push(batch.rows.len() as u32);
            batch.draws.push(self.draw(position + 1, 0));
            batch.ids.push(token);
            batch.rows.push(Row { sequence, position, end: position + 1 });
        }
        let masks = self.masks();
        for position in masks.clone() {
            // What is in the place of the first mask, the last causal row decides.
            if position > masks.start {
                batch.outputs.push(batch.rows.len() as u32);
                batch.draws.push(self.draw(position, 0));
            }
            batch.ids.push(self.mask_id);
            batch.rows.push(Row { sequence, position, end: masks.end });
        }
    }

    /// Takes what the causal rows say, and what the masks propose to follow.
    pub(super) fn advance_decode(
        &mut self,
        grant: Grant,
        candidates: &[Candidate],
        events: &mut Vec<Event>,
    ) -> Option<Reason> {
        let (said, proposed) = candidates.split_at_checked(1 + self.draft.len())?;
        let right = confirmed(&self.draft, said);
        let position = self.tokens.len() as u32;
        self.report(position, &said[..=right], events);
        let fresh: Vec<u32> = said[..=right].iter().map(|candidate| candidate.token).collect();
        let over = self.commit(position, &fresh, 1, events);
        if let State::Decode { next } = &mut self.state {
            // A stop token may have cut what the draft foretold.
            *next = (*next + grant.kept + right as u32).min(self.tokens.len() as u32);
        }
        let all_right = right == self.draft.len();
        self.draft.clear();
        // What was proposed follows whatever token came out, but not a word that is yet to be spelled.
        let goes_on = all_right && self.opening().is_none();
        if let (Policy::SelfSpeculative { tau }, true) = (self.request.settings.policy, goes_on) {
            let room = (self.canvas_end as usize).saturating_sub(self.tokens.len());
            let worth = worth_checking(proposed, tau).min(room);
            let tokens = proposed[..worth].iter().map(|candidate| candidate.token);
            let end = tokens.clone().position(|token| self.is_stop(token)).map_or(worth, |at| at + 1);
            self.draft.extend(tokens.take(end));
        }
        if over.is_none() {
            self.send_ahead(events);
        }
        over.or_else(|| self.capped())
    }

    /// Counts the pass and, of raw requests, tells what it gave.
    fn report(&mut self, first_position: u32, said: &[Candidate], events: &mut Vec<Event>) {
        let from_prompt = first_position == (self.request.prompt.len() + self.request.committed.len()) as u32;
        let pass = if from_prompt { -1 } else { self.passes as i32 };
        self.nfe += 1;
        self.passes += u32::from(!from_prompt);
        if !self.request.raw {
            return;
        }
        let fill = |(position, &Candidate { token, confidence, .. })| Fill { position, token, pass, confidence };
        let trace = BlockTrace {
            first_position,
            tokens: said.iter().map(|candidate| candidate.token).collect(),
            fills: (first_position..).zip(said).map(fill).collect(),
            edits: Vec::new(),
            passes: self.passes,
        };
        events.push(Event::Trace { id: self.request.id, trace });
    }

    /// Shows the draft to who asked for it.
    fn send_ahead(&self, events: &mut Vec<Event>) {
        if self.request.drafts && !self.draft.is_empty() {
            events.push(Event::Draft {
                id: self.request.id,
                first_position: self.tokens.len() as u32,
                tokens: self.draft.clone(),
                masked: vec![false; self.draft.len()],
                step: self.passes,
            });
        }
    }
}
