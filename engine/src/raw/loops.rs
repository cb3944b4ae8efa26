//! The decoding loops of model families' authors: their parameters, under their names, as settings of the engine.

use super::RawError;
use crate::model::Model;
use crate::policy::{Bound, Comparison, Order, Policy, Quota};
use crate::request::{Cache, Ends, Manner, Sampling, Settings};
use serde::{Deserialize, Deserializer};

/// A decoding loop as its authors run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoopKind {
    /// One token per pass, causal.
    Ar,
    /// Blocks in an exact canvas; the end-of-sequence counts when its block is full.
    StableDiffcoder,
    /// Whole blocks; stop tokens count when their block is full.
    Sdar,
    /// Blocks whose first token comes from the row before them, filled in sub-blocks; ended by the first stop token.
    FastDllmV2,
    /// Everything is read at once, blocks are counted from the end of the prompt; nothing stops it.
    Llada,
    /// One block for the whole output.
    Dream,
    /// As LLaDA with a cache, where the first pass of a block fills its first position.
    DreamBlock,
    /// Whole blocks; the end-of-sequence counts when its block is full, or at once.
    Llada2,
    /// The same with edits.
    Llada2Edit,
    /// Our own models: whole blocks, ended by the first settled end-of-sequence.
    Unmask,
}

/// Every loop with its name in reference data.
const LOOPS: [(&str, LoopKind); 10] = [
    ("ar", LoopKind::Ar),
    ("stable_diffcoder", LoopKind::StableDiffcoder),
    ("sdar", LoopKind::Sdar),
    ("fast_dllm_v2", LoopKind::FastDllmV2),
    ("llada", LoopKind::Llada),
    ("dream", LoopKind::Dream),
    ("dream_block", LoopKind::DreamBlock),
    ("llada2", LoopKind::Llada2),
    ("llada2_edit", LoopKind::Llada2Edit),
    ("unmask", LoopKind::Unmask),
];

impl LoopKind {
    /// The loop named `name`, as in reference data.
    pub fn from_name(name: &str) -> Option<Self> {
        LOOPS.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind)
    }

    /// Names of all loops.
    pub fn known() -> String {
        LOOPS.map(|(name, _)| name).join(", ")
    }

    /// The loop a model's authors use.
    pub fn of(model: &Model) -> Self {
        let config = model.config();
        if !config.can_diffuse() {
            return Self::Ar;
        }
        match config.family.name() {
            "stable_diffcoder" => Self::StableDiffcoder,
            "sdar" | "sdar_moe" => Self::Sdar,
            "fast_dllm_v2" => Self::FastDllmV2,
            "llada2_moe" => Self::Llada2,
            "dream" | "coda" | "rnd1" => Self::DreamBlock,
            "llada" | "llada_moe" | "a2d_qwen2" | "a2d_qwen3" => Self::Llada,
            _ => Self::Unmask,
        }
    }
}

/// Parameters of a decode, under the names that the authors' loops use.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    /// Tokens to generate.
    #[serde(alias = "gen_length", alias = "max_new_tokens")]
    pub max_tokens: Option<u32>,
    /// Positions decoded together.
    #[serde(alias = "block_length")]
    pub block_size: Option<u32>,
    /// A policy in its own form; instead of the names below.
    pub policy: Option<Policy>,
    /// Steps: of the whole output (stable_diffcoder) or of a block.
    #[serde(alias = "denoising_steps")]
    pub steps: Option<u32>,
    /// Confidence threshold.
    #[serde(alias = "confidence_threshold")]
    pub threshold: Option<f32>,
    /// Of the longest prefix of confidences.
    pub factor: Option<f32>,
    /// Keys and values kept while a block is open: `none`, `prefix` or `dual`.
    pub cache: Option<String>,
    /// Positions of a block that fall together.
    pub small_block_size: Option<u32>,
    /// Whether a pass computes the sub-block alone where it can.
    pub use_block_cache: Option<bool>,
    /// Dream's order.
    pub alg: Option<String>,
    /// Time of Dream's last step.
    pub eps: Option<f32>,
    /// Fewest tokens of a step (LLaDA2).
    pub minimal_topk: Option<u32>,
    /// Confidence from which a filled position changes.
    pub editing_threshold: Option<f32>,
    /// Passes after the last mask fell.
    pub max_post_steps: Option<u32>,
    /// Masks that fall at least.
    pub num_to_transfer: Option<u32>,
    /// Whether the first settled end-of-sequence ends the output (LLaDA2), or the block it is in (with edits).
    pub eos_early_stop: Option<bool>,
    /// The end-of-sequence never wins.
    pub logits_eos_inf: Option<bool>,
    /// End-of-sequence and end-of-turn win with confidence 0.
    pub confidence_eos_eot_inf: Option<bool>,
    /// LLaDA's end of a turn.
    pub eot_token_id: Option<u32>,
    /// Must be 0.
    pub cfg_scale: Option<f32>,
    /// Must be 0.
    pub alg_temp: Option<f32>,
    /// Bound of the entropy-bounded strategy, nats.
    pub eb_threshold: Option<f32>,
    /// Order of the fixed schedule: `low_confidence`.
    pub remasking: Option<String>,
    /// SDAR's strategy.
    pub remasking_strategy: Option<String>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus, in (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps everything.
    pub top_k: Option<u32>,
    /// Of the draws.
    pub seed: Option<u64>,
    /// `null`: no end-of-sequence.
    #[serde(default, deserialize_with = "present")]
    pub eos_token_id: Option<Option<u32>>,
    /// Tokens that end the output; `null`: none.
    #[serde(default, deserialize_with = "present")]
    pub stop_token_ids: Option<Option<Vec<u32>>>,
    /// The only one of them.
    pub stop_token_id: Option<u32>,
    /// Must be the model's.
    pub mask_token_id: Option<u32>,
    /// Must be the model's.
    pub shift: Option<bool>,
    /// Must be 1.
    pub repetition_penalty: Option<f32>,
    /// Most passes.
    pub nfe_cap: Option<u32>,
}

fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(deserializer).map(Some)
}

/// A loop's parameters, resolved.
pub(super) struct Prepared {
    pub(super) settings: Settings,
    /// Tokens that end the answer, whether or not they end the decode.
    pub(super) stops: Vec<u32>,
    /// A block is never left after its first pass (LLaDA with a cache).
    pub(super) idles: bool,
}

fn bad(message: String) -> RawError {
    RawError::Parameters(message)
}

/// What a loop's parameters stand for, for a prompt of `prompt_len` tokens.
pub(super) fn prepare(model: &Model, kind: LoopKind, p: &Parameters, prompt_len: u32) -> Result<Prepared, RawError> {
    refuse_what_is_fixed(model, p)?;
    let config = model.config();
    let asked = p.max_tokens.unwrap_or(config.decode.max_tokens);
    let block_size = match kind {
        LoopKind::Ar => 1,
        LoopKind::Dream => asked,
        _ => p.block_size.unwrap_or(config.decode.block_size),
    };
    let most = config.open_reach.block_size_max();
    if block_size == 0 || block_size > most {
        return Err(bad(format!("block_size must be from 1 to {most}, is {block_size}")));
    }
    let policy = match p.policy {
        Some(policy) => policy,
        None => policy(kind, p, asked, block_size, config.decode.policy)?,
    };
    let early = p.eos_early_stop.unwrap_or(false);
    let stops = match (&p.stop_token_ids, p.stop_token_id, p.eos_token_id) {
        _ if matches!(kind, LoopKind::Llada | LoopKind::Dream | LoopKind::DreamBlock) => Vec::new(),
        (Some(ids), ..) => ids.clone().unwrap_or_default(),
        (None, Some(id), _) => vec![id],
        (None, None, Some(eos)) => eos.into_iter().collect(),
        (None, None, None) => config.eos_ids.clone(),
    };
    let ends = Ends {
        whole_last_block: kind != LoopKind::StableDiffcoder,
        at_first_stop: match kind {
            LoopKind::Unmask | LoopKind::Ar | LoopKind::FastDllmV2 => true,
            LoopKind::Llada2 => early,
            _ => false,
        },
    };
    let max_tokens = match kind {
        // As many rounds as fit, the first of which fills the block of the prompt's tail; and one token behind them.
        LoopKind::FastDllmV2 => {
            ((prompt_len / block_size + asked / block_size) * block_size + 1).saturating_sub(prompt_len)
        }
        _ => asked,
    };
    let settings = Settings {
        max_tokens,
        block_size,
        policy,
        sampling: Sampling {
            temperature: p.temperature.unwrap_or(0.0),
            top_p: p.top_p.unwrap_or(1.0),
            top_k: p.top_k.unwrap_or(0),
            seed: p.seed.unwrap_or(0),
        },
        // Without the early stop everything is decoded.
        stop_ids: if kind == LoopKind::Llada2Edit && !early { Vec::new() } else { stops.clone() },
        nfe_cap: p.nfe_cap.unwrap_or(0),
        manner: Manner { ends: Some(ends), ..manner(kind, p)? },
    };
    let idles = kind == LoopKind::Llada && settings.manner.cache != Cache::None;
    Ok(Prepared { settings, stops, idles })
}

/// What parameters may only repeat.
fn refuse_what_is_fixed(model: &Model, p: &Parameters) -> Result<(), RawError> {
    let config = model.config();
    if let Some(mask) = p.mask_token_id.filter(|&mask| config.mask_id != Some(mask)) {
        return Err(bad(format!(
            "mask_token_id {mask} is not the model's ({:?}): override it at load",
            config.mask_id
        )));
    }
    if p.shift.is_some_and(|shift| shift != config.shift) {
        return Err(bad(format!("shift must be {}, the model's", config.shift)));
    }
    for (name, value, only) in [
        ("repetition_penalty", p.repetition_penalty, 1.0),
        ("cfg_scale", p.cfg_scale, 0.0),
        ("alg_temp", p.alg_temp, 0.0),
    ] {
        if value.is_some_and(|value| value != only) {
            return Err(bad(format!("{name} must be {only}: other values are not supported")));
        }
    }
    match p.remasking.as_deref().filter(|order| *order != "low_confidence") {
        Some(order) => Err(bad(format!("remasking {order:?} is unknown: known is low_confidence"))),
        None => Ok(()),
    }
}

/// What a loop does beside its policy.
fn manner(kind: LoopKind, p: &Parameters) -> Result<Manner, RawError> {
    let cache = match (kind, p.cache.as_deref()) {
        (LoopKind::FastDllmV2, _) if p.use_block_cache == Some(true) => Cache::Dual,
        (_, None | Some("none")) => Cache::None,
        (_, Some("prefix")) => Cache::Prefix,
        (_, Some("dual")) => Cache::Dual,
        (_, Some(other)) => return Err(bad(format!("cache {other:?} is unknown: known are none, prefix, dual"))),
    };
    let (eos, eot) = (p.eos_token_id.flatten(), p.eot_token_id);
    let suppress: Vec<u32> = match (p.logits_eos_inf, p.confidence_eos_eot_inf) {
        (Some(true), Some(true)) => {
            return Err(bad("logits_eos_inf and confidence_eos_eot_inf exclude each other".into()));
        }
        (Some(true), _) => eos.into_iter().collect(),
        (_, Some(true)) => eos.into_iter().chain(eot).collect(),
        _ => Vec::new(),
    };
    let suppressed_win = p.confidence_eos_eot_inf == Some(true);
    let sub_block = Some(p.small_block_size.unwrap_or(0));
    Ok(Manner { cache, suppress, suppressed_win, sub_block, ends: None })
}

/// The policy that a loop's own parameter names stand for.
fn policy(
    kind: LoopKind,
    p: &Parameters,
    max_tokens: u32,
    block_size: u32,
    default: Policy,
) -> Result<Policy, RawError> {
    let inclusive = |tau| Policy::Threshold { tau, comparison: Comparison::Inclusive, quota_steps: None };
    let share = |steps: u32| (steps / (max_tokens / block_size).max(1)).clamp(1, block_size);
    Ok(match kind {
        LoopKind::Ar => Policy::Autoregressive,
        LoopKind::StableDiffcoder => match (p.threshold, p.steps) {
            (Some(tau), _) => inclusive(tau),
            (None, Some(steps)) => Policy::Fixed { steps: share(steps), order: Order::Confidence, quota: Quota::Masks },
            (None, None) => default,
        },
        LoopKind::Llada => match (p.factor, p.threshold, p.steps) {
            (Some(factor), ..) => Policy::Factor { factor, last_falls: true },
            (None, Some(tau), _) => inclusive(tau),
            (None, None, Some(steps)) => {
                Policy::Fixed { steps: share(steps), order: Order::Confidence, quota: Quota::Block }
            }
            (None, None, None) => default,
        },
        LoopKind::DreamBlock => p.threshold.map_or(default, inclusive),
        LoopKind::Dream => dream(p)?,
        LoopKind::Sdar => sdar(p, block_size, default)?,
        LoopKind::Llada2 => {
            let most = (max_tokens / p.minimal_topk.unwrap_or(1).max(1)).max(1);
            Policy::Threshold {
                tau: p.threshold.unwrap_or(0.95),
                comparison: Comparison::Strict,
                quota_steps: Some(p.steps.unwrap_or(block_size).min(most)),
            }
        }
        LoopKind::Llada2Edit => Policy::JointEdit {
            tau: p.threshold.unwrap_or(0.7),
            tau_edit: p.editing_threshold.unwrap_or(0.5),
            max_post_steps: p.max_post_steps.unwrap_or(16),
            at_least: p.num_to_transfer.unwrap_or(1),
        },
        LoopKind::FastDllmV2 | LoopKind::Unmask => generic(p, block_size, default),
    })
}

fn dream(p: &Parameters) -> Result<Policy, RawError> {
    let (order, tau) = match p.alg.as_deref() {
        Some("entropy") => (Order::Entropy, None),
        Some("maskgit_plus") => (Order::Confidence, None),
        Some("topk_margin") => (Order::Margin, None),
        Some("confidence_threshold") => {
            (Order::Confidence, Some(p.threshold.ok_or_else(|| bad("threshold is missing".into()))?))
        }
        other => {
            let known = "entropy, maskgit_plus, topk_margin, confidence_threshold";
            return Err(bad(format!("alg {:?} is unknown: known are {known}", other.unwrap_or("(none)"))));
        }
    };
    Ok(Policy::Timesteps { steps: p.steps.unwrap_or(512), eps: p.eps.unwrap_or(1e-3), order, tau })
}

fn sdar(p: &Parameters, block_size: u32, default: Policy) -> Result<Policy, RawError> {
    let needed = |name: &str| bad(format!("{name} is missing"));
    let steps = p.steps.unwrap_or(block_size).clamp(1, block_size);
    Ok(match p.remasking_strategy.as_deref() {
        Some("low_confidence_static") => Policy::Fixed { steps, order: Order::Confidence, quota: Quota::Block },
        Some("sequential") => Policy::Fixed { steps, order: Order::Sequential, quota: Quota::Block },
        Some("low_confidence_dynamic") => Policy::Threshold {
            tau: p.threshold.ok_or_else(|| needed("confidence_threshold"))?,
            comparison: Comparison::Strict,
            quota_steps: Some(steps),
        },
        Some("entropy_bounded") => Policy::EntropyBounded {
            gamma: p.eb_threshold.ok_or_else(|| needed("eb_threshold"))?,
            bound: Bound::Cumulative,
        },
        Some(other) => {
            return Err(bad(format!(
                "remasking_strategy {other:?} is unknown: known are low_confidence_static, low_confidence_dynamic, \
                 sequential, entropy_bounded"
            )));
        }
        None => generic(p, block_size, default),
    })
}

/// `threshold` or `steps` (per block) without a family's own names.
fn generic(p: &Parameters, block_size: u32, default: Policy) -> Policy {
    match (p.threshold, p.steps) {
        (Some(tau), _) => Policy::Threshold { tau, comparison: Comparison::Strict, quota_steps: None },
        (None, Some(steps)) => {
            Policy::Fixed { steps: steps.clamp(1, block_size), order: Order::Confidence, quota: Quota::Masks }
        }
        (None, None) => default,
    }
}
