//! Signs of life of the thread that computes, for another to watch: whoever watches has the clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Says what an engine's thread does.
#[derive(Debug, Default)]
pub struct Pulse {
    /// Rises with everything that begins or ends.
    beats: AtomicU64,
    /// How long the step under way may take (microseconds); 0 where none is.
    limit: AtomicU64,
}

impl Pulse {
    /// Something was done that is not a step.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Release);
    }

    /// A step begins that may take until `limit`; it ends when what is returned is dropped, also by a panic.
    pub fn step(&self, limit: Duration) -> impl Drop {
        self.limit.store(limit.as_micros().max(1) as u64, Ordering::Relaxed);
        self.beat();
        Step(self)
    }

    /// Beats so far, and how long the step under way may take, if one is.
    pub fn read(&self) -> (u64, Option<Duration>) {
        // In this order: a step that began after the beats were read is found changed the next time.
        let beats = self.beats.load(Ordering::Acquire);
        let limit = self.limit.load(Ordering::Relaxed);
        (beats, (limit > 0).then(|| Duration::from_micros(limit)))
    }
}

struct Step<'a>(&'a Pulse);

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.limit.store(0, Ordering::Relaxed);
        self.0.beat();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_its_limit_until_it_ends() {
        let pulse = Pulse::default();
        assert_eq!(pulse.read(), (0, None));
        let step = pulse.step(Duration::from_millis(3));
        assert_eq!(pulse.read(), (1, Some(Duration::from_millis(3))));
        drop(step);
        assert_eq!(pulse.read(), (2, None));
    }
}
