//! Whether a request can be honoured, and how much it needs.

use super::Limits;
use crate::model::{ModelConfig, Reach};
use crate::pages::Pages;
use crate::plan::PROMPT_SHARE;
use crate::policy::Policy;
use crate::request::{BLOCK_SIZE_MAX, Cache, Ends, Invalid, POSITIONS_MAX, Refusal, Request, STOP_IDS_MAX, Settings};

/// Checks everything about a request that the model and the limits decide.
pub(super) fn check(request: &Request, config: &ModelConfig, limits: &Limits) -> Result<(), Refusal> {
    let mut found = Vec::new();
    let mut require = |ok: bool, field: &str, message: String| {
        if !ok {
            found.push(Invalid { field: field.into(), message });
        }
    };
    let settings = &request.settings;
    let given = !request.prompt.is_empty() || request.draft.is_some() || (!request.suffix.is_empty() && !config.shift);
    require(given, "prompt", "is empty: give at least one token".into());
    let vocab = config.vocab_rows;
    let Request { prompt, suffix, committed, .. } = request;
    for (field, ids) in [("prompt", prompt), ("suffix", suffix), ("committed", committed)] {
        let outside = ids.iter().position(|&id| id >= vocab);
        require(outside.is_none(), field, outside.map_or(String::new(), |at| out_of_range(at, ids[at], vocab)));
    }
    require(settings.max_tokens >= 1, "max_tokens", "must be at least 1".into());
    let read = prompt.len() + suffix.len();
    let positions = u64::from(settings.max_tokens) + read as u64;
    let context = config.context_length.min(POSITIONS_MAX);
    require(
        positions <= u64::from(context),
        "max_tokens",
        format!(
            "prompt and suffix ({read} tokens) and max_tokens ({}) together exceed the context of {context}",
            settings.max_tokens
        ),
    );
    require(
        committed.len() as u64 <= u64::from(settings.max_tokens),
        "committed",
        format!("holds {} tokens, more than max_tokens {}", committed.len(), settings.max_tokens),
    );
    require(
        settings.stop_ids.len() <= STOP_IDS_MAX,
        "stop_ids",
        format!("holds {} ids, at most {STOP_IDS_MAX} are taken", settings.stop_ids.len()),
    );
    check_decoding(request, config, limits, &mut found);
    check_draft(request, config, &mut found);
    if !found.is_empty() {
        return Err(Refusal::Invalid(found));
    }
    let needed = pages_needed(request, config);
    if needed > limits.pages {
        return Err(Refusal::TooLong { needed, total: limits.pages });
    }
    Ok(())
}

fn out_of_range(at: usize, id: u32, vocab: u32) -> String {
    format!("id {id} at index {at} is out of range: the vocabulary has ids 0 to {}", vocab.saturating_sub(1))
}

fn check_decoding(request: &Request, config: &ModelConfig, limits: &Limits, found: &mut Vec<Invalid>) {
    let Settings { sampling, policy, .. } = &request.settings;
    let mut require = |ok: bool, field: &str, message: String| {
        if !ok {
            found.push(Invalid { field: field.into(), message });
        }
    };
    require(
        sampling.temperature >= 0.0 && sampling.temperature.is_finite(),
        "temperature",
        format!("must be at least 0 and finite, is {}", sampling.temperature),
    );
    require(
        sampling.top_p > 0.0 && sampling.top_p <= 1.0,
        "top_p",
        format!("must be in (0, 1], is {}", sampling.top_p),
    );
    require(
        !policy.is_causal() || config.can_autoregress(),
        "policy",
        format!("{} was not trained to predict the next token: choose a block diffusion policy", config.name),
    );
    if let Some(opening) = &request.opening {
        require(policy.is_causal(), "opening", "needs a policy whose causal rows decide".into());
        let (largest, vocab) = (opening.largest_token(), config.vocab_rows);
        require(largest < vocab, "opening", format!("token {largest} is out of range: the vocabulary has {vocab}"));
    }
    require(
        request.suffix.is_empty() || (config.fills_between() && !policy.is_causal()),
        "suffix",
        format!("{} reads nothing behind what it fills: give no suffix", config.name),
    );
    if *policy != Policy::Autoregressive {
        check_blocks(request, config, limits, found);
    }
}

/// What needs masks.
fn check_blocks(request: &Request, config: &ModelConfig, limits: &Limits, found: &mut Vec<Invalid>) {
    let settings = &request.settings;
    let mut require = |ok: bool, field: &str, message: String| {
        if !ok {
            found.push(Invalid { field: field.into(), message });
        }
    };
    let drafts = matches!(settings.policy, Policy::SelfSpeculative { .. });
    require(
        !drafts || config.can_speculate(),
        "policy",
        format!("{} has no masked rows to draft by: self_speculative is not available", config.name),
    );
    require(
        !drafts || settings.nfe_cap == 0,
        "nfe_cap",
        "must be 0: how many passes the same tokens take depends on where they are continued".into(),
    );
    require(
        config.can_diffuse(),
        "policy",
        format!("{} is not a block diffusion model: choose the autoregressive policy", config.name),
    );
    let size = settings.block_size;
    let trained = request.raw || config.block_sizes.contains(&size);
    let whole = config.open_reach == Reach::Bidirectional;
    let most = config.open_reach.block_size_max().min(if whole { u32::MAX } else { limits.rows_max / 8 });
    require(
        (1..=most).contains(&size) && trained,
        "block_size",
        format!("must be one of {:?}, is {size}", config.block_sizes),
    );
    require(
        !settings.policy.edits() || config.edit || request.raw,
        "policy",
        format!("{} was not trained to edit: joint_edit is not available", config.name),
    );
    require(
        !(settings.policy.edits() && config.shift),
        "policy",
        format!("{} scores a position by the row before it: joint_edit is not available", config.name),
    );
    if whole && size >= 1 {
        // Every pass takes all rows of such a request, and prompts of others keep their share of a step.
        let (canvas, most) = (canvas_end(request, config), limits.rows_max - limits.rows_max / PROMPT_SHARE);
        require(
            canvas <= most,
            "max_tokens",
            format!("{canvas} positions are computed in every pass of {}: at most {most} fit a step", config.name),
        );
        let context = config.context_length;
        require(
            size <= BLOCK_SIZE_MAX || canvas <= context,
            "block_size",
            format!("the last block of {size} would end at {canvas}, beyond the context of {context}"),
        );
    }
    found.extend(settings.policy.violations(size.max(1)));
    check_manner(request, config, found);
}

/// A text to edit.
fn check_draft(request: &Request, config: &ModelConfig, found: &mut Vec<Invalid>) {
    let (Some(draft), settings) = (&request.draft, &request.settings) else { return };
    let mut require = |ok: bool, field: &str, message: String| {
        if !ok {
            found.push(Invalid { field: field.into(), message });
        }
    };
    let lengths = [draft.tokens.len(), draft.masked.len(), draft.fixed.len()];
    require(
        lengths == [settings.max_tokens as usize; 3],
        "draft",
        format!("its lists must have max_tokens ({}) elements each, have {lengths:?}", settings.max_tokens),
    );
    let outside = draft.tokens.iter().position(|&id| id >= config.vocab_rows);
    require(
        outside.is_none(),
        "draft.token_ids",
        outside.map_or(String::new(), |at| out_of_range(at, draft.tokens[at], config.vocab_rows)),
    );
    let both = draft.masked.iter().zip(&draft.fixed).any(|(&masked, &fixed)| masked && fixed);
    require(!both, "draft.fixed", "a position to be filled cannot be one that may not change".into());
    require(settings.policy.edits(), "policy", "must be joint_edit: others change nothing that is given".into());
    require(
        config.open_reach == Reach::Block && !config.eos_ids.is_empty(),
        "draft",
        format!("{} does not edit: it reads no blocks, or has no end-of-sequence", config.name),
    );
}

/// What is done beside the policy.
fn check_manner(request: &Request, config: &ModelConfig, found: &mut Vec<Invalid>) {
    let (manner, size, sub_block) = (&request.settings.manner, block_size(request), sub_block(request, config));
    let mut require = |ok: bool, field: &str, message: String| {
        if !ok {
            found.push(Invalid { field: field.into(), message });
        }
    };
    require(size.is_multiple_of(sub_block), "sub_block", format!("must divide the block size {size}, is {sub_block}"));
    let reuses = config.open_reach == Reach::Bidirectional || (manner.cache == Cache::Dual && sub_block < size);
    require(
        manner.cache == Cache::None || reuses,
        "cache",
        format!(
            "{} has nothing to reuse within a block of one part: its cache of finished blocks is exact",
            config.name
        ),
    );
    require(
        manner.suppress.len() <= STOP_IDS_MAX,
        "suppress",
        format!("holds {} ids, at most {STOP_IDS_MAX} are taken", manner.suppress.len()),
    );
}

/// How the outputs of a request end. What stands behind one stays where it is.
pub(super) fn ends(request: &Request, config: &ModelConfig) -> Ends {
    let ends = request.settings.manner.ends.unwrap_or_else(|| config.family.ends());
    Ends { whole_last_block: ends.whole_last_block && request.suffix.is_empty(), ..ends }
}

/// Rows decoded together.
pub(super) fn block_size(request: &Request) -> u32 {
    if request.settings.policy.is_causal() { 1 } else { request.settings.block_size }
}

/// Masks that draft what follows.
pub(super) fn drafted(request: &Request) -> u32 {
    match request.settings.policy {
        Policy::SelfSpeculative { .. } => request.settings.block_size,
        _ => 0,
    }
}

/// Positions that may fall together.
pub(super) fn sub_block(request: &Request, config: &ModelConfig) -> u32 {
    let (size, family) = (block_size(request).max(1), config.family.sub_block());
    match request.settings.manner.sub_block {
        Some(0) => size,
        Some(sub_block) => sub_block,
        None if family > 0 && size.is_multiple_of(family) => family,
        None => size,
    }
}

/// Where the first block begins: families that read everything at once count blocks from the end of the prompt.
pub(super) fn origin(request: &Request, config: &ModelConfig) -> u32 {
    let from_prompt = config.open_reach == Reach::Bidirectional && !request.settings.policy.is_causal();
    if from_prompt { request.prompt.len() as u32 } else { 0 }
}

/// One past the last position that is decoded.
pub(super) fn output_end(request: &Request, config: &ModelConfig) -> u32 {
    let (end, origin) = (output_limit(request), origin(request, config));
    let whole = ends(request, config).whole_last_block;
    let rounded = || (end - origin).checked_next_multiple_of(block_size(request)).unwrap_or(u32::MAX);
    if whole { origin.saturating_add(rounded()) } else { end }
}

/// One past the last position that can be part of the output.
pub(super) fn output_limit(request: &Request) -> u32 {
    (request.prompt.len() as u32).saturating_add(request.settings.max_tokens)
}

/// One past the last position of the request.
pub(super) fn canvas_end(request: &Request, config: &ModelConfig) -> u32 {
    output_end(request, config).saturating_add(request.suffix.len() as u32)
}

/// Pages the request can come to hold.
pub(super) fn pages_needed(request: &Request, config: &ModelConfig) -> usize {
    Pages::needed(canvas_end(request, config))
}
