//! Block size and threshold of a model, chosen from what was measured. Pure: the same numbers give the same choice.
//!
//! Large blocks commit more tokens per pass and make passes dearer; which wins depends on how many requests share a
//! step. [`profile`] says what a step takes, [`quality`] what a way to decode commits per pass and how often its
//! programs are right, and [`choose`] takes what commits most tokens per second among what is good and quick enough.

pub mod profile;
pub mod quality;
#[cfg(test)]
mod tests;

pub use profile::Profile;
pub use quality::{Quality, Row};

use serde::Serialize;
use std::cmp::Ordering;
use thiserror::Error;

/// A file is not what it should be: what it was to be, and everything that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("not a usable {}: {}", .0, .1.join("; "))]
pub struct ReadError(pub &'static str, pub Vec<String>);

/// What is asked of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Load {
    /// Requests that share every step; at least 1.
    pub concurrency: u32,
    /// Positions of context of a request, on average.
    pub context: u32,
    /// Longest time from one committed block of a request to the next (milliseconds); the first block after the prompt
    /// takes as long.
    pub latency_ms: Option<f64>,
    /// Least lower bound (95%) of the pass rate.
    pub floor: f64,
    /// Those that may be chosen; none named: all.
    pub block_sizes: Vec<u32>,
}

/// What a way to decode would do under a load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// Rows of a step, on average: blocks, and stored rows of the blocks before.
    pub rows: f64,
    /// Time of a step (milliseconds).
    pub step_ms: f64,
    /// Time from one commit of a request, a block's or a checked draft's, to the next (milliseconds).
    pub block_ms: f64,
    /// Tokens committed per second, all requests together.
    pub tokens_per_s: f64,
}

impl Prediction {
    /// With everything so many times as fast.
    fn times(self, factor: f64) -> Prediction {
        let Prediction { rows, step_ms, block_ms, tokens_per_s } = self;
        Prediction { rows, step_ms: step_ms / factor, block_ms: block_ms / factor, tokens_per_s: tokens_per_s * factor }
    }
}

/// Predicts one measured way to decode.
pub fn predict(profile: &Profile, row: &Row, concurrency: u32, context: u32) -> Prediction {
    let requests = f64::from(concurrency);
    let rows = requests * row.rows_per_step();
    let step_ms = profile.step_ms(rows, f64::from(context));
    Prediction {
        rows,
        step_ms,
        block_ms: row.passes_per_commit() * step_ms,
        tokens_per_s: requests * row.tpf / step_ms * 1e3,
    }
}

/// Why a candidate won or lost.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing eligible commits more.
    Chosen,
    /// Measured with other weights than the profile.
    OtherWeights,
    /// Its block size is not among those that may be chosen.
    NotAllowed,
    /// Its pass rate may be below the floor.
    BelowFloor {
        /// What is asked.
        floor: f64,
    },
    /// A block takes longer than the target.
    TooSlow {
        /// What is asked (milliseconds).
        latency_ms: f64,
    },
    /// Another eligible candidate commits more, or as much with a smaller block.
    FewerTokens {
        /// What the chosen one commits per second.
        chosen: f64,
    },
}

/// A measured way to decode, and how it fared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Candidate {
    /// Positions decoded together; 1 is autoregressive.
    pub block_size: u32,
    /// Confidence threshold; `None` is autoregressive.
    pub threshold: Option<f64>,
    /// Masks draft and causal rows decide.
    pub self_speculative: bool,
    /// Tokens committed per forward pass.
    pub tpf: f64,
    /// Share of tasks that passed.
    pub pass_rate: f64,
    /// Lower end of its 95% interval.
    pub pass_rate_low: f64,
    /// What it would do.
    pub prediction: Prediction,
    /// Why it won or lost.
    pub verdict: Verdict,
}

impl Candidate {
    /// Name of its policy.
    pub fn policy(&self) -> &'static str {
        match self.threshold {
            None => "autoregressive",
            Some(_) if self.self_speculative => "self_speculative",
            Some(_) => "threshold",
        }
    }
}

/// What was chosen, and what else there was.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// Index of the winner; `None` when nothing is good and quick enough.
    pub winner: Option<usize>,
    /// One per measured row, in its order.
    pub candidates: Vec<Candidate>,
}

impl Choice {
    /// The winner.
    pub fn chosen(&self) -> Option<&Candidate> {
        self.winner.map(|index| &self.candidates[index])
    }
}

/// Chooses among the measured rows the one that commits most tokens per second, of those whose pass rate's lower bound
/// reaches the floor and whose blocks come within the latency target. Ties go to the smaller block, then to the higher
/// threshold, then to the earlier row.
pub fn choose(profile: &Profile, quality: &Quality, load: &Load) -> Choice {
    choose_seen(profile, quality, load, |_| 1.0)
}

/// As [`choose`], with predictions corrected: `seen` is how many times as fast as predicted a row's way really is.
pub fn choose_seen(profile: &Profile, quality: &Quality, load: &Load, seen: impl Fn(&Row) -> f64) -> Choice {
    let mut candidates: Vec<Candidate> =
        quality.rows.iter().map(|row| candidate(profile, row, load, seen(row))).collect();
    let eligible = candidates.iter().enumerate().filter(|(_, candidate)| candidate.verdict == Verdict::Chosen);
    let winner = eligible.min_by(|(_, a), (_, b)| better_first(a, b)).map(|(index, _)| index);
    if let Some(winner) = winner {
        let chosen = candidates[winner].prediction.tokens_per_s;
        for (index, candidate) in candidates.iter_mut().enumerate() {
            if index != winner && candidate.verdict == Verdict::Chosen {
                candidate.verdict = Verdict::FewerTokens { chosen };
            }
        }
    }
    Choice { winner, candidates }
}

/// A row's candidate; [`Verdict::Chosen`] as long as it is eligible.
fn candidate(profile: &Profile, row: &Row, load: &Load, seen: f64) -> Candidate {
    let prediction = predict(profile, row, load.concurrency, load.context).times(seen);
    let pass_rate_low = row.pass_rate_low();
    let verdict = match load.latency_ms {
        _ if row.dtype != profile.dtype => Verdict::OtherWeights,
        _ if !load.block_sizes.is_empty() && !load.block_sizes.contains(&row.block_size) => Verdict::NotAllowed,
        _ if pass_rate_low < load.floor => Verdict::BelowFloor { floor: load.floor },
        Some(latency_ms) if prediction.block_ms > latency_ms => Verdict::TooSlow { latency_ms },
        _ => Verdict::Chosen,
    };
    Candidate {
        block_size: row.block_size,
        threshold: row.threshold,
        self_speculative: row.self_speculative,
        tpf: row.tpf,
        pass_rate: row.pass_rate(),
        pass_rate_low,
        prediction,
        verdict,
    }
}

fn better_first(a: &Candidate, b: &Candidate) -> Ordering {
    let rate = |candidate: &Candidate| candidate.prediction.tokens_per_s;
    let strictness = |candidate: &Candidate| candidate.threshold.unwrap_or(f64::INFINITY);
    rate(b).total_cmp(&rate(a)).then(a.block_size.cmp(&b.block_size)).then(strictness(b).total_cmp(&strictness(a)))
}
