//! The rule that picks which masked positions to fill (and which filled ones to edit) in a step.
//!
//! A closed set: one pure function each in [`decide`], with no access to cache, batch or model. What the
//! authors of model families do differently is data of the policy ([`Quota`], [`Comparison`], [`Bound`]).

mod decide;
pub mod speculate;

pub use decide::{Candidate, Change, View, decide};

use crate::request::Invalid;
use serde::{Deserialize, Serialize};

/// Most denoise passes that may follow the fall of a block's last mask.
pub const POST_STEPS_MAX: u32 = 64;
/// Most steps of a schedule by time.
pub const STEPS_MAX: u32 = 4096;

/// Which positions to fill in a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Policy {
    /// A fixed number of steps per block; each fills its quota in the given order (LLaDA).
    Fixed {
        /// Steps per block, at least 1.
        steps: u32,
        /// What comes first.
        #[serde(default)]
        order: Order,
        /// What the quotas are split from.
        #[serde(default)]
        quota: Quota,
    },
    /// All with confidence above `tau`, else the best one (Fast-dLLM).
    Threshold {
        /// In (0, 1].
        tau: f32,
        /// Whether confidence equal to `tau` passes.
        #[serde(default)]
        comparison: Comparison,
        /// When set, fewer than the quota of this many steps never fall: the best quota does instead (SDAR).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        quota_steps: Option<u32>,
    },
    /// Longest prefix of descending confidences with c(n) >= 1 - factor/(n+1) (Fast-dLLM, section 3.3).
    Factor {
        /// Above 0; larger is more parallel.
        factor: f32,
        /// Where exactly the last remaining candidate fails, it falls too (the authors' code).
        #[serde(default)]
        last_falls: bool,
    },
    /// Ascending entropy while a running sum stays under `gamma` nats (EB-Sampler, arXiv 2505.24857).
    EntropyBounded {
        /// Nats, at least 0.
        gamma: f32,
        /// Which sum is bounded.
        #[serde(default)]
        bound: Bound,
    },
    /// Per run of masks its best if above `low`, all above `high`, and the best of all (dInfer).
    Hierarchical {
        /// In [0, 1], at most `high`.
        low: f32,
        /// In (0, 1].
        high: f32,
    },
    /// Threshold for masks; filled positions change when another token is likelier than `tau_edit` (LLaDA2.1).
    JointEdit {
        /// In (0, 1].
        tau: f32,
        /// In [0, 1].
        tau_edit: f32,
        /// Passes after the last mask fell, at most [`POST_STEPS_MAX`].
        #[serde(default = "default_post_steps")]
        max_post_steps: u32,
        /// When fewer masks pass than this, the best so many fall; at least 1.
        #[serde(default = "default_at_least")]
        at_least: u32,
    },
    /// Shares of the masks that shrink with a time from 1 to `eps` (Dream): step i fills
    /// `trunc(masks * (1 - t(i+1) / t(i)))` of them, the last step all. A share can be none.
    Timesteps {
        /// Steps per block, at least 1.
        steps: u32,
        /// Time of the last step, in (0, 1).
        eps: f32,
        /// What comes first.
        #[serde(default)]
        order: Order,
        /// When set, steps have equal shares instead; of a share only the best and what reaches this confidence fall, and
        /// the others are added to the next one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tau: Option<f32>,
    },
    /// A block of one with causal reach and shifted rows.
    Autoregressive,
    /// Masks draft, causal rows decide: exactly the tokens of [`Policy::Autoregressive`], several per pass
    /// ([`speculate`]). One pass checks a draft and drafts what follows it, block size positions ahead (self-speculation:
    /// arXiv 2510.04147, 2511.08923).
    SelfSpeculative {
        /// In (0, 1]: so much of a draft is checked as is right as a whole with at least this probability.
        #[serde(default = "default_draft_tau")]
        tau: f32,
    },
}

fn default_draft_tau() -> f32 {
    0.4
}

fn default_post_steps() -> u32 {
    16
}

fn default_at_least() -> u32 {
    1
}

/// Order in which a fixed schedule fills positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Probability of the candidate, high first.
    #[default]
    Confidence,
    /// Probability of the best minus that of the runner-up, high first.
    Margin,
    /// Entropy of the distribution, low first.
    Entropy,
    /// Left to right.
    Sequential,
    /// By a draw that depends on seed and position only.
    Random,
}

/// What a step's quota is split from: `n` positions over `s` steps, the first `n mod s` steps get one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quota {
    /// The masks the block opened with (LLaDA, Stable-DiffCoder).
    #[default]
    Masks,
    /// The block size, also where prompt tokens share the block (SDAR).
    Block,
}

/// Comparison of confidence with the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Comparison {
    /// Confidence must exceed the threshold.
    #[default]
    Strict,
    /// Confidence may equal the threshold (Stable-DiffCoder, Fast-dLLM).
    Inclusive,
}

/// The sum that [`Policy::EntropyBounded`] keeps under its bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Sum of the entropies minus the largest, at most gamma (EB-Sampler).
    #[default]
    AllButLargest,
    /// Sum of the entropies, below gamma (JetEngine, for SDAR).
    Cumulative,
}

impl Policy {
    /// Everything wrong with the policy's numbers; empty when it is valid for blocks of `block_size`.
    pub fn violations(&self, block_size: u32) -> Vec<Invalid> {
        let mut found = Vec::new();
        let mut require = |ok: bool, field: &'static str, message: String| {
            if !ok {
                found.push(Invalid { field: field.into(), message });
            }
        };
        let probability = |x: f32| x > 0.0 && x <= 1.0;
        match *self {
            Policy::Fixed { steps, .. } => require(
                steps >= 1 && steps <= block_size,
                "policy.fixed.steps",
                format!("must be from 1 to the block size {block_size}, is {steps}"),
            ),
            Policy::Threshold { tau, quota_steps, .. } => {
                require(probability(tau), "policy.threshold.tau", format!("must be in (0, 1], is {tau}"));
                require(quota_steps != Some(0), "policy.threshold.quota_steps", "must be at least 1".into());
            }
            Policy::Factor { factor, .. } => require(
                factor > 0.0 && factor.is_finite(),
                "policy.factor.factor",
                format!("must be above 0, is {factor}"),
            ),
            Policy::EntropyBounded { gamma, .. } => require(
                gamma >= 0.0 && gamma.is_finite(),
                "policy.entropy_bounded.gamma",
                format!("must be at least 0 nats, is {gamma}"),
            ),
            Policy::Hierarchical { low, high } => {
                require(probability(high), "policy.hierarchical.high", format!("must be in (0, 1], is {high}"));
                let must = format!("must be from 0 to high ({high}), is {low}");
                require(low >= 0.0 && low <= high, "policy.hierarchical.low", must);
            }
            Policy::Timesteps { steps, eps, tau, .. } => {
                let must = format!("must be from 1 to {STEPS_MAX}, is {steps}");
                require((1..=STEPS_MAX).contains(&steps), "policy.timesteps.steps", must);
                require(eps > 0.0 && eps < 1.0, "policy.timesteps.eps", format!("must be in (0, 1), is {eps}"));
                require(
                    tau.is_none_or(probability),
                    "policy.timesteps.tau",
                    format!("must be in (0, 1], is {}", tau.unwrap_or_default()),
                );
            }
            Policy::JointEdit { tau, tau_edit, max_post_steps, at_least } => {
                require(
                    (1..=block_size).contains(&at_least),
                    "policy.joint_edit.at_least",
                    format!("must be from 1 to the block size {block_size}, is {at_least}"),
                );
                require(probability(tau), "policy.joint_edit.tau", format!("must be in (0, 1], is {tau}"));
                require(
                    (0.0..=1.0).contains(&tau_edit),
                    "policy.joint_edit.tau_edit",
                    format!("must be in [0, 1], is {tau_edit}"),
                );
                require(
                    max_post_steps <= POST_STEPS_MAX,
                    "policy.joint_edit.max_post_steps",
                    format!("must be at most {POST_STEPS_MAX}, is {max_post_steps}"),
                );
            }
            Policy::SelfSpeculative { tau } => {
                require(probability(tau), "policy.self_speculative.tau", format!("must be in (0, 1], is {tau}"));
            }
            Policy::Autoregressive => {}
        }
        found
    }

    /// Whether causal rows say each token, by those before it: there are no blocks to finish.
    pub fn is_causal(&self) -> bool {
        matches!(self, Policy::Autoregressive | Policy::SelfSpeculative { .. })
    }

    /// Whether filled positions may change, so that their rows need the head too.
    pub fn edits(&self) -> bool {
        matches!(self, Policy::JointEdit { .. })
    }

    /// Most denoise passes a block with `masks` masks can take: but for empty shares at least one mask falls in each.
    pub fn step_cap(&self, masks: u32) -> u32 {
        match self {
            Policy::JointEdit { max_post_steps, .. } => masks + max_post_steps + 1,
            Policy::Timesteps { steps, .. } => masks + steps,
            _ => masks,
        }
    }
}
