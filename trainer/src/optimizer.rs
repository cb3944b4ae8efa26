//! AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024, scaled as in Moonlight, Liu et al. 2025) for the
//! linear maps with AdamW for the rest. Global-norm clipping; decay on matrices only; an optional moving average.

use candle_core::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    model::{Kind, ModelShape, Segment},
    ops::{math, matrix, product, with_floats},
};

/// Steps of the Newton-Schulz iteration.
const ORTHOGONALIZE_STEPS: usize = 5;

/// Which rule updates the linear maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// AdamW for everything.
    Adamw,
    /// Muon for linear maps, AdamW for the table and the norms.
    Muon,
}

/// Constants of the update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Which rule.
    pub rule: Rule,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f32,
    /// Largest norm of the whole gradient.
    pub clip: f32,
    /// Decay of the moving average of weights, if one is kept.
    pub average: Option<f32>,
}

/// Moment decay of Muon.
const MUON_MOMENTUM: f32 = 0.95;

/// Master weights and moments, all flat and in parameter order.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    /// Weights.
    pub weights: Vec<Vec<f32>>,
    /// First moments.
    pub first: Vec<Vec<f32>>,
    /// Second moments.
    pub second: Vec<Vec<f32>>,
    /// Moving average of the weights.
    pub average: Option<Vec<Vec<f32>>>,
    /// Updates made.
    pub updates: u64,
    segments: Vec<Vec<Segment>>,
    settings: Settings,
}

impl Optimizer {
    /// An optimiser at its first step.
    pub fn new(shape: &ModelShape, weights: Vec<Vec<f32>>, settings: Settings) -> Optimizer {
        let zeros: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; w.len()]).collect();
        let mut segments = vec![Vec::new(); weights.len()];
        for segment in shape.segments() {
            segments[segment.parameter].push(segment);
        }
        let average = settings.average.map(|_| weights.clone());
        Optimizer { first: zeros.clone(), second: zeros, average, updates: 0, segments, settings, weights }
    }

    /// One update with the sum of `gradients` (one tensor per parameter in each); returns the gradient's norm.
    ///
    /// # Errors
    /// When a gradient is not a contiguous f32 tensor on the CPU.
    pub fn update(&mut self, gradients: &[Vec<Tensor>], rate: f32) -> candle_core::Result<f32> {
        let sizes: Vec<usize> = self.weights.iter().map(Vec::len).collect();
        let sums: candle_core::Result<Vec<Vec<f32>>> =
            sizes.par_iter().enumerate().map(|(index, &size)| sum(gradients, index, size)).collect();
        let sums = sums?;
        let squares: Vec<f64> =
            sums.par_iter().map(|g| g.iter().map(|x| f64::from(*x) * f64::from(*x)).sum()).collect();
        let norm = squares.iter().sum::<f64>().sqrt() as f32;
        let factor = (self.settings.clip / norm.max(1e-12)).min(1.0);
        self.updates += 1;
        let (settings, updates) = (self.settings, self.updates);
        let state =
            self.weights.par_iter_mut().zip(&mut self.first).zip(&mut self.second).zip(sums).zip(&self.segments);
        state.for_each(|((((weights, first), second), gradient), segments)| {
            for segment in segments {
                let range = segment.range();
                let part = Part {
                    weights: &mut weights[range.clone()],
                    first: &mut first[range.clone()],
                    second: &mut second[range.clone()],
                    gradient: &gradient[range],
                };
                let linear = matches!(segment.kind, Kind::Input | Kind::Output);
                if settings.rule == Rule::Muon && linear {
                    part.muon(&settings, segment, factor, rate);
                } else {
                    part.adam(&settings, segment.kind, factor, rate, updates);
                }
            }
        });
        if let (Some(average), Some(decay)) = (&mut self.average, settings.average) {
            let decay = decay.min((1 + updates) as f32 / (10 + updates) as f32);
            average.par_iter_mut().zip(&self.weights).for_each(|(average, weights)| {
                for (a, w) in average.iter_mut().zip(weights) {
                    *a = decay * *a + (1.0 - decay) * w;
                }
            });
        }
        Ok(norm)
    }

    /// The weights to measure and to export: the moving average if one is kept.
    pub fn best(&self) -> &[Vec<f32>] {
        self.average.as_ref().unwrap_or(&self.weights)
    }
}

fn sum(gradients: &[Vec<Tensor>], index: usize, size: usize) -> candle_core::Result<Vec<f32>> {
    let mut total = vec![0.0f32; size];
    for gradient in gradients {
        with_floats(&gradient[index], |values| {
            for (sum, x) in total.iter_mut().zip(values) {
                *sum += x;
            }
            Ok(())
        })?;
    }
    Ok(total)
}

struct Part<'a> {
    weights: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    gradient: &'a [f32],
}

impl Part<'_> {
    fn adam(self, settings: &Settings, kind: Kind, factor: f32, rate: f32, updates: u64) {
        let Settings { beta1, beta2, eps, weight_decay, .. } = *settings;
        let decay = if kind == Kind::Norm { 0.0 } else { weight_decay * rate };
        let step = i32::try_from(updates).unwrap_or(i32::MAX);
        let (bias1, bias2) = (1.0 - beta1.powi(step), 1.0 - beta2.powi(step));
        let Part { weights, first, second, gradient } = self;
        math::vectorized(
            #[inline(always)]
            || {
                for (((w, m), v), g) in weights.iter_mut().zip(&mut *first).zip(&mut *second).zip(gradient) {
                    let g = g * factor;
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *w -= decay * *w + rate * (*m / bias1) / ((*v / bias2).sqrt() + eps);
                }
            },
        );
    }

    fn muon(self, settings: &Settings, segment: &Segment, factor: f32, rate: f32) {
        let Part { weights, first, gradient, .. } = self;
        let mut update = vec![0.0f32; weights.len()];
        for ((u, m), g) in update.iter_mut().zip(first).zip(gradient) {
            let g = g * factor;
            *m = MUON_MOMENTUM * *m + (1.0 - MUON_MOMENTUM) * g;
            *u = (1.0 - MUON_MOMENTUM) * g + MUON_MOMENTUM * *m;
        }
        orthogonalize(&mut update, segment.rows, segment.columns);
        // 0.2 sqrt(max side) gives updates the root mean square that AdamW's have, so both share one rate.
        let scale = 0.2 * (segment.rows.max(segment.columns) as f32).sqrt() * rate;
        let decay = settings.weight_decay * rate;
        for (w, u) in weights.iter_mut().zip(&update) {
            *w -= decay * *w + scale * u;
        }
    }
}

/// Replaces a (rows, columns) matrix by about `U V^T` of its singular value decomposition: the quintic Newton-Schulz
/// iteration of Muon.
fn orthogonalize(x: &mut [f32], rows: usize, columns: usize) {
    let (a, b, c) = (3.4445f32, -4.775f32, 2.0315f32);
    let norm = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt() as f32 + 1e-12;
    x.iter_mut().for_each(|x| *x /= norm);
    let side = rows.min(columns);
    let (mut gram, mut polynomial) = (vec![0.0f32; side * side], vec![0.0f32; side * side]);
    let mut next = vec![0.0f32; x.len()];
    for _ in 0..ORTHOGONALIZE_STEPS {
        let plain = matrix(x, columns);
        let (left, right) = if rows <= columns { (plain, plain.t()) } else { (plain.t(), plain) };
        product(left, right, &mut gram, false);
        let square = matrix(&gram, side);
        product(square, square, &mut polynomial, false);
        for (p, gram) in polynomial.iter_mut().zip(&gram) {
            *p = b * gram + c * *p;
        }
        let polynomial = matrix(&polynomial, side);
        let (left, right) = if rows <= columns { (polynomial, plain) } else { (plain, polynomial) };
        product(left, right, &mut next, false);
        for (x, y) in x.iter_mut().zip(&next) {
            *x = a * *x + y;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthogonalized_matrices_have_singular_values_near_one() {
        for (rows, columns) in [(6, 10), (10, 6), (8, 8)] {
            let mut x: Vec<f32> = (0..rows * columns).map(|i| ((i * 7919 % 101) as f32 - 50.0) / 50.0).collect();
            orthogonalize(&mut x, rows, columns);
            // The mean squared singular value is the squared norm over the smaller side.
            let mean = x.iter().map(|v| v * v).sum::<f32>() / rows.min(columns) as f32;
            assert!((0.4..1.4).contains(&mean), "{mean}");
        }
    }
}
