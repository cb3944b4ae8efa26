//! The controller's decisions: `decide(state, event, now) -> actions`. No clock, socket, store or randomness.
//!
//! A worker that brings a model is a group of its own; workers of the pool become groups as what is wanted of models says
//! ([`groups`]). A group's epoch rises when another process joins as its worker, above everything any
//! member has reported and everything the store holds; a process that comes back, to this controller or to one that took
//! over, keeps its epoch, and with it its place in the routes that gateways know. A table of routes holds the workers that are ready in their
//! current epoch and were heard of within the time-to-live.

pub mod groups;
mod live;
pub mod settings;
mod state;
#[cfg(test)]
mod tests;

pub use live::Pace;
pub use state::{Measured, Member, State};

use crate::placement::Slot;
use groups::{Desired, Placed};
use settings::{Intent, Settings};
use std::sync::Arc;
use std::time::Duration;
use unmask_proto::v1::{Capacity, ModelDescriptor, Route, Seat};

/// Most members.
pub const MEMBERS_MAX: usize = 1024;
/// Most models with settings of their own.
pub const MODELS_MAX: usize = 1024;

/// One Join stream. Numbers are never used twice while a controller runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// What a worker says when it joins; validated.
#[derive(Debug, Clone, PartialEq)]
pub struct Joining {
    /// Stable over reconnects of one process.
    pub worker_id: String,
    /// host:port.
    pub endpoint: String,
    /// What it holds; of the pool, nothing.
    pub model: ModelDescriptor,
    /// What it offers, if it is of the pool.
    pub capacity: Option<Capacity>,
    /// Highest epoch it has seen.
    pub epoch: u64,
    /// Its step times and the model's quality, where it has both.
    pub measured: Option<Arc<Measured>>,
}

/// Where a worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Not yet able to serve.
    Loading,
    /// Serves.
    Ready,
    /// Finishes what it holds and takes nothing new.
    Draining,
    /// Of the pool, and has no seat.
    Spare,
    /// Its group is over, or did not form.
    Fenced,
}

/// A heartbeat; validated.
#[derive(Debug, Clone, PartialEq)]
pub struct Heartbeat {
    /// Epoch the worker serves in; 0 before its first assignment.
    pub epoch: u64,
    /// Where it stands.
    pub readiness: Readiness,
    /// Rows of admitted work not yet done.
    pub outstanding_rows: u64,
    /// Requests that are served or wait.
    pub requests: u32,
    /// Of them, those that share its steps.
    pub active: u32,
    /// Why it is fenced.
    pub problem: String,
    /// Layers in memory while it loads (percent).
    pub loaded_percent: u32,
    /// Latest revision of the model's policy among the requests taken.
    pub policy_revision: u64,
    /// How fast its requests are decoded.
    pub pace: Pace,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// First message of a stream.
    Hello(StreamId, Box<Joining>),
    /// A heartbeat.
    Report(StreamId, Heartbeat),
    /// What a group of the pool serves in an epoch, by its rank 0.
    Loaded(StreamId, u64, Box<ModelDescriptor>, Option<Arc<Measured>>),
    /// The worker leaves for good.
    Leave(StreamId),
    /// The stream broke off; its worker may come back.
    StreamClosed(StreamId),
    /// Nobody listens any more where the worker of a stream that broke off did.
    Refused(StreamId),
    /// A worker is to finish what it holds and leave.
    Drain(String),
    /// What is wanted of a model.
    Apply(String, Desired),
    /// The settings of a model are to come about otherwise.
    SetPolicy(String, Intent),
    /// Time passed.
    Tick,
}

/// Why a stream is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The worker left.
    Left,
    /// Its worker joined again on another stream, or another worker took its endpoint.
    Superseded,
    /// Nothing was heard for the time-to-live, or the worker's process has ended.
    Silent,
    /// [`MEMBERS_MAX`] is reached.
    Full,
}

/// A group, as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub id: String,
    /// Its incarnation.
    pub epoch: u64,
}

/// A fact the store keeps.
#[derive(Debug, Clone, PartialEq)]
pub enum Fact {
    /// No epoch up to this one may be handed out again.
    EpochFloor(u64),
    /// The group of a worker.
    Group {
        /// The worker.
        worker_id: String,
        /// Its group.
        group: Group,
    },
    /// The worker is gone.
    NoGroup {
        /// The worker.
        worker_id: String,
    },
    /// What is wanted of a model.
    Desired {
        /// The model.
        model: String,
        /// `None`: nothing any more.
        desired: Option<Desired>,
        /// Of the change.
        revision: u64,
    },
    /// Where a group of the pool is.
    Placed {
        /// The group.
        slot: Slot,
        /// `None`: nowhere any more.
        group: Option<Placed>,
    },
    /// How the settings of a model come about.
    Settings {
        /// The model.
        model: String,
        /// What was asked for.
        intent: Intent,
        /// Of its last change.
        revision: u64,
    },
}

/// What to do, in order. When a fact cannot be stored, the rest for that stream must not happen.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Store a fact durably.
    Persist(Fact),
    /// Tell a worker its group and epoch.
    Assign {
        /// Its stream.
        stream: StreamId,
        /// Its group.
        group_id: String,
        /// The group's epoch.
        epoch: u64,
        /// Of a worker of the pool, unless it becomes a spare.
        seat: Option<Seat>,
    },
    /// Tell a worker to drain.
    TellToDrain(StreamId),
    /// End a stream.
    Close(StreamId, Ending),
    /// Find out whether anybody listens where the worker of a stream that broke off did.
    Probe {
        /// The stream.
        stream: StreamId,
        /// host:port.
        endpoint: String,
    },
    /// Publish the whole table.
    PublishRoutes {
        /// Rises with every publication.
        revision: u64,
        /// In order of group id.
        routes: Vec<Route>,
        /// Of all models that were asked about.
        settings: Settings,
    },
}

/// Applies one event. `now` is the time since the controller started and never falls.
pub fn decide(state: &mut State, event: Event, now: Duration) -> Vec<Action> {
    let mut actions = Vec::new();
    let mut loads = false;
    let mut settles = true;
    match event {
        Event::Hello(stream, joining) => state.hello(stream, *joining, now, &mut actions),
        // One that changes nothing leaves the groups as they are; the next tick looks at them anyway.
        Event::Report(stream, heartbeat) => settles = state.report(stream, heartbeat, now, &mut actions),
        Event::Loaded(stream, epoch, model, measured) => state.loaded(stream, epoch, *model, measured),
        Event::Leave(stream) => state.leave(stream, &mut actions),
        Event::StreamClosed(stream) => state.stream_closed(stream, &mut actions),
        Event::Refused(stream) => state.refused(stream, now, &mut actions),
        Event::Drain(worker_id) => state.drain(&worker_id, &mut actions),
        Event::Apply(model, desired) => state.apply(model, desired, &mut actions),
        Event::SetPolicy(model, intent) => state.set_policy(model, intent, &mut actions),
        Event::Tick => {
            state.expire(now, &mut actions);
            state.follow_load(&mut actions);
            // Loads change with every heartbeat; publishing them once a tick keeps the tables few.
            loads = true;
        }
    }
    if settles {
        state.settle(now, &mut actions);
    }
    state.publish(now, loads, &mut actions);
    actions
}
