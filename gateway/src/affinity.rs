//! Which group a prompt belongs to: requests that begin alike find their prefix's pages cached there. Pure.

use sha2::{Digest as _, Sha256};

/// Tokens of a page of a worker's cache: what a prefix is shared in.
const PAGE_TOKENS: usize = 32;
/// Most tokens of a prompt that count. The rest may differ: a conversation stays where it began, and what shares a
/// preamble comes together.
const PREFIX_TOKENS_MAX: usize = 64;
/// A preferred group is taken while its score is at most this many times that of the better of two others: consistent
/// hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018) with the usual factor.
const LOAD_FACTOR: f64 = 1.25;
/// Rows by which it may be ahead besides: among idle groups, every factor is nothing.
const SLACK_ROWS: f64 = 512.0;

/// What prompts that begin alike have in common; tenants share none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Prefix(u64);

impl Prefix {
    /// Of the whole pages among the first tokens; `None` for a prompt shorter than a page, which has nothing cached.
    pub(crate) fn of(salt: u64, prompt: &[u32]) -> Option<Self> {
        let tokens = prompt.len().min(PREFIX_TOKENS_MAX) / PAGE_TOKENS * PAGE_TOKENS;
        let bytes = prompt[..tokens].iter().flat_map(|token| token.to_le_bytes());
        let bytes: Vec<u8> = salt.to_le_bytes().into_iter().chain(bytes).collect();
        (tokens > 0).then(|| Self(digest(&bytes)))
    }

    /// The weight of a group, by the digest of its name. The preferred one is that of the highest: rendezvous hashing
    /// (Thaler, Ravishankar 1998). All gateways agree, and when a group goes only what preferred it moves.
    pub(crate) fn weight(self, group: u64) -> u64 {
        mixed(self.0 ^ mixed(group))
    }
}

/// Whether a preferred group is good enough, by its score and that of the better of two others (row-seconds), where a
/// response takes `usual` seconds.
pub(crate) fn acceptable(preferred: f64, better: f64, usual: f64) -> bool {
    preferred <= LOAD_FACTOR * better + SLACK_ROWS * usual
}

/// The first 64 bits of SHA-256: the same in every process and version.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    digest.iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
fn mixed(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    fn preferred(prefix: Prefix, groups: &[u64]) -> u64 {
        groups.iter().copied().max_by_key(|&group| prefix.weight(group)).unwrap()
    }

    fn groups(names: std::ops::Range<usize>) -> Vec<u64> {
        names.map(|name| digest(format!("127.0.0.1:{name}").as_bytes())).collect()
    }

    #[test]
    fn whole_pages_at_the_beginning_decide_and_tenants_share_none() {
        let prompt: Vec<u32> = (0..200).collect();
        let of = |tokens: usize| Prefix::of(1, &prompt[..tokens]);
        assert_eq!((of(0), of(31)), (None, None));
        assert_eq!(of(32), of(63));
        assert_ne!(of(32), of(64));
        assert_eq!(of(64), of(200), "a conversation that grows stays");
        assert_ne!(of(64), Prefix::of(2, &prompt));
        let other: Vec<u32> = (1..201).collect();
        assert_ne!(of(64), Prefix::of(1, &other));
    }

    #[test]
    fn a_preferred_group_may_be_ahead_a_little() {
        assert!(acceptable(0.0, 0.0, 0.0));
        assert!(acceptable(512.0, 1.0, 1.0) && !acceptable(514.0, 1.0, 1.0));
        assert!(acceptable(10_000.0, 8_000.0, 1.0) && !acceptable(12_000.0, 8_000.0, 1.0));
        // Ten times as slow, by any of the two.
        assert!(!acceptable(10.0 * 1000.0, 1000.0, 1.0));
    }

    #[test]
    fn prefixes_are_spread_evenly() {
        for count in [2, 3, 8] {
            let groups = groups(0..count);
            let mut got = vec![0usize; count];
            for prompt in 0..8_000u32 {
                let prefix = Prefix::of(0, &[prompt; 32]).unwrap();
                got[groups.iter().position(|&group| group == preferred(prefix, &groups)).unwrap()] += 1;
            }
            let share = 8_000 / count;
            // Six standard deviations of a binomial are less than a fifth of the smallest share.
            assert!(got.iter().all(|&got| got.abs_diff(share) < share / 5), "{got:?}");
        }
    }

    proptest! {
        #[test]
        fn only_what_preferred_a_lost_group_moves(
            salt in any::<u64>(), first in any::<u32>(), count in 2usize..40, lost in any::<prop::sample::Index>(),
        ) {
            let before = groups(0..count);
            let mut after = before.clone();
            let lost = after.swap_remove(lost.index(count));
            let prefix = Prefix::of(salt, &[first; 40]).unwrap();
            let (had, has) = (preferred(prefix, &before), preferred(prefix, &after));
            prop_assert!(had == lost || had == has);
            prop_assert!(after.contains(&has));
        }
    }
}
