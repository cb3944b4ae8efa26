//! The feed-forward sublayer as one operation: `x + W_down (silu(W_gate n) * (W_up n))` with `n = rms_norm(x)`
//! (SwiGLU, Shazeer 2020).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{Saved, floats, math, matrix, product, put, take, tensor, with_floats};

/// (rows, hidden) x flat weights -> (rows, hidden). Flat weights, in order: gate (inner, hidden), up (inner, hidden),
/// down (hidden, inner), norm (hidden).
pub struct FeedForward {
    /// Width between the two products.
    pub inner: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Keep what the backward pass needs.
    pub keep: bool,
    /// Gate and up products, filled by the forward pass.
    pub saved: Saved<Vec<f32>>,
}

/// Number of weights of the sublayer.
pub fn weight_count(hidden: usize, inner: usize) -> usize {
    3 * inner * hidden + hidden
}

/// `out = silu(gate) * up` for rows of (gate, up).
fn activate(gate_up: &[f32], inner: usize, out: &mut [f32]) {
    math::vectorized(
        #[inline(always)]
        || {
            for (row, out) in gate_up.chunks_exact(2 * inner).zip(out.chunks_exact_mut(inner)) {
                let (gate, up) = row.split_at(inner);
                for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                    *out = g * u / (1.0 + math::exp(-g));
                }
            }
        },
    );
}

/// Turns `gate_up` into its own gradient, given that of [`activate`]'s result.
fn activate_backward(gate_up: &mut [f32], inner: usize, dout: &[f32]) {
    math::vectorized(
        #[inline(always)]
        || {
            for (row, dout) in gate_up.chunks_exact_mut(2 * inner).zip(dout.chunks_exact(inner)) {
                let (gate, up) = row.split_at_mut(inner);
                for ((g, u), &d) in gate.iter_mut().zip(up).zip(dout) {
                    let sigmoid = 1.0 / (1.0 + math::exp(-*g));
                    let silu = *g * sigmoid;
                    let slope = sigmoid + silu * (1.0 - sigmoid);
                    *g = d * *u * slope;
                    *u = d * silu;
                }
            }
        },
    );
}

impl FeedForward {
    fn forward(&self, x: &[f32], flat: &[f32], hidden: usize) -> Vec<f32> {
        let (rows, inner) = (x.len() / hidden, self.inner);
        let (gate_up_w, rest) = flat.split_at(2 * inner * hidden);
        let (down, norm) = rest.split_at(inner * hidden);
        let mut normed = vec![0.0; rows * hidden];
        math::norm_rows(x, norm, self.eps, &mut normed);
        let mut gate_up = vec![0.0; rows * 2 * inner];
        let weights = matrix(gate_up_w, hidden).t();
        product(matrix(&normed, hidden), weights, &mut gate_up, false);
        let mut active = vec![0.0; rows * inner];
        activate(&gate_up, inner, &mut active);
        let mut out = x.to_vec();
        let weights = matrix(down, inner).t();
        product(matrix(&active, inner), weights, &mut out, true);
        if self.keep {
            put(&self.saved, gate_up);
        }
        out
    }

    fn backward(&self, x: &[f32], flat: &[f32], dout: &[f32], hidden: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let (rows, inner) = (x.len() / hidden, self.inner);
        let mut gate_up = take(&self.saved, "feed_forward")?;
        let (gate_up_w, rest) = flat.split_at(2 * inner * hidden);
        let (down, norm) = rest.split_at(inner * hidden);
        let mut dflat = vec![0.0; flat.len()];
        let (dgate_up_w, rest) = dflat.split_at_mut(2 * inner * hidden);
        let (ddown, dnorm) = rest.split_at_mut(inner * hidden);

        let mut active = vec![0.0; rows * inner];
        activate(&gate_up, inner, &mut active);
        let dout_t = matrix(dout, hidden).t();
        product(dout_t, matrix(&active, inner), ddown, false);
        let mut dactive = active;
        let weights = matrix(down, inner);
        product(matrix(dout, hidden), weights, &mut dactive, false);
        activate_backward(&mut gate_up, inner, &dactive);

        let mut normed = vec![0.0; rows * hidden];
        math::norm_rows(x, norm, self.eps, &mut normed);
        let slopes_t = matrix(&gate_up, 2 * inner).t();
        product(slopes_t, matrix(&normed, hidden), dgate_up_w, false);
        let mut dnormed = normed;
        let slopes = matrix(&gate_up, 2 * inner);
        product(slopes, matrix(gate_up_w, hidden), &mut dnormed, false);
        let mut dx = dout.to_vec();
        math::norm_rows_backward(x, norm, self.eps, &dnormed, &mut dx, dnorm);
        Ok((dx, dflat))
    }
}

impl CustomOp2 for FeedForward {
    fn name(&self) -> &'static str {
        "feed_forward"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = lx.shape().dims2()?;
        let out = self.forward(floats(x, lx)?, floats(w, lw)?, hidden);
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, dout: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let hidden = x.dim(1)?;
        let (dx, dw) =
            with_floats(x, |xs| with_floats(w, |ws| with_floats(dout, |dout| self.backward(xs, ws, dout, hidden))))?;
        Ok((Some(tensor(dx, x.shape())?), Some(tensor(dw, w.shape())?)))
    }
}
