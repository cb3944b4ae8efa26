//! Logits, and their reduction to one fixed record per row without a `(rows, vocabulary)` buffer.
//!
//! The vocabulary is cut into fixed tiles of [`TILE`] ids. Each tile is reduced on its own; tiles are merged in order
//! within [`PIECES`] fixed pieces and the pieces in a fixed tree, so a record does not depend on threads or other rows.

mod gumbel;
mod tile;

use std::cell::RefCell;

pub use gumbel::gumbel;
use gumbel::{exp, ln};
use tile::{Partial, TileBans, reduce_tile};

use crate::rows::RowsMut;
use crate::{Cpu, Epilogue, Packed};

/// Ids per vocabulary tile; a multiple of every panel width.
pub(crate) const TILE: usize = 512;

/// Fixed pieces of the vocabulary, merged pairwise; a power of two.
const PIECES: usize = 8;

/// Rows of a tile that one task computes at once; bounds the scratch of a thread to `ROWS * TILE` logits.
const ROWS: usize = 16;

/// Ids kept from winning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bans {
    /// Ids from here on never win, but stay in the softmax (rows of a padded head).
    pub vocab: usize,
    /// Never win; ascending.
    pub argmax: Vec<u32>,
    /// Never win and are left out of the softmax; ascending.
    pub softmax: Vec<u32>,
}

/// How a row picks its token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Draw {
    /// Divides the logits before noise is added; 0 picks the arg-max.
    pub temperature: f32,
    /// Names the random numbers of this row: a hash of seed, purpose, position and step.
    pub key: [u32; 2],
}

/// What a row's logits are reduced to. A logit that is not a number counts as minus infinity.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Record {
    /// Largest logit in the softmax.
    pub max: f32,
    /// Best allowed id; the lowest where logits are equal.
    pub argmax: u32,
    /// Logit of `argmax`.
    pub best: f32,
    /// Second largest logit among the allowed; minus infinity where only one is.
    pub second: f32,
    /// Sum of `exp(x - max)` over the softmax.
    pub sum_exp: f32,
    /// Sum of `(x - max) exp(x - max)` over the softmax.
    pub sum_x_exp: f32,
    /// Arg-max of `x / temperature + gumbel(key, id)` over the allowed; `argmax` at temperature 0.
    pub chosen: u32,
    /// Logit of `chosen`.
    pub chosen_logit: f32,
}

impl Record {
    /// Untempered probability of `chosen`.
    pub fn confidence(&self) -> f32 {
        self.probability(self.chosen_logit)
    }

    /// Probability of the best allowed id minus that of the runner-up.
    pub fn margin(&self) -> f32 {
        self.probability(self.best) - self.probability(self.second)
    }

    /// Entropy of the softmax in nats.
    pub fn entropy(&self) -> f32 {
        if !(self.sum_exp > 0.0 && self.sum_exp.is_finite()) {
            return 0.0;
        }
        (ln(self.sum_exp) - self.sum_x_exp / self.sum_exp).max(0.0)
    }

    /// Untempered probability of a logit under this record's softmax; 0 where it is undefined.
    pub fn probability(&self, logit: f32) -> f32 {
        let shifted = f64::from(logit) - f64::from(self.max);
        let p = exp(shifted) / f64::from(self.sum_exp);
        if p.is_finite() { p as f32 } else { 0.0 }
    }
}

impl Bans {
    /// Checks the lists and returns the lowest allowed id.
    fn check(&self, n: usize) -> u32 {
        assert!(self.vocab > 0 && self.vocab <= n, "vocab {} is not within the head's {n} rows", self.vocab);
        assert!(self.argmax.is_sorted() && self.softmax.is_sorted(), "banned ids must ascend");
        let banned = |id: &u32| self.argmax.binary_search(id).is_ok() || self.softmax.binary_search(id).is_ok();
        let lowest = (0..self.vocab as u32).find(|id| !banned(id));
        assert!(lowest.is_some(), "every id is banned");
        lowest.unwrap_or(0)
    }
}

thread_local! {
    /// Logits of one task's rows and tile; kept from call to call.
    static LOGITS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Cpu {
    /// `out(rows, head.n())` = `hidden(rows, head.k()) * head^T`: the raw logits, for comparisons and filtered sampling.
    pub fn logits(&self, hidden: &[f32], head: &Packed, out: &mut [f32]) {
        self.gemm(hidden, head, Epilogue::Store, out);
    }

    /// Head product and reduction in one; `draws` and `out` hold one entry per row of `hidden(rows, head.k())`.
    pub fn vocab_reduce(&self, hidden: &[f32], head: &Packed, bans: &Bans, draws: &[Draw], out: &mut [Record]) {
        let (n, k, rows) = (head.n(), head.k(), draws.len());
        assert_eq!(hidden.len(), rows * k, "hidden must hold one row of {k} per draw");
        assert_eq!(out.len(), rows, "out must hold one record per draw");
        let fallback = bans.check(n);
        let (tiles, groups) = (n.div_ceil(TILE), rows.div_ceil(ROWS));
        let mut partials = vec![Partial::EMPTY; rows * tiles];
        let shared = RowsMut::new(&mut partials);
        // Neighbouring tasks share a tile of weights.
        self.pool().run(tiles * groups, &|task| {
            let (tile, first_row) = (task / groups, task % groups * ROWS);
            let (start, end) = (tile * TILE, n.min((tile + 1) * TILE));
            let count = ROWS.min(rows - first_row);
            let tile_bans = TileBans::new(bans, start, end);
            LOGITS.with_borrow_mut(|logits| {
                logits.resize(ROWS * TILE, 0.0);
                let logits = &mut logits[..count * (end - start)];
                self.gemm_columns(&hidden[first_row * k..][..count * k], head, start, end, logits);
                for (i, logits) in logits.chunks_exact_mut(end - start).enumerate() {
                    let row = first_row + i;
                    let partial = reduce_tile(self.isa(), logits, start as u32, &tile_bans, &draws[row]);
                    // SAFETY: each row and tile belongs to one task.
                    unsafe { shared.range(row * tiles + tile, 1)[0] = partial };
                }
            });
        });
        for ((record, partials), draw) in out.iter_mut().zip(partials.chunks_exact(tiles)).zip(draws) {
            *record = merge(partials, draw, fallback);
        }
    }
}

/// Merges the tiles of one row: in order within each piece, then pieces pairwise.
fn merge(tiles: &[Partial], draw: &Draw, fallback: u32) -> Record {
    let per_piece = tiles.len().div_ceil(PIECES);
    let mut pieces = [Partial::EMPTY; PIECES];
    for (piece, tiles) in pieces.iter_mut().zip(tiles.chunks(per_piece)) {
        *piece = tiles.iter().fold(Partial::EMPTY, |sum, tile| sum.merge(tile));
    }
    let mut width = PIECES;
    while width > 1 {
        for i in 0..width / 2 {
            pieces[i] = pieces[2 * i].merge(&pieces[2 * i + 1]);
        }
        width /= 2;
    }
    pieces[0].record(draw, fallback)
}
