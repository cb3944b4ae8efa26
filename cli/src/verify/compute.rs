//! Runs the cases of a folder through the engine and the tokenizer.

use super::golden::{DecodeCase, Golden, LogitsCase};
use crate::args::Dtype;
use crate::raw::{to_json, write_tensors};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use unmask_engine::group::{Comm, Pace, StepLimit, follow, threads};
use unmask_engine::model::{Overrides, Share};
use unmask_engine::raw::{LoopKind, RawDecode, RawError, RawOutcome};
use unmask_engine::{Engine, Limits, LoadError, LoadOptions, Model, raw};
use unmask_text::{Specials, Tokenizer};

/// What was computed, case by case.
pub struct Actual {
    /// Head rows, or why there are none.
    pub logits: Vec<Result<Vec<f32>, String>>,
    /// Outcomes under the names of the format, or why there are none.
    pub decode: Vec<Result<Value, String>>,
    /// Ids and texts, or why there are none.
    pub tokenizer: Vec<Result<Value, String>>,
    vocab_rows: usize,
}

/// How long a rank may take for anything: far beyond what any case needs.
const RANK_LIMIT: Duration = Duration::from_secs(120);

/// Computes every case, over `ranks` ranks that are threads.
///
/// # Errors
/// The checkpoint cannot be loaded, or not be shared by so many.
pub fn run(dir: &Path, golden: &Golden, dtype: Dtype, ranks: usize) -> anyhow::Result<Actual> {
    let model = load(dir, golden, dtype, Share { rank: 0, ranks })?;
    let vocab_rows = model.config().vocab_rows as usize;
    let (logits, decode) = if ranks == 1 { cases(&Whole(model), golden) } else { shared(dir, golden, dtype, model)? };
    let tokenizer = if golden.tokenizer.is_empty() { Vec::new() } else { tokenize(dir, golden)? };
    Ok(Actual { logits, decode, tokenizer, vocab_rows })
}

type Cases = (Vec<Result<Vec<f32>, String>>, Vec<Result<Value, String>>);

/// What computes a case.
trait Computes {
    fn logits(&self, case: &LogitsCase) -> Result<Vec<f32>, RawError>;
    fn decode(&self, request: &RawDecode) -> Result<RawOutcome, RawError>;
}

struct Whole(Arc<Model>);

impl Computes for Whole {
    fn logits(&self, case: &LogitsCase) -> Result<Vec<f32>, RawError> {
        raw::logits(&self.0, &case.input_ids, case.reach, case.block_size)
    }

    fn decode(&self, request: &RawDecode) -> Result<RawOutcome, RawError> {
        raw::decode(&self.0, request)
    }
}

struct Group(RefCell<Engine>);

impl Computes for Group {
    fn logits(&self, case: &LogitsCase) -> Result<Vec<f32>, RawError> {
        raw::logits_on(&mut self.0.borrow_mut(), &case.input_ids, case.reach, case.block_size)
    }

    fn decode(&self, request: &RawDecode) -> Result<RawOutcome, RawError> {
        raw::decode_on(&mut self.0.borrow_mut(), request)
    }
}

fn cases(computes: &dyn Computes, golden: &Golden) -> Cases {
    let logits = golden.logits.iter().map(|case| computes.logits(case).map_err(|error| error.to_string()));
    let decode = golden.decode.iter().map(|case| decode(computes, case).map_err(|error| format!("{error:#}")));
    (logits.collect(), decode.collect())
}

/// The cases over ranks that are threads; `model` is the first one's share.
fn shared(dir: &Path, golden: &Golden, dtype: Dtype, model: Arc<Model>) -> anyhow::Result<Cases> {
    let ranks = model.ranks();
    let others =
        (1..ranks).map(|rank| load(dir, golden, dtype, Share { rank, ranks })).collect::<Result<Vec<_>, _>>()?;
    let step = StepLimit { base: RANK_LIMIT, per_row: Duration::ZERO };
    let pace = Pace { now: Instant::now, step, idle: RANK_LIMIT };
    let mut comms = threads(ranks).into_iter().map(Comm::Threads);
    let first = comms.next().context("no rank")?;
    std::thread::scope(|scope| {
        for (other, comm) in others.into_iter().zip(comms) {
            // Why a follower ended shows in the leader's cases.
            scope.spawn(move || follow(other, comm, pace));
        }
        let engine = Engine::leading(model, Limits::default(), first, pace)?;
        Ok(cases(&Group(RefCell::new(engine)), golden))
    })
}

fn load(dir: &Path, golden: &Golden, dtype: Dtype, share: Share) -> anyhow::Result<Arc<Model>> {
    let load = |mask_id| {
        let overrides = Overrides { mask_id, ..Overrides::default() };
        let dtype = dtype.weights();
        Model::load(dir, &LoadOptions { dtype, overrides, share, ..LoadOptions::default() })
    };
    let stated = golden.model["mask_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
    // The reference names its mask; a checkpoint that does not is loaded with that.
    let model = match load(None) {
        Err(LoadError::Config { problems, .. })
            if stated.is_some() && problems.iter().any(|p| p.contains("mask_token_id is missing")) =>
        {
            load(stated)
        }
        loaded => loaded,
    };
    Ok(Arc::new(model?))
}

fn decode(computes: &dyn Computes, case: &DecodeCase) -> anyhow::Result<Value> {
    let Some(loop_kind) = LoopKind::from_name(&case.decoding_loop) else {
        bail!("loop {} is not supported; known are {}", case.decoding_loop, LoopKind::known());
    };
    let parameters = serde_json::from_value(case.parameters.clone()).context("parameters")?;
    let outcome = computes.decode(&RawDecode { prompt: case.prompt_ids.clone(), loop_kind, parameters })?;
    Ok(to_json(&outcome))
}

fn tokenize(dir: &Path, golden: &Golden) -> anyhow::Result<Vec<Result<Value, String>>> {
    let json = std::fs::read(dir.join("tokenizer.json")).context("tokenizer.json")?;
    let config = std::fs::read(dir.join("tokenizer_config.json")).ok();
    let tokenizer = Tokenizer::from_files(&json, config.as_deref(), None)?;
    let case = |case: &Value| {
        let text = case["text"].as_str().ok_or("text is missing")?;
        let encode = |specials, add| tokenizer.encode(text, specials, add).map_err(|error| error.to_string());
        let ids = encode(Specials::Parse, false)?;
        Ok(json!({
            "text": text,
            "ids": ids,
            "ids_with_special": encode(Specials::Parse, true)?,
            "ids_specials_as_text": encode(Specials::AsText, false)?,
            "decoded": tokenizer.decode(&ids, false),
            "decoded_skip_special": tokenizer.decode(&ids, true),
        }))
    };
    Ok(golden.tokenizer.iter().map(case).collect())
}

impl Actual {
    /// Writes `actual.json` and `actual.safetensors` with the ids, keys and tensor names of the expected files.
    ///
    /// # Errors
    /// Files cannot be written.
    pub fn write(&self, out: &Path, golden: &Golden) -> anyhow::Result<()> {
        let failed = |error: &String| json!({ "error": error });
        let with_id = |id: &str, value: &Result<Value, String>| {
            let mut value = value.clone().unwrap_or_else(|error| failed(&error));
            value["id"] = id.into();
            value
        };
        let logits = golden.logits.iter().zip(&self.logits).map(|(case, computed)| match computed {
            Ok(_) => json!({
                "id": case.id, "input_ids": case.input_ids, "tensor": case.tensor,
                "shape": [case.input_ids.len(), self.vocab_rows],
            }),
            Err(error) => json!({ "id": case.id, "error": error }),
        });
        let decode = golden.decode.iter().zip(&self.decode).map(|(case, computed)| with_id(&case.id, computed));
        let tokenizer = self.tokenizer.iter().map(|computed| computed.clone().unwrap_or_else(|error| failed(&error)));
        let all = json!({
            "format": "golden/1",
            "logits": logits.collect::<Vec<_>>(),
            "decode": decode.collect::<Vec<_>>(),
            "tokenizer": tokenizer.collect::<Vec<_>>(),
        });
        let path = out.join("actual.json");
        std::fs::write(&path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
        let tensors = golden.logits.iter().zip(&self.logits).filter_map(|(case, computed)| {
            let rows = computed.as_ref().ok()?;
            Some((case.tensor.clone(), vec![case.input_ids.len(), self.vocab_rows], rows.clone()))
        });
        write_tensors(&out.join("actual.safetensors"), tensors)
    }
}
