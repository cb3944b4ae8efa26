//! Counter-based randomness (I2): a draw is a function of seed, purpose, position and step, and of nothing else.

/// What a draw is for; different purposes never share bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Noise of Gumbel-max over the vocabulary.
    Token = 1,
    /// Order of [`crate::policy::Order::Random`].
    Order = 2,
}

/// Key of one position's draw in one denoise step of its block.
///
/// ```
/// use unmask_engine::draw::{Purpose, key};
/// assert_eq!(key(7, Purpose::Token, 40, 2), key(7, Purpose::Token, 40, 2));
/// assert_ne!(key(7, Purpose::Token, 40, 2), key(7, Purpose::Token, 41, 2));
/// ```
pub fn key(seed: u64, purpose: Purpose, position: u32, step: u32) -> [u32; 2] {
    let counter = (u64::from(position) << 32) | u64::from(step);
    let mixed = mix(mix(seed ^ (purpose as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)) ^ mix(counter));
    [(mixed >> 32) as u32, mixed as u32]
}

/// Finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn nearby_counters_do_not_collide() {
        let mut seen = HashSet::new();
        for seed in 0..4 {
            for position in 0..64 {
                for step in 0..16 {
                    assert!(seen.insert(key(seed, Purpose::Token, position, step)));
                    assert!(seen.insert(key(seed, Purpose::Order, position, step)));
                }
            }
        }
    }
}
