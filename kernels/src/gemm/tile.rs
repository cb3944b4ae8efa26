//! One register tile of a product: up to [`ROWS`] rows times one panel.

use super::Epilogue;
use crate::Isa;
use crate::exp::exp;
use crate::lanes::Lanes;
use crate::pack::{PANEL, Packed, Panels};
use crate::rows::RowsMut;

/// Rows of the largest tile.
pub(super) const ROWS: usize = 8;

/// Results of one tile, a row per input row.
pub(super) type Tile = [[f32; PANEL]; ROWS];

/// Inputs of a product.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    /// (rows, k)
    F32(&'a [f32]),
    /// (rows, ceil(k / 2)) pairs of bf16, the even one in the low half
    Pairs(&'a [u32]),
}

/// `count` (8, 4, 2 or 1) rows from `first` on times one panel.
pub(super) fn product(
    isa: Isa,
    input: Input<'_>,
    first: usize,
    count: usize,
    w: &Packed,
    panel: usize,
    tile: &mut Tile,
) {
    let k = w.k();
    match (input, &w.panels) {
        (Input::F32(x), Panels::F32(panels)) => {
            let x = &x[first * k..(first + count) * k];
            let panel = &panels.as_slice()[panel * k * PANEL..(panel + 1) * k * PANEL];
            dispatch!(isa, rows(x, panel, k, count, tile))
        }
        (Input::F32(x), Panels::Bf16(panels)) => {
            let x = &x[first * k..(first + count) * k];
            let panel = &panels.as_slice()[panel * k * PANEL..(panel + 1) * k * PANEL];
            dispatch!(isa, rows(x, panel, k, count, tile))
        }
        (Input::Pairs(x), Panels::Bf16Pairs(panels)) => {
            let half_k = k.div_ceil(2);
            let x = &x[first * half_k..(first + count) * half_k];
            let panel = &panels.as_slice()[panel * half_k * PANEL * 2..(panel + 1) * half_k * PANEL * 2];
            pairs::product(x, panel, half_k, count, tile);
        }
        (Input::Pairs(_), _) | (_, Panels::Bf16Pairs(_)) => unreachable!("inputs are made for their weights"),
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
unsafe fn rows<L: Lanes>(x: &[f32], panel: &[impl Weight], k: usize, count: usize, tile: &mut Tile) {
    assert!(x.len() == count * k && panel.len() == k * PANEL);
    // Two vectors of columns at a time: with eight rows they fit 32 registers, with four 16.
    for at in (0..PANEL).step_by(2 * L::WIDTH) {
        // SAFETY: the lengths checked above; the caller's promise.
        unsafe {
            match count {
                8 if L::WIDTH == 16 => columns::<L, _, 8>(x, panel, k, at, 0, tile),
                8 => {
                    columns::<L, _, 4>(&x[..4 * k], panel, k, at, 0, tile);
                    columns::<L, _, 4>(&x[4 * k..], panel, k, at, 4, tile);
                }
                4 => columns::<L, _, 4>(x, panel, k, at, 0, tile),
                2 => columns::<L, _, 2>(x, panel, k, at, 0, tile),
                _ => columns::<L, _, 1>(x, panel, k, at, 0, tile),
            }
        }
    }
}

/// `M` rows times the panel's columns `[at, at + 2 * WIDTH)`.
///
/// # Safety
/// `x` holds `M * k` elements and `panel` `k * PANEL`; the ISA of `L` must be present.
#[inline(always)]
unsafe fn columns<L: Lanes, W: Weight, const M: usize>(
    x: &[f32],
    panel: &[W],
    k: usize,
    at: usize,
    first: usize,
    tile: &mut Tile,
) {
    // SAFETY: offsets stay below the lengths that the caller promises.
    unsafe {
        let mut sums = [[L::zero(); 2]; M];
        let mut weights = panel.as_ptr().add(at);
        for i in 0..k {
            let (low, high) = (W::load::<L>(weights), W::load::<L>(weights.add(L::WIDTH)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = L::splat(*x.get_unchecked(row * k + i));
                sums[0] = value.fma(low, sums[0]);
                sums[1] = value.fma(high, sums[1]);
            }
            weights = weights.add(PANEL);
        }
        for (row, sums) in sums.iter().enumerate() {
            let out = tile[first + row].as_mut_ptr().add(at);
            sums[0].store(out);
            sums[1].store(out.add(L::WIDTH));
        }
    }
}

/// Writes a tile's rows through the epilogue into columns `[column, column + PANEL)` of `out`.
pub(super) fn finish(
    isa: Isa,
    tile: &[[f32; PANEL]],
    first: usize,
    column: usize,
    n: usize,
    epilogue: Epilogue<'_>,
    out: &RowsMut<'_, f32>,
) {
    let columns = PANEL.min(n - column);
    for (i, row) in tile.iter().enumerate() {
        let start = (first + i) * n + column;
        if matches!(epilogue, Epilogue::SiluMul) {
            let mut gated = [0.0; PANEL / 2];
            dispatch!(isa, silu_mul(row, &mut gated));
            // SAFETY: each task writes its own panels' columns.
            unsafe { out.range(start / 2, columns / 2) }.copy_from_slice(&gated[..columns / 2]);
            continue;
        }
        // SAFETY: as above.
        let target = unsafe { out.range(start, columns) };
        match epilogue {
            Epilogue::Bias(bias) => {
                for ((t, y), b) in target.iter_mut().zip(row).zip(&bias[column..]) {
                    *t = y + b;
                }
            }
            Epilogue::Add => target.iter_mut().zip(row).for_each(|(t, y)| *t += y),
            Epilogue::Store | Epilogue::SiluMul => target.copy_from_slice(&row[..columns]),
        }
    }
}

/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn silu_mul<L: Lanes>(row: &[f32; PANEL], out: &mut [f32; PANEL / 2]) {
    let gates: [f32; PANEL / 2] = std::array::from_fn(|i| row[2 * i]);
    let mut powers: [f32; PANEL / 2] = gates.map(|g| -g.abs());
    for i in (0..PANEL / 2).step_by(L::WIDTH) {
        // SAFETY: a multiple of the widest vector; the caller's promise.
        unsafe { exp(L::load(powers.as_ptr().add(i))).store(powers.as_mut_ptr().add(i)) };
    }
    for (i, out) in out.iter_mut().enumerate() {
        let (gate, e) = (gates[i], powers[i]);
        let sigmoid = if gate >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) };
        *out = gate * sigmoid * row[2 * i + 1];
    }
}

/// The bf16 dot of AVX-512.
#[cfg(target_arch = "x86_64")]
mod pairs {
    use super::Tile;
    use crate::pack::PANEL;
    use std::arch::x86_64::*;

    pub(super) fn product(x: &[u32], panel: &[u16], half_k: usize, count: usize, tile: &mut Tile) {
        assert!(x.len() == count * half_k && panel.len() == half_k * PANEL * 2);
        // SAFETY: weights are packed in pairs only where the host has the dot; the lengths are checked above.
        unsafe {
            match count {
                8 => columns::<8>(x, panel, half_k, tile),
                4 => columns::<4>(x, panel, half_k, tile),
                2 => columns::<2>(x, panel, half_k, tile),
                _ => columns::<1>(x, panel, half_k, tile),
            }
        }
    }

    /// # Safety
    /// `x` holds `M * half_k` pairs and `panel` `half_k * PANEL` pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn columns<const M: usize>(x: &[u32], panel: &[u16], half_k: usize, tile: &mut Tile) {
        // SAFETY: offsets stay below the lengths that the caller promises; a 512-bit register has no invalid bits.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            let mut weights = panel.as_ptr();
            for i in 0..half_k {
                let low: __m512bh = std::mem::transmute(_mm512_loadu_si512(weights.cast()));
                let high: __m512bh = std::mem::transmute(_mm512_loadu_si512(weights.add(PANEL).cast()));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let pair = _mm512_set1_epi32(*x.get_unchecked(row * half_k + i) as i32);
                    let value: __m512bh = std::mem::transmute(pair);
                    sums[0] = _mm512_dpbf16_ps(sums[0], value, low);
                    sums[1] = _mm512_dpbf16_ps(sums[1], value, high);
                }
                weights = weights.add(2 * PANEL);
            }
            for (row, sums) in sums.iter().enumerate() {
                _mm512_storeu_ps(tile[row].as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(tile[row].as_mut_ptr().add(16), sums[1]);
            }
        }
    }
}

/// Only x86-64 packs weights in pairs.
#[cfg(not(target_arch = "x86_64"))]
mod pairs {
    use super::Tile;

    pub(super) fn product(_: &[u32], _: &[u16], _: usize, _: usize, _: &mut Tile) {
        unreachable!("this host has no bf16 dot")
    }
}
