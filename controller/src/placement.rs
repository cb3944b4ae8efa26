//! Which worker is which rank of which group: `solve(problem, previous) -> plan`. Pure, deterministic, and idempotent.
//!
//! What stands and still fits stays. A group that lost ranks keeps the others where they are, at their rank, and takes free
//! workers of their zone; only where there are none is it placed anew. All ranks of a group are in one zone: sums cross
//! between them twice per layer. Replicas of a model spread over zones. Every model gets its first replica before any
//! gets a second; then spares are set aside, from what is left.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A worker that can hold one rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Memory for weights, keys and values (bytes).
    pub memory_bytes: u64,
    /// Where it is; ranks of a group share one.
    pub zone: String,
}

/// What is wanted of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// Groups.
    pub replicas: u32,
    /// Ranks of a group.
    pub degree: u32,
    /// Least memory of a rank's worker (bytes).
    pub memory_bytes: u64,
    /// Workers to keep free for ranks that are lost.
    pub spares: u32,
}

/// What there is and what is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problem {
    /// By worker.
    pub devices: BTreeMap<String, Device>,
    /// By model.
    pub demands: BTreeMap<String, Demand>,
}

/// A group that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot {
    /// Its model.
    pub model: String,
    /// Which of the model's groups, from 0.
    pub replica: u32,
}

/// Who is where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Workers by rank.
    pub groups: BTreeMap<Slot, Vec<String>>,
    /// Workers kept free, by model.
    pub spares: BTreeMap<String, BTreeSet<String>>,
    /// Groups that have no place, and why.
    pub pending: BTreeMap<Slot, String>,
    /// Models with fewer spares than wanted, and why.
    pub short: BTreeMap<String, String>,
}

/// Places what is wanted on what there is.
pub fn solve(problem: &Problem, previous: &Plan) -> Plan {
    let mut solver = Solver { problem, free: problem.devices.keys().cloned().collect(), plan: Plan::default() };
    let broken = solver.keep(previous);
    let mut homeless: Vec<Slot> = Vec::new();
    for (slot, ranks) in broken {
        match solver.repair(&slot, &ranks) {
            Some(whole) => drop(solver.plan.groups.insert(slot, whole)),
            None => {
                solver.free.extend(ranks.into_iter().flatten());
                homeless.push(slot);
            }
        }
    }
    let wanted = problem
        .demands
        .iter()
        .flat_map(|(model, demand)| (0..demand.replicas).map(|replica| Slot { model: model.clone(), replica }));
    let mut missing: Vec<Slot> = wanted.filter(|slot| !solver.plan.groups.contains_key(slot)).collect();
    // First replicas first; those that stood before those that never did.
    missing.sort_by_key(|slot| (slot.replica, !homeless.contains(slot), slot.model.clone()));
    let mut unplaced = Vec::new();
    for slot in missing {
        match solver.place(&slot) {
            Some(ranks) => drop(solver.plan.groups.insert(slot, ranks)),
            None => unplaced.push(slot),
        }
    }
    // Of what is left in the end: solving again finds the same.
    for slot in unplaced {
        let why = solver.shortage(&slot);
        solver.plan.pending.insert(slot, why);
    }
    solver.set_aside(previous);
    solver.plan
}

struct Solver<'a> {
    problem: &'a Problem,
    free: BTreeSet<String>,
    plan: Plan,
}

/// Ranks that stayed, by rank.
type Remains = Vec<Option<String>>;

impl Solver<'_> {
    /// Takes over whole groups; what remains of the others.
    fn keep(&mut self, previous: &Plan) -> Vec<(Slot, Remains)> {
        let mut broken = Vec::new();
        for (slot, ranks) in &previous.groups {
            let Some(demand) = self.problem.demands.get(&slot.model) else { continue };
            if slot.replica >= demand.replicas || ranks.len() != demand.degree as usize {
                continue;
            }
            let there = |worker: &String| {
                let fits = self.problem.devices.get(worker).is_some_and(|d| d.memory_bytes >= demand.memory_bytes);
                (fits && self.free.contains(worker)).then(|| worker.clone())
            };
            let remains: Remains = ranks.iter().map(there).collect();
            let zones: BTreeSet<&str> = remains.iter().flatten().map(|worker| self.zone(worker)).collect();
            if zones.len() != 1 {
                continue;
            }
            remains.iter().flatten().for_each(|worker| _ = self.free.remove(worker));
            match remains.iter().cloned().collect::<Option<Vec<String>>>() {
                Some(whole) => drop(self.plan.groups.insert(slot.clone(), whole)),
                None => broken.push((slot.clone(), remains)),
            }
        }
        broken
    }

    /// Fills the gaps of a group from its zone.
    fn repair(&mut self, slot: &Slot, remains: &Remains) -> Option<Vec<String>> {
        let demand = &self.problem.demands[&slot.model];
        let zone = remains.iter().flatten().map(|worker| self.zone(worker)).next()?;
        let gaps = remains.iter().filter(|rank| rank.is_none()).count();
        let mut found = self.fitting(demand, zone).into_iter().take(gaps);
        let whole: Option<Vec<String>> = remains.iter().map(|rank| rank.clone().or_else(|| found.next())).collect();
        whole.as_ref()?.iter().for_each(|worker| _ = self.free.remove(worker));
        whole
    }

    /// Finds a zone for a group that has none.
    fn place(&mut self, slot: &Slot) -> Option<Vec<String>> {
        let demand = &self.problem.demands[&slot.model];
        let degree = demand.degree as usize;
        let here = |zone: &str| {
            let groups = self.plan.groups.iter().filter(|(other, _)| other.model == slot.model);
            groups.filter(|(_, ranks)| self.zone(&ranks[0]) == zone).count()
        };
        let offers = self.offers(demand);
        let enough = offers.iter().filter(|(_, workers)| workers.len() >= degree);
        // Fewest replicas of its own there, then most room; the first by name where both are equal.
        let (_, workers) = enough.min_by_key(|(zone, workers)| (here(zone), usize::MAX - workers.len()))?;
        let ranks: Vec<String> = workers[..degree].to_vec();
        ranks.iter().for_each(|worker| _ = self.free.remove(worker));
        Some(ranks)
    }

    /// Free workers that fit, by zone.
    fn offers(&self, demand: &Demand) -> Vec<(&str, Vec<String>)> {
        let zones: BTreeSet<&str> = self.problem.devices.values().map(|device| device.zone.as_str()).collect();
        zones.into_iter().map(|zone| (zone, self.fitting(demand, zone))).collect()
    }

    /// Why there is no place for a group.
    fn shortage(&self, slot: &Slot) -> String {
        let demand = &self.problem.demands[&slot.model];
        let memory = match demand.memory_bytes {
            0 => String::new(),
            bytes => format!(" with {bytes} bytes of memory"),
        };
        let most = self.offers(demand).iter().map(|(_, workers)| workers.len()).max().unwrap_or(0);
        match demand.degree {
            1 => format!("no worker{memory} is free"),
            degree => format!("needs {degree} free workers of one zone{memory}, no zone has more than {most}"),
        }
    }

    /// Keeps workers free for lost ranks: those kept before, then others.
    fn set_aside(&mut self, previous: &Plan) {
        for (model, demand) in &self.problem.demands {
            let fits = |worker: &&String| self.problem.devices[*worker].memory_bytes >= demand.memory_bytes;
            let before = previous.spares.get(model).into_iter().flatten();
            let kept = before.filter(|worker| self.free.contains(*worker)).filter(fits);
            let kept: BTreeSet<String> = kept.take(demand.spares as usize).cloned().collect();
            kept.iter().for_each(|worker| _ = self.free.remove(worker));
            self.plan.spares.insert(model.clone(), kept);
        }
        for (model, demand) in &self.problem.demands {
            let spares = self.plan.spares.entry(model.clone()).or_default();
            let more = demand.spares as usize - spares.len();
            let fits = |worker: &&String| self.problem.devices[*worker].memory_bytes >= demand.memory_bytes;
            let found: Vec<String> = self.free.iter().filter(fits).take(more).cloned().collect();
            found.iter().for_each(|worker| _ = self.free.remove(worker));
            spares.extend(found);
            if spares.len() < demand.spares as usize {
                let why = format!("{} of {} spares: no worker is left", spares.len(), demand.spares);
                self.plan.short.insert(model.clone(), why);
            }
        }
    }

    /// Free workers of a zone with the memory, the least of it first.
    fn fitting(&self, demand: &Demand, zone: &str) -> Vec<String> {
        let memory = |worker: &String| self.problem.devices[worker].memory_bytes;
        let fits = |worker: &&String| self.zone(worker) == zone && memory(worker) >= demand.memory_bytes;
        let mut found: Vec<String> = self.free.iter().filter(fits).cloned().collect();
        found.sort_by_key(memory);
        found
    }

    fn zone(&self, worker: &str) -> &str {
        &self.problem.devices[worker].zone
    }
}

#[cfg(test)]
mod tests;
