//! Checkpoints: a model folder that the engine can load (f32 in training, bf16 when exported), plus what is needed to go
//! on exactly: moments and the position in the data. Folders appear at once, by rename.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use anyhow::Context;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{config::MaskStage, model::ModelShape, optimizer::Optimizer};

/// Ids that training and the exported configuration need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vocabulary {
    /// Number of tokens.
    pub size: usize,
    /// End of sequence.
    pub end: u32,
    /// The mask.
    pub mask: u32,
    /// Before the prefix in prefix-suffix-middle order.
    pub prefix: u32,
    /// Before the suffix.
    pub suffix: u32,
    /// Before the middle.
    pub middle: u32,
}

impl Vocabulary {
    /// The order of special tokens of our own tokenizers: end, mask, prefix, suffix, middle.
    pub fn standard(size: usize) -> Vocabulary {
        Vocabulary { size, end: 0, mask: 1, prefix: 2, suffix: 3, middle: 4 }
    }
}

/// Where training stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// Documents drawn so far; with the seed it determines what comes next.
    pub documents: u64,
    /// Text tokens seen.
    pub tokens: u64,
    /// Updates made by the optimiser.
    pub updates: u64,
    /// Digest of the configuration, see [`digest`].
    pub config: String,
}

/// Files that belong to a tokenizer; those present are copied.
const TOKENIZER_FILES: [&str; 2] = ["tokenizer.json", "tokenizer_config.json"];

/// Digest of everything in the configuration that decides the numbers of a run; `own` are the stage's own settings and those of
/// its data.
pub fn digest(stage: &MaskStage, own: &impl Serialize) -> String {
    use sha2::{Digest, Sha256};
    let mut raw = stage.raw.clone();
    raw.out = PathBuf::new();
    raw.threads = 0;
    raw.eval = crate::config::RawEval::default();
    raw.checkpoint = crate::config::RawCheckpoint::default();
    raw.decode = crate::config::RawDecode::default();
    let text = serde_json::to_string(&(raw, own)).unwrap_or_default();
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Weight types of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// 32 bits.
    F32,
    /// 16 bits, rounded to nearest even.
    Bf16,
}

/// What a model folder is made from.
pub struct Export<'a> {
    /// Sizes.
    pub shape: &'a ModelShape,
    /// Token ids.
    pub vocabulary: &'a Vocabulary,
    /// Trained block sizes.
    pub block_sizes: &'a [usize],
    /// Whether it has learnt to change visible tokens.
    pub edits: bool,
    /// Decode defaults.
    pub decode: &'a crate::config::RawDecode,
    /// Folder with the tokenizer's files.
    pub tokenizer: &'a Path,
}

impl Export<'_> {
    /// The folder's `config.json`: of our own family, or of Qwen3's (which has the same layers) where there are no blocks.
    pub fn config(&self, dtype: WeightType) -> serde_json::Value {
        let Export { shape, vocabulary, decode, .. } = self;
        let policy = if decode.self_speculative { "self_speculative" } else { "threshold" };
        let mut config = serde_json::json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads.heads,
            "num_key_value_heads": shape.heads.kv_heads,
            "head_dim": shape.heads.head_dim,
            "vocab_size": shape.vocabulary,
            "rms_norm_eps": decimal(shape.eps),
            "rope_theta": shape.theta,
            "max_position_embeddings": shape.positions,
            "tie_word_embeddings": true,
            "torch_dtype": match dtype { WeightType::F32 => "float32", WeightType::Bf16 => "bfloat16" },
            "eos_token_id": [vocabulary.end],
            "pad_token_id": vocabulary.end
        });
        let more = if self.block_sizes.is_empty() {
            serde_json::json!({ "hidden_act": "silu" })
        } else {
            serde_json::json!({
                "architectures": ["UnmaskForBlockDiffusion"],
                "model_type": "unmask",
                "block_sizes": self.block_sizes,
                "kept_reach": "causal",
                "open_reach": "block",
                "shift": false,
                "mask_token_id": vocabulary.mask,
                "infill": { "prefix": vocabulary.prefix, "suffix": vocabulary.suffix, "middle": vocabulary.middle },
                "heal": decode.heal,
                "edit": if self.edits { "balanced" } else { "none" },
                "decode": {
                    "block_size": decode.block_size,
                    "policy": { policy: { "tau": decode.tau } },
                    "max_tokens": decode.max_tokens,
                    "temperature": 0.0
                }
            })
        };
        if let (Some(config), serde_json::Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        config
    }

    /// Writes a model folder; an existing one is replaced.
    ///
    /// # Errors
    /// When a file cannot be written or read.
    pub fn write(&self, weights: &[Vec<f32>], dtype: WeightType, dir: &Path) -> anyhow::Result<()> {
        atomically(dir, |dir| self.fill(weights, dtype, dir))
    }

    fn fill(&self, weights: &[Vec<f32>], dtype: WeightType, dir: &Path) -> anyhow::Result<()> {
        write_tensors(self.shape, &[("", weights)], dtype, &dir.join("model.safetensors"))?;
        let config = serde_json::to_string_pretty(&self.config(dtype))?;
        std::fs::write(dir.join("config.json"), config + "\n").context("config.json")?;
        for name in TOKENIZER_FILES {
            let from = self.tokenizer.join(name);
            if from.exists() {
                std::fs::copy(&from, dir.join(name)).with_context(|| format!("copying {}", from.display()))?;
            }
        }
        Ok(())
    }
}

/// The shortest decimal of an f32 as an f64, so that 1e-6 is written as 1e-6.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// Lets `fill` write into a temporary folder beside `dir` and renames it into place; what was there is deleted.
///
/// # Errors
/// `fill` fails, or the folder cannot be made or renamed.
pub fn atomically(dir: &Path, fill: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let temporary = tempfile::Builder::new().prefix(".writing-").tempdir_in(parent)?;
    fill(temporary.path())?;
    if dir.exists() {
        let old = tempfile::Builder::new().prefix(".replaced-").tempdir_in(parent)?;
        std::fs::rename(dir, old.path().join("old"))?;
    }
    let made = temporary.keep();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o755))?;
    }
    std::fs::rename(&made, dir).with_context(|| format!("renaming to {}", dir.display()))
}

/// Writes sets of flat weights as named tensors, each name with its set's prefix.
fn write_tensors(
    shape: &ModelShape,
    sets: &[(&str, &[Vec<f32>])],
    dtype: WeightType,
    file: &Path,
) -> anyhow::Result<()> {
    let mut data = Vec::new();
    for (prefix, weights) in sets {
        for segment in shape.segments() {
            let values = &weights[segment.parameter][segment.range()];
            let bytes: Vec<u8> = match dtype {
                WeightType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                WeightType::Bf16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
            };
            data.push((format!("{prefix}{}", segment.name), segment.shape(), bytes));
        }
    }
    let dtype = match dtype {
        WeightType::F32 => Dtype::F32,
        WeightType::Bf16 => Dtype::BF16,
    };
    let views: Result<Vec<(&str, TensorView<'_>)>, _> = data
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(dtype, shape.clone(), bytes)?)))
        .collect();
    let views: Vec<(&str, TensorView<'_>)> = views.map_err(|e: safetensors::SafeTensorError| anyhow::anyhow!(e))?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), file).with_context(|| format!("writing {}", file.display()))
}

/// Reads flat weights; every tensor must be there with the right shape, as f32 or bf16.
fn read_tensors(shape: &ModelShape, prefix: &str, file: &Path) -> anyhow::Result<Vec<Vec<f32>>> {
    let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("reading {}", file.display()))?;
    let mut flat: Vec<Vec<f32>> = shape.parameter_sizes().into_iter().map(|size| vec![0.0; size]).collect();
    for segment in shape.segments() {
        let name = format!("{prefix}{}", segment.name);
        let view = tensors.tensor(&name).with_context(|| format!("{name} in {}", file.display()))?;
        let (found, wanted) = (view.shape(), segment.shape());
        anyhow::ensure!(found == wanted, "{name} in {}: shape {found:?}, wanted {wanted:?}", file.display());
        let out = &mut flat[segment.parameter][segment.range()];
        match view.dtype() {
            Dtype::F32 => {
                for (out, b) in out.iter_mut().zip(view.data().as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*b);
                }
            }
            Dtype::BF16 => {
                for (out, b) in out.iter_mut().zip(view.data().as_chunks::<2>().0) {
                    *out = half::bf16::from_le_bytes(*b).to_f32();
                }
            }
            other => anyhow::bail!("{name} in {}: {other:?} is neither F32 nor BF16", file.display()),
        }
    }
    Ok(flat)
}

/// Sizes of a model folder that one of the stages wrote.
///
/// # Errors
/// When `config.json` is missing or lacks a key.
pub fn read_shape(dir: &Path) -> anyhow::Result<ModelShape> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: Sizes = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(ModelShape {
        hidden: config.hidden_size,
        inner: config.intermediate_size,
        layers: config.num_hidden_layers,
        heads: crate::ops::Heads {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        },
        vocabulary: config.vocab_size,
        eps: config.rms_norm_eps,
        theta: config.rope_theta,
        positions: config.max_position_embeddings,
    })
}

/// The keys of `config.json` that [`read_shape`] needs.
#[derive(Deserialize)]
struct Sizes {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    rms_norm_eps: f32,
    rope_theta: f64,
    max_position_embeddings: usize,
}

/// Weights of a model folder.
///
/// # Errors
/// When a tensor is missing or has another shape.
pub fn read_weights(shape: &ModelShape, dir: &Path) -> anyhow::Result<Vec<Vec<f32>>> {
    read_tensors(shape, "", &dir.join("model.safetensors"))
}

/// Folder of the checkpoint after `step` steps.
pub fn folder(out: &Path, step: usize) -> PathBuf {
    out.join(format!("step-{step}"))
}

/// Writes `step-N` and deletes all but the newest `keep` checkpoints.
///
/// # Errors
/// When a file cannot be written.
pub fn save(
    out: &Path,
    keep: usize,
    export: &Export<'_>,
    optimizer: &Optimizer,
    state: &State,
) -> anyhow::Result<PathBuf> {
    let dir = folder(out, state.step);
    atomically(&dir, |dir| {
        export.fill(&optimizer.weights, WeightType::F32, dir)?;
        let mut sets = vec![("first.", optimizer.first.as_slice()), ("second.", optimizer.second.as_slice())];
        if let Some(average) = &optimizer.average {
            sets.push(("average.", average.as_slice()));
        }
        write_tensors(export.shape, &sets, WeightType::F32, &dir.join("optimizer.safetensors"))?;
        std::fs::write(dir.join("state.json"), serde_json::to_string_pretty(state)? + "\n").context("state.json")
    })?;
    let mut all = steps(out)?;
    all.sort_unstable();
    for step in all.iter().rev().skip(keep.max(1)) {
        std::fs::remove_dir_all(folder(out, *step))?;
    }
    Ok(dir)
}

fn steps(out: &Path) -> anyhow::Result<Vec<usize>> {
    if !out.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(out)? {
        let name = entry?.file_name();
        let step = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse::<usize>().ok());
        found.extend(step);
    }
    Ok(found)
}

/// Whose run a folder is, before it has a checkpoint: orders and answers that are found in it are this run's.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    /// Digest of the configuration, see [`digest`].
    config: String,
}

/// Makes `out` the folder of a run.
fn begin(out: &Path, config: &str) -> anyhow::Result<()> {
    let path = out.join("run.json");
    if path.exists() {
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let run: Run = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        return ensure_same(out, &run.config, config);
    }
    std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    let run = Run { config: config.to_owned() };
    std::fs::write(&path, serde_json::to_string_pretty(&run)? + "\n").with_context(|| path.display().to_string())
}

fn ensure_same(dir: &Path, found: &str, config: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        found == config,
        "{} was made with another configuration, of the stage or of its data, or by another version: use another `out`, \
         or start from a checkpoint with `init.checkpoint`",
        dir.display()
    );
    Ok(())
}

/// The newest checkpoint in `out`, if any: its state, with weights and moments put into `optimizer`.
///
/// # Errors
/// When it is of another configuration, or damaged.
pub fn resume(
    out: &Path,
    shape: &ModelShape,
    config: &str,
    optimizer: &mut Optimizer,
) -> anyhow::Result<Option<State>> {
    begin(out, config)?;
    let Some(step) = steps(out)?.into_iter().max() else { return Ok(None) };
    let dir = folder(out, step);
    let text = std::fs::read_to_string(dir.join("state.json")).with_context(|| format!("{}", dir.display()))?;
    let state: State = serde_json::from_str(&text).with_context(|| format!("{}/state.json", dir.display()))?;
    ensure_same(&dir, &state.config, config)?;
    let moments = dir.join("optimizer.safetensors");
    optimizer.weights = read_weights(shape, &dir)?;
    optimizer.first = read_tensors(shape, "first.", &moments)?;
    optimizer.second = read_tensors(shape, "second.", &moments)?;
    if optimizer.average.is_some() {
        optimizer.average = Some(read_tensors(shape, "average.", &moments)?);
    }
    optimizer.updates = state.updates;
    Ok(Some(state))
}
