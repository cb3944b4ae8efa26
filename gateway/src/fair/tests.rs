#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::time::Duration;

fn asked(tenant: u64, rows: u64, now: Instant) -> Asked {
    Asked { tenant, weight: 1, rows, priority: 0, deadline: None, until: now + Duration::from_secs(60) }
}

fn order(fair: &mut Fair<&'static str>, now: Instant) -> Vec<&'static str> {
    std::iter::from_fn(|| fair.pop(now)).map(|(what, _)| what).collect()
}

#[test]
fn a_line_is_in_the_order_of_priority_deadline_arrival() {
    let (mut fair, now) = (Fair::new(), Instant::now());
    let at = |ms| Some(now + Duration::from_millis(ms));
    let base = asked(1, 10, now);
    fair.push(&base, "fifth");
    fair.push(&Asked { deadline: at(900), ..base }, "fourth");
    fair.push(&Asked { deadline: at(800), ..base }, "third");
    fair.push(&base, "sixth");
    fair.push(&Asked { priority: -1, deadline: at(100), ..base }, "last");
    fair.push(&Asked { priority: 7, ..base }, "first");
    fair.push(&Asked { priority: 7, ..base }, "second");
    assert_eq!((fair.len(), fair.rows()), (7, 70));
    // Behind the one with an earlier deadline and what has priority.
    assert_eq!(fair.ahead(&Asked { deadline: at(850), ..base }), 30);
    assert_eq!(order(&mut fair, now), ["first", "second", "third", "fourth", "fifth", "sixth", "last"]);
    assert_eq!((fair.len(), fair.rows()), (0, 0));
}

#[test]
fn a_light_tenant_passes_a_heavy_one_and_weights_count() {
    let (mut fair, now) = (Fair::new(), Instant::now());
    for _ in 0..100 {
        fair.push(&asked(1, 1000, now), 1);
    }
    fair.push(&asked(2, 1000, now), 2);
    let before = std::iter::from_fn(|| fair.pop(now)).take_while(|(tenant, _)| *tenant == 1).count();
    assert!(before <= 2, "{before} went before the light one");

    let mut fair = Fair::new();
    for _ in 0..400 {
        fair.push(&asked(1, 1000, now), 1);
        fair.push(&Asked { weight: 3, ..asked(2, 1000, now) }, 3);
    }
    let served: Vec<u64> = std::iter::from_fn(|| fair.pop(now)).take(200).map(|(weight, _)| weight).collect();
    let heavy = served.iter().filter(|weight| **weight == 3).count();
    assert!((145..=155).contains(&heavy), "{heavy} of 200 for a weight of 3 against 1");
}

#[test]
fn the_longest_line_is_shed_from_its_end() {
    let (mut fair, now) = (Fair::new(), Instant::now());
    fair.push(&asked(1, 100, now), "light");
    fair.push(&asked(2, 90, now), "first");
    fair.push(&Asked { priority: -5, ..asked(2, 90, now) }, "unimportant");
    fair.push(&asked(2, 90, now), "last");
    assert_eq!(fair.ahead(&asked(1, 1, now)), 200, "others get as much as is before it");
    assert_eq!(fair.ahead(&asked(3, 1, now)), 0);
    assert_eq!([fair.shed(), fair.shed(), fair.shed(), fair.shed(), fair.shed()], {
        [Some("unimportant"), Some("last"), Some("light"), Some("first"), None]
    });
}

/// What may happen to a queue.
#[derive(Debug, Clone)]
enum Step {
    Push { tenant: u64, rows: u64, priority: i32, wait_ms: u64 },
    Pop,
    Cancel(prop::sample::Index),
    Shed,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..5, 1u64..5_000, -2i32..3, 0u64..400).prop_map(|(tenant, rows, priority, wait_ms)| Step::Push {
            tenant, rows, priority, wait_ms
        }),
        2 => Just(Step::Pop),
        1 => any::<prop::sample::Index>().prop_map(Step::Cancel),
        1 => Just(Step::Shed),
        1 => (0u64..200).prop_map(Step::Wait),
    ]
}

proptest! {
    /// Every request leaves exactly once: served in time, cancelled, shed, or dropped because it waited too long; and while
    /// one waits that still may, there is something to pop.
    #[test]
    fn whatever_is_pushed_leaves_once(steps in prop::collection::vec(step(), 1..200)) {
        let (mut fair, mut now) = (Fair::new(), Instant::now());
        let mut inside: HashMap<usize, (Place, Instant, u64)> = HashMap::new();
        let mut pushed = 0;
        for step in steps {
            match step {
                Step::Push { tenant, rows, priority, wait_ms } => {
                    let until = now + Duration::from_millis(wait_ms);
                    let place = fair.push(&Asked { priority, until, ..asked(tenant, rows, now) }, pushed);
                    inside.insert(pushed, (place, until, rows));
                    pushed += 1;
                }
                Step::Pop => {
                    let in_time = inside.values().any(|(_, until, _)| *until > now);
                    let popped = fair.pop(now);
                    prop_assert_eq!(popped.is_some(), in_time, "work conserving");
                    if let Some((what, rows)) = popped {
                        let (_, until, had) = inside.remove(&what).unwrap();
                        prop_assert!(until > now && had == rows);
                    }
                    // What was dropped on the way had waited too long.
                    inside.retain(|_, (place, until, _)| *until > now || fair.lines.get(&place.tenant).is_some_and(|line| {
                        line.waiting.contains_key(&place.rank)
                    }));
                }
                Step::Cancel(index) => {
                    let known: BTreeSet<usize> = inside.keys().copied().collect();
                    if known.is_empty() { continue }
                    let what = *known.iter().nth(index.index(known.len())).unwrap();
                    let (place, ..) = inside.remove(&what).unwrap();
                    prop_assert_eq!(fair.cancel(place), Some(what));
                    prop_assert_eq!(fair.cancel(place), None);
                }
                Step::Shed => {
                    let shed = fair.shed();
                    prop_assert_eq!(shed.is_some(), !inside.is_empty());
                    shed.map(|what| inside.remove(&what).unwrap());
                }
                Step::Wait(ms) => now += Duration::from_millis(ms),
            }
            prop_assert_eq!(fair.len(), inside.len());
            prop_assert_eq!(fair.rows(), inside.values().map(|(_, _, rows)| rows).sum::<u64>());
            prop_assert_eq!(fair.turns.len(), fair.lines.len());
        }
    }

    /// While two tenants both wait, their rows by weight differ by no more than the bound.
    #[test]
    fn nobody_gets_more_than_its_share_while_another_waits(
        weights in prop::collection::vec(1u32..6, 2..5), rows in prop::collection::vec(1u64..20_000, 40..200),
        skip in 0usize..20,
    ) {
        let (mut fair, now) = (Fair::new(), Instant::now());
        for (i, rows) in rows.iter().enumerate() {
            let tenant = i % weights.len();
            fair.push(&Asked { weight: weights[tenant], priority: (i % 3) as i32, ..asked(tenant as u64, *rows, now) }, tenant);
        }
        // An interval that begins anywhere.
        for _ in 0..skip {
            fair.pop(now);
        }
        let largest = *rows.iter().max().unwrap() as f64;
        let mut got = vec![0.0; weights.len()];
        while fair.lines.len() == weights.len() {
            let (tenant, rows) = fair.pop(now).unwrap();
            got[tenant] += rows as f64;
            for (a, b) in (0..weights.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
                let (of_a, of_b) = (f64::from(weights[a]), f64::from(weights[b]));
                let bound = 3.0 * QUANTUM_ROWS as f64 + largest / of_a + largest / of_b;
                prop_assert!((got[a] / of_a - got[b] / of_b).abs() <= bound, "{got:?} by {weights:?}");
            }
        }
    }
}
