//! Groups of the pool: what is wanted of models, where it is placed, and forming anew what lost a rank.
//!
//! A group that computes is left alone: rank 0 proves every two seconds that all ranks do, so a rank that only this
//! controller does not hear is none that is lost. A group that is fenced (a rank said so, or another process came in a
//! rank's place) forms anew in a higher epoch, with whoever is heard of. Its workers keep their weights.

use super::settings::Intent;
use super::state::{Measured, Member};
use super::{Action, Fact, Readiness, State, StreamId};
use crate::placement::{Demand, Device, Plan, Problem, Slot, solve};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use unmask_proto::v1::{ModelDescriptor, Seat};

/// A worker that has been silent for longer gets no new seat, and loses that in a group that does not compute.
/// Two and a half heartbeats.
const SUSPECT: Duration = Duration::from_millis(2500);
/// First pause before a group that failed twice in a row forms anew; doubles up to [`FORM_PAUSE_MAX`].
const FORM_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause before a group forms anew.
const FORM_PAUSE_MAX: Duration = Duration::from_secs(30);

/// What is wanted of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    /// Its weights.
    #[serde(flatten)]
    pub source: Source,
    /// Groups.
    pub replicas: u32,
    /// Ranks of a group.
    pub tensor_parallel: u32,
    /// Workers to keep free.
    pub spares: u32,
    /// Least memory of a rank's worker (bytes).
    pub memory_bytes: u64,
    /// How block size and threshold are chosen; `None` leaves them as they are.
    pub policy: Option<Intent>,
}

/// A group that has a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Its incarnation.
    pub epoch: u64,
    /// Workers by rank, and what they had.
    pub ranks: Vec<(String, Device)>,
    /// What they were told to load.
    pub source: Source,
    /// When it was last assigned.
    since: Duration,
    /// Times it was assigned since it last served.
    tries: u32,
    /// Why it last failed.
    pub problem: String,
}

impl Placed {
    /// As the store has it.
    pub fn stored(epoch: u64, ranks: Vec<(String, Device)>, source: Source) -> Self {
        Self { epoch, ranks, source, since: Duration::ZERO, tries: 0, problem: String::new() }
    }
}

/// Weights, and how they are held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The model's folder.
    pub path: String,
    /// Type of the weights.
    pub dtype: String,
}

/// How it stands with a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its ranks load and meet.
    Forming,
    /// It computes.
    Serving,
    /// It lost a rank, or did not form.
    Fenced,
}

/// The pool's part of the state.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// What is wanted, by model, and of which revision.
    pub desired: BTreeMap<String, (Desired, u64)>,
    /// Of the last change of what is wanted.
    pub revision: u64,
    /// Groups that have a place.
    pub placed: BTreeMap<Slot, Placed>,
    /// As last solved: spares, and what has no place.
    pub plan: Plan,
    /// Groups of an earlier run that have not come back yet.
    pub(super) returning: BTreeSet<Slot>,
    /// What was measured of groups that have a place, and of which weights and ranks.
    pub(super) measured: BTreeMap<Slot, (Source, usize, Arc<Measured>)>,
}

impl Pool {
    /// What groups of several ranks need not measure again. One rank may have come to another device, and has not to
    /// wait for others.
    fn known(&self, slot: &Slot) -> Option<&Measured> {
        let group = self.placed.get(slot)?;
        let (source, ranks, measured) = self.measured.get(slot)?;
        (*ranks > 1 && *source == group.source && *ranks == group.ranks.len()).then_some(&**measured)
    }
}

/// The name of a group of the pool.
pub fn group_id(slot: &Slot) -> String {
    format!("{}/{}", slot.model, slot.replica)
}

impl State {
    pub(super) fn apply(&mut self, model: String, desired: Desired, actions: &mut Vec<Action>) {
        let pool = &mut self.pool;
        pool.revision += 1;
        let revision = pool.revision;
        let wanted = (desired.replicas > 0).then(|| desired.clone());
        match &wanted {
            Some(desired) => drop(pool.desired.insert(model.clone(), (desired.clone(), revision))),
            None => drop(pool.desired.remove(&model)),
        }
        let policy = desired.policy;
        actions.push(Action::Persist(Fact::Desired { model: model.clone(), desired: wanted, revision }));
        if let Some(intent) = policy {
            self.set_policy(model, intent, actions);
        }
    }

    pub(super) fn loaded(
        &mut self,
        stream: StreamId,
        epoch: u64,
        model: ModelDescriptor,
        measured: Option<Arc<Measured>>,
    ) {
        let worker = self.by_stream(stream).filter(|(_, member)| member.epoch == epoch && member.capacity.is_some());
        let Some((slot, _)) = worker.map(|(id, _)| id.clone()).and_then(|id| self.seat_of(&id)) else { return };
        if let (Some(measured), Some(group)) = (&measured, self.pool.placed.get(slot)) {
            let kept = (group.source.clone(), group.ranks.len(), Arc::clone(measured));
            let slot = slot.clone();
            self.pool.measured.insert(slot, kept);
        }
        if let Some((_, member)) = self.by_stream(stream) {
            (member.model, member.measured) = (model, measured);
        }
    }

    /// The group in which a worker has a seat, and its rank.
    pub(super) fn seat_of(&self, worker_id: &str) -> Option<(&Slot, usize)> {
        self.pool.placed.iter().find_map(|(slot, group)| {
            let rank = group.ranks.iter().position(|(worker, _)| worker == worker_id)?;
            Some((slot, rank))
        })
    }

    /// A worker's rank in its group of the pool; 0 where it has none.
    pub fn rank_of(&self, worker_id: &str) -> u32 {
        self.seat_of(worker_id).map_or(0, |(_, rank)| rank as u32)
    }

    /// How it stands with a group that has a place.
    pub fn phase(&self, group: &Placed) -> Phase {
        let stand: Vec<_> = group.ranks.iter().map(|(worker, _)| self.stand(worker, group.epoch)).collect();
        let any = |wanted: fn(&Option<Readiness>) -> bool| stand.iter().any(wanted);
        if any(|one| matches!(one, Some(Readiness::Fenced | Readiness::Draining))) {
            return Phase::Fenced;
        }
        match stand.first() {
            // It hears at once when another rank does not compute.
            Some(Some(Readiness::Ready)) => Phase::Serving,
            _ if any(Option::is_none) => Phase::Fenced,
            _ => Phase::Forming,
        }
    }

    /// Where a worker stands in a group's epoch; `None` when it is in another, or gone.
    fn stand(&self, worker: &str, epoch: u64) -> Option<Readiness> {
        self.members().get(worker).filter(|member| member.epoch == epoch).map(|member| member.readiness)
    }

    /// Workers that may hold a rank.
    fn devices(&self, now: Duration) -> BTreeMap<String, Device> {
        let mut devices = BTreeMap::new();
        for (worker, member) in self.members() {
            let Some(capacity) = &member.capacity else { continue };
            let heard = member.stream.is_some() && now.saturating_sub(member.heard) <= SUSPECT;
            if heard && member.readiness != Readiness::Draining {
                let device = Device { memory_bytes: capacity.memory_bytes, zone: capacity.zone.clone() };
                devices.insert(worker.clone(), device);
            }
        }
        for group in self.pool.placed.values().filter(|group| self.phase(group) == Phase::Serving) {
            for (worker, device) in &group.ranks {
                let drains = self.members().get(worker).is_some_and(|member| member.readiness == Readiness::Draining);
                if !drains {
                    devices.entry(worker.clone()).or_insert_with(|| device.clone());
                }
            }
        }
        devices
    }

    /// Makes groups what is wanted, as far as there are workers.
    pub(super) fn settle(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if now >= self.ttl() {
            self.pool.returning.clear();
        }
        let back = |slot: &Slot| self.pool.placed.get(slot).is_none_or(|group| self.phase(group) == Phase::Serving);
        let returning: BTreeSet<Slot> = self.pool.returning.iter().filter(|slot| !back(slot)).cloned().collect();
        self.pool.returning = returning;
        if !self.pool.returning.is_empty() || (self.pool.desired.is_empty() && self.pool.placed.is_empty()) {
            return;
        }
        let demand = |(desired, _): &(Desired, u64)| Demand {
            replicas: desired.replicas,
            degree: desired.tensor_parallel,
            memory_bytes: desired.memory_bytes,
            spares: desired.spares,
        };
        let demands = self.pool.desired.iter().map(|(model, desired)| (model.clone(), demand(desired))).collect();
        let problem = Problem { devices: self.devices(now), demands };
        let workers = |group: &Placed| group.ranks.iter().map(|(worker, _)| worker.clone()).collect();
        let groups = self.pool.placed.iter().map(|(slot, group)| (slot.clone(), workers(group))).collect();
        let plan = solve(&problem, &Plan { groups, ..std::mem::take(&mut self.pool.plan) });
        self.carry_out(&problem, &plan, now, actions);
        self.pool.plan = plan;
    }

    fn carry_out(&mut self, problem: &Problem, plan: &Plan, now: Duration, actions: &mut Vec<Action>) {
        let gone: Vec<Slot> =
            self.pool.placed.keys().filter(|slot| !plan.groups.contains_key(*slot)).cloned().collect();
        let mut freed = BTreeSet::new();
        for slot in gone {
            freed.extend(
                self.pool.placed.remove(&slot).into_iter().flat_map(|group| group.ranks).map(|(worker, _)| worker),
            );
            self.pool.measured.remove(&slot);
            actions.push(Action::Persist(Fact::Placed { slot, group: None }));
        }
        for (slot, workers) in &plan.groups {
            let source = self.pool.desired[&slot.model].0.source.clone();
            let ranks = || workers.iter().map(|worker| (worker.clone(), problem.devices[worker].clone())).collect();
            let Some(group) = self.pool.placed.get(slot) else {
                self.form(slot, Placed::stored(0, ranks(), source), now, actions);
                continue;
            };
            let (phase, mut group) = (self.phase(group), group.clone());
            let moved = !group.ranks.iter().map(|(worker, _)| worker).eq(workers.iter());
            if phase == Phase::Serving && group.tries > 0 {
                group.tries = 0;
                group.problem.clear();
                self.pool.placed.insert(slot.clone(), group.clone());
            }
            if let Some(problem) = self.problem(&group) {
                group.problem = problem;
                self.pool.placed.insert(slot.clone(), group.clone());
            }
            let pause = match group.tries {
                0 | 1 => Duration::ZERO,
                tries => FORM_PAUSE.saturating_mul(1 << (tries - 2).min(8)).min(FORM_PAUSE_MAX),
            };
            if moved {
                freed.extend(group.ranks.iter().map(|(worker, _)| worker.clone()));
                group.ranks = ranks();
                self.form(slot, group, now, actions);
            } else if phase == Phase::Fenced && now.saturating_sub(group.since) >= pause
                // Other weights, one group of a model after the other.
                || phase == Phase::Serving && group.source != source && self.all_serve(&slot.model)
            {
                self.form(slot, Placed { source, ..group }, now, actions);
            }
        }
        for worker in freed {
            if self.seat_of(&worker).is_none() {
                self.release(&worker, actions);
            }
        }
    }

    fn all_serve(&self, model: &str) -> bool {
        let mut groups = self.pool.placed.iter().filter(|(slot, _)| slot.model == model);
        groups.all(|(_, group)| self.phase(group) == Phase::Serving)
    }

    /// Why a rank of the group says that it is fenced.
    fn problem(&self, group: &Placed) -> Option<String> {
        let mut said = group.ranks.iter().rev().filter_map(|(worker, _)| {
            let member = self.members().get(worker).filter(|member| member.epoch == group.epoch)?;
            (member.readiness == Readiness::Fenced).then(|| format!("{worker}: {}", member.problem))
        });
        said.next()
    }

    /// Assigns a group's ranks in a new epoch.
    fn form(&mut self, slot: &Slot, group: Placed, now: Duration, actions: &mut Vec<Action>) {
        let epoch = self.next_epoch(group.epoch, actions);
        let group = Placed { epoch, since: now, tries: group.tries + 1, ..group };
        actions.push(Action::Persist(Fact::Placed { slot: slot.clone(), group: Some(group.clone()) }));
        for (worker, _) in &group.ranks {
            if let Some(member) = self.member_mut(worker) {
                (member.group_id, member.epoch, member.readiness) = (group_id(slot), epoch, Readiness::Loading);
                (member.model, member.measured) = (ModelDescriptor::default(), None);
            }
        }
        self.pool.placed.insert(slot.clone(), group.clone());
        for (worker, _) in &group.ranks {
            self.assign(worker, actions);
        }
    }

    /// Tells a worker of the pool what it is.
    pub(super) fn assign(&mut self, worker_id: &str, actions: &mut Vec<Action>) {
        let Some(Member { stream: Some(stream), .. }) = self.members().get(worker_id) else { return };
        let stream = *stream;
        let Some((slot, rank)) = self.seat_of(worker_id) else { return };
        let Some(group) = self.pool.placed.get(slot) else { return };
        let address = |worker: &String| {
            let capacity = self.members().get(worker).and_then(|member| member.capacity.as_ref());
            capacity.map_or_else(String::new, |capacity| capacity.rank_address.clone())
        };
        let known = self.pool.known(slot);
        let seat = Seat {
            model: slot.model.clone(),
            path: group.source.path.clone(),
            dtype: group.source.dtype.clone(),
            rank: rank as u32,
            rank_addresses: group.ranks.iter().map(|(worker, _)| address(worker)).collect(),
            profile_json: known.and_then(|known| serde_json::to_string(&known.profile).ok()).unwrap_or_default(),
        };
        let (group_id, epoch) = (group_id(slot), group.epoch);
        actions.push(Action::Assign { stream, group_id, epoch, seat: Some(seat) });
    }

    /// Makes a worker a spare.
    pub(super) fn release(&mut self, worker_id: &str, actions: &mut Vec<Action>) {
        let Some(seen) = self.members().get(worker_id).map(|member| member.epoch) else { return };
        // A process that never had a seat is one already.
        let epoch = if seen > 0 { self.next_epoch(seen, actions) } else { 0 };
        let Some(member) = self.member_mut(worker_id) else { return };
        (member.group_id, member.epoch) = (String::new(), epoch);
        (member.model, member.measured) = (ModelDescriptor::default(), None);
        if member.readiness != Readiness::Draining {
            member.readiness = Readiness::Spare;
        }
        if let Some(stream) = member.stream {
            actions.push(Action::Assign { stream, group_id: String::new(), epoch, seat: None });
        }
    }
}

#[cfg(test)]
mod tests;
