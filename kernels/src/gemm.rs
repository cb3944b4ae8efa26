//! `y = x W^T` with packed weights: one row to prefill sizes, with the epilogues of a transformer layer.
//!
//! Every output element is summed over each piece of k in one order, whatever the number of rows; pieces are merged
//! in a fixed tree; threads split columns only: a row's bits depend on nothing else (I4).

mod amx;
mod dot;
mod epilogue;
mod input;
mod tile;

use crate::Cpu;
use crate::pack::{BLOCK_GROUPS, PANEL, PIECES, Packed};
use crate::rows::RowsMut;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use amx::{TILE_OPERATIONS, multiply_tiles};
use epilogue::finish;
pub(crate) use input::{Input, ROWS};
use tile::{Part, Tile, merge, product};

/// Tasks per thread, so that threads end together.
const TASKS_PER_THREAD: usize = 8;

/// Groups of weights of one block: [`BLOCK_GROUPS`] of a whole panel.
const BLOCK_WEIGHTS: usize = BLOCK_GROUPS * PANEL;

/// Sums of pieces that wait for their partners, at most.
const LEVELS: usize = PIECES.ilog2() as usize;

/// What happens to a product before it is written.
#[derive(Debug, Clone, Copy)]
pub enum Epilogue<'a> {
    /// `out = y`
    Store,
    /// `out = y + bias`, one per column
    Bias(&'a [f32]),
    /// `out += y`
    Add,
    /// Of a gated product, whose rows of W alternate gate, up: `out = silu(y_gate) * y_up`
    SiluMul,
}

impl Cpu {
    /// `out = epilogue(x W^T)` for `x` (m, k): out is (m, n), or (m, n / 2) of a gated product.
    pub fn gemm(&self, x: &[f32], w: &Packed, epilogue: Epilogue<'_>, out: &mut [f32]) {
        let (shape, k) = (w.shape(), w.k());
        let (m, width, panels) = (x.len() / k, shape.width(), shape.panels());
        assert_eq!(x.len(), m * k, "x must be (m, {k})");
        assert_eq!(out.len(), m * width, "out must be ({m}, {width})");
        assert_eq!(shape.gated, matches!(epilogue, Epilogue::SiluMul), "gated products, and only they, end in SiluMul");
        if let Epilogue::Bias(bias) = epilogue {
            assert_eq!(bias.len(), width, "bias must have one element per column");
        }
        let per_task = panels.div_ceil(self.pool().threads() * TASKS_PER_THREAD);
        let out = RowsMut::new(out);
        self.with_input(x, w, |input| {
            self.pool().run(panels.div_ceil(per_task), &|task| {
                let _registers = amx::Configured::new(self.isa());
                for panel in task * per_task..panels.min((task + 1) * per_task) {
                    self.for_tiles(input, 0..m, w, panel, |rows, tile| {
                        // SAFETY: each task writes its own panels' columns.
                        dispatch!(self.isa(), finish(tile, rows, w, panel, epilogue, &out));
                    });
                }
            });
        });
    }

    /// Columns `[from, to)` of rows `rows` of `x W^T` into `out` (rows, to - from), on the calling thread. `from` must
    /// begin a panel, `rows` a tile.
    pub(crate) fn gemm_columns(
        &self,
        input: Input<'_>,
        rows: std::ops::Range<usize>,
        w: &Packed,
        (from, to): (usize, usize),
        out: &mut [f32],
    ) {
        assert!(from.is_multiple_of(PANEL) && from <= to && to <= w.n(), "columns must begin a panel and exist");
        let (width, start) = (to - from, rows.start);
        assert_eq!(out.len(), rows.len() * width, "out must be ({}, {width})", rows.len());
        let _registers = amx::Configured::new(self.isa());
        for panel in from / PANEL..to.div_ceil(PANEL) {
            let at = panel * PANEL - from;
            let columns = PANEL.min(width - at);
            self.for_tiles(input, rows.clone(), w, panel, |(first, count), tile| {
                for (i, row) in tile.0[..count].iter().enumerate() {
                    out[(first - start + i) * width + at..][..columns].copy_from_slice(&row[..columns]);
                }
            });
        }
    }

    /// Computes one panel's columns for some rows, tile by tile; `done` gets (first row, rows).
    #[inline(always)]
    fn for_tiles(
        &self,
        input: Input<'_>,
        rows: std::ops::Range<usize>,
        w: &Packed,
        panel: usize,
        mut done: impl FnMut((usize, usize), &Tile),
    ) {
        let mut tiles = [Tile::ZERO; LEVELS + 1];
        for first in rows.clone().step_by(ROWS) {
            let count = ROWS.min(rows.end - first);
            // As in a binary counter: two sums of as many pieces each become one.
            let mut sums = 0;
            for piece in 0..w.shape.pieces {
                product(self.isa(), input, w, Part { first, count, panel, piece }, &mut tiles[sums]);
                sums += 1;
                for _ in 0..(piece + 1).trailing_zeros() {
                    sums -= 1;
                    let (earlier, later) = tiles.split_at_mut(sums);
                    dispatch!(self.isa(), merge(&mut earlier[sums - 1], &later[0], count));
                }
            }
            done((first, count), &tiles[0]);
        }
    }
}
