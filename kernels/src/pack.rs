//! Weights of a product, laid out in panels so that a step streams them once.

use crate::kv::Element;
use crate::lines::Lines;
use crate::rows::RowsMut;
use crate::{Cpu, Isa};
use half::bf16;

/// Columns (output features) per panel.
pub(crate) const PANEL: usize = 32;

/// Fixed pieces that the sum over k of a row-parallel product is cut into (I4): ranks of a group own subtrees of them.
pub const PIECES: usize = 8;

/// Groups of 4 bytes of k that a block holds; pieces are padded with zeros to whole blocks.
pub(crate) const BLOCK_GROUPS: usize = 16;

/// Type of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight, rounded to nearest even.
    Bf16,
    /// 1 byte a weight and a scale per output feature; inputs are scaled to int8 per row.
    Int8,
}

impl WeightType {
    /// By lower-case name.
    pub fn named(name: &str) -> Option<WeightType> {
        [WeightType::F32, WeightType::Bf16, WeightType::Int8].into_iter().find(|kind| kind.name() == name)
    }

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "f32",
            WeightType::Bf16 => "bf16",
            WeightType::Int8 => "int8",
        }
    }

    /// Bytes of one weight.
    pub fn bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::Bf16 => 2,
            WeightType::Int8 => 1,
        }
    }
}

/// Shape of a product `y = x W^T` with W (n, k).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProductShape {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Pieces of equal length that sums over k are cut into and merged in a fixed tree: a power of two that divides
    /// `k`. [`PIECES`] for row-parallel products, of which a rank holds some; 1 otherwise.
    pub pieces: usize,
    /// Row `2i` of W is gate `i` and row `2i + 1` is up `i` of a gated product.
    pub gated: bool,
    /// Elements of a whole row of W; a rank takes `k` of them. Scales of int8 are those of whole rows.
    pub row: usize,
    /// The first of them that it takes.
    pub from: usize,
}

/// Weights (n, k), packed for one instruction set. Columns past `n` in the last panel are zero.
pub struct Packed {
    pub(crate) shape: ProductShape,
    dtype: WeightType,
    pub(crate) panels: Panels,
    /// Int8: per column of every panel the value of one unit.
    pub(crate) scales: Vec<f32>,
    /// Int8 with shifted inputs: per panel, piece and column 128 times the sum of the weights.
    pub(crate) shifts: Vec<i32>,
}

/// The layouts. A panel holds [`PANEL`] rows of W; of gated products half gates, then half ups.
pub(crate) enum Panels {
    /// `[panel][k][PANEL]`
    F32(Lines<f32>),
    /// `[panel][k][PANEL]`, widened when read.
    Bf16(Lines<u16>),
    /// `[panel][piece][group][PANEL]`: groups of two bf16 or four int8 along k.
    Groups(Lines<u32>),
}

impl ProductShape {
    /// A product whose sums run over k in one piece.
    pub fn new(n: usize, k: usize) -> Self {
        ProductShape { n, k, pieces: 1, gated: false, row: k, from: 0 }
    }

    /// The same with its sums over k in [`PIECES`] where k allows it.
    pub fn in_pieces(self) -> Self {
        ProductShape { pieces: if self.k.is_multiple_of(PIECES) { PIECES } else { 1 }, ..self }
    }

    /// The part of a product in pieces that one of `ranks` ranks computes.
    pub fn share(self, rank: usize, ranks: usize) -> Self {
        let k = self.k / ranks;
        ProductShape { k, pieces: self.pieces / ranks, from: self.from + rank * k, ..self }
    }

    /// Elements of k in one piece.
    pub(crate) fn piece(&self) -> usize {
        self.k / self.pieces
    }

    /// Blocks of one piece for weights of `per_group` elements a group.
    pub(crate) fn blocks(&self, per_group: usize) -> usize {
        self.piece().div_ceil(per_group * BLOCK_GROUPS)
    }

    /// Columns of the output that one panel makes.
    pub(crate) fn panel_columns(&self) -> usize {
        if self.gated { PANEL / 2 } else { PANEL }
    }

    /// Columns of the output.
    pub fn width(&self) -> usize {
        if self.gated { self.n / 2 } else { self.n }
    }

    pub(crate) fn panels(&self) -> usize {
        self.width().div_ceil(self.panel_columns())
    }

    /// Row of W behind a column of a panel, if there is one.
    fn source(&self, panel: usize, column: usize) -> Option<usize> {
        if !self.gated {
            return Some(panel * PANEL + column).filter(|&row| row < self.n);
        }
        let (half, index) = (column / (PANEL / 2), panel * (PANEL / 2) + column % (PANEL / 2));
        (index < self.n / 2).then_some(2 * index + half)
    }

    /// Panel and column of a row of W.
    fn place(&self, row: usize) -> (usize, usize) {
        if !self.gated {
            return (row / PANEL, row % PANEL);
        }
        let index = row / 2;
        (index / (PANEL / 2), index % (PANEL / 2) + row % 2 * (PANEL / 2))
    }

    fn check(&self) {
        assert!(self.n > 0 && self.k > 0, "a product needs at least one row and one column: {self:?}");
        let pieces = self.pieces.is_power_of_two() && self.pieces <= PIECES && self.k.is_multiple_of(self.pieces);
        assert!(pieces, "pieces must be a power of two up to {PIECES} that divides k: {self:?}");
        assert!(self.from + self.k <= self.row, "k must lie within a row: {self:?}");
        assert!(!self.gated || self.n.is_multiple_of(2), "a gated product has as many gates as ups: {self:?}");
    }
}

impl Packed {
    /// Output features.
    pub fn n(&self) -> usize {
        self.shape.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.shape.k
    }

    /// Shape of the product.
    pub fn shape(&self) -> &ProductShape {
        &self.shape
    }

    /// Type of the weights.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Memory of the weights.
    pub fn bytes(&self) -> usize {
        let panels = match &self.panels {
            Panels::F32(lines) => lines.as_slice().len() * 4,
            Panels::Bf16(lines) => lines.as_slice().len() * 2,
            Panels::Groups(lines) => lines.as_slice().len() * 4,
        };
        panels + 4 * (self.scales.len() + self.shifts.len())
    }

    /// Row `row` of W as stored, widened: `out` holds k elements.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, column) = self.shape.place(row);
        let (k, piece) = (self.shape.k, self.shape.piece());
        match &self.panels {
            Panels::F32(lines) => {
                let panel = &lines.as_slice()[panel * k * PANEL + column..];
                out.iter_mut().enumerate().for_each(|(i, out)| *out = panel[i * PANEL]);
            }
            Panels::Bf16(lines) => {
                let panel = &lines.as_slice()[panel * k * PANEL + column..];
                out.iter_mut().enumerate().for_each(|(i, out)| *out = bf16::from_bits(panel[i * PANEL]).widen());
            }
            Panels::Groups(lines) => {
                let per_group = 4 / self.dtype.bytes();
                let stride = self.shape.blocks(per_group) * BLOCK_GROUPS * PANEL;
                let pieces = lines.as_slice()[panel * self.shape.pieces * stride..].chunks_exact(stride);
                for (out, groups) in out.chunks_exact_mut(piece).zip(pieces) {
                    for (out, group) in out.chunks_mut(per_group).zip(groups[column..].iter().step_by(PANEL)) {
                        widen(*group, self.dtype, out);
                    }
                }
                if let Some(&scale) = self.scales.get(panel * PANEL + column) {
                    out.iter_mut().for_each(|out| *out *= scale);
                }
            }
        }
    }
}

/// The elements of one group, unscaled.
fn widen(group: u32, dtype: WeightType, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = match dtype {
            WeightType::Int8 => f32::from(group.to_le_bytes()[i] as i8),
            _ => f32::from_bits(group >> (16 * i) << 16),
        };
    }
}

impl Cpu {
    /// Packs `weights`, row-major (n, k).
    pub fn pack(&self, n: usize, k: usize, weights: &[f32], dtype: WeightType) -> Packed {
        assert_eq!(weights.len(), n * k, "weights must be (n, k)");
        self.pack_rows(ProductShape::new(n, k), dtype, &|row, out| out.copy_from_slice(&weights[row * k..][..k]))
    }

    /// Packs a product whose rows `row` writes one at a time, on all threads: no copy of W is made.
    pub fn pack_rows(
        &self,
        shape: ProductShape,
        dtype: WeightType,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Packed {
        shape.check();
        let groups = dtype == WeightType::Int8 || (dtype == WeightType::Bf16 && self.isa().has_bf16_dot());
        let (count, k) = (shape.panels(), shape.k);
        let mut packed = Packed { shape, dtype, panels: Panels::F32(Lines::zeroed(0)), scales: vec![], shifts: vec![] };
        match (groups, dtype) {
            (true, _) => self.pack_groups(&mut packed, row),
            (false, WeightType::F32) => {
                let mut lines = Lines::zeroed(count * k * PANEL);
                self.fill_panels(&shape, lines.as_mut_slice(), row, |w| w);
                packed.panels = Panels::F32(lines);
            }
            (false, _) => {
                let mut lines = Lines::zeroed(count * k * PANEL);
                self.fill_panels(&shape, lines.as_mut_slice(), row, |w| <bf16 as Element>::round(w).to_bits());
                packed.panels = Panels::Bf16(lines);
            }
        }
        packed
    }

    fn fill_panels<T: Send + Sync>(
        &self,
        shape: &ProductShape,
        lines: &mut [T],
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
        round: impl Fn(f32) -> T + Sync,
    ) {
        let size = shape.k * PANEL;
        let lines = RowsMut::new(lines);
        self.pool().run(shape.panels(), &|panel| {
            // SAFETY: each task writes its own panel.
            let out = unsafe { lines.range(panel * size, size) };
            let mut values = vec![0.0; shape.row];
            for column in 0..PANEL {
                let Some(source) = shape.source(panel, column) else { continue };
                row(source, &mut values);
                let values = &values[shape.from..shape.from + shape.k];
                values.iter().enumerate().for_each(|(i, &w)| out[i * PANEL + column] = round(w));
            }
        });
    }

    fn pack_groups(&self, packed: &mut Packed, row: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let (shape, dtype) = (packed.shape, packed.dtype);
        let int8 = dtype == WeightType::Int8;
        let (count, per_group) = (shape.panels(), 4 / dtype.bytes());
        let piece = shape.blocks(per_group) * BLOCK_GROUPS * PANEL;
        let size = shape.pieces * piece;
        let mut lines = Lines::<u32>::zeroed(count * size);
        packed.scales = vec![1.0; if int8 { count * PANEL } else { 0 }];
        let shifted = int8 && self.isa().has_unsigned_dot();
        packed.shifts = vec![0; if shifted { count * shape.pieces * PANEL } else { 0 }];
        let (out, scales) = (RowsMut::new(lines.as_mut_slice()), RowsMut::new(&mut packed.scales));
        let shifts = RowsMut::new(&mut packed.shifts);
        self.pool().run(count, &|panel| {
            // SAFETY: each task writes its own panel, here and below.
            let out = unsafe { out.range(panel * size, size) };
            let mut values = vec![0.0; shape.row];
            for column in 0..PANEL {
                let Some(source) = shape.source(panel, column) else { continue };
                row(source, &mut values);
                if int8 {
                    let scale = to_units(&mut values);
                    // SAFETY: as above.
                    unsafe { scales.range(panel * PANEL + column, 1)[0] = scale };
                }
                let values = &values[shape.from..shape.from + shape.k];
                for (index, values) in values.chunks_exact(shape.piece()).enumerate() {
                    for (i, elements) in values.chunks(per_group).enumerate() {
                        out[index * piece + i * PANEL + column] = group(elements, dtype);
                    }
                    if shifted {
                        let sum: i32 = values.iter().map(|&w| w as i32).sum();
                        // SAFETY: as above.
                        unsafe { shifts.range((panel * shape.pieces + index) * PANEL + column, 1)[0] = 128 * sum };
                    }
                }
            }
        });
        packed.panels = Panels::Groups(lines);
    }
}

/// Divides a row of weights by its scale and rounds to whole units of -127 to 127; returns the scale.
fn to_units(values: &mut [f32]) -> f32 {
    let largest = values.iter().fold(0.0f32, |max, w| max.max(w.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let scale = largest / 127.0;
    values.iter_mut().for_each(|w| *w = (*w / scale).round_ties_even().clamp(-127.0, 127.0));
    scale
}

fn group(elements: &[f32], dtype: WeightType) -> u32 {
    let bits = |i: usize, &w: &f32| match dtype {
        WeightType::Int8 => u32::from(w as i8 as u8) << (8 * i),
        _ => u32::from(<bf16 as Element>::round(w).to_bits()) << (16 * i),
    };
    elements.iter().enumerate().fold(0, |group, (i, w)| group | bits(i, w))
}

/// Whether this instruction set takes int8 inputs as they are, or shifted by 128.
pub(crate) fn shift(isa: Isa) -> u8 {
    if isa.has_unsigned_dot() { 0x80 } else { 0 }
}
