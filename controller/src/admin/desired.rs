//! What is wanted of models, as messages.

use super::{read_intent, to_message};
use crate::core::groups::{Desired, Phase, Placed, Source, group_id};
use crate::core::{Event, State};
use crate::placement::Slot;
use tonic::Status;
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::{ApplyRequest, DesiredModel, GroupState, GroupStatus, ModelStatus};

/// Longest name of a model, or path of one (bytes).
const NAME_BYTES_MAX: usize = 256;
/// Most groups of a model, and most spares.
const GROUPS_MAX: u32 = 256;
/// Types of weights.
const DTYPES: [&str; 3] = ["f32", "bf16", "int8"];

/// Reads what is wanted of a model.
///
/// # Errors
/// INVALID_ARGUMENT with every field at fault.
pub(crate) fn read(request: ApplyRequest) -> Result<Event, Status> {
    let mut found = Vec::new();
    let mut require = |ok: bool, field: &str, description: &str| {
        if !ok {
            found.push(Violation::new(format!("model.{field}"), description));
        }
    };
    let model = request.model.unwrap_or_default();
    require((1..=NAME_BYTES_MAX).contains(&model.name.len()), "name", "must have from 1 to 256 bytes");
    let path = model.replicas == 0 || (1..=NAME_BYTES_MAX).contains(&model.path.len());
    require(path, "path", "must have from 1 to 256 bytes: the model's folder on every worker");
    require(model.replicas <= GROUPS_MAX, "replicas", "must be at most 256");
    require([1, 2, 4, 8].contains(&model.tensor_parallel), "tensor_parallel", "must be 1, 2, 4 or 8");
    require(model.spares <= GROUPS_MAX, "spares", "must be at most 256");
    require(DTYPES.contains(&model.dtype.as_str()), "dtype", "must be f32, bf16 or int8");
    let policy = model.policy.map(|policy| read_intent(Some(policy), &mut require));
    if !found.is_empty() {
        return Err(rich::invalid(&found));
    }
    let DesiredModel { name, path, replicas, tensor_parallel, spares, dtype, memory_bytes, .. } = model;
    let source = Source { path, dtype };
    Ok(Event::Apply(name, Desired { source, replicas, tensor_parallel, spares, memory_bytes, policy }))
}

/// What is wanted, and what became of it.
pub(crate) fn models(state: &State) -> Vec<ModelStatus> {
    let pool = state.pool();
    let status = |(model, (desired, revision)): (&String, &(Desired, u64))| ModelStatus {
        desired: Some(to_desired(model, desired)),
        revision: *revision,
        groups: (0..desired.replicas).map(|replica| group(state, &Slot { model: model.clone(), replica })).collect(),
        spares: pool.plan.spares.get(model).into_iter().flatten().cloned().collect(),
        short: pool.plan.short.get(model).cloned().unwrap_or_default(),
    };
    pool.desired.iter().map(status).collect()
}

fn group(state: &State, slot: &Slot) -> GroupStatus {
    let group_id = group_id(slot);
    let Some(placed) = state.pool().placed.get(slot) else {
        let why = state.pool().plan.pending.get(slot).cloned().unwrap_or_else(|| "not yet looked at".into());
        return GroupStatus { group_id, state: GroupState::Pending.into(), why, ..GroupStatus::default() };
    };
    let (phase, why) = match state.phase(placed) {
        Phase::Serving => (GroupState::Serving, String::new()),
        Phase::Forming => (GroupState::Forming, waiting(state, placed)),
        Phase::Fenced => (GroupState::Fenced, placed.problem.clone()),
    };
    let ranks = placed.ranks.iter().map(|(worker, _)| worker.clone()).collect();
    GroupStatus { group_id, epoch: placed.epoch, state: phase.into(), ranks, why }
}

/// How far the ranks are, and what went wrong before.
fn waiting(state: &State, placed: &Placed) -> String {
    let loaded = |(worker, _): &(String, _)| state.members().get(worker).map_or(0, |member| member.loaded_percent);
    let least = placed.ranks.iter().map(loaded).min().unwrap_or(0);
    let before = if placed.problem.is_empty() { String::new() } else { format!("; before: {}", placed.problem) };
    format!("{least}% loaded{before}")
}

fn to_desired(name: &str, desired: &Desired) -> DesiredModel {
    DesiredModel {
        name: name.to_owned(),
        path: desired.source.path.clone(),
        replicas: desired.replicas,
        tensor_parallel: desired.tensor_parallel,
        spares: desired.spares,
        dtype: desired.source.dtype.clone(),
        memory_bytes: desired.memory_bytes,
        policy: desired.policy.as_ref().map(to_message),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let model = DesiredModel { replicas: 1, tensor_parallel: 3, dtype: "fp8".into(), ..DesiredModel::default() };
        let refused = read(ApplyRequest { model: Some(model) }).unwrap_err();
        for field in ["model.name", "model.path", "model.tensor_parallel", "model.dtype"] {
            assert!(refused.message().contains(field), "{field}: {}", refused.message());
        }
    }
}
