//! Root-mean-square normalisation.

use crate::Cpu;
use crate::lanes::Lanes;
use crate::rows::RowsMut;

/// Independent partial sums of a row; fixes the order of the reduction on every ISA.
const PARTIALS: usize = 16;

/// Elements below which a task is not worth handing to another thread.
pub(crate) const TASK_ELEMENTS: usize = 1 << 14;

/// What rows are normalised with.
#[derive(Clone, Debug)]
pub struct Norm {
    /// One per column.
    pub weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

impl Cpu {
    /// `out = x / sqrt(mean(x^2) + eps) * weight` per row of `weight.len()` elements.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        assert!(width > 0 && x.len().is_multiple_of(width), "x is not whole rows of {width}");
        assert_eq!(x.len(), out.len(), "out must be as long as x");
        let rows_per_task = TASK_ELEMENTS.div_ceil(width);
        let rows = x.len() / width;
        let out = RowsMut::new(out);
        self.pool().run(rows.div_ceil(rows_per_task), &|task| {
            let rows = task * rows_per_task..rows.min((task + 1) * rows_per_task);
            // SAFETY: each row belongs to one task.
            let out = unsafe { out.range(rows.start * width, rows.len() * width) };
            dispatch!(self.isa(), normalise(&x[rows.start * width..rows.end * width], weight, eps, out));
        });
    }
}

/// Rows of a task. Generic so that it is compiled for the instruction set of `L`.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
pub(crate) unsafe fn normalise<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let scale = rms_scale(x, eps);
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(crate) fn rms_scale(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0f32; PARTIALS];
    let chunks = x.chunks_exact(PARTIALS);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (sum, &v) in sums.iter_mut().zip(chunk) {
            *sum += v * v;
        }
    }
    for (sum, &v) in sums.iter_mut().zip(tail) {
        *sum += v * v;
    }
    let mut width = PARTIALS / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    1.0 / (sums[0] / x.len() as f32 + eps).sqrt()
}
