//! Gathering rows of the embedding table.

use half::bf16;

use crate::kv::Element;
use crate::norm::TASK_ELEMENTS;
use crate::rows::RowsMut;
use crate::{Cpu, WeightType};

/// Embedding rows `(vocab, width)` in row order, f32 or bf16.
pub struct EmbeddingTable {
    width: usize,
    vocab: usize,
    values: Values,
}

enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl EmbeddingTable {
    /// A table from row-major `weights` of rows of `width` elements, stored as `dtype`.
    pub fn new(width: usize, weights: &[f32], dtype: WeightType) -> EmbeddingTable {
        assert!(width > 0 && weights.len().is_multiple_of(width), "weights are not whole rows of {width}");
        let values = match dtype {
            WeightType::F32 => Values::F32(weights.to_vec()),
            WeightType::Bf16 => Values::Bf16(weights.iter().map(|&w| Element::round(w)).collect()),
        };
        EmbeddingTable { width, vocab: weights.len() / width, values }
    }

    /// Elements per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Bytes of storage.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F32(values) => values.len() * 4,
            Values::Bf16(values) => values.len() * 2,
        }
    }
}

impl Cpu {
    /// `out(rows, width)` = the table's rows of `ids`. Every id must be below `table.vocab()`.
    pub fn embed(&self, ids: &[u32], table: &EmbeddingTable, out: &mut [f32]) {
        let width = table.width;
        assert_eq!(out.len(), ids.len() * width, "out must hold {} rows of {width}", ids.len());
        let known = ids.iter().all(|&id| (id as usize) < table.vocab);
        assert!(known, "an id is outside the table of {} rows", table.vocab);
        let rows_per_task = TASK_ELEMENTS.div_ceil(width);
        let out = RowsMut::new(out);
        self.pool().run(ids.len().div_ceil(rows_per_task), &|task| {
            for (row, &id) in ids.iter().enumerate().skip(task * rows_per_task).take(rows_per_task) {
                // SAFETY: each row belongs to one task.
                let out = unsafe { out.range(row * width, width) };
                let start = id as usize * width;
                match &table.values {
                    Values::F32(values) => out.copy_from_slice(&values[start..start + width]),
                    Values::Bf16(values) => {
                        for (out, &value) in out.iter_mut().zip(&values[start..start + width]) {
                            *out = value.widen();
                        }
                    }
                }
            }
        });
    }
}
