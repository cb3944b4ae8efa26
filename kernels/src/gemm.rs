//! `y = x W^T` with packed weights: one row to prefill sizes, with the epilogues of a transformer layer.
//!
//! Every output element is one running sum over k in ascending order (pairs of k for the bf16 dot), whatever the
//! number of rows, and threads split columns only: a row's bits depend on nothing else (I4).

mod tile;

use crate::Cpu;
use crate::kv::Element;
use crate::pack::{Lines, PANEL, Packed, Panels};
use crate::rows::RowsMut;
use half::bf16;
use std::cell::RefCell;
use tile::{Input, Tile, finish, product};

/// Tasks per thread, so that threads end together.
const TASKS_PER_THREAD: usize = 8;

/// What happens to a product before it is written.
#[derive(Debug, Clone, Copy)]
pub enum Epilogue<'a> {
    /// `out = y`
    Store,
    /// `out = y + bias`, one per column
    Bias(&'a [f32]),
    /// `out += y`
    Add,
    /// W's rows alternate gate, up: `out = silu(y_gate) * y_up`, half as many columns as W has rows
    SiluMul,
}

thread_local! {
    /// Inputs rounded to bf16, in pairs; kept from call to call.
    static PAIRS: RefCell<Lines<u32>> = RefCell::new(Lines::zeroed(0));
}

impl Cpu {
    /// `out = epilogue(x W^T)` for `x` (m, k): out is (m, n), or (m, n / 2) with [`Epilogue::SiluMul`].
    pub fn gemm(&self, x: &[f32], w: &Packed, epilogue: Epilogue<'_>, out: &mut [f32]) {
        let (n, k) = (w.n(), w.k());
        let m = x.len() / k;
        let width = if matches!(epilogue, Epilogue::SiluMul) { n / 2 } else { n };
        assert_eq!(x.len(), m * k, "x must be (m, {k})");
        assert_eq!(out.len(), m * width, "out must be ({m}, {width})");
        if let Epilogue::Bias(bias) = epilogue {
            assert_eq!(bias.len(), n, "bias must have one element per column");
        }
        let panels = n.div_ceil(PANEL);
        let per_task = panels.div_ceil(self.pool().threads() * TASKS_PER_THREAD);
        let out = RowsMut::new(out);
        with_input(x, w, |input| {
            self.pool().run(panels.div_ceil(per_task), &|task| {
                for panel in task * per_task..panels.min((task + 1) * per_task) {
                    self.for_tiles(input, m, w, panel, |first, count, tile| {
                        finish(self.isa(), &tile[..count], first, panel * PANEL, n, epilogue, &out);
                    });
                }
            });
        });
    }

    /// Columns `[from, to)` of `x W^T` into `out` (m, to - from), on the calling thread. `from` must begin a panel.
    pub(crate) fn gemm_columns(&self, x: &[f32], w: &Packed, from: usize, to: usize, out: &mut [f32]) {
        assert!(from.is_multiple_of(PANEL) && from <= to && to <= w.n(), "columns must begin a panel and exist");
        let (m, width) = (x.len() / w.k(), to - from);
        assert_eq!(out.len(), m * width, "out must be ({m}, {width})");
        with_input(x, w, |input| {
            for panel in from / PANEL..to.div_ceil(PANEL) {
                let at = panel * PANEL - from;
                let columns = PANEL.min(width - at);
                self.for_tiles(input, m, w, panel, |first, count, tile| {
                    for (i, row) in tile[..count].iter().enumerate() {
                        out[(first + i) * width + at..][..columns].copy_from_slice(&row[..columns]);
                    }
                });
            }
        });
    }

    /// Computes one panel's columns for all rows, tile by tile.
    #[inline(always)]
    fn for_tiles(
        &self,
        input: Input<'_>,
        m: usize,
        w: &Packed,
        panel: usize,
        mut done: impl FnMut(usize, usize, &Tile),
    ) {
        let mut tile: Tile = [[0.0; PANEL]; tile::ROWS];
        let mut first = 0;
        while first < m {
            let count = [8, 4, 2, 1].into_iter().find(|&rows| rows <= m - first).unwrap_or(1);
            product(self.isa(), input, first, count, w, panel, &mut tile);
            done(first, count, &tile);
            first += count;
        }
    }
}

fn with_input<R>(x: &[f32], w: &Packed, run: impl FnOnce(Input<'_>) -> R) -> R {
    if !matches!(w.panels, Panels::Bf16Pairs(_)) {
        return run(Input::F32(x));
    }
    let k = w.k();
    let half_k = k.div_ceil(2);
    let rows = x.len() / k;
    PAIRS.with_borrow_mut(|pairs| {
        pairs.reserve(rows * half_k);
        let out = &mut pairs.as_mut_slice()[..rows * half_k];
        for (source, target) in x.chunks_exact(k).zip(out.chunks_exact_mut(half_k)) {
            for (pair, target) in source.chunks(2).zip(target) {
                let high = pair.get(1).map_or(0, |&x| u32::from(bf16::round(x).to_bits()));
                *target = u32::from(bf16::round(pair[0]).to_bits()) | high << 16;
            }
        }
        run(Input::Pairs(&pairs.as_slice()[..rows * half_k]))
    })
}
