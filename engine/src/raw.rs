//! Token-level access for comparisons with other implementations: logits of given ids, and decodes by the
//! loops of the model families' authors, as strategies of the same policies and through the same engine.

use crate::model::{LoadError, Model, Reach, row_end};
use crate::pages::Pages;
use crate::policy::{Bound, Comparison, Order, Policy, Quota};
use crate::request::{BLOCK_SIZE_MAX, BlockTrace, Edit, Ends, Event, Fill, Refusal, Request, RequestId};
use crate::request::{Sampling, Settings};
use crate::step::{Engine, Limits};
use serde::{Deserialize, Deserializer};
use std::sync::Arc;
use thiserror::Error;
use unmask_kernels::{Row, RowTable};

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
}

/// A decoding loop as its authors run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoopKind {
    /// One token per pass, causal.
    Ar,
    /// Blocks in an exact canvas; the end-of-sequence counts when its block is full.
    StableDiffcoder,
    /// Whole blocks; stop tokens count when their block is full.
    Sdar,
    /// Our own models: whole blocks, ended by the first settled end-of-sequence.
    Unmask,
}

impl LoopKind {
    /// The loop named `name`, as in reference data.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "ar" => Self::Ar,
            "stable_diffcoder" => Self::StableDiffcoder,
            "sdar" => Self::Sdar,
            "unmask" => Self::Unmask,
            _ => return None,
        })
    }

    /// The loop a model's authors use.
    pub fn of(model: &Model) -> Self {
        let config = model.config();
        if !config.can_diffuse() {
            return Self::Ar;
        }
        Self::from_name(config.family.name()).unwrap_or(Self::Unmask)
    }
}

/// Parameters of a decode, under the names that the authors' loops use.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    /// Tokens to generate.
    #[serde(alias = "gen_length", alias = "max_new_tokens")]
    pub max_tokens: Option<u32>,
    /// Positions decoded together.
    #[serde(alias = "block_length")]
    pub block_size: Option<u32>,
    /// A policy in its own form; instead of the names below.
    pub policy: Option<Policy>,
    /// Steps: of the whole output (stable_diffcoder) or of a block.
    #[serde(alias = "denoising_steps")]
    pub steps: Option<u32>,
    /// Confidence threshold.
    #[serde(alias = "confidence_threshold")]
    pub threshold: Option<f32>,
    /// Bound of the entropy-bounded strategy, nats.
    pub eb_threshold: Option<f32>,
    /// Order of the fixed schedule: `low_confidence`.
    pub remasking: Option<String>,
    /// SDAR's strategy.
    pub remasking_strategy: Option<String>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus, in (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps everything.
    pub top_k: Option<u32>,
    /// Of the draws.
    pub seed: Option<u64>,
    /// `null`: no end-of-sequence.
    #[serde(default, deserialize_with = "present")]
    pub eos_token_id: Option<Option<u32>>,
    /// Tokens that end the output.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Must be the model's.
    pub mask_token_id: Option<u32>,
    /// Must be the model's.
    pub shift: Option<bool>,
    /// Must be 1.
    pub repetition_penalty: Option<f32>,
    /// Most passes.
    pub nfe_cap: Option<u32>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u32>>, D::Error> {
    Option::<u32>::deserialize(deserializer).map(Some)
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

/// Settings a loop's parameters stand for.
fn settings(model: &Model, kind: LoopKind, p: &Parameters) -> Result<Settings, RawError> {
    let config = model.config();
    let bad = |message: String| RawError::Parameters(message);
    if let Some(mask) = p.mask_token_id.filter(|&mask| config.mask_id != Some(mask)) {
        return Err(bad(format!(
            "mask_token_id {mask} is not the model's ({:?}): override it at load",
            config.mask_id
        )));
    }
    if p.shift.is_some_and(|shift| shift != config.shift) {
        return Err(bad(format!("shift must be {}, the model's", config.shift)));
    }
    if p.repetition_penalty.is_some_and(|penalty| penalty != 1.0) {
        return Err(bad("repetition_penalty must be 1.0: other values are not supported".into()));
    }
    if let Some(order) = p.remasking.as_deref().filter(|order| *order != "low_confidence") {
        return Err(bad(format!("remasking {order:?} is unknown: known is low_confidence")));
    }
    let max_tokens = p.max_tokens.unwrap_or(config.decode.max_tokens);
    let block_size = match kind {
        LoopKind::Ar => 1,
        _ => p.block_size.unwrap_or(config.decode.block_size),
    };
    if block_size == 0 || block_size > BLOCK_SIZE_MAX {
        return Err(bad(format!("block_size must be from 1 to {BLOCK_SIZE_MAX}, is {block_size}")));
    }
    let policy = match p.policy {
        Some(policy) => policy,
        None => policy(kind, p, max_tokens, block_size, config.decode.policy)?,
    };
    let stop_ids = match (&p.stop_token_ids, p.eos_token_id) {
        (Some(ids), _) => ids.clone(),
        (None, Some(eos)) => eos.into_iter().collect(),
        (None, None) => config.eos_ids.clone(),
    };
    let ends = Ends {
        whole_last_block: kind != LoopKind::StableDiffcoder,
        at_first_stop: matches!(kind, LoopKind::Unmask | LoopKind::Ar),
    };
    Ok(Settings {
        max_tokens,
        block_size,
        policy,
        sampling: Sampling {
            temperature: p.temperature.unwrap_or(0.0),
            top_p: p.top_p.unwrap_or(1.0),
            top_k: p.top_k.unwrap_or(0),
            seed: p.seed.unwrap_or(0),
        },
        stop_ids,
        nfe_cap: p.nfe_cap.unwrap_or(0),
        ends: Some(ends),
    })
}

/// The policy that a loop's own parameter names stand for.
fn policy(
    kind: LoopKind,
    p: &Parameters,
    max_tokens: u32,
    block_size: u32,
    default: Policy,
) -> Result<Policy, RawError> {
    let needed = |name: &str| RawError::Parameters(format!("{name} is missing"));
    Ok(match kind {
        LoopKind::Ar => Policy::Autoregressive,
        LoopKind::StableDiffcoder => match (p.threshold, p.steps) {
            (Some(tau), _) => Policy::Threshold { tau, comparison: Comparison::Inclusive, quota_steps: None },
            (None, Some(steps)) => {
                let steps = (steps / (max_tokens / block_size).max(1)).clamp(1, block_size);
                Policy::Fixed { steps, order: Order::Confidence, quota: Quota::Masks }
            }
            (None, None) => default,
        },
        LoopKind::Sdar => {
            let steps = p.steps.unwrap_or(block_size).clamp(1, block_size);
            match p.remasking_strategy.as_deref() {
                Some("low_confidence_static") => Policy::Fixed { steps, order: Order::Confidence, quota: Quota::Block },
                Some("sequential") => Policy::Fixed { steps, order: Order::Sequential, quota: Quota::Block },
                Some("low_confidence_dynamic") => Policy::Threshold {
                    tau: p.threshold.ok_or_else(|| needed("confidence_threshold"))?,
                    comparison: Comparison::Strict,
                    quota_steps: Some(steps),
                },
                Some("entropy_bounded") => Policy::EntropyBounded {
                    gamma: p.eb_threshold.ok_or_else(|| needed("eb_threshold"))?,
                    bound: Bound::Cumulative,
                },
                Some(other) => {
                    return Err(RawError::Parameters(format!(
                        "remasking_strategy {other:?} is unknown: known are low_confidence_static, \
                         low_confidence_dynamic, sequential, entropy_bounded"
                    )));
                }
                None => generic(p, block_size, default),
            }
        }
        LoopKind::Unmask => generic(p, block_size, default),
    })
}

/// `threshold` or `steps` (per block) without a family's own names.
fn generic(p: &Parameters, block_size: u32, default: Policy) -> Policy {
    match (p.threshold, p.steps) {
        (Some(tau), _) => Policy::Threshold { tau, comparison: Comparison::Strict, quota_steps: None },
        (None, Some(steps)) => {
            Policy::Fixed { steps: steps.clamp(1, block_size), order: Order::Confidence, quota: Quota::Masks }
        }
        (None, None) => default,
    }
}

/// Runs one decode through an engine of its own.
///
/// # Errors
/// Bad parameters, or a request the model cannot honour.
pub fn decode(model: &Arc<Model>, request: &RawDecode) -> Result<RawOutcome, RawError> {
    let settings = settings(model, request.loop_kind, &request.parameters)?;
    let positions = request.prompt.len() as u32 + settings.max_tokens + BLOCK_SIZE_MAX;
    let limits = Limits { pages: Pages::needed(positions), active_max: 1, queue_max: 1, ..Limits::default() };
    let mut engine = Engine::new(Arc::clone(model), limits);
    let max_tokens = settings.max_tokens as usize;
    let stop_ids = settings.stop_ids.clone();
    engine.submit(Request { raw: true, ..Request::new(RequestId(0), request.prompt.clone(), settings) })?;
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
    Ok(outcome(request, traces, max_tokens, &stop_ids))
}

fn outcome(request: &RawDecode, traces: Vec<BlockTrace>, max_tokens: usize, stop_ids: &[u32]) -> RawOutcome {
    let prompt_len = request.prompt.len() as u32;
    let passes = traces.last().map_or(0, |trace| trace.passes);
    let mut output_ids: Vec<u32> = Vec::new();
    let (mut commits, mut edits) = (Vec::new(), Vec::new());
    for trace in traces {
        let skip = prompt_len.saturating_sub(trace.first_position) as usize;
        output_ids.extend(&trace.tokens[skip..]);
        commits.extend(trace.fills);
        edits.extend(trace.edits);
    }
    commits.sort_by_key(|fill: &Fill| fill.position);
    edits.sort_by_key(|edit: &Edit| edit.pass);
    let stop = output_ids.iter().position(|id| stop_ids.contains(id));
    match (request.loop_kind, stop) {
        // The authors fill the canvas from the first end-of-sequence on.
        (LoopKind::StableDiffcoder, Some(at)) => {
            let eos = output_ids[at];
            output_ids[at..].fill(eos);
        }
        // Nothing behind the stop token is part of the output.
        (LoopKind::Unmask | LoopKind::Ar, Some(at)) => output_ids.truncate(at + 1),
        _ => {}
    }
    let answer_len = stop.unwrap_or(output_ids.len()).min(max_tokens);
    let autoregressive = request.loop_kind == LoopKind::Ar;
    RawOutcome {
        answer_ids: output_ids[..answer_len].to_vec(),
        finish_reason: if stop.is_some_and(|at| at < max_tokens) { "stop" } else { "length" },
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
    // Keys of all rows must be in the cache when a row attends to later ones, so only causal rows split.
    let chunk = match reach {
        Reach::Causal => ROWS_PER_PASS,
        Reach::Block => ROWS_PER_PASS.next_multiple_of(block_size as usize),
        Reach::Bidirectional => ids.len(),
    };
    let mut kv = model.new_kv(Pages::needed(length));
    let mut scratch = model.new_scratch(chunk);
    let pages: Vec<u32> = (0..Pages::needed(length) as u32).collect();
    let mut out = vec![0.0; ids.len() * config.vocab_rows as usize];
    let out_chunks = out.chunks_mut(chunk * config.vocab_rows as usize);
    for (index, (part, rows_out)) in ids.chunks(chunk).zip(out_chunks).enumerate() {
        let first = index * chunk;
        let rows: Vec<Row> = (first as u32..(first + part.len()) as u32)
            .map(|position| Row { sequence: 0, position, end: row_end(reach, position, block_size, length) })
            .collect();
        let outputs: Vec<u32> = (0..part.len() as u32).collect();
        model.forward(part, &RowTable { rows: &rows, tables: &[&pages] }, &outputs, &mut kv, &mut scratch);
        model.logits(&scratch, rows_out);
    }
    Ok(out)
}
