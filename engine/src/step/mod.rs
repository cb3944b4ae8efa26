//! The engine: requests in, one forward pass at a time, events out.
//!
//! [`Engine::step`] is the hot loop: admit, grow, plan, forward, decode. Requests enter only between steps.

mod admission;
mod causal;
mod holding;
mod life;
mod rows;
mod schedule;

use crate::failpoints;
use crate::group::wire::Pass;
use crate::group::{Pace, Rank, StepLimit, probe_rows};
use crate::model::Model;
use crate::pages::Pages;
use crate::plan::{Grant, Plan};
use crate::policy::Candidate;
use crate::pulse::Pulse;
use crate::request::{BLOCK_SIZE_MAX, Event, Refusal, Request, RequestId};
use crate::sample::{self, Bars};
use life::{Deciding, Life};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use unmask_kernels::comm::{Comm, CommError};
use unmask_kernels::{Draw, Record, Row};

/// Named limits of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most rows of one step; at least 8 times the largest block size of a request, where passes do not compute everything.
    pub rows_max: u32,
    /// Most requests that hold key/value pages.
    pub active_max: usize,
    /// Most requests that wait for them; those that gave theirs up come on top.
    pub queue_max: usize,
    /// Key/value pages of [`unmask_kernels::PAGE_SLOTS`] positions.
    pub pages: usize,
    /// Of them, most that nobody holds but that keep a prefix to be found again; 0 turns the prefix cache off.
    pub cached_pages: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { rows_max: 8 * BLOCK_SIZE_MAX, active_max: 64, queue_max: 512, pages: 4096, cached_pages: 4096 }
    }
}

/// How much work an engine holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Positions admitted or queued and not yet committed (rows).
    pub outstanding_rows: u64,
    /// Requests that hold pages.
    pub active: usize,
    /// Requests that wait.
    pub queued: usize,
    /// Key/value pages nobody holds.
    pub free_pages: usize,
    /// Of them, pages that keep a prefix until they are needed.
    pub cached_pages: usize,
    /// All key/value pages.
    pub total_pages: usize,
    /// Requests that had to give up their pages, since the engine was made.
    pub preemptions: u64,
}

/// What a step carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepReport {
    /// Rows of the pass; 0 when nothing could run.
    pub rows: u32,
    /// Of them rows of prompts and finished blocks.
    pub kept_rows: u32,
    /// Of them rows of open blocks.
    pub open_rows: u32,
    /// Requests that had rows in it.
    pub requests: u32,
}

/// Runs many requests over one model.
pub struct Engine {
    rank: Rank,
    /// Why the group is over, if it is.
    failure: Option<CommError>,
    limits: Limits,
    pulse: Arc<Pulse>,
    pages: Pages,
    /// Requests that wait, those sent back among them: at most `queue_max + active_max`.
    queue: Vec<Life>,
    /// In order of rank.
    active: Vec<Life>,
    /// Number of the next step.
    step: u64,
    /// Arrivals so far.
    arrivals: u64,
    /// Requests sent back to the queue so far.
    preemptions: u64,
    plan: Plan,
    batch: Batch,
}

/// Rows of one step, and whose they are. Buffers are kept between steps.
#[derive(Default)]
struct Batch {
    ids: Vec<u32>,
    rows: Vec<Row>,
    outputs: Vec<u32>,
    draws: Vec<Draw>,
    records: Vec<Record>,
    /// Active requests that may have rows, one per need of the plan.
    runnable: Vec<usize>,
    jobs: Vec<Job>,
    candidates: Vec<Candidate>,
    deciding: Deciding,
    /// Outputs whose logits are needed, as indices.
    wanted: Vec<u32>,
    logits: Vec<f32>,
    ranked: Vec<(f32, u32)>,
    favoured: Vec<u32>,
}

/// One request's part of a step.
struct Job {
    /// Index into the active requests.
    active: usize,
    grant: Grant,
    /// Its records.
    outputs: Range<usize>,
}

impl Batch {
    fn clear(&mut self) {
        self.ids.clear();
        self.rows.clear();
        self.outputs.clear();
        self.draws.clear();
        self.wanted.clear();
        self.runnable.clear();
        self.jobs.clear();
    }
}

impl Engine {
    /// An engine without requests. Takes the memory of its key/value pages at once.
    pub fn new(model: Arc<Model>, limits: Limits) -> Self {
        Self::of(Rank::whole(model, limits.pages, limits.rows_max as usize), limits)
    }

    /// The engine of rank 0 of a group, whose other ranks [`crate::group::follow`].
    ///
    /// # Errors
    /// Another rank does not answer.
    pub fn leading(model: Arc<Model>, limits: Limits, comm: Comm, pace: Pace) -> Result<Self, CommError> {
        Ok(Self::of(Rank::leading(model, limits.pages, limits.rows_max as usize, comm, pace)?, limits))
    }

    fn of(rank: Rank, limits: Limits) -> Self {
        Self {
            rank,
            failure: None,
            limits,
            pulse: Arc::default(),
            pages: Pages::new(limits.pages, limits.cached_pages),
            queue: Vec::new(),
            active: Vec::new(),
            step: 1,
            arrivals: 0,
            preemptions: 0,
            plan: Plan::default(),
            batch: Batch::default(),
        }
    }

    /// Ranks that hold the model.
    pub fn ranks(&self) -> usize {
        self.rank.ranks()
    }

    /// Its limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Its share of the model, for passes that belong to no request.
    pub(crate) fn rank(&mut self) -> &mut Rank {
        &mut self.rank
    }

    /// Why the group of this engine is over: nothing is computed any more, what was committed stands.
    pub fn failure(&self) -> Option<&CommError> {
        self.failure.as_ref()
    }

    /// Computes a pass of `rows` rows (at most `rows_max`) that belong to nobody: proof that every rank computes, and
    /// what its time is measured by. [`Engine::failure`] tells when a rank does not.
    pub fn probe(&mut self, rows: u32) {
        if self.failure.is_none() {
            let rows = probe_rows(rows.clamp(1, self.limits.rows_max));
            let _step = self.pulse.step(self.rank.step_limit().of(&rows));
            self.failure = self.rank.probe(&rows).err();
        }
    }

    /// How long a step may take from now on: the other ranks by their clocks, this one by whoever watches its pulse.
    pub fn set_step_limit(&mut self, limit: StepLimit) {
        self.rank.set_step_limit(limit);
    }

    /// How long a step of so many rows may take.
    pub fn step_limit(&self) -> StepLimit {
        self.rank.step_limit()
    }

    /// Signs of life of whoever calls [`Engine::step`].
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// A new engine in the place of one that cannot be trusted any more, without its requests; whoever watches this one
    /// watches that one.
    #[must_use]
    pub fn anew(&self) -> Self {
        let mut engine = Self::new(Arc::clone(self.rank.model()), self.limits);
        engine.set_step_limit(self.step_limit());
        engine.pulse = Arc::clone(&self.pulse);
        engine
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        self.rank.model()
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`Refusal`] when the queue is full, the request can never fit, or settings cannot be honoured.
    pub fn submit(&mut self, request: Request) -> Result<(), Refusal> {
        if self.lives().any(|life| life.request.id == request.id) {
            return Err(Refusal::Duplicate(request.id));
        }
        admission::check(&request, self.model().config(), &self.limits)?;
        if self.queue.len() >= self.limits.queue_max {
            return Err(Refusal::QueueFull { queued: self.queue.len(), limit: self.limits.queue_max });
        }
        self.queue.push(Life::new(request, self.arrivals, self.rank.model()));
        self.arrivals += 1;
        Ok(())
    }

    fn lives(&self) -> impl Iterator<Item = &Life> {
        self.active.iter().chain(&self.queue)
    }

    /// Drops a request and frees what it holds. Unknown ids are ignored: it may have just ended.
    pub fn cancel(&mut self, id: RequestId) {
        self.queue.retain(|life| life.request.id != id);
        if let Some(index) = self.active.iter().position(|a| a.request.id == id) {
            if failpoints::pages_freed_twice() {
                self.active[index].pages.last().into_iter().for_each(|&page| self.pages.give_again(page));
            }
            self.release(index);
        }
    }

    /// A paused request gets no rows until it is resumed (its reader is slow).
    pub fn pause(&mut self, id: RequestId, paused: bool) {
        if let Some(life) = self.active.iter_mut().chain(&mut self.queue).find(|life| life.request.id == id) {
            life.paused = paused;
        }
    }

    /// Takes a request's pages and place from it; it goes on from its last committed block, to the same tokens. One
    /// that is not paused waits its turn in the queue, a paused one until it is resumed.
    pub fn preempt(&mut self, id: RequestId) {
        if let Some(index) = self.active.iter().position(|life| life.request.id == id) {
            self.send_back(index);
        }
    }

    /// Whether a step would carry rows.
    pub fn has_work(&self) -> bool {
        self.failure.is_none() && self.lives().any(|life| !life.paused)
    }

    /// How much work the engine holds.
    pub fn load(&self) -> Load {
        Load {
            outstanding_rows: self.lives().map(Life::outstanding).sum(),
            active: self.active.len(),
            queued: self.queue.len(),
            free_pages: self.pages.free(),
            cached_pages: self.pages.idle(),
            total_pages: self.pages.total(),
            preemptions: self.preemptions,
        }
    }

    /// One forward pass over rows of the scheduled requests; appends what it caused to `events`.
    pub fn step(&mut self, events: &mut Vec<Event>) -> StepReport {
        if self.failure.is_some() {
            return StepReport::default();
        }
        self.admit();
        self.grow();
        let report = self.plan();
        if report.rows == 0 {
            return report;
        }
        if let Err(error) = self.forward() {
            self.failure = Some(error);
            return report;
        }
        self.decode(events);
        self.step += 1;
        report
    }

    /// Fills the batch with rows.
    fn plan(&mut self) -> StepReport {
        let (batch, plan) = (&mut self.batch, &mut self.plan);
        batch.clear();
        plan.clear();
        for (index, life) in self.active.iter_mut().enumerate() {
            if life.can_run() {
                batch.runnable.push(index);
                plan.needs.push(life.need(self.step));
            } else {
                // It does not wait for rows: its turn begins when it could use them.
                life.last_step = self.step;
            }
        }
        plan.share(self.limits.rows_max);
        let mut report = StepReport::default();
        for (i, (need, &grant)) in plan.needs.iter().zip(plan.grants()).enumerate() {
            let index = batch.runnable[i];
            let rows = grant.rows(need);
            if rows == 0 {
                continue;
            }
            let life = &mut self.active[index];
            life.last_step = self.step;
            let outputs = batch.outputs.len();
            let sequence = batch.jobs.len() as u32;
            life.push_rows(grant, sequence, batch);
            batch.jobs.push(Job { active: index, grant, outputs: outputs..batch.outputs.len() });
            report.rows += rows;
            report.kept_rows += grant.kept;
            report.open_rows += rows - grant.kept;
            report.requests += 1;
        }
        report
    }

    /// Runs the model over the batch and reduces the logits of its output rows to records.
    fn forward(&mut self) -> Result<(), CommError> {
        let batch = &mut self.batch;
        let jobs = batch.jobs.iter().map(|job| (&self.active[job.active], job));
        let tables: Vec<&[u32]> = jobs.clone().map(|(life, _)| life.pages.as_slice()).collect();
        let gathered = jobs.flat_map(|(life, job)| life.gathered(&job.outputs));
        batch.wanted.extend(gathered.map(|output| output as u32));
        batch.records.clear();
        batch.records.resize(batch.outputs.len(), Record::default());
        let Batch { ids, rows, outputs, draws, wanted, records, .. } = batch;
        let _step = self.pulse.step(self.rank.step_limit().of(rows));
        self.rank.lead(&Pass { ids, rows, tables: &tables, outputs, draws, wanted }, records)
    }

    /// Lets each request's policy decide over its records; commits what is final; ends what is over. What goes wrong
    /// in deciding over one request ends that request only (I10).
    fn decode(&mut self, events: &mut Vec<Event>) {
        let mut batch = std::mem::take(&mut self.batch);
        let jobs = std::mem::take(&mut batch.jobs);
        let mut ended = Vec::new();
        for job in &jobs {
            let id = self.active[job.active].request.id;
            let decided = catch_unwind(AssertUnwindSafe(|| self.decide(job, &mut batch, events)));
            if let Some(end) = decided.unwrap_or(Some(Event::Failed { id })) {
                ended.push((job.active, end));
            }
        }
        batch.jobs = jobs;
        self.batch = batch;
        ended.sort_by_key(|&(index, _)| std::cmp::Reverse(index));
        for (index, end) in ended {
            events.push(end);
            self.release(index);
        }
    }

    /// One request's part of [`Engine::decode`]; its last event when it is over.
    fn decide(&mut self, job: &Job, batch: &mut Batch, events: &mut Vec<Event>) -> Option<Event> {
        let life = &mut self.active[job.active];
        let settings = &life.request.settings;
        let gathered = life.gathered(&job.outputs);
        batch.candidates.clear();
        for output in job.outputs.clone() {
            // Drawing from a large vocabulary takes its time.
            self.pulse.beat();
            let record = &mut batch.records[output];
            if gathered.contains(&output) {
                self.rank.row_logits(output, &mut batch.logits);
                let key = batch.draws[output].key;
                let opening = life.opening().filter(|_| output == job.outputs.start);
                let among = opening.map(|(opening, choices)| {
                    opening.favoured(choices, &batch.logits, &mut batch.favoured);
                    batch.favoured.as_slice()
                });
                let bars = Bars { bans: self.rank.bans(), among };
                sample::refine(record, &batch.logits, bars, settings, key, &mut batch.ranked);
            }
            let candidate = sample::candidate(record);
            batch.candidates.push(sample::among_others(candidate, record, &batch.logits, &settings.manner.suppress));
        }
        let reason = life.advance(job.grant, &batch.candidates, &mut batch.deciding, events);
        life.publish(&mut self.pages);
        reason.map(|reason| life.finished(reason))
    }

    fn release(&mut self, index: usize) {
        self.active.remove(index).detach(&mut self.pages);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.failure.is_none() {
            self.rank.stop();
        }
    }
}

#[cfg(test)]
mod tests;
