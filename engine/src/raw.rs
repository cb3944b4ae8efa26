//! Token-level access for comparisons with other implementations: logits of given ids, and decodes by the
//! loops of the model families' authors, as strategies of the same policies and through the same engine.

mod loops;

pub use loops::{LoopKind, Parameters};

use crate::group::wire::Pass;
use crate::model::{LoadError, Model, Reach, row_end};
use crate::pages::Pages;
use crate::plan::PROMPT_SHARE;
use crate::request::{BLOCK_SIZE_MAX, BlockTrace, Edit, Event, Fill, Refusal, Request, RequestId};
use crate::step::{Engine, Limits};
use loops::{Prepared, prepare};
use std::sync::Arc;
use thiserror::Error;
use unmask_kernels::{Draw, Record, Row, RowTable};

/// Rows of one pass of [`logits`].
const ROWS_PER_PASS: usize = 512;

/// Why raw access failed.
#[derive(Debug, Error)]
pub enum RawError {
    /// Parameters that are unknown, missing or out of range.
    #[error("parameters: {0}")]
    Parameters(String),
    /// The engine refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Another rank of the group failed.
    #[error("a rank failed: {0}")]
    Rank(String),
}

/// One decode.
#[derive(Debug, Clone)]
pub struct RawDecode {
    /// Prompt ids.
    pub prompt: Vec<u32>,
    /// Whose loop.
    pub loop_kind: LoopKind,
    /// Its parameters.
    pub parameters: Parameters,
}

/// What a decode did.
#[derive(Debug, Clone, PartialEq)]
pub struct RawOutcome {
    /// The generated region as the loop leaves it.
    pub output_ids: Vec<u32>,
    /// What a client gets: up to the first stop token, exclusive, at most the length asked for.
    pub answer_ids: Vec<u32>,
    /// "stop" or "length".
    pub finish_reason: &'static str,
    /// Absolute position of the first stop token.
    pub stop_position: Option<u32>,
    /// Masks that fell, ascending by position.
    pub commits: Vec<Fill>,
    /// Edits in order of pass.
    pub edits: Vec<Edit>,
    /// Denoise passes.
    pub denoise: u32,
    /// One-token passes.
    pub decode: u32,
}

/// Runs one decode through an engine of its own.
///
/// # Errors
/// Bad parameters, or a request the model cannot honour.
pub fn decode(model: &Arc<Model>, request: &RawDecode) -> Result<RawOutcome, RawError> {
    let prepared = prepare(model, request.loop_kind, &request.parameters, request.prompt.len() as u32)?;
    let positions = request.prompt.len() as u32 + prepared.settings.max_tokens + BLOCK_SIZE_MAX;
    // Where a pass computes everything, all of it fits a step, with what is kept for prompts.
    let whole = model.config().open_reach == Reach::Bidirectional;
    let rows_max = if whole { positions / (PROMPT_SHARE - 1) * PROMPT_SHARE + PROMPT_SHARE } else { 0 };
    let Limits { rows_max: usual, .. } = Limits::default();
    let (pages, rows_max) = (Pages::needed(positions), rows_max.max(usual));
    let limits = Limits { pages, rows_max, active_max: 1, queue_max: 1, ..Limits::default() };
    run(&mut Engine::new(Arc::clone(model), limits), request, &prepared)
}

/// Runs one decode through an engine that holds no requests, of a group for example.
///
/// # Errors
/// As [`decode`]; and when another rank fails.
pub fn decode_on(engine: &mut Engine, request: &RawDecode) -> Result<RawOutcome, RawError> {
    let prepared = prepare(engine.model(), request.loop_kind, &request.parameters, request.prompt.len() as u32)?;
    run(engine, request, &prepared)
}

fn run(engine: &mut Engine, request: &RawDecode, prepared: &Prepared) -> Result<RawOutcome, RawError> {
    let submitted = Request::new(RequestId(0), request.prompt.clone(), prepared.settings.clone());
    engine.submit(Request { raw: true, ..submitted })?;
    let mut traces = Vec::new();
    let mut events = Vec::new();
    while engine.has_work() {
        engine.step(&mut events);
        for event in events.drain(..) {
            if let Event::Trace { trace, .. } = event {
                traces.push(trace);
            }
        }
    }
    match engine.failure() {
        Some(error) => Err(RawError::Rank(error.to_string())),
        None => Ok(outcome(request, prepared, traces)),
    }
}

fn outcome(request: &RawDecode, prepared: &Prepared, traces: Vec<BlockTrace>) -> RawOutcome {
    let (kind, asked) = (request.loop_kind, prepared.settings.max_tokens as usize);
    let prompt_len = request.prompt.len() as u32;
    let mut output_ids: Vec<u32> = Vec::new();
    let (mut commits, mut edits) = (Vec::new(), Vec::new());
    let (mut passes, mut idle) = (0, 0);
    for mut trace in traces {
        let skip = prompt_len.saturating_sub(trace.first_position) as usize;
        output_ids.extend(&trace.tokens[skip..]);
        trace.fills.iter_mut().filter(|fill| fill.pass >= 0).for_each(|fill| fill.pass += idle as i32);
        commits.extend(trace.fills);
        edits.extend(trace.edits);
        // Where the authors make a second pass in any case, it is counted though nobody needs it.
        idle += u32::from(prepared.idles && trace.passes == passes + 1);
        passes = trace.passes;
    }
    let passes = passes + idle;
    commits.sort_by_key(|fill: &Fill| fill.position);
    edits.sort_by_key(|edit: &Edit| edit.pass);
    output_ids.truncate(match kind {
        LoopKind::FastDllmV2 | LoopKind::Llada | LoopKind::DreamBlock => asked,
        _ => output_ids.len(),
    });
    let stop = output_ids.iter().position(|id| prepared.stops.contains(id));
    match (kind, stop) {
        // The authors fill the canvas from the first end-of-sequence on.
        (LoopKind::StableDiffcoder, Some(at)) => {
            let eos = output_ids[at];
            output_ids[at..].fill(eos);
        }
        // Nothing behind the stop token is part of the output.
        (LoopKind::Unmask | LoopKind::Ar | LoopKind::FastDllmV2, Some(at)) => output_ids.truncate(at + 1),
        (LoopKind::Llada2 | LoopKind::Llada2Edit, stop) => output_ids.truncate(stop.map_or(asked, |at| at + 1)),
        _ => {}
    }
    if kind == LoopKind::FastDllmV2 {
        commits.retain(|fill| fill.position < prompt_len + output_ids.len() as u32);
    }
    let answer_len = stop.unwrap_or(output_ids.len()).min(output_ids.len()).min(asked);
    let autoregressive = kind == LoopKind::Ar;
    RawOutcome {
        answer_ids: output_ids[..answer_len].to_vec(),
        finish_reason: if stop.is_some_and(|at| at < asked) { "stop" } else { "length" },
        stop_position: stop.map(|at| prompt_len + at as u32),
        output_ids,
        commits,
        edits,
        denoise: if autoregressive { 0 } else { passes },
        decode: if autoregressive { passes } else { 0 },
    }
}

/// Raw head rows of `ids` (rows, vocab), no shift applied, each row attending as `reach` says.
///
/// # Errors
/// Empty or out-of-range ids, a sequence longer than the context, block size 0.
pub fn logits(model: &Model, ids: &[u32], reach: Reach, block_size: u32) -> Result<Vec<f32>, RawError> {
    check(model, ids, block_size)?;
    let (vocab, pages) = (model.config().vocab_rows as usize, pages(ids));
    let chunk = chunk(ids, reach, block_size);
    let (mut kv, mut scratch) = (model.new_kv(pages.len()), model.new_scratch(chunk));
    let mut out = vec![0.0; ids.len() * vocab];
    for (index, (part, rows_out)) in ids.chunks(chunk).zip(out.chunks_mut(chunk * vocab)).enumerate() {
        let (rows, outputs) = rows(index * chunk, part, ids, reach, block_size);
        model.forward(part, &RowTable { rows: &rows, tables: &[&pages] }, &outputs, &mut kv, &mut scratch);
        model.logits(&scratch, rows_out);
    }
    Ok(out)
}

/// [`logits`] by an engine that holds no requests, of a group for example: as many rows as it takes in a step.
///
/// # Errors
/// As [`logits`]; more rows than fit; another rank fails.
pub fn logits_on(engine: &mut Engine, ids: &[u32], reach: Reach, block_size: u32) -> Result<Vec<f32>, RawError> {
    check(engine.model(), ids, block_size)?;
    let (rows_max, pages) = (engine.limits().rows_max as usize, pages(ids));
    if ids.len() > rows_max || pages.len() > engine.limits().pages {
        return Err(RawError::Parameters(format!("ids: {} given, at most {rows_max} are taken at once", ids.len())));
    }
    let (rows, outputs) = rows(0, ids, ids, reach, block_size);
    let draws = vec![Draw::default(); ids.len()];
    let (tables, wanted) = ([pages.as_slice()], outputs.as_slice());
    let pass = Pass { ids, rows: &rows, tables: &tables, outputs: &outputs, draws: &draws, wanted };
    let rank = engine.rank();
    rank.lead(&pass, &mut vec![Record::default(); ids.len()]).map_err(|error| RawError::Rank(error.to_string()))?;
    let (mut out, mut row) = (Vec::new(), Vec::new());
    for output in 0..ids.len() {
        rank.row_logits(output, &mut row);
        out.extend_from_slice(&row);
    }
    Ok(out)
}

fn check(model: &Model, ids: &[u32], block_size: u32) -> Result<(), RawError> {
    let config = model.config();
    let length = ids.len() as u32;
    if ids.is_empty() || length > config.context_length {
        let context = config.context_length;
        return Err(RawError::Parameters(format!("ids: {length} given, must be from 1 to the context of {context}")));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_rows as usize) {
        let last = config.vocab_rows.saturating_sub(1);
        return Err(RawError::Parameters(format!("ids: id {id} is out of range: the vocabulary has ids 0 to {last}")));
    }
    if block_size == 0 {
        return Err(RawError::Parameters("block_size must be at least 1".into()));
    }
    Ok(())
}

/// Rows of a pass: keys of all rows must be in the cache when a row attends to later ones, so only causal rows split.
fn chunk(ids: &[u32], reach: Reach, block_size: u32) -> usize {
    match reach {
        Reach::Causal => ROWS_PER_PASS,
        Reach::Block => ROWS_PER_PASS.next_multiple_of(block_size as usize),
        Reach::Bidirectional => ids.len(),
    }
}

fn pages(ids: &[u32]) -> Vec<u32> {
    (0..Pages::needed(ids.len() as u32) as u32).collect()
}

/// The rows of `part`, which begins at `first` of `ids`, and all of them as outputs.
fn rows(first: usize, part: &[u32], ids: &[u32], reach: Reach, block_size: u32) -> (Vec<Row>, Vec<u32>) {
    let length = ids.len() as u32;
    let rows = (first as u32..(first + part.len()) as u32).map(|position| Row {
        sequence: 0,
        position,
        end: row_end(reach, position, block_size, length),
    });
    (rows.collect(), (0..part.len() as u32).collect())
}
