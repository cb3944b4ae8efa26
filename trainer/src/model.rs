//! The decoder with autograd: parameters, their names in checkpoints, and the forward pass over a batch.
//!
//! Mathematics of Qwen3: RMS norm, grouped-query attention with normed queries and keys, rotary positions, SwiGLU, tied
//! head, no biases.

use std::sync::{Arc, Mutex};

use anyhow::Context;
use candle_core::{D, Device, Tensor, Var};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::{
    layout::Batch,
    ops::{
        Heads, attend, attend::Attend, embed::Embed, feed_forward, feed_forward::FeedForward, head::Head,
        rotary::Rotary,
    },
};

/// Sizes of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub inner: usize,
    /// Number of layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: Heads,
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Added to mean squares in norms.
    pub eps: f32,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Positions the model may see.
    pub positions: usize,
}

/// A named tensor inside one flat parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Name in Qwen3 checkpoints.
    pub name: String,
    /// Index of the flat parameter.
    pub parameter: usize,
    /// First element in it.
    pub start: usize,
    /// Rows (1 for vectors).
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// What it is, for the optimiser and the initialisation.
    pub kind: Kind,
}

/// Kinds of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Embedding table and tied head.
    Table,
    /// A linear map from a normed input.
    Input,
    /// A linear map that adds to the residual stream.
    Output,
    /// Norm weights.
    Norm,
}

impl Segment {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements' place in the flat parameter.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.len()
    }

    /// Shape in checkpoints.
    pub fn shape(&self) -> Vec<usize> {
        if self.kind == Kind::Norm { vec![self.columns] } else { vec![self.rows, self.columns] }
    }
}

impl ModelShape {
    /// Every tensor, in checkpoint order. Parameter 0 is the table, 1 the final norm, then two per layer.
    pub fn segments(&self) -> Vec<Segment> {
        let (hidden, inner, dim) = (self.hidden, self.inner, self.heads.head_dim);
        let (q, kv) = (self.heads.heads * dim, self.heads.kv_heads * dim);
        let mut all = Vec::new();
        let mut flat = |parameter: usize, parts: &[(String, usize, usize, Kind)]| {
            let mut start = 0;
            for (name, rows, columns, kind) in parts {
                let (name, rows, columns, kind) = (name.clone(), *rows, *columns, *kind);
                all.push(Segment { name, parameter, start, rows, columns, kind });
                start += rows * columns;
            }
        };
        flat(0, &[("model.embed_tokens.weight".into(), self.vocabulary, hidden, Kind::Table)]);
        flat(1, &[("model.norm.weight".into(), 1, hidden, Kind::Norm)]);
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let attention = [
                (name("self_attn.q_proj"), q, hidden, Kind::Input),
                (name("self_attn.k_proj"), kv, hidden, Kind::Input),
                (name("self_attn.v_proj"), kv, hidden, Kind::Input),
                (name("self_attn.o_proj"), hidden, q, Kind::Output),
                (name("input_layernorm"), 1, hidden, Kind::Norm),
                (name("self_attn.q_norm"), 1, dim, Kind::Norm),
                (name("self_attn.k_norm"), 1, dim, Kind::Norm),
            ];
            flat(2 + 2 * layer, &attention);
            let feed_forward = [
                (name("mlp.gate_proj"), inner, hidden, Kind::Input),
                (name("mlp.up_proj"), inner, hidden, Kind::Input),
                (name("mlp.down_proj"), hidden, inner, Kind::Output),
                (name("post_attention_layernorm"), 1, hidden, Kind::Norm),
            ];
            flat(3 + 2 * layer, &feed_forward);
        }
        all
    }

    /// Elements of each flat parameter.
    pub fn parameter_sizes(&self) -> Vec<usize> {
        let mut sizes = vec![self.vocabulary * self.hidden, self.hidden];
        for _ in 0..self.layers {
            sizes.push(attend::weight_count(&self.heads, self.hidden));
            sizes.push(feed_forward::weight_count(self.hidden, self.inner));
        }
        sizes
    }

    /// Number of parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameter_sizes().iter().sum()
    }

    /// Fresh weights: normal with deviation 0.02 for the table, `0.7 / sqrt(columns)` for linear maps, those into the
    /// residual stream divided by `sqrt(2 layers)` (Radford et al. 2019); norms are one.
    pub fn initial(&self, rng: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
        let mut flat: Vec<Vec<f32>> = self.parameter_sizes().into_iter().map(|size| vec![0.0; size]).collect();
        for segment in self.segments() {
            let linear = 0.7 / (segment.columns as f32).sqrt();
            let deviation = match segment.kind {
                Kind::Table => 0.02,
                Kind::Input => linear,
                Kind::Output => linear / (2.0 * self.layers as f32).sqrt(),
                Kind::Norm => 0.0,
            };
            for x in &mut flat[segment.parameter][segment.range()] {
                *x = if segment.kind == Kind::Norm { 1.0 } else { deviation * normal(rng) };
            }
        }
        flat
    }
}

/// A draw from the standard normal distribution (Box and Muller 1958).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}

/// The model.
pub struct Model {
    shape: ModelShape,
    parameters: Vec<Var>,
    rotary: Arc<Rotary>,
    banned: u32,
}

/// Result of a forward pass.
pub struct Scored {
    /// Weighted sum of cross-entropies, shape (1), in the graph.
    pub loss: Tensor,
    /// Cross-entropy in nats of every target of the batch, in its order.
    pub losses: Vec<f32>,
}

impl Model {
    /// A model with the given flat weights; `mask` is never predicted.
    ///
    /// # Errors
    /// When the weights do not fit the shape.
    pub fn new(shape: ModelShape, weights: &[Vec<f32>], mask: u32) -> anyhow::Result<Model> {
        let sizes: Vec<usize> = weights.iter().map(Vec::len).collect();
        anyhow::ensure!(sizes == shape.parameter_sizes(), "the weights do not fit the model's shape");
        let tensor = |index: usize, data: &Vec<f32>| -> candle_core::Result<Var> {
            let shape = if index == 0 { vec![shape.vocabulary, shape.hidden] } else { vec![data.len()] };
            Var::from_tensor(&Tensor::from_slice(data, shape, &Device::Cpu)?)
        };
        let parameters: candle_core::Result<Vec<Var>> = weights.iter().enumerate().map(|(i, w)| tensor(i, w)).collect();
        let rotary = Arc::new(Rotary::new(shape.heads.head_dim, shape.theta, shape.positions));
        Ok(Model { shape, parameters: parameters?, rotary, banned: mask })
    }

    /// Sizes.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// The flat parameters.
    pub fn parameters(&self) -> &[Var] {
        &self.parameters
    }

    /// Replaces the weights.
    ///
    /// # Errors
    /// When they do not fit the shape.
    pub fn set(&self, weights: &[Vec<f32>]) -> anyhow::Result<()> {
        anyhow::ensure!(weights.len() == self.parameters.len(), "the weights do not fit the model's shape");
        for (var, data) in self.parameters.iter().zip(weights) {
            var.set(&Tensor::from_slice(data, var.shape(), &Device::Cpu)?).context("weights of another shape")?;
        }
        Ok(())
    }

    /// Final hidden state of every row, before the last norm, (rows, hidden).
    ///
    /// # Errors
    /// When a position or token of the batch is out of range.
    pub fn hidden(&self, batch: &Batch, keep: bool) -> anyhow::Result<Tensor> {
        anyhow::ensure!(batch.positions.iter().all(|&p| (p as usize) < self.shape.positions), "position out of range");
        anyhow::ensure!(batch.ids.iter().all(|&id| (id as usize) < self.shape.vocabulary), "token id out of range");
        let mut x = self.parameters[0].apply_op1(Embed { ids: batch.ids.clone() })?;
        for layer in self.parameters[2..].chunks_exact(2) {
            let attend = Attend {
                heads: self.shape.heads,
                eps: self.shape.eps,
                positions: batch.positions.clone(),
                documents: batch.documents.clone(),
                rotary: self.rotary.clone(),
                keep,
                saved: Mutex::default(),
            };
            x = x.apply_op2(&layer[0], attend)?;
            let feed_forward =
                FeedForward { inner: self.shape.inner, eps: self.shape.eps, keep, saved: Mutex::default() };
            x = x.apply_op2(&layer[1], feed_forward)?;
        }
        Ok(x)
    }

    /// The mask's token.
    pub fn mask(&self) -> u32 {
        self.banned
    }

    /// Logits of hidden states, (rows, vocabulary), the mask's at minus infinity.
    ///
    /// # Errors
    /// When `hidden` has another width.
    pub fn logits(&self, hidden: &Tensor) -> anyhow::Result<Tensor> {
        let mean_square = hidden.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (mean_square + f64::from(self.shape.eps))?.sqrt()?;
        let normed = hidden.broadcast_div(&scale)?.broadcast_mul(&self.parameters[1])?;
        let logits = normed.matmul(&self.parameters[0].t()?)?;
        let mut banned = vec![0.0f32; self.shape.vocabulary];
        banned[self.banned as usize] = f32::NEG_INFINITY;
        Ok(logits.broadcast_add(&Tensor::from_vec(banned, self.shape.vocabulary, hidden.device())?)?)
    }

    /// Loss of a batch; with `keep` its gradient can be taken.
    ///
    /// # Errors
    /// When a position or token of the batch is out of range.
    pub fn score(&self, batch: &Batch, keep: bool) -> anyhow::Result<Scored> {
        let x = self.hidden(batch, keep)?;
        let losses = Arc::new(Mutex::new(Vec::new()));
        let head = Head {
            targets: batch.targets.clone(),
            banned: self.banned,
            eps: self.shape.eps,
            keep,
            losses: losses.clone(),
            saved: Mutex::default(),
        };
        let loss = x.apply_op3(&self.parameters[1], &self.parameters[0], head)?;
        let losses = std::mem::take(&mut *losses.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        Ok(Scored { loss, losses })
    }
}
