//! A folder in the format golden/1. Answers may be absent: then only ids and inputs are read.

use anyhow::{Context, ensure};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;
use unmask_engine::Reach;

/// The format this reads.
const FORMAT: &str = "golden/1";

/// The cases of a folder.
pub struct Golden {
    /// As `expected.json` has it.
    pub model: Value,
    /// Forward passes.
    pub logits: Vec<LogitsCase>,
    /// Decodes.
    pub decode: Vec<DecodeCase>,
    /// Texts.
    pub tokenizer: Vec<Value>,
}

/// One forward pass.
pub struct LogitsCase {
    /// Its name.
    pub id: String,
    /// Rows.
    pub input_ids: Vec<u32>,
    /// How far rows attend.
    pub reach: Reach,
    /// Of block-causal reach.
    pub block_size: u32,
    /// Name of the tensor that holds the answer.
    pub tensor: String,
    /// The answer.
    pub expected: Option<Vec<f32>>,
}

/// One decode.
pub struct DecodeCase {
    /// Its name.
    pub id: String,
    /// Whose loop.
    pub decoding_loop: String,
    /// Under the loop's own names.
    pub parameters: Value,
    /// Prompt ids.
    pub prompt_ids: Vec<u32>,
    /// The whole case, answers included.
    pub raw: Value,
}

/// Reads a folder.
///
/// # Errors
/// `expected.json` is missing, malformed or of another format; a case lacks its inputs.
pub fn read(dir: &Path) -> anyhow::Result<Golden> {
    let path = dir.join("expected.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let all: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    ensure!(all["format"] == FORMAT, "{}: format is {}, {FORMAT} is read", path.display(), all["format"]);
    let answers = std::fs::read(dir.join("expected.safetensors")).ok();
    let answers = answers.as_deref().map(SafeTensors::deserialize).transpose().context("expected.safetensors")?;
    let list = |key: &str| all[key].as_array().cloned().unwrap_or_default();
    Ok(Golden {
        model: all["model"].clone(),
        logits: list("logits").iter().map(|case| logits_case(case, answers.as_ref())).collect::<Result<_, _>>()?,
        decode: list("decode").into_iter().map(decode_case).collect::<Result<_, _>>()?,
        tokenizer: list("tokenizer"),
    })
}

fn text(case: &Value, key: &str) -> anyhow::Result<String> {
    case[key].as_str().map(str::to_owned).with_context(|| format!("case {}: {key} is missing", case["id"]))
}

/// A list of ids.
pub fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

fn logits_case(case: &Value, answers: Option<&SafeTensors<'_>>) -> anyhow::Result<LogitsCase> {
    let id = text(case, "id")?;
    let attention = text(case, "attention")?;
    let tensor = case["tensor"].as_str().unwrap_or(&id).to_owned();
    let expected = answers
        .and_then(|answers| answers.tensor(&tensor).ok())
        .map(|view| view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect());
    Ok(LogitsCase {
        input_ids: ids(&case["input_ids"]).with_context(|| format!("case {id}: input_ids are missing"))?,
        reach: Reach::from_name(&attention).with_context(|| format!("case {id}: attention {attention} is unknown"))?,
        block_size: case["block_length"].as_u64().unwrap_or(1) as u32,
        tensor,
        expected,
        id,
    })
}

fn decode_case(case: Value) -> anyhow::Result<DecodeCase> {
    let id = text(&case, "id")?;
    Ok(DecodeCase {
        decoding_loop: text(&case, "loop")?,
        parameters: case["parameters"].clone(),
        prompt_ids: ids(&case["prompt_ids"]).with_context(|| format!("case {id}: prompt_ids are missing"))?,
        id,
        raw: case,
    })
}
