//! Tensors to packed products, row by row: no tensor is ever held a second time.

use super::ModelConfig;
use super::weights::floats;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use unmask_kernels::{Cpu, EmbeddingTable, HeadShape, Packed, ProductShape, VocabShard, WeightType};

/// Which part of a model one rank of a group holds: heads and feed-forward columns are shared out, and the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which rank, from 0.
    pub rank: usize,
    /// How many: 1, 2, 4 or 8.
    pub ranks: usize,
}

impl Share {
    /// The whole model.
    pub const WHOLE: Share = Share { rank: 0, ranks: 1 };

    /// Everything that keeps a model from being shared out like this.
    pub(super) fn problems(&self, config: &ModelConfig) -> Vec<String> {
        let ranks = self.ranks;
        let mut problems = Vec::new();
        if !(ranks.is_power_of_two() && ranks <= unmask_kernels::PIECES && self.rank < ranks) {
            problems.push(format!("rank {} of {ranks}: degrees are 1, 2, 4 and 8", self.rank));
            return problems;
        }
        let (heads, kv) = (config.heads.heads, config.heads.kv_heads);
        if !heads.is_multiple_of(ranks) || !(kv.is_multiple_of(ranks) || ranks.is_multiple_of(kv)) {
            problems.push(format!("{heads} heads over {kv} key/value heads cannot be shared by {ranks} ranks"));
        }
        for (name, size) in [("intermediate_size", config.ffn as usize), ("heads * head_dim", config.heads.out_width())]
        {
            if ranks > 1 && !size.is_multiple_of(unmask_kernels::PIECES) {
                problems.push(format!("{name} {size} is not a multiple of {}", unmask_kernels::PIECES));
            }
        }
        problems
    }

    /// The rank's heads.
    pub(super) fn heads(&self, whole: &HeadShape) -> HeadShape {
        HeadShape { heads: whole.heads / self.ranks, kv_heads: whole.kv_heads.div_ceil(self.ranks), ..*whole }
    }

    fn first_kv_head(&self, whole: &HeadShape) -> usize {
        self.rank * whole.kv_heads / self.ranks
    }

    /// The rank's rows of the head.
    pub(super) fn vocab(&self, config: &ModelConfig) -> VocabShard {
        VocabShard { total: config.vocab_rows as usize, ranks: self.ranks, rank: self.rank }
    }
}

/// Where tensors come from. What is asked for has been checked to be there.
pub(super) enum Source<'a> {
    /// Mapped files.
    Files(&'a BTreeMap<String, TensorView<'a>>),
    /// Numbers drawn from a seed, for measuring shapes without weights.
    Drawn(u64),
}

impl Source<'_> {
    /// One row of a matrix, or a whole vector as its row 0.
    fn row(&self, name: &str, row: usize, out: &mut [f32]) {
        match self {
            Source::Files(tensors) => {
                if let Some(view) = tensors.get(name) {
                    floats(view, row * out.len(), out);
                }
            }
            Source::Drawn(seed) => draw(*seed ^ fnv(name) ^ (row as u64) << 32, out),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        self.row(name, 0, &mut values);
        values
    }
}

/// Values around zero that keep activations of unit size through a layer.
fn draw(seed: u64, out: &mut [f32]) {
    let scale = (3.0 / out.len() as f32).sqrt() / (1u64 << 31) as f32;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for value in out {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *value = (state >> 32) as u32 as i32 as f32 * scale;
    }
}

/// FNV-1a, to tell tensors apart.
fn fnv(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// One layer's weights.
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    /// Rows [q | k | v].
    pub(super) qkv: Packed,
    pub(super) qkv_bias: Option<Vec<f32>>,
    pub(super) q_norm: Vec<f32>,
    pub(super) k_norm: Vec<f32>,
    pub(super) out: Packed,
    pub(super) ffn_norm: Vec<f32>,
    /// Rows gate 0, up 0, gate 1, up 1, ..
    pub(super) gate_up: Packed,
    pub(super) down: Packed,
}

/// Rows of the embedding.
pub(super) enum Embedding {
    /// The head's.
    Tied,
    /// Its own.
    Table(EmbeddingTable),
}

/// Packs tensors that the check has found present.
pub(super) struct Loader<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) source: Source<'a>,
    pub(super) config: &'a ModelConfig,
    pub(super) dtype: WeightType,
    pub(super) share: Share,
}

impl Loader<'_> {
    pub(super) fn norm(&self) -> Vec<f32> {
        self.source.vector("model.norm.weight", self.config.hidden as usize)
    }

    /// The head, unless the rank has no rows of it.
    pub(super) fn head(&self) -> Option<Packed> {
        let name = if self.config.tied { EMBEDDING } else { "lm_head.weight" };
        let ids = self.share.vocab(self.config).ids();
        (!ids.is_empty()).then(|| {
            let shape = ProductShape::new(ids.len(), self.config.hidden as usize);
            self.cpu.pack_rows(shape, self.dtype, &|row, out| self.source.row(name, ids.start + row, out))
        })
    }

    pub(super) fn embedding(&self) -> Embedding {
        if self.config.tied {
            return Embedding::Tied;
        }
        let (vocab, hidden) = (self.config.vocab_rows as usize, self.config.hidden as usize);
        let row = |row, out: &mut [f32]| self.source.row(EMBEDDING, row, out);
        Embedding::Table(EmbeddingTable::new(vocab, hidden, self.dtype, &row))
    }

    pub(super) fn layer(&self, layer: u32) -> Layer {
        let (hidden, dim) = (self.config.hidden as usize, self.config.heads.head_dim);
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let vector = |name: &str, len| self.source.vector(&at(name), len);
        let norms = if self.config.qk_norm { dim } else { 0 };
        let down = ProductShape::new(hidden, self.config.ffn as usize);
        let out = ProductShape::new(hidden, self.config.heads.out_width());
        Layer {
            attention_norm: vector("input_layernorm.weight", hidden),
            qkv: self.qkv(&at("self_attn")),
            qkv_bias: self.config.qkv_bias.then(|| self.qkv_bias(&at("self_attn"))),
            q_norm: vector("self_attn.q_norm.weight", norms),
            k_norm: vector("self_attn.k_norm.weight", norms),
            out: self.row_parallel(&at("self_attn.o_proj.weight"), out),
            ffn_norm: vector("post_attention_layernorm.weight", hidden),
            gate_up: self.gate_up(&at("mlp")),
            down: self.row_parallel(&at("mlp.down_proj.weight"), down),
        }
    }

    /// Per projection its name, the rank's first row and the rank's rows.
    fn projections(&self) -> [(&'static str, usize, usize); 3] {
        let (whole, dim) = (&self.config.heads, self.config.heads.head_dim);
        let own = self.share.heads(whole);
        let kv = (self.share.first_kv_head(whole) * dim, own.kv_heads * dim);
        [("q", self.share.rank * own.heads * dim, own.heads * dim), ("k", kv.0, kv.1), ("v", kv.0, kv.1)]
    }

    fn qkv(&self, prefix: &str) -> Packed {
        let parts = self.projections().map(|(name, from, rows)| (format!("{prefix}.{name}_proj.weight"), from, rows));
        let shape = ProductShape::new(parts.iter().map(|part| part.2).sum(), self.config.hidden as usize);
        self.cpu.pack_rows(shape, self.dtype, &|mut row, out| {
            for (name, from, rows) in &parts {
                if row < *rows {
                    return self.source.row(name, from + row, out);
                }
                row -= rows;
            }
        })
    }

    fn qkv_bias(&self, prefix: &str) -> Vec<f32> {
        let dim = self.config.heads.head_dim;
        let whole = [self.config.heads.heads, self.config.heads.kv_heads, self.config.heads.kv_heads];
        let parts = self.projections().into_iter().zip(whole);
        let biases = parts.map(|((name, from, rows), heads)| {
            self.source.vector(&format!("{prefix}.{name}_proj.bias"), heads * dim)[from..from + rows].to_vec()
        });
        biases.flatten().collect()
    }

    fn gate_up(&self, prefix: &str) -> Packed {
        let rows = self.config.ffn as usize / self.share.ranks;
        let names = ["gate", "up"].map(|name| format!("{prefix}.{name}_proj.weight"));
        let shape = ProductShape { gated: true, ..ProductShape::new(2 * rows, self.config.hidden as usize) };
        let first = self.share.rank * rows;
        self.cpu.pack_rows(shape, self.dtype, &|row, out| self.source.row(&names[row % 2], first + row / 2, out))
    }

    /// A product whose k is shared out among the ranks.
    fn row_parallel(&self, name: &str, whole: ProductShape) -> Packed {
        let shape = whole.in_pieces().share(self.share.rank, self.share.ranks);
        self.cpu.pack_rows(shape, self.dtype, &|row, out| self.source.row(name, row, out))
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
