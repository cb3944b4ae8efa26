//! The attention sublayer as one operation: `x + W_o attention(rotate(norm(W_qkv rms_norm(x))))`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{
    Heads, Saved,
    attention::{Document, attention, attention_backward},
    floats, math, matrix, product, put,
    rotary::{QkNorm, Rotary, norm_rotate, norm_rotate_backward},
    take, tensor, with_floats,
};

/// (rows, hidden) x weights -> (rows, hidden). The weights are one flat tensor, see [`Weights`].
pub struct Attend {
    /// Shape of the heads.
    pub heads: Heads,
    /// Added to mean squares.
    pub eps: f32,
    /// Position of every row.
    pub positions: Arc<[u32]>,
    /// Documents of the batch.
    pub documents: Arc<[Document]>,
    /// Tables that cover every position.
    pub rotary: Arc<Rotary>,
    /// Keep what the backward pass needs.
    pub keep: bool,
    /// Filled by the forward pass.
    pub saved: Saved<Activations>,
}

/// Results of the forward pass that the backward pass reads.
pub struct Activations {
    qkv: Vec<f32>,
    rotated: Vec<f32>,
    attended: Vec<f32>,
}

/// Parts of the flat weights, in order: query, key and value rows (heads.width(), hidden), output
/// (hidden, heads * head_dim), input norm (hidden), query norm and key norm (head_dim each).
struct Weights<T> {
    qkv: T,
    output: T,
    norm: T,
    q_norm: T,
    k_norm: T,
}

fn sizes(heads: &Heads, hidden: usize) -> [usize; 5] {
    let inner = heads.heads * heads.head_dim;
    [heads.width() * hidden, hidden * inner, hidden, heads.head_dim, heads.head_dim]
}

/// Number of weights of the sublayer.
pub fn weight_count(heads: &Heads, hidden: usize) -> usize {
    sizes(heads, hidden).iter().sum()
}

fn split<'a>(flat: &'a [f32], heads: &Heads, hidden: usize) -> Weights<&'a [f32]> {
    let [a, b, c, d, _] = sizes(heads, hidden);
    let (qkv, rest) = flat.split_at(a);
    let (output, rest) = rest.split_at(b);
    let (norm, rest) = rest.split_at(c);
    let (q_norm, k_norm) = rest.split_at(d);
    Weights { qkv, output, norm, q_norm, k_norm }
}

fn split_mut<'a>(flat: &'a mut [f32], heads: &Heads, hidden: usize) -> Weights<&'a mut [f32]> {
    let [a, b, c, d, _] = sizes(heads, hidden);
    let (qkv, rest) = flat.split_at_mut(a);
    let (output, rest) = rest.split_at_mut(b);
    let (norm, rest) = rest.split_at_mut(c);
    let (q_norm, k_norm) = rest.split_at_mut(d);
    Weights { qkv, output, norm, q_norm, k_norm }
}

impl Attend {
    fn forward(&self, x: &[f32], flat: &[f32], hidden: usize) -> Vec<f32> {
        let rows = x.len() / hidden;
        let (width, inner) = (self.heads.width(), self.heads.heads * self.heads.head_dim);
        let w = split(flat, &self.heads, hidden);
        let mut normed = vec![0.0; rows * hidden];
        math::norm_rows(x, w.norm, self.eps, &mut normed);
        let mut qkv = vec![0.0; rows * width];
        let transposed = matrix(w.qkv, hidden).t();
        product(matrix(&normed, hidden), transposed, &mut qkv, false);
        let mut rotated = vec![0.0; rows * width];
        let norm = QkNorm { q: w.q_norm, k: w.k_norm, eps: self.eps };
        norm_rotate(&qkv, &self.heads, &self.positions, &self.rotary, norm, &mut rotated);
        let mut attended = vec![0.0; rows * inner];
        attention(&rotated, &self.heads, &self.documents, &mut attended);
        let mut out = x.to_vec();
        let transposed = matrix(w.output, inner).t();
        product(matrix(&attended, inner), transposed, &mut out, true);
        if self.keep {
            put(&self.saved, Activations { qkv, rotated, attended });
        }
        out
    }

    fn backward(&self, x: &[f32], flat: &[f32], dout: &[f32], hidden: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let rows = x.len() / hidden;
        let (width, inner) = (self.heads.width(), self.heads.heads * self.heads.head_dim);
        let Activations { qkv, rotated, attended } = take(&self.saved, "attend")?;
        let w = split(flat, &self.heads, hidden);
        let mut dflat = vec![0.0; flat.len()];
        let dw = split_mut(&mut dflat, &self.heads, hidden);

        let dout_t = matrix(dout, hidden).t();
        product(dout_t, matrix(&attended, inner), dw.output, false);
        let mut dattended = attended;
        let output = matrix(w.output, inner);
        product(matrix(dout, hidden), output, &mut dattended, false);
        let mut dqkv = vec![0.0; rows * width];
        attention_backward(&rotated, &self.heads, &self.documents, &dattended, &mut dqkv);
        let norm = QkNorm { q: w.q_norm, k: w.k_norm, eps: self.eps };
        let dnorm = (dw.q_norm, dw.k_norm);
        norm_rotate_backward(&qkv, &self.heads, &self.positions, &self.rotary, norm, &mut dqkv, dnorm);

        let mut normed = vec![0.0; rows * hidden];
        math::norm_rows(x, w.norm, self.eps, &mut normed);
        let dqkv_t = matrix(&dqkv, width).t();
        product(dqkv_t, matrix(&normed, hidden), dw.qkv, false);
        let mut dnormed = normed;
        let weights = matrix(w.qkv, hidden);
        product(matrix(&dqkv, width), weights, &mut dnormed, false);
        let mut dx = dout.to_vec();
        math::norm_rows_backward(x, w.norm, self.eps, &dnormed, &mut dx, dw.norm);
        Ok((dx, dflat))
    }
}

impl CustomOp2 for Attend {
    fn name(&self) -> &'static str {
        "attend"
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
