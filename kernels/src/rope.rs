//! Rotary embedding, optional query/key norm, and the append to the cache, in one pass over a step's rows.

use half::bf16;
use std::sync::OnceLock;

use crate::Cpu;
use crate::kv::{Blocks, Element, HeadShape, KvCache, KvType, PAGE_SLOTS, RowTable};
use crate::lanes::Lanes;
use crate::norm::rms_scale;
use crate::pool::Member;
use crate::rows::RowsMut;

/// Positions of one stretch of the tables.
const STRETCH: usize = 1024;

/// Cosines and sines of the rotary embedding (Su et al. 2021, "RoFormer"), halves paired: `(i, i + rotary_dim / 2)`.
pub struct Rotary {
    head_dim: usize,
    half: usize,
    positions: usize,
    frequencies: Vec<f64>,
    /// Per stretch `(STRETCH, 2, half)`: cosines, then sines. Made when a row first falls into it: a context of a million
    /// positions costs nothing until it is used.
    stretches: Vec<OnceLock<Box<[f32]>>>,
}

impl Rotary {
    /// Tables for `positions` positions, computed in f64; the first stretch of them now. The first `rotary_dim` (even) of `head_dim` elements rotate.
    pub fn new(head_dim: usize, rotary_dim: usize, theta: f64, positions: usize) -> Rotary {
        assert!(rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim, "rotary_dim {rotary_dim} of {head_dim}");
        let half = rotary_dim / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64)).collect();
        let stretches = (0..positions.div_ceil(STRETCH)).map(|_| OnceLock::new()).collect();
        let rotary = Rotary { head_dim, half, positions, frequencies, stretches };
        if positions > 0 {
            rotary.stretch(0);
        }
        rotary
    }

    fn stretch(&self, index: usize) -> &[f32] {
        self.stretches[index].get_or_init(|| {
            let mut table = Vec::with_capacity(STRETCH * 2 * self.half);
            for position in index * STRETCH..(index + 1) * STRETCH {
                table.extend(self.frequencies.iter().map(|f| (position as f64 * f).cos() as f32));
                table.extend(self.frequencies.iter().map(|f| (position as f64 * f).sin() as f32));
            }
            table.into_boxed_slice()
        })
    }

    /// Positions the tables cover.
    pub fn positions(&self) -> usize {
        self.positions
    }

    pub(crate) fn check(&self, shape: &HeadShape, norms: Option<&QkNorm<'_>>, rows: &RowTable<'_>) {
        assert_eq!(self.head_dim, shape.head_dim, "the rotary tables are for another head width");
        let covered = rows.rows.iter().all(|row| (row.position as usize) < self.positions);
        assert!(covered, "a position is outside the {} of the rotary tables", self.positions);
        if let Some(norms) = norms {
            let fits = norms.q.len() == shape.head_dim && norms.k.len() == shape.head_dim;
            assert!(fits, "query and key norms must hold {} weights", shape.head_dim);
        }
    }

    #[inline(always)]
    fn rotate(&self, head: &mut [f32], position: usize) {
        let table = self.stretch(position / STRETCH);
        let (cos, sin) = table[position % STRETCH * 2 * self.half..][..2 * self.half].split_at(self.half);
        let (low, high) = head[..2 * self.half].split_at_mut(self.half);
        for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b) = (*low, *high);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}

/// Weights of the per-head RMS norm of queries and keys, each `head_dim` elements.
#[derive(Clone, Copy, Debug)]
pub struct QkNorm<'a> {
    /// Weight of the query norm.
    pub q: &'a [f32],
    /// Weight of the key norm.
    pub k: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// What the members of a team share.
pub(crate) struct Append<'a, E> {
    pub(crate) qkv: &'a RowsMut<'a, f32>,
    pub(crate) shape: HeadShape,
    pub(crate) rotary: &'a Rotary,
    pub(crate) norms: Option<QkNorm<'a>>,
    pub(crate) rows: RowTable<'a>,
    pub(crate) kv: Blocks<'a, E>,
}

impl Cpu {
    /// Per row of `qkv` (queries, keys, values side by side, [`HeadShape::qkv_width`] columns): optional per-head RMS
    /// norm of queries and keys, rotary on both (in place), then keys and values go to the cache slots of the rows.
    /// Where two rows name one slot, the later row stays.
    #[allow(clippy::too_many_arguments)]
    pub fn rope_append(
        &self,
        qkv: &mut [f32],
        shape: &HeadShape,
        rotary: &Rotary,
        norms: Option<QkNorm<'_>>,
        rows: &RowTable<'_>,
        layer: usize,
        kv: &mut KvCache,
    ) {
        kv.check(shape, layer);
        rows.check(kv.pages());
        assert_eq!(qkv.len(), rows.rows.len() * shape.qkv_width(), "qkv must hold one row per entry of the table");
        rotary.check(shape, norms.as_ref(), rows);
        let (qkv, shape, rows) = (&RowsMut::new(qkv), *shape, *rows);
        // SAFETY: the team does nothing else.
        match kv.dtype() {
            KvType::F32 => {
                let job = Append { qkv, shape, rotary, norms, rows, kv: kv.blocks_mut::<f32>().of(layer) };
                self.pool().team(&|member| unsafe { self.append(member, &job) });
            }
            KvType::Bf16 => {
                let job = Append { qkv, shape, rotary, norms, rows, kv: kv.blocks_mut::<bf16>().of(layer) };
                self.pool().team(&|member| unsafe { self.append(member, &job) });
            }
        }
    }

    /// This member's columns of heads, of all rows: every member of the team calls this.
    ///
    /// # Safety
    /// Nobody else uses `qkv`, nor the cache's slots of the rows, before the members have met.
    pub(crate) unsafe fn append<E: Element>(&self, member: &Member<'_>, job: &Append<'_, E>) {
        let columns = job.shape.heads + 2 * job.shape.kv_heads;
        for column in (member.index()..columns).step_by(member.threads()) {
            dispatch!(self.isa(), append_column(job, column));
        }
    }

    /// The columns of one key/value head and of its queries.
    ///
    /// # Safety
    /// Nobody else uses these columns, nor the head's slots of the rows, at the same time.
    pub(crate) unsafe fn append_head<E: Element>(&self, job: &Append<'_, E>, kv_head: usize) {
        let HeadShape { heads, kv_heads, .. } = job.shape;
        let queries = kv_head * job.shape.group()..(kv_head + 1) * job.shape.group();
        for column in queries.chain([heads + kv_head, heads + kv_heads + kv_head]) {
            dispatch!(self.isa(), append_column(job, column));
        }
    }
}

/// One head's column of every row. Generic so that it is compiled for the instruction set of `L`.
///
/// # Safety
/// The ISA of `L` must be present; no other thread may work on the same column at the same time.
#[inline(always)]
unsafe fn append_column<L: Lanes>(job: &Append<'_, impl Element>, column: usize) {
    let (dims, width) = (job.shape.head_dim, job.shape.qkv_width());
    let (first_key, first_value) = (job.shape.heads, job.shape.heads + job.shape.kv_heads);
    for (i, row) in job.rows.rows.iter().enumerate() {
        // SAFETY: columns of different tasks do not overlap.
        let head = unsafe { job.qkv.range(i * width + column * dims, dims) };
        if column < first_value {
            if let Some(norms) = &job.norms {
                let scale = rms_scale(head, norms.eps);
                let weight = if column < first_key { norms.q } else { norms.k };
                head.iter_mut().zip(weight).for_each(|(v, &weight)| *v = *v * scale * weight);
            }
            job.rotary.rotate(head, row.position as usize);
        }
        if column >= first_key {
            let (page, slot) = (row.position as usize / PAGE_SLOTS, row.position as usize % PAGE_SLOTS);
            let page = job.rows.tables[row.sequence as usize][page] as usize;
            // SAFETY: one task writes the keys or values of a head.
            unsafe {
                match column.checked_sub(first_value) {
                    Some(kv_head) => job.kv.value(page, kv_head, slot, head),
                    None => job.kv.key(page, column - first_key, slot, head),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stretch_has_its_own_angles_and_is_made_when_it_is_used() {
        let rotary = Rotary::new(4, 4, 100.0, 1 << 20);
        assert_eq!(rotary.stretches.iter().filter(|stretch| stretch.get().is_some()).count(), 1);
        for position in [0, 1, 1023, 1024, 5000, (1 << 20) - 1] {
            let mut head = [1.0, 2.0, 3.0, 4.0];
            rotary.rotate(&mut head, position);
            for (i, frequency) in [1.0f64, 0.1].into_iter().enumerate() {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let (a, b) = (i as f64 + 1.0, i as f64 + 3.0);
                assert!((f64::from(head[i]) - (a * cos - b * sin)).abs() < 1e-6, "{position}");
                assert!((f64::from(head[i + 2]) - (b * cos + a * sin)).abs() < 1e-6, "{position}");
            }
        }
        assert_eq!(rotary.stretches.iter().filter(|stretch| stretch.get().is_some()).count(), 4);
    }
}
