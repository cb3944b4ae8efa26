//! When requests are meant to start: drawn up front, a function of the seed and of nothing that happens later.

use super::args::Arrivals;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

/// How many arrivals a schedule has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All before this time.
    Duration(Duration),
    /// So many.
    Requests(u64),
}

/// Intended starts of an open loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// After the beginning of the run, ascending.
    pub starts: Vec<Duration>,
    /// What the starts fill: the duration asked for, or up to when the next request would have come.
    pub span: Duration,
}

/// The schedule holds more than `max` requests.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "{rate} requests/s over {seconds:.0} s are more than the {max} requests a run may have: lower --rate or --duration"
)]
pub struct TooMany {
    rate: f64,
    seconds: f64,
    max: u64,
}

impl Schedule {
    /// Draws arrivals at `rate` per second. Bursts hold `burst` requests each.
    ///
    /// # Errors
    /// There would be more than `max` requests.
    pub fn draw(
        arrivals: Arrivals,
        rate: f64,
        burst: u64,
        extent: Extent,
        seed: u64,
        max: u64,
    ) -> Result<Self, TooMany> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut passed = 0.0f64;
        let mut starts = Vec::new();
        for index in 0.. {
            // Where it does not add up draws, a time comes from the index, so that no rounding adds up either.
            let even = index as f64 / rate;
            let next = match arrivals {
                Arrivals::Poisson => {
                    // Of u in [0, 1) the other end, so that the logarithm is finite.
                    passed -= (1.0 - rng.random::<f64>()).ln() / rate;
                    passed
                }
                Arrivals::Uniform => even,
                Arrivals::Burst => (index - index % burst) as f64 / rate,
            };
            let start = Duration::try_from_secs_f64(next).unwrap_or(Duration::MAX);
            match extent {
                Extent::Duration(span) if start >= span => return Ok(Self { starts, span }),
                Extent::Requests(count) if index == count => {
                    let even = Duration::try_from_secs_f64(even).unwrap_or(Duration::MAX);
                    // The last burst may be cut short.
                    let span = if arrivals == Arrivals::Burst { even } else { start };
                    return Ok(Self { starts, span });
                }
                _ if index == max => break,
                _ => starts.push(start),
            }
        }
        let seconds = match extent {
            Extent::Duration(span) => span.as_secs_f64(),
            Extent::Requests(count) => count as f64 / rate,
        };
        Err(TooMany { rate, seconds, max })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    const MAX: u64 = 50_000;

    fn arrivals() -> impl Strategy<Value = Arrivals> {
        prop_oneof![Just(Arrivals::Poisson), Just(Arrivals::Uniform), Just(Arrivals::Burst)]
    }

    fn draw(arrivals: Arrivals, rate: f64, extent: Extent, seed: u64) -> Schedule {
        Schedule::draw(arrivals, rate, 8, extent, seed, MAX).unwrap()
    }

    proptest! {
        #[test]
        fn the_same_seed_gives_the_same_ascending_times_within_the_span(
            arrivals in arrivals(), rate in 0.1f64..500.0, seconds in 1u64..60, seed: u64,
        ) {
            let span = Duration::from_secs(seconds);
            let schedule = draw(arrivals, rate, Extent::Duration(span), seed);
            prop_assert_eq!(&schedule, &draw(arrivals, rate, Extent::Duration(span), seed));
            prop_assert!(schedule.starts.is_sorted());
            prop_assert!(schedule.starts.iter().all(|start| *start < span));
            prop_assert_eq!(schedule.span, span);
        }

        #[test]
        fn a_number_of_requests_is_kept_and_is_a_prefix_of_a_longer_schedule(
            arrivals in arrivals(), rate in 0.1f64..500.0, count in 1u64..500, more in 0u64..500, seed: u64,
        ) {
            let schedule = draw(arrivals, rate, Extent::Requests(count), seed);
            prop_assert_eq!(schedule.starts.len() as u64, count);
            prop_assert!(schedule.starts.iter().all(|start| *start <= schedule.span));
            let longer = draw(arrivals, rate, Extent::Requests(count + more), seed);
            prop_assert_eq!(&longer.starts[..schedule.starts.len()], &schedule.starts[..]);
        }

        #[test]
        fn the_mean_rate_is_what_was_asked_for(arrivals in arrivals(), rate in 1f64..200.0, seed: u64) {
            let count = 4000;
            let schedule = draw(arrivals, rate, Extent::Requests(count), seed);
            let found = count as f64 / schedule.span.as_secs_f64();
            // The mean of n exponential gaps lies within 6 / sqrt(n) of its own but once in half a billion draws.
            prop_assert!((found / rate - 1.0).abs() < 0.1, "{found} against {rate}");
        }
    }

    #[test]
    fn poisson_gaps_are_exponential() {
        let schedule = draw(Arrivals::Poisson, 10.0, Extent::Requests(10_000), 3);
        let gaps: Vec<f64> = schedule.starts.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // Mean 0.1 s; the deviation of an exponential is its mean.
        assert!((mean - 0.1).abs() < 0.004, "{mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "{variance}");
        assert_ne!(schedule, draw(Arrivals::Poisson, 10.0, Extent::Requests(10_000), 4));
    }

    #[test]
    fn bursts_come_together_and_uniform_gaps_are_equal() {
        let starts = |arrivals| draw(arrivals, 4.0, Extent::Requests(10), 1).starts;
        assert_eq!(starts(Arrivals::Burst)[..8], [Duration::ZERO; 8]);
        assert_eq!(starts(Arrivals::Burst)[8..], [Duration::from_secs(2); 2]);
        assert_eq!(starts(Arrivals::Uniform)[9], Duration::from_millis(2250));
    }

    #[test]
    fn too_many_requests_are_refused_before_any_is_sent() {
        let extent = Extent::Duration(Duration::from_secs(100));
        let refused = Schedule::draw(Arrivals::Uniform, 100.0, 1, extent, 1, 9999).unwrap_err();
        assert!(refused.to_string().contains("9999"), "{refused}");
        assert_eq!(Schedule::draw(Arrivals::Uniform, 100.0, 1, extent, 1, 10_000).unwrap().starts.len(), 10_000);
    }
}
