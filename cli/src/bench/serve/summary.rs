//! From what was observed to what is reported: a pure function.

use super::observe::{Observation, Outcome};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// What was asked of one load point.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "loop", rename_all = "snake_case")]
pub enum Load {
    /// Requests arrive whether or not earlier ones are answered.
    Open {
        /// Requests per second.
        rate: f64,
        /// How they are spaced.
        arrivals: &'static str,
    },
    /// Each stream asks again when it is answered. Latencies suffer coordinated omission.
    Closed {
        /// Streams.
        streams: u64,
    },
}

/// Why a load point ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// As asked.
    Complete,
    /// By Ctrl-C.
    Interrupted,
    /// More blocks were observed than are kept.
    SampleLimit,
}

/// What happened at one load point.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// What was asked.
    pub load: Load,
    /// Every request that was sent.
    pub observations: Vec<Observation>,
    /// Arrivals that found all streams taken.
    pub shed: u64,
    /// The time in which arrivals were due.
    pub span: Duration,
    /// Why it ended.
    pub ended: Ended,
}

/// Bounds of a good request; absent ones bound nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Slo {
    /// From the intended start to the first block.
    pub first_block: Option<Duration>,
    /// Between any two blocks.
    pub block: Option<Duration>,
}

/// The report of one load point. Rates are per second of `wall_s`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// What was asked.
    pub load: Load,
    /// Why it ended.
    pub ended: Ended,
    /// From the beginning to the last end or the last due time, seconds.
    pub wall_s: f64,
    /// Counts.
    pub requests: Requests,
    /// Arrivals per second of the time in which they were due; a closed loop offers what it is answered.
    pub offered_per_s: Option<f64>,
    /// Finished requests per second.
    pub achieved_per_s: f64,
    /// Work done.
    pub tokens: Tokens,
    /// From the intended start.
    pub first_block_ms: Latency,
    /// Between the blocks of a request.
    pub block_ms: Latency,
    /// From the intended start to the finish, of finished requests.
    pub end_to_end_ms: Latency,
    /// From the intended start to the sending: the generator's own delay.
    pub send_lag_ms: Latency,
    /// What met the bounds.
    pub goodput: Goodput,
}

/// due = sent + shed; sent = ok + failed + cut off.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Requests {
    /// Arrivals.
    pub due: u64,
    /// Of them sent.
    pub sent: u64,
    /// Of them finished.
    pub ok: u64,
    /// By status.
    pub failed: BTreeMap<&'static str, Failures>,
    /// Not sent, for too many were open.
    pub shed: u64,
    /// Open when the run ended.
    pub cut_off: u64,
}

/// Failures with one status.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Failures {
    /// How many.
    pub count: u64,
    /// What the first of them said.
    pub first: String,
}

/// Work done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tokens {
    /// Committed, by all requests that were sent.
    pub committed: u64,
    /// Of them per second.
    pub per_s: f64,
    /// Forward passes of finished requests, each counted once per request it served.
    pub passes: u64,
    /// Tokens of finished requests for each of these passes; 0 when there was none.
    pub per_pass: f64,
    /// Rows of open blocks (denoise passes x block size of every committed block) per second.
    pub open_rows_per_s: f64,
}

/// Exact percentiles (nearest rank), milliseconds; absent without samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// Number of samples.
    pub samples: u64,
    /// Half are at most this.
    pub p50: Option<f64>,
    /// 90% are at most this.
    pub p90: Option<f64>,
    /// 99% are at most this.
    pub p99: Option<f64>,
    /// All are at most this.
    pub max: Option<f64>,
}

/// Requests that finished within both bounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goodput {
    /// Bound of the first block.
    pub slo_first_block_ms: Option<f64>,
    /// Bound of every later block.
    pub slo_block_ms: Option<f64>,
    /// How many were good.
    pub requests: u64,
    /// Of them per second.
    pub requests_per_s: f64,
    /// Their tokens per second.
    pub tokens_per_s: f64,
}

impl Summary {
    /// Counts and sorts what was recorded.
    pub fn of(recording: &Recording, slo: Slo) -> Self {
        let seen = &recording.observations;
        let last = seen.iter().map(|one| one.end).max().unwrap_or_default();
        let wall = recording.span.max(last).as_secs_f64();
        let requests = Requests::of(recording);
        let since = |one: &Observation, at: Duration| at.saturating_sub(one.intended);
        let ok = |one: &&Observation| matches!(one.outcome, Outcome::Finished { .. });
        Self {
            load: recording.load.clone(),
            ended: recording.ended,
            wall_s: wall,
            offered_per_s: matches!(recording.load, Load::Open { .. })
                .then(|| per(requests.due as f64, recording.span.as_secs_f64())),
            achieved_per_s: per(requests.ok as f64, wall),
            tokens: Tokens::of(seen, wall),
            first_block_ms: Latency::of(seen.iter().filter_map(|one| Some(since(one, one.first_output()?)))),
            block_ms: Latency::of(seen.iter().flat_map(Observation::gaps)),
            end_to_end_ms: Latency::of(seen.iter().filter(ok).map(|one| since(one, one.end))),
            send_lag_ms: Latency::of(seen.iter().map(|one| since(one, one.sent))),
            goodput: Goodput::of(seen, slo, wall),
            requests,
        }
    }
}

impl Requests {
    fn of(recording: &Recording) -> Self {
        let sent = recording.observations.len() as u64;
        let mut all =
            Self { due: sent + recording.shed, sent, ok: 0, failed: BTreeMap::new(), shed: recording.shed, cut_off: 0 };
        for one in &recording.observations {
            match &one.outcome {
                Outcome::Finished { .. } => all.ok += 1,
                Outcome::CutOff => all.cut_off += 1,
                Outcome::Failed { code, message } => {
                    let failures = all.failed.entry(code).or_insert(Failures { count: 0, first: message.clone() });
                    failures.count += 1;
                }
            }
        }
        all
    }
}

impl Tokens {
    fn of(seen: &[Observation], wall: f64) -> Self {
        let (mut committed, mut rows, mut finished, mut passes) = (0, 0, 0, 0);
        for one in seen {
            for block in &one.blocks {
                committed += u64::from(block.tokens);
                rows += u64::from(block.steps) * u64::from(one.block_size);
            }
            if let Outcome::Finished { tokens, passes: own } = one.outcome {
                finished += u64::from(tokens);
                passes += u64::from(own);
            }
        }
        Self {
            committed,
            per_s: per(committed as f64, wall),
            passes,
            per_pass: per(finished as f64, passes as f64),
            open_rows_per_s: per(rows as f64, wall),
        }
    }
}

impl Latency {
    /// Of all samples.
    pub fn of(samples: impl Iterator<Item = Duration>) -> Self {
        let mut sorted: Vec<Duration> = samples.collect();
        sorted.sort_unstable();
        let at = |per_cent: usize| {
            let rank = (sorted.len() * per_cent).div_ceil(100);
            Some(milliseconds(*sorted.get(rank.checked_sub(1)?)?))
        };
        Self { samples: sorted.len() as u64, p50: at(50), p90: at(90), p99: at(99), max: at(100) }
    }
}

impl Goodput {
    fn of(seen: &[Observation], slo: Slo, wall: f64) -> Self {
        let within = |time: Duration, bound: Option<Duration>| bound.is_none_or(|bound| time <= bound);
        let (mut requests, mut sum) = (0, 0);
        for one in seen {
            let Outcome::Finished { tokens, .. } = one.outcome else { continue };
            let first = one.first_output().unwrap_or(one.end).saturating_sub(one.intended);
            if within(first, slo.first_block) && one.gaps().all(|gap| within(gap, slo.block)) {
                requests += 1;
                sum += u64::from(tokens);
            }
        }
        Self {
            slo_first_block_ms: slo.first_block.map(milliseconds),
            slo_block_ms: slo.block.map(milliseconds),
            requests,
            requests_per_s: per(requests as f64, wall),
            tokens_per_s: per(sum as f64, wall),
        }
    }
}

/// In whole microseconds, which is more than clocks and schedulers are good for.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

fn per(amount: f64, of: f64) -> f64 {
    if of > 0.0 { amount / of } else { 0.0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::observe::Block;
    use super::*;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A finished request meant for `intended`, sent 5 ms late, with blocks of 4 tokens in 2 passes.
    fn request(intended: u64, blocks: &[u64]) -> Observation {
        let block = |at: &u64| Block { at: ms(*at), tokens: 4, steps: 2 };
        let count = blocks.len() as u32;
        Observation {
            intended: ms(intended),
            sent: ms(intended + 5),
            blocks: blocks.iter().map(block).collect(),
            block_size: 16,
            end: ms(blocks.last().copied().unwrap_or(intended) + 1),
            outcome: Outcome::Finished { tokens: 4 * count, passes: 2 * count },
        }
    }

    fn failed(code: &'static str, message: &str) -> Observation {
        let outcome = Outcome::Failed { code, message: message.into() };
        Observation { outcome, ..request(0, &[]) }
    }

    fn recording(observations: Vec<Observation>, shed: u64) -> Recording {
        let load = Load::Open { rate: 1.0, arrivals: "poisson" };
        Recording { load, observations, shed, span: ms(2000), ended: Ended::Complete }
    }

    #[test]
    fn latencies_count_from_the_intended_start() {
        let summary = Summary::of(&recording(vec![request(100, &[150, 170, 200])], 0), Slo::default());
        assert_eq!(summary.first_block_ms.p50, Some(50.0));
        assert_eq!((summary.block_ms.samples, summary.block_ms.p50, summary.block_ms.max), (2, Some(20.0), Some(30.0)));
        assert_eq!(summary.end_to_end_ms.max, Some(101.0));
        assert_eq!(summary.send_lag_ms.max, Some(5.0));
        assert_eq!(summary.tokens.committed, 12);
        assert_eq!((summary.tokens.passes, summary.tokens.per_pass), (6, 2.0));
        assert_eq!((summary.wall_s, summary.tokens.per_s, summary.tokens.open_rows_per_s), (2.0, 6.0, 48.0));
        assert_eq!((summary.offered_per_s, summary.achieved_per_s), (Some(0.5), 0.5));
    }

    #[test]
    fn a_late_end_lengthens_the_wall_and_not_the_offered_rate() {
        let summary = Summary::of(&recording(vec![request(1900, &[3999])], 1), Slo::default());
        assert_eq!((summary.wall_s, summary.offered_per_s, summary.achieved_per_s), (4.0, Some(1.0), 0.25));
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let of = |samples: std::ops::RangeInclusive<u64>| Latency::of(samples.map(ms));
        let hundred = of(1..=100);
        assert_eq!(
            (hundred.p50, hundred.p90, hundred.p99, hundred.max),
            (Some(50.0), Some(90.0), Some(99.0), Some(100.0))
        );
        let three = of(1..=3);
        assert_eq!((three.p50, three.p90, three.max), (Some(2.0), Some(3.0), Some(3.0)));
        let none = Latency::of(std::iter::empty());
        assert_eq!((none.samples, none.p50, none.max), (0, None, None));
    }

    #[test]
    fn goodput_counts_what_met_both_bounds() {
        let seen = vec![
            request(0, &[50, 60]),
            // Its second block is slow.
            request(0, &[50, 150]),
            // Its first block is slow.
            request(0, &[150]),
            failed("UNAVAILABLE", "gone"),
            Observation { outcome: Outcome::CutOff, ..request(0, &[10]) },
        ];
        let good = |slo| Summary::of(&recording(seen.clone(), 0), slo).goodput;
        let both = good(Slo { first_block: Some(ms(50)), block: Some(ms(99)) });
        assert_eq!((both.requests, both.requests_per_s, both.tokens_per_s), (1, 0.5, 4.0));
        assert_eq!(good(Slo { first_block: Some(ms(50)), block: None }).requests, 2);
        assert_eq!(good(Slo::default()).requests, 3);
    }

    #[test]
    fn failures_are_counted_by_status_and_the_first_message_stays() {
        let seen = vec![failed("UNAVAILABLE", "first"), failed("UNAVAILABLE", "second"), failed("INTERNAL", "bug")];
        let failed = Summary::of(&recording(seen, 0), Slo::default()).requests.failed;
        assert_eq!(failed["UNAVAILABLE"], Failures { count: 2, first: "first".into() });
        assert_eq!(failed["INTERNAL"].count, 1);
    }

    fn observation() -> impl Strategy<Value = Observation> {
        let outcome = prop_oneof![
            (0u32..100, 0u32..100).prop_map(|(tokens, passes)| Outcome::Finished { tokens, passes }),
            Just(Outcome::Failed { code: "UNAVAILABLE", message: String::new() }),
            Just(Outcome::CutOff),
        ];
        (0u64..1000, prop::collection::vec(0u64..1000, 0..6), outcome).prop_map(|(intended, mut gaps, outcome)| {
            gaps.iter_mut().fold(intended, |at, gap| {
                *gap += at;
                *gap
            });
            Observation { outcome, ..request(intended, &gaps) }
        })
    }

    proptest! {
        #[test]
        fn counts_add_up_and_percentiles_ascend(
            seen in prop::collection::vec(observation(), 0..40), shed in 0u64..10, first in 0u64..2000, block in 0u64..2000,
        ) {
            let slo = Slo { first_block: Some(ms(first)), block: Some(ms(block)) };
            let summary = Summary::of(&recording(seen, shed), slo);
            let requests = &summary.requests;
            let failed: u64 = requests.failed.values().map(|failures| failures.count).sum();
            prop_assert_eq!(requests.due, requests.sent + requests.shed);
            prop_assert_eq!(requests.sent, requests.ok + failed + requests.cut_off);
            prop_assert!(summary.goodput.requests <= requests.ok);
            prop_assert!(summary.goodput.requests_per_s <= summary.achieved_per_s);
            prop_assert_eq!(summary.end_to_end_ms.samples, requests.ok);
            for latency in [&summary.first_block_ms, &summary.block_ms, &summary.end_to_end_ms, &summary.send_lag_ms] {
                prop_assert!(latency.p50 <= latency.p90 && latency.p90 <= latency.p99 && latency.p99 <= latency.max);
                prop_assert_eq!(latency.p50.is_none(), latency.samples == 0);
            }
        }
    }
}
