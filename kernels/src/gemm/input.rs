//! Inputs of a product in the form that its weights need: as they are, or rounded to groups of 4 bytes.

use crate::kv::Element;
use crate::lanes::Lanes;
use crate::pack::{BLOCK_GROUPS, Packed, Panels, WeightType, shift};
use crate::rows::RowsMut;
use crate::{Cpu, pack};
use half::bf16;
use std::cell::RefCell;

/// Rows of the largest tile, and of a block of inputs.
pub(crate) const ROWS: usize = 16;

/// Groups of one block: [`ROWS`] rows of [`BLOCK_GROUPS`].
pub(super) const BLOCK: usize = ROWS * BLOCK_GROUPS;

/// Inputs of a product.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// (rows, k)
    F32(&'a [f32]),
    /// `[ROWS-row tile][piece][block][row][group]`, and for int8 the value of a unit per row and piece.
    Groups { blocks: &'a [u32], scales: &'a [f32] },
}

#[derive(Default)]
struct Buffers {
    blocks: pack::Lines<u32>,
    scales: Vec<f32>,
}

thread_local! {
    /// Rounded inputs of the product being computed; kept from call to call.
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl Cpu {
    /// Calls `run` with `x` (m, k) as the products of `w` need it.
    pub(crate) fn with_input<R>(&self, x: &[f32], w: &Packed, run: impl FnOnce(Input<'_>) -> R) -> R {
        if !matches!(w.panels, Panels::Groups(_)) {
            return run(Input::F32(x));
        }
        let (k, pieces) = (w.k(), w.shape.pieces);
        let blocks = w.shape.blocks(4 / w.dtype().bytes());
        let (rows, tile) = (x.len() / k, pieces * blocks * BLOCK);
        let tiles = rows.div_ceil(ROWS);
        BUFFERS.with_borrow_mut(|buffers| {
            buffers.blocks.reserve(tiles * tile);
            let scales = if w.dtype() == WeightType::Int8 { rows * pieces } else { 0 };
            buffers.scales.resize(scales.max(buffers.scales.len()), 0.0);
            let all = RowsMut::new(&mut buffers.blocks.as_mut_slice()[..tiles * tile]);
            let all_scales = RowsMut::new(&mut buffers.scales[..scales]);
            let job = Rounding { x, k, pieces, blocks, dtype: w.dtype(), shift: shift(self.isa()) };
            self.pool().run(tiles, &|index| {
                let rows = index * ROWS..rows.min((index + 1) * ROWS);
                let scales = if scales > 0 { rows.len() * pieces } else { 0 };
                // SAFETY: each task writes its own tile and its rows' scales.
                let (out, scales) = unsafe {
                    (
                        all.range(index * tile, tile),
                        all_scales.range(if scales > 0 { rows.start * pieces } else { 0 }, scales),
                    )
                };
                dispatch!(self.isa(), round_rows(&job, rows, out, scales));
            });
            run(Input::Groups { blocks: &buffers.blocks.as_slice()[..tiles * tile], scales: &buffers.scales[..scales] })
        })
    }
}

struct Rounding<'a> {
    x: &'a [f32],
    k: usize,
    pieces: usize,
    blocks: usize,
    dtype: WeightType,
    shift: u8,
}

/// Rounds some rows into one tile. Generic so that it is compiled for the instruction set of `L`.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn round_rows<L: Lanes>(job: &Rounding<'_>, rows: std::ops::Range<usize>, out: &mut [u32], scales: &mut [f32]) {
    // SAFETY: four bytes have no invalid bits, and both views have the same length and lifetime.
    let bytes = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), 4 * out.len()) };
    for (at, row) in rows.enumerate() {
        let x = &job.x[row * job.k..(row + 1) * job.k];
        for (piece, x) in x.chunks_exact(job.k / job.pieces).enumerate() {
            let bytes = &mut bytes[piece * job.blocks * 4 * BLOCK..][..job.blocks * 4 * BLOCK];
            let lines = bytes.chunks_exact_mut(4 * BLOCK).map(|block| &mut block[at * 64..][..64]);
            if job.dtype == WeightType::Int8 {
                scales[at * job.pieces + piece] = round_int8(x, job.shift, lines);
            } else {
                round_bf16(x, lines);
            }
        }
    }
}

#[inline(always)]
fn round_bf16<'a>(x: &[f32], lines: impl Iterator<Item = &'a mut [u8]>) {
    for (x, line) in x.chunks(32).zip(lines) {
        line[2 * x.len()..].fill(0);
        for (x, out) in x.iter().zip(line.chunks_exact_mut(2)) {
            out.copy_from_slice(&<bf16 as Element>::round(*x).to_bits().to_le_bytes());
        }
    }
}

/// Units of `largest / 127`; returns the value of one.
#[inline(always)]
fn round_int8<'a>(x: &[f32], shift: u8, lines: impl Iterator<Item = &'a mut [u8]>) -> f32 {
    /// Added to a number of small size, it leaves the nearest integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let mut largest = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    for (i, x) in chunks.remainder().iter().enumerate() {
        largest[i] = x.abs();
    }
    for chunk in chunks {
        for (max, x) in largest.iter_mut().zip(chunk) {
            *max = if x.abs() > *max { x.abs() } else { *max };
        }
    }
    let largest = largest.into_iter().fold(0.0f32, f32::max);
    let per_unit = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (x, line) in x.chunks(64).zip(lines) {
        line[x.len()..].fill(shift);
        for (x, out) in x.iter().zip(line) {
            *out = (x * per_unit + MAGIC).to_bits() as u8 ^ shift;
        }
    }
    largest / 127.0
}
