//! Protocol messages to engine types and back.

use std::time::Duration;
use tonic::{Code, Status};
use unmask_engine::opening::{Choice, Opening};
use unmask_engine::policy::Order;
use unmask_engine::request::DraftText;
use unmask_engine::{Manner, Policy, Reason, Refusal, Request, RequestId, Sampling, Settings};
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::policy::{
    EntropyBounded, Factor, Fixed, Hierarchical, JointEdit, Kind, SelfSpeculative, Threshold,
};
use unmask_proto::v1::{self, FinishReason, RunRequest};

/// When a request refused by a full queue may be tried again.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(500);

/// The engine's request. `defaults` is the model's own policy: what the wire does not say about a policy of the
/// same kind (how its authors compare, say) comes from there.
///
/// # Errors
/// What is missing. Whether the model can honour the rest is the engine's to say.
pub(crate) fn request(message: RunRequest, id: RequestId, defaults: &Policy) -> Result<Request, Vec<Violation>> {
    let Some(settings) = message.settings else {
        return Err(vec![Violation::new("settings", "is missing")]);
    };
    let Some(policy) = settings.policy.and_then(|policy| policy.kind) else {
        return Err(vec![Violation::new("settings.policy", "is missing: name one policy")]);
    };
    let policy = policy_from(policy, defaults).map_err(|violation| vec![violation])?;
    let sampling = Sampling {
        temperature: settings.temperature,
        top_p: settings.top_p,
        top_k: settings.top_k,
        seed: settings.seed,
    };
    let settings = Settings {
        max_tokens: settings.max_tokens,
        block_size: settings.block_size,
        policy,
        sampling,
        stop_ids: settings.stop_token_ids,
        nfe_cap: settings.nfe_cap,
        manner: Manner::default(),
    };
    let opening = opening_from(message.opening)?;
    Ok(Request {
        id,
        prompt: message.prompt_ids,
        suffix: message.suffix_ids,
        settings,
        committed: message.committed_ids,
        passes_used: message.passes_used,
        drafts: message.stream_drafts,
        priority: message.priority,
        deadline: None,
        salt: message.cache_salt,
        draft: message.draft.map(|draft| DraftText {
            tokens: draft.token_ids,
            masked: draft.masked,
            fixed: draft.fixed,
        }),
        opening,
        raw: false,
    })
}

fn opening_from(places: Vec<v1::OpeningPlace>) -> Result<Option<Opening>, Vec<Violation>> {
    if places.is_empty() {
        return Ok(None);
    }
    let wrong = |message: String| vec![Violation::new("opening", message)];
    if places.iter().any(|place| place.token_ids.len() != place.next.len()) {
        return Err(wrong("a place has as many token_ids as next".into()));
    }
    let choices = |place: v1::OpeningPlace| {
        place.token_ids.into_iter().zip(place.next).map(|(token, next)| Choice { token, next }).collect()
    };
    Opening::new(places.into_iter().map(choices).collect()).map(Some).map_err(wrong)
}

fn policy_from(kind: Kind, defaults: &Policy) -> Result<Policy, Violation> {
    Ok(match kind {
        Kind::Fixed(Fixed { steps, order }) => {
            let order = order_from(order)?;
            let quota = if let Policy::Fixed { quota, .. } = defaults { *quota } else { Default::default() };
            Policy::Fixed { steps, order, quota }
        }
        Kind::Threshold(Threshold { tau }) => {
            let (comparison, quota_steps) = match defaults {
                Policy::Threshold { comparison, quota_steps, .. } => (*comparison, *quota_steps),
                _ => (Default::default(), None),
            };
            Policy::Threshold { tau, comparison, quota_steps }
        }
        Kind::Factor(Factor { factor }) => Policy::Factor { factor, last_falls: false },
        Kind::EntropyBounded(EntropyBounded { gamma }) => {
            let bound = if let Policy::EntropyBounded { bound, .. } = defaults { *bound } else { Default::default() };
            Policy::EntropyBounded { gamma, bound }
        }
        Kind::Hierarchical(Hierarchical { low, high }) => Policy::Hierarchical { low, high },
        Kind::JointEdit(JointEdit { tau, tau_edit, max_post_steps }) => {
            Policy::JointEdit { tau, tau_edit, max_post_steps, at_least: 1 }
        }
        Kind::Autoregressive(_) => Policy::Autoregressive,
        Kind::SelfSpeculative(SelfSpeculative { tau }) => Policy::SelfSpeculative { tau },
    })
}

fn order_from(order: i32) -> Result<Order, Violation> {
    match v1::Order::try_from(order) {
        Ok(v1::Order::Unspecified | v1::Order::Confidence) => Ok(Order::Confidence),
        Ok(v1::Order::Margin) => Ok(Order::Margin),
        Ok(v1::Order::Entropy) => Ok(Order::Entropy),
        Ok(v1::Order::Sequential) => Ok(Order::Sequential),
        Ok(v1::Order::Random) => Ok(Order::Random),
        Err(_) => Err(Violation::new("settings.policy.fixed.order", format!("{order} is not an order"))),
    }
}

/// A policy as the wire says it.
pub(crate) fn policy_to(policy: &Policy) -> v1::Policy {
    let kind = match *policy {
        // The wire has no schedule by time: its order over as many steps is nearest.
        Policy::Fixed { steps, order, .. } | Policy::Timesteps { steps, order, .. } => {
            Kind::Fixed(Fixed { steps, order: order_to(order).into() })
        }
        Policy::Threshold { tau, .. } => Kind::Threshold(Threshold { tau }),
        Policy::Factor { factor, .. } => Kind::Factor(Factor { factor }),
        Policy::EntropyBounded { gamma, .. } => Kind::EntropyBounded(EntropyBounded { gamma }),
        Policy::Hierarchical { low, high } => Kind::Hierarchical(Hierarchical { low, high }),
        Policy::JointEdit { tau, tau_edit, max_post_steps, .. } => {
            Kind::JointEdit(JointEdit { tau, tau_edit, max_post_steps })
        }
        Policy::Autoregressive => Kind::Autoregressive(v1::policy::Autoregressive {}),
        Policy::SelfSpeculative { tau } => Kind::SelfSpeculative(SelfSpeculative { tau }),
    };
    v1::Policy { kind: Some(kind) }
}

fn order_to(order: Order) -> v1::Order {
    match order {
        Order::Confidence => v1::Order::Confidence,
        Order::Margin => v1::Order::Margin,
        Order::Entropy => v1::Order::Entropy,
        Order::Sequential => v1::Order::Sequential,
        Order::Random => v1::Order::Random,
    }
}

/// Why the engine ended a request, as the wire says it.
pub(crate) fn reason_to(reason: Reason) -> FinishReason {
    match reason {
        Reason::Eos => FinishReason::Eos,
        Reason::Stop => FinishReason::Stop,
        Reason::Length => FinishReason::Length,
        Reason::NfeCap => FinishReason::NfeCap,
    }
}

/// The status of a request the engine did not take.
pub(crate) fn refused(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::QueueFull { .. } => {
            rich::retryable(Code::ResourceExhausted, "QUEUE_FULL", refusal.to_string(), RETRY_AFTER)
        }
        Refusal::TooLong { .. } => rich::invalid(&[Violation::new("settings.max_tokens", refusal.to_string())]),
        Refusal::Duplicate(_) => rich::status(Code::Internal, "DUPLICATE_REQUEST", refusal.to_string()),
        Refusal::Invalid(found) => {
            let found: Vec<_> = found.iter().map(|i| Violation::new(wire_path(&i.field), i.message.clone())).collect();
            rich::invalid(&found)
        }
    }
}

/// Path in `RunRequest` of an engine field.
fn wire_path(field: &str) -> String {
    match field {
        "prompt" => "prompt_ids".into(),
        "suffix" => "suffix_ids".into(),
        "committed" => "committed_ids".into(),
        "opening" => "opening".into(),
        "stop_ids" => "settings.stop_token_ids".into(),
        other => format!("settings.{other}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use unmask_engine::policy::{Bound, Comparison, Quota};

    fn message(kind: Option<Kind>) -> RunRequest {
        let policy = kind.map(|kind| v1::Policy { kind: Some(kind) });
        let settings = v1::ResolvedSettings { max_tokens: 5, block_size: 4, policy, top_p: 1.0, ..Default::default() };
        RunRequest { prompt_ids: vec![1, 2], settings: Some(settings), ..Default::default() }
    }

    #[test]
    fn every_policy_survives_the_wire() {
        for policy in [
            Policy::Fixed { steps: 3, order: Order::Entropy, quota: Quota::Masks },
            Policy::Threshold { tau: 0.5, comparison: Comparison::Strict, quota_steps: None },
            Policy::Factor { factor: 2.0, last_falls: false },
            Policy::EntropyBounded { gamma: 0.25, bound: Bound::AllButLargest },
            Policy::Hierarchical { low: 0.25, high: 0.75 },
            Policy::JointEdit { tau: 0.5, tau_edit: 0.25, max_post_steps: 3, at_least: 1 },
            Policy::Autoregressive,
            Policy::SelfSpeculative { tau: 0.5 },
        ] {
            let taken = request(message(policy_to(&policy).kind), RequestId(1), &Policy::Autoregressive).unwrap();
            assert_eq!(taken.settings.policy, policy);
        }
    }

    #[test]
    fn what_the_wire_leaves_open_comes_from_the_models_policy_of_the_same_kind() {
        let defaults = Policy::Threshold { tau: 0.9, comparison: Comparison::Inclusive, quota_steps: Some(4) };
        let threshold = message(Some(Kind::Threshold(Threshold { tau: 0.5 })));
        let taken = request(threshold, RequestId(1), &defaults).unwrap().settings.policy;
        assert_eq!(taken, Policy::Threshold { tau: 0.5, comparison: Comparison::Inclusive, quota_steps: Some(4) });
        let fixed = message(Some(Kind::Fixed(Fixed { steps: 2, order: 0 })));
        let taken = request(fixed, RequestId(1), &defaults).unwrap().settings.policy;
        assert_eq!(taken, Policy::Fixed { steps: 2, order: Order::Confidence, quota: Quota::Masks });
    }

    #[test]
    fn missing_parts_are_named() {
        let field = |message| request(message, RequestId(1), &Policy::Autoregressive).unwrap_err()[0].field.clone();
        assert_eq!(field(RunRequest::default()), "settings");
        assert_eq!(field(message(None)), "settings.policy");
        assert_eq!(field(message(Some(Kind::Fixed(Fixed { steps: 1, order: 77 })))), "settings.policy.fixed.order");
        let causal = Some(Kind::Autoregressive(v1::policy::Autoregressive {}));
        for place in [
            v1::OpeningPlace { token_ids: vec![1, 2], next: vec![1] },
            v1::OpeningPlace { token_ids: vec![1], next: vec![0] },
        ] {
            assert_eq!(field(RunRequest { opening: vec![place], ..message(causal) }), "opening");
        }
    }

    #[test]
    fn a_full_queue_says_when_to_try_again() {
        use tonic_types::StatusExt as _;
        let status = refused(&Refusal::QueueFull { queued: 1, limit: 1 });
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(RETRY_AFTER));
    }
}
