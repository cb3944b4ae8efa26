//! One request's life: its state, the rows it needs, what a pass makes of it.

use super::admission;
use crate::block::{OpenBlock, Progress};
use crate::draw::{Purpose, key};
use crate::model::{Model, Reach};
use crate::plan::Grant;
use crate::policy::{Candidate, Change, View, decide};
use crate::prefix::Chain;
use crate::request::{Cache, Ends, Event, Reason, Request};
use std::cmp::Reverse;
use std::ops::Range;

/// Where a request stands. Kept rows `[kept, ..)` are those whose final keys and values are still to come.
#[derive(Debug)]
pub(super) enum State {
    /// Waits for a place and pages; nothing is computed, or what was is given up.
    Queued,
    /// Prompt rows from `next` on are to be computed; the first block follows in the pass that ends them.
    Prefill { next: u32 },
    /// A block is open. Rows of the block before it, from `store` on, ride along with its first pass.
    Denoise { block: OpenBlock, store: Option<u32> },
    /// Of shifted families: kept rows from `next` on are computed by themselves, since the last of them scores the
    /// first position of the block that opens then.
    Store { next: u32 },
    /// Causal rows decide: those from `next` on are to be computed, the last one scores the next position.
    Decode { next: u32 },
    /// Over; rows before `kept` were kept.
    Finished { kept: u32 },
}

/// Place in the order: priority, deadline, age. Less is sooner; no two are equal.
pub(super) type Rank = (Reverse<i32>, u64, u64);

/// A request from submission to end.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) request: Request,
    /// Pages of positions from 0 on; empty while queued.
    pub(super) pages: Vec<u32>,
    pub(super) paused: bool,
    /// Number of the step that last carried its rows, or in which it could not run.
    pub(super) last_step: u64,
    pub(super) state: State,
    pub(super) arrival: u64,
    /// Prompt and everything committed.
    pub(super) tokens: Vec<u32>,
    /// What masks propose to follow, to be checked by causal rows. Kept when pages are given up: passes are the same then.
    pub(super) draft: Vec<u32>,
    /// Masks that draft what follows; 0 where nothing is drafted.
    pub(super) drafted: u32,
    /// Names of its pages.
    pub(super) chain: Chain,
    /// Leading pages that others may find.
    pub(super) published: usize,
    pub(super) kept_reach: Reach,
    pub(super) open_reach: Reach,
    /// Row i scores position i + 1, also in open blocks.
    pub(super) shift: bool,
    ends: Ends,
    /// Where the first block begins: 0, or the end of the prompt.
    pub(super) origin: u32,
    pub(super) block_size: u32,
    /// Positions of a block that may fall together.
    sub_block: u32,
    /// One past the last position that is decoded.
    pub(super) output_end: u32,
    /// One past the last position.
    pub(super) canvas_end: u32,
    /// End-of-sequence ids of the model; none for raw requests, whose stop ids say it all, and where a text is edited.
    eos_ids: Vec<u32>,
    /// What stands behind the end of an edited text.
    end_id: u32,
    pub(super) mask_id: u32,
    /// Passes that decided tokens.
    pub(super) nfe: u32,
    /// Denoise or decode passes of this run, the index that traces give.
    pub(super) passes: u32,
    #[cfg(test)]
    pub(super) panics: bool,
}

/// What a policy is given and gives; buffers of one block, kept between steps.
#[derive(Debug, Default)]
pub(super) struct Deciding {
    spread: Vec<Candidate>,
    masked: Vec<bool>,
    immutable: Vec<bool>,
    random: Vec<u32>,
    changes: Vec<Change>,
}

impl Life {
    pub(super) fn new(request: Request, arrival: u64, model: &Model) -> Self {
        let config = model.config();
        let block_size = admission::block_size(&request);
        let causal = request.settings.policy.is_causal();
        let prompt_len = request.prompt.len() as u32;
        // What an earlier run committed counts only in whole blocks: the rest is decoded again.
        let end = prompt_len + request.committed.len() as u32;
        let origin = admission::origin(&request, config);
        let boundary = (end - (end - origin.min(end)) % block_size).max(prompt_len);
        let mut tokens = request.prompt.clone();
        tokens.extend(&request.committed[..(boundary - prompt_len) as usize]);
        let kept_reach = if causal { Reach::Causal } else { config.kept_reach };
        let reaches_over = match kept_reach {
            Reach::Causal => 1,
            Reach::Block => block_size,
            // No row is final before the last one is known.
            Reach::Bidirectional => u32::MAX,
        };
        Self {
            chain: Chain::new(model.numerics_id(), reaches_over, request.salt),
            published: 0,
            ends: admission::ends(&request, config),
            output_end: admission::output_end(&request, config),
            canvas_end: admission::canvas_end(&request, config),
            nfe: request.passes_used,
            pages: Vec::new(),
            paused: false,
            last_step: 0,
            state: State::Queued,
            arrival,
            tokens,
            draft: Vec::new(),
            drafted: admission::drafted(&request),
            kept_reach,
            open_reach: if causal { Reach::Causal } else { config.open_reach },
            shift: config.shift && !causal,
            origin,
            block_size,
            sub_block: admission::sub_block(&request, config),
            eos_ids: if request.raw || request.draft.is_some() { Vec::new() } else { config.eos_ids.clone() },
            end_id: config.eos_ids.first().copied().unwrap_or(0),
            mask_id: config.mask_id.unwrap_or(0),
            passes: 0,
            request,
            #[cfg(test)]
            panics: false,
        }
    }

    /// Its place in the order.
    pub(super) fn rank(&self) -> Rank {
        (Reverse(self.request.priority), self.request.deadline.unwrap_or(u64::MAX), self.arrival)
    }

    /// Whether the next step may carry rows of it.
    pub(super) fn can_run(&self) -> bool {
        !self.paused && self.has_pages()
    }

    /// Whether causal rows decide, and there are no blocks.
    pub(super) fn causal(&self) -> bool {
        self.request.settings.policy.is_causal()
    }

    /// First position of the block that holds the next undecided position.
    pub(super) fn block_start(&self) -> u32 {
        let len = self.tokens.len() as u32;
        len - (len - self.origin) % self.block_size
    }

    /// Whether every pass computes the whole canvas, because each row attends to all of it.
    pub(super) fn whole(&self) -> bool {
        self.open_reach == Reach::Bidirectional
    }

    /// Whether the first position of the block to open is scored by the last kept row.
    pub(super) fn stores_first(&self) -> bool {
        self.shift && !self.whole() && self.block_start() == self.tokens.len() as u32
    }

    pub(super) fn open_block(&self) -> OpenBlock {
        let start = self.block_start();
        let len = self.block_size.min(self.output_end - start);
        let mut block = OpenBlock::new(start, len as usize, &self.tokens[start as usize..]);
        if let Some(draft) = &self.request.draft {
            block.take_draft(draft, self.tokens.len() - self.request.prompt.len(), self.end_id);
        }
        block
    }

    /// Indices of the block that may fall in the next pass: the first part with masks. Where an earlier pass stands for
    /// the rows before the block, its first position has no row that scores it later: it falls first, and alone.
    pub(super) fn part(&self, block: &OpenBlock) -> Range<usize> {
        let cached = self.request.settings.manner.cache != Cache::None;
        if self.whole() && self.shift && cached && block.step == 0 && block.prompt_len == 0 {
            return 0..1;
        }
        let first = block.masked.iter().position(|&masked| masked).unwrap_or(0);
        let size = self.sub_block as usize;
        let start = first - first % size;
        start..(start + size).min(block.len())
    }

    /// Indices of the block whose rows need the head.
    pub(super) fn scored<'a>(&'a self, block: &'a OpenBlock) -> impl Iterator<Item = usize> + 'a {
        let policy = &self.request.settings.policy;
        self.part(block).filter(|&i| block.can_change(i, policy))
    }

    /// Rows before this have their final keys and values in the pages.
    pub(super) fn kept(&self) -> u32 {
        match &self.state {
            State::Queued => 0,
            State::Prefill { next } | State::Decode { next } | State::Store { next } => *next,
            State::Denoise { .. } if self.whole() => 0,
            State::Denoise { block, store } => store.unwrap_or(block.start),
            State::Finished { kept } => *kept,
        }
    }

    /// Rows not yet done.
    pub(super) fn outstanding(&self) -> u64 {
        u64::from(self.canvas_end.saturating_sub(self.kept()))
    }

    pub(super) fn is_stop(&self, token: u32) -> bool {
        self.eos_ids.contains(&token) || self.request.settings.stop_ids.contains(&token)
    }

    /// Takes a pass's candidates (one per output row, in order) and says whether the request is over.
    pub(super) fn advance(
        &mut self,
        grant: Grant,
        candidates: &[Candidate],
        deciding: &mut Deciding,
        events: &mut Vec<Event>,
    ) -> Option<Reason> {
        #[cfg(test)]
        assert!(!self.panics || matches!(self.state, State::Prefill { .. }), "as a test wants it");
        match &mut self.state {
            State::Prefill { next } => {
                *next += grant.kept;
                return None;
            }
            State::Decode { .. } => return self.advance_decode(grant, candidates, events),
            State::Store { .. } => return self.advance_store(candidates, events),
            State::Denoise { store, .. } => *store = None,
            State::Queued | State::Finished { .. } => return None,
        }
        self.advance_denoise(candidates, deciding, events)
    }

    /// Opens the next block with the token that the last stored row gives for its first position.
    fn advance_store(&mut self, candidates: &[Candidate], events: &mut Vec<Event>) -> Option<Reason> {
        let candidate = candidates.first()?;
        let mut block = self.open_block();
        block.reveal_first(candidate);
        self.nfe += 1;
        let output = admission::output_limit(&self.request);
        let last = block.len() == 1 || block.start + 1 == output;
        self.state = State::Denoise { block, store: None };
        if last || (self.ends.at_first_stop && self.is_stop(candidate.token)) {
            return self.finish_block(true, events);
        }
        self.capped()
    }

    fn advance_denoise(
        &mut self,
        candidates: &[Candidate],
        deciding: &mut Deciding,
        events: &mut Vec<Event>,
    ) -> Option<Reason> {
        let State::Denoise { block, .. } = &self.state else { return None };
        let (settings, part, len) = (&self.request.settings, self.part(block), block.len());
        let Deciding { spread, masked, immutable, random, changes } = deciding;
        spread.clear();
        spread.resize(len, Candidate::default());
        self.scored(block).zip(candidates).for_each(|(i, candidate)| spread[i] = *candidate);
        masked.clear();
        masked.extend((0..len).map(|i| block.masked[i] && part.contains(&i)));
        immutable.clear();
        immutable.extend((0..len).map(|i| block.is_immutable(i) || !part.contains(&i)));
        random.clear();
        random.extend((block.start..).take(len).map(|at| key(settings.sampling.seed, Purpose::Order, at, 0)[0]));
        decide(&settings.policy, &View { masked, ..block.view(immutable, spread, random, self.block_size) }, changes);
        let State::Denoise { block, .. } = &mut self.state else { return None };
        let progress = block.apply(&settings.policy, changes, spread, self.passes as i32);
        self.passes += 1;
        self.nfe += 1;
        match progress {
            Progress::Done { changed } => self.finish_block(changed, events),
            Progress::Open => {
                if self.ends.at_first_stop && self.stop_settled(changes) {
                    return self.finish_block(true, events);
                }
                self.send_draft(events);
                self.capped()
            }
        }
    }

    /// Whether the output's end is known: a stop token with no mask before it, and no edit up to it in this pass.
    fn stop_settled(&self, changes: &[Change]) -> bool {
        let State::Denoise { block, .. } = &self.state else { return false };
        let edits = self.request.settings.policy.edits();
        block
            .settled_stop(|token| self.is_stop(token))
            .is_some_and(|at| !edits || changes.iter().all(|change| change.index > at))
    }

    fn send_draft(&self, events: &mut Vec<Event>) {
        let State::Denoise { block, .. } = &self.state else { return };
        if self.request.drafts {
            events.push(Event::Draft {
                id: self.request.id,
                first_position: block.start,
                tokens: block.tokens.clone(),
                masked: block.masked.clone(),
                step: block.step,
            });
        }
    }

    /// Commits the open block and opens the next one.
    fn finish_block(&mut self, changed: bool, events: &mut Vec<Event>) -> Option<Reason> {
        let over = State::Finished { kept: self.block_start() };
        let State::Denoise { block, .. } = std::mem::replace(&mut self.state, over) else { return None };
        let (start, steps) = (block.start, block.passes());
        // Masks can be left only behind a stop token, where nothing is read.
        let first_mask = block.masked.iter().position(|&m| m).unwrap_or(block.len());
        let fresh = block.tokens[block.prompt_len..first_mask].to_vec();
        let first_position = start + block.prompt_len as u32;
        if self.request.raw {
            events.push(Event::Trace { id: self.request.id, trace: block.into_trace(self.passes) });
        }
        let over = self.commit(first_position, &fresh, steps, events);
        if over.is_some() {
            return over;
        }
        if self.stores_first() {
            self.state = State::Store { next: start };
            return self.capped();
        }
        // The last pass saw the final tokens only if it changed nothing; then, where kept rows reach as far as
        // open ones, their keys and values stand.
        let stands = self.whole() || (!changed && self.kept_reach == self.open_reach);
        self.state = State::Denoise { block: self.open_block(), store: (!stands).then_some(start) };
        self.capped()
    }

    /// Makes tokens part of the output, up to a stop token or the length asked for.
    pub(super) fn commit(
        &mut self,
        first_position: u32,
        fresh: &[u32],
        steps: u32,
        events: &mut Vec<Event>,
    ) -> Option<Reason> {
        let limit = admission::output_limit(&self.request);
        let room = (limit - first_position) as usize;
        let stop = fresh.iter().position(|&token| self.is_stop(token));
        let (count, reason) = match stop {
            Some(at) if at < room && self.eos_ids.contains(&fresh[at]) => (at, Some(Reason::Eos)),
            Some(at) if at < room => (at, Some(Reason::Stop)),
            _ if fresh.len() >= room => (room, Some(Reason::Length)),
            _ => (fresh.len(), None),
        };
        self.tokens.extend(&fresh[..count]);
        if count > 0 {
            let tokens = fresh[..count].to_vec();
            events.push(Event::Commit { id: self.request.id, first_position, tokens, steps });
        }
        reason
    }

    pub(super) fn capped(&self) -> Option<Reason> {
        let cap = self.request.settings.nfe_cap;
        (cap > 0 && self.nfe >= cap).then_some(Reason::NfeCap)
    }

    /// The event that ends the request.
    pub(super) fn finished(&self, reason: Reason) -> Event {
        let Request { prompt, suffix, .. } = &self.request;
        Event::Finished {
            id: self.request.id,
            reason,
            nfe: self.nfe,
            prompt_tokens: (prompt.len() + suffix.len()) as u32,
            completion_tokens: (self.tokens.len() - prompt.len()) as u32,
        }
    }
}
