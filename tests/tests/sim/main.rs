//! The cluster as it is, over a simulated network and clock: one seed, one thread, one history.
//!
//! `SIM_SEED=7 cargo test -p unmask-tests --test sim replay -- --nocapture` shows one seed's history; `SIM_SEEDS=5000` runs more seeds
//! than the usual ones.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod bugs;
mod checks;
mod client;
mod faults;
mod host;
mod network;
mod operator;
mod plan;
mod regressions;
mod store;
mod trace;
mod world;

use crate::bugs::Bug;
use crate::checks::Checks;
use crate::faults::Faults;
use crate::plan::{END, Plan};
use crate::world::World;
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Seeds of a usual run.
const SEEDS: u64 = 200;
/// Every so many seeds, one runs twice.
const TWICE_EVERY: u64 = 10;
/// Last lines of a failing seed that are shown without being asked for.
const TAIL: usize = 60;
/// The cluster goes on for so long after the last request.
const AFTER: u64 = host::ticks(std::time::Duration::from_secs(1));

/// What came of a seed.
struct Outcome {
    violations: Vec<String>,
    hash: u64,
    lines: Vec<trace::Seen>,
}

fn run(seed: u64, bug: Option<Bug>) -> Outcome {
    bugs::plant(bug);
    follow(Plan::draw(seed))
}

/// Lives through a plan.
fn follow(plan: Plan) -> Outcome {
    let _tap = trace::begin();
    let mut world = World::new(&plan);
    let (mut faults, mut checks) = (Faults::new(plan.faults.clone()), Checks::new(&plan));
    let mut end = host::ticks(END);
    while world.now < end && trace::is_clean() {
        faults.tick(&mut world);
        world.tick();
        checks.look();
        if checks.done == plan.wishes.len() {
            end = end.min(world.now + AFTER);
        }
    }
    checks.blocks();
    if checks.done < plan.wishes.len() && trace::is_clean() {
        trace::violation(format!("I6: {} of {} requests ended", checks.done, plan.wishes.len()));
    }
    world.end();
    Outcome { violations: trace::violations(), hash: trace::hash(), lines: trace::lines() }
}

fn report(seed: u64, outcome: &Outcome, lines: usize) -> String {
    let mut text = String::new();
    for line in &outcome.lines[outcome.lines.len().saturating_sub(lines)..] {
        let _ = writeln!(text, "{line}");
    }
    let _ = writeln!(text, "seed {seed}: {}", outcome.violations.join("\n"));
    let _ = writeln!(text, "replay: SIM_SEED={seed} cargo test -p unmask-tests --test sim replay -- --nocapture");
    text
}

/// Runs seeds on all cores until one fails; which, and what is wrong with it.
fn search(seeds: Range<u64>, bug: Option<Bug>) -> Option<(u64, String)> {
    let (next, found) = (AtomicU64::new(seeds.start), Mutex::new(None::<(u64, String)>));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || found.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                return;
            }
            let outcome = run(seed, bug);
            let mut wrong = (!outcome.violations.is_empty()).then(|| report(seed, &outcome, TAIL));
            if wrong.is_none() && bug.is_none() && seed % number("SIM_TWICE").unwrap_or(TWICE_EVERY) == 0 {
                let again = run(seed, None);
                wrong = (again.hash != outcome.hash).then(|| differs(seed, &outcome, &again));
            }
            if let Some(wrong) = wrong {
                *found.lock().unwrap_or_else(PoisonError::into_inner) = Some((seed, wrong));
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn differs(seed: u64, one: &Outcome, other: &Outcome) -> String {
    let lines = |outcome: &Outcome| outcome.lines.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (one, other) = (lines(one), lines(other));
    let at = one.iter().zip(&other).position(|(a, b)| a != b).unwrap_or(one.len().min(other.len()));
    let line = |lines: &[String]| lines.get(at).cloned().unwrap_or_default();
    format!("seed {seed} runs differently from line {at} on:\n{}\n{}", line(&one), line(&other))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_fails_no_client_sees_it() {
    let wrong = search(0..number("SIM_SEEDS").unwrap_or(SEEDS), None);
    assert!(wrong.is_none(), "{}", wrong.unwrap().1);
}

#[test]
fn replay() {
    let Some(seed) = number("SIM_SEED") else { return };
    println!("{:#?}", Plan::draw(seed));
    let bug = std::env::var("SIM_BUG").ok().and_then(|name| Bug::named(&name));
    let outcome = run(seed, bug);
    print!("{}", report(seed, &outcome, usize::MAX));
    assert!(outcome.violations.is_empty());
}
