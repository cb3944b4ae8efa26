//! Safetensors files to weights: mapped, checked against the config, converted tensor by tensor.

use super::json::read_object;
use super::{LoadError, ModelConfig};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use unmask_kernels::{Mapped, map_read_only};

/// Most problems listed in one error.
const PROBLEMS_MAX: usize = 20;
/// Tensors that some exporters write and no forward pass needs.
const IGNORED_SUFFIXES: [&str; 1] = ["rotary_emb.inv_freq"];

/// Name, shape and type of a tensor, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TensorInfo {
    /// As in the file.
    pub name: String,
    /// Rows first.
    pub shape: Vec<usize>,
    /// As safetensors names it.
    pub dtype: String,
}

/// The mapped files of a checkpoint.
pub struct Weights {
    dir: PathBuf,
    files: Vec<(PathBuf, Mapped)>,
}

impl Weights {
    /// Maps `model.safetensors` or, where that is absent, the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A file is missing, truncated or corrupt.
    pub fn open(dir: &Path) -> Result<Weights, LoadError> {
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors").exists();
        let names: BTreeSet<String> = match if single { None } else { read_object(&index)? } {
            None => BTreeSet::from(["model.safetensors".to_owned()]),
            Some(object) => shard_names(&index, &object)?,
        };
        let mut files = Vec::new();
        for name in names {
            let path = dir.join(&name);
            let mapped = map_read_only(&path).map_err(|error| LoadError::File { path: path.clone(), error })?;
            parse(&path, &mapped)?;
            files.push((path, mapped));
        }
        Ok(Weights { dir: dir.to_owned(), files })
    }

    /// Every tensor of the files.
    ///
    /// # Errors
    /// A file is corrupt, or two files hold the same tensor.
    pub fn tensors(&self) -> Result<BTreeMap<String, TensorView<'_>>, LoadError> {
        let mut all = BTreeMap::new();
        for (path, mapped) in &self.files {
            for (name, view) in parse(path, mapped)?.tensors() {
                if all.contains_key(&name) {
                    let reason = format!("{name} is in another file too");
                    return Err(LoadError::Corrupt { path: path.clone(), reason });
                }
                all.insert(name, view);
            }
        }
        Ok(all)
    }

    /// SHA-256 over every byte of the files.
    pub fn digest(&self) -> Sha256 {
        let mut digest = Sha256::new();
        for (_, mapped) in &self.files {
            digest.update(&mapped[..]);
        }
        digest
    }

    /// Checks names and shapes against what the config needs.
    ///
    /// # Errors
    /// [`LoadError::Tensors`] with all that is missing, unknown or misshapen.
    pub fn check(&self, config: &ModelConfig) -> Result<(), LoadError> {
        let tensors = self.tensors()?;
        let expected = expected(config);
        let mut problems = Vec::new();
        for (name, shape) in &expected {
            match tensors.get(name) {
                None => problems.push(format!("{name} is missing")),
                Some(view) if view.shape() != shape => {
                    problems.push(format!("{name} has shape {:?}, the config says {shape:?}", view.shape()));
                }
                Some(view) if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                    problems.push(format!("{name} has type {:?}; f32, f16 and bf16 are read", view.dtype()));
                }
                Some(_) => {}
            }
        }
        let known = |name: &str| {
            expected.contains_key(name)
                || IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
                || (config.tied && name == "lm_head.weight")
        };
        problems.extend(tensors.keys().filter(|name| !known(name)).map(|name| match name.ends_with("o_proj.bias") {
            true => format!("{name}: a bias of the attention's output is not implemented"),
            false => format!("{name} is unknown"),
        }));
        if problems.is_empty() {
            return Ok(());
        }
        let more = problems.len().saturating_sub(PROBLEMS_MAX);
        problems.truncate(PROBLEMS_MAX);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        Err(LoadError::Tensors { path: self.dir.clone(), problems })
    }
}

/// Files of the shards; only names, so that an index cannot point elsewhere.
fn shard_names(index: &Path, object: &Map<String, Value>) -> Result<BTreeSet<String>, LoadError> {
    let problem = |problem: String| LoadError::config(index, vec![problem]);
    let map = object.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| problem("weight_map is missing".into()))?;
    let mut names = BTreeSet::new();
    for file in map.values() {
        match file.as_str().filter(|name| Path::new(name).file_name().is_some_and(|file| file == *name)) {
            Some(name) => names.insert(name.to_owned()),
            None => return Err(problem(format!("weight_map: {file} is not a file name"))),
        };
    }
    Ok(names)
}

fn parse<'a>(path: &Path, mapped: &'a Mapped) -> Result<SafeTensors<'a>, LoadError> {
    SafeTensors::deserialize(mapped)
        .map_err(|error| LoadError::Corrupt { path: path.to_owned(), reason: error.to_string() })
}

/// Names and shapes of the Llama scheme (Llama, Qwen2, Qwen3 and their block diffusion descendants).
fn expected(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let (hidden, ffn, vocab) = (config.hidden as usize, config.ffn as usize, config.vocab_rows as usize);
    let dim = config.heads.head_dim;
    let (q, kv) = (config.heads.heads * dim, config.heads.kv_heads * dim);
    let mut all = BTreeMap::new();
    let mut need = |name: String, shape: &[usize]| all.insert(name, shape.to_vec());
    need("model.embed_tokens.weight".into(), &[vocab, hidden]);
    need("model.norm.weight".into(), &[hidden]);
    if !config.tied {
        need("lm_head.weight".into(), &[vocab, hidden]);
    }
    for layer in 0..config.layers {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        need(at("input_layernorm.weight"), &[hidden]);
        need(at("post_attention_layernorm.weight"), &[hidden]);
        for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
            need(at(&format!("self_attn.{name}_proj.weight")), &[rows, hidden]);
            if config.qkv_bias {
                need(at(&format!("self_attn.{name}_proj.bias")), &[rows]);
            }
            if config.qk_norm && name != "v" {
                need(at(&format!("self_attn.{name}_norm.weight")), &[dim]);
            }
        }
        need(at("self_attn.o_proj.weight"), &[hidden, q]);
        need(at("mlp.gate_proj.weight"), &[ffn, hidden]);
        need(at("mlp.up_proj.weight"), &[ffn, hidden]);
        need(at("mlp.down_proj.weight"), &[hidden, ffn]);
    }
    all
}

/// Elements of a tensor from `first` on, as f32.
pub(super) fn floats(view: &TensorView<'_>, first: usize, out: &mut [f32]) {
    let width = if view.dtype() == Dtype::F32 { 4 } else { 2 };
    let source = view.data()[first * width..].chunks_exact(width).zip(out);
    match view.dtype() {
        Dtype::F32 => source.for_each(|(b, out)| *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        Dtype::F16 => source.for_each(|(b, out)| *out = f16::from_le_bytes([b[0], b[1]]).to_f32()),
        // Other types were refused by the check.
        _ => source.for_each(|(b, out)| *out = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
    }
}
