//! Row-wise arithmetic: exponentials, sums, RMS norm. Everything is written for the compiler's vectoriser and meant to
//! be called inside [`vectorized`], so that it is compiled once per instruction set.

use pulp::{Arch, Simd, WithSimd};

/// Runs `body` compiled for the best instruction set of the host. Mark the closure `#[inline(always)]`: only what is
/// inlined is compiled so.
pub fn vectorized<R>(body: impl FnMut() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnMut() -> R> WithSimd for Body<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }
    Arch::new().dispatch(Body(body))
}

/// Width of the partial sums: fixed, so that results do not depend on the instruction set's vector width.
const LANES: usize = 16;

/// `e^x` within about 2 units in the last place; arguments are clamped to the range of normal numbers
/// (Cephes `expf`: split by powers of two, degree-5 remainder polynomial).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer that sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let r = power.mul_add(-0.693_359_4, x);
    let r = power.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    y * scale
}

/// Inner product.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a, rest_a) = a.as_chunks::<LANES>();
    let (b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    let mut total: f32 = sums.iter().sum();
    for (a, b) in rest_a.iter().zip(rest_b) {
        total += a * b;
    }
    total
}

/// Sum of three-way products `a b c`.
#[inline(always)]
pub fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a, rest_a) = a.as_chunks::<LANES>();
    let (b, rest_b) = b.as_chunks::<LANES>();
    let (c, rest_c) = c.as_chunks::<LANES>();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            sums[i] = (a[i] * b[i]).mul_add(c[i], sums[i]);
        }
    }
    let mut total: f32 = sums.iter().sum();
    for ((a, b), c) in rest_a.iter().zip(rest_b).zip(rest_c) {
        total += a * b * c;
    }
    total
}

/// Largest element (`-inf` for an empty slice).
#[inline(always)]
pub fn largest(a: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            best[i] = if chunk[i] > best[i] { chunk[i] } else { best[i] };
        }
    }
    let head = best.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    rest.iter().fold(head, |m, &x| m.max(x))
}

/// Replaces every `x` by `e^(x - shift)` and returns their sum.
#[inline(always)]
pub fn exp_sum(a: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = a.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - shift);
            sums[i] += chunk[i];
        }
    }
    let mut total: f32 = sums.iter().sum();
    for x in rest {
        *x = exp(*x - shift);
        total += *x;
    }
    total
}

/// `a *= factor`.
#[inline(always)]
pub fn scale(a: &mut [f32], factor: f32) {
    for x in a {
        *x *= factor;
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    (dot(x, x) / x.len() as f32 + eps).sqrt().recip()
}

/// RMS norm of one row (Zhang and Sennrich 2019): `out = x / rms(x) * weight`.
#[inline(always)]
pub fn norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = inverse_rms(x, eps);
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * w;
    }
}

/// Gradient of [`norm_row`]: `dx += ...`, `dweight += ...` for the gradient `dy` of its result.
#[inline(always)]
pub fn norm_row_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
    let inverse = inverse_rms(x, eps);
    let slope = dot3(x, weight, dy) * inverse * inverse * inverse / x.len() as f32;
    for i in 0..x.len() {
        dweight[i] += dy[i] * x[i] * inverse;
        dx[i] += dy[i] * weight[i] * inverse - x[i] * slope;
    }
}

/// [`norm_row`] for every row of width `weight.len()`.
pub fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
                norm_row(x, weight, eps, out);
            }
        },
    );
}

/// [`norm_row_backward`] for every row.
pub fn norm_rows_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
    let width = weight.len();
    vectorized(
        #[inline(always)]
        || {
            for ((x, dy), dx) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
                norm_row_backward(x, weight, eps, dy, dx, dweight);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_accurate() {
        for i in -8_600..8_700 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= want * 4e-7, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
    }
}
