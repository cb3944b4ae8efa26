//! The decoder of Llama-, Qwen2- and Qwen3-like models: RMSNorm, rotary attention, SwiGLU (Touvron et al. 2023).

use super::weights::{Weights, floats};
use super::{LoadError, ModelConfig, Overrides, TensorInfo};
use crate::request::BLOCK_SIZE_MAX;
use safetensors::tensor::TensorView;
use sha2::Digest;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use unmask_kernels::{
    Bans, Cpu, Draw, EmbeddingTable, Epilogue, Isa, KvCache, KvType, Packed, QkNorm, Record, Rotary, RowTable,
    WeightType,
};

/// Rises when a kernel's bits change: part of the numerics id.
const KERNEL_VERSION: u32 = 1;

/// How to load a checkpoint.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Type of packed weights.
    pub dtype: WeightType,
    /// Type of cached keys and values.
    pub kv_type: KvType,
    /// Threads, 0 for all cores.
    pub threads: usize,
    /// Instruction set, detected when `None`.
    pub isa: Option<Isa>,
    /// What the user says instead of the files.
    pub overrides: Overrides,
}

impl Default for LoadOptions {
    /// f32 throughout, on all cores.
    fn default() -> Self {
        Self { dtype: WeightType::F32, kv_type: KvType::F32, threads: 0, isa: None, overrides: Overrides::default() }
    }
}

/// A loaded model.
pub struct Model {
    config: ModelConfig,
    cpu: Arc<Cpu>,
    kv_type: KvType,
    dtype: WeightType,
    embedding: EmbeddingTable,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Packed,
    rotary: Rotary,
    numerics_id: String,
    parameters: u64,
    tensors: Vec<TensorInfo>,
}

struct Layer {
    attention_norm: Vec<f32>,
    /// Rows [q | k | v].
    qkv: Packed,
    qkv_bias: Option<Vec<f32>>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    out: Packed,
    ffn_norm: Vec<f32>,
    /// Rows gate 0, up 0, gate 1, up 1, ..
    gate_up: Packed,
    down: Packed,
}

/// Buffers of one step, sized once for its most rows.
pub struct Scratch {
    rows_max: usize,
    /// Residual stream (rows, hidden).
    stream: Vec<f32>,
    /// Normalised rows (rows, hidden); after a pass those of its outputs.
    normed: Vec<f32>,
    /// (rows, (heads + 2 kv_heads) * head_dim)
    qkv: Vec<f32>,
    /// (rows, heads * head_dim)
    mixed: Vec<f32>,
    /// (rows, ffn)
    gated: Vec<f32>,
    outputs: usize,
}

impl Model {
    /// Loads the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`LoadError`] says which file, key or tensor is at fault.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
        let config = ModelConfig::load(dir, &options.overrides)?;
        let isa = options.isa.map_or_else(Isa::detect, Ok)?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let cpu = Arc::new(Cpu::new(isa, if options.threads == 0 { cores } else { options.threads }));
        let weights = Weights::open(dir)?;
        weights.check(&config)?;
        let numerics_id = numerics_id(&weights, &config, options, isa);
        let tensors = weights.tensors()?;
        let loader = Loader { cpu: &cpu, tensors: &tensors, dtype: options.dtype };
        let embedding = loader.floats("model.embed_tokens.weight");
        let head = if config.tied {
            cpu.pack(config.vocab_rows as usize, config.hidden as usize, &embedding, options.dtype)
        } else {
            loader.pack(&["lm_head.weight"])
        };
        // Blocks may reach past the context by less than a block.
        let positions = (config.context_length + BLOCK_SIZE_MAX) as usize;
        let dim = config.heads.head_dim;
        Ok(Model {
            layers: (0..config.layers).map(|layer| loader.layer(layer, &config)).collect(),
            embedding: EmbeddingTable::new(config.hidden as usize, &embedding, options.dtype),
            norm: loader.floats("model.norm.weight"),
            head,
            rotary: Rotary::new(dim, config.rotary_dim as usize, config.rope_theta, positions),
            kv_type: options.kv_type,
            dtype: options.dtype,
            numerics_id,
            parameters: tensors.values().map(|view| view.shape().iter().product::<usize>() as u64).sum(),
            tensors: tensors.iter().map(|(name, view)| info(name, view)).collect(),
            config,
            cpu,
        })
    }

    /// The resolved configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Digest of everything that decides a result's bits: weights, their type and the cache's, ISA, kernels.
    pub fn numerics_id(&self) -> &str {
        &self.numerics_id
    }

    /// Weights in the files.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Type of the packed weights.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.cpu.isa()
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.cpu.pool().threads()
    }

    /// The tensors of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// A cache of `pages` pages.
    pub fn new_kv(&self, pages: usize) -> KvCache {
        KvCache::new(self.config.layers as usize, &self.config.heads, pages, self.kv_type)
    }

    /// Buffers for steps of up to `rows_max` rows.
    pub fn new_scratch(&self, rows_max: usize) -> Scratch {
        let (hidden, heads) = (self.config.hidden as usize, &self.config.heads);
        Scratch {
            rows_max,
            stream: vec![0.0; rows_max * hidden],
            normed: vec![0.0; rows_max * hidden],
            qkv: vec![0.0; rows_max * heads.qkv_width()],
            mixed: vec![0.0; rows_max * heads.out_width()],
            gated: vec![0.0; rows_max * self.config.ffn as usize],
            outputs: 0,
        }
    }

    /// One pass: `ids` hold one id per row of the table. Keys and values of every row go to the cache; the rows named by
    /// `outputs` (ascending) are left normalised for [`Model::reduce`] and [`Model::logits`].
    ///
    /// # Panics
    /// When ids, rows and buffers do not fit each other: the caller has checked what users send.
    pub fn forward(&self, ids: &[u32], rows: &RowTable<'_>, outputs: &[u32], kv: &mut KvCache, scratch: &mut Scratch) {
        let count = ids.len();
        assert!(count <= scratch.rows_max && rows.rows.len() == count, "a pass must fit its buffers");
        let within = outputs.last().is_none_or(|&row| (row as usize) < count);
        assert!(within && outputs.is_sorted_by(|a, b| a < b), "outputs must be rows of the pass, ascending");
        let (hidden, heads) = (self.config.hidden as usize, &self.config.heads);
        let Scratch { stream, normed, qkv, mixed, gated, .. } = scratch;
        let qkv = &mut qkv[..count * heads.qkv_width()];
        self.cpu.embed(ids, &self.embedding, &mut stream[..count * hidden]);
        // Rows that still matter: past the last attention only those of the outputs.
        let mut count = count;
        for (index, layer) in self.layers.iter().enumerate() {
            self.attend(index, rows, qkv, &stream[..count * hidden], normed, mixed, kv);
            if index + 1 == self.layers.len() {
                keep_rows(stream, hidden, outputs);
                keep_rows(mixed, heads.out_width(), outputs);
                count = outputs.len();
            }
            let (stream, normed) = (&mut stream[..count * hidden], &mut normed[..count * hidden]);
            let gated = &mut gated[..count * self.config.ffn as usize];
            self.cpu.gemm(&mixed[..count * heads.out_width()], &layer.out, Epilogue::Add, stream);
            self.cpu.rms_norm(stream, &layer.ffn_norm, self.config.rms_eps, normed);
            self.cpu.gemm(normed, &layer.gate_up, Epilogue::SiluMul, gated);
            self.cpu.gemm(gated, &layer.down, Epilogue::Add, stream);
        }
        self.cpu.rms_norm(&stream[..count * hidden], &self.norm, self.config.rms_eps, &mut normed[..count * hidden]);
        scratch.outputs = outputs.len();
    }

    /// Attention of one layer: from the residual stream to the heads' mixed values, through the cache.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        index: usize,
        rows: &RowTable<'_>,
        qkv: &mut [f32],
        stream: &[f32],
        normed: &mut [f32],
        mixed: &mut [f32],
        kv: &mut KvCache,
    ) {
        let (layer, heads, eps) = (&self.layers[index], &self.config.heads, self.config.rms_eps);
        let (normed, mixed) = (&mut normed[..stream.len()], &mut mixed[..rows.rows.len() * heads.out_width()]);
        self.cpu.rms_norm(stream, &layer.attention_norm, eps, normed);
        let bias = layer.qkv_bias.as_deref().map_or(Epilogue::Store, Epilogue::Bias);
        self.cpu.gemm(normed, &layer.qkv, bias, qkv);
        let norms = self.config.qk_norm.then_some(QkNorm { q: &layer.q_norm, k: &layer.k_norm, eps });
        self.cpu.rope_append(qkv, heads, &self.rotary, norms, rows, index, kv);
        self.cpu.attention(qkv, heads, rows, index, kv, mixed);
    }

    /// Reduces the logits of the last pass's outputs to one record each.
    pub fn reduce(&self, scratch: &Scratch, bans: &Bans, draws: &[Draw], records: &mut [Record]) {
        self.cpu.vocab_reduce(self.output_rows(scratch), &self.head, bans, draws, records);
    }

    /// Raw head rows of the last pass's outputs, (outputs, vocab_rows).
    pub fn logits(&self, scratch: &Scratch, out: &mut [f32]) {
        self.cpu.logits(self.output_rows(scratch), &self.head, out);
    }

    /// Raw head row of one output of the last pass.
    pub fn row_logits(&self, scratch: &Scratch, output: usize, out: &mut Vec<f32>) {
        let hidden = self.config.hidden as usize;
        out.resize(self.config.vocab_rows as usize, 0.0);
        self.cpu.logits(&self.output_rows(scratch)[output * hidden..(output + 1) * hidden], &self.head, out);
    }

    fn output_rows<'a>(&self, scratch: &'a Scratch) -> &'a [f32] {
        &scratch.normed[..scratch.outputs * self.config.hidden as usize]
    }
}

/// Moves the rows named by `kept` (ascending) to the front.
fn keep_rows(values: &mut [f32], width: usize, kept: &[u32]) {
    for (to, &from) in kept.iter().enumerate() {
        values.copy_within(from as usize * width..(from as usize + 1) * width, to * width);
    }
}

/// Packs tensors that the check has found present.
struct Loader<'a> {
    cpu: &'a Cpu,
    tensors: &'a BTreeMap<String, TensorView<'a>>,
    dtype: WeightType,
}

impl Loader<'_> {
    fn floats(&self, name: &str) -> Vec<f32> {
        self.tensors.get(name).map(floats).unwrap_or_default()
    }

    /// One product of several tensors' rows, in order.
    fn pack(&self, names: &[&str]) -> Packed {
        let rows: usize = names.iter().filter_map(|name| self.tensors.get(*name)).map(|view| view.shape()[0]).sum();
        let weights: Vec<f32> = names.iter().flat_map(|name| self.floats(name)).collect();
        self.cpu.pack(rows, weights.len() / rows, &weights, self.dtype)
    }

    fn layer(&self, layer: u32, config: &ModelConfig) -> Layer {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let qkv = ["q", "k", "v"].map(|name| at(&format!("self_attn.{name}_proj.weight")));
        let biases = ["q", "k", "v"].map(|name| at(&format!("self_attn.{name}_proj.bias")));
        let (gate, up) = (self.floats(&at("mlp.gate_proj.weight")), self.floats(&at("mlp.up_proj.weight")));
        let hidden = config.hidden as usize;
        let mut gate_up = Vec::with_capacity(gate.len() + up.len());
        for (gate, up) in gate.chunks_exact(hidden).zip(up.chunks_exact(hidden)) {
            gate_up.extend_from_slice(gate);
            gate_up.extend_from_slice(up);
        }
        drop((gate, up));
        Layer {
            attention_norm: self.floats(&at("input_layernorm.weight")),
            qkv: self.pack(&qkv.each_ref().map(String::as_str)),
            qkv_bias: config.qkv_bias.then(|| biases.iter().flat_map(|name| self.floats(name)).collect()),
            q_norm: self.floats(&at("self_attn.q_norm.weight")),
            k_norm: self.floats(&at("self_attn.k_norm.weight")),
            out: self.pack(&[&at("self_attn.o_proj.weight")]),
            ffn_norm: self.floats(&at("post_attention_layernorm.weight")),
            gate_up: self.cpu.pack(2 * config.ffn as usize, hidden, &gate_up, self.dtype),
            down: self.pack(&[&at("mlp.down_proj.weight")]),
        }
    }
}

fn info(name: &str, view: &TensorView<'_>) -> TensorInfo {
    TensorInfo {
        name: name.to_owned(),
        shape: view.shape().to_vec(),
        dtype: format!("{:?}", view.dtype()).to_lowercase(),
    }
}

fn numerics_id(weights: &Weights, config: &ModelConfig, options: &LoadOptions, isa: Isa) -> String {
    let mut digest = weights.digest();
    for entry in &config.entries {
        digest.update(format!("{}={};", entry.key, entry.value));
    }
    let dot = isa.has_bf16_dot();
    digest.update(format!("{:?} {:?} {isa:?} {dot} {KERNEL_VERSION}", options.dtype, options.kv_type));
    digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
