//! `C = op(A) op(B)` of plain f32 matrices, for the trainer: both operands change from step to step.
//!
//! B is copied into panels, A is read where it lies. Sums over k run in blocks of [`DEPTH`] in ascending order, so the
//! result does not depend on threads.

use crate::lanes::Lanes;
use crate::lines::Lines;
use crate::pack::PANEL;
use crate::rows::RowsMut;
use crate::{Cpu, Isa};
use std::cell::RefCell;
use std::ops::Range;

/// Terms of a sum that one pass over C adds: a panel of this depth stays in the first-level cache.
const DEPTH: usize = 256;
/// Panels up to this deep stay in the first-level cache together ([`TASK_PANELS`] of them take 32 KiB).
const SHALLOW: usize = 32;
/// Rows of C that one task computes.
const ROWS: usize = 96;
/// Panels of B that one task computes.
const TASK_PANELS: usize = 8;
/// Rows of a register tile.
const TILE_ROWS: usize = 8;

/// A batch of matrices (rows, cols), one after the other.
#[derive(Debug, Clone, Copy)]
pub struct MatRef<'a> {
    /// `batch * rows * cols` elements.
    pub data: &'a [f32],
    /// Matrices in `data`.
    pub batch: usize,
    /// Rows as the product sees them.
    pub rows: usize,
    /// Columns as the product sees them.
    pub cols: usize,
    /// `data` holds each matrix as (cols, rows), row-major.
    pub transposed: bool,
}

impl<'a> MatRef<'a> {
    /// One row-major (rows, cols) matrix.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        MatRef { data, batch: 1, rows, cols, transposed: false }
    }

    /// The transpose: of row-major (rows, cols) data a (cols, rows) matrix.
    pub fn t(self) -> Self {
        MatRef { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    fn check(&self) {
        assert_eq!(self.data.len(), self.batch * self.rows * self.cols, "data must be (batch, rows, cols)");
    }

    fn matrix(&self, index: usize) -> &'a [f32] {
        let size = self.rows * self.cols;
        &self.data[index * size..(index + 1) * size]
    }

    /// Distances between neighbours along rows and along columns.
    fn strides(&self) -> (usize, usize) {
        if self.transposed { (1, self.rows) } else { (self.cols, 1) }
    }
}

thread_local! {
    /// Panels of B; kept from call to call.
    static PANELS: RefCell<Lines<f32>> = RefCell::new(Lines::zeroed(0));
    /// One task's rows of a transposed A, `[tile][depth][TILE_ROWS]`: read where they lie they would alias in the cache.
    static STRIPS: RefCell<Lines<f32>> = RefCell::new(Lines::zeroed(ROWS * DEPTH));
}

impl Cpu {
    /// `C(m, n) = A(m, k) B(k, n)` for each matrix of the batch, or `C += A B`, over all threads.
    pub fn matmul(&self, a: MatRef<'_>, b: MatRef<'_>, c: &mut [f32], accumulate: bool) {
        a.check();
        b.check();
        assert_eq!(a.cols, b.rows, "A's columns must be B's rows");
        assert_eq!(a.batch, b.batch, "A and B must hold as many matrices");
        assert_eq!(c.len(), a.batch * a.rows * b.cols, "C must be (batch, m, n)");
        if c.is_empty() {
            return;
        }
        let (m, n, k) = (a.rows, b.cols, a.cols);
        if k == 0 {
            // An empty sum: no task below would write it.
            if !accumulate {
                c.fill(0.0);
            }
            return;
        }
        let panels = n.div_ceil(PANEL);
        let size = panels * k * PANEL;
        PANELS.with_borrow_mut(|packed| {
            packed.reserve(a.batch * size);
            let packed = &mut packed.as_mut_slice()[..a.batch * size];
            let shared = RowsMut::new(packed);
            self.pool().run(a.batch * panels, &|task| {
                // SAFETY: each task writes its own panel.
                let panel = unsafe { shared.range(task * k * PANEL, k * PANEL) };
                pack_panel(b.matrix(task / panels), b.strides(), k, n, task % panels * PANEL, panel);
            });
            let packed = &*packed;
            let out = RowsMut::new(c);
            let (row_tasks, panel_tasks) = (m.div_ceil(ROWS), panels.div_ceil(TASK_PANELS));
            self.pool().run(a.batch * row_tasks * panel_tasks, &|task| {
                let (index, rest) = (task / (row_tasks * panel_tasks), task % (row_tasks * panel_tasks));
                let (row, panel) = (rest / panel_tasks * ROWS, rest % panel_tasks * TASK_PANELS);
                let job = Job {
                    a: a.matrix(index),
                    strides: a.strides(),
                    b: &packed[index * size..(index + 1) * size],
                    k,
                    n,
                    first_element: index * m * n,
                    accumulate,
                };
                let rows = row..m.min(row + ROWS);
                job.run(self.isa(), rows, panel..panels.min(panel + TASK_PANELS), &out);
            });
        });
    }
}

fn pack_panel(b: &[f32], (down, across): (usize, usize), k: usize, n: usize, column: usize, panel: &mut [f32]) {
    let columns = PANEL.min(n - column);
    if across == 1 {
        for (i, out) in panel.chunks_exact_mut(PANEL).enumerate() {
            out[..columns].copy_from_slice(&b[i * down + column..][..columns]);
            out[columns..].fill(0.0);
        }
        return;
    }
    panel.fill(0.0);
    for j in 0..columns {
        let source = &b[(column + j) * across..][..k];
        for (i, &value) in source.iter().enumerate() {
            panel[i * PANEL + j] = value;
        }
    }
}

/// What the tasks of one matrix share.
struct Job<'a> {
    a: &'a [f32],
    strides: (usize, usize),
    b: &'a [f32],
    k: usize,
    n: usize,
    first_element: usize,
    accumulate: bool,
}

impl Job<'_> {
    /// Rows times panels of C.
    fn run(&self, isa: Isa, rows: Range<usize>, panels: Range<usize>, out: &RowsMut<'_, f32>) {
        for from in (0..self.k).step_by(DEPTH) {
            let depth = DEPTH.min(self.k - from);
            let (rows, panels) = (rows.clone(), panels.clone());
            if self.strides.0 != 1 {
                let a = &self.a[rows.start * self.strides.0 + from..];
                let block = Block { a, strides: self.strides, from, depth, rows, panels };
                dispatch!(isa, tiles(self, &block, out));
                continue;
            }
            STRIPS.with_borrow_mut(|strips| {
                let strips = strips.as_mut_slice();
                for (tile, strip) in strips.chunks_exact_mut(depth * TILE_ROWS).enumerate() {
                    let first = rows.start + tile * TILE_ROWS;
                    let count = TILE_ROWS.min(rows.end.saturating_sub(first));
                    if count == 0 {
                        break;
                    }
                    for (i, values) in strip.chunks_exact_mut(TILE_ROWS).enumerate() {
                        values[..count].copy_from_slice(&self.a[(from + i) * self.strides.1 + first..][..count]);
                    }
                }
                let block = Block { a: strips, strides: (1, TILE_ROWS), from, depth, rows, panels };
                dispatch!(isa, tiles(self, &block, out));
            });
        }
    }
}

/// Terms `[from, from + depth)` of some rows times some panels of C.
struct Block<'a> {
    /// The rows of A: `strides` apart, or in strips.
    a: &'a [f32],
    strides: (usize, usize),
    from: usize,
    depth: usize,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// # Safety
/// The ISA of `L` must be present, and no other thread may work on the same rows and panels of C.
#[inline(always)]
unsafe fn tiles<L: Lanes>(job: &Job<'_>, block: &Block<'_>, out: &RowsMut<'_, f32>) {
    let (row_tiles, panels) = (block.rows.len().div_ceil(TILE_ROWS), block.panels.len());
    for i in 0..row_tiles * panels {
        // Deep panels stay in the first-level cache one at a time, shallow ones together: then C is written in order.
        let (tile, panel) =
            if block.depth <= SHALLOW { (i / panels, i % panels) } else { (i % row_tiles, i / row_tiles) };
        // SAFETY: the caller's promise; distinct (tile, panel) are distinct parts of C.
        unsafe { one_tile::<L>(job, block, tile, block.panels.start + panel, out) };
    }
}

/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn one_tile<L: Lanes>(job: &Job<'_>, block: &Block<'_>, tile: usize, panel: usize, out: &RowsMut<'_, f32>) {
    let depth = block.depth;
    let add = job.accumulate || block.from > 0;
    let first = block.rows.start + tile * TILE_ROWS;
    let count = TILE_ROWS.min(block.rows.end - first);
    let tile_stride = if block.strides.0 == 1 { depth } else { block.strides.0 };
    let a = &block.a[tile * tile_stride * TILE_ROWS..];
    let b = &job.b[(panel * job.k + block.from) * PANEL..][..depth * PANEL];
    let columns = PANEL.min(job.n - panel * PANEL);
    let start = job.first_element + first * job.n + panel * PANEL;
    let mut rows = [std::ptr::null_mut(); TILE_ROWS];
    // SAFETY: each task has its own rows and panels of C, so the ranges are disjoint; every row pointed to holds a
    // whole panel; the caller's promise.
    unsafe {
        if columns == PANEL {
            for (i, row) in rows[..count].iter_mut().enumerate() {
                *row = out.range(start + i * job.n, PANEL).as_mut_ptr();
            }
            return tile_product::<L>(a, block.strides, b, depth, &rows[..count], add);
        }
        let mut results = [[0.0f32; PANEL]; TILE_ROWS];
        for (row, result) in rows[..count].iter_mut().zip(&mut results) {
            *row = result.as_mut_ptr();
        }
        tile_product::<L>(a, block.strides, b, depth, &rows[..count], false);
        for (i, result) in results[..count].iter().enumerate() {
            let target = out.range(start + i * job.n, columns);
            if add {
                target.iter_mut().zip(result).for_each(|(t, y)| *t += y);
            } else {
                target.copy_from_slice(&result[..columns]);
            }
        }
    }
}

/// # Safety
/// The ISA of `L` must be present; each of the 1 to [`TILE_ROWS`] `rows` must be valid for a panel's columns.
#[inline(always)]
unsafe fn tile_product<L: Lanes>(
    a: &[f32],
    strides: (usize, usize),
    b: &[f32],
    depth: usize,
    rows: &[*mut f32],
    add: bool,
) {
    let count = rows.len();
    assert!((count - 1) * strides.0 + (depth - 1) * strides.1 < a.len() && b.len() == depth * PANEL);
    for at in (0..PANEL).step_by(2 * L::WIDTH) {
        // SAFETY: the lengths checked above; the caller's promise.
        unsafe {
            match count {
                8 if L::WIDTH == 16 => columns::<L, 8>(a, strides, b, depth, at, rows, add),
                _ => {
                    for (i, rows) in rows.chunks(4).enumerate() {
                        let a = &a[4 * i * strides.0..];
                        match rows.len() {
                            1 => columns::<L, 1>(a, strides, b, depth, at, rows, add),
                            2 => columns::<L, 2>(a, strides, b, depth, at, rows, add),
                            3 => columns::<L, 3>(a, strides, b, depth, at, rows, add),
                            _ => columns::<L, 4>(a, strides, b, depth, at, rows, add),
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// `a` holds `M` rows, `b` `depth` rows of a panel, `rows` `M` pointers as for [`tile_product`]; the ISA of `L` must be
/// present.
#[inline(always)]
unsafe fn columns<L: Lanes, const M: usize>(
    a: &[f32],
    (down, across): (usize, usize),
    b: &[f32],
    depth: usize,
    at: usize,
    rows: &[*mut f32],
    add: bool,
) {
    // SAFETY: offsets stay below the lengths that the caller promises.
    unsafe {
        let mut sums = [[L::zero(); 2]; M];
        let mut weights = b.as_ptr().add(at);
        for i in 0..depth {
            let (low, high) = (L::load(weights), L::load(weights.add(L::WIDTH)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = L::splat(*a.get_unchecked(row * down + i * across));
                sums[0] = value.fma(low, sums[0]);
                sums[1] = value.fma(high, sums[1]);
            }
            weights = weights.add(PANEL);
        }
        for (row, &[low, high]) in sums.iter().enumerate() {
            let out = rows.get_unchecked(row).add(at);
            let next = out.add(L::WIDTH);
            if add {
                L::load(out).add(low).store(out);
                L::load(next).add(high).store(next);
            } else {
                low.store(out);
                high.store(next);
            }
        }
    }
}
