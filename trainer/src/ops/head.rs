//! Final norm, tied head and cross-entropy in one operation. Only rows with a loss reach the head, a chunk at a time, so
//! the logits of a batch never exist at once; their gradients are taken in the same pass.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{Saved, floats, math, matrix, product, put, take, tensor};

/// Rows of logits that exist at once.
const CHUNK_ROWS: usize = 256;

/// Which rows are scored against which token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Targets {
    /// Row in the batch; each at most once.
    pub rows: Vec<u32>,
    /// Right token of that row.
    pub tokens: Vec<u32>,
    /// Factor of that row's cross-entropy in the loss.
    pub weights: Vec<f32>,
}

/// (rows, hidden), norm (hidden), table (vocabulary, hidden) -> weighted sum of cross-entropies, shape (1).
pub struct Head {
    /// Rows that are scored.
    pub targets: Arc<Targets>,
    /// Token whose logit counts as minus infinity (the mask token).
    pub banned: u32,
    /// Added to the mean square.
    pub eps: f32,
    /// Compute gradients.
    pub keep: bool,
    /// Receives the cross-entropy in nats of every scored row.
    pub losses: Arc<Mutex<Vec<f32>>>,
    /// Gradients, filled by the forward pass.
    pub saved: Saved<Gradients>,
}

/// Gradients of the loss.
pub struct Gradients {
    dx: Vec<f32>,
    dnorm: Vec<f32>,
    dtable: Vec<f32>,
}

/// Cross-entropy of one row of logits, which become the gradient `weight * (softmax - onehot)`.
#[inline(always)]
fn cross_entropy(logits: &mut [f32], banned: usize, target: usize, weight: f32) -> f32 {
    logits[banned] = f32::NEG_INFINITY;
    let max = math::largest(logits);
    let right = logits[target];
    let total = math::exp_sum(logits, max);
    logits[banned] = 0.0;
    math::scale(logits, weight / total);
    logits[target] -= weight;
    total.ln() + max - right
}

impl Head {
    fn forward(&self, x: &[f32], norm: &[f32], table: &[f32]) -> f32 {
        let hidden = norm.len();
        let vocabulary = table.len() / hidden;
        let kept = |size: usize| vec![0.0f32; if self.keep { size } else { 0 }];
        let (mut dx, mut dnorm, mut dtable) = (kept(x.len()), kept(hidden), kept(table.len()));
        let mut picked = vec![0.0; CHUNK_ROWS * hidden];
        let mut normed = vec![0.0; CHUNK_ROWS * hidden];
        let mut logits = vec![0.0; CHUNK_ROWS * vocabulary];
        let mut losses = Vec::with_capacity(self.targets.rows.len());
        let all = self.targets.rows.chunks(CHUNK_ROWS).zip(self.targets.tokens.chunks(CHUNK_ROWS));
        for ((rows, tokens), weights) in all.zip(self.targets.weights.chunks(CHUNK_ROWS)) {
            let m = rows.len();
            for (&row, out) in rows.iter().zip(picked.chunks_exact_mut(hidden)) {
                out.copy_from_slice(&x[row as usize * hidden..][..hidden]);
            }
            math::norm_rows(&picked[..m * hidden], norm, self.eps, &mut normed[..m * hidden]);
            let logits = &mut logits[..m * vocabulary];
            let normed = &mut normed[..m * hidden];
            product(matrix(normed, hidden), matrix(table, hidden).t(), logits, false);
            math::vectorized(
                #[inline(always)]
                || {
                    for ((logits, &token), &weight) in logits.chunks_exact_mut(vocabulary).zip(tokens).zip(weights) {
                        losses.push(cross_entropy(logits, self.banned as usize, token as usize, weight));
                    }
                },
            );
            if !self.keep {
                continue;
            }
            let slopes = matrix(logits, vocabulary);
            product(slopes.t(), matrix(normed, hidden), &mut dtable, true);
            product(slopes, matrix(table, hidden), normed, false);
            for ((&row, x), dy) in rows.iter().zip(picked.chunks_exact(hidden)).zip(normed.chunks_exact(hidden)) {
                let dx = &mut dx[row as usize * hidden..][..hidden];
                math::norm_rows_backward(x, norm, self.eps, dy, dx, &mut dnorm);
            }
        }
        let sum: f64 = losses.iter().zip(&self.targets.weights).map(|(l, w)| f64::from(*l) * f64::from(*w)).sum();
        *self.losses.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = losses;
        if self.keep {
            put(&self.saved, Gradients { dx, dnorm, dtable });
        }
        sum as f32
    }
}

impl CustomOp3 for Head {
    fn name(&self) -> &'static str {
        "head"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        norm: &CpuStorage,
        ln: &Layout,
        table: &CpuStorage,
        lt: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let loss = self.forward(floats(x, lx)?, floats(norm, ln)?, floats(table, lt)?);
        Ok((CpuStorage::F32(vec![loss]), Shape::from(1)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        norm: &Tensor,
        table: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = take(&self.saved, "head")?;
        let factor = dloss.flatten_all()?.get(0)?.to_scalar::<f32>()?;
        if factor != 1.0 {
            math::scale(&mut gradients.dx, factor);
            math::scale(&mut gradients.dnorm, factor);
            math::scale(&mut gradients.dtable, factor);
        }
        let Gradients { dx, dnorm, dtable } = gradients;
        Ok((Some(tensor(dx, x.shape())?), Some(tensor(dnorm, norm.shape())?), Some(tensor(dtable, table.shape())?)))
    }
}
