//! What the command line runs: each stage from one TOML file.

use crate::checkpoint::{self, Vocabulary};
use crate::config::RawMaskStage;
use crate::data::{Mixture, MixtureConfig, bpe, corpus};
use crate::model::Model;
use crate::noise;
use crate::repair::{Repair, repair};
use crate::stage_mask::train_mask;
use crate::stage_on_policy::{OnPolicyStage, RawOnPolicy, train_on_policy};
use crate::stage_order::{OrderStage, RawOrder, train_order};
use crate::stream::{Purpose, encode, generator};
use crate::tasks::{Part, Tasks, verify};
use crate::training::{Sources, Summary};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Tasks verified at once.
const VERIFY_BATCH: u64 = 500;

/// Trains a tokenizer.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerStage {
    /// Folder to write.
    pub out: PathBuf,
    /// Ids.
    pub vocabulary: usize,
    /// Seed of the generated tasks.
    pub seed: u64,
    /// Generated tasks to read.
    pub tasks: u64,
    /// Real code to read too, JSONL or a folder of Python.
    #[serde(default)]
    pub real: Option<PathBuf>,
}

/// The mask stage and its data.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MaskRun {
    /// Documents.
    pub data: MixtureConfig,
    /// The stage.
    pub stage: RawMaskStage,
}

/// Constrained-order training and its data.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct OrderRun {
    /// Documents.
    pub data: MixtureConfig,
    /// Orders.
    pub order: RawOrder,
    /// Training.
    pub stage: RawMaskStage,
}

/// On-policy training and its data.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct OnPolicyRun {
    /// Documents of the replay share, and the tokenizer.
    pub data: MixtureConfig,
    /// Rollouts.
    pub on_policy: RawOnPolicy,
    /// Training.
    pub stage: RawMaskStage,
}

/// Reads a TOML file.
///
/// # Errors
/// The file cannot be read, or a key is unknown, missing or malformed (with its line).
pub fn read<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

/// Runs [`TokenizerStage`].
///
/// # Errors
/// As [`bpe::train`] and [`corpus::read`].
pub fn tokenizer(stage: &TokenizerStage) -> anyhow::Result<()> {
    let tasks = Tasks::new()?;
    let mut texts: Vec<String> =
        (0..stage.tasks).map(|i| tasks.draw(stage.seed, Part::Training, i).program()).collect();
    if let Some(real) = &stage.real {
        texts.extend(corpus::read(real, &["py"])?.into_iter().map(|document| document.text));
    }
    bpe::train(&texts, stage.vocabulary, &stage.out)
}

/// Writes `count` verified tasks of `part` as JSON lines in HumanEval's format.
///
/// # Errors
/// Python cannot be run, or the file cannot be written.
pub fn write_tasks(out: &Path, seed: u64, part: Part, count: u64) -> anyhow::Result<u64> {
    let tasks = Tasks::new()?;
    let mut file = std::io::BufWriter::new(std::fs::File::create(out).with_context(|| out.display().to_string())?);
    let mut written = 0;
    for first in (0..count).step_by(VERIFY_BATCH as usize) {
        let drawn: Vec<_> = (first..count.min(first + VERIFY_BATCH)).map(|i| tasks.draw(seed, part, i)).collect();
        for task in verify::with_expected_results(&drawn)? {
            serde_json::to_writer(&mut file, &task)?;
            file.write_all(b"\n")?;
            written += 1;
        }
    }
    file.flush()?;
    Ok(written)
}

/// Runs [`MaskRun`].
///
/// # Errors
/// The configuration's problems, all at once; files; training.
pub fn mask(run: MaskRun) -> anyhow::Result<Summary> {
    let stage = run.stage.validate()?;
    with_sources(&run.data, |sources| train_mask(&stage, sources))
}

/// Runs [`OrderRun`].
///
/// # Errors
/// As [`mask`].
pub fn order(run: OrderRun) -> anyhow::Result<Summary> {
    let stage = OrderStage::new(run.order, run.stage)?;
    with_sources(&run.data, |sources| train_order(&stage, sources))
}

/// Runs [`OnPolicyRun`].
///
/// # Errors
/// As [`mask`].
pub fn on_policy(run: OnPolicyRun) -> anyhow::Result<Summary> {
    let stage = OnPolicyStage::new(run.on_policy, run.stage)?;
    with_sources(&run.data, |sources| train_on_policy(&stage, sources))
}

/// How a model folder judges visible tokens: `documents` held-out programs with `share` edits per token, per block size
/// of `block_sizes`. The same seed corrupts them the same way for every model with this tokenizer.
///
/// # Errors
/// Files of the folder.
pub fn repair_rates(
    folder: &Path,
    documents: usize,
    block_sizes: &[usize],
    share: f64,
    tau_edit: f32,
) -> anyhow::Result<Vec<Repair>> {
    let shape = checkpoint::read_shape(folder)?;
    let vocabulary = Vocabulary::standard(shape.vocabulary);
    let model = Model::new(shape.clone(), &checkpoint::read_weights(&shape, folder)?, vocabulary.mask)?;
    let data = MixtureConfig::plain(folder.join("tokenizer.json"), documents);
    let mixture = Mixture::open(&data, Part::HeldOut)?;
    let rates = |&block: &usize| {
        let mut rng = generator(0, Purpose::HeldOut, block as u64);
        let filled = |index| noise::fill(encode(&mixture, index, shape.positions / 2, &mut rng), block, vocabulary.end);
        let documents: Vec<_> = (0..documents).map(filled).collect();
        repair(&model, documents, block, share, tau_edit, &mut generator(1, Purpose::HeldOut, block as u64))
    };
    block_sizes.iter().map(rates).collect()
}

fn with_sources(
    data: &MixtureConfig,
    train_on: impl FnOnce(Sources<'_>) -> anyhow::Result<Summary>,
) -> anyhow::Result<Summary> {
    let train = Mixture::open(data, Part::Training)?;
    let held_out = Mixture::open(data, Part::HeldOut)?;
    let folder = data.tokenizer.parent().context("tokenizer: has no folder")?;
    let vocabulary = Vocabulary::standard(train.vocabulary());
    train_on(Sources { train: &train, held_out: &held_out, vocabulary: &vocabulary, tokenizer: folder })
}
