//! A checkpoint that decodes one token per pass becomes a plain Qwen3 folder, or a GGUF file.

use super::names::{self, Order};
use super::tensors::{Target, Tensor, write_safetensors};
use super::writer::{self, Item};
use super::{Summary, progress, vocabulary, write_json};
use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use unmask_engine::model::weights::Weights;
use unmask_engine::model::{ModelConfig, Overrides};

/// Files that a folder keeps as they are.
const KEPT_FILES: [&str; 2] = ["tokenizer.json", "chat_template.jinja"];
/// `general.file_type` of ggml, by the type of the matrices.
const FILE_TYPES: [(Target, u32); 3] = [(Target::F32, 0), (Target::F16, 1), (Target::Bf16, 32)];

/// A checkpoint to be exported.
pub struct Checkpoint {
    config: ModelConfig,
    weights: Weights,
    /// `config.json`, for what this program does not read.
    raw: Value,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`.
    ///
    /// # Errors
    /// It cannot be loaded, or its rows attend in another way than the formats' readers would have them attend.
    pub fn open(dir: &Path) -> anyhow::Result<Checkpoint> {
        let config = ModelConfig::load(dir, &Overrides::default())?;
        let name = config.family.name();
        if !config.can_autoregress() || config.shift {
            bail!(
                "{name} models are not exported: their finished rows attend {}, and what reads a Llama or Qwen3 model \
                 lets them attend causally, to other tokens",
                config.kept_reach.name()
            );
        }
        let plain = config.rotary_dim as usize == config.heads.head_dim;
        ensure!(plain, "partial_rotary_factor: models that rotate a part of a head are not exported");
        let weights = Weights::open(dir)?;
        weights.check(&config)?;
        let raw = std::fs::read(dir.join("config.json")).context("config.json")?;
        Ok(Checkpoint { config, weights, raw: serde_json::from_slice(&raw).context("config.json")? })
    }

    /// llama.cpp's name of the architecture. Our own models have Qwen3's layers.
    fn architecture(&self) -> anyhow::Result<&'static str> {
        Ok(match self.config.family.name() {
            "llama" => "llama",
            "qwen2" => "qwen2",
            "unmask" | "qwen3" => "qwen3",
            name => bail!("{name} models are not exported; llama, qwen2, qwen3 and our own are"),
        })
    }

    fn positions(&self) -> u64 {
        self.raw["max_position_embeddings"].as_u64().unwrap_or_else(|| self.config.context_length.into())
    }

    /// Writes a Qwen3 folder into the empty folder `out`.
    ///
    /// # Errors
    /// The model has other layers than Qwen3's; a file cannot be read or written.
    pub fn write_folder(&self, dir: &Path, target: Option<Target>, out: &Path) -> anyhow::Result<Summary> {
        let name = self.config.family.name();
        ensure!(self.architecture()? == "qwen3", "{name} models have other layers than Qwen3's; --to gguf takes them");
        let views = self.weights.tensors()?;
        let mut tensors = Vec::new();
        for (name, view) in views.iter().filter(|(name, _)| self.is_needed(name)) {
            let tensor = Tensor::of_view(name.clone(), view)?;
            let matrix = tensor.shape.len() > 1;
            tensors.push(Tensor { target: target.filter(|_| matrix).unwrap_or(tensor.target), ..tensor });
        }
        write_json(&out.join("config.json"), &self.qwen3(matrices(&tensors)))?;
        write_json(&out.join("generation_config.json"), &self.generation())?;
        for name in KEPT_FILES {
            if dir.join(name).exists() {
                std::fs::copy(dir.join(name), out.join(name)).with_context(|| format!("cannot copy {name}"))?;
            }
        }
        let roles = std::fs::read(dir.join("tokenizer_config.json")).unwrap_or_else(|_| b"{}".to_vec());
        let mut roles: Value = serde_json::from_slice(&roles).context("tokenizer_config.json")?;
        if roles["tokenizer_class"].is_null() {
            roles["tokenizer_class"] = "PreTrainedTokenizerFast".into();
        }
        write_json(&out.join("tokenizer_config.json"), &roles)?;
        let bar = progress(&tensors)?;
        write_safetensors(&tensors, &out.join("model.safetensors"), &bar)?;
        bar.finish_and_clear();
        let written = ModelConfig::load(out, &Overrides::default())?;
        Weights::open(out)?.check(&written)?;
        Ok(Summary::new(&written.architecture, &tensors))
    }

    /// Writes a GGUF file.
    ///
    /// # Errors
    /// The model or its tokenizer has no form in GGUF; a file cannot be read or written.
    pub fn write_gguf(&self, dir: &Path, target: Option<Target>, out: &mut impl Write) -> anyhow::Result<Summary> {
        let architecture = self.architecture()?;
        let views = self.weights.tensors()?;
        let mut tensors = Vec::new();
        for (name, view) in views.iter().filter(|(name, _)| self.is_needed(name)) {
            let Some(renamed) = names::to_gguf(name) else { continue };
            let tensor = Tensor::of_view(name.clone(), view)?;
            let rotated = architecture == "llama" && names::is_rotated(&renamed);
            let head_dim = self.config.heads.head_dim;
            let order = if rotated { Order::ToPairs { head_dim } } else { Order::Same };
            // llama.cpp's element-wise operations want f32.
            let matrix = tensor.shape.len() > 1;
            let target = if matrix { target.unwrap_or(tensor.target) } else { Target::F32 };
            tensors.push(Tensor { name: renamed, order, target, ..tensor });
        }
        let mut items = self.items(architecture, matrices(&tensors));
        items.extend(vocabulary::items(dir, &self.config)?);
        let bar = progress(&tensors)?;
        writer::write(&items, &tensors, out, &bar)?;
        bar.finish_and_clear();
        Ok(Summary::new(architecture, &tensors))
    }

    fn is_needed(&self, name: &str) -> bool {
        names::to_gguf(name).is_some() && !(self.config.tied && name == "lm_head.weight")
    }

    fn qwen3(&self, dtype: Target) -> Value {
        let config = &self.config;
        json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "hidden_size": config.hidden,
            "intermediate_size": config.ffn,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads.heads,
            "num_key_value_heads": config.heads.kv_heads,
            "head_dim": config.heads.head_dim,
            "vocab_size": config.vocab_rows,
            "rms_norm_eps": super::decimal(config.rms_eps),
            "rope_theta": config.rope_theta,
            "max_position_embeddings": self.positions(),
            "tie_word_embeddings": config.tied,
            "torch_dtype": dtype.name(),
            "eos_token_id": config.eos_ids,
            "pad_token_id": self.raw["pad_token_id"],
        })
    }

    /// Greedy, with the ids that never win here: mask, markers, rows that only fill up the matrix.
    fn generation(&self) -> Value {
        let config = &self.config;
        let markers = config.infill.map(|infill| [infill.prefix, infill.suffix, infill.middle]);
        let banned = config.mask_id.into_iter().chain(markers.into_iter().flatten());
        let banned: Vec<u32> = banned.chain(config.tokenizer_size..config.vocab_rows).collect();
        let mut generation = json!({ "eos_token_id": config.eos_ids, "do_sample": false });
        if !banned.is_empty() {
            generation["suppress_tokens"] = banned.into();
        }
        if !self.raw["pad_token_id"].is_null() {
            generation["pad_token_id"] = self.raw["pad_token_id"].clone();
        }
        generation
    }

    fn items(&self, architecture: &str, dtype: Target) -> Vec<(String, Item)> {
        let config = &self.config;
        let head_dim = config.heads.head_dim as u32;
        let file_type = FILE_TYPES.iter().find(|(target, _)| *target == dtype).map_or(0, |(_, code)| *code);
        let general = [
            ("general.architecture", Item::Text(architecture.into())),
            ("general.type", Item::Text("model".into())),
            ("general.name", Item::Text(config.name.clone())),
            ("general.file_type", Item::U32(file_type)),
        ];
        let own = [
            ("block_count", Item::U32(config.layers)),
            ("context_length", Item::U32(self.positions().try_into().unwrap_or(u32::MAX))),
            ("embedding_length", Item::U32(config.hidden)),
            ("feed_forward_length", Item::U32(config.ffn)),
            ("attention.head_count", Item::U32(config.heads.heads as u32)),
            ("attention.head_count_kv", Item::U32(config.heads.kv_heads as u32)),
            ("attention.key_length", Item::U32(head_dim)),
            ("attention.value_length", Item::U32(head_dim)),
            ("attention.layer_norm_rms_epsilon", Item::F32(config.rms_eps)),
            ("rope.freq_base", Item::F32(config.rope_theta as f32)),
            ("rope.dimension_count", Item::U32(head_dim)),
            ("vocab_size", Item::U32(config.vocab_rows)),
        ];
        let own = own.into_iter().map(|(key, item)| (format!("{architecture}.{key}"), item));
        general.into_iter().map(|(key, item)| (key.to_owned(), item)).chain(own).collect()
    }
}

/// The type of the matrices: of the embedding, as it is written.
fn matrices(tensors: &[Tensor<'_>]) -> Target {
    tensors.iter().find(|tensor| tensor.shape.len() > 1).map_or(Target::Bf16, |tensor| tensor.target)
}
