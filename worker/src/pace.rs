//! How fast requests of one revision of a policy get their tokens, with everything that keeps the engine waiting between
//! its steps: what a profile of bare passes cannot tell. Pure.

use std::time::Duration;
use tokio::time::Instant;
use unmask_proto::v1;

/// Sums over the steps in which every request was of one revision, since the first of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Pace {
    /// 0 when there were none.
    revision: u64,
    /// Committed.
    tokens: u64,
    steps: u64,
    /// In steps.
    stepping: Duration,
    /// From the end of a step to the end of the next.
    busy: Duration,
    /// The same, times the requests that shared the steps.
    request_time: Duration,
}

impl Pace {
    /// As the controller is told.
    pub(crate) fn message(self) -> v1::Pace {
        let Pace { revision, tokens, steps, stepping, busy, request_time } = self;
        let micros = |time: Duration| time.as_micros() as u64;
        v1::Pace {
            revision,
            tokens,
            steps,
            step_us: micros(stepping),
            busy_us: micros(busy),
            request_us: micros(request_time),
        }
    }
}

/// One step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub began: Instant,
    pub ended: Instant,
    /// Committed.
    pub tokens: u64,
    /// That had rows in it.
    pub requests: u32,
}

/// Counts.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    pub pace: Pace,
    /// End of the last step, as long as the engine goes from step to step.
    last: Option<Instant>,
}

impl Pacer {
    /// A step of some requests ended. `revisions` are those of all requests held.
    pub(crate) fn step(&mut self, step: Step, revisions: impl Iterator<Item = u64>) {
        let Step { began, ended, tokens, requests } = step;
        let since = self.last.replace(ended).map(|last| ended.saturating_duration_since(last));
        let mut all = revisions;
        let Some(revision) = all.next().filter(|&first| first >= self.pace.revision.max(1)) else { return };
        if !all.all(|other| other == revision) {
            return;
        }
        if revision > self.pace.revision {
            self.pace = Pace { revision, ..Pace::default() };
        }
        if let Some(since) = since {
            self.pace.tokens += tokens;
            self.pace.steps += 1;
            self.pace.stepping += ended.saturating_duration_since(began);
            self.pace.busy += since;
            self.pace.request_time += since * requests;
        }
    }

    /// Nothing runs: the time until the next step is nobody's.
    pub(crate) fn idle(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_steps_of_one_revision_count_and_no_idle_time() {
        let start = Instant::now();
        let mut pacer = Pacer::default();
        // Each step takes its last 4 ms.
        let mut step = |ms: u64, tokens, requests, revisions: &[u64]| {
            let ended = start + Duration::from_millis(ms);
            let began = ended - Duration::from_millis(4);
            pacer.step(Step { began, ended, tokens, requests }, revisions.iter().copied());
            pacer.pace
        };
        step(10, 5, 2, &[3, 3]);
        step(20, 5, 2, &[3, 3]);
        let expected = Pace {
            revision: 3,
            tokens: 12,
            steps: 2,
            stepping: Duration::from_millis(8),
            busy: Duration::from_millis(15),
            request_time: Duration::from_millis(25),
        };
        assert_eq!(step(25, 7, 1, &[3]), expected);
        assert_eq!(step(30, 9, 2, &[3, 0]), expected, "mixed");
        assert_eq!(step(40, 9, 1, &[2]), expected, "of an older one");
        let newer = step(50, 4, 1, &[8]);
        assert_eq!((newer.revision, newer.tokens, newer.busy), (8, 4, Duration::from_millis(10)));
        pacer.idle();
        let ended = start + Duration::from_millis(900);
        pacer.step(Step { began: ended, ended, tokens: 9, requests: 1 }, [8].into_iter());
        assert_eq!(pacer.pace, newer, "the first after a rest");
    }
}
