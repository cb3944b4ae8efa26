//! The engine: requests in, one forward pass at a time, events out.
//!
//! [`Engine::step`] is the hot loop: admit, plan, forward, decode. Requests enter only between steps.

mod admission;
mod holding;
mod life;

use crate::model::{Model, ModelConfig, Scratch};
use crate::pages::Pages;
use crate::plan::{Grant, share};
use crate::policy::{Candidate, Change};
use crate::request::{BLOCK_SIZE_MAX, Event, Refusal, Request, RequestId};
use crate::sample;
use life::Life;
use std::ops::Range;
use std::sync::Arc;
use unmask_kernels::{Bans, Draw, KvCache, Record, Row, RowTable};

/// Named limits of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most rows of one step; at least 8 times the largest block size of a request.
    pub rows_max: u32,
    /// Most requests that hold key/value pages.
    pub active_max: usize,
    /// Most requests that wait for them.
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
    model: Arc<Model>,
    limits: Limits,
    bans: Bans,
    kv: KvCache,
    pages: Pages,
    queue: Vec<Life>,
    active: Vec<Life>,
    /// Number of the next step.
    step: u64,
    /// Arrivals so far.
    arrivals: u64,
    scratch: Scratch,
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
    jobs: Vec<Job>,
    candidates: Vec<Candidate>,
    changes: Vec<Change>,
    logits: Vec<f32>,
    ranked: Vec<(f32, u32)>,
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
        self.jobs.clear();
    }
}

impl Engine {
    /// An engine without requests. Takes the memory of its key/value pages at once.
    pub fn new(model: Arc<Model>, limits: Limits) -> Self {
        let bans = bans(model.config());
        let kv = model.new_kv(limits.pages);
        let scratch = model.new_scratch(limits.rows_max as usize);
        let pages = Pages::new(limits.pages, limits.cached_pages);
        let (queue, active, batch) = (Vec::new(), Vec::new(), Batch::default());
        Self { model, limits, bans, kv, pages, queue, active, step: 1, arrivals: 0, scratch, batch }
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`Refusal`] when the queue is full, the request can never fit, or settings cannot be honoured.
    pub fn submit(&mut self, request: Request) -> Result<(), Refusal> {
        if self.lives().any(|life| life.request.id == request.id) {
            return Err(Refusal::Duplicate(request.id));
        }
        admission::check(&request, self.model.config(), &self.limits)?;
        if self.queue.len() >= self.limits.queue_max {
            return Err(Refusal::QueueFull { queued: self.queue.len(), limit: self.limits.queue_max });
        }
        self.queue.push(Life::new(request, self.arrivals, &self.model));
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
            self.release(index);
        }
    }

    /// A paused request gets no rows until it is resumed (its reader is slow).
    pub fn pause(&mut self, id: RequestId, paused: bool) {
        if let Some(active) = self.active.iter_mut().find(|a| a.request.id == id) {
            active.paused = paused;
        }
    }

    /// Whether a step would carry rows.
    pub fn has_work(&self) -> bool {
        self.active.iter().any(|a| !a.paused) || (!self.queue.is_empty() && self.active.len() < self.limits.active_max)
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
        }
    }

    /// One forward pass over rows of the scheduled requests; appends what it caused to `events`.
    pub fn step(&mut self, events: &mut Vec<Event>) -> StepReport {
        self.admit();
        let report = self.plan();
        if report.rows == 0 {
            return report;
        }
        self.forward();
        self.decode(events);
        self.step += 1;
        report
    }

    /// Moves requests from the queue to the active ones while pages and places last, in order of priority.
    fn admit(&mut self) {
        while self.active.len() < self.limits.active_max {
            let best = (0..self.queue.len()).max_by_key(|&i| (self.queue[i].request.priority, std::cmp::Reverse(i)));
            let Some(best) = best else { return };
            if !self.queue[best].attach(&mut self.pages) {
                return;
            }
            self.active.push(self.queue.remove(best));
        }
    }

    /// Fills the batch with rows.
    fn plan(&mut self) -> StepReport {
        let batch = &mut self.batch;
        batch.clear();
        let runnable: Vec<usize> = (0..self.active.len()).filter(|&i| !self.active[i].paused).collect();
        let needs: Vec<_> = runnable.iter().map(|&i| self.active[i].need()).collect();
        let grants = share(&needs, self.limits.rows_max);
        let mut report = StepReport::default();
        for ((index, need), grant) in runnable.into_iter().zip(&needs).zip(grants) {
            let rows = grant.rows(need);
            if rows == 0 {
                continue;
            }
            let active = &mut self.active[index];
            active.last_step = self.step;
            let outputs = batch.outputs.len();
            let sequence = batch.jobs.len() as u32;
            active.push_rows(grant, sequence, batch);
            batch.jobs.push(Job { active: index, grant, outputs: outputs..batch.outputs.len() });
            report.rows += rows;
            report.kept_rows += grant.kept;
            report.open_rows += rows - grant.kept;
            report.requests += 1;
        }
        report
    }

    /// Runs the model over the batch and reduces the logits of its output rows to records.
    fn forward(&mut self) {
        let batch = &mut self.batch;
        let tables: Vec<&[u32]> = batch.jobs.iter().map(|job| self.active[job.active].pages.as_slice()).collect();
        let table = RowTable { rows: &batch.rows, tables: &tables };
        self.model.forward(&batch.ids, &table, &batch.outputs, &mut self.kv, &mut self.scratch);
        batch.records.clear();
        batch.records.resize(batch.outputs.len(), Record::default());
        if !batch.outputs.is_empty() {
            self.model.reduce(&self.scratch, &self.bans, &batch.draws, &mut batch.records);
        }
    }

    /// Lets each request's policy decide over its records; commits what is final; ends what is over.
    fn decode(&mut self, events: &mut Vec<Event>) {
        let mut batch = std::mem::take(&mut self.batch);
        let mut ended = Vec::new();
        for job in &batch.jobs {
            let sampling = self.active[job.active].request.settings.sampling;
            batch.candidates.clear();
            for output in job.outputs.clone() {
                let record = &mut batch.records[output];
                if sampling.filters() {
                    let key = batch.draws[output].key;
                    self.model.row_logits(&self.scratch, output, &mut batch.logits);
                    sample::refine(record, &batch.logits, &self.bans, &sampling, key, &mut batch.ranked);
                }
                batch.candidates.push(sample::candidate(record));
            }
            let active = &mut self.active[job.active];
            if let Some(reason) = active.advance(job.grant, &batch.candidates, &mut batch.changes, events) {
                ended.push((job.active, reason));
            }
            active.publish(&mut self.pages);
        }
        self.batch = batch;
        ended.sort_by_key(|&(index, _)| std::cmp::Reverse(index));
        for (index, reason) in ended {
            events.push(self.active[index].finished(reason));
            self.release(index);
        }
    }

    fn release(&mut self, index: usize) {
        self.active.remove(index).detach(&mut self.pages);
    }
}

/// Ids that must not win: padding rows, the mask, infill sentinels. Our own models were trained with the
/// mask's logit left out of the softmax; other families count it in their confidences.
fn bans(config: &ModelConfig) -> Bans {
    let mut argmax: Vec<u32> = config.mask_id.into_iter().collect();
    if let Some(infill) = &config.infill {
        argmax.extend([infill.prefix, infill.suffix, infill.middle]);
    }
    argmax.sort_unstable();
    let softmax = if config.family.excludes_mask() { config.mask_id.into_iter().collect() } else { Vec::new() };
    Bans { vocab: config.tokenizer_size as usize, argmax, softmax }
}

#[cfg(test)]
mod tests;
