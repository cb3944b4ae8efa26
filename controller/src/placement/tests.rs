#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use proptest::prelude::*;

fn device(memory_bytes: u64, zone: &str) -> Device {
    Device { memory_bytes, zone: zone.into() }
}

fn demand(replicas: u32, degree: u32, spares: u32) -> Demand {
    Demand { replicas, degree, memory_bytes: 4, spares }
}

fn problem(devices: &[(&str, Device)], demands: &[(&str, Demand)]) -> Problem {
    Problem {
        devices: devices.iter().map(|(name, device)| ((*name).to_owned(), device.clone())).collect(),
        demands: demands.iter().map(|(name, demand)| ((*name).to_owned(), demand.clone())).collect(),
    }
}

fn ranks(plan: &Plan, model: &str, replica: u32) -> Vec<String> {
    plan.groups.get(&Slot { model: model.into(), replica }).cloned().unwrap_or_default()
}

#[test]
fn a_lost_rank_is_replaced_by_a_spare_and_the_others_stay() {
    let devices = [("a", device(4, "z")), ("b", device(4, "z")), ("c", device(4, "z")), ("d", device(4, "z"))];
    let before = problem(&devices, &[("m", demand(1, 2, 1))]);
    let plan = solve(&before, &Plan::default());
    assert_eq!(ranks(&plan, "m", 0), ["a", "b"]);
    assert_eq!(plan.spares["m"], BTreeSet::from(["c".to_owned()]));
    let after = problem(&devices[1..], &[("m", demand(1, 2, 1))]);
    let plan = solve(&after, &plan);
    // b stays rank 1: it has that share of the weights.
    assert_eq!(ranks(&plan, "m", 0), ["c", "b"]);
    assert_eq!(plan.spares["m"], BTreeSet::from(["d".to_owned()]));
}

#[test]
fn ranks_share_a_zone_and_replicas_spread() {
    let devices = [("a", device(4, "x")), ("b", device(4, "y")), ("c", device(4, "x")), ("d", device(4, "y"))];
    let plan = solve(&problem(&devices, &[("m", demand(2, 2, 0))]), &Plan::default());
    assert_eq!(
        (ranks(&plan, "m", 0), ranks(&plan, "m", 1)),
        (vec!["a".into(), "c".into()], vec!["b".into(), "d".into()])
    );
    let plan = solve(&problem(&devices, &[("m", demand(1, 4, 0))]), &Plan::default());
    let why = &plan.pending[&Slot { model: "m".into(), replica: 0 }];
    assert!(why.contains("needs 4") && why.contains("more than 2"), "{why}");
}

#[test]
fn every_model_gets_its_first_replica_first() {
    let devices = [("a", device(4, "z")), ("b", device(4, "z"))];
    let plan = solve(&problem(&devices, &[("m", demand(2, 1, 1)), ("n", demand(1, 1, 0))]), &Plan::default());
    assert_eq!((ranks(&plan, "m", 0), ranks(&plan, "n", 0)), (vec!["a".into()], vec!["b".into()]));
    assert!(plan.pending.contains_key(&Slot { model: "m".into(), replica: 1 }) && plan.short.contains_key("m"));
}

#[test]
fn a_small_model_leaves_large_workers_free() {
    let devices = [("a", device(64, "z")), ("b", device(4, "z"))];
    let plan = solve(&problem(&devices, &[("m", demand(1, 1, 0))]), &Plan::default());
    assert_eq!(ranks(&plan, "m", 0), ["b"]);
}

fn any_problem() -> impl Strategy<Value = Problem> {
    let device = (0u64..4, 0usize..3).prop_map(|(memory_bytes, zone)| device(memory_bytes, ["x", "y", "z"][zone]));
    let devices = prop::collection::btree_map("[a-l]", device, 0..12);
    let demand = (0u32..4, 0u32..3, 0u64..4, 0u32..3).prop_map(|(replicas, degree, memory_bytes, spares)| Demand {
        replicas,
        degree: 1 << degree,
        memory_bytes,
        spares,
    });
    let demands = prop::collection::btree_map("[m-o]", demand, 0..3);
    (devices, demands).prop_map(|(devices, demands)| Problem { devices, demands })
}

proptest! {
    #[test]
    fn plans_are_valid_complete_and_stable(first in any_problem(), second in any_problem()) {
        let mut previous = Plan::default();
        for problem in [first, second] {
            let plan = solve(&problem, &previous);
            // Nobody has two places, and everybody fits.
            let mut seen = BTreeSet::new();
            for (slot, ranks) in &plan.groups {
                let demand = &problem.demands[&slot.model];
                prop_assert_eq!(ranks.len(), demand.degree as usize);
                let zones: BTreeSet<_> = ranks.iter().map(|worker| &problem.devices[worker].zone).collect();
                prop_assert_eq!(zones.len(), 1);
                for worker in ranks {
                    prop_assert!(problem.devices[worker].memory_bytes >= demand.memory_bytes);
                    prop_assert!(seen.insert(worker.clone()));
                }
            }
            for (model, spares) in &plan.spares {
                prop_assert!(spares.len() <= problem.demands[model].spares as usize);
                for worker in spares {
                    prop_assert!(problem.devices[worker].memory_bytes >= problem.demands[model].memory_bytes);
                    prop_assert!(seen.insert(worker.clone()));
                }
            }
            // Every wanted group has a place or a reason, and a reason is true.
            for (model, demand) in &problem.demands {
                for replica in 0..demand.replicas {
                    let slot = Slot { model: model.clone(), replica };
                    prop_assert!(plan.groups.contains_key(&slot) != plan.pending.contains_key(&slot));
                }
            }
            let taken: BTreeSet<_> = plan.groups.values().flatten().collect();
            for slot in plan.pending.keys() {
                let demand = &problem.demands[&slot.model];
                for zone in ["x", "y", "z"] {
                    let free = problem.devices.iter().filter(|(worker, device)| {
                        !taken.contains(worker) && device.zone == zone && device.memory_bytes >= demand.memory_bytes
                    });
                    prop_assert!(free.count() < demand.degree as usize, "{:?} would fit into {}", slot, zone);
                }
            }
            // What stands and fits stays; of what lost ranks the others stay unless the whole group had to move.
            for (slot, ranks) in &previous.groups {
                let Some(demand) = problem.demands.get(&slot.model) else { continue };
                let fits = |worker: &String| {
                    problem.devices.get(worker).is_some_and(|device| device.memory_bytes >= demand.memory_bytes)
                };
                let zones: BTreeSet<_> = ranks.iter().filter_map(|w| problem.devices.get(w)).map(|d| &d.zone).collect();
                let wanted = slot.replica < demand.replicas && demand.degree as usize == ranks.len();
                if wanted && ranks.iter().all(fits) && zones.len() == 1 {
                    prop_assert_eq!(plan.groups.get(slot), Some(ranks));
                }
            }
            prop_assert_eq!(&solve(&problem, &plan), &plan, "solving again moves something");
            previous = plan;
        }
    }
}
