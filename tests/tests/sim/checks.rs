//! What must hold of the services among each other, read off what they log.

use crate::host::ticks;
use crate::plan::{Kind, Plan};
use crate::trace::{self, Seen};
use std::collections::BTreeMap;
use std::time::Duration;

/// Groups a request may take down before it is given up, as the gateway has it.
const ATTEMPTS_MAX: usize = 3;

/// A stream without a group waits almost so long for one (ticks).
const GROUP_WAIT: u64 = ticks(Duration::from_secs(29));

/// One process, from its start to its end.
#[derive(Default)]
struct Process {
    /// Highest term it listened to.
    term: u64,
    /// A worker's epoch.
    epoch: u64,
}

/// One request, as gateways log it.
#[derive(Default)]
struct Request {
    block: u64,
    /// First position, number of tokens, and where they come from.
    commits: Vec<(u64, u64, String)>,
    /// Groups it lost since its last commit.
    lost: usize,
    /// When it lost the first of them.
    since: u64,
    /// Times it was given to a gateway.
    streams: u64,
}

pub struct Checks {
    kind: Kind,
    processes: BTreeMap<String, Process>,
    requests: BTreeMap<String, Request>,
    /// Requests that are over.
    pub done: usize,
}

impl Checks {
    pub fn new(plan: &Plan) -> Self {
        Self { kind: plan.kind, processes: BTreeMap::new(), requests: BTreeMap::new(), done: 0 }
    }

    /// Looks at what is new.
    pub fn look(&mut self) {
        for seen in trace::fresh() {
            match seen.what.as_str() {
                "starts" => drop(self.processes.remove(seen.field("host"))),
                "routes" if seen.host.starts_with("gateway") => self.term(&seen),
                "assigned" => {
                    self.term(&seen);
                    self.epoch(&seen);
                }
                "runs" => self.runs(&seen),
                "store write" => self.guarded(&seen),
                "commit" => self.commit(&seen),
                "going on elsewhere" => {
                    let request = self.request(&seen);
                    request.lost += 1;
                    if request.lost == 1 {
                        request.since = seen.tick;
                    }
                }
                "client started" => {
                    let block = seen.number("block");
                    let request = self.request(&seen);
                    (request.block, request.streams) = (block, request.streams + 1);
                }
                "client lost its stream" => self.lost(&seen),
                "client is done" => self.done += 1,
                _ => {}
            }
        }
    }

    fn request(&mut self, seen: &Seen) -> &mut Request {
        self.requests.entry(seen.field("request_id").to_owned()).or_default()
    }

    fn process(&mut self, seen: &Seen) -> &mut Process {
        self.processes.entry(seen.host.clone()).or_default()
    }

    /// I9: nobody listens to a leader of the past.
    fn term(&mut self, seen: &Seen) {
        let term = seen.number("term");
        let process = self.process(seen);
        if term < process.term {
            trace::violation(format!("I9: {} listened to term {term} after {}", seen.host, process.term));
        }
        process.term = process.term.max(term);
    }

    /// I9: a process's epoch never falls; and while nothing but leaders change, it stays.
    fn epoch(&mut self, seen: &Seen) {
        let (epoch, kind) = (seen.number("epoch"), self.kind);
        let process = self.process(seen);
        let calm = matches!(kind, Kind::Leaders | Kind::Calm);
        if epoch < process.epoch || (calm && process.epoch > 0 && epoch != process.epoch) {
            trace::violation(format!("I9: {} went from epoch {} to {epoch}", seen.host, process.epoch));
        }
        process.epoch = epoch;
    }

    /// I9: a request of another epoch is not run.
    fn runs(&mut self, seen: &Seen) {
        let (epoch, known) = (seen.number("epoch"), self.process(seen).epoch);
        if epoch != 0 && epoch != known {
            trace::violation(format!("I9: {} runs a request of epoch {epoch} in epoch {known}", seen.host));
        }
    }

    /// I9: what the controllers keep is written under the leader's key.
    fn guarded(&self, seen: &Seen) {
        if seen.field("key") != "controller/leader" && seen.number("term") == 0 {
            trace::violation(format!("I9: {} is written by whoever", seen.field("key")));
        }
    }

    fn commit(&mut self, seen: &Seen) {
        let place = format!("{}@{}", seen.field("group"), seen.field("epoch"));
        let (first, tokens) = (seen.number("first"), seen.number("tokens"));
        let request = self.request(seen);
        request.lost = 0;
        request.commits.push((first, tokens, place));
    }

    /// No stream is lost while a worker is well or before it has waited for one, unless the request took three groups down.
    fn lost(&mut self, seen: &Seen) {
        let request = self.request(seen);
        let (lost, waited) = (request.lost, seen.tick - request.since);
        let well = matches!(self.kind, Kind::Spared | Kind::Leaders | Kind::Calm);
        if lost < ATTEMPTS_MAX && (well || waited < GROUP_WAIT) {
            trace::violation(format!("{} was lost after {lost} groups", seen.field("request_id")));
        }
    }

    /// I5: no block of a stream comes from two incarnations of groups.
    pub fn blocks(&self) {
        for (id, request) in self.requests.iter().filter(|(_, request)| request.streams == 1 && request.block > 0) {
            let mut places: BTreeMap<u64, &str> = BTreeMap::new();
            for (first, tokens, place) in &request.commits {
                for position in *first..first + tokens {
                    let known = places.entry(position / request.block).or_insert(place);
                    if known != place {
                        trace::violation(format!("I5: position {position} of {id}: {known} and {place}"));
                        return;
                    }
                }
            }
        }
    }
}
