//! Inputs of a product in the form that its weights need: as they are, or rounded to groups of 4 bytes.

use crate::Cpu;
use crate::kv::Element;
use crate::lanes::Lanes;
use crate::lines::Lines;
use crate::norm::{Norm, normalise};
use crate::pack::{BLOCK_GROUPS, Packed, Panels, WeightType, shift};
use crate::pool::Member;
use crate::rows::RowsMut;
use half::bf16;
use std::cell::RefCell;

/// Rows of the largest tile, and of a block of inputs.
pub(crate) const ROWS: usize = 16;

/// Groups of one block: [`ROWS`] rows of [`BLOCK_GROUPS`].
pub(super) const BLOCK: usize = ROWS * BLOCK_GROUPS;

/// Inputs of up to this many elements are made by every thread for itself, which takes less time than to meet.
const ALONE_ELEMENTS: usize = 1 << 13;

/// Inputs of a product.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// (rows, k)
    F32(&'a [f32]),
    /// `[ROWS-row tile][piece][block][row][group]`, and for int8 the value of a unit per row and piece.
    Groups { blocks: &'a [u32], scales: &'a [f32] },
}

/// Elements of a [`Desk`]: of one copy, of several, or before one.
#[derive(Clone, Copy, Default)]
struct Room {
    normed: usize,
    blocks: usize,
    scales: usize,
}

/// Where a team puts the inputs of its products: a copy for each member, or one for all. Kept from team to team.
pub(crate) struct Desk<'a> {
    normed: RowsMut<'a, f32>,
    blocks: RowsMut<'a, u32>,
    scales: RowsMut<'a, f32>,
}

#[derive(Default)]
struct Buffers {
    normed: Lines<f32>,
    blocks: Lines<u32>,
    scales: Lines<f32>,
}

thread_local! {
    /// The desk of teams that this thread calls.
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl Room {
    /// For one copy of `rows` rows for a product with `w`.
    fn copy(rows: usize, w: &Packed, normed: bool) -> Room {
        let mut room = Room { normed: if normed { rows * w.k() } else { 0 }, ..Room::default() };
        if matches!(w.panels, Panels::Groups(_)) {
            room.blocks = rows.div_ceil(ROWS) * tile(w);
            // Whole lines of memory, so that no copy lies in another's.
            let scales = (rows * w.shape.pieces).next_multiple_of(BLOCK_GROUPS);
            room.scales = if w.dtype() == WeightType::Int8 { scales } else { 0 };
        }
        room
    }

    fn times(self, copies: usize) -> Room {
        Room { normed: copies * self.normed, blocks: copies * self.blocks, scales: copies * self.scales }
    }

    fn largest(self, other: Room) -> Room {
        Room {
            normed: self.normed.max(other.normed),
            blocks: self.blocks.max(other.blocks),
            scales: self.scales.max(other.scales),
        }
    }
}

/// Groups of a tile of inputs.
fn tile(w: &Packed) -> usize {
    w.shape.pieces * w.shape.blocks(4 / w.dtype().bytes()) * BLOCK
}

impl Cpu {
    /// Calls `run` with a desk for products with each of `weights`, one after the other, of up to `rows` rows that are
    /// normalised where it says so.
    pub(crate) fn with_desk<'w, R>(
        &self,
        rows: usize,
        weights: impl IntoIterator<Item = (&'w Packed, bool)>,
        run: impl FnOnce(&Desk<'_>) -> R,
    ) -> R {
        let rooms = weights.into_iter().map(|(w, normed)| {
            let few = Room::copy(rows.min(ALONE_ELEMENTS / w.k()), w, normed);
            few.times(self.pool().threads()).largest(Room::copy(rows, w, normed))
        });
        let room = rooms.fold(Room::default(), Room::largest);
        BUFFERS.with_borrow_mut(|buffers| {
            buffers.normed.reserve(room.normed);
            buffers.blocks.reserve(room.blocks);
            buffers.scales.reserve(room.scales);
            run(&Desk {
                normed: RowsMut::new(buffers.normed.as_mut_slice()),
                blocks: RowsMut::new(buffers.blocks.as_mut_slice()),
                scales: RowsMut::new(buffers.scales.as_mut_slice()),
            })
        })
    }

    /// `x` (m, k), normalised or not, as products with `w` need it. Every member of the team calls this.
    ///
    /// # Safety
    /// Nobody writes `x` while the inputs are used, and members have met since they used those before.
    pub(crate) unsafe fn input<'a>(
        &self,
        member: &Member<'_>,
        desk: &'a Desk<'_>,
        x: &'a [f32],
        norm: Option<&Norm>,
        w: &Packed,
    ) -> Input<'a> {
        let (k, rows) = (w.k(), x.len() / w.k());
        let alone = x.len() <= ALONE_ELEMENTS;
        let (copy, own) = if alone { (member.index(), 0..rows) } else { (0, member.share(rows)) };
        let room = Room::copy(rows, w, norm.is_some());
        let at = room.times(copy);
        let mut source = &x[own.start * k..own.end * k];
        if let Some(Norm { weight, eps }) = norm {
            assert_eq!(weight.len(), k, "a norm must have one weight per column");
            // SAFETY: every member has its own copy, or its own rows of the one.
            let out = unsafe { desk.normed.range(at.normed + own.start * k, source.len()) };
            dispatch!(self.isa(), normalise(source, weight, *eps, out));
            source = out;
        }
        if room.blocks > 0 {
            let job = Rounding { x: source, first_row: own.start, w, shift: shift(self.isa()), desk, at };
            dispatch!(self.isa(), round_rows(&job));
        }
        if !alone {
            member.meet();
        }
        // SAFETY: what members wrote they have written; the caller's promise.
        unsafe {
            match (room.blocks, norm) {
                (0, None) => Input::F32(x),
                (0, Some(_)) => Input::F32(desk.normed.view(at.normed, x.len())),
                _ => Input::Groups {
                    blocks: desk.blocks.view(at.blocks, room.blocks),
                    scales: desk.scales.view(at.scales, room.scales),
                },
            }
        }
    }
}

/// Rows to be rounded, and where they go.
struct Rounding<'a> {
    x: &'a [f32],
    first_row: usize,
    w: &'a Packed,
    shift: u8,
    desk: &'a Desk<'a>,
    at: Room,
}

/// Generic so that it is compiled for the instruction set of `L`.
///
/// # Safety
/// The ISA of `L` must be present; no other thread may work on the same rows of the same copy.
#[inline(always)]
unsafe fn round_rows<L: Lanes>(job: &Rounding<'_>) {
    let (k, pieces) = (job.w.k(), job.w.shape.pieces);
    let blocks = job.w.shape.blocks(4 / job.w.dtype().bytes());
    for (row, x) in (job.first_row..).zip(job.x.chunks_exact(k)) {
        for (piece, x) in x.chunks_exact(k / pieces).enumerate() {
            let first = job.at.blocks + (row / ROWS * pieces + piece) * blocks * BLOCK + row % ROWS * BLOCK_GROUPS;
            // SAFETY: a row's lines, one of each block, and its scales are written by the caller alone.
            let lines = (0..blocks).map(|block| unsafe { job.desk.blocks.range(first + block * BLOCK, BLOCK_GROUPS) });
            if job.w.dtype() == WeightType::Int8 {
                let scale = round_int8(x, job.shift, lines);
                // SAFETY: as above.
                unsafe { job.desk.scales.range(job.at.scales + row * pieces + piece, 1)[0] = scale };
            } else {
                // SAFETY: the caller's promise.
                unsafe { round_bf16::<L>(x, lines) };
            }
        }
    }
}

/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn round_bf16<'a, L: Lanes>(x: &[f32], lines: impl Iterator<Item = &'a mut [u32]>) {
    for (x, line) in x.chunks(2 * BLOCK_GROUPS).zip(lines) {
        // SAFETY: a line of 16 words is one of 32 half words; neither has invalid bits.
        let line = unsafe { std::slice::from_raw_parts_mut(line.as_mut_ptr().cast::<u16>(), 2 * BLOCK_GROUPS) };
        let whole = x.len() / L::WIDTH * L::WIDTH;
        for at in (0..whole).step_by(L::WIDTH) {
            // SAFETY: whole vectors of a line that is as long as `x`; the caller's promise.
            unsafe { L::load(x.as_ptr().add(at)).store_bf16(line.as_mut_ptr().add(at)) };
        }
        for (out, &x) in line[whole..].iter_mut().zip(&x[whole..]) {
            *out = <bf16 as Element>::round(x).to_bits();
        }
        line[x.len()..].fill(0);
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
