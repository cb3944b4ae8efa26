//! Reduction of one row's logits over one tile of the vocabulary, and the merge of such reductions.

use super::gumbel::{self, Noise};
use super::{Bans, Draw, Record, TILE};
use crate::Isa;
use crate::exp::{EXP_MIN, exp, largest};
use crate::lanes::*;

/// Elements that the loops handle at once: the widest vector of any ISA. Divides [`TILE`].
const CHUNK: usize = 16;

/// A winner: its score, id and logit. `id` is [`NOBODY`] while nothing allowed and finite was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Winner {
    score: f32,
    id: u32,
    logit: f32,
}

const NOBODY: u32 = u32::MAX;

/// What is known of one row over a range of ids.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Partial {
    max: f32,
    sum_exp: f32,
    sum_x_exp: f32,
    best: Winner,
    second: f32,
    chosen: Winner,
}

impl Winner {
    const NONE: Winner = Winner { score: f32::NEG_INFINITY, id: NOBODY, logit: f32::NEG_INFINITY };

    /// The better of two, `self` covering lower ids.
    fn or(self, later: Winner) -> Winner {
        if later.score > self.score || self.id == NOBODY { later } else { self }
    }
}

/// Bytes of a [`Partial`] on the wire.
pub const PARTIAL_BYTES: usize = 40;

impl Partial {
    /// Little-endian form, for other ranks.
    pub fn to_bytes(&self) -> [u8; PARTIAL_BYTES] {
        let Partial { max, sum_exp, sum_x_exp, best, second, chosen } = self;
        let winner = |w: &Winner| [w.score.to_bits(), w.id, w.logit.to_bits()];
        let ([a, b, c], [d, e, f]) = (winner(best), winner(chosen));
        let words = [max.to_bits(), sum_exp.to_bits(), sum_x_exp.to_bits(), a, b, c, second.to_bits(), d, e, f];
        let mut bytes = [0; PARTIAL_BYTES];
        bytes.chunks_exact_mut(4).zip(words).for_each(|(out, word)| out.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// The reduction that [`Partial::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8; PARTIAL_BYTES]) -> Partial {
        let word = |i: usize| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
        let float = |i: usize| f32::from_bits(word(i));
        let winner = |i: usize| Winner { score: float(i), id: word(i + 1), logit: float(i + 2) };
        Partial {
            max: float(0),
            sum_exp: float(1),
            sum_x_exp: float(2),
            best: winner(3),
            second: float(6),
            chosen: winner(7),
        }
    }

    /// Nothing seen.
    pub const EMPTY: Partial = Partial {
        max: f32::NEG_INFINITY,
        sum_exp: 0.0,
        sum_x_exp: 0.0,
        best: Winner::NONE,
        second: f32::NEG_INFINITY,
        chosen: Winner::NONE,
    };

    /// Both ranges as one; `self` covers the lower ids.
    pub fn merge(&self, later: &Partial) -> Partial {
        let max = self.max.max(later.max);
        let (a, b) = (self.rescaled(max), later.rescaled(max));
        Partial {
            max,
            sum_exp: a.0 + b.0,
            sum_x_exp: a.1 + b.1,
            best: self.best.or(later.best),
            second: self.best.score.min(later.best.score).max(self.second).max(later.second),
            chosen: self.chosen.or(later.chosen),
        }
    }

    /// The two sums under the maximum `max >= self.max`: `(x - max) e^(x - max)` splits at `self.max`.
    fn rescaled(&self, max: f32) -> (f32, f32) {
        if self.sum_exp == 0.0 || self.max == max {
            return (self.sum_exp, self.sum_x_exp);
        }
        let shift = self.max - max;
        let factor = gumbel::exp(f64::from(shift)) as f32;
        if factor == 0.0 {
            return (0.0, 0.0);
        }
        (self.sum_exp * factor, factor * (self.sum_x_exp + shift * self.sum_exp))
    }

    /// The record of a row; `fallback` wins where no allowed logit is above minus infinity.
    pub fn record(&self, draw: &Draw, fallback: u32) -> Record {
        let best = if self.best.id == NOBODY { Winner { id: fallback, ..Winner::NONE } } else { self.best };
        let chosen = if draw.temperature > 0.0 && self.chosen.id != NOBODY { self.chosen } else { best };
        Record {
            max: self.max,
            argmax: best.id,
            best: best.logit,
            second: self.second,
            sum_exp: self.sum_exp,
            sum_x_exp: self.sum_x_exp,
            chosen: chosen.id,
            chosen_logit: chosen.logit,
        }
    }
}

/// The bans that fall into one tile of ids `[start, end)`.
pub(super) struct TileBans<'a> {
    start: usize,
    /// Offset in the tile of the first id that is not part of the vocabulary.
    vocab: usize,
    argmax: &'a [u32],
    softmax: &'a [u32],
}

impl<'a> TileBans<'a> {
    pub(super) fn new(bans: &'a Bans, start: usize, end: usize) -> TileBans<'a> {
        let within = |ids: &'a [u32]| {
            let at = |limit: usize| ids.partition_point(|&id| (id as usize) < limit);
            &ids[at(start)..at(end)]
        };
        let vocab = bans.vocab.clamp(start, end) - start;
        TileBans { start, vocab, argmax: within(&bans.argmax), softmax: within(&bans.softmax) }
    }

    #[inline(always)]
    fn apply(&self, ids: &[u32], logits: &mut [f32; TILE]) {
        for &id in ids {
            logits[id as usize - self.start] = f32::NEG_INFINITY;
        }
    }
}

/// Reduces `logits` (ids `first..`) of one row.
pub(super) fn reduce_tile(isa: Isa, logits: &[f32], first: u32, bans: &TileBans<'_>, draw: &Draw) -> Partial {
    dispatch!(isa, reduce(logits, first, bans, draw))
}

/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn reduce<L: Lanes>(logits: &[f32], first: u32, bans: &TileBans<'_>, draw: &Draw) -> Partial {
    let mut x = Buffer([f32::NEG_INFINITY; TILE]);
    for (x, &logit) in x.0.iter_mut().zip(logits) {
        *x = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
    }
    bans.apply(bans.softmax, &mut x.0);
    // SAFETY: the caller's promise.
    let (max, sum_exp, sum_x_exp) = unsafe { softmax_sums::<L>(&x) };
    bans.apply(bans.argmax, &mut x.0);
    x.0[bans.vocab..].fill(f32::NEG_INFINITY);
    // SAFETY: the caller's promise.
    let (top, second) = unsafe { top_two::<L>(&x) };
    // SAFETY: the caller's promise.
    let best = unsafe { find::<L>(&x.0, &x.0, top, first) };
    let mut chosen = best;
    if draw.temperature > 0.0 {
        let noise = Noise::new(draw.key);
        let mut scores = Buffer([f32::NEG_INFINITY; TILE]);
        for (i, (score, &x)) in scores.0.iter_mut().zip(&x.0).enumerate() {
            let noisy = x / draw.temperature + noise.at(first + i as u32);
            *score = if x == f32::NEG_INFINITY { x } else { noisy };
        }
        // SAFETY: the caller's promise.
        chosen = unsafe { find::<L>(&scores.0, &x.0, top_two::<L>(&scores).0, first) };
    }
    Partial { max, sum_exp, sum_x_exp, best, second, chosen }
}

#[repr(C, align(64))]
struct Buffer([f32; TILE]);

/// The lowest id whose score is `top`.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn find<L: Lanes>(scores: &[f32; TILE], logits: &[f32; TILE], top: f32, first: u32) -> Winner {
    if top == f32::NEG_INFINITY {
        return Winner::NONE;
    }
    // SAFETY: offsets stay below TILE, a multiple of WIDTH; the caller's promise.
    let holds = |&at: &usize| unsafe { L::load(scores.as_ptr().add(at)).any_equal(L::splat(top)) };
    let start = (0..TILE).step_by(L::WIDTH).find(holds).unwrap_or(0);
    let at = start + scores[start..].iter().position(|&s| s == top).unwrap_or(0);
    Winner { score: top, id: first + at as u32, logit: logits[at] }
}

/// Maximum, `sum e^(x - max)`, `sum (x - max) e^(x - max)`.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn softmax_sums<L: Lanes>(x: &Buffer) -> (f32, f32, f32) {
    let x = x.0.as_ptr();
    // SAFETY: offsets stay below TILE, a multiple of WIDTH; the caller promises the ISA.
    unsafe {
        let mut max = L::load(x);
        for i in (L::WIDTH..TILE).step_by(L::WIDTH) {
            max = max.max(L::load(x.add(i)));
        }
        let max = largest(max);
        if max == f32::NEG_INFINITY {
            return (max, 0.0, 0.0);
        }
        // Banned ids shift to EXP_MIN and add less than 1e-35 in all.
        let (mut sum, mut sum_x) = (L::zero(), L::zero());
        for i in (0..TILE).step_by(L::WIDTH) {
            let shifted = L::load(x.add(i)).sub(L::splat(max)).max(L::splat(EXP_MIN));
            let e = exp(shifted);
            sum = sum.add(e);
            sum_x = shifted.fma(e, sum_x);
        }
        (max, sum.reduce_sum(), sum_x.reduce_sum())
    }
}

/// The two largest values; equal where the largest occurs twice.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn top_two<L: Lanes>(x: &Buffer) -> (f32, f32) {
    let mut tops = [0.0f32; CHUNK];
    let mut seconds = [0.0f32; CHUNK];
    // SAFETY: offsets stay below TILE, a multiple of WIDTH; the caller promises the ISA.
    unsafe {
        let mut top = L::load(x.0.as_ptr());
        let mut second = L::splat(f32::NEG_INFINITY);
        for i in (L::WIDTH..TILE).step_by(L::WIDTH) {
            let v = L::load(x.0.as_ptr().add(i));
            second = second.max(top.min(v));
            top = top.max(v);
        }
        top.store(tops.as_mut_ptr());
        second.store(seconds.as_mut_ptr());
    }
    let (mut top, mut second) = (tops[0], seconds[0]);
    for lane in 1..L::WIDTH {
        second = second.max(top.min(tops[lane])).max(seconds[lane]);
        top = top.max(tops[lane]);
    }
    (top, second)
}
