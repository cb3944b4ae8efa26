//! Members, epochs and the table last published.

use super::groups::{Desired, Placed, Pool, group_id};
use super::settings::{Intent, Settings};
use super::{Action, Ending, Fact, Group, Heartbeat, Joining, MEMBERS_MAX, MODELS_MAX, Pace, Readiness, StreamId};
use crate::placement::Slot;
use crate::policy::{Profile, Quality};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use unmask_proto::failpoints::{Bug, planted};
use unmask_proto::v1::{Capacity, ModelDescriptor, Route};

/// What was measured of a model on a worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Step times.
    pub profile: Profile,
    /// Quality by way to decode.
    pub quality: Quality,
}

/// A worker that has joined.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its stream; `None` while it is broken off.
    pub stream: Option<StreamId>,
    /// The stream that broke off, while there is no other.
    pub(super) broken: Option<StreamId>,
    /// Its stream broke off, and nobody listens at its endpoint: its process has ended.
    pub(super) ended: bool,
    /// Its group; of the pool, empty while it has none.
    pub group_id: String,
    /// The group's epoch.
    pub epoch: u64,
    /// host:port.
    pub endpoint: String,
    /// What it holds.
    pub model: ModelDescriptor,
    /// What was measured of it.
    pub measured: Option<Arc<Measured>>,
    /// What it offers, if it is of the pool.
    pub capacity: Option<Capacity>,
    /// As last reported in the current epoch.
    pub readiness: Readiness,
    /// Why it is fenced.
    pub problem: String,
    /// Layers in memory while it loads (percent).
    pub loaded_percent: u32,
    /// Latest revision of the model's policy among the requests that its group has taken.
    pub policy_revision: u64,
    /// As last reported.
    pub pace: Pace,
    /// As last reported (rows).
    pub outstanding_rows: u64,
    /// As last reported: served or waiting.
    pub requests: u32,
    /// Of them, those that share its steps.
    pub active: u32,
    /// When it was last heard of.
    pub heard: Duration,
}

impl Member {
    /// One that has joined. A process that is back stands where `earlier` stood until it says otherwise.
    fn new(stream: StreamId, joining: Joining, group: Group, earlier: Option<Member>, now: Duration) -> Self {
        let spare = joining.capacity.is_some() && group.id.is_empty();
        let readiness = if spare { Readiness::Spare } else { Readiness::Loading };
        let Joining { endpoint, model, measured, capacity, .. } = joining;
        // What a group of the pool serves was said by another message than Hello.
        let said = earlier.as_ref().filter(|_| capacity.is_some()).map(|member| (&member.model, &member.measured));
        let (model, measured) = said.map_or((model, measured), |(model, measured)| (model.clone(), measured.clone()));
        Self {
            stream: Some(stream),
            broken: None,
            ended: false,
            group_id: group.id,
            epoch: group.epoch,
            endpoint,
            model,
            measured,
            capacity,
            readiness: earlier.as_ref().map_or(readiness, |member| member.readiness),
            problem: String::new(),
            loaded_percent: 0,
            policy_revision: 0,
            pace: Pace::default(),
            outstanding_rows: earlier.as_ref().map_or(0, |member| member.outstanding_rows),
            requests: earlier.as_ref().map_or(0, |member| member.requests),
            active: earlier.map_or(0, |member| member.active),
            heard: now,
        }
    }
}

/// Everything the controller knows.
#[derive(Debug, Clone)]
pub struct State {
    ttl: Duration,
    epoch_floor: u64,
    members: BTreeMap<String, Member>,
    /// Groups of an earlier run, by worker, that have not come back yet.
    missing: BTreeMap<String, Group>,
    settings: Settings,
    /// Groups of workers that bring no model.
    pub(super) pool: Pool,
    revision: u64,
    published: Option<(Vec<Route>, Settings)>,
}

impl State {
    /// The state at a start: what the store holds, and nobody heard of yet.
    pub fn new(ttl: Duration, epoch_floor: u64, groups: BTreeMap<String, Group>, settings: Settings) -> Self {
        let (members, pool) = (BTreeMap::new(), Pool::default());
        Self { ttl, epoch_floor, members, missing: groups, settings, pool, revision: 0, published: None }
    }

    /// With what the store holds of the pool: what is wanted, and where its groups were.
    pub fn with_pool(mut self, desired: BTreeMap<String, (Desired, u64)>, placed: BTreeMap<Slot, Placed>) -> Self {
        let revision = desired.values().map(|(_, revision)| *revision).max().unwrap_or(0);
        let returning = placed.keys().cloned().collect();
        self.pool = Pool { desired, revision, placed, returning, ..Pool::default() };
        self
    }

    /// Groups of workers that bring no model.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn ttl(&self) -> Duration {
        self.ttl
    }

    pub(super) fn member_mut(&mut self, worker_id: &str) -> Option<&mut Member> {
        self.members.get_mut(worker_id)
    }

    /// No epoch up to this one is handed out again.
    pub fn epoch_floor(&self) -> u64 {
        self.epoch_floor
    }

    /// Members by worker id.
    pub fn members(&self) -> &BTreeMap<String, Member> {
        &self.members
    }

    /// Settings by model.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Of the table last published.
    pub fn routes_revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn drain(&mut self, worker_id: &str, actions: &mut Vec<Action>) {
        // From here on it gets nothing new, whatever it says until it has heard.
        if let Some(member) = self.members.get_mut(worker_id).filter(|member| member.stream.is_some()) {
            member.readiness = Readiness::Draining;
        }
        actions.extend(self.members.get(worker_id).and_then(|member| member.stream).map(Action::TellToDrain));
    }

    pub(super) fn set_policy(&mut self, model: String, intent: Intent, actions: &mut Vec<Action>) {
        if self.settings.len() < MODELS_MAX || self.settings.contains_key(&model) {
            actions.push(self.settings.entry(model.clone()).or_default().set(&model, intent));
        }
    }

    pub(super) fn follow_load(&mut self, actions: &mut Vec<Action>) {
        for (model, settings) in &mut self.settings {
            let members: Vec<_> = self.members.values().filter(|member| member.model.name == *model).collect();
            actions.extend(settings.follow(model, &members));
        }
    }

    pub(super) fn by_stream(&mut self, stream: StreamId) -> Option<(&String, &mut Member)> {
        self.members.iter_mut().find(|(_, member)| member.stream == Some(stream))
    }

    pub(super) fn hello(&mut self, stream: StreamId, joining: Joining, now: Duration, actions: &mut Vec<Action>) {
        let (worker_id, member) = (joining.worker_id.clone(), self.members.get(&joining.worker_id));
        let told = member.is_some_and(|member| member.readiness == Readiness::Draining);
        // The same process, which did not hear of it: one that has started since knows no epoch.
        let missed = told && joining.epoch > 0;
        self.welcome(stream, joining, now, actions);
        if missed {
            self.drain(&worker_id, actions);
        }
    }

    fn welcome(&mut self, stream: StreamId, joining: Joining, now: Duration, actions: &mut Vec<Action>) {
        // Another worker at the same endpoint is a process that is gone: two cannot listen on one port.
        let squatters: Vec<_> = self
            .members
            .iter()
            .filter(|(id, member)| **id != joining.worker_id && member.endpoint == joining.endpoint)
            .map(|(id, _)| id.clone())
            .collect();
        for worker_id in squatters {
            self.remove(&worker_id, Ending::Superseded, actions);
        }
        let earlier = self.members.remove(&joining.worker_id);
        if earlier.is_none() && self.members.len() >= MEMBERS_MAX {
            actions.push(Action::Close(stream, Ending::Full));
            return;
        }
        if let Some(old) = earlier.as_ref().and_then(|member| member.stream) {
            actions.push(Action::Close(old, Ending::Superseded));
        }
        if joining.capacity.is_some() {
            return self.pooled_hello(stream, joining, earlier, now, actions);
        }
        let group = |member: &Member| Group { id: member.group_id.clone(), epoch: member.epoch };
        let known = earlier.as_ref().map(group).or_else(|| self.missing.get(&joining.worker_id).cloned());
        let back = known.as_ref().is_some_and(|group| group.epoch > 0 && group.epoch == joining.epoch);
        let group = match known {
            Some(group) if back => group,
            known => {
                let id = known.map_or_else(|| format!("group-{}", joining.worker_id), |group| group.id);
                let group = Group { id, epoch: self.next_epoch(joining.epoch, actions) };
                let fact = Fact::Group { worker_id: joining.worker_id.clone(), group: group.clone() };
                actions.push(Action::Persist(fact));
                group
            }
        };
        actions.push(Action::Assign { stream, group_id: group.id.clone(), epoch: group.epoch, seat: None });
        let earlier = earlier.filter(|_| back);
        self.members.insert(joining.worker_id.clone(), Member::new(stream, joining, group, earlier, now));
    }

    /// A worker of the pool: back in its seat, or there for one.
    fn pooled_hello(
        &mut self,
        stream: StreamId,
        joining: Joining,
        earlier: Option<Member>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let worker_id = joining.worker_id.clone();
        let seat = self.seat_of(&worker_id).map(|(slot, _)| slot.clone());
        let back = seat.as_ref().filter(|slot| self.pool.placed[*slot].epoch == joining.epoch).map(group_id);
        if joining.epoch > self.epoch_floor {
            self.next_epoch(joining.epoch, actions);
        }
        let is_back = back.is_some();
        let group = Group { id: back.unwrap_or_default(), epoch: joining.epoch };
        let member = Member::new(stream, joining, group, earlier.filter(|_| is_back), now);
        self.members.insert(worker_id.clone(), member);
        match seat {
            Some(_) if is_back => self.assign(&worker_id, actions),
            // Another process in a rank's place: the group forms anew.
            Some(_) => {}
            None => self.release(&worker_id, actions),
        }
    }

    /// An epoch above everything handed out, stored or reported, `seen` included.
    pub(super) fn next_epoch(&mut self, seen: u64, actions: &mut Vec<Action>) -> u64 {
        self.epoch_floor = self.epoch_floor.max(seen).saturating_add(1);
        actions.push(Action::Persist(Fact::EpochFloor(self.epoch_floor)));
        self.epoch_floor
    }

    /// Takes a heartbeat; whether the worker stands elsewhere than before.
    pub(super) fn report(
        &mut self,
        stream: StreamId,
        beat: Heartbeat,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> bool {
        let floor = self.epoch_floor;
        let Some((worker_id, member)) = self.by_stream(stream) else { return false };
        member.heard = now;
        let worker_id = worker_id.clone();
        if beat.epoch > floor {
            self.rise_above(&worker_id, beat.epoch, actions);
            return true;
        }
        (member.outstanding_rows, member.requests, member.active) = (beat.outstanding_rows, beat.requests, beat.active);
        // A report of an earlier epoch says that the worker lives, not that it serves in this one.
        if beat.epoch != member.epoch {
            return false;
        }
        (member.problem, member.loaded_percent) = (beat.problem, beat.loaded_percent);
        (member.policy_revision, member.pace) = (beat.policy_revision, beat.pace);
        let before = member.readiness;
        // One that was told to drain does.
        if before != Readiness::Draining {
            member.readiness = beat.readiness;
        }
        if beat.readiness != Readiness::Loading {
            self.missing.remove(&worker_id);
        }
        before != beat.readiness
    }

    /// A worker was led by a controller whose epochs this one never saw: it moves above them.
    fn rise_above(&mut self, worker_id: &str, seen: u64, actions: &mut Vec<Action>) {
        let epoch = self.next_epoch(seen, actions);
        let seated = self.seat_of(worker_id).is_some();
        let Some(member) = self.members.get_mut(worker_id) else { return };
        if member.capacity.is_some() {
            member.epoch = seen;
            if !seated {
                self.release(worker_id, actions);
            }
            return;
        }
        (member.epoch, member.readiness) = (epoch, Readiness::Loading);
        if let Some(stream) = member.stream {
            let group_id = member.group_id.clone();
            actions.push(Action::Assign { stream, group_id, epoch, seat: None });
        }
    }

    pub(super) fn leave(&mut self, stream: StreamId, actions: &mut Vec<Action>) {
        if let Some(worker_id) = self.by_stream(stream).map(|(id, _)| id.clone()) {
            self.remove(&worker_id, Ending::Left, actions);
        }
    }

    pub(super) fn stream_closed(&mut self, stream: StreamId, actions: &mut Vec<Action>) {
        // The worker may still serve; whether it listens says more, else silence decides.
        if let Some((_, member)) = self.by_stream(stream) {
            (member.stream, member.broken) = (None, Some(stream));
            actions.push(Action::Probe { stream, endpoint: member.endpoint.clone() });
        }
    }

    pub(super) fn refused(&mut self, stream: StreamId, now: Duration, actions: &mut Vec<Action>) {
        // One that has joined again meanwhile has another stream.
        if let Some(member) = self.members.values_mut().find(|member| member.broken == Some(stream)) {
            member.ended = true;
            self.expire(now, actions);
        }
    }

    pub(super) fn expire(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let (ttl, graced) = (self.ttl, now < self.grace());
        let silent: Vec<_> = self
            .members
            .iter()
            .filter(|(_, member)| now.saturating_sub(member.heard) >= ttl || (member.ended && !graced))
            .map(|(id, _)| id.clone())
            .collect();
        for worker_id in silent {
            self.remove(&worker_id, Ending::Silent, actions);
        }
        if now >= self.grace() {
            let here: BTreeSet<_> = self.members.keys().cloned().collect();
            for worker_id in std::mem::take(&mut self.missing).into_keys() {
                if !here.contains(&worker_id) {
                    actions.push(Action::Persist(Fact::NoGroup { worker_id }));
                }
            }
        }
    }

    fn remove(&mut self, worker_id: &str, ending: Ending, actions: &mut Vec<Action>) {
        let Some(member) = self.members.remove(worker_id) else { return };
        self.missing.remove(worker_id);
        if let Some(stream) = member.stream {
            actions.push(Action::Close(stream, ending));
        }
        actions.push(Action::Persist(Fact::NoGroup { worker_id: worker_id.to_owned() }));
    }

    /// How long after a start nobody is declared dead.
    fn grace(&self) -> Duration {
        if planted(Bug::NoGrace) { Duration::ZERO } else { self.ttl }
    }

    /// Publishes the table when it changed; loads alone count only with `loads`.
    pub(super) fn publish(&mut self, now: Duration, loads: bool, actions: &mut Vec<Action>) {
        // Grace: until the groups of the last run are back or a time-to-live has passed, a table would declare
        // them dead. Gateways keep what they know.
        if (!self.missing.is_empty() || !self.pool.returning.is_empty()) && now < self.grace() {
            return;
        }
        let routes = self.routes();
        let changed = match &self.published {
            None => true,
            Some((published, _)) if loads && *published != routes => true,
            Some((published, settings)) => {
                !same_but_for_loads(published, &routes) || !same_in_force(settings, &self.settings)
            }
        };
        if changed {
            self.revision += 1;
            let settings = self.settings.clone();
            self.published = Some((routes.clone(), settings.clone()));
            actions.push(Action::PublishRoutes { revision: self.revision, routes, settings });
        }
    }

    fn routes(&self) -> Vec<Route> {
        let mut routes: Vec<_> = self
            .members
            .values()
            // Of a group of the pool only rank 0 has a model to say.
            .filter(|member| member.readiness == Readiness::Ready && !member.model.name.is_empty())
            .map(|member| Route {
                model: member.model.name.clone(),
                group_id: member.group_id.clone(),
                epoch: member.epoch,
                endpoint: member.endpoint.clone(),
                descriptor: Some(member.model.clone()),
                outstanding_rows: member.outstanding_rows,
            })
            .collect();
        routes.sort_by(|a, b| a.group_id.cmp(&b.group_id));
        routes
    }
}

fn same_but_for_loads(a: &[Route], b: &[Route]) -> bool {
    let same = |a: &Route, b: &Route| {
        a.group_id == b.group_id
            && a.epoch == b.epoch
            && a.endpoint == b.endpoint
            && a.model == b.model
            && a.descriptor == b.descriptor
    };
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
}

fn same_in_force(a: &Settings, b: &Settings) -> bool {
    let same = |((name, a), (other, b)): ((&String, &_), (&String, &_))| {
        let (a, b): (&super::settings::ModelSettings, &super::settings::ModelSettings) = (a, b);
        name == other && a.revision == b.revision && a.current == b.current
    };
    a.len() == b.len() && a.iter().zip(b).all(same)
}
