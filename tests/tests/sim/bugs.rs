//! Bugs planted in the services, to see that the simulation finds them.

use crate::search;
use unmask_proto::failpoints;

/// Seeds within which a planted bug must be found.
const SEEDS: u64 = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    Service(failpoints::Bug),
    /// In the engine: pages of a request that was cancelled are free twice.
    PagesFreedTwice,
}

impl Bug {
    const ALL: [Bug; 6] = [
        Bug::Service(failpoints::Bug::NoDedupe),
        Bug::Service(failpoints::Bug::NoEpochCheck),
        Bug::Service(failpoints::Bug::NoTermCheck),
        Bug::Service(failpoints::Bug::NoGrace),
        Bug::Service(failpoints::Bug::UnpinnedPolicy),
        Bug::PagesFreedTwice,
    ];

    /// By its name in `SIM_BUG`.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bug| format!("{bug:?}").contains(name))
    }
}

/// Plants a bug in what this thread runs, or takes it out.
pub fn plant(bug: Option<Bug>) {
    failpoints::plant(if let Some(Bug::Service(bug)) = bug { Some(bug) } else { None });
    unmask_engine::failpoints::plant(bug == Some(Bug::PagesFreedTwice));
}

/// The bug is found, by what it breaks.
fn is_found(bug: Bug, by: &str) {
    let (seed, wrong) = search(0..SEEDS, Some(bug)).unwrap_or_else(|| panic!("{bug:?} is not found"));
    let what = wrong.lines().find(|line| line.starts_with("seed ")).unwrap_or_default();
    println!("{bug:?} is found by seed {seed}: {what}");
    assert!(wrong.contains(by), "{wrong}");
}

#[test]
fn a_position_sent_twice_is_found() {
    is_found(Bug::Service(failpoints::Bug::NoDedupe), "I5: ");
}

#[test]
fn a_request_of_another_epoch_is_found() {
    is_found(Bug::Service(failpoints::Bug::NoEpochCheck), "I9: ");
}

#[test]
fn a_leader_of_the_past_is_found() {
    is_found(Bug::Service(failpoints::Bug::NoTermCheck), "I9: ");
}

#[test]
fn a_leader_without_grace_is_found() {
    is_found(Bug::Service(failpoints::Bug::NoGrace), "I9: ");
}

#[test]
fn settings_that_change_midway_are_found() {
    is_found(Bug::Service(failpoints::Bug::UnpinnedPolicy), "I1: ");
}

#[test]
fn a_page_freed_twice_is_found() {
    is_found(Bug::PagesFreedTwice, "I7: ");
}
