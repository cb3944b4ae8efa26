//! What the engine writes, the controller reads, and both read the same between the points.
#![allow(clippy::unwrap_used)]

use super::*;
use std::time::Duration;
use unmask_engine::LoadOptions;
use unmask_engine::profile::Profile as Measured;

fn measured() -> Measured {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar");
    let model = Model::load(&dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap();
    let grid = Grid { rows: vec![1, 8, 32], contexts: vec![0, 64], repeats: 2, limit: Duration::MAX };
    // A clock whose steps are unequal, so that the points differ.
    let (mut now, mut step) = (Duration::ZERO, 0);
    let mut clock = || {
        step = step * 5 % 97 + 1;
        now += Duration::from_millis(step);
        now
    };
    measure(&mut Engine::new(model.into(), grid.limits()), &grid, &mut clock, &mut |_, _| {}).unwrap()
}

fn quality() -> Quality {
    let row = |policy: &str, block_size: u32, threshold: Option<f64>, pass_rate: f64, tpf: f64| {
        serde_json::json!({ "policy": policy, "block_size": block_size, "threshold": threshold, "dtype": "f32",
            "n": 500, "pass_rate": pass_rate, "tpf": tpf })
    };
    let rows = [
        row("autoregressive", 1, None, 0.97, 1.0),
        row("threshold", 4, Some(0.9), 0.97, 2.0),
        row("threshold", 4, Some(0.7), 0.96, 2.5),
        row("threshold", 8, Some(0.9), 0.60, 3.0),
        row("threshold", 8, Some(0.5), 0.30, 5.0),
    ];
    Quality::parse(&serde_json::json!({ "format": "unmask.quality/1", "rows": rows }).to_string()).unwrap()
}

#[test]
fn the_controller_reads_what_the_engine_writes() {
    let measured = measured();
    let read = Profile::parse(&serde_json::to_string(&measured).unwrap()).unwrap();
    assert_eq!(
        (&read.model, &read.numerics_id, &read.device, &read.isa),
        (&measured.model, &measured.numerics_id, &measured.device, &measured.isa)
    );
    assert_eq!((read.threads, read.ranks), (measured.threads, measured.ranks));
    assert_eq!((&read.dtype, &read.kv_type), (&measured.dtype, &measured.kv_type));
    assert_eq!(read.points().len(), measured.points().len());
    for rows in 0..100 {
        for context in [0.0, 17.5, 64.0, 300.0] {
            let rows = f64::from(rows) * 0.7;
            assert_eq!(read.step_ms(rows, context).to_bits(), measured.step_ms(rows, context).to_bits());
        }
    }
}

#[test]
fn every_block_size_shows_its_fastest_good_threshold_or_its_most_careful() {
    let profile = Profile::parse(&serde_json::to_string(&measured()).unwrap()).unwrap();
    let throughput = Throughput::new(&profile, &quality(), 32).unwrap();
    for curve in &throughput.curves {
        let spots: Vec<_> = curve.spots.iter().map(|spot| (spot.block_size, spot.threshold, spot.good)).collect();
        assert_eq!(spots, [(1, None, true), (4, Some(0.7), true), (8, Some(0.9), false)]);
        assert!(curve.chosen.is_some_and(|(block_size, ..)| block_size < 8));
    }
    let mut other = quality();
    other.rows.iter_mut().for_each(|row| row.dtype = "bf16".into());
    assert!(Throughput::new(&profile, &other, 32).is_none());
}

#[test]
fn the_chart_names_what_was_measured_and_has_every_line() {
    let profile = Profile::parse(&serde_json::to_string(&measured()).unwrap()).unwrap();
    let throughput = Throughput::new(&profile, &quality(), 32).unwrap();
    let chart = chart::draw(&profile, Some(&throughput));
    for part in [profile.model.as_str(), "1 threads", "step time (ms", "tokens per second", "block size"] {
        assert!(chart.contains(part), "{part}");
    }
    assert!(!chart.contains("NaN") && !chart.contains("inf"));
    // Two contexts, six concurrencies.
    assert_eq!(chart.matches(r#"stroke-width="2"/>"#).count(), 8);
    assert_eq!(chart.matches("<text").count(), chart.matches("</text>").count());
    assert!(!chart::draw(&profile, None).contains("tokens per second"));
    assert!(report(&profile, Some(&throughput)).contains("tokens/s by block size"));
}
