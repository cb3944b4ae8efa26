//! Key/value pages: who holds which, and which still hold a prefix that may be found again. The bytes live in the
//! kernels' cache.
//!
//! A page is free (its content is worthless), held by one or more requests, or idle: held by nobody, but published
//! under the key of its content. Idle pages count as free and are taken, the longest unused first, when no other is left.

use crate::prefix::Key;
use std::collections::{BTreeMap, HashMap};
use unmask_kernels::PAGE_SLOTS;

/// A fixed number of pages.
#[derive(Debug)]
pub struct Pages {
    /// Neither held nor published.
    free: Vec<u32>,
    slots: Vec<Slot>,
    /// Published pages, held or idle.
    published: HashMap<Key, u32>,
    /// Idle pages by when they became so.
    idle: BTreeMap<u64, u32>,
    idle_max: usize,
    /// Rises with every page that becomes idle.
    clock: u64,
}

/// What is known of one page.
#[derive(Debug, Clone, Default)]
struct Slot {
    /// Requests that hold it.
    holders: u32,
    /// What it was published under.
    key: Option<Key>,
    /// Its place among the idle ones; meaningless while held.
    idle_since: u64,
}

impl Pages {
    /// `total` pages, all free; at most `idle_max` keep their content when nobody holds them.
    pub fn new(total: usize, idle_max: usize) -> Self {
        Self {
            free: (0..total as u32).rev().collect(),
            slots: vec![Slot::default(); total],
            published: HashMap::with_capacity(total),
            idle: BTreeMap::new(),
            idle_max,
            clock: 0,
        }
    }

    /// Pages needed for `positions` positions.
    pub fn needed(positions: u32) -> usize {
        (positions as usize).div_ceil(PAGE_SLOTS)
    }

    /// A page for one holder, with worthless content. The longest idle page is given up when no other is left.
    pub fn take(&mut self) -> Option<u32> {
        if self.free.is_empty() {
            self.evict();
        }
        let page = self.free.pop()?;
        self.slots[page as usize].holders = 1;
        Some(page)
    }

    /// The page published under `key`, with one more holder.
    pub fn find(&mut self, key: &Key) -> Option<u32> {
        let page = *self.published.get(key)?;
        let slot = &mut self.slots[page as usize];
        if slot.holders == 0 {
            self.idle.remove(&slot.idle_since);
        }
        slot.holders += 1;
        Some(page)
    }

    /// Publishes a held page whose content is final. When another page has the same content the caller holds that
    /// one from now on, and `page` is free; the page to use is returned.
    pub fn publish(&mut self, page: u32, key: Key) -> u32 {
        if self.idle_max == 0 {
            return page;
        }
        match self.find(&key) {
            Some(same) => {
                self.release(page);
                same
            }
            None => {
                self.slots[page as usize].key = Some(key);
                self.published.insert(key, page);
                page
            }
        }
    }

    /// Takes one holder from a page.
    ///
    /// # Panics
    /// When nobody holds it: going on would hand the page to two requests.
    pub fn release(&mut self, page: u32) {
        let slot = &mut self.slots[page as usize];
        assert!(slot.holders > 0, "page {page} was given back twice");
        slot.holders -= 1;
        if slot.holders > 0 {
            return;
        }
        if slot.key.is_none() {
            self.free.push(page);
            return;
        }
        self.clock += 1;
        slot.idle_since = self.clock;
        self.idle.insert(self.clock, page);
        if self.idle.len() > self.idle_max {
            self.evict();
        }
    }

    /// Takes one holder from each page. The last goes first: a prefix is worth nothing without its beginning, so
    /// that is what is given up last.
    pub fn release_all(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            self.release(page);
        }
    }

    /// A bug for a simulation to find: a page that is held counts as free.
    pub(crate) fn give_again(&mut self, page: u32) {
        self.free.push(page);
    }

    fn evict(&mut self) {
        if let Some((_, page)) = self.idle.pop_first() {
            if let Some(key) = self.slots[page as usize].key.take() {
                self.published.remove(&key);
            }
            self.free.push(page);
        }
    }

    /// Pages nobody holds, idle ones among them.
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages nobody holds whose content may be found again.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.slots.len()
    }

    /// Checks the books against who holds what (I7): every page is free, idle, or held exactly as often as `held`
    /// names it.
    #[cfg(test)]
    pub(crate) fn audit<'a>(&self, held: impl Iterator<Item = &'a u32>) -> Result<(), String> {
        let mut holders = vec![0; self.slots.len()];
        held.for_each(|&page| holders[page as usize] += 1);
        let mut places = vec![0; self.slots.len()];
        self.free.iter().chain(self.idle.values()).for_each(|&page| places[page as usize] += 1);
        for (page, slot) in self.slots.iter().enumerate() {
            let free_places = usize::from(slot.holders == 0);
            if slot.holders != holders[page] || places[page] != free_places {
                return Err(format!(
                    "page {page}: {slot:?}, held {} times, free {} times",
                    holders[page], places[page]
                ));
            }
            let found = slot.key.map(|key| self.published.get(&key).copied());
            if found.is_some_and(|found| found != Some(page as u32)) {
                return Err(format!("page {page} is published under a key that leads elsewhere"));
            }
        }
        let keys = self.slots.iter().filter(|slot| slot.key.is_some()).count();
        let unpublished = self.free.iter().all(|&page| self.slots[page as usize].key.is_none());
        if keys != self.published.len() || !unpublished || self.idle.len() > self.idle_max {
            return Err(format!("{keys} keys, {} published, {} idle", self.published.len(), self.idle.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: u8) -> Key {
        [n; 32]
    }

    proptest! {
        /// I7: whatever is taken, found, published and given back, the books balance.
        #[test]
        fn pages_are_never_lost_nor_shared_by_accident(
            operations in prop::collection::vec((0u8..4, 0u8..12), 1..200),
            idle_max in prop::sample::select(vec![0usize, 3, 24]),
        ) {
            let mut pages = Pages::new(24, idle_max);
            let mut held: Vec<u32> = Vec::new();
            // Pages that somebody may still write to.
            let mut private: Vec<u32> = Vec::new();
            for (operation, n) in operations {
                match operation {
                    0 => if let Some(page) = pages.take() {
                        prop_assert!(!held.contains(&page));
                        held.push(page);
                        private.push(page);
                    },
                    1 => held.extend(pages.find(&key(n))),
                    2 => if let Some(page) = private.pop() {
                        let at = held.iter().position(|&p| p == page).unwrap();
                        held[at] = pages.publish(page, key(n));
                    },
                    _ if held.is_empty() => {}
                    _ => {
                        let page = held.swap_remove(n as usize % held.len());
                        private.retain(|&p| p != page);
                        pages.release(page);
                    }
                }
                prop_assert_eq!(pages.audit(held.iter()), Ok(()));
            }
        }
    }

    #[test]
    fn the_longest_idle_page_is_taken_and_a_prefix_loses_its_end_first() {
        let mut pages = Pages::new(3, 3);
        let mut held: Vec<u32> = (0..3)
            .map(|n| {
                let page = pages.take().unwrap();
                pages.publish(page, key(n))
            })
            .collect();
        assert_eq!(pages.take(), None);
        pages.release_all(&mut held);
        assert_eq!((pages.free(), pages.idle()), (3, 3));
        pages.take().unwrap();
        assert!(pages.find(&key(2)).is_none());
        assert!(pages.find(&key(0)).is_some() && pages.find(&key(1)).is_some());
    }

    #[test]
    fn equal_content_is_held_once() {
        let mut pages = Pages::new(2, 2);
        let (first, second) = (pages.take().unwrap(), pages.take().unwrap());
        assert_eq!(pages.publish(first, key(1)), first);
        assert_eq!(pages.publish(second, key(1)), first);
        assert_eq!(pages.free(), 1);
        pages.audit([first, first].iter()).unwrap();
    }

    #[test]
    fn a_partial_page_counts_whole() {
        assert_eq!((Pages::needed(0), Pages::needed(1), Pages::needed(PAGE_SLOTS as u32 + 1)), (0, 1, 2));
    }
}
