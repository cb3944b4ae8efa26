//! A model at the size of another: zeros fill what is added, so that it computes what the small one computes, in the time
//! that the large one takes. Measures speed at a size of which no trained weights are at hand.
//!
//! A padded width divides the mean square under a norm, so its weights shrink by the root of the share; a padded head keeps
//! its rotary angles where pair `i` of `d / 2` becomes pair `i d' / d`, and its scores where the norm of queries makes up
//! for the scale; keys and values of a head are there once for each group of queries that fits the larger model's.

use super::quants;
use super::tensors::{Target, Tensor};
use super::{Summary, decimal, write_json};
use crate::bench::shapes::Sizes;
use anyhow::{Context, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::tensor::{Dtype, TensorView, View};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use unmask_engine::model::weights::Weights;
use unmask_engine::model::{ModelConfig, Overrides};

/// Files that a folder keeps as they are.
const KEPT_FILES: [&str; 2] = ["tokenizer.json", "tokenizer_config.json"];

/// A dimension of a tensor, by what it counts.
#[derive(Debug, Clone, Copy)]
enum Axis {
    Hidden,
    Ffn,
    Vocab,
    /// Positions in a head.
    Head,
    /// Heads of queries, and positions in each.
    Queries,
    /// The same of keys and values.
    Keys,
}

/// From one size to another.
#[derive(Debug, Clone, Copy)]
struct Padding {
    from: Sizes,
    to: Sizes,
}

/// Writes the model in `dir` into the empty folder `out`, at the size `to`.
///
/// # Errors
/// The model has other layers than Qwen3's or does not fit into that size; a file cannot be read or written.
pub fn write_padded(dir: &Path, to: Sizes, out: &Path) -> anyhow::Result<Summary> {
    let config = ModelConfig::load(dir, &Overrides::default())?;
    let ModelConfig { hidden, ffn, layers, heads, vocab_rows: vocab, .. } = config;
    let padding = Padding { from: Sizes { hidden, ffn, layers, heads, vocab }, to };
    let plain = config.qk_norm && config.moe.is_none() && config.tied && !config.qkv_bias;
    ensure!(plain, "{} has other layers than Qwen3's, or a head of its own: it cannot be padded", config.name);
    padding.check()?;
    let weights = Weights::open(dir)?;
    weights.check(&config)?;
    let views = weights.tensors()?;
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template("weights {wide_bar} {bytes}/{total_bytes}")?);
    let tensors = padding.tensors(&views, &bar)?;
    bar.set_length(tensors.iter().map(|(_, padded)| padded.data_len() as u64).sum());
    let parameters: usize = tensors.iter().map(|(_, padded)| padded.shape.iter().product::<usize>()).sum();
    let mut stored = BTreeMap::new();
    for (_, padded) in &tensors {
        *stored.entry(quants::name(padded.target.kind())).or_default() += 1;
    }
    let summary = Summary {
        architecture: config.architecture,
        parameters,
        tensors: tensors.len(),
        stored,
        bytes: tensors.iter().map(|(_, padded)| padded.data_len()).sum(),
    };
    let file = out.join("model.safetensors");
    safetensors::serialize_to_file(tensors, Some([("format".to_owned(), "pt".to_owned())].into()), &file)
        .with_context(|| format!("cannot write {}", file.display()))?;
    bar.finish_and_clear();
    let raw = std::fs::read(dir.join("config.json")).context("config.json")?;
    write_json(&out.join("config.json"), &padding.config(serde_json::from_slice(&raw)?, config.rms_eps))?;
    for name in KEPT_FILES.into_iter().filter(|name| dir.join(name).exists()) {
        std::fs::copy(dir.join(name), out.join(name)).with_context(|| format!("cannot copy {name}"))?;
    }
    let written = ModelConfig::load(out, &Overrides::default())?;
    Weights::open(out)?.check(&written)?;
    Ok(summary)
}

impl Padding {
    fn check(&self) -> anyhow::Result<()> {
        let Padding { from, to } = self;
        let keys = |heads: usize| heads as u32;
        let sizes = [
            ("hidden_size", from.hidden, to.hidden),
            ("intermediate_size", from.ffn, to.ffn),
            ("num_hidden_layers", from.layers, to.layers),
            ("vocab_size", from.vocab, to.vocab),
            (
                "num_key_value_heads, one per group of queries,",
                keys(from.heads.kv_heads * self.copies()),
                keys(to.heads.kv_heads),
            ),
        ];
        let mut problems: Vec<String> = sizes
            .iter()
            .filter(|(_, from, to)| from > to)
            .map(|(key, from, to)| format!("{key} would fall from {from} to {to}"))
            .collect();
        if !to.heads.head_dim.is_multiple_of(from.heads.head_dim) {
            let [from, to] = [from, to].map(|sizes| sizes.heads.head_dim);
            problems.push(format!("head_dim: {to} is no multiple of {from}"));
        }
        ensure!(problems.is_empty(), "the model does not fit: {}", problems.join("; "));
        Ok(())
    }

    /// How many times keys and values of a head must be there.
    fn copies(&self) -> usize {
        self.from.heads.group().div_ceil(self.to.heads.group())
    }

    fn tensors<'a>(
        &self,
        views: &BTreeMap<String, TensorView<'a>>,
        bar: &'a ProgressBar,
    ) -> anyhow::Result<Vec<(String, Padded<'a>)>> {
        use Axis::{Ffn, Head, Hidden, Keys, Queries, Vocab};
        let width = (self.from.hidden as f32 / self.to.hidden as f32).sqrt();
        let head = (self.from.heads.head_dim as f32 / self.to.heads.head_dim as f32).sqrt();
        let layer: [(&str, &[Axis], f32); 11] = [
            ("input_layernorm", &[Hidden], width),
            ("post_attention_layernorm", &[Hidden], width),
            ("self_attn.q_norm", &[Head], 1.0),
            ("self_attn.k_norm", &[Head], head),
            ("self_attn.q_proj", &[Queries, Hidden], 1.0),
            ("self_attn.k_proj", &[Keys, Hidden], 1.0),
            ("self_attn.v_proj", &[Keys, Hidden], 1.0),
            ("self_attn.o_proj", &[Hidden, Queries], 1.0),
            ("mlp.gate_proj", &[Ffn, Hidden], 1.0),
            ("mlp.up_proj", &[Ffn, Hidden], 1.0),
            ("mlp.down_proj", &[Hidden, Ffn], 1.0),
        ];
        let ends: [(&str, &[Axis], f32); 2] = [("embed_tokens", &[Vocab, Hidden], 1.0), ("norm", &[Hidden], width)];
        let layers = (0..self.to.layers).flat_map(|index| {
            layer.map(|(name, axes, factor)| (format!("model.layers.{index}.{name}.weight"), axes, factor))
        });
        let ends = ends.map(|(name, axes, factor)| (format!("model.{name}.weight"), axes, factor));
        let padded = |(name, axes, factor): (String, &[Axis], f32)| {
            let view = views.get(&name);
            let maps = axes.iter().map(|axis| self.map(*axis)).collect();
            let padded = Padded::new(&name, view, maps, factor, bar)?;
            Ok((name, padded))
        };
        ends.into_iter().chain(layers).map(padded).collect()
    }

    /// For each place of the padded axis the place of the model's that goes there.
    fn map(&self, axis: Axis) -> Vec<Option<usize>> {
        let Padding { from, to } = self;
        let same = |from: u32, to: u32| (0..to as usize).map(|i| (i < from as usize).then_some(i)).collect();
        let heads = |source: &dyn Fn(usize) -> Option<usize>, count: usize| {
            let within = self.map(Axis::Head);
            let place = |head: usize| {
                let from_head = source(head);
                let dim = from.heads.head_dim;
                within.iter().map(move |at| from_head.zip(*at).map(|(head, at)| head * dim + at)).collect::<Vec<_>>()
            };
            (0..count).flat_map(place).collect()
        };
        let group = to.heads.group();
        let key = |head: usize| (head / self.copies() < from.heads.kv_heads).then_some(head / self.copies());
        match axis {
            Axis::Hidden => same(from.hidden, to.hidden),
            Axis::Ffn => same(from.ffn, to.ffn),
            Axis::Vocab => same(from.vocab, to.vocab),
            Axis::Head => {
                let (half, ratio) = (to.heads.head_dim / 2, to.heads.head_dim / from.heads.head_dim);
                let pair = |at: usize| at.is_multiple_of(ratio).then_some(at / ratio);
                (0..2 * half)
                    .map(|at| pair(at % half).map(|pair| at / half * (from.heads.head_dim / 2) + pair))
                    .collect()
            }
            Axis::Keys => heads(&key, to.heads.kv_heads),
            Axis::Queries => {
                let query = |head: usize| {
                    let (copy, within) = (head / group % self.copies(), head % group);
                    let member = copy * group + within;
                    key(head / group)
                        .filter(|_| member < from.heads.group())
                        .map(|key| key * from.heads.group() + member)
                };
                heads(&query, to.heads.heads)
            }
        }
    }

    fn config(&self, mut raw: Value, rms_eps: f32) -> Value {
        let Sizes { hidden, ffn, layers, heads, vocab } = self.to;
        let sizes = [
            ("hidden_size", hidden),
            ("intermediate_size", ffn),
            ("num_hidden_layers", layers),
            ("num_attention_heads", heads.heads as u32),
            ("num_key_value_heads", heads.kv_heads as u32),
            ("head_dim", heads.head_dim as u32),
            ("vocab_size", vocab),
        ];
        for (key, size) in sizes {
            raw[key] = size.into();
        }
        raw["rms_norm_eps"] = decimal(rms_eps * self.from.hidden as f32 / hidden as f32).into();
        raw
    }
}

/// A tensor that is made when its turn comes.
struct Padded<'a> {
    /// All zeros without.
    values: Vec<f32>,
    /// Columns of the values.
    columns: usize,
    shape: Vec<usize>,
    maps: Vec<Vec<Option<usize>>>,
    target: Target,
    bar: &'a ProgressBar,
}

impl<'a> Padded<'a> {
    fn new(
        name: &str,
        view: Option<&TensorView<'_>>,
        maps: Vec<Vec<Option<usize>>>,
        factor: f32,
        bar: &'a ProgressBar,
    ) -> anyhow::Result<Padded<'a>> {
        let shape: Vec<usize> = maps.iter().map(Vec::len).collect();
        // Norms change by a factor that is no power of two: f32 keeps them.
        let target = if shape.len() == 1 { Target::F32 } else { Target::Bf16 };
        let mut values = Vec::new();
        if let Some(view) = view {
            let tensor = Tensor::of_view(name.to_owned(), view)?;
            quants::decode(tensor.kind, tensor.bytes, 0, tensor.values(), &mut values)?;
            values.iter_mut().for_each(|value| *value *= factor);
        }
        let columns = view.and_then(|view| view.shape().last().copied()).unwrap_or(0);
        Ok(Padded { values, columns, shape, maps, target, bar })
    }
}

impl View for Padded<'_> {
    fn dtype(&self) -> Dtype {
        self.target.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bar.inc(self.data_len() as u64);
        let mut out = Vec::with_capacity(self.data_len());
        let one = [Some(0)];
        let (rows, columns) = match &self.maps[..] {
            [rows, columns] => (&rows[..], &columns[..]),
            [columns] => (&one[..], &columns[..]),
            _ => return Cow::Owned(out),
        };
        for row in rows {
            let from = row.and_then(|row| self.values.get(row * self.columns..));
            let value = |column: &Option<usize>| from.zip(*column).and_then(|(from, column)| from.get(column)).copied();
            let row: Vec<f32> = columns.iter().map(|column| value(column).unwrap_or(0.0)).collect();
            self.target.push(&row, &mut out);
        }
        Cow::Owned(out)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.target.width()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::sync::Arc;
    use unmask_engine::{LoadOptions, Model};
    use unmask_kernels::{HeadShape, WeightType};
    use unmask_trainer::measure::{self, Point};
    use unmask_trainer::rollout::{Given, roll_out};
    use unmask_trainer::tasks::{Part, Tasks};

    const HEADS: HeadShape = HeadShape { heads: 8, kv_heads: 4, head_dim: 64 };
    const LARGE: Sizes = Sizes { hidden: 320, ffn: 640, layers: 8, heads: HEADS, vocab: 1200 };

    fn bundled() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/python-tasks-3m")
    }

    #[test]
    fn a_padded_model_writes_what_the_model_writes() {
        let dir = tempfile::tempdir().unwrap();
        write_padded(&bundled(), LARGE, dir.path()).unwrap();
        let tokenizer = measure::tokenizer(dir.path()).unwrap();
        let options = LoadOptions { dtype: WeightType::F32, ..LoadOptions::default() };
        let [small, large] = [&bundled(), dir.path()].map(|dir| Arc::new(Model::load(dir, &options).unwrap()));
        assert_eq!((large.config().layers, large.config().hidden), (8, 320));
        let tasks = Tasks::new().unwrap();
        for point in [Point::of(&small), Point::threshold(8, 0.9)] {
            let given = |i| Given::of(&tasks.draw(3, Part::HeldOut, i).prompt, &tokenizer, &small, point).unwrap();
            let prompts: Vec<Given> = (0..20).map(given).collect();
            let written = [&small, &large].map(|model| {
                let rollouts = roll_out(model, &prompts, point, 8, |_| {}).unwrap().rollouts;
                rollouts.into_iter().map(|rollout| (rollout.answer, rollout.passes)).collect::<Vec<_>>()
            });
            assert_eq!(written[0], written[1]);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_every_size() {
        let dir = tempfile::tempdir().unwrap();
        let heads = HeadShape { heads: 4, kv_heads: 2, head_dim: 48 };
        let error = write_padded(&bundled(), Sizes { hidden: 64, heads, ..LARGE }, dir.path()).unwrap_err().to_string();
        for key in ["hidden_size would fall from 192 to 64", "num_key_value_heads", "head_dim: 48"] {
            assert!(error.contains(key), "{key} in {error}");
        }
    }
}
