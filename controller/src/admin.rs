//! What people ask of a controller: messages to what `core` knows, and back.

mod desired;

pub(crate) use desired::read as read_desired;

use crate::core::settings::{Intent, ModelSettings, Setting, Settings};
use crate::core::{Event, MODELS_MAX, Readiness, State};
use std::time::Duration;
use tonic::{Code, Status};
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::policy::{Autoregressive, Kind as PolicyKind, SelfSpeculative, Threshold};
use unmask_proto::v1::policy_intent::{Automatic, FixedSettings, Kind, ModelDefaults};
use unmask_proto::v1::{
    GetStatusResponse, Member, ModelPolicy, Policy, PolicyIntent, PolicyStatus, SetPolicyRequest, WorkerState,
};

/// Largest block.
const BLOCK_SIZE_MAX: u32 = 1024;
/// Longest latency target (milliseconds).
const LATENCY_MS_MAX: f64 = 3_600_000.0;

/// Members and settings.
pub(crate) fn status(state: &State, term: u64, now: Duration) -> GetStatusResponse {
    let member = |(worker_id, member): (&String, &crate::core::Member)| Member {
        worker_id: worker_id.clone(),
        group_id: member.group_id.clone(),
        epoch: member.epoch,
        endpoint: member.endpoint.clone(),
        model: member.model.name.clone(),
        state: match member.readiness {
            Readiness::Loading => WorkerState::Loading,
            Readiness::Ready => WorkerState::Ready,
            Readiness::Draining => WorkerState::Draining,
            Readiness::Spare => WorkerState::Spare,
            Readiness::Fenced => WorkerState::Fenced,
        }
        .into(),
        outstanding_rows: member.outstanding_rows,
        requests: member.requests,
        silent_ms: now.saturating_sub(member.heard).as_millis() as u64,
        connected: member.stream.is_some(),
        capacity: member.capacity.clone(),
        rank: state.rank_of(worker_id),
        problem: member.problem.clone(),
        loaded_percent: member.loaded_percent,
        policy_revision: member.policy_revision,
    };
    let policy = |(model, settings): (&String, &ModelSettings)| PolicyStatus {
        model: model.clone(),
        intent: Some(to_message(&settings.intent)),
        current: in_force(model, settings),
        concurrency: settings.concurrency,
        why: settings.why.clone(),
    };
    GetStatusResponse {
        term,
        routes_revision: state.routes_revision(),
        members: state.members().iter().map(member).collect(),
        policies: state.settings().iter().map(policy).collect(),
        models: desired::models(state),
    }
}

/// Settings that are in force.
pub(crate) fn policies(settings: &Settings) -> Vec<ModelPolicy> {
    settings.iter().filter_map(|(model, settings)| in_force(model, settings)).collect()
}

fn in_force(model: &str, settings: &ModelSettings) -> Option<ModelPolicy> {
    let Setting { block_size, threshold, self_speculative } = settings.current?;
    let kind = match threshold {
        Some(tau) if self_speculative => PolicyKind::SelfSpeculative(SelfSpeculative { tau: tau as f32 }),
        Some(tau) => PolicyKind::Threshold(Threshold { tau: tau as f32 }),
        None => PolicyKind::Autoregressive(Autoregressive {}),
    };
    let (revision, policy) = (settings.revision, Some(Policy { kind: Some(kind) }));
    Some(ModelPolicy { model: model.to_owned(), revision, block_size, policy })
}

pub(crate) fn to_message(intent: &Intent) -> PolicyIntent {
    let kind = match intent.clone() {
        Intent::ModelDefaults => Kind::ModelDefaults(ModelDefaults {}),
        Intent::Fixed(Setting { block_size, threshold, self_speculative }) => {
            Kind::Fixed(FixedSettings { block_size, threshold, self_speculative })
        }
        Intent::Automatic { latency_ms, floor, block_sizes } => {
            Kind::Automatic(Automatic { latency_ms, floor, block_sizes })
        }
    };
    PolicyIntent { kind: Some(kind) }
}

/// Reads a request to set how a model's settings come about.
///
/// # Errors
/// INVALID_ARGUMENT with every field at fault.
pub(crate) fn read(request: SetPolicyRequest) -> Result<Event, Status> {
    let mut found = Vec::new();
    let mut require = |ok: bool, field: &str, description: &str| {
        if !ok {
            found.push(Violation::new(field, description));
        }
    };
    require(!request.model.is_empty(), "model", "is missing");
    let intent = read_intent(request.intent, &mut require);
    if found.is_empty() { Ok(Event::SetPolicy(request.model, intent)) } else { Err(rich::invalid(&found)) }
}

/// Reads how settings are to come about; what is wrong goes to `require` with its field.
pub(crate) fn read_intent(intent: Option<PolicyIntent>, require: &mut impl FnMut(bool, &str, &str)) -> Intent {
    match intent.and_then(|intent| intent.kind) {
        None => {
            require(false, "intent", "is missing: give model_defaults, fixed or automatic");
            Intent::ModelDefaults
        }
        Some(Kind::ModelDefaults(_)) => Intent::ModelDefaults,
        Some(Kind::Fixed(FixedSettings { block_size, threshold, self_speculative })) => {
            let fits = (1..=BLOCK_SIZE_MAX).contains(&block_size);
            require(fits, "intent.fixed.block_size", &format!("must be from 1 to {BLOCK_SIZE_MAX}"));
            let tau = threshold.is_none_or(|tau| tau > 0.0 && tau <= 1.0);
            require(tau, "intent.fixed.threshold", "must be above 0 and at most 1");
            let alone = (block_size == 1) == threshold.is_none();
            require(alone, "intent.fixed", "autoregressive has block_size 1 and no threshold, others have both");
            let drafts = !self_speculative || threshold.is_some();
            require(drafts, "intent.fixed.self_speculative", "needs a block size above 1 and a threshold");
            Intent::Fixed(Setting { block_size, threshold, self_speculative })
        }
        Some(Kind::Automatic(Automatic { latency_ms, floor, block_sizes })) => {
            let latency = latency_ms.is_none_or(|ms| ms > 0.0 && ms <= LATENCY_MS_MAX);
            require(latency, "intent.automatic.latency_ms", "must be above 0 and at most an hour");
            let share = floor.is_none_or(|floor| (0.0..=1.0).contains(&floor));
            require(share, "intent.automatic.floor", "must be from 0 to 1");
            let sizes = block_sizes.len() <= BLOCK_SIZE_MAX as usize
                && block_sizes.iter().all(|size| (1..=BLOCK_SIZE_MAX).contains(size));
            require(sizes, "intent.automatic.block_sizes", &format!("must be from 1 to {BLOCK_SIZE_MAX}"));
            Intent::Automatic { latency_ms, floor, block_sizes }
        }
    }
}

/// Whether what is asked for can be done at present.
///
/// # Errors
/// NOT_FOUND for a worker or model that nobody has; INVALID_ARGUMENT for what a model was not trained for;
/// RESOURCE_EXHAUSTED for one more model than there may be.
pub(crate) fn check(state: &State, event: &Event) -> Result<(), Status> {
    match event {
        Event::Apply(model, desired) => {
            let wanted = &state.pool().desired;
            room("models are wanted", wanted.len(), wanted.contains_key(model) || desired.replicas == 0)?;
            if desired.policy.is_some() { room_for_policy(state, model) } else { Ok(()) }
        }
        Event::Drain(worker_id) if state.members().get(worker_id).is_none_or(|member| member.stream.is_none()) => {
            let known: Vec<_> = state.members().keys().map(String::as_str).collect();
            let message = format!("no worker `{worker_id}` is connected; known: {}", known.join(", "));
            Err(rich::status(Code::NotFound, "UNKNOWN_WORKER", message))
        }
        Event::SetPolicy(model, intent) => {
            let models = || state.members().values().map(|member| &member.model);
            let Some(found) = models().find(|found| found.name == *model) else {
                if state.settings().contains_key(model) {
                    return Ok(());
                }
                let mut known: Vec<_> = models().map(|model| model.name.as_str()).collect();
                known.dedup();
                let message = format!("no worker has a model `{model}`; known: {}", known.join(", "));
                return Err(rich::status(Code::NotFound, "UNKNOWN_MODEL", message));
            };
            room_for_policy(state, model)?;
            let Intent::Fixed(Setting { block_size, threshold, self_speculative }) = intent else { return Ok(()) };
            let can = found.capabilities.unwrap_or_default();
            let problem = match threshold {
                _ if (threshold.is_none() || *self_speculative) && !can.autoregressive => {
                    format!("{model} was not trained to predict the next token")
                }
                Some(_) if !can.diffusion => format!("{model} decodes one position at a time"),
                Some(_) if !found.block_sizes.contains(block_size) => {
                    format!("is {block_size}, {model} was trained for {:?}", found.block_sizes)
                }
                _ => return Ok(()),
            };
            Err(rich::invalid(&[Violation::new("intent.fixed.block_size", problem)]))
        }
        _ => Ok(()),
    }
}

fn room_for_policy(state: &State, model: &str) -> Result<(), Status> {
    let settings = state.settings();
    room("models have a policy", settings.len(), settings.contains_key(model))
}

fn room(what: &str, count: usize, known: bool) -> Result<(), Status> {
    if known || count < MODELS_MAX {
        return Ok(());
    }
    let message = format!("{count} {what} already, the most there may be");
    Err(rich::status(Code::ResourceExhausted, "TOO_MANY_MODELS", message))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::core::decide;
    use crate::core::groups::{Desired, Source};
    use std::collections::BTreeMap;

    fn request(kind: Kind) -> SetPolicyRequest {
        SetPolicyRequest { model: "m".into(), intent: Some(PolicyIntent { kind: Some(kind) }) }
    }

    #[test]
    fn intents_are_read_checked_and_written_back() {
        let good = [
            Kind::ModelDefaults(ModelDefaults {}),
            Kind::Fixed(FixedSettings { block_size: 8, threshold: Some(0.9), self_speculative: false }),
            Kind::Fixed(FixedSettings { block_size: 8, threshold: Some(0.4), self_speculative: true }),
            Kind::Fixed(FixedSettings { block_size: 1, threshold: None, self_speculative: false }),
            Kind::Automatic(Automatic { latency_ms: Some(20.0), floor: None, block_sizes: vec![4, 8] }),
        ];
        for kind in good {
            let Event::SetPolicy(model, intent) = read(request(kind.clone())).unwrap() else { panic!("another event") };
            assert_eq!((model.as_str(), to_message(&intent).kind), ("m", Some(kind)));
        }
        let bad = [
            (Kind::Fixed(FixedSettings { block_size: 0, threshold: Some(2.0), self_speculative: false }), "block_size"),
            (Kind::Fixed(FixedSettings { block_size: 8, threshold: None, self_speculative: false }), "intent.fixed"),
            (Kind::Fixed(FixedSettings { block_size: 1, threshold: None, self_speculative: true }), "self_speculative"),
            (Kind::Automatic(Automatic { latency_ms: Some(0.0), floor: Some(2.0), block_sizes: vec![] }), "floor"),
        ];
        for (kind, field) in bad {
            assert!(read(request(kind)).unwrap_err().message().contains(field), "{field}");
        }
        let empty = read(SetPolicyRequest::default()).unwrap_err();
        assert!(empty.message().contains("model") && empty.message().contains("intent"));
    }

    #[test]
    fn one_model_more_than_there_may_be_is_refused() {
        let mut state = State::new(Duration::from_secs(5), 0, BTreeMap::new(), Settings::new());
        let desired = |replicas| {
            let (source, policy) = (Source { path: "/m".into(), dtype: "bf16".into() }, Some(Intent::ModelDefaults));
            Desired { source, replicas, tensor_parallel: 1, spares: 0, memory_bytes: 0, policy }
        };
        let apply = |model: usize, replicas| Event::Apply(model.to_string(), desired(replicas));
        for model in 0..MODELS_MAX {
            check(&state, &apply(model, 1)).unwrap();
            decide(&mut state, apply(model, 1), Duration::ZERO);
        }
        let refused = check(&state, &apply(MODELS_MAX, 1)).unwrap_err();
        assert_eq!((refused.code(), state.settings().len()), (Code::ResourceExhausted, MODELS_MAX));
        check(&state, &apply(7, 2)).unwrap();
        decide(&mut state, apply(7, 0), Duration::ZERO);
        // There is room for what is wanted, but not for its policy: those are kept.
        let refused = check(&state, &apply(MODELS_MAX, 1)).unwrap_err();
        assert!(refused.message().contains("have a policy"), "{}", refused.message());
        assert_eq!(check(&state, &apply(MODELS_MAX, 0)).unwrap_err().code(), Code::ResourceExhausted);
        check(&state, &Event::Apply("another".into(), Desired { policy: None, ..desired(1) })).unwrap();
    }
}
