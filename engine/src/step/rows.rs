//! The rows of one request in a pass: what it could use, and what a grant puts into the batch.

use super::Batch;
use super::life::{Life, State};
use crate::block::OpenBlock;
use crate::draw::{Purpose, key};
use crate::model::{Reach, row_end};
use crate::plan::{Grant, Need};
use crate::request::Cache;
use std::ops::Range;
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
            State::Prefill { next } if self.causal() || self.stores_first() => {
                Need { kept: len - next, open: self.rows_ahead(), splits: true, ..base }
            }
            State::Prefill { next } => {
                let start = self.block_start();
                let open = self.block_size.min(self.output_end - start);
                Need { kept: start - next, open, splits: true, ..base }
            }
            State::Denoise { block, store } => {
                let kept = store.map_or(0, |from| block.start - from);
                Need { kept, open: self.window(block).len() as u32, ..base }
            }
            State::Decode { next } => Need { kept: len - next, open: self.rows_ahead(), ..base },
            State::Store { next } => Need { kept: len - next, ..base },
            State::Queued | State::Finished { .. } => base,
        }
    }

    /// Appends the granted rows to the batch, and opens the first block when the prompt's last rows are among them.
    pub(super) fn push_rows(&mut self, grant: Grant, sequence: u32, batch: &mut Batch) {
        if let (State::Prefill { next }, true) = (&self.state, grant.open) {
            let next = *next;
            self.state = if self.causal() {
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
            State::Denoise { block, .. } if grant.open => self.push_window(block, sequence, batch),
            State::Decode { .. } if grant.open => self.push_ahead(sequence, batch),
            State::Store { .. } => {
                batch.outputs.push(batch.rows.len() as u32 - 1);
                batch.draws.push(self.draw(self.tokens.len() as u32, 0));
            }
            _ => {}
        }
    }

    /// Positions that a pass over an open block computes: the block, or of families that read everything at once the
    /// whole canvas; less where a cache stands for the rest.
    fn window(&self, block: &OpenBlock) -> Range<u32> {
        let open = block.start..block.start + block.len() as u32;
        let cache = if block.step == 0 { Cache::None } else { self.request.settings.manner.cache };
        match (self.whole(), cache) {
            (true, Cache::None) => 0..self.canvas_end,
            (true, Cache::Prefix) => open.start..self.canvas_end,
            (true, Cache::Dual) | (false, Cache::None | Cache::Prefix) => open,
            (false, Cache::Dual) => {
                let part = self.part(block);
                // Its first position is scored by the row before it, which must then be computed too.
                if block.masked[part.start] {
                    return open;
                }
                open.start + part.start as u32..open.start + part.end as u32
            }
        }
    }

    /// Appends the rows of the window. Behind the block everything is masked, but for what stands behind the output.
    fn push_window(&self, block: &OpenBlock, sequence: u32, batch: &mut Batch) {
        let window = self.window(block);
        let first = batch.rows.len() as u32;
        for i in self.scored(block) {
            let position = block.start + i as u32;
            batch.outputs.push(first + position - u32::from(self.shift) - window.start);
            batch.draws.push(self.draw(position, block.step));
        }
        let block_end = block.start + block.len() as u32;
        for position in window {
            let id = if position < block.start {
                self.tokens[position as usize]
            } else if position >= self.output_end {
                self.request.suffix[(position - self.output_end) as usize]
            } else {
                let i = (position - block.start) as usize;
                if block.masked.get(i) == Some(&false) { block.tokens[i] } else { self.mask_id }
            };
            let end = match self.open_reach {
                Reach::Causal => position + 1,
                Reach::Block => block_end,
                Reach::Bidirectional => self.canvas_end,
            };
            batch.ids.push(id);
            batch.rows.push(Row { sequence, position, end });
        }
    }

    pub(super) fn draw(&self, position: u32, step: u32) -> Draw {
        let sampling = &self.request.settings.sampling;
        Draw { temperature: sampling.temperature, key: key(sampling.seed, Purpose::Token, position, step) }
    }
}
