//! Weights of a product, laid out in panels so that a step streams them once.

use crate::{Cpu, Isa};
use half::bf16;

/// Columns (output features) per panel.
pub(crate) const PANEL: usize = 32;

/// Type of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight, rounded to nearest even.
    Bf16,
}

impl WeightType {
    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "f32",
            WeightType::Bf16 => "bf16",
        }
    }
}

/// Weights (n, k) of `y = x W^T`, packed for one instruction set. Columns past `n` in the last panel are zero.
pub struct Packed {
    n: usize,
    k: usize,
    pub(crate) panels: Panels,
}

/// The layouts. A panel holds [`PANEL`] rows of W.
pub(crate) enum Panels {
    /// `[panel][k][PANEL]`
    F32(Lines<f32>),
    /// `[panel][k][PANEL]`, widened when read.
    Bf16(Lines<u16>),
    /// `[panel][k / 2][PANEL][2]`, for the dot instruction; an odd `k` is padded with zero.
    Bf16Pairs(Lines<u16>),
}

impl Packed {
    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Type of the weights.
    pub fn dtype(&self) -> WeightType {
        match self.panels {
            Panels::F32(_) => WeightType::F32,
            Panels::Bf16(_) | Panels::Bf16Pairs(_) => WeightType::Bf16,
        }
    }

    /// Memory of the weights.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(lines) => lines.len * 4,
            Panels::Bf16(lines) | Panels::Bf16Pairs(lines) => lines.len * 2,
        }
    }
}

impl Cpu {
    /// Packs `weights`, row-major (n, k).
    pub fn pack(&self, n: usize, k: usize, weights: &[f32], dtype: WeightType) -> Packed {
        assert!(n > 0 && k > 0, "a product needs at least one row and one column");
        assert_eq!(weights.len(), n * k, "weights must be (n, k)");
        let panels = match dtype {
            WeightType::F32 => Panels::F32(rows_of_panels(n, k, |row, col| weights[row * k + col])),
            WeightType::Bf16 if pairs(self.isa()) => {
                let half_k = k.div_ceil(2);
                let mut lines = Lines::<u16>::zeroed(n.div_ceil(PANEL) * half_k * PANEL * 2);
                let out = lines.as_mut_slice();
                for (row, source) in weights.chunks_exact(k).enumerate() {
                    let panel = row / PANEL * half_k * PANEL * 2;
                    for (col, &w) in source.iter().enumerate() {
                        out[panel + (col / 2 * PANEL + row % PANEL) * 2 + col % 2] = bf16::from_f32(w).to_bits();
                    }
                }
                Panels::Bf16Pairs(lines)
            }
            WeightType::Bf16 => {
                Panels::Bf16(rows_of_panels(n, k, |row, col| bf16::from_f32(weights[row * k + col]).to_bits()))
            }
        };
        Packed { n, k, panels }
    }
}

fn pairs(isa: Isa) -> bool {
    isa.has_bf16_dot()
}

fn rows_of_panels<T: Copy + Default>(n: usize, k: usize, at: impl Fn(usize, usize) -> T) -> Lines<T> {
    let mut lines = Lines::<T>::zeroed(n.div_ceil(PANEL) * k * PANEL);
    let out = lines.as_mut_slice();
    for row in 0..n {
        let panel = row / PANEL * k * PANEL;
        for col in 0..k {
            out[panel + col * PANEL + row % PANEL] = at(row, col);
        }
    }
    lines
}

/// Bytes of a cache line; every buffer of weights begins on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A zeroed buffer of plain numbers that begins on a cache line.
pub(crate) struct Lines<T> {
    lines: Vec<Line>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Copy + Default> Lines<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let lines = vec![Line([0; 64]); (len * size_of::<T>()).div_ceil(64)];
        Lines { lines, len, element: std::marker::PhantomData }
    }

    /// Grows to at least `len` elements; what was in it is lost when it does.
    pub(crate) fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = Self::zeroed(len);
        }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: the buffer holds `len` elements of a plain number type, for which any bits are valid (T is f32, u16 or u32).
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}
