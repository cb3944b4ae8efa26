//! Safetensors files to weights: mapped, checked against the config, converted tensor by tensor.

use super::json::read_object;
use super::names::Projections;
use super::{LoadError, ModelConfig};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
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
            check_offsets(&path, &mapped)?;
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
        let (mut listed, mut count) = (Vec::new(), 0);
        let mut problem = |problem: String| {
            count += 1;
            if listed.len() < PROBLEMS_MAX {
                listed.push(problem);
            }
        };
        let mut known = BTreeSet::new();
        for (name, shape) in expected(config) {
            match tensors.get_key_value(&name) {
                None => problem(format!("{name} is missing")),
                Some((name, view)) => {
                    known.insert(name.as_str());
                    if view.shape() != shape {
                        problem(format!("{name} has shape {:?}, the config says {shape:?}", view.shape()));
                    } else if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                        problem(format!("{name} has type {:?}; f32, f16 and bf16 are read", view.dtype()));
                    }
                }
            }
        }
        let ignored = |name: &str| {
            IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
                || (config.tied && name.strip_suffix(".weight") == Some(config.family.names.head))
        };
        for name in tensors.keys().filter(|name| !known.contains(name.as_str()) && !ignored(name)) {
            problem(match name.ends_with("o_proj.bias") {
                true => format!("{name}: a bias of the attention's output is not implemented"),
                false => format!("{name} is unknown"),
            });
        }
        if count == 0 {
            return Ok(());
        }
        if count > PROBLEMS_MAX {
            listed.push(format!("and {} more", count - PROBLEMS_MAX));
        }
        Err(LoadError::Tensors { path: self.dir.clone(), problems: listed })
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

/// A header that speaks of bytes past the end of its file: the library would add such offsets up past 64 bits.
fn check_offsets(path: &Path, bytes: &[u8]) -> Result<(), LoadError> {
    #[derive(Deserialize)]
    struct Span {
        #[serde(default)]
        data_offsets: Value,
    }
    let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    let end = usize::try_from(length).ok().and_then(|length| length.checked_add(size_of::<u64>()));
    let header = end.and_then(|end| bytes.get(size_of::<u64>()..end)).unwrap_or_default();
    // Where this cannot be read, the library says why.
    let spans: HashMap<String, Span> = serde_json::from_slice(header).unwrap_or_default();
    let fits = |offset: &Value| offset.as_u64().is_none_or(|offset| offset <= bytes.len() as u64);
    let past = |span: &Span| span.data_offsets.as_array().is_some_and(|offsets| !offsets.iter().all(fits));
    match spans.iter().find(|(_, span)| past(span)) {
        Some((name, _)) => {
            let reason = format!("{name} lies past the end of the file");
            Err(LoadError::Corrupt { path: path.to_owned(), reason })
        }
        None => Ok(()),
    }
}

/// Names and shapes of a model's tensors, made as they are asked for: a config may speak of a million that no file holds.
fn expected(config: &ModelConfig) -> impl Iterator<Item = (String, Vec<usize>)> {
    let (hidden, vocab) = (config.hidden as usize, config.vocab_rows as usize);
    let names = config.family.names;
    let mut ends = vec![(names.embedding, vec![vocab, hidden]), (names.norm, vec![hidden])];
    if !config.tied {
        ends.push((names.head, vec![vocab, hidden]));
    }
    let ends = ends.into_iter().map(|(name, shape)| (format!("{name}.weight"), shape));
    ends.chain((0..config.layers).flat_map(move |layer| {
        let parts = attention_tensors(config).into_iter().chain(ffn_tensors(config, layer));
        parts.map(move |(name, shape)| (format!("{}.{layer}.{name}", names.layers), shape))
    }))
}

/// Those of a layer's attention and of both norms, without the layer's prefix.
fn attention_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, names, dim) = (config.hidden as usize, config.family.names, config.heads.head_dim);
    let (q, kv) = (config.heads.heads * dim, config.heads.kv_heads * dim);
    let mut all = Vec::new();
    let mut need = |name: &str, kind: &str, shape: &[usize]| all.push((format!("{name}.{kind}"), shape.to_vec()));
    need(names.attention_norm, "weight", &[hidden]);
    need(names.ffn_norm, "weight", &[hidden]);
    let parts: Vec<(&str, usize)> = match &names.projections {
        Projections::Split(parts) => parts.iter().copied().zip([q, kv, kv]).collect(),
        Projections::Fused(name) => vec![(name, q + 2 * kv)],
    };
    for (name, rows) in parts {
        need(name, "weight", &[rows, hidden]);
        if config.qkv_bias {
            need(name, "bias", &[rows]);
        }
    }
    if config.qk_norm {
        need(names.q_norm, "weight", &[dim]);
        need(names.k_norm, "weight", &[dim]);
    }
    need(names.out, "weight", &[hidden, q]);
    all
}

/// Those of a layer's feed-forward part.
fn ffn_tensors(config: &ModelConfig, layer: u32) -> Vec<(String, Vec<usize>)> {
    let (hidden, names) = (config.hidden as usize, config.family.names);
    let mut all = Vec::new();
    let mut part = |ffn: u32, name: &dyn Fn(&str) -> String| {
        for (of, shape) in [(names.gate, [ffn as usize, hidden]), (names.up, [ffn as usize, hidden])] {
            all.push((format!("{}.weight", name(of)), shape.to_vec()));
        }
        all.push((format!("{}.weight", name(names.down)), vec![hidden, ffn as usize]));
    };
    let Some(moe) = config.moe.as_ref().filter(|moe| moe.covers(layer)) else {
        part(config.ffn, &|name| names.dense(name));
        return all;
    };
    for expert in 0..moe.router.experts as u32 {
        part(moe.ffn, &|name| names.expert(expert, name));
    }
    if moe.shared_ffn > 0 {
        part(moe.shared_ffn, &|name| names.shared(name));
    }
    all.push((format!("{}.weight", names.router()), vec![moe.router.experts, hidden]));
    if moe.bias {
        all.push((names.expert_bias(), vec![moe.router.experts]));
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
