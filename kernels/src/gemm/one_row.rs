//! One row of bf16 times weights in a cache: all pieces of a few panels side by side, in registers up to the end. A single
//! panel would wait for its own sums, and tiles would take as long as the sums. The bits are those of larger products.

use super::input::{BLOCK, Input};
use super::tile::Tile;
use super::{BLOCK_WEIGHTS, CACHED_BYTES, LEVELS, ROWS};
use crate::Isa;
use crate::pack::{BLOCK_GROUPS, PANEL, Packed, Panels, WeightType};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Panels that are summed side by side, at most.
const TOGETHER: usize = 3;

/// Groups of weights by which each panel is fetched ahead (2 KiB): the caches' own foresight ends at every page.
const AHEAD: usize = 512;

/// Inputs and weights of such a product, where it is one.
#[derive(Clone, Copy)]
pub(super) struct OneRow<'a> {
    x: &'a [u32],
    weights: &'a [u32],
    pieces: usize,
}

impl<'a> OneRow<'a> {
    /// `None` where the product has more rows, other weights, or the host another dot.
    pub(super) fn of(isa: Isa, input: Input<'a>, rows: &Range<usize>, w: &'a Packed) -> Option<Self> {
        let fits = isa == Isa::Avx512 && isa.has_bf16_dot() && rows.len() == 1;
        let (Input::Groups { blocks: x, .. }, Panels::Groups(weights)) = (input, &w.panels) else { return None };
        if !fits || w.dtype() != WeightType::Bf16 || w.bytes() > CACHED_BYTES {
            return None;
        }
        let pieces = w.shape.pieces;
        let length = pieces * w.shape.blocks(2) * BLOCK;
        let x = &x[rows.start / ROWS * length..][..length];
        Some(Self { x, weights: weights.as_slice(), pieces })
    }

    /// Sums of the panels of a task, in row 0 of the tiles: `done` gets each with its number. Panels that are summed side
    /// by side are those of runs that follow each other, so that what is fetched ahead is what comes next.
    pub(super) fn panels(&self, panels: Range<usize>, tiles: &mut [Tile], mut done: impl FnMut(usize, &Tile)) {
        let size = self.x.len() / BLOCK * BLOCK_WEIGHTS;
        let run = panels.len().div_ceil(if panels.len().is_multiple_of(2) { 2 } else { 3 });
        for at in 0..run {
            let (mut numbers, mut count) = ([0; TOGETHER], 0);
            for panel in panels.clone().skip(at).step_by(run) {
                numbers[count] = panel;
                count += 1;
            }
            let of = |i: usize| &self.weights[numbers[i] * size..][..size];
            // SAFETY: `OneRow::of` made sure of the dot; every panel holds as many blocks as the input.
            unsafe {
                match count {
                    1 => sum(self.x, [of(0)], self.pieces, tiles),
                    2 => sum(self.x, [of(0), of(1)], self.pieces, tiles),
                    _ => sum(self.x, [of(0), of(1), of(2)], self.pieces, tiles),
                }
            }
            numbers.iter().zip(&*tiles).take(count).for_each(|(&panel, tile)| done(panel, tile));
        }
    }
}

/// # Safety
/// The host must have the BF16 dot; `x` and each panel hold equally many blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn sum<const P: usize>(x: &[u32], panels: [&[u32]; P], pieces: usize, tiles: &mut [Tile]) {
    // SAFETY: offsets stay inside the blocks that the caller promises; 512 bits have no invalid pattern.
    unsafe {
        // Not cleared: that would take a good part of the time of a small product.
        let mut waiting = [MaybeUninit::<[[__m512; 2]; P]>::uninit(); LEVELS + 1];
        let mut count = 0;
        let mut w = panels.map(<[u32]>::as_ptr);
        for (piece, x) in x.chunks_exact(x.len() / pieces).enumerate() {
            let mut sums = [[_mm512_setzero_ps(); 2]; P];
            for x in x.chunks_exact(BLOCK) {
                for &group in &x[..BLOCK_GROUPS] {
                    let group = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(group as i32));
                    for (sums, w) in sums.iter_mut().zip(&mut w) {
                        for (half, sum) in sums.iter_mut().enumerate() {
                            let weights = _mm512_loadu_si512(w.add(16 * half).cast());
                            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(16 * half + AHEAD).cast());
                            *sum = _mm512_dpbf16_ps(*sum, group, std::mem::transmute::<__m512i, __m512bh>(weights));
                        }
                        *w = w.add(PANEL);
                    }
                }
            }
            // As in a binary counter: two sums of as many pieces each become one.
            for _ in 0..(piece + 1).trailing_zeros() {
                count -= 1;
                for (later, earlier) in
                    sums.as_flattened_mut().iter_mut().zip(waiting[count].assume_init_ref().as_flattened())
                {
                    *later = _mm512_add_ps(*earlier, *later);
                }
            }
            waiting[count].write(sums);
            count += 1;
        }
        for (tile, sums) in tiles.iter_mut().zip(waiting[0].assume_init()) {
            let out = tile.0[0].as_mut_ptr();
            _mm512_storeu_ps(out, sums[0]);
            _mm512_storeu_ps(out.add(16), sums[1]);
        }
    }
}
