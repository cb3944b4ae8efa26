//! What a model writes on its own, and by which path: prompts decoded by the engine, checked by running them.

use std::sync::Arc;

use anyhow::Context;
use unmask_engine::opening::{Choice, Opening};
use unmask_engine::{BlockTrace, Engine, Event, Limits as EngineLimits, Model, Reason, Request, RequestId, Settings};
use unmask_text::{Specials, Tail, TextError, Tokenizer};

use crate::{
    measure::Point,
    tasks::{
        Task,
        verify::{self, Limits, Outcome, Program},
    },
    trajectory::{Answer, Trajectory},
};

/// Longest answer (tokens).
pub(crate) const MAX_TOKENS: u32 = 256;
/// Most memory for keys and values (bytes).
const CACHE_BYTES: usize = 4 << 30;
/// Requests in the engine at once where nothing else is asked for.
pub const STREAMS: usize = 64;

/// What the engine is given of a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Given {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Text behind the ids, with which the output begins.
    pub tail: Option<Tail>,
}

/// One decoded prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rollout {
    /// The answer without its stop token.
    pub answer: Vec<u32>,
    /// How each block came about.
    blocks: Vec<BlockTrace>,
    /// Passes in all.
    pub passes: u32,
    /// Whether the model ended the answer by itself.
    pub ended: bool,
}

/// Prompts decoded together, and what the engine did for them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Run {
    /// In order of the prompts.
    pub rollouts: Vec<Rollout>,
    /// Forward passes of the engine, those for prompts included.
    pub steps: u64,
    /// Rows of them all.
    pub rows: u64,
}

/// Decodes prompts greedily, `streams` at a time. `progress` hears how many are done.
///
/// # Errors
/// A prompt is empty or too long for the model.
pub fn roll_out(
    model: &Arc<Model>,
    prompts: &[Given],
    point: Point,
    streams: usize,
    mut progress: impl FnMut(usize),
) -> anyhow::Result<Run> {
    let defaults = EngineLimits::default();
    let pages = defaults.pages.min(CACHE_BYTES / model.page_bytes());
    let limits = EngineLimits { active_max: streams, queue_max: prompts.len().max(1), pages, ..defaults };
    let mut engine = Engine::new(Arc::clone(model), limits);
    for (index, prompt) in prompts.iter().enumerate() {
        let mut settings = Settings::new(MAX_TOKENS, point.block_size, point.policy());
        // A raw request reports its blocks and knows no end but those it is given.
        settings.stop_ids.clone_from(&model.config().eos_ids);
        let mut request = Request::new(RequestId(index as u64), prompt.ids.clone(), settings);
        request.raw = true;
        request.opening = prompt.tail.as_ref().map(opening).transpose().map_err(anyhow::Error::msg)?;
        engine.submit(request).with_context(|| format!("prompt {index}"))?;
    }
    let mut run = Run { rollouts: vec![Rollout::default(); prompts.len()], ..Run::default() };
    let (mut events, mut finished) = (Vec::new(), 0);
    while engine.has_work() {
        let report = engine.step(&mut events);
        (run.steps, run.rows) = (run.steps + 1, run.rows + u64::from(report.rows));
        for event in events.drain(..) {
            let rollout = &mut run.rollouts[event.id().0 as usize];
            match event {
                Event::Commit { tokens, .. } => rollout.answer.extend(tokens),
                Event::Trace { trace, .. } => rollout.blocks.push(trace),
                Event::Finished { nfe, reason, .. } => {
                    (rollout.passes, rollout.ended) = (nfe, reason == Reason::Stop);
                    finished += 1;
                    progress(finished);
                }
                _ => {}
            }
        }
    }
    Ok(run)
}

impl Given {
    /// The prompt `text` as it is served: without its last word where `model` takes that and causal rows decide.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub fn of(text: &str, tokenizer: &Tokenizer, model: &Model, point: Point) -> Result<Self, TextError> {
        if model.config().heal && point.policy().is_causal() {
            let (ids, tail) = tokenizer.encode_but_last_word(text)?;
            return Ok(Self { ids, tail });
        }
        Ok(Self::from(tokenizer.encode(text, Specials::AsText, false)?))
    }

    /// Text of an answer to it, behind what was typed.
    pub fn text(&self, answer: &[u32], tokenizer: &Tokenizer) -> String {
        let (text, typed) = (tokenizer.decode(answer, true), self.tail.as_ref().map_or("", |tail| &tail.typed));
        text.strip_prefix(typed).unwrap_or(&text).to_owned()
    }
}

impl From<Vec<u32>> for Given {
    fn from(ids: Vec<u32>) -> Self {
        Self { ids, tail: None }
    }
}

fn opening(tail: &Tail) -> Result<Opening, String> {
    let place = |ways: &Vec<(u32, u32)>| ways.iter().map(|&(token, next)| Choice { token, next }).collect();
    Opening::new(tail.ways.iter().map(place).collect())
}

impl Rollout {
    /// The path from `prompt` to the answer, in blocks of `block` positions; what was never decoded after the end is
    /// filled with `end` in the last pass. `None` when the model did not end by itself or changed what it had written.
    pub fn trajectory(&self, prompt: &[u32], block: usize, end: u32) -> Option<Trajectory> {
        if !self.ended || self.blocks.iter().any(|trace| !trace.edits.is_empty()) {
            return None;
        }
        let mut tokens = [prompt, &self.answer, &[end]].concat();
        let length = tokens.len();
        tokens.resize(length.next_multiple_of(block), end);
        let first = prompt.len() / block * block;
        let mut reveal = vec![0u16; tokens.len() - first];
        for trace in &self.blocks {
            let start = trace.fills.iter().map(|fill| fill.pass).min()?;
            for fill in &trace.fills {
                if let Some(reveal) = reveal.get_mut((fill.position as usize).checked_sub(first)?) {
                    *reveal = (fill.pass - start + 1) as u16;
                }
            }
        }
        for (index, block) in reveal.chunks_exact_mut(block).enumerate() {
            let last = block.iter().copied().max().unwrap_or(0).max(1);
            let given = prompt.len().saturating_sub(first + index * block.len());
            block.iter_mut().skip(given).filter(|fell| **fell == 0).for_each(|fell| *fell = last);
        }
        Some(Trajectory { tokens, length, block, reveal })
    }
}

impl Rollout {
    /// Prompt and answer; `None` when the model did not end by itself.
    pub fn answer(&self, prompt: &[u32], end: u32) -> Option<Answer> {
        self.ended.then(|| Answer { tokens: [prompt, &self.answer, &[end]].concat(), prompt: prompt.len() })
    }
}

/// A prompt to complete and what its completion must do.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// As a user types it.
    pub text: String,
    /// The task it is all of, whose tests decide; without one, the completion must run and define a function.
    pub task: Option<Task>,
}

impl Prompt {
    fn program(&self, answer: &str) -> Program {
        match &self.task {
            Some(task) => Program::of(task, answer),
            None => Program::defining(&format!("{}{answer}", self.text)),
        }
    }
}

/// Which answers do what their prompts ask for; `answers` are pairs of a prompt and a text.
///
/// # Errors
/// Python cannot be run.
pub fn verify(answers: &[(&Prompt, String)]) -> anyhow::Result<Vec<bool>> {
    let programs: Vec<Program> = answers.iter().map(|(prompt, answer)| prompt.program(answer)).collect();
    Ok(verify::run(&programs, &Limits::default())?.into_iter().map(|outcome| outcome == Outcome::Passed).collect())
}
