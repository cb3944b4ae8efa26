//! Settings of a request: what it says, else what the controller's policy for its model says, else what its model says, else
//! the gateway's; each with its origin.

use crate::prompt::Prompt;
use crate::validate::{Resumed, Valid};
use unmask_proto::rich::Violation;
use unmask_proto::v1::policy::{Autoregressive, Fixed, Kind, Threshold};
use unmask_proto::v1::{Decoding, Defaults, ModelDescriptor, ModelPolicy, Policy, ResolvedSettings};

/// Generated tokens, where neither request nor model says (tokens).
const MAX_TOKENS: u32 = 256;
/// Positions of a gap that is filled by masks, where the request does not say: all of them are filled (tokens).
const GAP_TOKENS: u32 = 32;
/// Confidence above which masks fall, where neither request nor model says.
const TAU: f32 = 0.9;
/// A drawn seed has this many bits, so that every reader of JSON keeps it.
const SEED_BITS: u32 = 53;

/// Resolves everything but `max_tokens`, which needs the prompt's length: see [`fit`].
pub(crate) fn resolve(
    decoding: &Decoding,
    model: &ModelDescriptor,
    chosen: Option<&ModelPolicy>,
    seed: u64,
) -> ResolvedSettings {
    let defaults = model.defaults.unwrap_or_default();
    // A policy is for both: it was chosen for the two together.
    let chosen = chosen.filter(|_| decoding.policy.is_none() && decoding.block_size.is_none());
    let mut settings = ResolvedSettings::default();
    let mut origin = |name: &str, from: &str| {
        settings.origins.insert(name.to_owned(), from.to_owned());
    };
    let (policy, policy_from, block_size, block_from) = match chosen {
        Some(ModelPolicy { block_size, policy: Some(policy), .. }) => (*policy, "policy", *block_size, "policy"),
        _ => {
            let (policy, from) = policy(decoding, &defaults, model);
            let (block_size, block_from) = block_size(decoding, &defaults, model, &policy);
            (policy, from, block_size, block_from)
        }
    };
    origin("policy", policy_from);
    origin("block_size", block_from);
    let mut pick = |name: &str, said: bool, default: &'static str| {
        origin(name, if said { "request" } else { default });
    };
    pick("temperature", decoding.temperature.is_some(), "model");
    pick("top_p", decoding.top_p.is_some(), "gateway");
    pick("top_k", decoding.top_k.is_some(), "gateway");
    pick("seed", decoding.seed.is_some(), "gateway");
    pick("stop", !decoding.stop.is_empty(), "gateway");
    pick("stop_token_ids", !decoding.stop_token_ids.is_empty(), "gateway");
    pick("time_limit_ms", decoding.time_limit_ms.is_some(), "gateway");
    pick("nfe_cap", decoding.nfe_cap.is_some(), "gateway");
    ResolvedSettings {
        max_tokens: 0,
        block_size,
        policy: Some(shortened(policy, policy_from, block_size)),
        temperature: decoding.temperature.unwrap_or(defaults.temperature),
        top_p: decoding.top_p.unwrap_or(1.0),
        top_k: decoding.top_k.unwrap_or(0),
        seed: decoding.seed.unwrap_or(seed >> (u64::BITS - SEED_BITS)),
        stop: decoding.stop.clone(),
        stop_token_ids: decoding.stop_token_ids.clone(),
        time_limit_ms: decoding.time_limit_ms.unwrap_or(0),
        nfe_cap: decoding.nfe_cap.unwrap_or(0),
        policy_revision: chosen.map_or(0, |chosen| chosen.revision),
        ..settings
    }
}

fn policy(decoding: &Decoding, defaults: &Defaults, model: &ModelDescriptor) -> (Policy, &'static str) {
    let named = |policy: &&Policy| policy.kind.is_some();
    if let Some(policy) = decoding.policy.as_ref().filter(named) {
        return (*policy, "request");
    }
    if let Some(policy) = defaults.policy.as_ref().filter(named) {
        return (*policy, "model");
    }
    let diffusion = model.capabilities.as_ref().is_none_or(|capabilities| capabilities.diffusion);
    let kind =
        if diffusion { Kind::Threshold(Threshold { tau: TAU }) } else { Kind::Autoregressive(Autoregressive {}) };
    (Policy { kind: Some(kind) }, "gateway")
}

fn block_size(
    decoding: &Decoding,
    defaults: &Defaults,
    model: &ModelDescriptor,
    policy: &Policy,
) -> (u32, &'static str) {
    if matches!(policy.kind, Some(Kind::Autoregressive(_))) {
        return (1, "gateway");
    }
    match decoding.block_size {
        Some(size) => (size, "request"),
        None if defaults.block_size > 0 => (defaults.block_size, "model"),
        None => (model.block_sizes.last().copied().unwrap_or(1), "gateway"),
    }
}

/// A model's default number of steps is meant for its default block: a smaller block takes fewer.
fn shortened(policy: Policy, from: &str, block_size: u32) -> Policy {
    match policy.kind {
        Some(Kind::Fixed(Fixed { steps, order })) if from != "request" => {
            Policy { kind: Some(Kind::Fixed(Fixed { steps: steps.min(block_size), order })) }
        }
        _ => policy,
    }
}

/// Resolves `max_tokens` for an encoded prompt: an explicit one must fit the context, a default is cut to fit.
///
/// # Errors
/// The prompt is empty or leaves no room, or the explicit `max_tokens` does not fit.
pub(crate) fn fit(valid: &Valid, model: &ModelDescriptor, prompt: &Prompt) -> Result<ResolvedSettings, Violation> {
    let (context, prompt_tokens) = (model.context_length, prompt.tokens());
    let input = valid.input.field();
    let mut settings = valid.settings.clone();
    if prompt_tokens == 0 {
        return Err(Violation::new(input, "gives no tokens: give at least one"));
    }
    let suffix = prompt.suffix.len();
    let and_suffix = if suffix > 0 { format!(" and a suffix of {suffix}") } else { String::new() };
    let room = u64::from(context).saturating_sub(prompt_tokens as u64);
    if room == 0 {
        let description = format!(
            "has {} tokens{and_suffix}, the model's context of {context} leaves no room to generate: shorten it to at \
             most {} tokens in all",
            prompt.ids.len(),
            context.saturating_sub(1)
        );
        let longer = if suffix > prompt.ids.len() { "suffix" } else { input };
        return Err(Violation::new(longer, description));
    }
    let too_many = |field: &str, asked: u32| {
        let description = format!(
            "is {asked}, but a prompt of {} tokens{and_suffix} leaves room for {room} in the context of {context}: ask \
             for at most {room} or shorten the prompt",
            prompt.ids.len()
        );
        Violation::new(field, description)
    };
    if let Some(Resumed { .. }) = &valid.resume {
        return match settings.max_tokens {
            asked if u64::from(asked) > room => Err(too_many("resume.settings.max_tokens", asked)),
            _ => Ok(settings),
        };
    }
    let default = model.defaults.as_ref().map_or(0, |defaults| defaults.max_tokens);
    let (max_tokens, origin) = match (valid.max_tokens, default) {
        (None, _) if !prompt.suffix.is_empty() => (u64::from(GAP_TOKENS).min(room) as u32, "gateway"),
        (Some(asked), _) if u64::from(asked) > room => return Err(too_many("decoding.max_tokens", asked)),
        (Some(asked), _) => (asked, "request"),
        (None, default) if default > 0 && u64::from(default) <= room => (default, "model"),
        (None, 0) => (u64::from(MAX_TOKENS).min(room) as u32, "gateway"),
        (None, _) => (room as u32, "gateway"),
    };
    settings.max_tokens = max_tokens;
    settings.origins.insert("max_tokens".into(), origin.into());
    Ok(settings)
}
