//! A checkpoint's configuration: family defaults, then its files, then the user's overrides; each value with its origin.

use super::json::{Reader, ids, read_object};
use super::{Family, LoadError, Reach};
use crate::policy::{Comparison, Policy};
use crate::request::BLOCK_SIZE_MAX;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::Path;
use unmask_kernels::HeadShape;

/// Largest value a size in a config may have.
const SIZE_MAX: u64 = 1 << 24;
/// Keys of our own checkpoints; any other is an error there.
const OWN_KEYS: [&str; 26] = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
    "torch_dtype",
    "block_sizes",
    "kept_reach",
    "open_reach",
    "shift",
    "mask_token_id",
    "eos_token_id",
    "pad_token_id",
    "infill",
    "edit",
    "decode",
    "trained_stages",
    "name",
];

/// A resolved value, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// As text.
    pub value: String,
    /// "config.json", "generation_config.json", "tokenizer", "family default" or "override".
    pub origin: &'static str,
}

/// What the user says instead of the files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Id of the mask token.
    pub mask_id: Option<u32>,
    /// Default block size.
    pub block_size: Option<u32>,
}

/// Sentinels of prefix-suffix-middle order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Infill {
    /// Before the text in front of the gap.
    pub prefix: u32,
    /// Before the text behind the gap.
    pub suffix: u32,
    /// Before the text that fills the gap.
    pub middle: u32,
}

/// How a model decodes unless told otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecodeDefaults {
    /// Positions decoded together.
    pub block_size: u32,
    /// Which of them to fill.
    pub policy: Policy,
    /// Tokens to generate.
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
}

/// Everything about a model but its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Name of the folder, or `name` in our own configs.
    pub name: String,
    /// As the config names it.
    pub architecture: String,
    /// Its facts.
    pub family: Family,
    /// Decoder layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward part.
    pub ffn: u32,
    /// Heads.
    pub heads: HeadShape,
    /// Rows of embedding and head.
    pub vocab_rows: u32,
    /// Ids the tokenizer knows, at most `vocab_rows`; rows past it never win.
    pub tokenizer_size: u32,
    /// Of every norm.
    pub rms_eps: f32,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Whether heads of q and k are normalised.
    pub qk_norm: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Most positions.
    pub context_length: u32,
    /// Block sizes the model was trained for, ascending; empty for autoregressive models.
    pub block_sizes: Vec<u32>,
    /// Reach of rows of the open block.
    pub open_reach: Reach,
    /// Reach of rows of prompt and finished blocks.
    pub kept_reach: Reach,
    /// Row i scores position i + 1.
    pub shift: bool,
    /// The mask token.
    pub mask_id: Option<u32>,
    /// Tokens that end an output.
    pub eos_ids: Vec<u32>,
    /// When trained for it.
    pub infill: Option<Infill>,
    /// Whether trained to edit.
    pub edit: bool,
    /// Decoding unless told otherwise.
    pub decode: DecodeDefaults,
    /// Every value with its origin.
    pub entries: Vec<Entry>,
}

impl ModelConfig {
    /// Resolves the configuration of the checkpoint in `dir`.
    ///
    /// # Errors
    /// Missing or malformed files; an unknown architecture; all missing keys and unusable values at once.
    pub fn load(dir: &Path, overrides: &Overrides) -> Result<ModelConfig, LoadError> {
        let path = dir.join("config.json");
        let object = read_object(&path)?.ok_or_else(|| LoadError::File {
            path: path.clone(),
            error: std::io::Error::new(std::io::ErrorKind::NotFound, "no such file: a model folder needs it"),
        })?;
        let generation = read_object(&dir.join("generation_config.json"))?.unwrap_or_default();
        let tokenizer = Tokens::read(dir)?;
        let architecture = object.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let model_type = object.get("model_type").and_then(Value::as_str);
        let family = Family::find(architecture, model_type).ok_or_else(|| LoadError::Architecture {
            path: path.clone(),
            found: architecture.or(model_type).unwrap_or("(none named)").to_owned(),
            known: Family::known(),
        })?;
        let mut reader = Reader::new(&object);
        reader.note("architecture", architecture.unwrap_or(family.name()), "config.json");
        let config = resolve(&mut reader, dir, family, &generation, &tokenizer, overrides);
        if reader.problems.is_empty() {
            Ok(ModelConfig { entries: reader.entries, ..config })
        } else {
            Err(LoadError::Config { path, problems: reader.problems })
        }
    }

    /// Whether the autoregressive policy is sound: next-token rows were trained.
    pub fn can_autoregress(&self) -> bool {
        self.kept_reach == Reach::Causal
    }

    /// Whether block diffusion policies are sound.
    pub fn can_diffuse(&self) -> bool {
        self.family.diffuses() && self.mask_id.is_some() && !self.shift && self.open_reach != Reach::Bidirectional
    }

    /// Every value with its origin.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

fn resolve(
    r: &mut Reader<'_>,
    dir: &Path,
    family: Family,
    generation: &Map<String, Value>,
    tokenizer: &Tokens,
    overrides: &Overrides,
) -> ModelConfig {
    refuse_what_is_not_implemented(r, family);
    let hidden = r.count("hidden_size", 1, SIZE_MAX, None) as u32;
    let heads = head_shape(r, u64::from(hidden));
    let vocab_rows = r.count("vocab_size", 1, SIZE_MAX, None) as u32;
    let rope = r.value("rope_parameters").or_else(|| r.value("rope_scaling")).and_then(|p| p.get("rope_theta"));
    let rope = r.value("rope_theta").or(rope);
    let rope_theta = r.number("rope_theta", rope);
    let eps = r.value("rms_norm_eps");
    let rms_eps = r.number("rms_norm_eps", eps) as f32;
    let context_length = r.count("max_position_embeddings", 1, SIZE_MAX, None) as u32;
    let mask_id = mask_id(r, family, tokenizer, overrides, vocab_rows);
    let block_sizes = block_sizes(r, family, overrides);
    let eos_ids = eos_ids(r, generation, vocab_rows);
    let qkv_bias = family.qkv_bias || r.flag("attention_bias", false);
    r.note("open_reach", family.open_reach.name(), "family default");
    r.note("kept_reach", family.kept_reach.name(), "family default");
    r.note("shift", family.shift, "family default");
    let infill = own(r, "infill");
    let decode = decode_defaults(r, &block_sizes);
    let edit = r.value("edit").is_some_and(|edit| edit != "none");
    let tokenizer_size = if tokenizer.size == 0 { vocab_rows } else { tokenizer.size.min(vocab_rows) };
    r.note("tokenizer_size", tokenizer_size, if tokenizer.size == 0 { "config.json" } else { "tokenizer" });
    ModelConfig {
        name: name(r, dir),
        architecture: r.object.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or("").into(),
        family,
        layers: r.count("num_hidden_layers", 1, 1024, None) as u32,
        hidden,
        ffn: r.count("intermediate_size", 1, SIZE_MAX, None) as u32,
        heads,
        vocab_rows,
        tokenizer_size,
        rms_eps,
        rope_theta,
        qk_norm: family.qk_norm,
        qkv_bias,
        tied: r.flag("tie_word_embeddings", false),
        context_length,
        block_sizes,
        open_reach: family.open_reach,
        kept_reach: family.kept_reach,
        shift: family.shift,
        mask_id,
        eos_ids,
        infill,
        edit,
        decode,
        entries: Vec::new(),
    }
}

fn name(r: &Reader<'_>, dir: &Path) -> String {
    let folder = || dir.canonicalize().ok().and_then(|d| d.file_name().map(|n| n.to_string_lossy().into_owned()));
    let named = r.value("name").and_then(Value::as_str).map(str::to_owned);
    named.or_else(folder).unwrap_or_else(|| "model".into())
}

/// Mathematics that this program does not do must not be ignored.
fn refuse_what_is_not_implemented(r: &mut Reader<'_>, family: Family) {
    if r.value("hidden_act").is_some_and(|act| act != "silu") {
        r.problem("hidden_act must be silu: other activations are not implemented");
    }
    let scaled = |p: &Value| p.get("rope_type").or_else(|| p.get("type")).is_some_and(|kind| kind != "default");
    if ["rope_scaling", "rope_parameters"].iter().any(|key| r.value(key).is_some_and(scaled)) {
        r.problem("rope_scaling: scaled rotary angles are not implemented");
    }
    if r.value("use_sliding_window") == Some(&Value::Bool(true)) {
        r.problem("use_sliding_window: sliding windows are not implemented");
    }
    if r.value("mlp_bias") == Some(&Value::Bool(true)) {
        r.problem("mlp_bias: biases of the feed-forward part are not implemented");
    }
    if family.name() == "unmask" {
        let unknown: Vec<&String> = r.object.keys().filter(|key| !OWN_KEYS.contains(&key.as_str())).collect();
        for key in unknown {
            r.problems.push(format!("{key} is unknown"));
        }
        for (key, reach) in [("kept_reach", family.kept_reach), ("open_reach", family.open_reach)] {
            let named = r.value(key).and_then(Value::as_str).and_then(Reach::from_name);
            if r.value(key).is_some() && named != Some(reach) {
                r.problem(format!("{key} must be {}", reach.name()));
            }
        }
    }
}

fn head_shape(r: &mut Reader<'_>, hidden: u64) -> HeadShape {
    let heads = r.count("num_attention_heads", 1, 4096, None);
    let kv_heads = r.count("num_key_value_heads", 1, 4096, Some((heads, "family default")));
    let head_dim = r.count("head_dim", 2, 256, Some((hidden / heads, "family default")));
    if heads % kv_heads != 0 {
        r.problem(format!("num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"));
    }
    if head_dim % 2 != 0 || head_dim == 0 {
        r.problem(format!("head_dim must be even, is {head_dim}"));
    }
    HeadShape { heads: heads as usize, kv_heads: kv_heads as usize, head_dim: head_dim as usize }
}

fn mask_id(
    r: &mut Reader<'_>,
    family: Family,
    tokenizer: &Tokens,
    overrides: &Overrides,
    vocab_rows: u32,
) -> Option<u32> {
    let token = family.mask_token?;
    let configured = r.value("mask_token_id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    let by_text = tokenizer.added.get(token).and_then(Value::as_u64).map(|id| id as u32);
    let (id, origin) = match (overrides.mask_id, configured, by_text) {
        (Some(id), ..) => (id, "override"),
        (_, Some(id), _) => (id, "config.json"),
        (_, _, Some(id)) => (id, "tokenizer"),
        _ => {
            r.problem(format!("mask_token_id is missing, and the tokenizer has no {token}: override it"));
            return None;
        }
    };
    if id >= vocab_rows {
        r.problem(format!("mask_token_id {id} is outside the vocabulary of {vocab_rows}"));
    }
    r.note("mask_token_id", id, origin);
    Some(id)
}

fn block_sizes(r: &mut Reader<'_>, family: Family, overrides: &Overrides) -> Vec<u32> {
    if !family.diffuses() {
        return Vec::new();
    }
    let own = r.value("block_sizes").or_else(|| r.value("block_size")).or_else(|| r.value("block_length"));
    let (mut sizes, origin) = match (overrides.block_size, own.map(ids)) {
        (Some(size), _) => (vec![size], "override"),
        (None, Some(Some(sizes))) => (sizes, "config.json"),
        (None, Some(None)) => (Vec::new(), "config.json"),
        (None, None) => (vec![family.block_size], "family default"),
    };
    sizes.sort_unstable();
    sizes.dedup();
    if sizes.is_empty() || sizes[0] == 0 || sizes.iter().any(|&size| size > BLOCK_SIZE_MAX) {
        r.problem(format!("block_sizes must be whole numbers from 1 to {BLOCK_SIZE_MAX}"));
    }
    r.note("block_sizes", format!("{sizes:?}"), origin);
    sizes
}

fn eos_ids(r: &mut Reader<'_>, generation: &Map<String, Value>, vocab_rows: u32) -> Vec<u32> {
    let listed = generation.get("eos_token_id").filter(|value| !value.is_null());
    let (value, origin) = match listed {
        Some(value) => (Some(value), "generation_config.json"),
        None => (r.value("eos_token_id"), "config.json"),
    };
    let Some(found) = value.map(ids) else {
        r.note("eos_token_id", "none", "family default");
        return Vec::new();
    };
    let found = found.unwrap_or_else(|| {
        r.problem("eos_token_id must be an id or a list of ids");
        Vec::new()
    });
    if let Some(id) = found.iter().find(|&&id| id >= vocab_rows) {
        r.problem(format!("eos_token_id {id} is outside the vocabulary of {vocab_rows}"));
    }
    r.note("eos_token_id", format!("{found:?}"), origin);
    found
}

/// An object of our own format, checked key by key.
fn own<T: serde::de::DeserializeOwned>(r: &mut Reader<'_>, key: &str) -> Option<T> {
    let value = r.value(key)?.clone();
    r.note(key, &value, "config.json");
    match serde_json::from_value(value) {
        Ok(parsed) => Some(parsed),
        Err(error) => {
            r.problem(format!("{key}: {error}"));
            None
        }
    }
}

fn decode_defaults(r: &mut Reader<'_>, block_sizes: &[u32]) -> DecodeDefaults {
    let stated: Option<DecodeDefaults> = own(r, "decode");
    if let Some(decode) = stated {
        let size = decode.block_size;
        if !block_sizes.contains(&size) {
            r.problem(format!("decode.block_size {size} is none of block_sizes {block_sizes:?}"));
        }
        for invalid in decode.policy.violations(size.max(1)) {
            r.problem(format!("decode.{invalid}"));
        }
        return decode;
    }
    let policy = if block_sizes.is_empty() {
        Policy::Autoregressive
    } else {
        Policy::Threshold { tau: 0.9, comparison: Comparison::Strict, quota_steps: None }
    };
    let decode =
        DecodeDefaults { block_size: block_sizes.first().copied().unwrap_or(1), policy, max_tokens: 256, temperature: 0.0 };
    r.note("decode", format!("{policy:?}, block size {}", decode.block_size), "family default");
    decode
}

/// What the tokenizer's files say of ids, without a tokenizer.
#[derive(Default)]
struct Tokens {
    /// Added tokens, text to id.
    added: Map<String, Value>,
    /// One past the highest id.
    size: u32,
}

impl Tokens {
    fn read(dir: &Path) -> Result<Tokens, LoadError> {
        let mut tokens = Tokens::default();
        if let Some(object) = read_object(&dir.join("tokenizer.json"))? {
            let vocab = object.get("model").and_then(|model| model.get("vocab")).and_then(Value::as_object);
            let highest = vocab.and_then(|vocab| vocab.values().filter_map(Value::as_u64).max());
            tokens.size = highest.map_or(0, |id| id as u32 + 1);
            for token in object.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
                tokens.add(token.get("content"), token.get("id"));
            }
        }
        if let Some(object) = read_object(&dir.join("tokenizer_config.json"))? {
            for (id, token) in object.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
                tokens.add(token.get("content"), id.parse::<u64>().ok().map(Value::from).as_ref());
            }
        }
        Ok(tokens)
    }

    fn add(&mut self, content: Option<&Value>, id: Option<&Value>) {
        if let (Some(content), Some(id)) = (content.and_then(Value::as_str), id.and_then(Value::as_u64)) {
            self.added.insert(content.to_owned(), id.into());
            self.size = self.size.max(id as u32 + 1);
        }
    }
}
