//! Names of pages by what is in them: a chain of digests over everything their keys and values depend on.
//!
//! A kept row depends on the weights and how they are computed with (the numerics id), on every token it attends to,
//! and, where kept rows reach to the end of their block, on the block size. The tenant's salt keeps tenants from
//! telling by the time of an answer what others have asked.

use sha2::{Digest as _, Sha256};
use unmask_kernels::PAGE_SLOTS;

/// Name of a page's content.
pub type Key = [u8; 32];

/// The keys of one request's pages, computed as far as they were asked for.
#[derive(Debug)]
pub struct Chain {
    root: Key,
    keys: Vec<Key>,
    /// Kept rows depend on tokens up to the next multiple of this: the block size, or 1 where they are causal.
    granule: usize,
}

impl Chain {
    /// The chain of a request whose kept rows reach to the next multiple of `granule`.
    pub fn new(numerics_id: &str, granule: u32, salt: u64) -> Self {
        let mut digest = Sha256::new();
        digest.update(numerics_id.as_bytes());
        digest.update([0]);
        digest.update(granule.to_le_bytes());
        digest.update(salt.to_le_bytes());
        Self { root: digest.finalize().into(), keys: Vec::new(), granule: granule.max(1) as usize }
    }

    /// One past the last token that page `index` depends on.
    fn span(&self, index: usize) -> usize {
        ((index + 1) * PAGE_SLOTS).next_multiple_of(self.granule)
    }

    /// Leading pages that hold nothing but final keys and values once rows `[0, kept)` are kept.
    pub fn whole_pages(&self, kept: u32) -> usize {
        (kept as usize - kept as usize % self.granule) / PAGE_SLOTS
    }

    /// Whether a request can go on behind `pages` pages: a block must not begin inside one and end outside.
    pub fn may_stop_at(&self, pages: usize) -> bool {
        (pages * PAGE_SLOTS).is_multiple_of(self.granule)
    }

    /// The key of page `index`, which must be whole among the rows of `tokens`. Tokens may be appended between
    /// calls, never changed.
    pub fn key(&mut self, index: usize, tokens: &[u32]) -> Key {
        for page in self.keys.len()..=index {
            let (before, from) = if page == 0 { (self.root, 0) } else { (self.keys[page - 1], self.span(page - 1)) };
            let mut digest = Sha256::new();
            digest.update(before);
            tokens[from..self.span(page)].iter().for_each(|token| digest.update(token.to_le_bytes()));
            self.keys.push(digest.finalize().into());
        }
        self.keys[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(granule: u32, salt: u64, tokens: &[u32]) -> Vec<Key> {
        let mut chain = Chain::new("n", granule, salt);
        (0..chain.whole_pages(tokens.len() as u32)).map(|index| chain.key(index, tokens)).collect()
    }

    #[test]
    fn everything_that_matters_is_in_the_key() {
        let tokens: Vec<u32> = (0..32).collect();
        let base = keys(1, 0, &tokens);
        assert_eq!(base.len(), 1);
        let other_numerics = Chain::new("m", 1, 0).key(0, &tokens);
        assert!(![keys(4, 0, &tokens)[0], keys(1, 9, &tokens)[0], other_numerics].contains(&base[0]));
    }

    #[test]
    fn a_page_inside_a_larger_block_depends_on_the_whole_block() {
        let mut tokens: Vec<u32> = (0..64).collect();
        assert_eq!(keys(64, 0, &tokens[..63]).len(), 0);
        let before = keys(64, 0, &tokens);
        assert_eq!(before.len(), 2);
        assert_ne!(before[0], before[1]);
        tokens[63] += 1;
        assert_ne!(keys(64, 0, &tokens)[0], before[0]);
        let chain = Chain::new("n", 64, 0);
        assert!(!chain.may_stop_at(1) && chain.may_stop_at(2));
    }

    proptest! {
        /// Two chains agree on a page exactly when they agree on every token it depends on.
        #[test]
        fn keys_agree_as_far_as_tokens_do(granule in 1u32..70, changed in 0usize..256) {
            let mut tokens: Vec<u32> = (0..256).collect();
            let before = keys(granule, 0, &tokens);
            tokens[changed] += 1;
            let chain = Chain::new("n", granule, 0);
            for (index, (old, new)) in before.iter().zip(keys(granule, 0, &tokens)).enumerate() {
                prop_assert_eq!(*old == new, changed >= chain.span(index));
            }
        }
    }
}
