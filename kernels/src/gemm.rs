//! `y = x W^T` with packed weights: one row to prefill sizes, with the epilogues of a transformer layer.
//!
//! Every output element is summed over each piece of k in one order, whatever the number of rows; pieces are merged
//! in a fixed tree; threads split columns only: a row's bits depend on nothing else (I4).

mod amx;
mod dot;
mod epilogue;
mod input;
#[cfg(target_arch = "x86_64")]
mod one_row;
mod tile;

use crate::pack::{BLOCK_GROUPS, PANEL, PIECES, Packed};
use crate::pool::Member;
use crate::rows::RowsMut;
use crate::{Cpu, Isa};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use amx::{TILE_OPERATIONS, multiply_tiles};
use epilogue::finish;
pub(crate) use input::{Desk, Input, ROWS};
#[cfg(target_arch = "x86_64")]
use one_row::OneRow;
use std::cell::RefCell;
use std::ops::Range;
use tile::{Part, Tile, merge, product};

/// Of the panels, the share (1 in so many) that is handed out in small tasks, so that threads end together.
const SMALL_SHARE: usize = 8;

/// Small tasks per thread.
const SMALL_TASKS: usize = 4;

/// Weights that a step likely finds in a cache (bytes).
const CACHED_BYTES: usize = 1 << 20;

/// Panels that a thread works on at once.
const PAIR: usize = 2;

/// Groups of weights of one block: [`BLOCK_GROUPS`] of a whole panel.
const BLOCK_WEIGHTS: usize = BLOCK_GROUPS * PANEL;

/// Sums of pieces that wait for their partners, at most.
const LEVELS: usize = PIECES.ilog2() as usize;

thread_local! {
    /// Tiles of the product in progress; to clear them for each task would take as long as a small product.
    static TILES: RefCell<Box<[[Tile; PAIR]; LEVELS + 1]>> = RefCell::new(Box::new([[Tile::ZERO; PAIR]; LEVELS + 1]));
}

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

/// How panels are shared out: to each thread one long run, which memory delivers fastest, then what is left in short ones.
#[derive(Clone, Copy)]
struct Tasks {
    panels: usize,
    threads: usize,
    long: usize,
    short: usize,
}

impl Tasks {
    /// Tasks of whole multiples of `at_once` panels. Few weights are shared out once and for all (`small` is false): they
    /// are done before anybody could know who would end late.
    fn new(panels: usize, threads: usize, at_once: usize, small: bool) -> Self {
        let kept = if small { panels / SMALL_SHARE } else { 0 };
        let long = (panels - kept) / threads / at_once * at_once;
        let short = (panels - long * threads).div_ceil(threads * SMALL_TASKS).next_multiple_of(at_once).max(at_once);
        Tasks { panels, threads, long, short }
    }

    fn count(&self) -> usize {
        self.threads + (self.panels - self.long * self.threads).div_ceil(self.short)
    }

    fn panels(&self, task: usize) -> Range<usize> {
        let begin = |task: usize| {
            let (long, short) = (task.min(self.threads), task.saturating_sub(self.threads));
            self.panels.min(long * self.long + short * self.short)
        };
        begin(task)..begin(task + 1)
    }
}

impl Cpu {
    /// `out = epilogue(x W^T)` for `x` (m, k): out is (m, n), or (m, n / 2) of a gated product.
    pub fn gemm(&self, x: &[f32], w: &Packed, epilogue: Epilogue<'_>, out: &mut [f32]) {
        let (shape, k) = (w.shape(), w.k());
        let (m, width) = (x.len() / k, shape.width());
        assert_eq!(x.len(), m * k, "x must be (m, {k})");
        assert_eq!(out.len(), m * width, "out must be ({m}, {width})");
        if let Epilogue::Bias(bias) = epilogue {
            assert_eq!(bias.len(), width, "bias must have one element per column");
        }
        let out = RowsMut::new(out);
        self.with_desk(m, [(w, false)], |desk| {
            self.pool().team(&|member| {
                // SAFETY: nobody writes `x`, and nothing was on the desk before.
                let input = unsafe { self.input(member, desk, x, None, w) };
                // SAFETY: the team does nothing else.
                unsafe { self.product(member, input, m, w, epilogue, &out) };
            });
        });
    }

    /// This member's part of the product of `m` rows. Every member of the team calls this.
    ///
    /// # Safety
    /// `out` holds `m` rows, which nobody else uses before the members have met.
    pub(crate) unsafe fn product(
        &self,
        member: &Member<'_>,
        input: Input<'_>,
        m: usize,
        w: &Packed,
        epilogue: Epilogue<'_>,
        out: &RowsMut<'_, f32>,
    ) {
        let gated = matches!(epilogue, Epilogue::SiluMul);
        assert_eq!(w.shape.gated, gated, "gated products, and only they, end in SiluMul");
        let few = w.bytes() <= CACHED_BYTES;
        let tasks = Tasks::new(w.shape().panels(), member.threads(), self.panels_at_once(), !few);
        let _registers = amx::Configured::new(self.isa());
        member.each(tasks.count(), |task| {
            // Each task writes its own panels' columns.
            self.for_tiles(input, 0..m, w, tasks.panels(task), |panel, rows, tile| {
                dispatch!(self.isa(), finish(tile, rows, w, panel, epilogue, out));
            });
        });
    }

    /// Columns `[from, to)` of rows `rows` of `x W^T` into `out` (rows, to - from), on the calling thread. `from` must
    /// begin a panel, `rows` a tile.
    pub(crate) fn gemm_columns(
        &self,
        input: Input<'_>,
        rows: Range<usize>,
        w: &Packed,
        (from, to): (usize, usize),
        out: &mut [f32],
    ) {
        assert!(from.is_multiple_of(PANEL) && from <= to && to <= w.n(), "columns must begin a panel and exist");
        let (width, start) = (to - from, rows.start);
        assert_eq!(out.len(), rows.len() * width, "out must be ({}, {width})", rows.len());
        let _registers = amx::Configured::new(self.isa());
        self.for_tiles(input, rows, w, from / PANEL..to.div_ceil(PANEL), |panel, (first, count), tile| {
            let at = panel * PANEL - from;
            let columns = PANEL.min(width - at);
            for (i, row) in tile.0[..count].iter().enumerate() {
                out[(first - start + i) * width + at..][..columns].copy_from_slice(&row[..columns]);
            }
        });
    }

    /// Computes some panels' columns for some rows, tile by tile; `done` gets (panel, (first row, rows), tile).
    #[inline(always)]
    fn for_tiles(
        &self,
        input: Input<'_>,
        rows: Range<usize>,
        w: &Packed,
        panels: Range<usize>,
        mut done: impl FnMut(usize, (usize, usize), &Tile),
    ) {
        let at_once = self.panels_at_once();
        TILES.with_borrow_mut(|tiles| {
            #[cfg(target_arch = "x86_64")]
            if let Some(row) = OneRow::of(self.isa(), input, &rows, w) {
                row.panels(panels, tiles.as_flattened_mut(), |panel, tile| done(panel, (rows.start, 1), tile));
                return;
            }
            for panel in panels.clone().step_by(at_once) {
                let pair = at_once.min(panels.end - panel);
                for first in rows.clone().step_by(ROWS) {
                    let count = ROWS.min(rows.end - first);
                    // As in a binary counter: two sums of as many pieces each become one.
                    let mut sums = 0;
                    for piece in 0..w.shape.pieces {
                        product(
                            self.isa(),
                            input,
                            w,
                            Part { first, count, panel, panels: pair, piece, end: panels.end },
                            &mut tiles[sums],
                        );
                        sums += 1;
                        for _ in 0..(piece + 1).trailing_zeros() {
                            sums -= 1;
                            let (earlier, later) = tiles.split_at_mut(sums);
                            for (sum, later) in earlier[sums - 1].iter_mut().zip(&later[0]).take(pair) {
                                dispatch!(self.isa(), merge(sum, later, count));
                            }
                        }
                    }
                    for (i, tile) in tiles[0].iter().enumerate().take(pair) {
                        done(panel + i, (first, count), tile);
                    }
                }
            }
        })
    }

    /// Elsewhere than on AMX one stream of memory after the other is faster.
    fn panels_at_once(&self) -> usize {
        if self.isa() == Isa::Amx { PAIR } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_cover_every_panel_once() {
        for threads in 1..=9 {
            for panels in 1..200 {
                for (at_once, small) in [(1, false), (1, true), (PAIR, false), (PAIR, true)] {
                    let tasks = Tasks::new(panels, threads, at_once, small);
                    let covered: Vec<usize> = (0..tasks.count()).flat_map(|task| tasks.panels(task)).collect();
                    assert_eq!(covered, (0..panels).collect::<Vec<_>>(), "{panels} panels, {threads} threads");
                    assert!(small || at_once > 1 || tasks.count() <= 2 * threads, "as even as can be");
                }
            }
        }
    }
}
