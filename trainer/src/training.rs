//! What every stage shares: a model under an optimiser that learns from examples, measures its held-out loss, and goes
//! on from its newest checkpoint. How examples are made is the stage's own.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Context;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::{
    checkpoint::{self, Export, State, Vocabulary, WeightType},
    config::MaskStage,
    data::Documents,
    layout::Example,
    model::{Model, ModelShape},
    noise,
    optimizer::Optimizer,
    progress::{BlockLoss, EvalRecord, StepRecord},
    step::{Losses, Spread, gradients, losses},
    stream::{Purpose, Stream, encode, generator},
};

/// Noise levels of the held-out loss.
const NOISE_BINS: usize = 10;

/// What a stage learns from.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// Training documents.
    pub train: &'a dyn Documents,
    /// Documents to measure on.
    pub held_out: &'a dyn Documents,
    /// Token ids.
    pub vocabulary: &'a Vocabulary,
    /// Folder with `tokenizer.json` and `tokenizer_config.json`, copied to the checkpoints.
    pub tokenizer: &'a Path,
}

/// What a finished stage reports.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The exported model (bf16).
    pub model: PathBuf,
    /// Steps done, those before a resume included.
    pub steps: usize,
    /// Text tokens seen.
    pub tokens: u64,
    /// The last measurement.
    pub eval: EvalRecord,
    /// Seconds spent in this run.
    pub seconds: f64,
}

/// A run in progress.
pub(crate) struct Training<'a> {
    config: &'a MaskStage,
    sources: Sources<'a>,
    shape: ModelShape,
    model: Model,
    optimizer: Optimizer,
    /// Training documents in their order.
    pub stream: Stream<'a>,
    /// Progress.
    pub state: State,
    held_out: Vec<Vec<u32>>,
}

impl<'a> Training<'a> {
    /// Begins, or continues from the newest checkpoint in `out`. `own` are the stage's own settings.
    pub fn start(config: &'a MaskStage, sources: Sources<'a>, own: &impl Serialize) -> anyhow::Result<Training<'a>> {
        anyhow::ensure!(!sources.train.is_empty(), "there are no training documents");
        anyhow::ensure!(!sources.held_out.is_empty(), "there are no held-out documents");
        let raw = &config.raw;
        let shape = config.shape(sources.vocabulary.size);
        let weights = match &raw.init.checkpoint {
            Some(dir) => checkpoint::read_weights(&shape, dir).context("init.checkpoint")?,
            None => shape.initial(&mut generator(raw.seed, Purpose::Weights, 0)),
        };
        let mut optimizer = Optimizer::new(&shape, weights, config.settings);
        let digest = checkpoint::digest(config, &(own, sources.train.settings()));
        let state = checkpoint::resume(&raw.out, &shape, &digest, &mut optimizer)?;
        if let Some(state) = &state {
            tracing::info!("continuing after step {} of {}", state.step, raw.out.display());
        }
        let state = state.unwrap_or(State { step: 0, documents: 0, tokens: 0, updates: 0, config: digest });
        let model = Model::new(shape.clone(), &optimizer.weights, sources.vocabulary.mask)?;
        let stream = Stream::new(sources.train, raw.seed, raw.batch.length, state.documents);
        let held_out = (0..raw.eval.documents.min(sources.held_out.len()))
            .map(|i| {
                let mut rng = generator(0, Purpose::HeldOut, i as u64);
                // Spread over the whole set: neighbours tend to be alike.
                let index = i * sources.held_out.len() / raw.eval.documents.min(sources.held_out.len());
                encode(sources.held_out, index, raw.batch.length, &mut rng)
            })
            .collect();
        tracing::info!("{} parameters, {} documents", shape.parameter_count(), sources.train.len());
        Ok(Training { config, sources, shape, model, optimizer, stream, state, held_out })
    }

    /// The model as it is.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How to use the machine.
    pub fn spread(&self) -> Spread {
        Spread { micro_rows: self.config.raw.batch.micro_rows, threads: self.config.threads }
    }

    /// Learns from the examples that `make` makes of documents with about the configured number of tokens, in blocks
    /// of a size drawn for the step.
    pub fn step(
        &mut self,
        make: impl FnOnce(&mut Stream<'a>, usize, &mut ChaCha8Rng) -> Vec<Example>,
    ) -> anyhow::Result<StepRecord> {
        let started = Instant::now();
        let batch = &self.config.raw.batch;
        let step = self.state.step;
        let mut rng = generator(self.config.raw.seed, Purpose::Noise, step as u64);
        let sizes = &batch.block_sizes;
        let block = if sizes.is_empty() { 1 } else { sizes[rng.random_range(0..sizes.len())] };
        let examples = make(&mut self.stream, block, &mut rng);
        let tokens: usize = examples.iter().map(|example| example.length).sum();
        let (gradients, losses) = gradients(&self.model, &examples, batch.next_token, self.spread())?;
        let rate = self.config.rate(step);
        let gradient_norm = self.optimizer.update(&gradients, rate as f32)?;
        anyhow::ensure!(gradient_norm.is_finite(), "the gradient of step {} is not finite", step + 1);
        drop(gradients);
        self.model.set(&self.optimizer.weights)?;
        self.state.step += 1;
        self.state.documents = self.stream.drawn();
        self.state.tokens += tokens as u64;
        self.state.updates = self.optimizer.updates;
        let seconds = started.elapsed().as_secs_f64();
        Ok(StepRecord {
            step: self.state.step,
            mask_loss: losses.noisy_mean(),
            next_loss: losses.next_mean(),
            block_size: block,
            rate,
            gradient_norm,
            tokens: self.state.tokens,
            tokens_per_second: tokens as f64 / seconds,
            gflops: self.operations(&examples, &losses) / seconds / 1e9,
        })
    }

    /// 6 x parameters x rows of a step; the head's parameters count for scored rows only.
    fn operations(&self, examples: &[Example], losses: &Losses) -> f64 {
        let head = (self.shape.vocabulary * self.shape.hidden) as f64;
        let body = self.shape.parameter_count() as f64 - head;
        let rows: usize = examples.iter().map(Example::rows).sum();
        let scored = losses.counts.noisy + losses.counts.next;
        6.0 * (body * rows as f64 + head * scored as f64)
    }

    /// Held-out loss.
    pub fn measure(&self) -> anyhow::Result<EvalRecord> {
        if self.optimizer.average.is_some() {
            self.model.set(self.optimizer.best())?;
        }
        let (mut mask_loss, mut next_loss) = (Vec::new(), 0.0);
        if self.config.raw.batch.block_sizes.is_empty() {
            let clean: Vec<Example> = self.held_out.iter().cloned().map(Example::next_tokens).collect();
            next_loss = losses(&self.model, &clean, self.spread())?.next_mean();
        }
        for &block_size in &self.config.raw.batch.block_sizes {
            let mut by_noise = Vec::with_capacity(NOISE_BINS);
            for bin in 0..NOISE_BINS {
                let found = losses(&self.model, &self.held_out_at(block_size, bin), self.spread())?;
                by_noise.push(found.noisy_mean());
                next_loss = found.next_mean();
            }
            let mean = by_noise.iter().sum::<f64>() / NOISE_BINS as f64;
            mask_loss.push(BlockLoss { block_size, by_noise, mean });
        }
        if self.optimizer.average.is_some() {
            self.model.set(&self.optimizer.weights)?;
        }
        Ok(EvalRecord { step: self.state.step, mask_loss, next_loss })
    }

    fn held_out_at(&self, block: usize, bin: usize) -> Vec<Example> {
        let level = (bin as f32 + 0.5) / NOISE_BINS as f32;
        let vocabulary = self.sources.vocabulary;
        let corrupt = |(index, tokens): (usize, &Vec<u32>)| {
            let filled = noise::fill(tokens.clone(), block, vocabulary.end);
            let levels = vec![level; filled.tokens.len() / block];
            let mut rng = generator(1, Purpose::HeldOut, (index * NOISE_BINS + bin) as u64);
            noise::mask(filled, block, &levels, vocabulary.mask, &mut rng)
        };
        self.held_out.iter().enumerate().map(corrupt).collect()
    }

    /// What a model folder is made from.
    fn parts(&self) -> Export<'_> {
        Export {
            shape: &self.shape,
            vocabulary: self.sources.vocabulary,
            block_sizes: &self.config.raw.batch.block_sizes,
            edits: self.config.raw.edits.is_some(),
            decode: &self.config.raw.decode,
            tokenizer: self.sources.tokenizer,
        }
    }

    /// Writes a checkpoint.
    pub fn save(&self) -> anyhow::Result<()> {
        let keep = self.config.raw.checkpoint.keep;
        checkpoint::save(&self.config.raw.out, keep, &self.parts(), &self.optimizer, &self.state).map(drop)
    }

    /// Writes the model as it is served (bf16).
    pub fn export(&self, folder: &Path) -> anyhow::Result<()> {
        self.parts().write(self.optimizer.best(), WeightType::Bf16, folder)
    }

    /// Exports the model to `out/model` and says how the run went.
    pub fn finish(self, eval: EvalRecord, started: Instant) -> anyhow::Result<Summary> {
        self.export(&self.config.raw.out.join("model"))?;
        Ok(self.summary(eval, started))
    }

    /// How the run went; `out/model` is as an earlier export left it.
    pub fn summary(self, eval: EvalRecord, started: Instant) -> Summary {
        let State { step: steps, tokens, .. } = self.state;
        let model = self.config.raw.out.join("model");
        Summary { model, steps, tokens, eval, seconds: started.elapsed().as_secs_f64() }
    }
}
