//! Tokens per second by block size and concurrency: a profile joined with a model's measured quality.

use serde::Serialize;
use std::collections::BTreeMap;
use unmask_controller::policy::{Candidate, Choice, Load, Profile, Quality, Verdict, choose};

/// Requests at a time that are looked at.
pub const CONCURRENCY: [u32; 6] = [1, 2, 4, 8, 16, 32];

/// What the model would commit per second.
#[derive(Debug, Serialize)]
pub struct Throughput {
    /// Positions of context of every request.
    pub context: u32,
    /// Least lower bound of the pass rate.
    pub floor: f64,
    /// One per concurrency.
    pub curves: Vec<Curve>,
}

/// One concurrency.
#[derive(Debug, Serialize)]
pub struct Curve {
    /// Requests at a time.
    pub concurrency: u32,
    /// Block size, threshold and whether masks only draft, as the policy chooses.
    pub chosen: Option<(u32, Option<f64>, bool)>,
    /// By block size.
    pub spots: Vec<Spot>,
}

/// One block size, at the threshold that is fastest among the good ones, or else the most careful.
#[derive(Debug, Serialize)]
pub struct Spot {
    /// Positions decoded together.
    pub block_size: u32,
    /// Confidence threshold; `None` is autoregressive.
    pub threshold: Option<f64>,
    /// Masks draft, causal rows decide.
    pub self_speculative: bool,
    /// Committed per second by all requests.
    pub tokens_per_s: f64,
    /// Whether the pass rate reaches the floor.
    pub good: bool,
}

impl Spot {
    /// What tells it from others, as in [`Curve::chosen`].
    pub fn way(&self) -> (u32, Option<f64>, bool) {
        (self.block_size, self.threshold, self.self_speculative)
    }
}

impl Throughput {
    /// Joins the two; `None` when nothing was measured with the profile's weights.
    pub fn new(profile: &Profile, quality: &Quality, context: u32) -> Option<Self> {
        let floor = quality.default_floor();
        let curve = |concurrency| {
            let choice = choose(
                profile,
                quality,
                &Load { concurrency, context, latency_ms: None, floor, block_sizes: Vec::new() },
            );
            let chosen = choice.chosen().map(|chosen| (chosen.block_size, chosen.threshold, chosen.self_speculative));
            Curve { concurrency, chosen, spots: spots(&choice) }
        };
        let curves: Vec<Curve> = CONCURRENCY.into_iter().map(curve).collect();
        curves.iter().any(|curve| !curve.spots.is_empty()).then_some(Self { context, floor, curves })
    }
}

fn spots(choice: &Choice) -> Vec<Spot> {
    let mut best: BTreeMap<u32, &Candidate> = BTreeMap::new();
    for candidate in choice.candidates.iter().filter(|candidate| candidate.verdict != Verdict::OtherWeights) {
        let place = best.entry(candidate.block_size).or_insert(candidate);
        if rank(candidate) > rank(place) {
            *place = candidate;
        }
    }
    let spot = |candidate: &Candidate| Spot {
        block_size: candidate.block_size,
        threshold: candidate.threshold,
        self_speculative: candidate.self_speculative,
        tokens_per_s: candidate.prediction.tokens_per_s,
        good: is_good(candidate),
    };
    best.into_values().map(spot).collect()
}

fn is_good(candidate: &Candidate) -> bool {
    !matches!(candidate.verdict, Verdict::BelowFloor { .. })
}

/// Good before not; the good by speed, the others by pass rate.
fn rank(candidate: &Candidate) -> (bool, f64) {
    let good = is_good(candidate);
    (good, if good { candidate.prediction.tokens_per_s } else { candidate.pass_rate_low })
}
