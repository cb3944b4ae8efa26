//! The pages of a life: taken, found again, published, given back.

use super::life::{Life, State};
use crate::pages::Pages;
use unmask_kernels::PAGE_SLOTS;

impl Life {
    /// Takes the pages of the prompt, what is committed and the first block, and begins. Holds none when that would
    /// leave fewer than `spare` free.
    ///
    /// # Errors
    /// The pages it lacks beyond what it found.
    pub(super) fn attach(&mut self, pages: &mut Pages, spare: usize) -> Result<(), usize> {
        self.find_prefix(pages);
        let missing = Pages::needed(self.rows_end()) - self.pages.len();
        if pages.free() < missing + spare {
            pages.release_all(&mut self.pages);
            return Err(missing);
        }
        self.published = self.pages.len();
        let next = (self.published * PAGE_SLOTS) as u32;
        let nothing_left = self.whole() || !self.causal() && next == self.block_start() && !self.stores_first();
        self.state = if nothing_left {
            State::Denoise { block: self.open_block(), store: None }
        } else {
            State::Prefill { next }
        };
        self.grow(pages);
        Ok(())
    }

    /// Takes the pages its next rows fall into; false when there are too few.
    pub(super) fn grow(&mut self, pages: &mut Pages) -> bool {
        while !self.has_pages() {
            match pages.take() {
                Some(page) => self.pages.push(page),
                None => return false,
            }
        }
        true
    }

    /// Whether its next rows have their pages.
    pub(super) fn has_pages(&self) -> bool {
        self.pages.len() >= Pages::needed(self.rows_end())
    }

    /// One past the last position that the next passes write, up to the end of the open block.
    fn rows_end(&self) -> u32 {
        let len = self.tokens.len() as u32;
        if self.causal() {
            len + self.rows_ahead()
        } else if self.whole() {
            self.canvas_end
        } else {
            (self.block_start() + self.block_size).min(self.canvas_end)
        }
    }

    /// Holds the pages of the longest prefix that somebody has computed. What the first block opens with, or the row
    /// that scores the first token, is left to be run.
    fn find_prefix(&mut self, pages: &mut Pages) {
        let scores = self.causal() || self.stores_first();
        let most = if scores { self.tokens.len() as u32 - 1 } else { self.block_start() };
        for index in 0..self.chain.whole_pages(most) {
            let key = self.chain.key(index, &self.tokens);
            match pages.find(&key) {
                Some(page) => self.pages.push(page),
                None => break,
            }
        }
        while !self.chain.may_stop_at(self.pages.len()) {
            self.pages.pop().into_iter().for_each(|page| pages.release(page));
        }
    }

    /// Lets others find the pages that have become whole since the last call.
    pub(super) fn publish(&mut self, pages: &mut Pages) {
        for index in self.published..self.chain.whole_pages(self.kept()) {
            let key = self.chain.key(index, &self.tokens);
            self.pages[index] = pages.publish(self.pages[index], key);
            self.published = index + 1;
        }
    }

    /// Gives its pages back, and what is provisional with them: it waits at its last committed block.
    pub(super) fn detach(&mut self, pages: &mut Pages) {
        if let State::Denoise { block, .. } = &self.state {
            // These passes will be had again: neither the cap nor the report may tell the difference.
            self.nfe -= block.passes();
            self.passes -= block.step;
        }
        pages.release_all(&mut self.pages);
        self.published = 0;
        self.state = State::Queued;
    }
}
