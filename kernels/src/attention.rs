//! Softmax attention of each row over the cached slots `[0, end)` of its sequence.
//!
//! One kernel serves prefill, denoise, store and autoregressive rows: online softmax (Milakov and Gimelshein 2018) page
//! by page at absolute page boundaries, in runs of [`SPLIT_SLOTS`] slots whose results are merged in order ("Flash-
//! Decoding", Dao et al. 2023). Where few rows attend far, runs are tasks of their own. Rows of one sequence and the query
//! heads of one key/value head share the loads of a page; the arithmetic of a query is the same whatever it shares.

// Register tiles are arrays indexed by query and vector.
#![allow(clippy::needless_range_loop)]

mod split;

use half::bf16;

use crate::Cpu;
use crate::exp::{exp, largest};
use crate::kv::{Blocks, Element, HEAD_DIM_MAX, HeadShape, KvCache, KvType, PAGE_SLOTS, Row, RowTable};
use crate::lanes::*;
use crate::pool::Member;
use crate::rows::RowsMut;
pub(crate) use split::Runs;
use std::cell::RefCell;
use std::ops::Range;

/// Rows per task; tiles start at multiples of it.
pub(crate) const TILE_ROWS: usize = 8;

/// Queries that share the loads of a page.
const QUERIES_MAX: usize = 8;

/// Slots that are attended to on their own, then merged with those before them. A multiple of [`PAGE_SLOTS`].
const SPLIT_SLOTS: usize = 1024;

/// With fewer tasks than this for each thread, runs of slots become tasks.
const TASKS_PER_THREAD: usize = 4;

/// Elements that the loops handle at once: the widest vector of any ISA.
const CHUNK: usize = 16;

/// What the members of a team share.
pub(crate) struct Attention<'a, E> {
    pub(crate) qkv: &'a RowsMut<'a, f32>,
    pub(crate) shape: HeadShape,
    pub(crate) rows: RowTable<'a>,
    pub(crate) kv: Blocks<'a, E>,
    pub(crate) out: &'a RowsMut<'a, f32>,
}

/// Running state of up to [`QUERIES_MAX`] queries of one sequence and key/value head.
#[repr(C, align(64))]
struct State {
    /// Per query the sum of weighted values, `stride` elements apart.
    sums: [f32; QUERIES_MAX * HEAD_DIM_MAX],
    /// Scores of one page, then their exponentials.
    weights: [[f32; PAGE_SLOTS]; QUERIES_MAX],
    max: [f32; CHUNK],
    total: [f32; QUERIES_MAX],
    /// Per query what earlier runs of slots gave: sums, maximum, total.
    merged: [f32; QUERIES_MAX * split::WIDTH_MAX],
}

thread_local! {
    /// State of the task in progress: longer to clear than many tasks take.
    static STATE: RefCell<Box<State>> = RefCell::new(Box::new(State {
        sums: [0.0; _],
        weights: [[0.0; _]; _],
        max: [0.0; _],
        total: [0.0; _],
        merged: [0.0; _],
    }));
}

impl Cpu {
    /// `out(rows, heads * head_dim)`: row `r` attends to slots `[0, end_r)` of its sequence, scores scaled by
    /// `1 / sqrt(head_dim)`. Keys and values come from the cache only; of `qkv` the queries are read.
    pub fn attention(
        &self,
        qkv: &[f32],
        shape: &HeadShape,
        rows: &RowTable<'_>,
        layer: usize,
        kv: &KvCache,
        out: &mut [f32],
    ) {
        kv.check(shape, layer);
        rows.check(kv.pages());
        assert_eq!(qkv.len(), rows.rows.len() * shape.qkv_width(), "qkv must hold one row per entry of the table");
        assert_eq!(out.len(), rows.rows.len() * shape.out_width(), "out must hold one row per entry of the table");
        let (qkv, out, shape, rows) = (&RowsMut::reading(qkv), &RowsMut::new(out), *shape, *rows);
        // SAFETY: the team does nothing else.
        self.with_runs(&shape, &rows, |runs| match kv.dtype() {
            KvType::F32 => {
                let job = Attention { qkv, shape, rows, kv: kv.blocks::<f32>().of(layer), out };
                self.pool().team(&|member| unsafe { self.attend(member, &job, runs) });
            }
            KvType::Bf16 => {
                let job = Attention { qkv, shape, rows, kv: kv.blocks::<bf16>().of(layer), out };
                self.pool().team(&|member| unsafe { self.attend(member, &job, runs) });
            }
        });
    }

    /// This member's part of the attention of all rows. Every member of the team calls this.
    ///
    /// # Safety
    /// Nobody writes queries or cache before the members have met, nor uses `out`.
    pub(crate) unsafe fn attend<E: Element>(&self, member: &Member<'_>, job: &Attention<'_, E>, runs: &Runs<'_>) {
        let kv_heads = job.shape.kv_heads;
        let tasks = job.rows.rows.len().div_ceil(TILE_ROWS) * kv_heads;
        // SAFETY: the caller's promise; each tile and head belongs to one task.
        match runs.apart() {
            Some(parts) => unsafe { self.attend_apart(member, job, tasks, parts) },
            None => member.each(tasks, |task| unsafe { self.attend_tile(job, task / kv_heads, task % kv_heads) }),
        }
    }

    /// One tile of rows with one key/value head.
    ///
    /// # Safety
    /// Nobody writes the tile's queries of the head, nor the head's cache, nor uses its part of `out`, at the same time.
    pub(crate) unsafe fn attend_tile<E: Element>(&self, job: &Attention<'_, E>, tile: usize, kv_head: usize) {
        STATE.with_borrow_mut(|state| {
            dispatch!(self.isa(), run_tile(job, (tile, kv_head), 0..usize::MAX, &Sink::Output, state));
        });
    }
}

/// # Safety
/// The ISA of `L` must be present, and no other thread may work on the same tile and head.
#[inline(always)]
unsafe fn run_tile<L: Lanes>(
    job: &Attention<'_, impl Element>,
    (tile, kv_head): (usize, usize),
    splits: Range<usize>,
    sink: &Sink<'_>,
    state: &mut State,
) {
    let rows = job.rows.rows;
    let end = rows.len().min((tile + 1) * TILE_ROWS);
    let mut first = tile * TILE_ROWS;
    while first < end {
        let sequence = rows[first].sequence;
        let count = rows[first..end].iter().take_while(|row| row.sequence == sequence).count();
        let group = Group { job, first, kv_head, query: 0, splits: splits.clone(), sink };
        // SAFETY: the caller's promise.
        unsafe { run_sequence::<L, _>(group, count, state) };
        first += count;
    }
}

/// All queries of `count` rows of one sequence, in groups as large as registers allow.
///
/// # Safety
/// As [`run_tile`].
#[inline(always)]
unsafe fn run_sequence<L: Lanes, E: Element>(mut group: Group<'_, E>, count: usize, state: &mut State) {
    // 8 queries by 2 vectors of scores fit 32 vector registers, 4 by 2 fit 16.
    let at_once = if L::WIDTH >= CHUNK { 8 } else { 4 };
    let total = count * group.job.shape.group();
    while group.query < total {
        let left = (total - group.query).min(at_once);
        // SAFETY: the caller's promise.
        group.query += unsafe {
            match left {
                8.. => group.run::<L, 8>(state),
                4.. => group.run::<L, 4>(state),
                3 => group.run::<L, 3>(state),
                2.. => group.run::<L, 2>(state),
                _ => group.run::<L, 1>(state),
            }
        };
    }
}

/// Where the result of a run of slots goes.
enum Sink<'a> {
    /// All runs are merged in turn and written out.
    Output,
    /// The one run is left for others to merge.
    Parts(&'a split::Parts<'a>),
}

/// Consecutive queries of one sequence and key/value head, counted row by row from row `first`.
struct Group<'a, E> {
    job: &'a Attention<'a, E>,
    first: usize,
    kv_head: usize,
    query: usize,
    /// Runs of [`SPLIT_SLOTS`] slots to attend to, of those that there are.
    splits: Range<usize>,
    sink: &'a Sink<'a>,
}

impl<E: Element> Group<'_, E> {
    /// Row and query head of the `i`-th query of the group.
    #[inline(always)]
    fn locate(&self, i: usize) -> (usize, usize) {
        let (index, group) = (self.query + i, self.job.shape.group());
        (self.first + index / group, self.kv_head * group + index % group)
    }

    #[inline(always)]
    fn row(&self, i: usize) -> Row {
        self.job.rows.rows[self.locate(i).0]
    }

    /// The `i`-th query.
    #[inline(always)]
    fn source(&self, i: usize) -> &[f32] {
        let (row, head) = self.locate(i);
        let shape = &self.job.shape;
        // SAFETY: who runs the group promises that nobody writes its queries.
        unsafe { self.job.qkv.view(row * shape.qkv_width() + head * shape.head_dim, shape.head_dim) }
    }

    /// Attends with `Q` queries over their pages in the group's runs; returns `Q`.
    #[inline(always)]
    unsafe fn run<L: Lanes, const Q: usize>(&self, state: &mut State) -> usize {
        let dims = self.job.shape.head_dim;
        let ends: [usize; Q] = std::array::from_fn(|i| self.row(i).end as usize);
        let last = ends.iter().copied().max().unwrap_or(0).div_ceil(SPLIT_SLOTS);
        for split in self.splits.start..self.splits.end.min(last) {
            // SAFETY: the caller's promise.
            unsafe { self.attend::<L, Q>(&ends, split, state) };
            for i in 0..Q {
                let (row, head) = self.locate(i);
                let sums = &state.sums[i * dims.next_multiple_of(CHUNK)..][..dims];
                match self.sink {
                    // SAFETY: rows, heads and runs of different tasks do not overlap; the ISA is present.
                    Sink::Parts(parts) => unsafe { parts.put(row, head, split, (sums, state.max[i], state.total[i])) },
                    Sink::Output => {
                        let merged = &mut state.merged[i * split::WIDTH_MAX..][..split::width(dims)];
                        // SAFETY: the caller's promise.
                        unsafe { split::merge::<L>(merged, split == 0, (sums, state.max[i], state.total[i])) };
                    }
                }
            }
        }
        if let Sink::Output = self.sink {
            for i in 0..Q {
                let (row, head) = self.locate(i);
                // SAFETY: rows and heads of different tasks do not overlap.
                let out = unsafe { self.job.out.range(row * self.job.shape.out_width() + head * dims, dims) };
                split::finish(&state.merged[i * split::WIDTH_MAX..][..split::width(dims)], out);
            }
        }
        Q
    }

    /// Attends with `Q` queries, which reach to `ends`, to one run of slots.
    #[inline(always)]
    unsafe fn attend<L: Lanes, const Q: usize>(&self, ends: &[usize; Q], split: usize, state: &mut State) {
        let (job, dims) = (self.job, self.job.shape.head_dim);
        let stride = dims.next_multiple_of(CHUNK);
        let sources: [&[f32]; Q] = std::array::from_fn(|i| self.source(i));
        let table = job.rows.tables[self.row(0).sequence as usize];
        state.sums[..Q * stride].fill(0.0);
        state.max = [f32::NEG_INFINITY; CHUNK];
        state.total = [0.0; QUERIES_MAX];
        let last = ends.iter().copied().max().unwrap_or(0).min((split + 1) * SPLIT_SLOTS);
        let pages = split * SPLIT_SLOTS / PAGE_SLOTS..last.div_ceil(PAGE_SLOTS);
        for (index, &page) in pages.clone().zip(&table[pages]) {
            // SAFETY: the caller's promise.
            let (keys, values) = unsafe { job.kv.read(page as usize, self.kv_head) };
            let slots = ends.map(|end| end.saturating_sub(index * PAGE_SLOTS).min(PAGE_SLOTS));
            // SAFETY: `read` hands out whole pages, sources are `head_dim` long, the ISA is present.
            unsafe {
                if slots.iter().all(|&count| count == slots[0]) {
                    Page { keys, values, dims, stride, slots: slots[0] }.step::<L, Q>(sources, 0, state);
                } else {
                    for i in (0..Q).filter(|&i| slots[i] > 0) {
                        Page { keys, values, dims, stride, slots: slots[i] }.step::<L, 1>([sources[i]], i, state);
                    }
                }
            }
        }
    }
}

/// One page of one head, of which the first `slots` take part.
struct Page<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    dims: usize,
    stride: usize,
    slots: usize,
}

impl<E: Element> Page<'_, E> {
    /// Folds the page into queries `at..at + Q` of the state.
    ///
    /// # Safety
    /// The ISA of `L` must be present; the slices must have the lengths of a page.
    #[inline(always)]
    unsafe fn step<L: Lanes, const Q: usize>(&self, sources: [&[f32]; Q], at: usize, state: &mut State) {
        // SAFETY: the caller's promise.
        unsafe {
            self.scores::<L, Q>(&sources, at, state);
            let scale = self.softmax::<L, Q>(at, state);
            self.accumulate::<L, Q>(at, &scale, state);
        }
    }

    /// Scaled scores into `state.weights`; minus infinity beyond `slots`, where keys may be stale.
    #[inline(always)]
    unsafe fn scores<L: Lanes, const Q: usize>(&self, sources: &[&[f32]; Q], at: usize, state: &mut State) {
        let keys = self.keys.as_ptr();
        // SAFETY: `d < dims` and `slot + 2 * WIDTH <= PAGE_SLOTS` stay inside the page; sources hold `dims` elements.
        unsafe {
            let scale = L::splat(1.0 / (self.dims as f32).sqrt());
            for slot in (0..PAGE_SLOTS).step_by(2 * L::WIDTH) {
                let mut sums = [[L::zero(); 2]; Q];
                for d in 0..self.dims {
                    let low = E::load::<L>(keys.add(d * PAGE_SLOTS + slot));
                    let high = E::load::<L>(keys.add(d * PAGE_SLOTS + slot + L::WIDTH));
                    for i in 0..Q {
                        let q = L::splat(*sources[i].get_unchecked(d));
                        sums[i] = [q.fma(low, sums[i][0]), q.fma(high, sums[i][1])];
                    }
                }
                for i in 0..Q {
                    let weights = state.weights[at + i].as_mut_ptr().add(slot);
                    sums[i][0].mul(scale).store(weights);
                    sums[i][1].mul(scale).store(weights.add(L::WIDTH));
                }
            }
        }
        for weights in &mut state.weights[at..at + Q] {
            weights[self.slots..].fill(f32::NEG_INFINITY);
        }
    }

    /// Scores become exponentials under the running maximum; returns the factors that bring earlier sums under it.
    #[inline(always)]
    unsafe fn softmax<L: Lanes, const Q: usize>(&self, at: usize, state: &mut State) -> [f32; CHUNK] {
        let mut factors = [0.0f32; CHUNK];
        let mut sums = [0.0f32; Q];
        // SAFETY: offsets stay below PAGE_SLOTS and CHUNK, both multiples of WIDTH; the caller promises the ISA.
        unsafe {
            // Step by step for all queries: what one waits for, the others fill.
            for i in 0..Q {
                let weights = state.weights[at + i].as_ptr();
                let mut page_max = L::load(weights);
                for slot in (L::WIDTH..PAGE_SLOTS).step_by(L::WIDTH) {
                    page_max = page_max.max(L::load(weights.add(slot)));
                }
                let max = state.max[at + i].max(largest(page_max));
                factors[i] = state.max[at + i] - max;
                state.max[at + i] = max;
            }
            for i in 0..Q {
                let (weights, max) = (state.weights[at + i].as_mut_ptr(), L::splat(state.max[at + i]));
                for slot in (0..PAGE_SLOTS).step_by(L::WIDTH) {
                    exp(L::load(weights.add(slot)).sub(max)).store(weights.add(slot));
                }
            }
            for i in 0..Q {
                let weights = &mut state.weights[at + i];
                weights[self.slots..].fill(0.0);
                let mut sum = L::load(weights.as_ptr());
                for slot in (L::WIDTH..PAGE_SLOTS).step_by(L::WIDTH) {
                    sum = sum.add(L::load(weights.as_ptr().add(slot)));
                }
                sums[i] = sum.reduce_sum();
            }
            for lane in (0..CHUNK).step_by(L::WIDTH) {
                exp(L::load(factors.as_ptr().add(lane))).store(factors.as_mut_ptr().add(lane));
            }
        }
        for i in 0..Q {
            state.total[at + i] = state.total[at + i] * factors[i] + sums[i];
        }
        factors
    }

    /// `sums = sums * factor + weights * values`; slots in ascending order, those beyond `slots` not touched.
    #[inline(always)]
    unsafe fn accumulate<L: Lanes, const Q: usize>(&self, at: usize, factors: &[f32; CHUNK], state: &mut State) {
        // As many sums side by side as hide the time of an addition, and fit the registers.
        let together = if L::WIDTH < CHUNK {
            CHUNK / L::WIDTH
        } else if Q <= 4 {
            2
        } else {
            1
        };
        let mut first = 0;
        while first < self.stride {
            let left = (self.stride - first) / L::WIDTH;
            // SAFETY: the caller's promise; whole vectors up to `stride`.
            first += L::WIDTH
                * unsafe {
                    match left.min(together) {
                        4.. => self.accumulate_columns::<L, Q, 4>(first, at, factors, state),
                        2.. => self.accumulate_columns::<L, Q, 2>(first, at, factors, state),
                        _ => self.accumulate_columns::<L, Q, 1>(first, at, factors, state),
                    }
                };
        }
    }

    /// `V` vectors from column `first` on; returns `V`.
    #[inline(always)]
    unsafe fn accumulate_columns<L: Lanes, const Q: usize, const V: usize>(
        &self,
        first: usize,
        at: usize,
        factors: &[f32; CHUNK],
        state: &mut State,
    ) -> usize {
        // SAFETY: `first + V * WIDTH <= stride`; the state holds `QUERIES_MAX` rows of at least `stride`.
        unsafe {
            let values = self.values.as_ptr().add(first);
            let sums = state.sums.as_mut_ptr().add(at * self.stride + first);
            let mut acc = [[L::zero(); V]; Q];
            for i in 0..Q {
                for v in 0..V {
                    acc[i][v] = L::load(sums.add(i * self.stride + v * L::WIDTH)).mul(L::splat(factors[i]));
                }
            }
            for slot in 0..self.slots {
                for v in 0..V {
                    let value = E::load::<L>(values.add(slot * self.stride + v * L::WIDTH));
                    for i in 0..Q {
                        let weight = L::splat(*state.weights[at + i].get_unchecked(slot));
                        acc[i][v] = weight.fma(value, acc[i][v]);
                    }
                }
            }
            for i in 0..Q {
                for v in 0..V {
                    acc[i][v].store(sums.add(i * self.stride + v * L::WIDTH));
                }
            }
        }
        V
    }
}
