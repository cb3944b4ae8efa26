//! `unmask logits` and `unmask decode`: raw access for comparisons with other implementations.

use crate::args::{DecodeArgs, Dtype, LogitsArgs};
use crate::models::OverrideArgs;
use crate::{models, output};
use anyhow::{Context, anyhow};
use safetensors::tensor::{Dtype as TensorType, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use unmask_engine::raw::{LoopKind, Parameters, RawDecode, RawOutcome};
use unmask_engine::{Model, raw};

/// Loads a model by folder or name.
///
/// # Errors
/// It is not found, or cannot be loaded.
pub fn load(name: &str, dtype: Dtype, overrides: &OverrideArgs) -> anyhow::Result<Arc<Model>> {
    let dir = models::find(Some(name))?;
    Ok(Arc::new(Model::load(&dir, &overrides.load_options(dtype, 0))?))
}

/// Writes the raw head rows of the ids.
///
/// # Errors
/// Ids out of range, an unknown model, a file that cannot be written.
pub fn logits(args: &LogitsArgs) -> anyhow::Result<ExitCode> {
    let model = load(&args.model, args.dtype, &args.overrides)?;
    let config = model.config();
    let reach = args.reach.map_or(config.kept_reach, |reach| reach.reach());
    let rows = raw::logits(&model, &args.ids, reach, args.block_size.unwrap_or(config.decode.block_size))?;
    let shape = vec![args.ids.len(), config.vocab_rows as usize];
    write_tensors(&args.out, [("logits".to_owned(), shape, rows)])?;
    Ok(ExitCode::SUCCESS)
}

/// Writes f32 tensors.
///
/// # Errors
/// The file cannot be written.
pub fn write_tensors(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Vec<usize>, Vec<f32>)>,
) -> anyhow::Result<()> {
    let bytes: BTreeMap<String, (Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, data)| (name, (shape, data.iter().flat_map(|x| x.to_le_bytes()).collect())))
        .collect();
    let views: Result<BTreeMap<&str, TensorView<'_>>, _> = bytes
        .iter()
        .map(|(name, (shape, data))| Ok((name.as_str(), TensorView::new(TensorType::F32, shape.clone(), data)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>();
    safetensors::serialize_to_file(views?, None, path).with_context(|| format!("cannot write {}", path.display()))
}

/// Decodes the ids by the loop of the model's authors, or the one named.
///
/// # Errors
/// Unknown parameters or loops, values that the model cannot honour.
pub fn decode(args: &DecodeArgs) -> anyhow::Result<ExitCode> {
    let parameters: Parameters = serde_json::from_str(&args.params).context("--params")?;
    let model = load(&args.model, args.dtype, &args.overrides)?;
    let loop_kind = match &args.decoding_loop {
        None => LoopKind::of(&model),
        Some(name) => LoopKind::from_name(name)
            .ok_or_else(|| anyhow!("--loop: {name:?} is unknown; known are {}", LoopKind::known()))?,
    };
    let outcome = raw::decode(&model, &RawDecode { prompt: args.ids.clone(), loop_kind, parameters })?;
    let text = if args.json { format!("{}\n", to_json(&outcome)) } else { table(&outcome) };
    output::out(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// An outcome under the names of the format golden/1.
pub fn to_json(outcome: &RawOutcome) -> Value {
    let commits = &outcome.commits;
    let edits = &outcome.edits;
    json!({
        "output_ids": outcome.output_ids,
        "answer_ids": outcome.answer_ids,
        "finish_reason": outcome.finish_reason,
        "stop_position": outcome.stop_position,
        "commits": {
            "position": commits.iter().map(|c| c.position).collect::<Vec<_>>(),
            "token": commits.iter().map(|c| c.token).collect::<Vec<_>>(),
            "pass": commits.iter().map(|c| c.pass).collect::<Vec<_>>(),
            "confidence": commits.iter().map(|c| c.confidence).collect::<Vec<_>>(),
        },
        "edits": {
            "position": edits.iter().map(|e| e.position).collect::<Vec<_>>(),
            "old": edits.iter().map(|e| e.old).collect::<Vec<_>>(),
            "new": edits.iter().map(|e| e.new).collect::<Vec<_>>(),
            "pass": edits.iter().map(|e| e.pass).collect::<Vec<_>>(),
            "confidence": edits.iter().map(|e| e.confidence).collect::<Vec<_>>(),
        },
        "totals": { "denoise": outcome.denoise, "decode": outcome.decode },
    })
}

fn table(outcome: &RawOutcome) -> String {
    let mut text = String::from("position   token   pass  confidence\n");
    for commit in &outcome.commits {
        let _ =
            writeln!(text, "{:8}  {:6}  {:5}  {:.6}", commit.position, commit.token, commit.pass, commit.confidence);
    }
    let ids: Vec<String> = outcome.answer_ids.iter().map(u32::to_string).collect();
    let passes = outcome.denoise + outcome.decode;
    let _ = writeln!(text, "\nanswer {}\nended by {} after {passes} passes", ids.join(","), outcome.finish_reason);
    text
}
