//! A checkpoint's configuration: family defaults, then its files, then the user's overrides; each value with its origin.

use super::json::{Reader, ids, read_object};
use super::moe::Moe;
use super::tokens::{Tokens, VOCABULARY_MIN, eos_ids, infill};
use super::{Family, LoadError, Reach};
use crate::policy::{Comparison, Policy};
use crate::request::POSITIONS_MAX;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::Path;
use unmask_kernels::HeadShape;

/// Largest value a size in a config may have.
const SIZE_MAX: u64 = 1 << 24;
/// Largest head the kernels take.
const HEAD_DIM_MAX: u64 = 256;
/// Block sizes of models that were trained for none.
const ANY_BLOCK_SIZES: [u32; 9] = [4, 8, 16, 32, 64, 128, 256, 512, 1024];
/// Keys of our own checkpoints; any other is an error there.
const OWN_KEYS: [&str; 27] = [
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
    "heal",
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
    /// Name of the family, where the config names another.
    pub family: Option<String>,
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
    /// Width of the feed-forward part of dense layers.
    pub ffn: u32,
    /// Experts, where layers have them.
    pub moe: Option<Moe>,
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
    /// Leading elements of a head that rotate.
    pub rotary_dim: u32,
    /// Whether heads of q and k are normalised.
    pub qk_norm: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Most positions, at most [`POSITIONS_MAX`].
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
    /// Whether the last word of a text prompt is left to the model to spell ([`crate::opening`]).
    pub heal: bool,
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
        let family = match &overrides.family {
            Some(name) => Family::named(name).ok_or_else(|| {
                let names = Family::names();
                LoadError::config(&path, vec![format!("the override of family: {name} is unknown; known: {names}")])
            })?,
            None => Family::find(architecture, model_type).ok_or_else(|| LoadError::Architecture {
                path: path.clone(),
                found: architecture.or(model_type).unwrap_or("(none named)").to_owned(),
                known: Family::known(),
            })?,
        };
        let mut reader = Reader::new(&object, family.keys);
        reader.note("architecture", architecture.unwrap_or(family.name()), "config.json");
        let named_by = if overrides.family.is_some() { "override" } else { "config.json" };
        reader.note("family", family.name(), named_by);
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

    /// Whether masks can draft what causal rows then decide.
    pub fn can_speculate(&self) -> bool {
        self.can_autoregress() && self.can_diffuse() && self.open_reach == Reach::Block && !self.shift
    }

    /// Whether masks can be filled between what stands before and behind them.
    pub fn fills_between(&self) -> bool {
        self.can_diffuse() && self.open_reach == Reach::Bidirectional
    }

    /// Whether block diffusion policies are sound.
    pub fn can_diffuse(&self) -> bool {
        self.family.diffuses() && self.mask_id.is_some()
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
    let vocab_rows = r.count("vocab_size", VOCABULARY_MIN, SIZE_MAX, None) as u32;
    let (rope_theta, rotary_dim) = rotary(r, heads.head_dim);
    let eps = r.value("rms_norm_eps");
    let rms_eps = r.number("rms_norm_eps", eps) as f32;
    let context_length = context_length(r);
    let tokenizer_size = tokenizer.usable(r, vocab_rows);
    let mask_id = tokenizer.mask_id(r, family, overrides, vocab_rows);
    let block_sizes = block_sizes(r, family, overrides);
    let eos_ids = eos_ids(r, generation, vocab_rows);
    let qkv_bias = qkv_bias(r, family);
    r.note("qk_norm", family.qk_norm, "family default");
    r.note("open_reach", family.open_reach.name(), "family default");
    r.note("kept_reach", family.kept_reach.name(), "family default");
    r.note("shift", family.shift, "family default");
    let infill = infill(r, vocab_rows);
    let heal = r.own("heal").unwrap_or(false);
    let edit = edit(r);
    let decode = decode_defaults(r, family, &block_sizes);
    let layers = r.count("num_hidden_layers", 1, 1024, None) as u32;
    let moe = Moe::read(r, family, layers);
    ModelConfig {
        name: name(r, dir),
        architecture: r.object.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or("").into(),
        family,
        layers,
        hidden,
        ffn: r.count("intermediate_size", 1, SIZE_MAX, None) as u32,
        moe,
        heads,
        vocab_rows,
        tokenizer_size,
        rms_eps,
        rope_theta,
        rotary_dim,
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
        heal,
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
        r.problem(format!("{} must be silu: other activations are not implemented", r.name("hidden_act")));
    }
    if r.value("use_sliding_window") == Some(&Value::Bool(true)) {
        r.problem("use_sliding_window: sliding windows are not implemented");
    }
    let layer_types = r.value("layer_types").and_then(Value::as_array);
    if layer_types.is_some_and(|types| types.iter().any(|kind| kind != "full_attention")) {
        r.problem("layer_types: only full_attention is implemented");
    }
    if r.value("mlp_bias") == Some(&Value::Bool(true)) {
        r.problem("mlp_bias: biases of the feed-forward part are not implemented");
    }
    for &(key, only) in family.fixed {
        let only_value: Option<Value> = serde_json::from_str(only).ok();
        if r.value(key).is_some_and(|value| Some(value) != only_value.as_ref()) {
            r.problem(format!("{key} must be {only}: anything else is not implemented"));
        }
    }
    if family.name() == "unmask" {
        refuse_what_own_checkpoints_lack(r, family);
    }
}

/// Our own format is closed: a key we do not know is a mistake, and facts of the family can only be repeated.
fn refuse_what_own_checkpoints_lack(r: &mut Reader<'_>, family: Family) {
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
    if r.value("shift").is_some_and(|shift| shift != family.shift) {
        r.problem(format!("shift must be {}", family.shift));
    }
}

/// Base of the angles and number of rotating elements, in the older spelling (top level) or the newer one
/// (`rope_parameters`). Anything that would scale the angles is refused.
fn rotary(r: &mut Reader<'_>, head_dim: usize) -> (f64, u32) {
    let mut nested = None;
    for key in ["rope_parameters", "rope_scaling"] {
        match r.value(key) {
            Some(Value::Object(object)) => {
                for (name, value) in object {
                    match name.as_str() {
                        "rope_theta" | "partial_rotary_factor" => {}
                        "rope_type" | "type" if value == "default" => {}
                        _ => r.problem(format!("{key}.{name}: scaled rotary angles are not implemented")),
                    }
                }
                nested = nested.or(Some(object));
            }
            Some(_) => r.problem(format!("{key} must be an object or null")),
            None => {}
        }
    }
    let either = |key: &str| r.value(key).or_else(|| nested?.get(key).filter(|value| !value.is_null()));
    let (theta, factor) = (either("rope_theta"), either("partial_rotary_factor"));
    let theta = r.number("rope_theta", theta);
    let factor = factor.map_or(1.0, |factor| r.number("partial_rotary_factor", Some(factor)));
    let rotary_dim = (head_dim as f64 * factor) as u32;
    if factor > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let needs = "must leave an even number of rotating elements, at most head_dim";
        r.problem(format!("partial_rotary_factor {needs}: {factor} of {head_dim} are {rotary_dim}"));
    }
    (theta, rotary_dim)
}

/// Longer contexts than any request may have would only cost tables.
fn context_length(r: &mut Reader<'_>) -> u32 {
    let positions = r.count("max_position_embeddings", 1, SIZE_MAX, None) as u32;
    if positions > POSITIONS_MAX {
        r.note("context_length", POSITIONS_MAX, "limit of this program");
    }
    positions.min(POSITIONS_MAX)
}

fn qkv_bias(r: &mut Reader<'_>, family: Family) -> bool {
    if family.qkv_bias {
        r.note("qkv_bias", true, "family default");
        return true;
    }
    r.flag("attention_bias", false)
}

fn edit(r: &mut Reader<'_>) -> bool {
    match r.value("edit") {
        None => false,
        Some(Value::String(kind)) => {
            r.note("edit", kind, "config.json");
            kind != "none"
        }
        Some(value) => {
            r.problem(format!("edit must be a kind of edits, or \"none\", is {value}"));
            false
        }
    }
}

fn head_shape(r: &mut Reader<'_>, hidden: u64) -> HeadShape {
    let heads = r.count("num_attention_heads", 1, 4096, None);
    let kv_heads = r.count("num_key_value_heads", 1, 4096, Some((heads, "family default")));
    if !heads.is_multiple_of(kv_heads) {
        r.problem(format!("num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"));
    }
    let sizes_known = r.value("hidden_size").is_some() && r.value("num_attention_heads").is_some();
    if r.value("head_dim").is_none() && sizes_known && !hidden.is_multiple_of(heads) {
        r.problem(format!("head_dim is missing, and hidden_size ({hidden}) is no multiple of the {heads} heads"));
    }
    // Where a size is missing, that is the problem to report, not what follows from it.
    let shared = if sizes_known { hidden / heads } else { 2 };
    let head_dim = r.count("head_dim", 2, HEAD_DIM_MAX, Some((shared, "family default")));
    if head_dim == 0 || head_dim > HEAD_DIM_MAX || !head_dim.is_multiple_of(2) {
        r.problem(format!("head_dim must be even and at most {HEAD_DIM_MAX}, is {head_dim}"));
    }
    HeadShape { heads: heads as usize, kv_heads: kv_heads as usize, head_dim: head_dim as usize }
}

fn block_sizes(r: &mut Reader<'_>, family: Family, overrides: &Overrides) -> Vec<u32> {
    if !family.diffuses() {
        if overrides.block_size.is_some() {
            r.problem(format!("the override of block_size: {} models decode one position at a time", family.name()));
        }
        return Vec::new();
    }
    let own = r.value("block_sizes").or_else(|| r.value("block_size")).or_else(|| r.value("block_length"));
    let (mut sizes, origin) = match (overrides.block_size, own.map(ids)) {
        (Some(size), _) => (vec![size], "override"),
        (None, Some(Some(sizes))) => (sizes, "config.json"),
        (None, Some(None)) => (Vec::new(), "config.json"),
        // What reads everything at once was trained for no size.
        (None, None) if family.open_reach == Reach::Bidirectional => (ANY_BLOCK_SIZES.to_vec(), "family default"),
        (None, None) => (vec![family.block_size], "family default"),
    };
    sizes.sort_unstable();
    sizes.dedup();
    let most = family.open_reach.block_size_max();
    if sizes.is_empty() || sizes[0] == 0 || sizes.iter().any(|&size| size > most) {
        r.problem(format!("block_sizes must be whole numbers from 1 to {most}"));
    }
    r.note("block_sizes", format!("{sizes:?}"), origin);
    sizes
}

fn decode_defaults(r: &mut Reader<'_>, family: Family, block_sizes: &[u32]) -> DecodeDefaults {
    let stated: Option<DecodeDefaults> = r.own("decode");
    if let Some(decode) = stated {
        let size = decode.block_size;
        if !block_sizes.contains(&size) {
            r.problem(format!("decode.block_size {size} is none of block_sizes {block_sizes:?}"));
        }
        for invalid in decode.policy.violations(size.max(1)) {
            r.problem(format!("decode.{invalid}"));
        }
        if !(decode.temperature >= 0.0 && decode.temperature.is_finite()) {
            r.problem(format!("decode.temperature must be 0 or more, is {}", decode.temperature));
        }
        if decode.max_tokens == 0 {
            r.problem("decode.max_tokens must be at least 1");
        }
        return decode;
    }
    let policy = if block_sizes.is_empty() {
        Policy::Autoregressive
    } else {
        Policy::Threshold { tau: 0.9, comparison: Comparison::Strict, quota_steps: None }
    };
    let first = block_sizes.first().copied().unwrap_or(1);
    let decode = DecodeDefaults {
        block_size: [family.block_size].into_iter().find(|size| block_sizes.contains(size)).unwrap_or(first),
        policy,
        max_tokens: 256,
        temperature: 0.0,
    };
    r.note("decode", format!("{policy:?}, block size {}", decode.block_size), "family default");
    decode
}
