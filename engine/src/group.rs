//! A model over the ranks of a tensor-parallel group: rank 0 says what is computed, every rank computes its share.
//!
//! Rank 0 leads: its engine plans, and tells the others the rows of each step ([`wire`]). Sums cross twice per layer,
//! of the vocabulary one reduction per row; logits cross only for rows that draw with top-k or top-p. All degrees give
//! the same bits (I11).

pub mod wire;

use crate::model::{Link, Model, Scratch};
use std::sync::Arc;
use std::time::{Duration, Instant};
pub use unmask_kernels::comm::{AbortHandle, Comm, CommError, TcpRank, threads};
use unmask_kernels::{Bans, Draw, KvCache, PAGE_SLOTS, PARTIAL_BYTES, Partial, Record, Row, RowTable, merge_pairwise};
use wire::{Message, Pass, Start, encode, encode_pass};

/// How long others may take, by the caller's clock.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The clock.
    pub now: fn() -> Instant,
    /// Of a step, until another is set; rank 0's holds for all ranks.
    pub step: StepLimit,
    /// Longest silence of rank 0 that a follower accepts, beyond the step it has announced.
    pub idle: Duration,
}

/// Longest time of a step, as a function of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimit {
    /// Of any step.
    pub base: Duration,
    /// More for each row, and once more for every [`CONTEXT_OF_A_ROW`] positions that rows attend to.
    pub per_row: Duration,
}

/// Attending to so many positions counts as one more row: rows are timed where they attend to few. It is no more work
/// than the products of a row, in the bundled model's narrow shape as in larger ones.
pub const CONTEXT_OF_A_ROW: u64 = 1024;

impl StepLimit {
    /// Of steps of which nothing is known.
    pub const UNMEASURED: StepLimit = StepLimit { base: Duration::from_secs(600), per_row: Duration::ZERO };

    /// Of a step of these rows.
    pub fn of(&self, rows: &[Row]) -> Duration {
        let attended: u64 = rows.iter().map(|row| u64::from(row.end)).sum();
        self.base + self.per_row * (rows.len() as u64 + attended / CONTEXT_OF_A_ROW) as u32
    }
}

/// One rank: its share of the model, its part of the cache, its end of the collectives.
pub struct Rank {
    model: Arc<Model>,
    bans: Bans,
    kv: KvCache,
    scratch: Scratch,
    /// First of the pages behind those of requests, for [`Rank::probe`].
    probe_page: u32,
    /// How long a pass may take.
    limit: StepLimit,
    /// Of a group; a whole model has nobody to talk to.
    group: Option<Group>,
}

struct Group {
    comm: Comm,
    pace: Pace,
    /// The message being sent or received.
    message: Vec<u8>,
    partials: Vec<Partial>,
    mine: Vec<u8>,
    all: Vec<u8>,
    /// Logits of the rows that wanted them: (rows, vocabulary).
    logits: Vec<f32>,
    /// Those rows, as indices of outputs, ascending.
    gathered: Vec<u32>,
}

impl Rank {
    /// A whole model, with a cache of `pages` and buffers for `rows_max` rows.
    pub(crate) fn whole(model: Arc<Model>, pages: usize, rows_max: usize) -> Self {
        Self::new(model, pages, rows_max, None)
    }

    fn new(model: Arc<Model>, pages: usize, rows_max: usize, group: Option<Group>) -> Self {
        let (kv, scratch) = (model.new_kv(pages + probe_pages(rows_max)), model.new_scratch(rows_max));
        let limit = group.as_ref().map_or(StepLimit::UNMEASURED, |group| group.pace.step);
        Rank { bans: model.bans(), kv, scratch, probe_page: pages as u32, limit, group, model }
    }

    /// Rank 0 of a group, which has told the others how large they must be.
    pub(crate) fn leading(
        model: Arc<Model>,
        pages: usize,
        rows_max: usize,
        comm: Comm,
        pace: Pace,
    ) -> Result<Self, CommError> {
        let mut group = Group::new(comm, pace);
        let start = Start { pages, rows_max, numerics_id: model.numerics_id().to_owned() };
        encode(&Message::Start(start), &mut group.message);
        let deadline = group.deadline(group.pace.idle);
        group.comm.broadcast(&mut group.message, deadline)?;
        Ok(Self::new(model, pages, rows_max, Some(group)))
    }

    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Pages of the cache, those of probes included.
    pub(crate) fn pages(&self) -> usize {
        self.kv.pages()
    }

    pub(crate) fn bans(&self) -> &Bans {
        &self.bans
    }

    pub(crate) fn ranks(&self) -> usize {
        self.group.as_ref().map_or(1, |group| group.comm.ranks())
    }

    /// Computes one pass with the whole group; one record per output.
    pub(crate) fn lead(&mut self, pass: &Pass<'_>, records: &mut [Record]) -> Result<(), CommError> {
        let Some(group) = &mut self.group else {
            let rows = RowTable { rows: pass.rows, tables: pass.tables };
            self.model.forward(pass.ids, &rows, pass.outputs, &mut self.kv, &mut self.scratch);
            self.model.reduce(&self.scratch, &self.bans, pass.draws, records);
            return Ok(());
        };
        let limit = self.limit.of(pass.rows);
        encode_pass(pass, limit, &mut group.message);
        let deadline = group.deadline(limit);
        group.comm.broadcast(&mut group.message, deadline)?;
        self.compute(pass, records, deadline)
    }

    /// This rank's share of a pass; every rank ends with all records.
    fn compute(&mut self, pass: &Pass<'_>, records: &mut [Record], deadline: Instant) -> Result<(), CommError> {
        let Self { model, bans, kv, scratch, group: Some(group), .. } = self else { return Ok(()) };
        let rows = RowTable { rows: pass.rows, tables: pass.tables };
        model.pass(pass.ids, &rows, pass.outputs, kv, scratch, &mut Sums { comm: &mut group.comm, deadline })?;
        let (count, ranks) = (pass.outputs.len(), group.comm.ranks());
        group.partials.resize(count.max(ranks), Partial::EMPTY);
        model.reduce_share(scratch, bans, pass.draws, &mut group.partials[..count]);
        group.mine.clear();
        group.partials[..count].iter().for_each(|partial| group.mine.extend(partial.to_bytes()));
        group.all.resize(ranks * group.mine.len(), 0);
        group.comm.all_gather(&group.mine, &mut group.all, deadline)?;
        let fallback = bans.lowest_allowed(model.config().vocab_rows as usize);
        for (row, record) in records.iter_mut().enumerate() {
            let mut parts = [Partial::EMPTY; unmask_kernels::PIECES];
            for (rank, part) in parts[..ranks].iter_mut().enumerate() {
                let mut bytes = [0; PARTIAL_BYTES];
                bytes.copy_from_slice(&group.all[(rank * count + row) * PARTIAL_BYTES..][..PARTIAL_BYTES]);
                *part = Partial::from_bytes(&bytes);
            }
            *record = merge_pairwise(&mut parts[..ranks]).record(&pass.draws[row], fallback);
        }
        group.gather_logits(model, scratch, pass.wanted, deadline)
    }

    /// Raw head row of one output of the last pass; of a group, one that the pass wanted.
    pub(crate) fn row_logits(&self, output: usize, out: &mut Vec<f32>) {
        let Some(group) = &self.group else { return self.model.row_logits(&self.scratch, output, out) };
        let vocab = self.model.config().vocab_rows as usize;
        out.clear();
        if let Ok(at) = group.gathered.binary_search(&(output as u32)) {
            out.extend_from_slice(&group.logits[at * vocab..(at + 1) * vocab]);
        }
    }

    /// Computes a pass of rows that belong to nobody, the first positions of one sequence: a sign of life of every rank,
    /// and a measure of its pace.
    pub(crate) fn probe(&mut self, rows: &[Row]) -> Result<(), CommError> {
        let count = rows.len();
        let table: Vec<u32> = (0..probe_pages(count) as u32).map(|page| self.probe_page + page).collect();
        let outputs: Vec<u32> = (0..count as u32).collect();
        let (ids, draws) = (vec![0; count], vec![Draw::default(); count]);
        let pass = Pass { ids: &ids, rows, tables: &[&table], outputs: &outputs, draws: &draws, wanted: &[] };
        self.lead(&pass, &mut vec![Record::default(); count])
    }

    pub(crate) fn step_limit(&self) -> StepLimit {
        self.limit
    }

    pub(crate) fn set_step_limit(&mut self, limit: StepLimit) {
        self.limit = limit;
    }

    /// Tells the others that the group has ended in order.
    pub(crate) fn stop(&mut self) {
        if let Some(group) = &mut self.group {
            encode(&Message::Stop, &mut group.message);
            let deadline = group.deadline(self.limit.base);
            // Whoever does not hear it finds the connection closed.
            let _ = group.comm.broadcast(&mut group.message, deadline);
        }
    }
}

impl Group {
    fn new(comm: Comm, pace: Pace) -> Self {
        let (message, mine, all) = (Vec::new(), Vec::new(), Vec::new());
        Group { comm, pace, message, partials: Vec::new(), mine, all, logits: Vec::new(), gathered: Vec::new() }
    }

    /// Brings the ranks' parts of wanted head rows together.
    fn gather_logits(
        &mut self,
        model: &Model,
        scratch: &Scratch,
        wanted: &[u32],
        deadline: Instant,
    ) -> Result<(), CommError> {
        let (vocab, ranks) = (model.config().vocab_rows as usize, self.comm.ranks());
        let largest = model.vocab_share(0).len();
        self.gathered.clear();
        self.gathered.extend_from_slice(wanted);
        self.logits.resize(wanted.len() * vocab, 0.0);
        let mut part = Vec::new();
        for (output, logits) in wanted.iter().zip(self.logits.chunks_exact_mut(vocab)) {
            model.row_logits(scratch, *output as usize, &mut part);
            part.resize(largest, 0.0);
            self.mine.clear();
            part.iter().for_each(|x| self.mine.extend(x.to_le_bytes()));
            self.all.resize(ranks * self.mine.len(), 0);
            self.comm.all_gather(&self.mine, &mut self.all, deadline)?;
            for (rank, bytes) in self.all.chunks_exact(4 * largest).enumerate() {
                let own = &mut logits[model.vocab_share(rank)];
                for (x, b) in own.iter_mut().zip(bytes.chunks_exact(4)) {
                    *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
        }
        Ok(())
    }

    fn deadline(&self, limit: Duration) -> Instant {
        (self.pace.now)() + limit
    }
}

/// Rows of a probe.
pub(crate) fn probe_rows(count: u32) -> Vec<Row> {
    (0..count).map(|position| Row { sequence: 0, position, end: position + 1 }).collect()
}

/// Pages of the cache behind those of requests: room for one sequence of so many rows.
fn probe_pages(rows_max: usize) -> usize {
    rows_max.div_ceil(PAGE_SLOTS)
}

/// The sums of one pass.
struct Sums<'a> {
    comm: &'a mut Comm,
    deadline: Instant,
}

impl Link for Sums<'_> {
    type Error = CommError;

    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CommError> {
        self.comm.all_reduce(values, self.deadline)
    }
}

/// Why a follower ended.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// Another rank failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Rank 0 sent what cannot be computed.
    #[error("a message of rank 0: {0}")]
    Message(#[from] wire::WireError),
    /// Rank 0 leads another model, or another build of it.
    #[error("rank 0 computes {theirs}, this rank {mine}: weights, types, instruction set and version must be the same")]
    Numerics {
        /// This rank's numerics id.
        mine: String,
        /// Rank 0's.
        theirs: String,
    },
}

/// Computes what rank 0 says until it ends the group.
///
/// # Errors
/// [`FollowError`]; the other ranks find out when they next wait for this one.
pub fn follow(model: Arc<Model>, comm: Comm, pace: Pace) -> Result<(), FollowError> {
    let mut group = Group::new(comm, pace);
    let deadline = group.deadline(group.pace.idle);
    group.comm.broadcast(&mut group.message, deadline)?;
    let start = match wire::decode(&group.message, usize::MAX)? {
        Message::Start(start) => start,
        Message::Stop => return Ok(()),
        Message::Pass(_) => return Err(wire::WireError::Order.into()),
    };
    if start.numerics_id != model.numerics_id() {
        return Err(FollowError::Numerics { mine: model.numerics_id().into(), theirs: start.numerics_id });
    }
    let mut rank = Rank::new(model, start.pages, start.rows_max, Some(group));
    let mut records = Vec::new();
    while let Some(group) = &mut rank.group {
        let deadline = group.deadline(group.pace.idle);
        group.comm.broadcast(&mut group.message, deadline)?;
        match wire::decode(&group.message, start.rows_max)? {
            Message::Stop => break,
            Message::Start(_) => return Err(wire::WireError::Order.into()),
            Message::Pass(pass) => {
                let deadline = group.deadline(pass.limit);
                pass.check(start.pages + probe_pages(start.rows_max), rank.model.config().vocab_rows)?;
                let tables: Vec<&[u32]> = pass.tables.iter().map(Vec::as_slice).collect();
                records.resize(pass.outputs.len(), Record::default());
                rank.compute(&pass.borrow(&tables), &mut records, deadline)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
