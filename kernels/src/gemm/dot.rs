//! Products of groups of 4 bytes by the dot instructions of each set; sums of int8 are exact, so all sets agree on them.

use super::BLOCK_WEIGHTS;
use super::input::{BLOCK, ROWS};
use super::tile::Tile;
use crate::Isa;
use crate::pack::{BLOCK_GROUPS, PANEL};

/// Weights of one piece of a panel, and those that are read after them: fetched ahead, since the loops ask for memory
/// in bursts otherwise.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) piece: &'a [u32],
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) next: &'a [u32],
}

/// Sums of `count` rows of bf16 pairs times one piece of a panel.
#[cfg(target_arch = "x86_64")]
pub(super) fn bf16(x: &[u32], weights: Weights<'_>, count: usize, tile: &mut Tile) {
    check(x, weights.piece, count);
    // SAFETY: weights are packed in pairs only where the host has the dot; the lengths are checked.
    unsafe { avx512::bf16(x, weights, count, tile) }
}

/// Only x86-64 packs bf16 in pairs.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn bf16(_: &[u32], _: Weights<'_>, _: usize, _: &mut Tile) {
    unreachable!("this host has no bf16 dot")
}

/// Bits of the i32 sums of `count` rows of int8 times one piece of a panel.
pub(super) fn int8(isa: Isa, x: &[u32], weights: Weights<'_>, count: usize, tile: &mut Tile) {
    let Weights { piece, .. } = weights;
    check(x, piece, count);
    // SAFETY: `Cpu::new` refuses an instruction set that the host lacks; the lengths are checked.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if isa.has_unsigned_dot() => avx512::int8(x, weights, count, tile),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx2 => avx2::int8(x, piece, count, tile),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::int8(x, piece, count, tile),
            _ => portable(x, piece, count, tile),
        }
    }
}

fn check(x: &[u32], weights: &[u32], count: usize) {
    let blocks = x.len() / BLOCK;
    assert!(x.len() == blocks * BLOCK && weights.len() == blocks * BLOCK_WEIGHTS && count <= ROWS);
}

/// Splits `count` rows into as few runs as registers allow, as even as can be: a short run waits for its own sums.
macro_rules! by_rows {
    ($rows:ident::<$most:literal, $($run:literal),*>($x:expr, $weights:expr, $count:expr, $tile:expr)) => {{
        let mut first = 0;
        while first < $count {
            let left: usize = $count - first;
            first += match left.div_ceil(left.div_ceil($most)) {
                $most => $rows::<$most>($x, $weights, first, $tile),
                $($run => $rows::<$run>($x, $weights, first, $tile),)*
                _ => $rows::<1>($x, $weights, first, $tile),
            };
        }
    }};
}

fn portable(x: &[u32], weights: &[u32], count: usize, tile: &mut Tile) {
    for (row, out) in tile.0[..count].iter_mut().enumerate() {
        let mut sums = [0i32; PANEL];
        for (x, weights) in x.chunks_exact(BLOCK).zip(weights.chunks_exact(BLOCK_WEIGHTS)) {
            for (x, weights) in x[row * BLOCK_GROUPS..].iter().zip(weights.chunks_exact(PANEL)) {
                let x = x.to_le_bytes().map(|b| i32::from(b as i8));
                for (sum, w) in sums.iter_mut().zip(weights) {
                    let w = w.to_le_bytes().map(|b| i32::from(b as i8));
                    *sum += x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = f32::from_bits(sum as u32);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::*;
    use std::arch::x86_64::*;

    /// # Safety
    /// The host must have the BF16 dot; `x` and `weights` hold equally many blocks.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn bf16(x: &[u32], weights: Weights<'_>, count: usize, tile: &mut Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_rows!(bf16_rows::<8, 7, 6, 5, 4, 3, 2>(x, (weights, count), count, tile)) }
    }

    /// # Safety
    /// The host must have the VNNI dot; otherwise as [`bf16`]. Inputs are shifted by 128.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    pub(super) unsafe fn int8(x: &[u32], weights: Weights<'_>, count: usize, tile: &mut Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_rows!(int8_rows::<8, 7, 6, 5, 4, 3, 2>(x, (weights, count), count, tile)) }
    }

    /// Rows `first..first + M` of `count`; `$dot` adds the dots of a vector of weights with one broadcast group. Of the
    /// weights to come each pass over the piece fetches its share.
    macro_rules! rows {
        ($name:ident, $features:literal, $dot:expr) => {
            #[target_feature(enable = $features)]
            unsafe fn $name<const M: usize>(
                x: &[u32],
                (weights, count): (Weights<'_>, usize),
                first: usize,
                tile: &mut Tile,
            ) -> usize {
                // SAFETY: offsets stay inside the blocks that the caller promises; 512 bits have no invalid pattern.
                unsafe {
                    let mut sums = [[_mm512_setzero_si512(); 2]; M];
                    let mut w = weights.piece.as_ptr();
                    let all = count <= M;
                    let share = if all { 0 } else { weights.next.len() / 2 * usize::from(first > 0) };
                    // Without weights to come, lines that are there: a hint that leads nowhere takes a walk over page tables.
                    let (from, step) =
                        if weights.next.is_empty() { (x.as_ptr(), 0) } else { (weights.next.as_ptr(), 16) };
                    let mut next = from.wrapping_add(share);
                    for x in x.chunks_exact(BLOCK) {
                        for i in 0..BLOCK_GROUPS {
                            _mm_prefetch::<_MM_HINT_T1>(next.cast());
                            next = next.wrapping_add(step);
                            if all {
                                _mm_prefetch::<_MM_HINT_T1>(next.cast());
                                next = next.wrapping_add(step);
                            }
                            let (low, high) = (_mm512_loadu_si512(w.cast()), _mm512_loadu_si512(w.add(16).cast()));
                            for (row, sums) in sums.iter_mut().enumerate() {
                                let group = *x.get_unchecked((first + row) * BLOCK_GROUPS + i);
                                let group = _mm512_set1_epi32(group as i32);
                                sums[0] = $dot(sums[0], group, low);
                                sums[1] = $dot(sums[1], group, high);
                            }
                            w = w.add(PANEL);
                        }
                    }
                    for (row, sums) in sums.iter().enumerate() {
                        let out = tile.0[first + row].as_mut_ptr();
                        _mm512_storeu_si512(out.cast(), sums[0]);
                        _mm512_storeu_si512(out.add(16).cast(), sums[1]);
                    }
                }
                M
            }
        };
    }

    rows!(bf16_rows, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16", |sum, x, w| {
        let (x, w) = (std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w));
        _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), x, w))
    });
    rows!(int8_rows, "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", |sum, x, w| _mm512_dpbusd_epi32(sum, x, w));
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;
    use std::arch::x86_64::*;

    /// # Safety
    /// The host must have AVX2; `x` and `weights` hold equally many blocks.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn int8(x: &[u32], weights: &[u32], count: usize, tile: &mut Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_rows!(rows::<4, 3, 2>(x, weights, count, tile)) }
    }

    /// # Safety
    /// As [`int8`].
    #[target_feature(enable = "avx2")]
    unsafe fn rows<const M: usize>(x: &[u32], weights: &[u32], first: usize, tile: &mut Tile) -> usize {
        // SAFETY: offsets stay inside the blocks that the caller promises.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            for at in (0..PANEL).step_by(16) {
                let mut sums = [[_mm256_setzero_si256(); 2]; M];
                let mut w = weights.as_ptr().add(at);
                for x in x.chunks_exact(BLOCK) {
                    for i in 0..BLOCK_GROUPS {
                        let w_pair = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(8).cast())];
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let group = _mm256_set1_epi32(*x.get_unchecked((first + row) * BLOCK_GROUPS + i) as i32);
                            // |x| times w with x's sign: both at most 127, so two products fit 16 bits.
                            let size = _mm256_abs_epi8(group);
                            for (sum, w) in sums.iter_mut().zip(w_pair) {
                                let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w, group));
                                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                            }
                        }
                        w = w.add(PANEL);
                    }
                }
                for (row, sums) in sums.iter().enumerate() {
                    let out = tile.0[first + row].as_mut_ptr().add(at);
                    _mm256_storeu_si256(out.cast(), sums[0]);
                    _mm256_storeu_si256(out.add(8).cast(), sums[1]);
                }
            }
        }
        M
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::*;
    use std::arch::aarch64::*;

    /// # Safety
    /// `x` and `weights` hold equally many blocks.
    pub(super) unsafe fn int8(x: &[u32], weights: &[u32], count: usize, tile: &mut Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_rows!(rows::<4, 3, 2>(x, weights, count, tile)) }
    }

    /// # Safety
    /// As [`int8`].
    unsafe fn rows<const M: usize>(x: &[u32], weights: &[u32], first: usize, tile: &mut Tile) -> usize {
        // SAFETY: offsets stay inside the blocks that the caller promises; NEON is part of every 64-bit Arm.
        unsafe {
            for at in (0..PANEL).step_by(8) {
                let mut sums = [[vdupq_n_s32(0); 2]; M];
                let mut w = weights.as_ptr().add(at);
                for x in x.chunks_exact(BLOCK) {
                    for i in 0..BLOCK_GROUPS {
                        let w_pair = [vld1q_s8(w.cast()), vld1q_s8(w.add(4).cast())];
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let group = *x.get_unchecked((first + row) * BLOCK_GROUPS + i);
                            let group = vreinterpretq_s8_u32(vdupq_n_u32(group));
                            for (sum, w) in sums.iter_mut().zip(w_pair) {
                                // Products of 8 bits in 16, pairs of them in 32, pairs of those are the dots of 4.
                                let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(group)));
                                let high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(group)));
                                *sum = vaddq_s32(*sum, vpaddq_s32(low, high));
                            }
                        }
                        w = w.add(PANEL);
                    }
                }
                for (row, sums) in sums.iter().enumerate() {
                    let out = tile.0[first + row].as_mut_ptr().add(at).cast::<i32>();
                    vst1q_s32(out, sums[0]);
                    vst1q_s32(out.add(4), sums[1]);
                }
            }
        }
        M
    }
}
