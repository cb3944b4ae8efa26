//! Raw request and model descriptor to a valid request, or everything that is wrong with it. Pure.

use crate::settings;
use unmask_proto::rich::Violation;
use unmask_proto::v1::generate_request::Input as RawInput;
use unmask_proto::v1::policy::{
    EntropyBounded, Factor, Fixed, Hierarchical, JointEdit, Kind, SelfSpeculative, Threshold,
};
use unmask_proto::v1::{
    Capabilities, ChatMessages, Decoding, GenerateRequest, ModelDescriptor, ModelPolicy, Order, ResolvedSettings,
    Resume,
};
use unmask_text::Message;

/// Most stop strings.
pub(crate) const STOPS_MAX: usize = 16;
/// Longest stop string (bytes): as much text is held back.
pub(crate) const STOP_BYTES_MAX: usize = 1024;
/// Most stop token ids.
pub(crate) const STOP_IDS_MAX: usize = 64;
/// Most chat messages.
pub(crate) const MESSAGES_MAX: usize = 1024;
/// Longest request id of a resumed stream (bytes).
pub(crate) const REQUEST_ID_BYTES_MAX: usize = 128;
/// Highest temperature.
const TEMPERATURE_MAX: f32 = 10.0;
/// Highest and, negated, lowest priority.
pub(crate) const PRIORITY_MAX: i32 = 100;
/// Most passes after the last mask fell.
const POST_STEPS_MAX: u32 = 64;

/// A request that its model can honour. Whether the prompt fits the context is known once it is encoded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Valid {
    pub input: Input,
    /// Text after the gap to fill.
    pub suffix: Option<String>,
    /// Everything but `max_tokens` is resolved (everything, when the request resumes).
    pub settings: ResolvedSettings,
    /// As the request says.
    pub max_tokens: Option<u32>,
    pub drafts: bool,
    pub priority: i32,
    pub resume: Option<Resumed>,
}

/// The prompt in one of its three forms.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Input {
    Text(String),
    Ids(Vec<u32>),
    Chat(Vec<Message>),
}

impl Input {
    /// Name of the field in the request.
    pub(crate) fn field(&self) -> &'static str {
        match self {
            Input::Text(_) => "text",
            Input::Ids(_) => "token_ids",
            Input::Chat(_) => "chat",
        }
    }

    /// Bytes to encode.
    pub(crate) fn text_bytes(&self) -> usize {
        match self {
            Input::Text(text) => text.len(),
            Input::Ids(_) => 0,
            Input::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
        }
    }
}

/// What an earlier stream has delivered.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resumed {
    pub request_id: String,
    pub received: Vec<u32>,
    pub passes_used: u32,
}

/// Collects violations.
#[derive(Default)]
struct Found(Vec<Violation>);

impl Found {
    fn require(&mut self, ok: bool, field: &str, description: impl FnOnce() -> String) {
        if !ok {
            self.0.push(Violation::new(field, description()));
        }
    }
}

/// Checks a request against its model. The controller's policy `chosen` and `seed` are taken where the request gives none.
///
/// # Errors
/// Every violation at once.
pub(crate) fn validate(
    request: GenerateRequest,
    model: &ModelDescriptor,
    chosen: Option<&ModelPolicy>,
    seed: u64,
) -> Result<Valid, Vec<Violation>> {
    let mut found = Found::default();
    let capabilities = model.capabilities.unwrap_or_default();
    let input = input(request.input, request.suffix.is_some(), model, &capabilities, &mut found);
    if request.suffix.is_some() {
        found.require(capabilities.infill.is_some() || capabilities.infill_by_masks, "suffix", || {
            format!("{} was not trained to fill in, and reads nothing behind its output: leave it out", model.name)
        });
        found.require(!matches!(input, Some(Input::Chat(_))), "suffix", || {
            "goes with text or token_ids, not chat".into()
        });
    }
    let priority = request.priority.unwrap_or(0);
    found.require((-PRIORITY_MAX..=PRIORITY_MAX).contains(&priority), "priority", || {
        format!("must be from -{PRIORITY_MAX} to {PRIORITY_MAX}, is {priority}")
    });
    let decoding = request.decoding.unwrap_or_default();
    let max_tokens = decoding.max_tokens;
    let (settings, resume) = match request.resume {
        Some(resume) => {
            found.require(decoding == Decoding::default(), "decoding", || {
                "must be left out with resume, whose settings hold".into()
            });
            resumed(resume, model, chosen, &mut found)
        }
        None => {
            check_said(&decoding, &mut found);
            let resolved = |chosen: Option<&ModelPolicy>| {
                let (settings, mut found) = (settings::resolve(&decoding, model, chosen, seed), Found::default());
                check_settings(&settings, "decoding", model, &capabilities, &mut found);
                (settings, found.0)
            };
            let mut settings = resolved(chosen);
            if chosen.is_some() && !settings.1.is_empty() {
                // What the controller chose and the model cannot do is not the client's mistake.
                settings = resolved(None);
            }
            found.0.extend(settings.1);
            (settings.0, None)
        }
    };
    match input {
        Some(input) if found.0.is_empty() => {
            let (suffix, drafts) = (request.suffix, request.stream_drafts);
            Ok(Valid { input, suffix, settings, max_tokens, drafts, priority, resume })
        }
        _ => Err(found.0),
    }
}

/// Complete settings, but for the number of tokens, of what asks for them all.
///
/// # Errors
/// Every violation at once, under the names of `decoding`.
pub(crate) fn settings_of(decoding: &Decoding, model: &ModelDescriptor) -> Result<ResolvedSettings, Vec<Violation>> {
    let mut found = Found::default();
    check_said(decoding, &mut found);
    let settings = settings::resolve(decoding, model, None, 0);
    check_settings(&settings, "decoding", model, &model.capabilities.unwrap_or_default(), &mut found);
    if found.0.is_empty() { Ok(settings) } else { Err(found.0) }
}

fn input(
    raw: Option<RawInput>,
    infill: bool,
    model: &ModelDescriptor,
    capabilities: &Capabilities,
    found: &mut Found,
) -> Option<Input> {
    match raw {
        None => {
            found.require(false, "input", || "is missing: give text, token_ids or chat".into());
            None
        }
        Some(RawInput::Text(text)) => {
            found.require(infill || !text.is_empty(), "text", || "is empty: give a prompt".into());
            Some(Input::Text(text))
        }
        Some(RawInput::TokenIds(ids)) => {
            found.require(infill || !ids.ids.is_empty(), "token_ids.ids", || "is empty: give at least one id".into());
            check_ids(&ids.ids, "token_ids.ids", model, found);
            Some(Input::Ids(ids.ids))
        }
        Some(RawInput::Chat(chat)) => {
            found.require(capabilities.chat, "chat", || {
                format!("{} has no chat template: send text instead", model.name)
            });
            Some(Input::Chat(messages(chat, found)))
        }
    }
}

fn messages(chat: ChatMessages, found: &mut Found) -> Vec<Message> {
    let count = chat.messages.len();
    found.require(count > 0, "chat.messages", || "is empty: give at least one message".into());
    found.require(count <= MESSAGES_MAX, "chat.messages", || {
        format!("holds {count} messages, at most {MESSAGES_MAX} are taken")
    });
    let unknown = chat.messages.iter().position(|m| !["system", "user", "assistant"].contains(&m.role.as_str()));
    if let Some(at) = unknown {
        let role = &chat.messages[at].role;
        found.require(false, &format!("chat.messages[{at}].role"), || {
            format!("must be system, user or assistant, is `{role}`")
        });
    }
    chat.messages.into_iter().map(|message| Message { role: message.role, content: message.content }).collect()
}

fn check_ids(ids: &[u32], field: &str, model: &ModelDescriptor, found: &mut Found) {
    let vocabulary = model.vocab_size;
    if let Some(at) = ids.iter().position(|&id| id >= vocabulary) {
        found.require(false, &format!("{field}[{at}]"), || {
            format!("is {}, out of range: the vocabulary has ids 0 to {}", ids[at], vocabulary.saturating_sub(1))
        });
    }
}

/// What only shows in what the request itself says.
fn check_said(decoding: &Decoding, found: &mut Found) {
    let at_least_one = [
        ("decoding.max_tokens", decoding.max_tokens == Some(0)),
        ("decoding.time_limit_ms", decoding.time_limit_ms == Some(0)),
        ("decoding.nfe_cap", decoding.nfe_cap == Some(0)),
    ];
    for (field, zero) in at_least_one {
        found.require(!zero, field, || "must be at least 1, or left out, is 0".into());
    }
    let unnamed = decoding.policy.is_some_and(|policy| policy.kind.is_none());
    found.require(!unnamed, "decoding.policy", || "names no policy: name one or leave it out".into());
}

fn resumed(
    resume: Resume,
    model: &ModelDescriptor,
    chosen: Option<&ModelPolicy>,
    found: &mut Found,
) -> (ResolvedSettings, Option<Resumed>) {
    let Resume { request_id, received_token_ids: received, settings, passes_used, numerics_id: _ } = resume;
    let visible = request_id.bytes().all(|byte| byte.is_ascii_graphic());
    let fits = (1..=REQUEST_ID_BYTES_MAX).contains(&request_id.len());
    found.require(visible && fits, "resume.request_id", || {
        format!("must be 1 to {REQUEST_ID_BYTES_MAX} visible ASCII characters: give the one of Started")
    });
    check_ids(&received, "resume.received_token_ids", model, found);
    found.require(settings.is_some(), "resume.settings", || "is missing: give the settings of Started".into());
    let mut settings = settings.unwrap_or_default();
    if found.0.iter().all(|violation| violation.field != "resume.settings") {
        found.require(settings.max_tokens > 0, "resume.settings.max_tokens", || "must be at least 1, is 0".into());
        found.require(received.len() as u64 <= u64::from(settings.max_tokens), "resume.received_token_ids", || {
            format!("holds {} ids, more than max_tokens {}", received.len(), settings.max_tokens)
        });
        let capabilities = model.capabilities.unwrap_or_default();
        check_settings(&settings, "resume.settings", model, &capabilities, found);
    }
    // Workers report the highest that they took up: one that nobody has given yet would hide those to come.
    settings.policy_revision = settings.policy_revision.min(chosen.map_or(0, |chosen| chosen.revision));
    (settings, Some(Resumed { request_id, received, passes_used }))
}

fn check_settings(
    settings: &ResolvedSettings,
    prefix: &str,
    model: &ModelDescriptor,
    capabilities: &Capabilities,
    found: &mut Found,
) {
    let field = |name: &str| format!("{prefix}.{name}");
    let temperature = settings.temperature;
    found.require((0.0..=TEMPERATURE_MAX).contains(&temperature), &field("temperature"), || {
        format!("must be from 0 (greedy) to {TEMPERATURE_MAX}, is {temperature}")
    });
    let top_p = settings.top_p;
    found.require(top_p > 0.0 && top_p <= 1.0, &field("top_p"), || format!("must be in (0, 1], is {top_p}"));
    let stops = &settings.stop;
    found.require(stops.len() <= STOPS_MAX, &field("stop"), || {
        format!("holds {} strings, at most {STOPS_MAX} are taken", stops.len())
    });
    if let Some(at) = stops.iter().position(|stop| !(1..=STOP_BYTES_MAX).contains(&stop.len())) {
        found.require(false, &field(&format!("stop[{at}]")), || {
            format!("must have 1 to {STOP_BYTES_MAX} bytes, has {}", stops[at].len())
        });
    }
    let ids = &settings.stop_token_ids;
    found.require(ids.len() <= STOP_IDS_MAX, &field("stop_token_ids"), || {
        format!("holds {} ids, at most {STOP_IDS_MAX} are taken", ids.len())
    });
    check_ids(ids, &field("stop_token_ids"), model, found);
    let Some(kind) = settings.policy.and_then(|policy| policy.kind) else {
        found.require(false, &field("policy"), || "is missing: name one policy".into());
        return;
    };
    check_capability(&kind, &field("policy"), model, capabilities, found);
    if !matches!(kind, Kind::Autoregressive(_)) {
        let size = settings.block_size;
        found.require(!capabilities.diffusion || model.block_sizes.contains(&size), &field("block_size"), || {
            format!("must be one the model was trained for, {:?}, is {size}", model.block_sizes)
        });
        check_policy(&kind, size, &field("policy"), found);
    }
    let capped = matches!(kind, Kind::SelfSpeculative(_)) && settings.nfe_cap > 0;
    found.require(!capped, &field("nfe_cap"), || {
        "is for other policies: how many passes self_speculative takes depends on where a stream goes on. Limit \
         max_tokens or time_limit_ms, or name a policy"
            .into()
    });
}

fn check_capability(kind: &Kind, field: &str, model: &ModelDescriptor, capabilities: &Capabilities, found: &mut Found) {
    let causal = matches!(kind, Kind::Autoregressive(_) | Kind::SelfSpeculative(_));
    found.require(!causal || capabilities.autoregressive, field, || {
        format!("{} was not trained to predict the next token: choose a diffusion policy", model.name)
    });
    match kind {
        Kind::Autoregressive(_) => {}
        _ => found.require(capabilities.diffusion, field, || {
            format!("{} is not a diffusion model: choose autoregressive or leave it out", model.name)
        }),
    }
    let edits = matches!(kind, Kind::JointEdit(_));
    found.require(!edits || !capabilities.diffusion || capabilities.edit, field, || {
        format!("{} was not trained to edit: joint_edit is not available", model.name)
    });
}

fn check_policy(kind: &Kind, block_size: u32, field: &str, found: &mut Found) {
    let mut require = |ok: bool, name: &str, must: String| found.require(ok, &format!("{field}.{name}"), || must);
    let probability = |p: f32| p > 0.0 && p <= 1.0;
    match *kind {
        Kind::Fixed(Fixed { steps, order }) => {
            let must = format!("must be from 1 to the block size {block_size}, is {steps}");
            require((1..=block_size).contains(&steps), "fixed.steps", must);
            require(Order::try_from(order).is_ok(), "fixed.order", format!("{order} is not an order"));
        }
        Kind::Threshold(Threshold { tau }) => {
            require(probability(tau), "threshold.tau", format!("must be in (0, 1], is {tau}"));
        }
        Kind::Factor(Factor { factor }) => {
            let must = format!("must be above 0 and finite, is {factor}");
            require(factor > 0.0 && factor.is_finite(), "factor.factor", must);
        }
        Kind::EntropyBounded(EntropyBounded { gamma }) => {
            let must = format!("must be at least 0 nats and finite, is {gamma}");
            require(gamma >= 0.0 && gamma.is_finite(), "entropy_bounded.gamma", must);
        }
        Kind::Hierarchical(Hierarchical { low, high }) => {
            require(probability(high), "hierarchical.high", format!("must be in (0, 1], is {high}"));
            let must = format!("must be from 0 to high ({high}), is {low}");
            require(low >= 0.0 && low <= high, "hierarchical.low", must);
        }
        Kind::JointEdit(JointEdit { tau, tau_edit, max_post_steps }) => {
            require(probability(tau), "joint_edit.tau", format!("must be in (0, 1], is {tau}"));
            let must = format!("must be in [0, 1], is {tau_edit}");
            require((0.0..=1.0).contains(&tau_edit), "joint_edit.tau_edit", must);
            let must = format!("must be at most {POST_STEPS_MAX}, is {max_post_steps}");
            require(max_post_steps <= POST_STEPS_MAX, "joint_edit.max_post_steps", must);
        }
        Kind::SelfSpeculative(SelfSpeculative { tau }) => {
            require(probability(tau), "self_speculative.tau", format!("must be in (0, 1], is {tau}"));
        }
        Kind::Autoregressive(_) => {}
    }
}

#[cfg(test)]
mod tests;
