//! Tensors to packed products, row by row: no tensor is ever held a second time.

use super::ModelConfig;
use super::ffn::Experts;
use super::moe::Moe;
use super::names::Projections;
use super::weights::floats;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use unmask_kernels::{
    AttentionWeights, Cpu, EmbeddingTable, Expert, FeedForwardWeights, Half, HeadShape, Norm, Packed, ProductShape,
    VocabShard, WeightType,
};

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

    /// Everything that keeps a model from being shared out like this; nothing where it can be.
    pub fn problems(&self, config: &ModelConfig) -> Vec<String> {
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
        let moe = config.moe.as_ref();
        for (name, size) in [
            ("intermediate_size", config.ffn as usize),
            ("moe_intermediate_size", moe.map_or(0, |moe| moe.ffn as usize)),
            ("heads * head_dim", config.heads.out_width()),
        ] {
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

/// Adds a half to those that it follows.
fn push_half(stages: &mut Vec<Stage>, half: Half) {
    match stages.last_mut() {
        Some(Stage::Halves(halves)) => halves.push(half),
        _ => stages.push(Stage::Halves(vec![half])),
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

/// What a pass goes through in turn.
pub(super) enum Stage {
    /// Halves of layers, as many as follow each other.
    Halves(Vec<Half>),
    /// A half of experts.
    Experts(Box<Experts>),
}

impl Stage {
    /// Every product.
    pub(super) fn products(&self) -> Vec<&Packed> {
        match self {
            Stage::Halves(halves) => halves.iter().flat_map(Half::products).collect(),
            Stage::Experts(experts) => experts.products().collect(),
        }
    }
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
    pub(super) fn norm(&self) -> Norm {
        self.norm_of(self.config.family.names.norm)
    }

    fn norm_of(&self, name: &str) -> Norm {
        let weight = self.source.vector(&format!("{name}.weight"), self.config.hidden as usize);
        Norm { weight, eps: self.config.rms_eps }
    }

    fn embedding_name(&self) -> String {
        format!("{}.weight", self.config.family.names.embedding)
    }

    /// The head, unless the rank has no rows of it.
    pub(super) fn head(&self) -> Option<Packed> {
        let head = || format!("{}.weight", self.config.family.names.head);
        let name = if self.config.tied { self.embedding_name() } else { head() };
        let ids = self.share.vocab(self.config).ids();
        (!ids.is_empty()).then(|| {
            let shape = ProductShape::new(ids.len(), self.config.hidden as usize);
            self.cpu.pack_rows(shape, self.dtype, &|row, out| self.source.row(&name, ids.start + row, out))
        })
    }

    pub(super) fn embedding(&self) -> Embedding {
        if self.config.tied {
            return Embedding::Tied;
        }
        let (vocab, hidden) = (self.config.vocab_rows as usize, self.config.hidden as usize);
        let name = self.embedding_name();
        let row = |row, out: &mut [f32]| self.source.row(&name, row, out);
        Embedding::Table(EmbeddingTable::new(vocab, hidden, self.dtype, &row))
    }

    /// All layers; `done` hears how many are packed.
    pub(super) fn stages(&self, done: impl Fn(u32)) -> Vec<Stage> {
        let (names, mut stages) = (self.config.family.names, Vec::new());
        for layer in 0..self.config.layers {
            let at = |name: &str| format!("{}.{layer}.{name}", names.layers);
            push_half(&mut stages, self.attention(layer, &at));
            match self.config.moe.as_ref().filter(|moe| moe.covers(layer)) {
                Some(moe) => stages.push(Stage::Experts(Box::new(self.experts(moe, &at)))),
                None => push_half(&mut stages, self.feed_forward(&at)),
            }
            done(layer + 1);
        }
        stages
    }

    fn attention(&self, layer: u32, at: &dyn Fn(&str) -> String) -> Half {
        let (names, heads) = (self.config.family.names, &self.config.heads);
        let norm = |name| self.source.vector(&format!("{}.weight", at(name)), heads.head_dim);
        let out = ProductShape::new(self.config.hidden as usize, heads.out_width());
        Half::Attention(AttentionWeights {
            layer: layer as usize,
            norm: self.norm_of(&at(names.attention_norm)),
            qkv: self.qkv(at),
            bias: self.config.qkv_bias.then(|| self.qkv_bias(at)),
            qk_norm: self.config.qk_norm.then(|| [names.q_norm, names.k_norm].map(norm)),
            out: self.row_parallel(&format!("{}.weight", at(names.out)), out),
        })
    }

    fn feed_forward(&self, at: &dyn Fn(&str) -> String) -> Half {
        let names = self.config.family.names;
        Half::FeedForward(FeedForwardWeights {
            norm: self.norm_of(&at(names.ffn_norm)),
            expert: self.expert(self.config.ffn, &|name| at(&names.dense(name))),
        })
    }

    fn experts(&self, moe: &Moe, at: &dyn Fn(&str) -> String) -> Experts {
        let (names, count) = (self.config.family.names, moe.router.experts);
        let router = format!("{}.weight", at(&names.router()));
        let shape = ProductShape::new(count, self.config.hidden as usize);
        Experts {
            norm: self.norm_of(&at(names.ffn_norm)),
            router: self.cpu.pack_rows(shape, WeightType::F32, &|row, out| self.source.row(&router, row, out)),
            bias: self.source.vector(&at(&names.expert_bias()), if moe.bias { count } else { 0 }),
            experts: (0..count as u32).map(|e| self.expert(moe.ffn, &|name| at(&names.expert(e, name)))).collect(),
            shared: (moe.shared_ffn > 0).then(|| self.expert(moe.shared_ffn, &|name| at(&names.shared(name)))),
        }
    }

    /// A feed-forward part of `width` columns over all ranks.
    fn expert(&self, width: u32, name: &dyn Fn(&str) -> String) -> Expert {
        let names = self.config.family.names;
        let [gate, up, down] = [names.gate, names.up, names.down].map(|part| format!("{}.weight", name(part)));
        Expert {
            gate_up: self.gate_up(width, [gate, up]),
            down: self.row_parallel(&down, ProductShape::new(self.config.hidden as usize, width as usize)),
        }
    }

    /// Per projection its tensor, the rank's first row there and the rank's rows.
    fn projections(&self) -> [(&'static str, usize, usize); 3] {
        let (whole, dim) = (&self.config.heads, self.config.heads.head_dim);
        let own = self.share.heads(whole);
        let (q, kv) = (whole.heads * dim, whole.kv_heads * dim);
        let (first, first_kv) = (self.share.rank * own.heads * dim, self.share.first_kv_head(whole) * dim);
        let (names, bases) = match self.config.family.names.projections {
            Projections::Split(names) => (names, [0, 0, 0]),
            Projections::Fused(name) => ([name; 3], [0, q, q + kv]),
        };
        [
            (names[0], bases[0] + first, own.heads * dim),
            (names[1], bases[1] + first_kv, own.kv_heads * dim),
            (names[2], bases[2] + first_kv, own.kv_heads * dim),
        ]
    }

    fn qkv(&self, at: &dyn Fn(&str) -> String) -> Packed {
        let parts = self.projections().map(|(name, from, rows)| (format!("{}.weight", at(name)), from, rows));
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

    fn qkv_bias(&self, at: &dyn Fn(&str) -> String) -> Vec<f32> {
        let (whole, dim) = (&self.config.heads, self.config.heads.head_dim);
        let (q, kv) = (whole.heads * dim, whole.kv_heads * dim);
        let lengths = match self.config.family.names.projections {
            Projections::Split(_) => [q, kv, kv],
            Projections::Fused(_) => [q + 2 * kv; 3],
        };
        let biases = self.projections().into_iter().zip(lengths).map(|((name, from, rows), length)| {
            self.source.vector(&format!("{}.bias", at(name)), length)[from..from + rows].to_vec()
        });
        biases.flatten().collect()
    }

    fn gate_up(&self, width: u32, names: [String; 2]) -> Packed {
        let rows = width as usize / self.share.ranks;
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
