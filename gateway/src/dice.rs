//! What a gateway draws: the choice among groups, seeds of requests that name none, names of requests.

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Draws, from the system's randomness or from a seed, for a gateway that is to do the same twice.
#[derive(Debug)]
pub(crate) struct Dice(Mutex<StdRng>);

impl Dice {
    pub(crate) fn new(seed: Option<u64>) -> Self {
        Self(Mutex::new(seed.map_or_else(StdRng::from_os_rng, StdRng::seed_from_u64)))
    }

    /// Any number.
    pub(crate) fn number(&self) -> u64 {
        self.draws().random()
    }

    /// A number in the range; its beginning when it is empty.
    pub(crate) fn index(&self, range: Range<usize>) -> usize {
        if range.is_empty() { range.start } else { self.draws().random_range(range) }
    }

    /// A name that no other request has.
    pub(crate) fn name(&self) -> String {
        uuid::Builder::from_random_bytes(self.draws().random()).into_uuid().to_string()
    }

    fn draws(&self) -> MutexGuard<'_, StdRng> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Dice {
    fn default() -> Self {
        Self::new(None)
    }
}
