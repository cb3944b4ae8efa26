//! The open block: provisional tokens, and how a policy's choice changes them.

use crate::policy::{Candidate, Change, Policy, View};
use crate::request::{BlockTrace, DraftText, Edit, Fill};

/// B positions being decoded together.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenBlock {
    /// Absolute position of the first row.
    pub start: u32,
    /// Tokens; meaningless where masked.
    pub tokens: Vec<u32>,
    /// Positions still masked.
    pub masked: Vec<bool>,
    /// Leading positions that hold prompt tokens.
    pub prompt_len: usize,
    /// Positions of a given text that may not change.
    fixed: Vec<bool>,
    /// Denoise passes so far.
    pub step: u32,
    /// Masks the block opened with.
    pub masks_at_start: u32,
    /// Whether its first position was scored by a row before the block.
    given: bool,
    /// Denoise passes since the last mask fell.
    post_steps: u32,
    trace: BlockTrace,
}

/// What a pass did to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// More passes are needed.
    Open,
    /// Every position is final. `changed`: the last pass wrote something, so cached keys are stale.
    Done {
        /// Whether the last pass wrote something.
        changed: bool,
    },
}

impl OpenBlock {
    /// A block `[start, start + len)` that begins with `prompt` and is masked after it.
    pub fn new(start: u32, len: usize, prompt: &[u32]) -> Self {
        let mut tokens = prompt.to_vec();
        tokens.resize(len, 0);
        let masked: Vec<bool> = (0..len).map(|i| i >= prompt.len()).collect();
        Self {
            start,
            tokens,
            masked,
            prompt_len: prompt.len(),
            fixed: vec![false; len],
            step: 0,
            given: false,
            masks_at_start: (len - prompt.len()) as u32,
            post_steps: 0,
            trace: BlockTrace { first_position: start, ..BlockTrace::default() },
        }
    }

    /// Puts a given text in place of the masks, from position `from` of it on. Behind its end `end_id` stands and stays.
    pub fn take_draft(&mut self, draft: &DraftText, from: usize, end_id: u32) {
        for i in self.prompt_len..self.len() {
            let at = from + i - self.prompt_len;
            let given = draft.tokens.get(at).map(|&token| (token, draft.masked[at], draft.fixed[at]));
            (self.tokens[i], self.masked[i], self.fixed[i]) = given.unwrap_or((end_id, false, true));
        }
        self.masks_at_start = self.masked.iter().filter(|&&masked| masked).count() as u32;
    }

    /// Whether position `i` may change at all.
    pub fn is_immutable(&self, i: usize) -> bool {
        i < self.prompt_len || self.fixed[i]
    }

    /// Fills the first position with what a row before the block says, in a pass that was no denoise pass.
    pub fn reveal_first(&mut self, candidate: &Candidate) {
        let &Candidate { token, confidence, .. } = candidate;
        (self.tokens[0], self.masked[0], self.given) = (token, false, true);
        self.trace.fills.push(Fill { position: self.start, token, pass: -1, confidence });
    }

    /// Passes that decided something in it.
    pub fn passes(&self) -> u32 {
        self.step + u32::from(self.given)
    }

    /// Rows of the block.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the block has no rows.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Whether row `i` needs the head: it can still change.
    pub fn can_change(&self, i: usize, policy: &Policy) -> bool {
        self.masked[i] || (policy.edits() && !self.is_immutable(i))
    }

    /// The block as a policy sees it. `immutable` and `random` are buffers of the block's length.
    pub fn view<'a>(
        &'a self,
        immutable: &'a [bool],
        candidates: &'a [Candidate],
        random: &'a [u32],
        block_size: u32,
    ) -> View<'a> {
        View {
            tokens: &self.tokens,
            masked: &self.masked,
            immutable,
            candidates,
            step: self.step,
            masks_at_start: self.masks_at_start,
            block_size,
            random,
        }
    }

    /// Writes a pass's changes. `pass` is the index of the pass within the request.
    pub fn apply(&mut self, policy: &Policy, changes: &[Change], candidates: &[Candidate], pass: i32) -> Progress {
        let had_masks = self.masked.contains(&true);
        for &Change { index, token } in changes {
            let position = self.start + index as u32;
            let confidence = candidates[index].confidence;
            if std::mem::take(&mut self.masked[index]) {
                self.trace.fills.push(Fill { position, token, pass, confidence });
            } else {
                let old = self.tokens[index];
                self.trace.edits.push(Edit { position, old, new: token, pass, confidence });
            }
            self.tokens[index] = token;
        }
        self.step += 1;
        let changed = !changes.is_empty();
        if self.masked.contains(&true) {
            return Progress::Open;
        }
        match policy {
            Policy::JointEdit { max_post_steps, .. } => {
                if !had_masks && !changed {
                    return Progress::Done { changed: false };
                }
                self.post_steps += 1;
                if self.post_steps > *max_post_steps { Progress::Done { changed } } else { Progress::Open }
            }
            _ => Progress::Done { changed },
        }
    }

    /// Index of the first stop token of the output with no mask before it.
    pub fn settled_stop(&self, is_stop: impl Fn(u32) -> bool) -> Option<usize> {
        let first_mask = self.masked.iter().position(|&m| m).unwrap_or(self.len());
        (self.prompt_len..first_mask).find(|&i| is_stop(self.tokens[i]))
    }

    /// The block's history, with its tokens as they are.
    pub fn into_trace(self, passes: u32) -> BlockTrace {
        BlockTrace { tokens: self.tokens, passes, ..self.trace }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(n: usize) -> Vec<Candidate> {
        vec![Candidate { token: 9, confidence: 0.5, ..Candidate::default() }; n]
    }

    fn changes(indices: &[usize]) -> Vec<Change> {
        indices.iter().map(|&index| Change { index, token: 9 }).collect()
    }

    const THRESHOLD: Policy =
        Policy::Threshold { tau: 0.9, comparison: crate::policy::Comparison::Strict, quota_steps: None };

    #[test]
    fn a_block_is_done_when_its_last_mask_falls() {
        let mut block = OpenBlock::new(8, 4, &[1, 2]);
        assert_eq!(block.apply(&THRESHOLD, &changes(&[3]), &candidates(4), 0), Progress::Open);
        assert_eq!(block.apply(&THRESHOLD, &changes(&[2]), &candidates(4), 1), Progress::Done { changed: true });
        let trace = block.into_trace(2);
        assert_eq!(trace.tokens, [1, 2, 9, 9]);
        assert_eq!(trace.fills.iter().map(|f| (f.position, f.pass)).collect::<Vec<_>>(), [(11, 0), (10, 1)]);
    }

    #[test]
    fn edits_settle_or_run_out_of_post_steps() {
        let policy = Policy::JointEdit { tau: 0.9, tau_edit: 0.9, max_post_steps: 2, at_least: 1 };
        let mut block = OpenBlock::new(0, 2, &[]);
        assert_eq!(block.apply(&policy, &changes(&[0, 1]), &candidates(2), 0), Progress::Open);
        let mut settled = block.clone();
        assert_eq!(settled.apply(&policy, &[], &candidates(2), 1), Progress::Done { changed: false });
        assert_eq!(block.apply(&policy, &changes(&[1]), &candidates(2), 1), Progress::Open);
        assert_eq!(block.apply(&policy, &changes(&[0]), &candidates(2), 2), Progress::Done { changed: true });
    }

    #[test]
    fn a_stop_counts_only_without_masks_before_it() {
        let mut block = OpenBlock::new(0, 4, &[9]);
        assert_eq!(block.settled_stop(|t| t == 9), None);
        block.apply(&THRESHOLD, &changes(&[2]), &candidates(4), 0);
        assert_eq!(block.settled_stop(|t| t == 9), None);
        block.apply(&THRESHOLD, &changes(&[1]), &candidates(4), 1);
        assert_eq!(block.settled_stop(|t| t == 9), Some(1));
    }
}
