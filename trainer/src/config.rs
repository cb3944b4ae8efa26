//! The mask stage's configuration: the raw form as written in TOML, and the checked form. All errors are reported at
//! once, with the names of the keys.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    model::ModelShape,
    noise::edit::RawEdits,
    ops::Heads,
    optimizer::{Rule, Settings},
    schedule::{Decay, Schedule},
};

/// Largest block.
const BLOCK_MAX: usize = 256;

/// The configuration as written. Unknown keys are errors.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawMaskStage {
    /// Folder of checkpoints, the log and the exported model.
    pub out: PathBuf,
    /// Seed of every random draw.
    #[serde(default)]
    pub seed: u64,
    /// Threads; each runs its own micro-batches. 0: all cores.
    #[serde(default)]
    pub threads: usize,
    /// Steps of this stage.
    pub steps: usize,
    /// Where to start from.
    #[serde(default)]
    pub init: RawInit,
    /// Sizes.
    pub model: RawModel,
    /// What a step sees.
    pub batch: RawBatch,
    /// The second half of the curriculum; absent: masks only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edits: Option<RawEdits>,
    /// The update rule.
    pub optimizer: RawOptimizer,
    /// Held-out loss.
    #[serde(default)]
    pub eval: RawEval,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoint: RawCheckpoint,
    /// Decode defaults written to the exported model.
    #[serde(default)]
    pub decode: RawDecode,
}

/// Where the weights come from.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawInit {
    /// A checkpoint folder: its weights start a new schedule. Absent: fresh weights.
    pub checkpoint: Option<PathBuf>,
}

/// Sizes of the model. The vocabulary's size comes from the tokenizer.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names of config.json")]
pub struct RawModel {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f32,
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
}

fn default_eps() -> f32 {
    1e-6
}

fn default_theta() -> f64 {
    10_000.0
}

fn default_positions() -> usize {
    1024
}

/// What a step sees.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawBatch {
    /// Text tokens per step (rows are twice that, plus filling).
    pub tokens: usize,
    /// Longest document in tokens; longer ones are cut.
    pub length: usize,
    /// Rows per micro-batch.
    #[serde(default = "default_micro_rows")]
    pub micro_rows: usize,
    /// One is drawn per step. None at all: next tokens only, which makes an autoregressive model.
    pub block_sizes: Vec<usize>,
    /// Weight of the next-token loss on the clean half.
    #[serde(default = "default_next_token")]
    pub next_token: f32,
}

fn default_micro_rows() -> usize {
    2048
}

fn default_next_token() -> f32 {
    0.3
}

/// The update rule.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawOptimizer {
    /// `adamw` or `muon`.
    pub rule: Rule,
    /// Largest learning rate.
    pub rate: f64,
    /// Steps of linear warm-up.
    pub warm_up: usize,
    /// `"cosine"` or `{ linear = { share = 0.2 } }`.
    pub decay: Decay,
    /// Final rate as a share of the largest.
    #[serde(default)]
    pub floor: f64,
    /// Decay of the first moment.
    #[serde(default = "default_beta1")]
    pub beta1: f32,
    /// Decay of the second moment.
    #[serde(default = "default_beta2")]
    pub beta2: f32,
    /// Weight decay of matrices.
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f32,
    /// Largest norm of the gradient.
    #[serde(default = "default_clip")]
    pub clip: f32,
    /// Decay of a moving average of the weights, which is then what is measured and exported.
    pub average: Option<f32>,
}

fn default_beta1() -> f32 {
    0.9
}

fn default_beta2() -> f32 {
    0.95
}

fn default_weight_decay() -> f32 {
    0.1
}

fn default_clip() -> f32 {
    1.0
}

/// Held-out loss.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawEval {
    /// Steps between measurements.
    pub every: usize,
    /// Held-out documents per measurement.
    pub documents: usize,
}

impl Default for RawEval {
    fn default() -> RawEval {
        RawEval { every: 200, documents: 24 }
    }
}

/// Checkpoints.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawCheckpoint {
    /// Steps between checkpoints.
    pub every: usize,
    /// How many are kept.
    pub keep: usize,
}

impl Default for RawCheckpoint {
    fn default() -> RawCheckpoint {
        RawCheckpoint { every: 100, keep: 2 }
    }
}

/// Decode defaults of the exported model.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RawDecode {
    /// Block size.
    pub block_size: usize,
    /// Confidence threshold.
    pub tau: f64,
    /// Longest answer in tokens.
    pub max_tokens: usize,
    /// Masks draft so far ahead and causal rows decide: a draft must then be right with probability `tau`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub self_speculative: bool,
    /// The model spells a prompt's last word itself, where causal rows decide.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub heal: bool,
}

impl Default for RawDecode {
    fn default() -> RawDecode {
        RawDecode { block_size: 16, tau: 0.9, max_tokens: 256, self_speculative: false, heal: false }
    }
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct MaskStage {
    /// As written.
    pub raw: RawMaskStage,
    /// Threads, at least one.
    pub threads: usize,
    /// The learning rates, one schedule for each part of the curriculum with its first step.
    schedules: Vec<(usize, Schedule)>,
    /// Constants of the update.
    pub settings: Settings,
}

/// Texts of the conditions that do not hold.
fn failed<const N: usize>(conditions: [(bool, String); N]) -> Vec<String> {
    conditions.into_iter().filter(|(holds, _)| !holds).map(|(_, text)| text).collect()
}

impl RawMaskStage {
    /// Checks everything.
    ///
    /// # Errors
    /// All problems, one per line, each beginning with its key.
    pub fn validate(self) -> anyhow::Result<MaskStage> {
        let mut problems = self.wrong_sizes();
        problems.extend(self.wrong_model());
        problems.extend(self.wrong_batch());
        problems.extend(self.wrong_edits());
        problems.extend(self.wrong_optimizer());
        anyhow::ensure!(problems.is_empty(), "the configuration has errors:\n  {}", problems.join("\n  "));
        let o = &self.optimizer;
        let schedules = self.schedules();
        let settings = Settings {
            rule: o.rule,
            beta1: o.beta1,
            beta2: o.beta2,
            eps: 1e-8,
            weight_decay: o.weight_decay,
            clip: o.clip,
            average: o.average,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if self.threads == 0 { cores } else { self.threads };
        Ok(MaskStage { raw: self, threads, schedules, settings })
    }

    /// Masks, then edits: each part warms up, holds and decays, for what the second learns would undo the first at its rate.
    fn schedules(&self) -> Vec<(usize, Schedule)> {
        let o = &self.optimizer;
        let first = self.edits.as_ref().map_or(self.steps, |edits| edits.first(self.steps));
        let part = |from: usize, to: usize, peak, warm_up| {
            (from, Schedule { peak, warm_up, steps: to - from, decay: o.decay, floor: o.floor })
        };
        let masks = part(0, first, o.rate, o.warm_up);
        let edits = self
            .edits
            .as_ref()
            .map(|edits| part(first, self.steps, edits.rate.unwrap_or(o.rate), edits.warm_up.unwrap_or(o.warm_up)));
        [masks].into_iter().chain(edits).filter(|(_, schedule)| schedule.steps > 0).collect()
    }

    /// Checks a stage that goes on from a model, together with the `problems` of its own settings.
    ///
    /// # Errors
    /// All problems, one per line, each beginning with its key.
    pub fn validate_later(self, mut problems: Vec<String>) -> anyhow::Result<MaskStage> {
        if self.init.checkpoint.is_none() {
            problems.push("stage.init.checkpoint: this stage needs a model to start from".into());
        }
        if self.batch.block_sizes.is_empty() {
            problems.push("stage.batch.block_sizes: this stage needs at least one".into());
        }
        let stage = self.validate();
        if let Err(error) = &stage {
            problems.push(error.to_string());
        }
        anyhow::ensure!(problems.is_empty(), "{}", problems.join("\n"));
        stage
    }

    fn wrong_sizes(&self) -> Vec<String> {
        let sizes = [
            ("steps", self.steps),
            ("model.hidden_size", self.model.hidden_size),
            ("model.intermediate_size", self.model.intermediate_size),
            ("model.num_hidden_layers", self.model.num_hidden_layers),
            ("model.num_attention_heads", self.model.num_attention_heads),
            ("model.num_key_value_heads", self.model.num_key_value_heads),
            ("batch.tokens", self.batch.tokens),
            ("batch.length", self.batch.length),
            ("batch.micro_rows", self.batch.micro_rows),
            ("eval.every", self.eval.every),
            ("eval.documents", self.eval.documents),
            ("checkpoint.every", self.checkpoint.every),
            ("checkpoint.keep", self.checkpoint.keep),
            ("decode.max_tokens", self.decode.max_tokens),
        ];
        let wrong = sizes.into_iter().filter(|(_, value)| *value == 0);
        wrong.map(|(key, _)| format!("{key}: must be at least 1")).collect()
    }

    fn wrong_model(&self) -> Vec<String> {
        let RawModel { head_dim, num_attention_heads: heads, num_key_value_heads: kv_heads, .. } = self.model;
        failed([
            (
                head_dim > 0 && head_dim.is_multiple_of(2),
                format!("model.head_dim: must be even and at least 2, not {head_dim}"),
            ),
            (
                kv_heads > 0 && heads.is_multiple_of(kv_heads),
                format!("model.num_key_value_heads: {kv_heads} must divide num_attention_heads {heads}"),
            ),
            (self.model.rms_norm_eps > 0.0, "model.rms_norm_eps: must be positive".into()),
            (self.model.rope_theta > 1.0, "model.rope_theta: must be above 1".into()),
        ])
    }

    fn wrong_batch(&self) -> Vec<String> {
        let sizes = &self.batch.block_sizes;
        let good = sizes.iter().all(|&b| b.is_power_of_two() && (2..=BLOCK_MAX).contains(&b));
        let autoregressive = sizes.is_empty();
        let longest = self.batch.length.next_multiple_of(sizes.iter().copied().max().unwrap_or(1).max(1));
        let positions = self.model.max_position_embeddings;
        let (block, tau, lambda) = (self.decode.block_size, self.decode.tau, self.batch.next_token);
        failed([
            (good, format!("batch.block_sizes: powers of two from 2 to {BLOCK_MAX}, not {sizes:?}")),
            (
                longest <= positions,
                format!("batch.length: {longest} with filling exceeds model.max_position_embeddings {positions}"),
            ),
            (
                autoregressive || sizes.contains(&block),
                format!("decode.block_size: {block} is not in batch.block_sizes"),
            ),
            (!autoregressive || lambda > 0.0, "batch.next_token: must be positive where block_sizes is empty".into()),
            (!autoregressive || self.edits.is_none(), "edits: need at least one of batch.block_sizes".into()),
            (tau > 0.0 && tau <= 1.0, format!("decode.tau: must be in (0, 1], not {tau}")),
            ((0.0..=10.0).contains(&lambda), format!("batch.next_token: must be in [0, 10], not {lambda}")),
        ])
    }

    fn wrong_edits(&self) -> Vec<String> {
        let Some(edits) = &self.edits else { return Vec::new() };
        let shares = [("share", edits.share), ("alpha", edits.alpha), ("masked", edits.masked)];
        let wrong = shares.into_iter().filter(|(_, value)| !(0.0..=1.0).contains(value));
        let mut problems: Vec<String> =
            wrong.map(|(key, value)| format!("edits.{key}: must be in [0, 1], not {value}")).collect();
        if edits.rate.is_some_and(|rate| !(rate > 0.0 && rate < 1.0)) {
            problems.push(format!("edits.rate: must be in (0, 1), not {:?}", edits.rate.unwrap_or_default()));
        }
        if edits.warm_up.is_some_and(|steps| steps > self.steps) {
            problems.push(format!("edits.warm_up: exceeds steps {}", self.steps));
        }
        problems
    }

    fn wrong_optimizer(&self) -> Vec<String> {
        let o = &self.optimizer;
        let share = match o.decay {
            Decay::Linear { share } => share,
            Decay::Cosine => 1.0,
        };
        failed([
            (o.rate > 0.0 && o.rate < 1.0, format!("optimizer.rate: must be in (0, 1), not {}", o.rate)),
            (o.warm_up <= self.steps, format!("optimizer.warm_up: {} exceeds steps {}", o.warm_up, self.steps)),
            ((0.0..=1.0).contains(&o.floor), format!("optimizer.floor: must be in [0, 1], not {}", o.floor)),
            ((0.0..1.0).contains(&o.beta1), format!("optimizer.beta1: must be in [0, 1), not {}", o.beta1)),
            ((0.0..1.0).contains(&o.beta2), format!("optimizer.beta2: must be in [0, 1), not {}", o.beta2)),
            (o.weight_decay >= 0.0, "optimizer.weight_decay: must not be negative".into()),
            (o.clip > 0.0, "optimizer.clip: must be positive".into()),
            (o.average.is_none_or(|d| (0.0..1.0).contains(&d)), "optimizer.average: must be in [0, 1)".into()),
            (share > 0.0 && share <= 1.0, format!("optimizer.decay.linear.share: must be in (0, 1], not {share}")),
        ])
    }
}

impl MaskStage {
    /// Learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        let part = self.schedules.iter().rfind(|(first, _)| *first <= step);
        part.map_or(0.0, |(first, schedule)| schedule.rate(step - first))
    }

    /// The model's sizes for a vocabulary of `vocabulary` tokens.
    pub fn shape(&self, vocabulary: usize) -> ModelShape {
        let model = &self.raw.model;
        ModelShape {
            hidden: model.hidden_size,
            inner: model.intermediate_size,
            layers: model.num_hidden_layers,
            heads: Heads {
                heads: model.num_attention_heads,
                kv_heads: model.num_key_value_heads,
                head_dim: model.head_dim,
            },
            vocabulary,
            eps: model.rms_norm_eps,
            theta: model.rope_theta,
            positions: model.max_position_embeddings,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    const GOOD: &str = r#"
        out = "run"
        steps = 10
        [model]
        hidden_size = 64
        intermediate_size = 128
        num_hidden_layers = 2
        num_attention_heads = 4
        num_key_value_heads = 2
        head_dim = 16
        [batch]
        tokens = 256
        length = 64
        block_sizes = [4, 16]
        [optimizer]
        rule = "adamw"
        rate = 1e-3
        warm_up = 2
        decay = { linear = { share = 0.2 } }
    "#;

    #[test]
    fn reads_and_checks() {
        let raw: RawMaskStage = toml::from_str(GOOD).unwrap();
        let stage = raw.validate().unwrap();
        assert_eq!(stage.shape(100).heads.width(), 128);
        assert!(toml::from_str::<RawMaskStage>(&GOOD.replace("tokens", "tokns")).is_err());
    }

    #[test]
    fn each_part_of_the_curriculum_has_its_rates() {
        let stage = |edits: &str| {
            let raw: RawMaskStage = toml::from_str(&GOOD.replace("[model]", &format!("{edits}\n[model]"))).unwrap();
            raw.validate().map_err(|error| error.to_string())
        };
        let rates = |edits: &str| -> Vec<f64> {
            let stage = stage(edits).unwrap();
            (0..10).map(|step| (stage.rate(step) * 1e6).round()).collect()
        };
        let alone = rates("");
        assert_eq!(alone, [500.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0, 500.0]);
        assert_eq!(rates("edits = { share = 1.0 }"), alone);
        let both = rates("edits = { share = 0.5, rate = 1e-4, warm_up = 4 }");
        assert_eq!(both, [500.0, 1000.0, 1000.0, 1000.0, 1000.0, 25.0, 50.0, 75.0, 100.0, 100.0]);
        let error = stage("edits = { share = 2.0, rate = 1.5, warm_up = 99 }").unwrap_err();
        assert!(["edits.share", "edits.rate", "edits.warm_up"].iter().all(|key| error.contains(key)), "{error}");
    }

    #[test]
    fn without_block_sizes_it_is_autoregressive() {
        let text = GOOD.replace("[4, 16]", "[]");
        let raw: RawMaskStage = toml::from_str(&text).unwrap();
        assert!(raw.clone().validate().is_ok());
        assert!(raw.validate_later(Vec::new()).unwrap_err().to_string().contains("block_sizes"));
        let silent = text.replace("block_sizes", "next_token = 0.0\nblock_sizes");
        let error = toml::from_str::<RawMaskStage>(&silent).unwrap().validate().unwrap_err().to_string();
        assert!(error.contains("batch.next_token"), "{error}");
    }

    #[test]
    fn names_every_wrong_key() {
        let text = GOOD.replace("head_dim = 16", "head_dim = 15").replace("[4, 16]", "[5]").replace("1e-3", "2.0");
        let error = toml::from_str::<RawMaskStage>(&text).unwrap().validate().unwrap_err().to_string();
        for key in ["model.head_dim", "batch.block_sizes", "optimizer.rate", "decode.block_size"] {
            assert!(error.contains(key), "{key} in {error}");
        }
    }
}
