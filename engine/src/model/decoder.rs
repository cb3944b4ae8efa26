//! The decoder of Llama-, Qwen2- and Qwen3-like models: RMSNorm, rotary attention, SwiGLU (Touvron et al. 2023).

use super::ffn::{FfnScratch, add_of_ranks};
use super::link::{Alone, Link, Operation};
use super::loader::{Embedding, Loader, Share, Source, Stage};
use super::weights::Weights;
use super::{LoadError, ModelConfig, Overrides, TensorInfo};
use crate::request::BLOCK_SIZE_MAX;
use safetensors::tensor::TensorView;
use sha2::Digest;
use std::path::Path;
use std::sync::Arc;
use unmask_kernels::{
    Bans, Cpu, Draw, Half, HeadShape, Isa, KvCache, KvType, Norm, Packed, Partial, Record, Rotary, RowTable,
    StepBuffers, StepRows, VocabShard, WeightType,
};

/// Rises when a kernel's bits change: part of the numerics id.
const KERNEL_VERSION: u32 = 3;

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
    /// Which part of the model to load.
    pub share: Share,
    /// Who hears how far it is.
    pub progress: Option<Progress>,
}

/// Hears of every layer that is packed: how many are, of how many.
#[derive(Clone)]
pub struct Progress(pub Arc<dyn Fn(u32, u32) + Send + Sync>);

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Progress")
    }
}

impl Default for LoadOptions {
    /// f32 throughout, on all cores.
    fn default() -> Self {
        Self {
            dtype: WeightType::F32,
            kv_type: KvType::F32,
            threads: 0,
            isa: None,
            overrides: Overrides::default(),
            share: Share::WHOLE,
            progress: None,
        }
    }
}

/// A loaded model.
pub struct Model {
    pub(super) config: ModelConfig,
    pub(super) cpu: Arc<Cpu>,
    kv_type: KvType,
    dtype: WeightType,
    embedding: Embedding,
    stages: Vec<Stage>,
    norm: Norm,
    /// The rank's rows of the vocabulary.
    head: Option<Packed>,
    pub(super) vocab: VocabShard,
    /// The rank's heads.
    heads: HeadShape,
    rotary: Rotary,
    numerics_id: String,
    parameters: u64,
    tensors: Vec<TensorInfo>,
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
    ffn: FfnScratch,
    outputs: usize,
}

impl Scratch {
    /// Most rows of a pass.
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }
}

impl Model {
    /// Loads the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`LoadError`] says which file, key or tensor is at fault.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
        let config = ModelConfig::load(dir, &options.overrides)?;
        let cpu = Self::cpu(options)?;
        let weights = Weights::open(dir)?;
        weights.check(&config)?;
        let numerics_id = numerics_id(&weights, &config, options, cpu.isa());
        let tensors = weights.tensors()?;
        let parameters = tensors.values().map(|view| view.shape().iter().product::<usize>() as u64).sum();
        let info = tensors.iter().map(|(name, view)| info(name, view)).collect();
        Self::build(config, options, cpu, Source::Files(&tensors), (numerics_id, parameters, info))
    }

    /// A model of the given shape with weights drawn from `seed`, to measure what needs no trained ones.
    ///
    /// # Errors
    /// The instruction set or the share of the options cannot be had.
    pub fn drawn(config: ModelConfig, options: &LoadOptions, seed: u64) -> Result<Model, LoadError> {
        let cpu = Self::cpu(options)?;
        Self::build(config, options, cpu, Source::Drawn(seed), (format!("drawn-{seed}"), 0, Vec::new()))
    }

    fn cpu(options: &LoadOptions) -> Result<Arc<Cpu>, LoadError> {
        let isa = options.isa.map_or_else(Isa::detect, Ok)?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(Arc::new(Cpu::new(isa, if options.threads == 0 { cores } else { options.threads })))
    }

    fn build(
        config: ModelConfig,
        options: &LoadOptions,
        cpu: Arc<Cpu>,
        source: Source<'_>,
        (numerics_id, parameters, tensors): (String, u64, Vec<TensorInfo>),
    ) -> Result<Model, LoadError> {
        let share = options.share;
        let problems = share.problems(&config);
        if !problems.is_empty() {
            return Err(LoadError::Share { ranks: share.ranks, problems });
        }
        let loader = Loader { cpu: &cpu, source, config: &config, dtype: options.dtype, share };
        // Blocks may reach past the context by less than a block.
        let positions = (config.context_length + BLOCK_SIZE_MAX) as usize;
        let rotary = Rotary::new(config.heads.head_dim, config.rotary_dim as usize, config.rope_theta, positions);
        Ok(Model {
            stages: loader.stages(|done| {
                if let Some(Progress(hear)) = &options.progress {
                    hear(done, config.layers);
                }
            }),
            embedding: loader.embedding(),
            norm: loader.norm(),
            head: loader.head(),
            heads: share.heads(&config.heads),
            vocab: share.vocab(&config),
            rotary,
            kv_type: options.kv_type,
            dtype: options.dtype,
            numerics_id,
            parameters,
            tensors,
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

    /// Ids that must not win: padding rows, the mask, infill sentinels. Our own models were trained with the mask's
    /// logit left out of the softmax; other families count it in their confidences.
    pub fn bans(&self) -> Bans {
        let config = &self.config;
        let mut argmax: Vec<u32> = config.mask_id.into_iter().collect();
        if let Some(infill) = &config.infill {
            argmax.extend([infill.prefix, infill.suffix, infill.middle]);
        }
        argmax.sort_unstable();
        let softmax = if config.family.excludes_mask() { config.mask_id.into_iter().collect() } else { Vec::new() };
        Bans { vocab: config.tokenizer_size as usize, argmax, softmax }
    }

    /// Ranks that share the model.
    pub fn ranks(&self) -> usize {
        self.vocab.ranks
    }

    /// Ids whose head rows a rank of the model's group holds.
    pub fn vocab_share(&self, rank: usize) -> std::ops::Range<usize> {
        VocabShard { rank, ..self.vocab }.ids()
    }

    /// A cache of `pages` pages for the rank's heads.
    pub fn new_kv(&self, pages: usize) -> KvCache {
        KvCache::new(self.config.layers as usize, &self.heads, pages, self.kv_type)
    }

    /// Type of cached keys and values.
    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Bytes of one page of the cache over all layers.
    pub fn page_bytes(&self) -> usize {
        KvCache::page_bytes(self.config.layers as usize, &self.heads, self.kv_type)
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        let layers = self.stages.iter().flat_map(Stage::products);
        let table = if let Embedding::Table(table) = &self.embedding { table.bytes() } else { 0 };
        layers.chain(&self.head).map(Packed::bytes).sum::<usize>() + table
    }

    /// Buffers for steps of up to `rows_max` rows.
    pub fn new_scratch(&self, rows_max: usize) -> Scratch {
        let (hidden, ranks, config) = (self.config.hidden as usize, self.vocab.ranks, &self.config);
        let moe = config.moe.as_ref();
        let widest = config.ffn.max(moe.map_or(0, |moe| moe.shared_ffn)) as usize / ranks;
        let experts = moe.map(|moe| (&moe.router, moe.ffn as usize / ranks));
        Scratch {
            rows_max,
            stream: vec![0.0; rows_max * hidden],
            normed: vec![0.0; rows_max * hidden],
            qkv: vec![0.0; rows_max * self.heads.qkv_width()],
            mixed: vec![0.0; rows_max * self.heads.out_width()],
            ffn: FfnScratch::new(rows_max, hidden, widest, ranks, experts),
            outputs: 0,
        }
    }

    /// One pass of a whole model: `ids` hold one id per row of the table. Keys and values of every row go to the cache;
    /// the rows named by `outputs` (ascending) are left normalised for [`Model::reduce`] and [`Model::logits`].
    ///
    /// # Panics
    /// When ids, rows and buffers do not fit each other: the caller has checked what users send.
    pub fn forward(&self, ids: &[u32], rows: &RowTable<'_>, outputs: &[u32], kv: &mut KvCache, scratch: &mut Scratch) {
        match self.pass(ids, rows, outputs, kv, scratch, &mut Alone) {
            Ok(()) => {}
            Err(never) => match never {},
        }
    }

    /// [`Model::forward`] of one rank of a group, or of a model whose operations are watched.
    ///
    /// # Errors
    /// What the link says when another rank fails; the cache's rows of this pass are then undefined.
    pub fn pass<L: Link>(
        &self,
        ids: &[u32],
        rows: &RowTable<'_>,
        outputs: &[u32],
        kv: &mut KvCache,
        scratch: &mut Scratch,
        link: &mut L,
    ) -> Result<(), L::Error> {
        let count = ids.len();
        assert!(count <= scratch.rows_max && rows.rows.len() == count, "a pass must fit its buffers");
        let within = outputs.last().is_none_or(|&row| (row as usize) < count);
        assert!(within && outputs.is_sorted_by(|a, b| a < b), "outputs must be rows of the pass, ascending");
        let hidden = self.config.hidden as usize;
        self.embed(ids, &mut scratch.stream[..count * hidden], link)?;
        // Rows that still matter: past the last attention only those of the outputs.
        let mut count = count;
        let rows = StepRows { shape: self.heads, rotary: &self.rotary, table: *rows, outputs };
        for stage in &self.stages {
            match stage {
                Stage::Halves(halves) => {
                    let apart = self.vocab.ranks > 1 || link.watches();
                    for halves in halves.chunks(if apart { 1 } else { halves.len() }) {
                        count = self.add_halves(halves, &rows, count, kv, scratch, link)?;
                    }
                }
                Stage::Experts(experts) => {
                    let Scratch { stream, normed, ffn, .. } = scratch;
                    let (stream, normed) = (&mut stream[..count * hidden], &mut normed[..count * hidden]);
                    self.add_routed(experts, normed, stream, ffn, link)?;
                }
            }
        }
        let Scratch { stream, normed, .. } = scratch;
        let (x, out) = (&stream[..count * hidden], &mut normed[..count * hidden]);
        self.cpu.rms_norm(x, &self.norm.weight, self.norm.eps, out);
        link.after(Operation::Norm);
        scratch.outputs = outputs.len();
        Ok(())
    }

    /// Rows of the embedding. Of a tied head each rank holds some ids and adds zero for the others.
    fn embed<L: Link>(&self, ids: &[u32], out: &mut [f32], link: &mut L) -> Result<(), L::Error> {
        match (&self.embedding, &self.head) {
            (Embedding::Table(table), _) => self.cpu.embed(ids, table, out),
            (Embedding::Tied, Some(head)) => self.cpu.embed_tied(ids, head, self.vocab.ids().start as u32, out),
            (Embedding::Tied, None) => out.fill(0.0),
        }
        link.after(Operation::Embed);
        if self.vocab.ranks > 1 && matches!(self.embedding, Embedding::Tied) {
            link.all_reduce(out)?;
            link.after(Operation::AllReduce);
        }
        Ok(())
    }

    /// Adds what halves of layers make of `count` rows; returns how many rows are left.
    fn add_halves<L: Link>(
        &self,
        halves: &[Half],
        rows: &StepRows<'_>,
        count: usize,
        kv: &mut KvCache,
        scratch: &mut Scratch,
        link: &mut L,
    ) -> Result<usize, L::Error> {
        let (hidden, many) = (self.config.hidden as usize, self.vocab.ranks > 1);
        let Scratch { stream, qkv, mixed, ffn: FfnScratch { gated, partial, .. }, .. } = scratch;
        let stream = &mut stream[..count * hidden];
        let partial = &mut partial[..if many { count * hidden } else { 0 }];
        let buffers = StepBuffers { stream, partial: many.then_some(&mut *partial), qkv, mixed, gated };
        let left = self.cpu.halves(halves, rows, kv, buffers);
        link.after(match halves.last() {
            Some(Half::Attention(_)) => Operation::Attention,
            _ => Operation::FeedForward,
        });
        if many {
            add_of_ranks(&mut partial[..left * hidden], &mut stream[..left * hidden], link)?;
        }
        Ok(left)
    }

    /// Reduces the logits of the last pass's outputs to one record each.
    ///
    /// # Panics
    /// The model is not whole: ranks reduce their own part with [`Model::reduce_share`].
    pub fn reduce(&self, scratch: &Scratch, bans: &Bans, draws: &[Draw], records: &mut [Record]) {
        self.cpu.vocab_reduce(self.output_rows(scratch), self.whole_head(), bans, draws, records);
    }

    /// Reduces the rank's part of the logits of the last pass's outputs.
    pub fn reduce_share(&self, scratch: &Scratch, bans: &Bans, draws: &[Draw], partials: &mut [Partial]) {
        let rows = self.output_rows(scratch);
        self.cpu.vocab_partials(rows, self.head.as_ref(), self.vocab, bans, draws, partials);
    }

    /// Raw head rows of the last pass's outputs, (outputs, vocab_rows).
    pub fn logits(&self, scratch: &Scratch, out: &mut [f32]) {
        self.cpu.logits(self.output_rows(scratch), self.whole_head(), out);
    }

    /// Raw head row of one output of the last pass: of a rank the part that it holds.
    pub fn row_logits(&self, scratch: &Scratch, output: usize, out: &mut Vec<f32>) {
        let hidden = self.config.hidden as usize;
        out.resize(self.vocab.ids().len(), 0.0);
        if let Some(head) = &self.head {
            self.cpu.logits(&self.output_rows(scratch)[output * hidden..(output + 1) * hidden], head, out);
        }
    }

    fn whole_head(&self) -> &Packed {
        let head = self.head.as_ref().filter(|_| self.vocab.ranks == 1);
        head.unwrap_or_else(|| unreachable!("one rank of a group has no whole head"))
    }

    fn output_rows<'a>(&self, scratch: &'a Scratch) -> &'a [f32] {
        &scratch.normed[..scratch.outputs * self.config.hidden as usize]
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
