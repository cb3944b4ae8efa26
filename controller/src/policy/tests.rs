//! The choice is eligible, best, explained, and the same every time.
#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use serde_json::json;

/// Step time `base` up to `knee` rows, then in proportion to them.
fn profile(base: f64, knee: u32) -> Profile {
    let at = |rows: u32| json!({ "rows": rows, "context": 0, "ms": base * f64::from(rows.max(knee)) / f64::from(knee), "spread": 0.0 });
    let value = json!({
        "format": profile::FORMAT, "model": "m", "numerics_id": "0", "device": "d", "isa": "i", "threads": 2,
        "dtype": "bf16", "kv_type": "f32", "points": [at(1), at(knee.max(2)), at(4 * knee.max(2))],
    });
    Profile::parse(&value.to_string()).unwrap()
}

fn row(block_size: u32, threshold: Option<f64>, passes: u32, tpf: f64) -> Row {
    Row { block_size, threshold, self_speculative: false, dtype: "bf16".into(), n: 500, passes, tpf, rows: None }
}

fn quality() -> Quality {
    let rows = vec![
        row(1, None, 486, 1.0),
        row(4, Some(0.9), 478, 2.0),
        row(16, Some(0.9), 470, 4.0),
        row(16, Some(0.5), 150, 6.0),
    ];
    Quality { rows }
}

fn load(concurrency: u32) -> Load {
    Load { concurrency, context: 0, latency_ms: None, floor: 0.9, block_sizes: Vec::new() }
}

fn chosen(choice: &Choice) -> (u32, Option<f64>) {
    let chosen = choice.chosen().unwrap();
    (chosen.block_size, chosen.threshold)
}

#[test]
fn large_blocks_win_where_rows_are_free_and_autoregressive_where_they_are_dear() {
    assert_eq!(chosen(&choose(&profile(2.0, 64), &quality(), &load(1))), (16, Some(0.9)));
    assert_eq!(chosen(&choose(&profile(2.0, 64), &quality(), &load(10))), (4, Some(0.9)));
    assert_eq!(chosen(&choose(&profile(2.0, 64), &quality(), &load(64))), (1, None));
}

#[test]
fn every_candidate_says_why_it_lost() {
    let target = Load { latency_ms: Some(7.0), ..load(1) };
    let choice = choose(&profile(2.0, 64), &quality(), &target);
    let verdicts: Vec<_> = choice.candidates.iter().map(|candidate| candidate.verdict.clone()).collect();
    // Blocks take 2, 4, 8 and 5.3 ms; one stream commits 500, 1000, 2000 and 3000 tokens per second.
    assert_eq!(
        verdicts,
        [
            Verdict::FewerTokens { chosen: 1000.0 },
            Verdict::Chosen,
            Verdict::TooSlow { latency_ms: 7.0 },
            Verdict::BelowFloor { floor: 0.9 },
        ]
    );
    assert_eq!(choice.candidates[2].prediction.block_ms, 8.0);
}

#[test]
fn rows_of_other_weights_are_not_taken() {
    let mut quality = quality();
    quality.rows.iter_mut().for_each(|row| row.dtype = "f32".into());
    let choice = choose(&profile(2.0, 64), &quality, &load(1));
    assert_eq!(choice.winner, None);
    assert!(choice.candidates.iter().all(|candidate| candidate.verdict == Verdict::OtherWeights));
}

#[test]
fn stored_rows_ride_along_once_per_block() {
    let (alone, block) = (row(1, None, 1, 0.97), row(16, Some(0.9), 1, 4.0));
    assert_eq!((alone.rows_per_step(), block.rows_per_step()), (1.0, 20.0));
    assert_eq!(block.passes_per_commit(), 4.0);
}

#[test]
fn ties_go_to_the_smaller_block_then_to_the_higher_threshold() {
    // Below the knee a step costs the same, so equal TPF is equal speed.
    let rows = vec![row(8, Some(0.7), 500, 2.0), row(4, Some(0.7), 500, 2.0), row(4, Some(0.9), 500, 2.0)];
    for rows in [rows.clone(), rows.into_iter().rev().collect()] {
        assert_eq!(chosen(&choose(&profile(1.0, 64), &Quality { rows }, &load(1))), (4, Some(0.9)));
    }
}

#[test]
fn the_lower_bound_is_wilsons() {
    assert!((row(1, None, 486, 1.0).pass_rate_low() - 0.953553).abs() < 1e-5);
    assert_eq!(row(1, None, 0, 1.0).pass_rate_low(), 0.0);
}

#[test]
fn a_quality_file_is_read_and_refused_with_all_its_problems() {
    let good = json!({ "policy": "threshold", "block_size": 4, "threshold": 0.9, "dtype": "bf16", "n": 500,
        "pass_rate": 0.956, "pass_rate_low": 0.93, "parse_rate": 0.99, "tpf": 1.89 });
    let file = |rows: serde_json::Value| json!({ "format": quality::FORMAT, "command": "c", "rows": rows }).to_string();
    let read = Quality::parse(&file(json!([good]))).unwrap();
    assert_eq!((read.rows[0].passes, read.rows[0].threshold), (478, Some(0.9)));
    let mut drafts = good.clone();
    (drafts["policy"], drafts["rows"]) = ("self_speculative".into(), 9.5.into());
    let read = Quality::parse(&file(json!([good, drafts]))).unwrap();
    assert_eq!(read.rows[0].rows_per_step(), 4.0 + 1.89);
    assert!(!read.rows[0].self_speculative && read.rows[1].self_speculative);
    assert_eq!((read.rows[1].rows_per_step(), read.rows[1].passes_per_commit()), (9.5, 1.0));
    let (mut unknown, mut alone) = (good.clone(), good.clone());
    unknown["policy"] = "guess".into();
    alone["block_size"] = 1.into();
    let ReadError(_, problems) = Quality::parse(&file(json!([unknown, good, alone]))).unwrap_err();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("guess") && problems[1].starts_with("rows[2]"), "{problems:?}");
    assert!(Quality::parse("{").is_err() && Quality::parse(&file(json!([]))).is_err());
}

prop_compose! {
    fn any_row()(
        alone in any::<bool>(),
        block_size in 2u32..64,
        threshold in 0.3f64..1.0,
        n in 1u32..600,
        share in 0f64..=1.0,
        speed in 0f64..=1.0,
    ) -> Row {
        let block_size = if alone { 1 } else { block_size };
        Row {
            block_size,
            threshold: (!alone).then_some(threshold),
            self_speculative: !alone && n % 2 == 0,
            dtype: "bf16".into(),
            n,
            passes: (f64::from(n) * share).round() as u32,
            tpf: if alone { 1.0 } else { 1.0 + speed * f64::from(block_size - 1) },
            rows: None,
        }
    }
}

proptest! {
    #[test]
    fn the_choice_is_eligible_and_best(
        rows in prop::collection::vec(any_row(), 1..20),
        base in 0.1f64..50.0,
        knee in 1u32..512,
        concurrency in 1u32..300,
        latency_ms in prop::option::of(0.1f64..500.0),
        floor in 0f64..1.0,
    ) {
        let (profile, quality) = (profile(base, knee), Quality { rows });
        let load = Load { concurrency, context: 0, latency_ms, floor, block_sizes: Vec::new() };
        let choice = choose(&profile, &quality, &load);
        let eligible = |c: &Candidate| {
            c.pass_rate_low >= floor && latency_ms.is_none_or(|limit| c.prediction.block_ms <= limit)
        };
        match choice.chosen() {
            None => prop_assert!(!choice.candidates.iter().any(eligible)),
            Some(chosen) => {
                prop_assert!(eligible(chosen));
                for other in choice.candidates.iter().filter(|other| eligible(other)) {
                    prop_assert!(other.prediction.tokens_per_s <= chosen.prediction.tokens_per_s);
                }
            }
        }
        let winners = choice.candidates.iter().filter(|c| c.verdict == Verdict::Chosen).count();
        prop_assert_eq!(winners, usize::from(choice.winner.is_some()));
        prop_assert_eq!(choose(&profile, &quality, &load), choice);
    }

    #[test]
    fn more_concurrency_makes_nothing_eligible(
        rows in prop::collection::vec(any_row(), 1..20),
        base in 0.1f64..50.0,
        knee in 1u32..512,
        (fewer, more) in (1u32..100, 1u32..100),
        latency_ms in 0.1f64..500.0,
        floor in 0f64..1.0,
    ) {
        let (profile, quality) = (profile(base, knee), Quality { rows });
        let at = |concurrency| {
            choose(&profile, &quality, &Load { concurrency, context: 0, latency_ms: Some(latency_ms), floor, block_sizes: Vec::new() })
        };
        let (calm, busy) = (at(fewer), at(fewer + more));
        let refused = |c: &Candidate| matches!(c.verdict, Verdict::BelowFloor { .. } | Verdict::TooSlow { .. });
        for (before, after) in calm.candidates.iter().zip(&busy.candidates) {
            prop_assert!(!refused(before) || refused(after), "{before:?} became {after:?}");
        }
        prop_assert!(busy.winner.is_none_or(|winner| !refused(&calm.candidates[winner])));
    }

    #[test]
    fn the_order_of_the_rows_does_not_matter(
        rows in prop::collection::vec(any_row(), 1..20),
        knee in 1u32..512,
        concurrency in 1u32..300,
    ) {
        let profile = profile(1.0, knee);
        let reversed = Quality { rows: rows.iter().rev().cloned().collect() };
        let forwards = choose(&profile, &Quality { rows }, &Load { floor: 0.5, ..load(concurrency) });
        let backwards = choose(&profile, &reversed, &Load { floor: 0.5, ..load(concurrency) });
        let of = |choice: &Choice| choice.chosen().map(|c| (c.block_size, c.threshold, c.tpf.to_bits()));
        prop_assert_eq!(of(&forwards), of(&backwards));
    }
}
