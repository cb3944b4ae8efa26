//! Histories that once went wrong.

use crate::faults::Fault;
use crate::host::ticks;
use crate::plan::{Kind, Plan};
use crate::{follow, report};
use std::time::Duration;

/// A plan of a seed whose kind and number of controllers fit, with faults of the test's own.
fn plan(kind: Kind, from: u64, faults: Vec<(u64, Fault)>) -> Plan {
    let mut plans = (from..).map(Plan::draw).filter(|plan| plan.kind == kind && plan.counts[0] == 3);
    Plan { faults, ..plans.next().unwrap() }
}

/// Workers paused for up to 3 s between two tries to join, longer over two dead replicas than the 5 s that a new leader waits
/// for them: it declared workers dead that were well, and gateways lost their routes.
#[test]
fn workers_find_the_new_leader_within_its_grace() {
    let seconds = |seconds| ticks(Duration::from_secs(seconds));
    for seed in 0..12 {
        let kill = |host, for_seconds| Fault::Kill { host, silent: false, ticks: seconds(for_seconds) };
        let [first, second, third] = [0, 1, 2].map(|replica| (seed as usize + replica) % 3);
        let faults = vec![(seconds(4), kill(first, 12)), (seconds(4), kill(second, 11)), (seconds(4), kill(third, 3))];
        let plan = plan(Kind::Leaders, 40 * seed, faults);
        let outcome = follow(plan);
        assert!(outcome.violations.is_empty(), "{}", report(40 * seed, &outcome, 60));
    }
}
