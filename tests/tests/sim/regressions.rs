//! Histories that once went wrong.

use crate::client::Wish;
use crate::faults::Fault;
use crate::host::ticks;
use crate::plan::{Kind, Plan};
use crate::world::Role;
use crate::{follow, report};
use rand::{SeedableRng as _, rngs::StdRng};
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

/// A gateway forgot the connection to a worker that had left the routes, and with it the pings: a stream that was still on it
/// hung with the worker until the deadline.
#[test]
fn a_stream_on_a_forgotten_connection_is_not_left_with_a_worker_that_hangs() {
    let second = |seconds| ticks(Duration::from_secs(seconds));
    let mut plan = plan(Kind::Everything, 0, Vec::new());
    plan.counts = [1, 2, 1];
    plan.orders.clear();
    (plan.step_base, plan.step_row, plan.pages) = (Duration::from_millis(250), Duration::ZERO, 24);
    let (first, other) = (plan.of(Role::Worker).start, plan.of(Role::Worker).start + 1);
    // The gateway knows one worker only, which the controller loses sight of; then it dials another one.
    plan.faults = vec![
        (1, Fault::Kill { host: other, silent: false, ticks: second(6) }),
        (second(5), Fault::Cut { one: 0, other: first, both: true, ticks: second(60) }),
        (second(13), Fault::Pause { host: first, ticks: second(60) }),
    ];
    let wish = |number, at| {
        let mut drawn = Wish::draw(number, Duration::from_secs(at), &mut StdRng::seed_from_u64(1));
        drawn.decoding.max_tokens = Some(99);
        (drawn.leave_after, drawn.deadline, drawn.sure) = (None, Duration::from_secs(45), true);
        drawn
    };
    plan.wishes = vec![wish(0, 4), wish(1, 12)];
    let outcome = follow(plan);
    assert!(outcome.violations.is_empty(), "{}", report(0, &outcome, 200));
    let elsewhere = outcome.lines.iter().filter(|line| line.what == "going on elsewhere").count();
    assert!(elsewhere > 0, "the stream stayed");
}
