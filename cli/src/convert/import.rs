//! A GGUF file becomes a model folder.

use super::gguf::{Gguf, Value as Stored};
use super::names::{self, Order};
use super::tensors::{Target, Tensor, write_safetensors};
use super::vocabulary::{self, Vocabulary};
use super::{Summary, decimal, progress, write_json};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::path::Path;
use unmask_engine::model::weights::Weights;
use unmask_engine::model::{ModelConfig, Overrides};
use unmask_text::Tokenizer;

/// Architectures that are read: `general.architecture`, `architectures[0]`.
const ARCHITECTURES: [(&str, &str); 3] =
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")];
/// Base of the rotary angles where a file names none, as in llama.cpp.
const ROPE_BASE: f64 = 10000.0;
/// Most problems listed in one error.
const PROBLEMS_MAX: usize = 20;

/// Writes the model of `file` into the empty folder `dir`, and checks that it loads.
///
/// # Errors
/// The file is malformed, or of a kind that is not read; a file cannot be written.
pub fn import(file: &[u8], target: Option<Target>, dir: &Path) -> anyhow::Result<Summary> {
    let gguf = Gguf::parse(file)?;
    let facts = Facts::read(&gguf)?;
    let vocabulary = vocabulary::read(&gguf)?;
    let tensors = planned(&gguf, &facts, target)?;
    let embedding = tensors.iter().find(|tensor| tensor.name == "model.embed_tokens.weight");
    let dtype = embedding.map_or(Target::Bf16, |tensor| tensor.target);
    write_json(&dir.join("config.json"), &facts.config(&vocabulary, dtype))?;
    let mut generation = json!({ "eos_token_id": vocabulary.ends, "do_sample": false });
    if let Some(pad) = vocabulary.pad {
        generation["pad_token_id"] = pad.into();
    }
    write_json(&dir.join("generation_config.json"), &generation)?;
    write_json(&dir.join("tokenizer_config.json"), &vocabulary.config)?;
    std::fs::write(dir.join("tokenizer.json"), &vocabulary.tokenizer).context("tokenizer.json")?;
    // What the loaders refuse is refused before any weight is written.
    let config = ModelConfig::load(dir, &Overrides::default())?;
    let roles = vocabulary.config.to_string();
    let tokenizer = Tokenizer::from_files(vocabulary.tokenizer.as_bytes(), Some(roles.as_bytes()), None)?;
    let (tokens, rows) = (tokenizer.vocab_size(), config.vocab_rows);
    ensure!(tokens <= rows, "the tokenizer has {tokens} tokens, token_embd.weight only {rows} rows");
    let bar = progress(&tensors)?;
    write_safetensors(&tensors, &dir.join("model.safetensors"), &bar)?;
    bar.finish_and_clear();
    Weights::open(dir)?.check(&config)?;
    Ok(Summary::new(&config.architecture, &tensors))
}

/// What `config.json` needs to know.
struct Facts {
    architecture: &'static str,
    model_type: &'static str,
    layers: u64,
    hidden: u64,
    ffn: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    vocab_rows: u64,
    eps: f64,
    rope_base: f64,
    context: u64,
    tied: bool,
    biased: bool,
}

impl Facts {
    fn read(gguf: &Gguf<'_>) -> anyhow::Result<Facts> {
        let named = gguf.text("general.architecture").unwrap_or("none");
        let known = ARCHITECTURES.iter().find(|(name, _)| *name == named);
        let (model_type, architecture) = known.copied().with_context(|| {
            let known = ARCHITECTURES.map(|(name, _)| name).join(", ");
            format!("general.architecture {named:?} is not read; {known} are")
        })?;
        let mut keys = Keys { gguf, prefix: model_type, problems: Vec::new() };
        keys.refuse_what_is_not_implemented();
        let hidden = keys.whole("embedding_length");
        let heads = keys.whole("attention.head_count");
        let head_dim = keys.whole_or("attention.key_length", hidden.checked_div(heads).unwrap_or(0));
        for key in ["attention.value_length", "rope.dimension_count"] {
            let size = keys.whole_or(key, head_dim);
            if size != head_dim {
                keys.problem(format!("{key} {size} is not the {head_dim} of a head: that is not implemented"));
            }
        }
        let tensors = gguf.tensors();
        let vocab_rows = tensors.get("token_embd.weight").map_or(0, |stored| stored.shape[0] as u64);
        let facts = Facts {
            architecture,
            model_type,
            layers: keys.whole("block_count"),
            hidden,
            ffn: keys.whole("feed_forward_length"),
            heads,
            kv_heads: keys.whole_or("attention.head_count_kv", heads),
            head_dim,
            vocab_rows,
            eps: keys.number("attention.layer_norm_rms_epsilon", None),
            rope_base: keys.number("rope.freq_base", Some(ROPE_BASE)),
            context: keys.whole("context_length"),
            tied: !tensors.contains_key("output.weight"),
            biased: tensors.contains_key("blk.0.attn_q.bias"),
        };
        let problems = keys.problems;
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(facts)
    }

    fn config(&self, vocabulary: &Vocabulary, dtype: Target) -> Value {
        let mut config = json!({
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_rows,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_base,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
            "torch_dtype": dtype.name(),
            "eos_token_id": vocabulary.ends,
        });
        if self.biased && self.model_type != "qwen2" {
            config["attention_bias"] = true.into();
        }
        config
    }
}

/// Reads keys of one architecture, collecting everything that is wrong.
struct Keys<'a> {
    gguf: &'a Gguf<'a>,
    prefix: &'static str,
    problems: Vec<String>,
}

impl Keys<'_> {
    fn value(&self, key: &str) -> Option<Stored<'_>> {
        self.gguf.value(&format!("{}.{key}", self.prefix))
    }

    fn problem(&mut self, problem: String) {
        self.problems.push(format!("{}.{problem}", self.prefix));
    }

    fn whole(&mut self, key: &str) -> u64 {
        match self.gguf.whole(&format!("{}.{key}", self.prefix)) {
            Some(value) => value,
            None => {
                self.problem(format!("{key} must be there, as a whole number"));
                0
            }
        }
    }

    fn whole_or(&mut self, key: &str, default: u64) -> u64 {
        if self.value(key).is_none() { default } else { self.whole(key) }
    }

    fn number(&mut self, key: &str, default: Option<f64>) -> f64 {
        match (self.value(key), default) {
            // The shortest decimal of what was an f32: 1e-5, not 9.999999747378752e-6.
            (Some(Stored::Float(value)), _) if value.is_finite() => decimal(value as f32),
            (None, Some(default)) => default,
            _ => {
                self.problem(format!("{key} must be there, as a number"));
                0.0
            }
        }
    }

    /// Mathematics that this program does not do must not be ignored.
    fn refuse_what_is_not_implemented(&mut self) {
        let scaling = self.value("rope.scaling.type");
        if scaling.is_some_and(|kind| kind != Stored::Text("none")) {
            self.problem("rope.scaling.type: scaled rotary angles are not implemented".into());
        }
        if matches!(self.value("rope.scale_linear"), Some(Stored::Float(scale)) if scale != 1.0) {
            self.problem("rope.scale_linear: scaled rotary angles are not implemented".into());
        }
        if self.whole_or("expert_count", 0) != 0 {
            self.problem("expert_count: mixtures of experts are not read from GGUF files".into());
        }
        if self.whole_or("attention.sliding_window", 0) != 0 {
            self.problem("attention.sliding_window: sliding windows are not implemented".into());
        }
        if self.value("attention.causal") == Some(Stored::Bool(false)) {
            self.problem("attention.causal is false: only causal models are read from GGUF files".into());
        }
        if self.gguf.whole("split.count").is_some_and(|files| files > 1) {
            let files = "split.count: join the files first (llama-gguf-split --merge)";
            self.problems.push(files.into());
        }
    }
}

/// Every tensor of the file, under its name in safetensors.
fn planned<'a>(gguf: &Gguf<'a>, facts: &Facts, target: Option<Target>) -> anyhow::Result<Vec<Tensor<'a>>> {
    let mut unknown = Vec::new();
    let mut tensors = Vec::new();
    for (name, stored) in gguf.tensors() {
        let Some(renamed) = names::to_safetensors(name) else {
            unknown.push(*name);
            continue;
        };
        let rotated = facts.model_type == "llama" && names::is_rotated(name);
        let order = if rotated { Order::ToHalves { head_dim: facts.head_dim as usize } } else { Order::Same };
        // Norms and biases are small and stay as they are.
        let target = target.filter(|_| stored.shape.len() > 1).unwrap_or_else(|| Target::of(stored.kind));
        let shape = stored.shape.clone();
        tensors.push(Tensor { name: renamed, shape, kind: stored.kind, bytes: stored.bytes, order, target });
    }
    let more = unknown.len().saturating_sub(PROBLEMS_MAX);
    unknown.truncate(PROBLEMS_MAX);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let list = unknown.join(", ");
    ensure!(unknown.is_empty(), "no {} model that is read has the tensors {list}{more}", facts.model_type);
    ensure!(tensors.iter().any(|t| t.name == "model.embed_tokens.weight"), "tensor token_embd.weight is missing");
    Ok(tensors)
}
