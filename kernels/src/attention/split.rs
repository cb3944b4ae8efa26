//! Runs of slots that are attended to apart, and how their results become one.

use super::{Attention, SPLIT_SLOTS, STATE, Sink, TASKS_PER_THREAD, TILE_ROWS, run_tile};
use crate::Cpu;
use crate::exp::exp;
use crate::kv::{Element, HEAD_DIM_MAX, HeadShape, RowTable};
use crate::lanes::*;
use crate::pool::Member;
use crate::rows::RowsMut;
use std::cell::RefCell;

/// Elements of a result at the largest head: sums, maximum, total.
pub(super) const WIDTH_MAX: usize = width(HEAD_DIM_MAX);

/// Elements of a result.
pub(super) const fn width(dims: usize) -> usize {
    dims + 2
}

thread_local! {
    /// Results of the call in progress; kept from call to call.
    static RESULTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Results of every row, head and run.
pub(crate) struct Parts<'a> {
    results: RowsMut<'a, f32>,
    heads: usize,
    splits: usize,
    dims: usize,
}

impl Parts<'_> {
    fn start(&self, row: usize, head: usize, split: usize) -> usize {
        ((row * self.heads + head) * self.splits + split) * width(self.dims)
    }

    /// # Safety
    /// No other thread may use the same row, head and run at the same time.
    pub(super) unsafe fn put(&self, row: usize, head: usize, split: usize, (sums, max, total): (&[f32], f32, f32)) {
        // SAFETY: the caller's promise.
        let out = unsafe { self.results.range(self.start(row, head, split), width(self.dims)) };
        out[..self.dims].copy_from_slice(sums);
        out[self.dims..].copy_from_slice(&[max, total]);
    }
}

/// Where the results of runs of slots go, when these are tasks of their own.
pub(crate) struct Runs<'a>(Option<Parts<'a>>);

impl<'a> Runs<'a> {
    pub(crate) fn apart(&self) -> Option<&Parts<'a>> {
        self.0.as_ref()
    }
}

impl Cpu {
    /// Calls `run` with what attention of `rows` needs.
    pub(crate) fn with_runs(&self, shape: &HeadShape, rows: &RowTable<'_>, run: impl FnOnce(&Runs<'_>)) {
        let tasks = rows.rows.len().div_ceil(TILE_ROWS) * shape.kv_heads;
        let longest = rows.rows.iter().map(|row| row.end as usize).max().unwrap_or(0);
        let splits = longest.div_ceil(SPLIT_SLOTS);
        if splits <= 1 || tasks >= TASKS_PER_THREAD * self.pool().threads() {
            return run(&Runs(None));
        }
        let (heads, dims) = (shape.heads, shape.head_dim);
        RESULTS.with_borrow_mut(|results| {
            let len = rows.rows.len() * heads * splits * width(dims);
            results.resize(len.max(results.len()), 0.0);
            let parts = Parts { results: RowsMut::new(&mut results[..len]), heads, splits, dims };
            run(&Runs(Some(parts)));
        });
    }

    /// This member's part of attention whose runs of slots are tasks: `tasks` tiles and heads with `parts.splits` each.
    ///
    /// # Safety
    /// As [`Cpu::attend`].
    pub(super) unsafe fn attend_apart<E: Element>(
        &self,
        member: &Member<'_>,
        job: &Attention<'_, E>,
        tasks: usize,
        parts: &Parts<'_>,
    ) {
        let sink = Sink::Parts(parts);
        let (kv_heads, splits) = (job.shape.kv_heads, parts.splits);
        member.each(tasks * splits, |task| {
            let (task, split) = (task / splits, task % splits);
            let (tile, kv_head) = (task / kv_heads, task % kv_heads);
            STATE.with_borrow_mut(|state| {
                dispatch!(self.isa(), run_tile(job, (tile, kv_head), split..split + 1, &sink, state));
            });
        });
        member.meet();
        member.each(tasks, |task| {
            let (tile, kv_head) = (task / kv_heads, task % kv_heads);
            dispatch!(self.isa(), merge_tile(job, parts, tile, kv_head));
        });
    }
}

/// # Safety
/// The ISA of `L` must be present, and no other thread may work on the same tile and head.
#[inline(always)]
unsafe fn merge_tile<L: Lanes>(job: &Attention<'_, impl Element>, parts: &Parts<'_>, tile: usize, kv_head: usize) {
    let (rows, dims, group) = (job.rows.rows, job.shape.head_dim, job.shape.group());
    let mut merged = [0.0; WIDTH_MAX];
    for row in tile * TILE_ROWS..rows.len().min((tile + 1) * TILE_ROWS) {
        for head in kv_head * group..(kv_head + 1) * group {
            for split in 0..(rows[row].end as usize).div_ceil(SPLIT_SLOTS) {
                // SAFETY: the caller's promise.
                unsafe {
                    let part = parts.results.range(parts.start(row, head, split), width(dims));
                    merge::<L>(&mut merged[..width(dims)], split == 0, (&part[..dims], part[dims], part[dims + 1]));
                }
            }
            // SAFETY: the caller's promise.
            let out = unsafe { job.out.range(row * job.shape.out_width() + head * dims, dims) };
            finish(&merged[..width(dims)], out);
        }
    }
}

/// Adds a later run to what earlier ones gave; a run without slots changes nothing.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
pub(super) unsafe fn merge<L: Lanes>(merged: &mut [f32], first: bool, (sums, max, total): (&[f32], f32, f32)) {
    let (values, rest) = merged.split_at_mut(sums.len());
    if first {
        values.copy_from_slice(sums);
        rest.copy_from_slice(&[max, total]);
        return;
    }
    if total == 0.0 {
        return;
    }
    let larger = rest[0].max(max);
    // SAFETY: the caller's promise.
    let (earlier, later) = unsafe { (power::<L>(rest[0] - larger), power::<L>(max - larger)) };
    for (value, sum) in values.iter_mut().zip(sums) {
        *value = *value * earlier + sum * later;
    }
    rest.copy_from_slice(&[larger, rest[1] * earlier + total * later]);
}

/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn power<L: Lanes>(x: f32) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: 16 is the widest vector; the caller's promise.
    unsafe { exp(L::splat(x)).store(lanes.as_mut_ptr()) };
    lanes[0]
}

/// Sums over their total.
#[inline(always)]
pub(super) fn finish(merged: &[f32], out: &mut [f32]) {
    let scale = 1.0 / merged[out.len() + 1];
    out.iter_mut().zip(merged).for_each(|(out, sum)| *out = sum * scale);
}
