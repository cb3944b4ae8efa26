//! Inputs of a product in the form that its weights need: as they are, or rounded to groups of 4 bytes.

use crate::Cpu;
use crate::kv::Element;
use crate::lanes::Lanes;
use crate::lines::Lines;
use crate::pack::{BLOCK_GROUPS, Packed, Panels, WeightType, shift};
use crate::rows::RowsMut;
use half::bf16;
use std::cell::RefCell;

/// Rows of the largest tile, and of a block of inputs.
pub(crate) const ROWS: usize = 16;

/// Groups of one block: [`ROWS`] rows of [`BLOCK_GROUPS`].
pub(super) const BLOCK: usize = ROWS * BLOCK_GROUPS;

/// Elements below which a task is not worth handing to another thread.
const TASK_ELEMENTS: usize = 1 << 13;

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
    blocks: Lines<u32>,
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
            let job = Rounding { x, k, pieces, blocks, dtype: w.dtype(), shift: shift(self.isa()), all, all_scales };
            let per_task = TASK_ELEMENTS.div_ceil(k);
            self.pool().run(rows.div_ceil(per_task), &|task| {
                let rows = task * per_task..rows.min((task + 1) * per_task);
                // Each row belongs to one task.
                dispatch!(self.isa(), round_rows(&job, rows));
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
    all: RowsMut<'a, u32>,
    all_scales: RowsMut<'a, f32>,
}

/// Rounds some rows. Generic so that it is compiled for the instruction set of `L`.
///
/// # Safety
/// The ISA of `L` must be present; no other thread may work on the same rows.
#[inline(always)]
unsafe fn round_rows<L: Lanes>(job: &Rounding<'_>, rows: std::ops::Range<usize>) {
    for row in rows {
        let x = &job.x[row * job.k..(row + 1) * job.k];
        for (piece, x) in x.chunks_exact(job.k / job.pieces).enumerate() {
            let first = (row / ROWS * job.pieces + piece) * job.blocks * BLOCK + row % ROWS * BLOCK_GROUPS;
            // SAFETY: a row's lines, one of each block, and its scales are written by the caller alone.
            let lines = (0..job.blocks).map(|block| unsafe { job.all.range(first + block * BLOCK, BLOCK_GROUPS) });
            if job.dtype == WeightType::Int8 {
                let scale = round_int8(x, job.shift, lines);
                // SAFETY: as above.
                unsafe { job.all_scales.range(row * job.pieces + piece, 1)[0] = scale };
            } else {
                round_bf16(x, lines);
            }
        }
    }
}

#[inline(always)]
fn round_bf16<'a>(x: &[f32], lines: impl Iterator<Item = &'a mut [u32]>) {
    for (x, line) in x.chunks(2 * BLOCK_GROUPS).zip(lines) {
        // SAFETY: a line of 16 words is one of 32 half words; neither has invalid bits.
        let line = unsafe { std::slice::from_raw_parts_mut(line.as_mut_ptr().cast::<u16>(), 2 * BLOCK_GROUPS) };
        line[x.len()..].fill(0);
        line.iter_mut().zip(x).for_each(|(out, &x)| *out = <bf16 as Element>::round(x).to_bits());
    }
}

/// Units of `largest / 127`; returns the value of one.
#[inline(always)]
fn round_int8<'a>(x: &[f32], shift: u8, lines: impl Iterator<Item = &'a mut [u32]>) -> f32 {
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
    for (x, line) in x.chunks(4 * BLOCK_GROUPS).zip(lines) {
        // SAFETY: a line of 16 words is one of 64 bytes; neither has invalid bits.
        let line = unsafe { std::slice::from_raw_parts_mut(line.as_mut_ptr().cast::<u8>(), 4 * BLOCK_GROUPS) };
        line[x.len()..].fill(shift);
        line.iter_mut().zip(x).for_each(|(out, x)| *out = (x * per_unit + MAGIC).to_bits() as u8 ^ shift);
    }
    largest / 127.0
}
