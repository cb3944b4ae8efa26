//! The policies as pure functions: block state and candidates in, changes out.

use super::{Bound, Comparison, Order, Policy, Quota};
use std::cmp::Ordering;

/// What the model proposes for one position of the open block, from the row's record.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Candidate {
    /// The token drawn (the arg-max when greedy).
    pub token: u32,
    /// Its untempered probability.
    pub confidence: f32,
    /// Probability of the best token minus that of the runner-up.
    pub margin: f32,
    /// Entropy of the untempered distribution in nats.
    pub entropy: f32,
}

/// An open block as a policy sees it. All slices have the block's length.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Present tokens; meaningless where masked.
    pub tokens: &'a [u32],
    /// Positions still masked.
    pub masked: &'a [bool],
    /// Prompt positions: never written.
    pub immutable: &'a [bool],
    /// Proposals; meaningful where masked, and where filled when the policy edits.
    pub candidates: &'a [Candidate],
    /// Denoise passes the block has had before this one.
    pub step: u32,
    /// Masks the block opened with.
    pub masks_at_start: u32,
    /// The request's block size (the last block of a canvas can be shorter).
    pub block_size: u32,
    /// A number per position that depends on seed and position only, for [`Order::Random`].
    pub random: &'a [u32],
}

/// One position to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Index within the block.
    pub index: usize,
    /// Token to write.
    pub token: u32,
}

/// Writes the step's changes to `out` (cleared first), ascending by index.
///
/// But for empty shares of [`Policy::Timesteps`], at least one masked position is filled as long as there is one. Ties:
/// lowest position first.
pub fn decide(policy: &Policy, view: &View<'_>, out: &mut Vec<Change>) {
    out.clear();
    let masked = (0..view.masked.len()).filter(|&i| view.masked[i]);
    match *policy {
        Policy::Fixed { steps, order, quota } => {
            let count = quota_of(view, quota, steps);
            let mut chosen: Vec<usize> = masked.collect();
            chosen.sort_by(|&a, &b| compare(view, order, a, b));
            fill(view, chosen.into_iter().take(count), out);
        }
        Policy::Threshold { tau, comparison, quota_steps } => {
            let floor = quota_steps.map_or(1, |steps| quota_of(view, Quota::Block, steps));
            threshold(view, tau, comparison, floor, out);
        }
        Policy::Timesteps { steps, eps, order, tau } => timesteps(view, steps, eps, order, tau, out),
        Policy::Factor { factor, last_falls } => {
            let ranked = by_confidence(view, masked);
            let mut accepted = ranked
                .iter()
                .enumerate()
                .take_while(|&(rank, &i)| {
                    rank == 0 || view.candidates[i].confidence >= 1.0 - factor / (rank as f32 + 2.0)
                })
                .count();
            accepted += usize::from(last_falls && accepted + 1 == ranked.len());
            fill(view, ranked.into_iter().take(accepted), out);
        }
        Policy::EntropyBounded { gamma, bound } => {
            let mut ranked: Vec<usize> = masked.collect();
            ranked.sort_by(|&a, &b| compare(view, Order::Entropy, a, b));
            let accepted = entropy_prefix(view, &ranked, gamma, bound);
            fill(view, ranked.into_iter().take(accepted), out);
        }
        Policy::Hierarchical { low, high } => hierarchical(view, low, high, out),
        Policy::JointEdit { tau, tau_edit, at_least, .. } => {
            threshold(view, tau, Comparison::Strict, at_least as usize, out);
            let edits = (0..view.tokens.len()).filter(|&i| {
                let candidate = &view.candidates[i];
                !view.masked[i]
                    && !view.immutable[i]
                    && candidate.token != view.tokens[i]
                    && candidate.confidence > tau_edit
            });
            fill(view, edits, out);
        }
        Policy::Autoregressive | Policy::SelfSpeculative { .. } => fill(view, masked.take(1), out),
    }
    out.sort_by_key(|change| change.index);
}

fn fill(view: &View<'_>, indices: impl Iterator<Item = usize>, out: &mut Vec<Change>) {
    out.extend(indices.map(|index| Change { index, token: view.candidates[index].token }));
}

/// Quota of this step, at least 1.
fn quota_of(view: &View<'_>, quota: Quota, steps: u32) -> usize {
    let positions = match quota {
        Quota::Masks => view.masks_at_start,
        Quota::Block => view.block_size,
    };
    let extra = u32::from(view.step < positions % steps);
    (positions / steps + extra).max(1) as usize
}

fn by_confidence(view: &View<'_>, masked: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut ranked: Vec<usize> = masked.collect();
    ranked.sort_by(|&a, &b| compare(view, Order::Confidence, a, b));
    ranked
}

/// `Less` when `a` comes before `b`.
fn compare(view: &View<'_>, order: Order, a: usize, b: usize) -> Ordering {
    let (x, y) = (&view.candidates[a], &view.candidates[b]);
    let by_measure = match order {
        Order::Confidence => y.confidence.total_cmp(&x.confidence),
        Order::Margin => y.margin.total_cmp(&x.margin),
        Order::Entropy => x.entropy.total_cmp(&y.entropy),
        Order::Sequential => Ordering::Equal,
        Order::Random => view.random[a].cmp(&view.random[b]),
    };
    by_measure.then(a.cmp(&b))
}

/// All that pass; the best `floor` when they are fewer.
fn threshold(view: &View<'_>, tau: f32, comparison: Comparison, floor: usize, out: &mut Vec<Change>) {
    let passes = |i: &usize| match comparison {
        Comparison::Strict => view.candidates[*i].confidence > tau,
        Comparison::Inclusive => view.candidates[*i].confidence >= tau,
    };
    let ranked = by_confidence(view, (0..view.masked.len()).filter(|&i| view.masked[i]));
    let accepted = ranked.iter().take_while(|i| passes(i)).count();
    fill(view, ranked.into_iter().take(accepted.max(floor)), out);
}

fn timesteps(view: &View<'_>, steps: u32, eps: f32, order: Order, tau: Option<f32>, out: &mut Vec<Change>) {
    let mut ranked: Vec<usize> = (0..view.masked.len()).filter(|&i| view.masked[i]).collect();
    ranked.sort_by(|&a, &b| compare(view, order, a, b));
    let (masks, start) = (ranked.len(), view.masks_at_start as usize);
    let share = match tau {
        // What earlier steps should have filled and did not comes on top; steps past the last have no share of their own.
        Some(_) => {
            let due = start / steps as usize * (view.step + 1).min(steps) as usize;
            due.saturating_sub(start - masks).max(1)
        }
        None if view.step + 1 >= steps => masks,
        None => {
            let time = |i: u32| 1.0 + (f64::from(eps) - 1.0) * f64::from(i) / f64::from(steps);
            (masks as f64 * (1.0 - time(view.step + 1) / time(view.step))) as usize
        }
    };
    let taken = ranked.into_iter().take(share).enumerate();
    let passes = |rank: usize, i: usize| rank == 0 || tau.is_none_or(|tau| view.candidates[i].confidence >= tau);
    fill(view, taken.filter(|&(rank, i)| passes(rank, i)).map(|(_, i)| i), out);
}

fn entropy_prefix(view: &View<'_>, ranked: &[usize], gamma: f32, bound: Bound) -> usize {
    let mut sum = 0.0f32;
    let accepted = ranked
        .iter()
        .take_while(|&&i| {
            let entropy = view.candidates[i].entropy;
            // Ascending, so the largest of a prefix is its last: the sum without it is the sum before it.
            let within = match bound {
                Bound::AllButLargest => sum <= gamma,
                Bound::Cumulative => sum + entropy < gamma,
            };
            sum += entropy;
            within
        })
        .count();
    accepted.max(1)
}

fn hierarchical(view: &View<'_>, low: f32, high: f32, out: &mut Vec<Change>) {
    let better = |a: Option<usize>, b: usize| match a {
        Some(a) if compare(view, Order::Confidence, a, b) != Ordering::Greater => Some(a),
        _ => Some(b),
    };
    let mut best_of_all = None;
    let mut best_of_run = None;
    let mut chosen = vec![false; view.masked.len()];
    for i in 0..=view.masked.len() {
        if i < view.masked.len() && view.masked[i] {
            best_of_all = better(best_of_all, i);
            best_of_run = better(best_of_run, i);
            chosen[i] = view.candidates[i].confidence > high;
        } else if let Some(best) = best_of_run.take() {
            chosen[best] |= view.candidates[best].confidence > low;
        }
    }
    if let Some(best) = best_of_all {
        chosen[best] = true;
    }
    fill(view, (0..chosen.len()).filter(|&i| chosen[i]), out);
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
