//! Notices that the engine's thread hangs: a step that does not end, or letters that nobody takes.
//!
//! Nobody can end a thread. What it held goes on elsewhere, and the worker ends, so that it can be started again.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use unmask_engine::Pulse;
use unmask_engine::group::CommError;

/// Between two looks.
const TICK: Duration = Duration::from_millis(200);
/// Beyond a step's limit: the ranks of a group find out first that one of them is late.
const SLACK: Duration = Duration::from_millis(500);

/// What a watchdog's thread has of the one that takes letters `L` and computes.
pub(crate) struct Watched<L> {
    pub pulse: Arc<Pulse>,
    pub letters: mpsc::WeakSender<L>,
    /// How long letters may lie unread while no step is under way.
    pub limit: Duration,
    /// Told that it hangs.
    pub hangs: CancellationToken,
    /// Told why the group is over.
    pub failure: watch::Sender<Option<CommError>>,
}

impl<L> Watched<L> {
    /// Looks until the other thread has ended or hangs.
    pub(crate) fn watch(self) {
        let (mut watchdog, mut last) = (Watchdog::default(), Instant::now());
        loop {
            std::thread::sleep(TICK);
            let Some(letters) = self.letters.upgrade().filter(|letters| !letters.is_closed()) else { return };
            let unread = letters.capacity() < letters.max_capacity();
            drop(letters);
            let (beats, step) = self.pulse.read();
            let (limit, passed) = (step.or(unread.then_some(self.limit)), last.elapsed());
            last += passed;
            if let Some(after) = watchdog.look(Sight { beats, limit }, passed) {
                tracing::error!(?limit, ?after, "the engine's thread hangs");
                self.hangs.cancel();
                self.failure.send_replace(Some(CommError::TimedOut { rank: 0, after }));
                return;
            }
        }
    }
}

/// What is seen of a thread.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Sight {
    /// Beats of its pulse.
    beats: u64,
    /// How long what it does may take; `None` while there is nothing to do.
    limit: Option<Duration>,
}

/// Counts how long there was no beat.
#[derive(Debug, Default)]
struct Watchdog {
    last: Sight,
    without_beat: Duration,
}

impl Watchdog {
    /// Takes a look, `passed` after the one before; how long there was no beat, if that is too long.
    fn look(&mut self, sight: Sight, passed: Duration) -> Option<Duration> {
        // A limit that is another one belongs to something else, whose beat comes.
        let Some(limit) = sight.limit.filter(|_| sight == self.last) else {
            *self = Self { last: sight, without_beat: Duration::ZERO };
            return None;
        };
        // While the whole process stood still, so did the one who is watched.
        self.without_beat += passed.min(2 * TICK);
        (self.without_beat > limit + SLACK).then_some(self.without_beat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);

    fn looks(watchdog: &mut Watchdog, sight: Sight, passed: Duration, count: usize) -> Option<Duration> {
        (0..count).find_map(|_| watchdog.look(sight, passed))
    }

    #[test]
    fn only_who_has_something_to_do_and_does_not_move_hangs() {
        let mut watchdog = Watchdog::default();
        let busy = |beats| Sight { beats, limit: Some(LIMIT) };
        assert_eq!(looks(&mut watchdog, Sight { beats: 7, limit: None }, TICK, 1000), None);
        for beats in 0..1000 {
            assert_eq!(watchdog.look(busy(beats), TICK), None, "it moves");
        }
        // The first look at something new begins to count.
        assert_eq!(looks(&mut watchdog, busy(5), TICK, 13), None);
        assert_eq!(watchdog.look(busy(5), TICK), Some(13 * TICK));
        // It was only slow.
        assert_eq!(watchdog.look(busy(6), TICK), None);
    }

    #[test]
    fn the_time_of_a_long_step_is_not_that_of_what_follows() {
        let mut watchdog = Watchdog::default();
        let sight = |limit| Sight { beats: 1, limit: Some(limit) };
        assert_eq!(looks(&mut watchdog, sight(30 * LIMIT), TICK, 200), None);
        // The step's end is seen before its beat.
        assert_eq!(looks(&mut watchdog, sight(LIMIT), TICK, 13), None);
        assert!(watchdog.look(sight(LIMIT), TICK).is_some());
    }

    #[test]
    fn time_in_which_the_process_stood_still_does_not_count() {
        let mut watchdog = Watchdog::default();
        let busy = Sight { beats: 1, limit: Some(LIMIT) };
        assert_eq!(looks(&mut watchdog, busy, Duration::from_secs(3600), 7), None);
        assert!(watchdog.look(busy, Duration::from_secs(3600)).is_some());
    }
}
