//! Register tiles of a product: up to [`ROWS`] rows times one or two panels, summed over one piece of k.

use super::input::{BLOCK, Input, ROWS};
use super::{amx, dot};
use crate::Isa;
use crate::lanes::Lanes;
use crate::pack::{PANEL, Packed, Panels, WeightType};

/// Results of one tile, a row per input row.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Tile(pub(super) [[f32; PANEL]; ROWS]);

impl Tile {
    pub(super) const ZERO: Tile = Tile([[0.0; PANEL]; ROWS]);
}

/// `sum += later` in the first `count` rows. Generic so that it is compiled for the instruction set of `L`.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
pub(super) unsafe fn merge<L: Lanes>(sum: &mut Tile, later: &Tile, count: usize) {
    for (row, later) in sum.0[..count].iter_mut().zip(&later.0) {
        for at in (0..PANEL).step_by(L::WIDTH) {
            // SAFETY: a panel is a multiple of the widest vector; the caller's promise.
            unsafe {
                L::load(row.as_ptr().add(at)).add(L::load(later.as_ptr().add(at))).store(row.as_mut_ptr().add(at))
            };
        }
    }
}

/// Which part of a product a tile is.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// First row, a multiple of [`ROWS`].
    pub(super) first: usize,
    /// Rows, at most [`ROWS`].
    pub(super) count: usize,
    /// First panel.
    pub(super) panel: usize,
    /// Panels: one or two.
    pub(super) panels: usize,
    pub(super) piece: usize,
    /// The panel before which the caller ends: weights are fetched ahead up to there.
    pub(super) end: usize,
}

/// Computes one part, a tile for each panel. On [`Isa::Amx`] the thread must have configured its tile registers.
pub(super) fn product(isa: Isa, input: Input<'_>, w: &Packed, part: Part, tiles: &mut [Tile; 2]) {
    let (k, depth) = (w.k(), w.shape.piece());
    let numbers = part.panel..part.panel + part.panels;
    match (input, &w.panels) {
        (Input::F32(x), Panels::F32(panels)) => {
            let x = &x[part.first * k..(part.first + part.count) * k];
            for (panel, tile) in numbers.zip(tiles) {
                dispatch!(isa, rows(x, &panels.as_slice()[panel * k * PANEL..][..k * PANEL], k, part, depth, tile));
            }
        }
        (Input::F32(x), Panels::Bf16(panels)) => {
            let x = &x[part.first * k..(part.first + part.count) * k];
            for (panel, tile) in numbers.zip(tiles) {
                dispatch!(isa, rows(x, &panels.as_slice()[panel * k * PANEL..][..k * PANEL], k, part, depth, tile));
            }
        }
        (Input::Groups { blocks, scales }, Panels::Groups(panels)) => {
            groups(isa, blocks, panels.as_slice(), w, part, tiles);
            if w.dtype() == WeightType::Int8 {
                scale_tiles(isa, scales, w, part, tiles);
            }
        }
        _ => unreachable!("inputs are made for their weights"),
    }
}

fn groups(isa: Isa, x: &[u32], weights: &[u32], w: &Packed, part: Part, tiles: &mut [Tile; 2]) {
    let (pieces, blocks) = (w.shape.pieces, w.shape.blocks(4 / w.dtype().bytes()));
    let x = &x[(part.first / ROWS * pieces + part.piece) * blocks * BLOCK..][..blocks * BLOCK];
    let size = blocks * super::BLOCK_WEIGHTS;
    let of = |panel: usize| &weights[(panel * pieces + part.piece) * size..][..size];
    if isa == Isa::Amx {
        let last = part.panel + part.panels - 1;
        return amx::product(x, [of(part.panel), of(last)], w.dtype(), tiles);
    }
    for (panel, tile) in (part.panel..part.panel + part.panels).zip(tiles) {
        let ahead = (panel * pieces + part.piece + 1) * size;
        let next = if ahead < part.end * pieces * size { &weights[ahead..ahead + size] } else { &[] };
        let weights = dot::Weights { piece: of(panel), next };
        match w.dtype() {
            WeightType::Int8 => dot::int8(isa, x, weights, part.count, tile),
            _ => dot::bf16(x, weights, part.count, tile),
        }
    }
}

fn scale_tiles(isa: Isa, scales: &[f32], w: &Packed, part: Part, tiles: &mut [Tile; 2]) {
    let pieces = w.shape.pieces;
    for (panel, tile) in (part.panel..part.panel + part.panels).zip(tiles) {
        let at = (panel * pieces + part.piece) * PANEL;
        let shifts = w.shifts[at.min(w.shifts.len())..].first_chunk().unwrap_or(&[0; PANEL]);
        let columns = w.scales[panel * PANEL..].first_chunk().unwrap_or(&[0.0; PANEL]);
        let rows = scales[part.first * pieces..].iter().skip(part.piece).step_by(pieces);
        dispatch!(isa, scale(tile, part.count, shifts, columns, rows));
    }
}

/// The bits of int8 sums become values: times the scales of their columns and rows.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn scale<'a, L: Lanes>(
    tile: &mut Tile,
    count: usize,
    shifts: &[i32; PANEL],
    columns: &[f32; PANEL],
    rows: impl Iterator<Item = &'a f32>,
) {
    for (row, row_scale) in tile.0[..count].iter_mut().zip(rows) {
        for at in (0..PANEL).step_by(L::WIDTH) {
            // SAFETY: a panel is a multiple of the widest vector; the caller's promise.
            unsafe {
                let sums = L::load_int(row.as_ptr().add(at).cast(), shifts.as_ptr().add(at));
                let scaled = sums.mul(L::load(columns.as_ptr().add(at))).mul(L::splat(*row_scale));
                scaled.store(row.as_mut_ptr().add(at));
            }
        }
    }
}

/// A weight in memory.
trait Weight: Copy {
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load(from) }
    }
}

impl Weight for u16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16(from) }
    }
}

/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn rows<L: Lanes>(x: &[f32], panel: &[impl Weight], k: usize, part: Part, depth: usize, tile: &mut Tile) {
    let from = part.piece * depth;
    assert!(x.len() == part.count * k && panel.len() == k * PANEL && from + depth <= k);
    let panel = &panel[from * PANEL..];
    let mut first = 0;
    while first < part.count {
        let left = part.count - first;
        let x = &x[first * k + from..];
        // SAFETY: the lengths checked above; the caller's promise.
        first += unsafe {
            match left {
                8.. if L::WIDTH == 16 => columns::<L, _, 8>(x, panel, k, depth, first, tile),
                4.. => columns::<L, _, 4>(x, panel, k, depth, first, tile),
                2.. => columns::<L, _, 2>(x, panel, k, depth, first, tile),
                _ => columns::<L, _, 1>(x, panel, k, depth, first, tile),
            }
        };
    }
}

/// `M` rows times the panel; returns `M`.
///
/// # Safety
/// `x` holds `M` rows of `depth` elements `k` apart, `panel` `depth` rows; the ISA of `L` must be present.
#[inline(always)]
unsafe fn columns<L: Lanes, W: Weight, const M: usize>(
    x: &[f32],
    panel: &[W],
    k: usize,
    depth: usize,
    first: usize,
    tile: &mut Tile,
) -> usize {
    // Two vectors of columns at a time: with eight rows they fit 32 registers, with four 16.
    for at in (0..PANEL).step_by(2 * L::WIDTH) {
        // SAFETY: offsets stay below the lengths that the caller promises.
        unsafe {
            let mut sums = [[L::zero(); 2]; M];
            let mut weights = panel.as_ptr().add(at);
            for i in 0..depth {
                let (low, high) = (W::load::<L>(weights), W::load::<L>(weights.add(L::WIDTH)));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = L::splat(*x.get_unchecked(row * k + i));
                    sums[0] = value.fma(low, sums[0]);
                    sums[1] = value.fma(high, sums[1]);
                }
                weights = weights.add(PANEL);
            }
            for (row, sums) in sums.iter().enumerate() {
                let out = tile.0[first + row].as_mut_ptr().add(at);
                sums[0].store(out);
                sums[1].store(out.add(L::WIDTH));
            }
        }
    }
    M
}
