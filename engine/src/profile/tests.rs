//! Reading between points, the format, and a measurement on a clock that counts.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::model::{LoadOptions, Model};
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;

fn profile(points: &[(u32, u32, f64)]) -> Profile {
    let points: Vec<Point> =
        points.iter().map(|&(rows, context, ms)| Point { rows, context, ms, spread: 0.0 }).collect();
    let text = |text: &str| text.to_owned();
    let profile = Profile {
        format: text(FORMAT),
        model: text("m"),
        numerics_id: text("0"),
        device: text("d"),
        isa: text("portable"),
        threads: 1,
        ranks: 1,
        dtype: text("f32"),
        kv_type: text("f32"),
        points,
    };
    Profile::parse(&serde_json::to_string(&profile).unwrap()).unwrap()
}

#[test]
fn times_are_linear_between_points_and_beyond_the_last() {
    let profile = profile(&[(1, 0, 1.0), (9, 0, 5.0), (1, 100, 3.0), (9, 100, 7.0)]);
    let at = |rows, context| profile.step_ms(rows, context);
    assert_eq!((at(1.0, 0.0), at(9.0, 100.0)), (1.0, 7.0));
    assert_eq!((at(5.0, 0.0), at(1.0, 50.0), at(5.0, 50.0)), (3.0, 2.0, 4.0));
    assert_eq!((at(11.0, 0.0), at(1.0, 200.0)), (6.0, 5.0));
    assert_eq!(at(0.0, 0.0), 1.0);
}

#[test]
fn one_point_is_a_constant() {
    assert_eq!(profile(&[(4, 0, 2.0)]).step_ms(64.0, 100.0), 2.0);
}

proptest! {
    #[test]
    fn more_rows_or_context_never_take_less(
        ms in prop::collection::vec(0.1f64..100.0, 12),
        rows in prop::collection::vec(0f64..600.0, 2),
        contexts in prop::collection::vec(0f64..512.0, 2),
    ) {
        let shapes = [0, 128, 512].into_iter().flat_map(|c| [1, 8, 64, 256].map(|r| (r, c)));
        let points: Vec<_> = shapes.zip(&ms).map(|((r, c), &ms)| (r, c, ms)).collect();
        let profile = profile(&points);
        let sorted = |mut pair: Vec<f64>| { pair.sort_by(f64::total_cmp); (pair[0], pair[1]) };
        let ((fewer, more), (near, far)) = (sorted(rows), sorted(contexts));
        let (low, high) = (profile.step_ms(fewer, near), profile.step_ms(more, far));
        prop_assert!(low <= high * (1.0 + 1e-12), "{low} > {high}");
        prop_assert!(low >= profile.points()[0].ms);
    }
}

#[test]
fn all_problems_come_at_once() {
    let json = serde_json::to_string(&profile(&[(1, 0, 1.0)])).unwrap();
    let broken = json.replace("profile/1", "profile/9").replace("\"ms\":1.0", "\"ms\":-1.0");
    let error = Profile::parse(&broken).unwrap_err().to_string();
    assert!(error.contains("profile/9") && error.contains("points[0]"), "{error}");
    let unknown = json.replace("\"threads\"", "\"extra\":1,\"threads\"");
    assert!(Profile::parse(&unknown).unwrap_err().to_string().contains("extra"));
}

#[test]
fn a_measurement_times_every_shape_and_survives_a_round_trip() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen3");
    let model = Arc::new(Model::load(&dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap());
    let length = model.config().context_length;
    let grid = Grid { rows: vec![1, 20], contexts: vec![0, 40, length], repeats: 3, limit: Duration::MAX };
    // A clock that advances 2 ms whenever it is read: every step takes exactly that.
    let mut now = Duration::ZERO;
    let mut clock = || {
        now += Duration::from_millis(2);
        now
    };
    let mut seen = Vec::new();
    let mut engine = Engine::new(Arc::clone(&model), grid.limits());
    let profile = measure(&mut engine, &grid, &mut clock, &mut |done, of| seen.push((done, of))).unwrap();
    let shapes: Vec<_> = profile.points().iter().map(|point| (point.context, point.rows)).collect();
    assert_eq!(shapes, [(0, 1), (0, 20), (40, 1), (40, 20), (length, 1), (length, 20)]);
    assert!(profile.points().iter().all(|point| (point.ms - 2.0).abs() < 1e-9 && point.spread == 0.0));
    assert_eq!((seen.len(), seen.last()), (18, Some(&(18, 18))));
    assert_eq!(profile.numerics_id, model.numerics_id());
    let json = serde_json::to_string(&profile).unwrap();
    assert_eq!(Profile::parse(&json).unwrap(), profile);
}

#[test]
fn after_the_limit_nothing_is_timed_again() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen3");
    let model = Arc::new(Model::load(&dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap());
    let grid = Grid { rows: vec![1], contexts: vec![0], repeats: 9, limit: Duration::from_secs(8) };
    let mut now = Duration::ZERO;
    let mut clock = || {
        now += Duration::from_secs(1);
        now
    };
    let mut steps = 0;
    let mut engine = Engine::new(model, grid.limits());
    measure(&mut engine, &grid, &mut clock, &mut |_, _| steps += 1).unwrap();
    // The clock reads 1 at the start; a long step takes two readings for itself, and one for the limit.
    assert_eq!(steps, 3);
}

#[test]
fn an_engine_with_little_room_measures_what_fits() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen3");
    let model = Arc::new(Model::load(&dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap());
    let grid = Grid { rows: vec![1, 20, 40], contexts: vec![0, 40], repeats: 1, limit: Duration::MAX };
    let shapes = |rows_max, pages| {
        let mut engine = Engine::new(Arc::clone(&model), Limits { rows_max, pages, ..grid.limits() });
        let start = std::time::Instant::now();
        let profile = measure(&mut engine, &grid, &mut || start.elapsed(), &mut |_, _| {}).unwrap();
        profile.points().iter().map(|point| (point.context, point.rows)).collect::<Vec<_>>()
    };
    assert_eq!(shapes(39, 100), [(0, 1), (0, 20), (40, 1), (40, 20)]);
    // With the two pages of probes: two sequences, and one page of context.
    assert_eq!(shapes(40, 3), [(0, 1), (0, 20), (40, 1), (40, 20)]);
    assert_eq!(shapes(1, 1), [(0, 1)]);
}
