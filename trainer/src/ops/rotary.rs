//! Per-head RMS norm of queries and keys (Qwen3) followed by rotary position embedding (Su et al. 2021, rotate-half).

use super::{Heads, math};

/// Cosines and sines for every position, computed in f64.
pub struct Rotary {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rotary {
    /// Tables for `positions` positions of heads of `head_dim` dimensions.
    pub fn new(head_dim: usize, theta: f64, positions: usize) -> Rotary {
        let half = head_dim / 2;
        let angle = |i: usize| (i / half) as f64 * theta.powf(-2.0 * (i % half) as f64 / head_dim as f64);
        let cos = (0..positions * half).map(|i| angle(i).cos() as f32).collect();
        let sin = (0..positions * half).map(|i| angle(i).sin() as f32).collect();
        Rotary { cos, sin, half }
    }

    #[inline(always)]
    fn row(&self, position: u32) -> (&[f32], &[f32]) {
        let start = position as usize * self.half;
        (&self.cos[start..start + self.half], &self.sin[start..start + self.half])
    }
}

/// Norm weights of one layer.
#[derive(Clone, Copy)]
pub struct QkNorm<'a> {
    /// For queries, `head_dim` elements.
    pub q: &'a [f32],
    /// For keys, `head_dim` elements.
    pub k: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// Writes normed and rotated queries and keys, and unchanged values, of `qkv` to `out`; both (rows, heads.width()).
pub fn norm_rotate(qkv: &[f32], heads: &Heads, positions: &[u32], rotary: &Rotary, norm: QkNorm<'_>, out: &mut [f32]) {
    let (width, dim) = (heads.width(), heads.head_dim);
    let turned = (heads.heads + heads.kv_heads) * dim;
    math::vectorized(
        #[inline(always)]
        || {
            for ((x, y), &position) in qkv.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(positions) {
                let (cos, sin) = rotary.row(position);
                for (head, (x, y)) in x[..turned].chunks_exact(dim).zip(y[..turned].chunks_exact_mut(dim)).enumerate() {
                    let weight = if head < heads.heads { norm.q } else { norm.k };
                    math::norm_row(x, weight, norm.eps, y);
                    let (low, high) = y.split_at_mut(rotary.half);
                    for i in 0..rotary.half {
                        let (a, b) = (low[i], high[i]);
                        low[i] = a * cos[i] - b * sin[i];
                        high[i] = b * cos[i] + a * sin[i];
                    }
                }
                y[turned..].copy_from_slice(&x[turned..]);
            }
        },
    );
}

/// Gradient of [`norm_rotate`]: `dy` (of its result) becomes the gradient of `qkv` in place; `dnorm` collects the
/// gradients of the query and the key norm weights.
pub fn norm_rotate_backward(
    qkv: &[f32],
    heads: &Heads,
    positions: &[u32],
    rotary: &Rotary,
    norm: QkNorm<'_>,
    dy: &mut [f32],
    (dq_norm, dk_norm): (&mut [f32], &mut [f32]),
) {
    let (width, dim) = (heads.width(), heads.head_dim);
    let turned = (heads.heads + heads.kv_heads) * dim;
    let mut straight = vec![0.0f32; dim];
    math::vectorized(
        #[inline(always)]
        || {
            for ((x, dy), &position) in qkv.chunks_exact(width).zip(dy.chunks_exact_mut(width)).zip(positions) {
                let (cos, sin) = rotary.row(position);
                for (head, (x, dy)) in x[..turned].chunks_exact(dim).zip(dy[..turned].chunks_exact_mut(dim)).enumerate()
                {
                    let (low, high) = straight.split_at_mut(rotary.half);
                    for i in 0..rotary.half {
                        let (a, b) = (dy[i], dy[i + rotary.half]);
                        low[i] = a * cos[i] + b * sin[i];
                        high[i] = b * cos[i] - a * sin[i];
                    }
                    let query = head < heads.heads;
                    let weight = if query { norm.q } else { norm.k };
                    let dweight = if query { &mut *dq_norm } else { &mut *dk_norm };
                    dy.fill(0.0);
                    math::norm_row_backward(x, weight, norm.eps, &straight, dy, dweight);
                }
            }
        },
    );
}
