//! How long a group takes to answer: a peak-sensitive moving average. Pure.

use std::time::{Duration, Instant};

/// What was measured so long ago has lost 63% of its weight.
const DECAY: Duration = Duration::from_secs(10);

/// Peak-EWMA of response times, as in Finagle's and tower's load balancers (`tower::load::PeakEwma`): it rises to a peak at
/// once, and falls towards later measurements by `exp(-elapsed / DECAY)`.
///
/// Theirs falls towards zero while nothing is measured, so that whoever has not been asked for long beats everybody. This
/// one falls towards what the others take: an old measurement counts as none.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct PeakEwma {
    /// Seconds, as of the last measurement, and when that was.
    last: Option<(f64, Instant)>,
}

impl PeakEwma {
    /// Takes a response time that ended `now`.
    pub(crate) fn observe(&mut self, took: Duration, now: Instant) {
        let took = took.as_secs_f64();
        let next = self.last.map_or(took, |(seconds, at)| {
            let weight = weight(at, now);
            took.max(mix(seconds, took, weight))
        });
        self.last = Some((next, now));
    }

    /// As of the last measurement (seconds).
    pub(crate) fn measured(&self) -> Option<f64> {
        self.last.map(|(seconds, _)| seconds)
    }

    /// At present (seconds), where the others take `usual` seconds.
    pub(crate) fn estimate(&self, now: Instant, usual: f64) -> f64 {
        self.last.map_or(usual, |(seconds, at)| mix(seconds, usual, weight(at, now)))
    }
}

/// What is left of the weight of a measurement, from 0 to 1.
fn weight(at: Instant, now: Instant) -> f64 {
    (-now.saturating_duration_since(at).as_secs_f64() / DECAY.as_secs_f64()).exp()
}

fn mix(old: f64, new: f64, weight: f64) -> f64 {
    old * weight + new * (1.0 - weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_peak_counts_at_once_and_is_forgotten_with_time() {
        let (mut latency, begin) = (PeakEwma::default(), Instant::now());
        assert_eq!(latency.estimate(begin, 0.5), 0.5, "what is not measured is as the others");
        latency.observe(ms(10), begin);
        assert_eq!(latency.estimate(begin, 0.5), 0.01);
        latency.observe(ms(800), begin);
        assert_eq!(latency.estimate(begin, 0.01), 0.8);
        latency.observe(ms(10), begin + ms(10));
        assert!(latency.estimate(begin + ms(10), 0.01) > 0.79, "one quick answer does not undo a peak");
        latency.observe(ms(10), begin + DECAY);
        let left = latency.estimate(begin + DECAY, 0.01);
        assert!((0.28..0.32).contains(&left), "a decay later 1/e of it is left, is {left}");
        // Without further measurements it becomes what the others take, from both sides.
        let later = begin + 20 * DECAY;
        assert!((latency.estimate(later, 0.1) - 0.1).abs() < 1e-6);
        assert!((latency.estimate(later, 0.9) - 0.9).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn it_stays_between_the_last_and_the_largest_measurement(
            measurements in prop::collection::vec((0u64..5_000, 0u64..60_000), 1..40), wait in 0u64..60_000, usual in 0.0..5.0,
        ) {
            let (mut latency, mut now, mut largest) = (PeakEwma::default(), Instant::now(), 0.0f64);
            for (took, pause) in measurements {
                now += ms(pause);
                latency.observe(ms(took), now);
                let took = ms(took).as_secs_f64();
                largest = largest.max(took);
                let estimate = latency.estimate(now, usual);
                prop_assert!((took - 1e-9..=largest + 1e-9).contains(&estimate), "{took} <= {estimate} <= {largest}");
            }
            let (before, after) = (latency.estimate(now, usual), latency.estimate(now + ms(wait), usual));
            prop_assert!((after - usual).abs() <= (before - usual).abs() + 1e-9, "it moves away from the others");
        }
    }
}
