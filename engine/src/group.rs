//! A model over the ranks of a tensor-parallel group: rank 0 says what is computed, every rank computes its share.
//!
//! Rank 0 leads: its engine plans, and tells the others the rows of each step ([`wire`]). Sums cross twice per layer,
//! of the vocabulary one reduction per row; logits cross only for rows that draw with top-k or top-p. All degrees give
//! the same bits (I11).

pub mod wire;

use crate::model::{Link, Model, Operation, Scratch};
use std::sync::Arc;
use std::time::Instant;
use unmask_kernels::comm::{Comm, CommError};
use unmask_kernels::{Bans, KvCache, PARTIAL_BYTES, Partial, Record, RowTable, merge_pairwise};
use wire::{Message, Pass, Start, encode, encode_pass};

/// The caller's clock: until when others must have answered.
pub struct Pace {
    /// The end of a step of so many rows that begins now.
    pub step: Box<dyn Fn(u32) -> Instant + Send>,
    /// Until when a follower waits for word from rank 0, from now.
    pub idle: Box<dyn Fn() -> Instant + Send>,
}

/// One rank: its share of the model, its part of the cache, its end of the collectives.
pub struct Rank {
    model: Arc<Model>,
    bans: Bans,
    kv: KvCache,
    scratch: Scratch,
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
        let (kv, scratch) = (model.new_kv(pages), model.new_scratch(rows_max));
        Rank { bans: model.bans(), kv, scratch, group, model }
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
        let deadline = (group.pace.idle)();
        group.comm.broadcast(&mut group.message, deadline)?;
        Ok(Self::new(model, pages, rows_max, Some(group)))
    }

    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
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
        encode_pass(pass, &mut group.message);
        let deadline = (group.pace.step)(pass.ids.len() as u32);
        group.comm.broadcast(&mut group.message, deadline)?;
        self.compute(pass, records, deadline)
    }

    /// This rank's share of a pass; every rank ends with all records.
    fn compute(&mut self, pass: &Pass<'_>, records: &mut [Record], deadline: Instant) -> Result<(), CommError> {
        let Self { model, bans, kv, scratch, group: Some(group) } = self else { return Ok(()) };
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

    /// Asks every rank for a sign of life; nothing to ask of a whole model.
    pub(crate) fn canary(&mut self) -> Result<(), CommError> {
        let Some(group) = &mut self.group else { return Ok(()) };
        encode(&Message::Canary, &mut group.message);
        let deadline = (group.pace.step)(0);
        group.comm.broadcast(&mut group.message, deadline)?;
        group.sign_of_life(deadline)
    }

    /// Tells the others that the group has ended in order.
    pub(crate) fn stop(&mut self) {
        if let Some(group) = &mut self.group {
            encode(&Message::Stop, &mut group.message);
            let deadline = (group.pace.step)(0);
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

    fn sign_of_life(&mut self, deadline: Instant) -> Result<(), CommError> {
        self.comm.all_reduce(&mut [1.0], deadline)
    }
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

    fn after(&mut self, _: Operation) {}
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
    let deadline = (group.pace.idle)();
    group.comm.broadcast(&mut group.message, deadline)?;
    let start = match wire::decode(&group.message, usize::MAX)? {
        Message::Start(start) => start,
        Message::Stop => return Ok(()),
        Message::Canary | Message::Pass(_) => return Err(wire::WireError::Order.into()),
    };
    if start.numerics_id != model.numerics_id() {
        return Err(FollowError::Numerics { mine: model.numerics_id().into(), theirs: start.numerics_id });
    }
    let mut rank = Rank::new(model, start.pages, start.rows_max, Some(group));
    let mut records = Vec::new();
    while let Some(group) = &mut rank.group {
        let deadline = (group.pace.idle)();
        group.comm.broadcast(&mut group.message, deadline)?;
        match wire::decode(&group.message, start.rows_max)? {
            Message::Stop => break,
            Message::Start(_) => return Err(wire::WireError::Order.into()),
            Message::Canary => {
                let deadline = (group.pace.step)(0);
                group.sign_of_life(deadline)?;
            }
            Message::Pass(pass) => {
                let deadline = (group.pace.step)(pass.ids.len() as u32);
                pass.check(start.pages, rank.model.config().vocab_rows)?;
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
