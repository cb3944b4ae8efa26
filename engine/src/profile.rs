//! Step time as a function of rows and context, for one model on one device, or on those of a group's ranks.
//!
//! Block size is chosen by it: a step of many rows is worth its time only while the tokens it commits grow faster.
//! [`measure`] runs steps of drawn-up shapes, [`Profile`] is what they took, [`Profile::step_ms`] reads between them.

use crate::group::wire;
use crate::request::BLOCK_SIZE_MAX;
use crate::{Engine, Limits};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;
use thiserror::Error;
use unmask_kernels::comm::CommError;
use unmask_kernels::{Draw, KvType, PAGE_SLOTS, Record, Row};

/// Tag of the format, in every file.
pub const FORMAT: &str = "profile/1";
/// Rows of one sequence in a measured step (a block of the usual size); more rows are more sequences.
const SEQUENCE_ROWS: u32 = 16;
/// Positions of context that a measurement holds (rows); sequences share pages beyond.
const CONTEXT_POSITIONS_MAX: u32 = 4096;
/// Longest context that the grids ask for (positions): attention is linear beyond, and steps would take seconds.
const CONTEXT_FULL_MAX: u32 = 4096;
/// As above, of the short grid.
const CONTEXT_SHORT_MAX: u32 = 1024;
/// Steps of a shape run for this long, and at least one, before the timed one: those of other shapes leave the processor
/// slower for a short step than steps of its own do.
const WARMING: Duration = Duration::from_millis(1);
/// Memory that is there at all once a byte of it is written, at the least.
const MEMORY_PAGE_BYTES: usize = 4096;
/// A step that takes longer needs no warming.
const LONG: Duration = Duration::from_millis(20);
/// Pages of a sequence's own: its rows may straddle two.
const OWN_PAGES: usize = 2;

/// Why a profile cannot be used.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// Not the JSON of a profile.
    #[error("not a profile: {0}")]
    Json(#[from] serde_json::Error),
    /// What it says cannot be; all of it.
    #[error("not a usable profile: {}", .0.join("; "))]
    Content(Vec<String>),
}

/// Measured step times, and of what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    format: String,
    /// Name of the model.
    pub model: String,
    /// Digest of everything that decides a result's bits.
    pub numerics_id: String,
    /// Name of the processor.
    pub device: String,
    /// Instruction set.
    pub isa: String,
    /// Threads of the forward pass, of each rank.
    pub threads: usize,
    /// Ranks that share the model.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub ranks: usize,
    /// Type of the weights.
    pub dtype: String,
    /// Type of cached keys and values.
    pub kv_type: String,
    points: Vec<Point>,
}

fn one() -> usize {
    1
}

fn is_one(ranks: &usize) -> bool {
    *ranks == 1
}

/// One measured shape of step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Rows of the step, all of them scored.
    pub rows: u32,
    /// Positions each row attends to before its block.
    pub context: u32,
    /// Median time (milliseconds).
    pub ms: f64,
    /// Distance of the quartiles, as a share of the median.
    pub spread: f64,
}

impl Profile {
    /// Reads a profile's JSON.
    ///
    /// # Errors
    /// [`ProfileError`]: not JSON, another format, unknown keys, or points that cannot be.
    pub fn parse(json: &str) -> Result<Self, ProfileError> {
        let mut profile: Profile = serde_json::from_str(json)?;
        let mut problems = Vec::new();
        if profile.format != FORMAT {
            problems.push(format!("format: is {:?}, known is {FORMAT:?}", profile.format));
        }
        if profile.points.is_empty() {
            problems.push("points: there are none".into());
        }
        for (i, point) in profile.points.iter().enumerate() {
            if point.rows == 0 || !(point.ms > 0.0 && point.ms.is_finite()) {
                problems.push(format!("points[{i}]: rows and ms must be positive"));
            }
        }
        let shapes: BTreeSet<_> = profile.points.iter().map(|point| (point.context, point.rows)).collect();
        if shapes.len() != profile.points.len() {
            problems.push("points: a shape is there twice".into());
        }
        if !problems.is_empty() {
            return Err(ProfileError::Content(problems));
        }
        profile.sort();
        Ok(profile)
    }

    /// By context, then rows.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    fn sort(&mut self) {
        self.points.sort_by_key(|point| (point.context, point.rows));
    }

    /// Time of a step (milliseconds) of `rows` rows at `context` positions of context; fractions are averages of
    /// steps. Piecewise linear through the measured points, never falling as rows or context grow within what was
    /// measured, linear beyond it, and never below the smallest.
    pub fn step_ms(&self, rows: f64, context: f64) -> f64 {
        let curves = self.points.chunk_by(|a, b| a.context == b.context);
        let at_rows = curves.map(|curve| {
            let by_rows = curve.iter().map(|point| (f64::from(point.rows), point.ms));
            (f64::from(curve[0].context), interpolate(by_rows, rows))
        });
        interpolate(at_rows, context)
    }
}

/// The line through `points` (ascending in x) at `x`. What noise made fall is lifted to its predecessor.
fn interpolate(points: impl Iterator<Item = (f64, f64)>, x: f64) -> f64 {
    let mut last = None;
    let mut slope = 0.0;
    for (to, y) in points {
        let Some((from, low)) = last else {
            if x <= to {
                return y;
            }
            last = Some((to, y));
            continue;
        };
        let high = y.max(low);
        slope = (high - low) / (to - from);
        if x <= to {
            return low + slope * (x - from);
        }
        last = Some((to, high));
    }
    last.map_or(0.0, |(from, low)| low + slope * (x - from))
}

/// Which steps to time, and how often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Rows, each at least 1.
    pub rows: Vec<u32>,
    /// Positions of context, each at most the model's context length.
    pub contexts: Vec<u32>,
    /// Times each shape is timed, at least 1; the shapes take turns, so that a slow moment hits all of them.
    pub repeats: usize,
    /// After this time only shapes never timed are.
    pub limit: Duration,
}

impl Grid {
    /// Fine enough for a chart.
    pub fn full(context_length: u32) -> Self {
        let longest = context_length.min(CONTEXT_FULL_MAX);
        Self {
            rows: (0..10).map(|power| 1 << power).collect(),
            contexts: contexts(&[0, longest / 4, longest / 2, longest]),
            repeats: 15,
            limit: Duration::from_secs(120),
        }
    }

    /// Enough to choose a block size: under a second for small models.
    pub fn short(context_length: u32) -> Self {
        Self {
            rows: vec![1, 4, 16, 64, 256],
            contexts: contexts(&[0, (context_length / 2).min(CONTEXT_SHORT_MAX)]),
            repeats: 5,
            limit: Duration::from_secs(2),
        }
    }

    /// Limits of an engine that has room for all of it.
    pub fn limits(&self) -> Limits {
        let passes: Vec<Pass> = self.shapes().map(|(rows, context)| Pass::new(rows, context)).collect();
        let rows_max = self.rows.iter().copied().max().unwrap_or(1);
        let own = passes.iter().map(Pass::own_pages).max().unwrap_or(0);
        Limits { rows_max, pages: own + context_pages(&passes), cached_pages: 0, ..Limits::default() }
    }

    fn shapes(&self) -> impl Iterator<Item = (u32, u32)> {
        self.contexts.iter().flat_map(|&context| self.rows.iter().map(move |&rows| (rows, context)))
    }
}

/// Pages of context that the sequences of all passes share.
fn context_pages(passes: &[Pass]) -> usize {
    let longest = passes.iter().map(|pass| pass.context_pages() * pass.sequences()).max().unwrap_or(0);
    longest.min(CONTEXT_POSITIONS_MAX as usize / PAGE_SLOTS)
}

fn contexts(wanted: &[u32]) -> Vec<u32> {
    BTreeSet::from_iter(wanted.iter().copied()).into_iter().collect()
}

/// Times steps of the grid's shapes, as far as the engine has room for them; it holds no requests, and its cache is
/// written over. `clock` is monotonic time since any origin; `progress` hears of timed steps and how many there are at most.
///
/// # Errors
/// A rank of its group does not answer.
///
/// # Panics
/// When the grid is empty or asks for more context than the model has, or the engine has or had requests.
pub fn measure(
    engine: &mut Engine,
    grid: &Grid,
    clock: &mut dyn FnMut() -> Duration,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Profile, CommError> {
    let load = engine.load();
    let unused = load.active + load.queued + load.cached_pages == 0;
    assert!(unused, "the cache belongs to requests, or to prefixes of some");
    let longest = grid.contexts.iter().copied().max().unwrap_or(0);
    assert!(longest <= engine.model().config().context_length, "the model's context ends before {longest} positions");
    let (mut bench, passes) = Bench::new(engine, grid)?;
    assert!(!passes.is_empty() && grid.repeats > 0, "a grid must have shapes");
    let started = clock();
    let mut taken = vec![Vec::with_capacity(grid.repeats); passes.len()];
    'turns: for turn in 0..grid.repeats {
        for (i, pass) in passes.iter().enumerate() {
            if turn > 0 && clock() - started > grid.limit {
                break 'turns;
            }
            let took = bench.time(pass, clock)?;
            taken[i].push(took.as_secs_f64() * 1e3);
            progress(turn * passes.len() + i + 1, grid.repeats * passes.len());
        }
    }
    let points = passes.iter().zip(&mut taken).map(|(pass, taken)| pass.point(taken)).collect();
    let model = engine.model();
    let mut profile = Profile {
        format: FORMAT.into(),
        model: model.config().name.clone(),
        numerics_id: model.numerics_id().to_owned(),
        device: device(),
        isa: model.isa().name().to_owned(),
        threads: model.threads(),
        ranks: engine.ranks(),
        dtype: model.dtype().name().to_owned(),
        kv_type: match model.kv_type() {
            KvType::F32 => "f32",
            KvType::Bf16 => "bf16",
        }
        .to_owned(),
        points,
    };
    profile.sort();
    Ok(profile)
}

/// Name of this machine's processor, or of its architecture where the system does not say.
pub fn device() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    named.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The rows of one shape of step: sequences of up to [`SEQUENCE_ROWS`] rows at the same context, all scored.
struct Pass {
    context: u32,
    rows: Vec<Row>,
    outputs: Vec<u32>,
}

impl Pass {
    fn new(count: u32, context: u32) -> Self {
        let row = |i: u32| {
            let first = i - i % SEQUENCE_ROWS;
            let end = context + SEQUENCE_ROWS.min(count - first);
            Row { sequence: i / SEQUENCE_ROWS, position: context + i % SEQUENCE_ROWS, end }
        };
        Self { context, rows: (0..count).map(row).collect(), outputs: (0..count).collect() }
    }

    fn sequences(&self) -> usize {
        self.rows.len().div_ceil(SEQUENCE_ROWS as usize)
    }

    /// Pages of its sequences' own rows.
    fn own_pages(&self) -> usize {
        OWN_PAGES * self.sequences()
    }

    /// Whole pages of context of one sequence.
    fn context_pages(&self) -> usize {
        self.context as usize / PAGE_SLOTS
    }

    fn point(&self, taken: &mut [f64]) -> Point {
        taken.sort_by(f64::total_cmp);
        let at = |share: f64| taken[((taken.len() - 1) as f64 * share).round() as usize];
        // A clock that did not advance still took some time.
        let ms = at(0.5).max(1e-6);
        Point { rows: self.rows.len() as u32, context: self.context, ms, spread: (at(0.75) - at(0.25)) / ms }
    }
}

/// What measured steps run on.
struct Bench<'a> {
    engine: &'a mut Engine,
    /// Pages of context; the pages of the sequences' own rows come after them.
    pool: usize,
    ids: Vec<u32>,
    draws: Vec<Draw>,
    records: Vec<Record>,
}

impl<'a> Bench<'a> {
    /// With the passes for which the engine has room.
    fn new(engine: &'a mut Engine, grid: &Grid) -> Result<(Self, Vec<Pass>), CommError> {
        const { assert!(SEQUENCE_ROWS <= BLOCK_SIZE_MAX, "positions must not pass the context by more than a block") };
        let (limits, room) = (*engine.limits(), engine.rank().pages());
        let mut passes: Vec<Pass> = grid.shapes().map(|(rows, context)| Pass::new(rows, context)).collect();
        passes.retain(|pass| pass.rows.len() <= limits.rows_max as usize && pass.own_pages() <= room);
        let own = passes.iter().map(Pass::own_pages).max().unwrap_or(0);
        let pool = context_pages(&passes).min(room - own);
        passes.retain(|pass| pool > 0 || pass.context_pages() == 0);
        let rows = passes.iter().map(|pass| pass.rows.len()).max().unwrap_or(0);
        let vocab = engine.model().config().tokenizer_size;
        let ids = (0..rows as u32).map(|i| i % vocab.max(1)).collect();
        let (draws, records) = (vec![Draw::default(); rows], vec![Record::default(); rows]);
        let mut bench = Self { engine, pool, ids, draws, records };
        bench.fill(pool + own, rows)?;
        Ok((bench, passes))
    }

    /// Writes to every page: memory never written may be one and the same page of zeros, faster than any real one.
    fn fill(&mut self, pages: usize, rows_max: usize) -> Result<(), CommError> {
        let slots: Vec<usize> = (0..pages * PAGE_SLOTS).step_by(self.touching()).collect();
        slots.chunks(rows_max.max(1)).try_for_each(|slots| {
            let first = slots[0] / PAGE_SLOTS;
            let pages: Vec<u32> = (first..=slots[slots.len() - 1] / PAGE_SLOTS).map(|page| page as u32).collect();
            let row = |slot: &usize| Row {
                sequence: (slot / PAGE_SLOTS - first) as u32,
                position: (slot % PAGE_SLOTS) as u32,
                end: 1,
            };
            let rows: Vec<Row> = slots.iter().map(row).collect();
            self.lead(&rows, &pages.chunks(1).collect::<Vec<_>>(), &[])
        })
    }

    /// Of so many slots one has to be written so that all memory of a page is touched.
    fn touching(&self) -> usize {
        let model = self.engine.model();
        let element = match model.kv_type() {
            KvType::F32 => 4,
            KvType::Bf16 => 2,
        };
        (MEMORY_PAGE_BYTES / (model.config().heads.head_dim * element)).clamp(1, PAGE_SLOTS)
    }

    /// Pages of one sequence: context from the pool, which wraps around, then its own.
    fn table(&self, sequence: usize, context_pages: usize) -> Vec<u32> {
        let context = (0..context_pages).map(|page| (sequence * context_pages + page) % self.pool);
        let own = self.pool + OWN_PAGES * sequence;
        context.chain(own..own + OWN_PAGES).map(|page| page as u32).collect()
    }

    /// Time of a pass, after others like it where it is short.
    fn time(&mut self, pass: &Pass, clock: &mut dyn FnMut() -> Duration) -> Result<Duration, CommError> {
        let first = clock();
        self.run(pass)?;
        let took = clock() - first;
        if took >= LONG {
            return Ok(took);
        }
        while clock() < first + WARMING {
            self.run(pass)?;
        }
        let before = clock();
        self.run(pass)?;
        Ok(clock() - before)
    }

    fn run(&mut self, pass: &Pass) -> Result<(), CommError> {
        let tables: Vec<Vec<u32>> =
            (0..pass.sequences()).map(|sequence| self.table(sequence, pass.context_pages())).collect();
        let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        self.lead(&pass.rows, &tables, &pass.outputs)
    }

    fn lead(&mut self, rows: &[Row], tables: &[&[u32]], outputs: &[u32]) -> Result<(), CommError> {
        let (ids, draws) = (&self.ids[..rows.len()], &self.draws[..outputs.len()]);
        let pass = wire::Pass { ids, rows, tables, outputs, draws, wanted: &[] };
        self.engine.rank().lead(&pass, &mut self.records[..outputs.len()])
    }
}

#[cfg(test)]
mod tests;
