//! Single-threaded f32 matrix product over strided views: `C (+)= A B`.
//!
//! Cache blocking and panel packing after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
//! (2008). The trainer runs one independent micro-batch per thread, so the product itself needs no threads; the
//! instruction set is chosen at run time.

use pulp::{Arch, Simd, WithSimd};

/// Depth of a packed block: one panel of `B` (`BLOCK_K` x two vectors) stays in the first-level cache.
const BLOCK_K: usize = 256;
/// Rows of `A` packed at once (a multiple of both tile heights).
const BLOCK_M: usize = 144;
/// Columns of `B` packed at once; with `BLOCK_K` it fills about half of a 2 MiB second-level cache.
const BLOCK_N: usize = 1024;
/// Widest tile: two vectors of the widest instruction set, in floats.
const TILE_COLUMNS_MAX: usize = 32;
/// Tallest tile.
const TILE_ROWS_MAX: usize = 12;

/// A matrix in a slice: element (i, j) is `data[i * row + j * column]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Elements, starting at (0, 0).
    pub data: &'a [f32],
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub column: usize,
}

impl<'a> View<'a> {
    /// Row-major with `width` elements per row.
    pub fn rows(data: &'a [f32], width: usize) -> View<'a> {
        View { data, row: width, column: 1 }
    }

    /// The transpose of a row-major matrix with `width` elements per stored row.
    pub fn transposed(data: &'a [f32], width: usize) -> View<'a> {
        View { data, row: 1, column: width }
    }
}

/// Packing buffers, kept between calls.
#[derive(Default)]
pub struct Packing {
    a: Vec<f32>,
    b: Vec<f32>,
}

/// `C(m, n) (+)= A(m, k) B(k, n)`; row `i` of `C` starts at `c[i * stride]`.
///
/// The order of additions over `k` is fixed, so equal inputs give equal bits.
#[allow(clippy::too_many_arguments, reason = "the shape of a matrix product")]
pub fn gemm(
    size: (usize, usize, usize),
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
    packing: &mut Packing,
) {
    Arch::new().dispatch(Product { size, a, b, c, stride, accumulate, packing });
}

struct Product<'a> {
    size: (usize, usize, usize),
    a: View<'a>,
    b: View<'a>,
    c: &'a mut [f32],
    stride: usize,
    accumulate: bool,
    packing: &'a mut Packing,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 { run::<S, 12>(simd, self) } else { run::<S, 6>(simd, self) }
    }
}

#[inline(always)]
fn run<S: Simd, const ROWS: usize>(simd: S, product: Product<'_>) {
    let Product { size: (m, n, k), a, b, c, stride, accumulate, packing } = product;
    let width = 2 * S::F32_LANES;
    packing.a.resize(BLOCK_M * BLOCK_K, 0.0);
    packing.b.resize(BLOCK_N * BLOCK_K, 0.0);
    for column in (0..n).step_by(BLOCK_N) {
        let columns = BLOCK_N.min(n - column);
        for depth in (0..k).step_by(BLOCK_K) {
            let depths = BLOCK_K.min(k - depth);
            pack_b(b, (depth, depths), (column, columns), width, &mut packing.b);
            for row in (0..m).step_by(BLOCK_M) {
                let rows = BLOCK_M.min(m - row);
                pack_a::<ROWS>(a, (row, rows), (depth, depths), &mut packing.a);
                let add = accumulate || depth > 0;
                for j in (0..columns).step_by(width) {
                    let panel_b = &packing.b[j * depths..(j + width) * depths];
                    for i in (0..rows).step_by(ROWS) {
                        let panel_a = &packing.a[i * depths..(i + ROWS) * depths];
                        let tile = multiply::<S, ROWS>(simd, panel_a, panel_b);
                        let start = (row + i) * stride + column + j;
                        let shape = (ROWS.min(rows - i), width.min(columns - j));
                        store::<S, ROWS>(simd, &tile, &mut c[start..], stride, shape, add);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn multiply<S: Simd, const ROWS: usize>(simd: S, a: &[f32], b: &[f32]) -> [[S::f32s; 2]; ROWS] {
    let mut tile = [[simd.splat_f32s(0.0); 2]; ROWS];
    let (a, _) = a.as_chunks::<ROWS>();
    let (b, _) = S::as_simd_f32s(b);
    let (b, _) = b.as_chunks::<2>();
    for (a, &[left, right]) in a.iter().zip(b) {
        for (sums, &value) in tile.iter_mut().zip(a) {
            let value = simd.splat_f32s(value);
            sums[0] = simd.mul_add_e_f32s(value, left, sums[0]);
            sums[1] = simd.mul_add_e_f32s(value, right, sums[1]);
        }
    }
    tile
}

#[inline(always)]
fn store<S: Simd, const ROWS: usize>(
    simd: S,
    tile: &[[S::f32s; 2]; ROWS],
    c: &mut [f32],
    stride: usize,
    (rows, columns): (usize, usize),
    add: bool,
) {
    let width = 2 * S::F32_LANES;
    if columns == width {
        for (i, sums) in tile.iter().enumerate() {
            if i == rows {
                break;
            }
            let (out, _) = S::as_mut_simd_f32s(&mut c[i * stride..i * stride + width]);
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = if add { simd.add_f32s(*out, sum) } else { sum };
            }
        }
        return;
    }
    let mut edge = [[0.0f32; TILE_COLUMNS_MAX]; TILE_ROWS_MAX];
    for (edge, sums) in edge.iter_mut().zip(tile) {
        let (vectors, _) = S::as_mut_simd_f32s(&mut edge[..width]);
        vectors.copy_from_slice(sums);
    }
    for (i, edge) in edge.iter().enumerate().take(rows) {
        for (out, &sum) in c[i * stride..i * stride + columns].iter_mut().zip(edge) {
            *out = if add { *out + sum } else { sum };
        }
    }
}

/// Panels of `width` columns, depth-major, zero-padded at the right edge.
#[inline(always)]
fn pack_b(b: View<'_>, depth: (usize, usize), column: (usize, usize), width: usize, out: &mut [f32]) {
    let ((depth, depths), (column, columns)) = (depth, column);
    for j in (0..columns).step_by(width) {
        let used = width.min(columns - j);
        let panel = &mut out[j * depths..(j + width) * depths];
        if used < width {
            panel.fill(0.0);
        }
        if b.column == 1 {
            for (p, line) in panel.chunks_exact_mut(width).enumerate() {
                let start = (depth + p) * b.row + column + j;
                line[..used].copy_from_slice(&b.data[start..start + used]);
            }
        } else {
            interleave(b.data, (column + j) * b.column + depth * b.row, b.column, b.row, used, width, panel);
        }
    }
}

/// Panels of `ROWS` rows, depth-major, zero-padded at the lower edge.
#[inline(always)]
fn pack_a<const ROWS: usize>(a: View<'_>, row: (usize, usize), depth: (usize, usize), out: &mut [f32]) {
    let ((row, rows), (depth, depths)) = (row, depth);
    for i in (0..rows).step_by(ROWS) {
        let used = ROWS.min(rows - i);
        let panel = &mut out[i * depths..(i + ROWS) * depths];
        if used < ROWS {
            panel.fill(0.0);
        }
        if a.row == 1 {
            for (p, line) in panel.chunks_exact_mut(ROWS).enumerate() {
                let start = row + i + (depth + p) * a.column;
                line[..used].copy_from_slice(&a.data[start..start + used]);
            }
        } else {
            interleave(a.data, (row + i) * a.row + depth * a.column, a.row, a.column, used, ROWS, panel);
        }
    }
}

/// `out[p * width + i] = data[start + i * line + p * step]` for every `i < used`.
#[inline(always)]
fn interleave(data: &[f32], start: usize, line: usize, step: usize, used: usize, width: usize, out: &mut [f32]) {
    let depths = out.len() / width;
    for i in 0..used {
        let source = &data[start + i * line..];
        if step == 1 {
            for (slot, &value) in out[i..].iter_mut().step_by(width).zip(&source[..depths]) {
                *slot = value;
            }
        } else {
            for (slot, &value) in out[i..].iter_mut().step_by(width).zip(source.iter().step_by(step)) {
                *slot = value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drawn(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn agrees_with_the_definition(m in 1usize..170, n in 1usize..90, k in 1usize..300, ta: bool, tb: bool, add: bool, seed: u64) {
            let (a, b) = (drawn(m * k, seed), drawn(k * n, seed ^ 7));
            let stride = n + 3;
            let before = drawn(m * stride, seed ^ 9);
            let mut c = before.clone();
            let va = if ta { View::transposed(&a, m) } else { View::rows(&a, k) };
            let vb = if tb { View::transposed(&b, k) } else { View::rows(&b, n) };
            gemm((m, n, k), va, vb, &mut c, stride, add, &mut Packing::default());
            for i in 0..m {
                for j in 0..stride {
                    let old = before[i * stride + j];
                    if j >= n {
                        prop_assert_eq!(c[i * stride + j], old);
                        continue;
                    }
                    let mut sum = if add { f64::from(old) } else { 0.0 };
                    for p in 0..k {
                        let x = va.data[i * va.row + p * va.column];
                        sum += f64::from(x) * f64::from(vb.data[p * vb.row + j * vb.column]);
                    }
                    prop_assert!((f64::from(c[i * stride + j]) - sum).abs() < 1e-4);
                }
            }
        }
    }
}
