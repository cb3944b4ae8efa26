//! Key/value pages: who holds which. The bytes live in the kernels' cache.

use unmask_kernels::PAGE_SLOTS;

/// Free list over a fixed number of pages.
#[derive(Debug)]
pub struct Pages {
    free: Vec<u32>,
    total: usize,
}

impl Pages {
    /// `total` pages, all free.
    pub fn new(total: usize) -> Self {
        Self { free: (0..total as u32).rev().collect(), total }
    }

    /// Pages needed for `positions` positions.
    pub fn needed(positions: u32) -> usize {
        (positions as usize).div_ceil(PAGE_SLOTS)
    }

    /// Takes `count` pages, or none when fewer are free.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(rest))
    }

    /// Gives pages back.
    pub fn give(&mut self, pages: Vec<u32>) {
        self.free.extend(pages);
        debug_assert!(self.free.len() <= self.total, "a page was given back twice");
    }

    /// Pages nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn pages_are_never_shared_nor_lost(sizes in prop::collection::vec((0usize..9, any::<bool>()), 1..60)) {
            let mut pages = Pages::new(24);
            let mut held: Vec<Vec<u32>> = Vec::new();
            for (count, give) in sizes {
                if give && !held.is_empty() {
                    pages.give(held.remove(count % held.len()));
                } else if let Some(taken) = pages.take(count) {
                    held.push(taken);
                }
                let all: Vec<u32> = held.iter().flatten().copied().collect();
                prop_assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
                prop_assert_eq!(all.len() + pages.free(), pages.total());
            }
        }
    }

    #[test]
    fn a_partial_page_counts_whole() {
        assert_eq!((Pages::needed(0), Pages::needed(1), Pages::needed(PAGE_SLOTS as u32 + 1)), (0, 1, 2));
    }
}
