//! The rows of one request in a pass: what it could use, and what a grant puts into the batch.

use super::Batch;
use super::life::{Life, State};
use crate::block::OpenBlock;
use crate::draw::{Purpose, key};
use crate::model::{Reach, row_end};
use crate::plan::{Grant, Need};
use unmask_kernels::{Draw, Row};

impl Life {
    /// What the next step could do for this request.
    pub(super) fn need(&self, step: u64) -> Need {
        let granule = if self.kept_reach == Reach::Causal { 1 } else { self.block_size };
        let base = Need {
            priority: self.request.priority,
            deadline: self.request.deadline.unwrap_or(u64::MAX),
            arrival: self.arrival,
            waited: step.saturating_sub(self.last_step + 1),
            kept: 0,
            granule,
            open: 0,
            splits: false,
        };
        let len = self.tokens.len() as u32;
        match &self.state {
            State::Prefill { next } if self.autoregressive() || self.stores_first() => {
                Need { kept: len - next, splits: true, ..base }
            }
            State::Prefill { next } => {
                let start = self.block_start();
                let open = self.block_size.min(self.canvas_end - start);
                Need { kept: start - next, open, splits: true, ..base }
            }
            State::Denoise { .. } if self.whole() => Need { open: self.canvas_end, ..base },
            State::Denoise { block, store } => {
                Need { kept: store.map_or(0, |from| block.start - from), open: block.len() as u32, ..base }
            }
            State::Decode { next } | State::Store { next } => Need { kept: len - next, ..base },
            State::Queued | State::Finished { .. } => base,
        }
    }

    /// Appends the granted rows to the batch, and opens the first block when the prompt's last rows are among them.
    pub(super) fn push_rows(&mut self, grant: Grant, sequence: u32, batch: &mut Batch) {
        if let (State::Prefill { next }, true) = (&self.state, grant.open) {
            let next = *next;
            self.state = if self.autoregressive() {
                State::Decode { next }
            } else if self.stores_first() {
                State::Store { next }
            } else {
                State::Denoise { block: self.open_block(), store: Some(next) }
            };
        }
        let from = self.kept();
        for position in from..from + grant.kept {
            let end = row_end(self.kept_reach, position, self.block_size, self.canvas_end);
            batch.ids.push(self.tokens[position as usize]);
            batch.rows.push(Row { sequence, position, end });
        }
        match &self.state {
            State::Denoise { block, .. } if grant.open && self.whole() => self.push_canvas(block, sequence, batch),
            State::Denoise { block, .. } if grant.open => self.push_open_rows(block, sequence, batch),
            State::Decode { .. } | State::Store { .. } => {
                batch.outputs.push(batch.rows.len() as u32 - 1);
                batch.draws.push(self.draw(self.tokens.len() as u32, 0));
            }
            _ => {}
        }
    }

    fn push_open_rows(&self, block: &OpenBlock, sequence: u32, batch: &mut Batch) {
        let block_end = block.start + block.len() as u32;
        self.push_outputs(block, batch.rows.len() as u32, batch);
        for (i, position) in (block.start..block_end).enumerate() {
            let end = match self.open_reach {
                Reach::Causal => position + 1,
                Reach::Block | Reach::Bidirectional => block_end,
            };
            batch.ids.push(if block.masked[i] { self.mask_id } else { block.tokens[i] });
            batch.rows.push(Row { sequence, position, end });
        }
    }

    /// All rows: what is committed, the open block, and masks to the end of the canvas.
    fn push_canvas(&self, block: &OpenBlock, sequence: u32, batch: &mut Batch) {
        let end = self.canvas_end;
        self.push_outputs(block, batch.rows.len() as u32 + block.start, batch);
        let open = block.tokens.iter().zip(&block.masked).map(|(&id, &masked)| if masked { self.mask_id } else { id });
        let ids = self.tokens[..block.start as usize].iter().copied().chain(open);
        batch.ids.extend(ids.chain(std::iter::repeat(self.mask_id)).take(end as usize));
        batch.rows.extend((0..end).map(|position| Row { sequence, position, end }));
    }

    /// Names the rows that score what can still change in a block whose own first row is `first`.
    fn push_outputs(&self, block: &OpenBlock, first: u32, batch: &mut Batch) {
        let policy = &self.request.settings.policy;
        for i in (0..block.len()).filter(|&i| block.can_change(i, policy)) {
            batch.outputs.push(first + i as u32 - u32::from(self.shift));
            batch.draws.push(self.draw(block.start + i as u32, block.step));
        }
    }

    fn draw(&self, position: u32, step: u32) -> Draw {
        let sampling = &self.request.settings.sampling;
        Draw { temperature: sampling.temperature, key: key(sampling.seed, Purpose::Token, position, step) }
    }
}
