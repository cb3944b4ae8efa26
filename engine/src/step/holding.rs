//! The pages of a life: taken, found again, published, given back.

use super::life::{Life, State};
use crate::pages::Pages;
use unmask_kernels::PAGE_SLOTS;

impl Life {
    /// Takes pages and begins; false, holding none, when there are too few.
    pub(super) fn attach(&mut self, pages: &mut Pages) -> bool {
        self.find_prefix(pages);
        let missing = Pages::needed(self.canvas_end) - self.pages.len();
        if pages.free() < missing {
            pages.release_all(&mut self.pages);
            return false;
        }
        self.published = self.pages.len();
        let next = (self.published * PAGE_SLOTS) as u32;
        self.pages.extend((0..missing).map_while(|_| pages.take()));
        let nothing_left = !self.autoregressive() && next == self.block_start();
        self.state = if nothing_left {
            State::Denoise { block: self.open_block(), store: None }
        } else {
            State::Prefill { next }
        };
        true
    }

    /// Holds the pages of the longest prefix that somebody has computed. What the first block opens with, or the row
    /// that scores the first token, is left to be run.
    fn find_prefix(&mut self, pages: &mut Pages) {
        let most = if self.autoregressive() { self.tokens.len() as u32 - 1 } else { self.block_start() };
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
        pages.release_all(&mut self.pages);
        self.published = 0;
        self.state = State::Queued;
    }
}
