//! Gathering rows of the embedding table.

use half::bf16;

use crate::kv::Element;
use crate::norm::TASK_ELEMENTS;
use crate::rows::RowsMut;
use crate::{Cpu, Packed, WeightType};

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
    /// A table whose rows `row` writes one at a time. Rows of an int8 model are kept in bf16.
    pub fn new(vocab: usize, width: usize, dtype: WeightType, row: &dyn Fn(usize, &mut [f32])) -> EmbeddingTable {
        assert!(width > 0, "rows need at least one element");
        let values = match dtype {
            WeightType::F32 => {
                let mut values = vec![0.0; vocab * width];
                values.chunks_exact_mut(width).enumerate().for_each(|(i, out)| row(i, out));
                Values::F32(values)
            }
            WeightType::Bf16 | WeightType::Int8 => {
                let (mut values, mut widened) = (Vec::with_capacity(vocab * width), vec![0.0; width]);
                for i in 0..vocab {
                    row(i, &mut widened);
                    values.extend(widened.iter().map(|&w| <bf16 as Element>::round(w)));
                }
                Values::Bf16(values)
            }
        };
        EmbeddingTable { width, vocab, values }
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

    /// `out(rows, head.k())` = the rows of `ids` of a tied head that holds ids from `first` on; zeros for the others.
    pub fn embed_tied(&self, ids: &[u32], head: &Packed, first: u32, out: &mut [f32]) {
        let width = head.k();
        assert_eq!(out.len(), ids.len() * width, "out must hold {} rows of {width}", ids.len());
        let out = RowsMut::new(out);
        self.pool().run(ids.len(), &|row| {
            // SAFETY: each row belongs to one task.
            let out = unsafe { out.range(row * width, width) };
            match ids[row].checked_sub(first).map(|id| id as usize).filter(|&id| id < head.n()) {
                Some(id) => head.row(id, out),
                None => out.fill(0.0),
            }
        });
    }
}
