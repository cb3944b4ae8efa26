//! Logits, and their reduction to one fixed record per row without a `(rows, vocabulary)` buffer.
//!
//! The vocabulary is cut into fixed tiles of [`TILE`] ids. Each tile is reduced on its own; tiles are merged in order
//! within [`PIECES`] fixed pieces and the pieces in a fixed tree, so a record does not depend on threads or other rows.

mod gumbel;
mod tile;

use std::cell::RefCell;

pub use gumbel::gumbel;
use gumbel::{exp, ln};
pub use tile::{PARTIAL_BYTES, Partial};
use tile::{TileBans, reduce_tile};

use crate::gemm::ROWS;
use crate::rows::RowsMut;
use crate::{Cpu, Epilogue, PIECES, Packed};

/// Ids per vocabulary tile; a multiple of every panel width.
pub(crate) const TILE: usize = 512;

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
    /// The lowest allowed id of a head of `n` rows, which wins where nothing else can.
    ///
    /// # Panics
    /// The lists are out of order or ban every id.
    pub fn lowest_allowed(&self, n: usize) -> u32 {
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
    /// One reduction per row and tile of the call in progress; kept from call to call.
    static PARTIALS: RefCell<Vec<Partial>> = const { RefCell::new(Vec::new()) };
}

/// The rows of a head that one rank holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VocabShard {
    /// Rows of the whole head.
    pub total: usize,
    /// Ranks that share it: a power of two up to [`PIECES`].
    pub ranks: usize,
    /// Which of them.
    pub rank: usize,
}

impl VocabShard {
    /// All of a head of `total` rows.
    pub fn whole(total: usize) -> Self {
        VocabShard { total, ranks: 1, rank: 0 }
    }

    /// Tiles of one piece of the whole.
    fn tiles_per_piece(&self) -> usize {
        self.total.div_ceil(TILE).div_ceil(PIECES)
    }

    fn pieces(&self) -> usize {
        PIECES / self.ranks
    }

    /// Ids of the rank's rows; empty where the vocabulary has fewer tiles than ranks.
    pub fn ids(&self) -> std::ops::Range<usize> {
        let size = self.tiles_per_piece() * self.pieces() * TILE;
        self.total.min(self.rank * size)..self.total.min((self.rank + 1) * size)
    }

    fn check(&self) {
        let fits = self.ranks.is_power_of_two() && self.ranks <= PIECES && self.rank < self.ranks;
        assert!(fits, "a vocabulary is shared by 1, 2, 4 or {PIECES} ranks: {self:?}");
    }
}

impl Cpu {
    /// `out(rows, head.n())` = `hidden(rows, head.k()) * head^T`: the raw logits, for comparisons and filtered sampling.
    pub fn logits(&self, hidden: &[f32], head: &Packed, out: &mut [f32]) {
        self.gemm(hidden, head, Epilogue::Store, out);
    }

    /// Head product and reduction in one; `draws` and `out` hold one entry per row of `hidden(rows, head.k())`.
    pub fn vocab_reduce(&self, hidden: &[f32], head: &Packed, bans: &Bans, draws: &[Draw], out: &mut [Record]) {
        let shard = VocabShard::whole(head.n());
        let fallback = bans.lowest_allowed(shard.total);
        self.reduce_shard(hidden, Some(head), shard, bans, draws, |row, partial| {
            out[row] = partial.record(&draws[row], fallback);
        });
    }

    /// The part of [`Cpu::vocab_reduce`] that one rank of a group does: `out` holds one reduction per row over the
    /// rank's ids. A rank without ids has no head.
    pub fn vocab_partials(
        &self,
        hidden: &[f32],
        head: Option<&Packed>,
        shard: VocabShard,
        bans: &Bans,
        draws: &[Draw],
        out: &mut [Partial],
    ) {
        self.reduce_shard(hidden, head, shard, bans, draws, |row, partial| out[row] = partial);
    }

    fn reduce_shard(
        &self,
        hidden: &[f32],
        head: Option<&Packed>,
        shard: VocabShard,
        bans: &Bans,
        draws: &[Draw],
        mut done: impl FnMut(usize, Partial),
    ) {
        shard.check();
        bans.lowest_allowed(shard.total);
        let (ids, rows) = (shard.ids(), draws.len());
        let Some(head) = head.filter(|_| !ids.is_empty()) else {
            return (0..rows).for_each(|row| done(row, Partial::EMPTY));
        };
        assert_eq!(head.n(), ids.len(), "the head must hold the rank's rows");
        assert_eq!(hidden.len(), rows * head.k(), "hidden must hold one row of {} per draw", head.k());
        let (tiles, groups) = (ids.len().div_ceil(TILE), rows.div_ceil(ROWS));
        PARTIALS.with_borrow_mut(|partials| {
            partials.resize(partials.len().max(rows * tiles), Partial::EMPTY);
            let partials = &mut partials[..rows * tiles];
            let shared = RowsMut::new(partials);
            self.with_desk(rows, [(head, false)], |desk| {
                self.pool().team(&|member| {
                    // SAFETY: nobody writes `hidden`, and nothing was on the desk before.
                    let input = unsafe { self.input(member, desk, hidden, None, head) };
                    // Neighbouring tasks share a tile of weights.
                    member.each(tiles * groups, |task| {
                        let (tile, first) = (task / groups, task % groups * ROWS);
                        let (from, to) = (tile * TILE, ids.len().min((tile + 1) * TILE));
                        let group = first..rows.min(first + ROWS);
                        let tile_bans = TileBans::new(bans, ids.start + from, ids.start + to);
                        LOGITS.with_borrow_mut(|logits| {
                            logits.resize(ROWS * TILE, 0.0);
                            let logits = &mut logits[..group.len() * (to - from)];
                            self.gemm_columns(input, group.clone(), head, (from, to), logits);
                            for (row, logits) in group.zip(logits.chunks_exact(to - from)) {
                                let first = (ids.start + from) as u32;
                                let partial = reduce_tile(self.isa(), logits, first, &tile_bans, &draws[row]);
                                // SAFETY: each row and tile belongs to one task.
                                unsafe { shared.range(row * tiles + tile, 1)[0] = partial };
                            }
                        });
                    });
                });
            });
            for (row, tiles) in partials.chunks_exact(tiles).enumerate() {
                done(row, merge_tiles(tiles, &shard));
            }
        });
    }
}

/// Merges the tiles of one row that a rank holds: in order within each piece, then pieces pairwise.
fn merge_tiles(tiles: &[Partial], shard: &VocabShard) -> Partial {
    let mut pieces = [Partial::EMPTY; PIECES];
    for (piece, tiles) in pieces.iter_mut().zip(tiles.chunks(shard.tiles_per_piece())) {
        *piece = tiles.iter().fold(Partial::EMPTY, |sum, tile| sum.merge(tile));
    }
    merge_pairwise(&mut pieces[..shard.pieces()])
}

/// Merges reductions of neighbouring ranges of ids, as many as a power of two, in a fixed tree.
pub fn merge_pairwise(parts: &mut [Partial]) -> Partial {
    let mut width = parts.len();
    assert!(width.is_power_of_two(), "ranges are merged in pairs");
    while width > 1 {
        width /= 2;
        for i in 0..width {
            parts[i] = parts[2 * i].merge(&parts[2 * i + 1]);
        }
    }
    parts[0]
}
