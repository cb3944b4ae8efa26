//! Models to measure: shapes of well-known ones with drawn weights, or folders.

use crate::models;
use anyhow::Context;
use std::str::FromStr;
use unmask_engine::model::{DecodeDefaults, Family};
use unmask_engine::policy::{Comparison, Policy};
use unmask_engine::{LoadOptions, Model, ModelConfig, Reach};
use unmask_kernels::HeadShape;

/// Of the drawn weights.
const SEED: u64 = 1;

/// A shape by name, or a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// Weights are drawn.
    Named(Named),
    /// Folder or name of a model.
    Model(String),
}

/// Sizes of a well-known model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// As `--shape` takes it.
    pub name: &'static str,
    /// What decides the shapes of its tensors.
    pub sizes: Sizes,
    qk_norm: bool,
    /// Base of the rotary angles.
    theta: u32,
}

/// What decides the shapes of a model's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Width of a row.
    pub hidden: u32,
    /// Width between the products of a layer's second half.
    pub ffn: u32,
    /// Layers.
    pub layers: u32,
    /// Heads of attention.
    pub heads: HeadShape,
    /// Rows of the embedding.
    pub vocab: u32,
}

/// All named shapes.
pub const NAMED: [Named; 3] = [
    Named {
        name: "qwen3-0.6b",
        sizes: Sizes {
            hidden: 1024,
            ffn: 3072,
            layers: 28,
            heads: HeadShape { heads: 16, kv_heads: 8, head_dim: 128 },
            vocab: 151_936,
        },
        qk_norm: true,
        theta: 1_000_000,
    },
    Named {
        name: "smollm2-135m",
        sizes: Sizes {
            hidden: 576,
            ffn: 1536,
            layers: 30,
            heads: HeadShape { heads: 9, kv_heads: 3, head_dim: 64 },
            vocab: 49_152,
        },
        qk_norm: false,
        theta: 100_000,
    },
    // One layer of 32: what matters of a model that does not fit.
    Named {
        name: "llama-8b-layer",
        sizes: Sizes {
            hidden: 4096,
            ffn: 14_336,
            layers: 1,
            heads: HeadShape { heads: 32, kv_heads: 8, head_dim: 128 },
            vocab: 512,
        },
        qk_norm: false,
        theta: 500_000,
    },
];

impl FromStr for Shape {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Named::find(text).map_or_else(|_| Shape::Model(text.into()), Shape::Named))
    }
}

impl Shape {
    /// As given.
    pub fn name(&self) -> &str {
        match self {
            Shape::Named(named) => named.name,
            Shape::Model(name) => name,
        }
    }

    /// Loads it, or draws its weights.
    ///
    /// # Errors
    /// Neither a known shape nor a model that loads.
    pub fn load(&self, options: &LoadOptions, context: u32) -> anyhow::Result<Model> {
        match self {
            Shape::Named(named) => Ok(Model::drawn(named.config(context), options, SEED)?),
            Shape::Model(name) => {
                let dir =
                    models::find(Some(name)).with_context(|| format!("--shape: known are {} and models", known()))?;
                Ok(Model::load(&dir, options)?)
            }
        }
    }
}

fn known() -> String {
    NAMED.map(|named| named.name).join(", ")
}

impl Named {
    /// The shape of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(name: &str) -> anyhow::Result<Named> {
        NAMED.into_iter().find(|named| named.name == name).with_context(|| format!("no shape {name:?}: {}", known()))
    }

    fn config(&self, context: u32) -> ModelConfig {
        let Sizes { hidden, ffn, layers, heads, vocab } = self.sizes;
        ModelConfig {
            name: self.name.into(),
            architecture: "drawn".into(),
            family: Family::own(),
            layers,
            hidden,
            ffn,
            moe: None,
            heads,
            vocab_rows: vocab,
            tokenizer_size: vocab,
            rms_eps: 1e-6,
            rope_theta: f64::from(self.theta),
            rotary_dim: heads.head_dim as u32,
            qk_norm: self.qk_norm,
            qkv_bias: false,
            tied: true,
            context_length: context,
            block_sizes: vec![4, 8, 16, 32],
            open_reach: Reach::Block,
            kept_reach: Reach::Causal,
            shift: false,
            mask_id: Some(1),
            eos_ids: vec![0],
            infill: None,
            heal: false,
            edit: false,
            decode: DecodeDefaults {
                block_size: 16,
                policy: Policy::Threshold { tau: 0.9, comparison: Comparison::Strict, quota_steps: None },
                max_tokens: 256,
                temperature: 0.0,
            },
            entries: Vec::new(),
        }
    }
}
