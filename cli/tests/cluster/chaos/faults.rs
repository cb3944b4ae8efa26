//! What breaks, and when: drawn from a seed.

use super::hosts::{CONTROLLERS, ETCD, GATEWAYS, HOSTS, POOL, WORKERS};
use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use rand_chacha::ChaCha8Rng;
use std::fmt;
use std::time::Duration;

/// Faults of a round, at least and at most.
const FAULTS: (usize, usize) = (3, 6);
/// A round's last fault begins by then (milliseconds).
const BEGIN_MS_MAX: u64 = 4000;
/// What most timers pass over, and what they do not: leases and time-to-lives are 5 s (milliseconds).
const LASTS_MS: [(u64, u64); 2] = [(200, 2500), (5200, 8000)];

/// One that ends by itself is over when it is undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; started again at the end.
    Kill(usize),
    /// SIGSTOP; SIGCONT at the end.
    Pause(usize),
    /// A host's link is down.
    Down(usize),
    /// A host's link loses and delays.
    Slow(usize),
    /// Packets from one host to another are lost.
    Deaf { from: usize, to: usize },
    /// Both ways.
    Cut(usize, usize),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Kill(host) => write!(f, "{} killed", name(host)),
            Self::Pause(host) => write!(f, "{} paused", name(host)),
            Self::Down(host) => write!(f, "link of {} down", name(host)),
            Self::Slow(host) => write!(f, "link of {} slow", name(host)),
            Self::Deaf { from, to } => write!(f, "{} does not reach {}", name(from), name(to)),
            Self::Cut(one, other) => write!(f, "{} and {} cut off from each other", name(one), name(other)),
        }
    }
}

fn name(host: usize) -> String {
    let role = match host {
        ETCD => "etcd",
        host if CONTROLLERS.contains(&host) => "controller",
        host if GATEWAYS.contains(&host) => "gateway",
        host if WORKERS.contains(&host) => "worker",
        _ => "pool worker",
    };
    format!("{role} {host}")
}

/// A fault, when it begins, and when it is undone; since the round began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timed {
    pub fault: Fault,
    pub begins: Duration,
    pub ends: Duration,
}

/// Faults that overlap. A gateway and a worker are left alone, and so is what they need of each other and of the
/// controllers: no stream has a reason to be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    pub kept: [usize; 2],
    pub faults: Vec<Timed>,
}

/// Draws a round; `slow` says whether links can be slow here.
pub fn draw(rng: &mut ChaCha8Rng, slow: bool) -> Round {
    let kept = [*GATEWAYS.choose(rng).unwrap(), *WORKERS.choose(rng).unwrap()];
    let count = rng.random_range(FAULTS.0..=FAULTS.1);
    let mut faults: Vec<Timed> = Vec::new();
    while faults.len() < count {
        let fault = fault(rng);
        // Drawn all the same where there are none, so that the others are those of other machines.
        let possible = slow || !matches!(fault, Fault::Slow(_));
        let (low, high) = *LASTS_MS.choose(rng).unwrap();
        let begins = Duration::from_millis(rng.random_range(0..=BEGIN_MS_MAX));
        let ends = begins + Duration::from_millis(rng.random_range(low..=high));
        // Two of a kind at a host would undo each other.
        let there = faults.iter().any(|timed| clash(&timed.fault, &fault));
        if possible && !there && leaves(&fault, kept) {
            faults.push(Timed { fault, begins, ends });
        }
    }
    Round { kept, faults }
}

fn fault(rng: &mut ChaCha8Rng) -> Fault {
    let host = rng.random_range(1..=HOSTS);
    let talks: [(&[usize], &[usize]); 5] = [
        (&[ETCD], &CONTROLLERS),
        (&CONTROLLERS, &GATEWAYS),
        (&CONTROLLERS, &WORKERS),
        (&CONTROLLERS, &POOL),
        (&GATEWAYS, &WORKERS),
    ];
    let pair = |rng: &mut ChaCha8Rng| {
        // Ranks talk to each other, and gateways to those of them that lead.
        if rng.random_bool(0.3) {
            let others = if rng.random_bool(0.5) { &POOL[..] } else { &GATEWAYS[..] };
            let one = *POOL.choose(rng).unwrap();
            return (
                one,
                *others.iter().filter(|other| **other != one).collect::<Vec<_>>().choose(rng).unwrap().to_owned(),
            );
        }
        let (one, other) = talks.choose(rng).unwrap();
        (*one.choose(rng).unwrap(), *other.choose(rng).unwrap())
    };
    match rng.random_range(0..6) {
        0 => Fault::Kill(host),
        1 => Fault::Pause(host),
        2 => Fault::Down(host),
        3 => Fault::Slow(host),
        4 => {
            let (from, to) = pair(rng);
            if rng.random_bool(0.5) { Fault::Deaf { from, to } } else { Fault::Deaf { from: to, to: from } }
        }
        _ => {
            let (one, other) = pair(rng);
            Fault::Cut(one, other)
        }
    }
}

/// Hosts whose link to each other a fault takes away.
fn link(fault: &Fault) -> Option<[usize; 2]> {
    match *fault {
        Fault::Deaf { from, to } => Some([from.min(to), from.max(to)]),
        Fault::Cut(one, other) => Some([one.min(other), one.max(other)]),
        _ => None,
    }
}

fn clash(one: &Fault, other: &Fault) -> bool {
    one == other || (link(one).is_some() && link(one) == link(other))
}

/// Whether what is to be kept stays as it is.
fn leaves(fault: &Fault, [gateway, worker]: [usize; 2]) -> bool {
    match *fault {
        Fault::Kill(host) | Fault::Pause(host) | Fault::Down(host) | Fault::Slow(host) => {
            ![gateway, worker].contains(&host)
        }
        Fault::Deaf { from: one, to: other } | Fault::Cut(one, other) => {
            // A worker that no controller hears takes nothing new.
            !(one == worker || other == worker)
                || !(CONTROLLERS.iter().chain([&gateway]).any(|host| [one, other].contains(host)))
        }
    }
}

#[test]
fn a_seed_gives_the_same_faults_and_leaves_a_gateway_and_a_worker_alone() {
    use rand::SeedableRng as _;
    for seed in 0..500 {
        let round = draw(&mut ChaCha8Rng::seed_from_u64(seed), true);
        assert_eq!(round, draw(&mut ChaCha8Rng::seed_from_u64(seed), true));
        assert!((FAULTS.0..=FAULTS.1).contains(&round.faults.len()));
        assert!(round.faults.iter().all(|timed| leaves(&timed.fault, round.kept)));
        for (number, one) in round.faults.iter().enumerate() {
            assert!(!round.faults[..number].iter().any(|other| clash(&one.fault, &other.fault)), "{round:?}");
        }
    }
}
