//! Top-k and top-p: the only rows whose logits are gathered.

use crate::policy::Candidate;
use crate::request::Settings;
use unmask_kernels::{Bans, Record, gumbel};

/// What may not win whatever its logit.
#[derive(Clone, Copy)]
pub struct Bars<'a> {
    /// Of the model.
    pub bans: &'a Bans,
    /// Where only some may: which, ascending.
    pub among: Option<&'a [u32]>,
}

/// Replaces a record's draw by one from its logits without what top-k, top-p, bars and suppressed ids leave out; confidence
/// stays that of the full distribution.
pub fn refine(
    record: &mut Record,
    logits: &[f32],
    bars: Bars<'_>,
    settings: &Settings,
    key: [u32; 2],
    scratch: &mut Vec<(f32, u32)>,
) {
    let Settings { sampling, manner, .. } = settings;
    let barred = |id: u32| !manner.suppressed_win && manner.suppress.contains(&id);
    let Bars { bans, among } = bars;
    let listed = |id: u32| among.is_none_or(|among| among.binary_search(&id).is_ok());
    let allowed =
        |id: u32| (id as usize) < bans.vocab && bans.argmax.binary_search(&id).is_err() && !barred(id) && listed(id);
    let chosen = if sampling.temperature > 0.0 {
        filtered(logits, allowed, sampling.temperature, sampling.top_k, sampling.top_p, key, scratch)
    } else {
        let left = logits.iter().zip(0u32..).filter(|&(x, id)| !x.is_nan() && allowed(id));
        left.max_by(|a, b| a.0.total_cmp(b.0).then(b.1.cmp(&a.1))).map(|(_, id)| id)
    };
    if let Some(id) = chosen {
        record.chosen = id;
        record.chosen_logit = logits[id as usize];
    }
}

/// Draws a token from the `top_k` best (0: all) within the smallest set of tempered probability `top_p`.
///
/// `logits` has one entry per id; ids for which `allowed` is false never win. The draw is Gumbel-max over what is left, keyed as for the unfiltered rows, so that a filter that
/// keeps everything changes nothing.
pub fn filtered(
    logits: &[f32],
    allowed: impl Fn(u32) -> bool,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    key: [u32; 2],
    scratch: &mut Vec<(f32, u32)>,
) -> Option<u32> {
    scratch.clear();
    scratch.extend(logits.iter().zip(0u32..).filter(|&(x, id)| !x.is_nan() && allowed(id)).map(|(&x, id)| (x, id)));
    scratch.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if top_k > 0 {
        scratch.truncate(top_k as usize);
    }
    let best = scratch.first()?.0;
    let weight = |x: f32| (f64::from(x - best) / f64::from(temperature)).exp();
    let total: f64 = scratch.iter().map(|&(x, _)| weight(x)).sum();
    let mut running = 0.0;
    let kept = scratch
        .iter()
        .take_while(|&&(x, _)| {
            let within = running < f64::from(top_p) * total;
            running += weight(x);
            within
        })
        .count()
        .max(1);
    let noisy = |&(x, id): &(f32, u32)| x / temperature + gumbel(key, id);
    let winner = scratch[..kept].iter().max_by(|a, b| noisy(a).total_cmp(&noisy(b)).then(b.1.cmp(&a.1)));
    winner.map(|&(_, id)| id)
}

/// A candidate whose confidence is its probability without a share for `suppressed` ids; 0 when it is one of them.
/// Margin and entropy stay those of the full distribution.
pub fn among_others(candidate: Candidate, record: &Record, logits: &[f32], suppressed: &[u32]) -> Candidate {
    if suppressed.is_empty() {
        return candidate;
    }
    if suppressed.contains(&candidate.token) {
        return Candidate { confidence: 0.0, ..candidate };
    }
    let share: f32 = suppressed.iter().filter_map(|&id| logits.get(id as usize)).map(|&x| record.probability(x)).sum();
    Candidate { confidence: candidate.confidence / (1.0 - share), ..candidate }
}

/// The candidate of a record.
pub fn candidate(record: &Record) -> Candidate {
    Candidate {
        token: record.chosen,
        confidence: record.confidence(),
        margin: record.margin(),
        entropy: record.entropy(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::draw::{Purpose, key};

    fn frequencies(top_k: u32, top_p: f32) -> [f64; 4] {
        let logits = [2.0, 1.0, 0.0, -1.0];
        let mut counts = [0.0; 4];
        let mut scratch = Vec::new();
        for position in 0..4000 {
            let k = key(3, Purpose::Token, position, 0);
            let id = filtered(&logits, |_| true, 1.0, top_k, top_p, k, &mut scratch).unwrap();
            counts[id as usize] += 1.0 / 4000.0;
        }
        counts
    }

    #[test]
    fn unfiltered_frequencies_follow_the_softmax() {
        let expected = [0.6439, 0.2369, 0.0871, 0.0321];
        for (got, want) in frequencies(0, 1.0).iter().zip(expected) {
            assert!((got - want).abs() < 0.03, "{got} {want}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let by_k = frequencies(2, 1.0);
        assert!(by_k[2] == 0.0 && by_k[3] == 0.0 && by_k[1] > 0.2);
        let by_p = frequencies(0, 0.7);
        assert!(by_p[2] == 0.0 && by_p[3] == 0.0 && by_p[1] > 0.2);
        assert_eq!(frequencies(0, 0.01)[0].round(), 1.0);
    }

    #[test]
    fn banned_and_nan_never_win() {
        let mut scratch = Vec::new();
        let id = filtered(&[f32::NAN, 5.0, 1.0], |id| id != 1, 1.0, 0, 1.0, [1, 2], &mut scratch);
        assert_eq!(id, Some(2));
    }
}
