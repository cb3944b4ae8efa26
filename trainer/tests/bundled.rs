//! The model that ships: it writes functions that pass their tests, and prompts may end anywhere.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use unmask_engine::{LoadOptions, Model};
use unmask_kernels::{KvType, WeightType};
use unmask_trainer::measure::{Point, cuts, measure, tokenizer};
use unmask_trainer::tasks::{Part, Task, Tasks, verify};

const POINT: Point = Point::threshold(16, 0.9);

fn folder() -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    models.join(std::fs::read_to_string(models.join("default")).unwrap().trim())
}

fn load() -> Arc<Model> {
    let options = LoadOptions { dtype: WeightType::Bf16, kv_type: KvType::F32, threads: 2, ..LoadOptions::default() };
    Arc::new(Model::load(&folder(), &options).unwrap())
}

fn held_out(count: u64) -> Vec<Task> {
    let tasks = Tasks::new().unwrap();
    let drawn: Vec<Task> = (0..count).map(|i| tasks.draw(77, Part::HeldOut, i)).collect();
    verify::with_expected_results(&drawn).unwrap()
}

/// A floor far below the card's figure: it fails when the engine or the checkpoint is broken, not on a bad day.
#[test]
fn most_held_out_tasks_are_solved() {
    let row = measure(&load(), &tokenizer(&folder()).unwrap(), &held_out(60), POINT, |_| {}).unwrap();
    assert!(row.pass_rate > 0.5, "{row:?}");
    assert!(row.tpf > 1.3, "{row:?}");
}

#[test]
fn prompts_cut_anywhere_become_running_functions() {
    let all = cuts(&load(), &tokenizer(&folder()).unwrap(), &held_out(3), POINT, |_| {}).unwrap();
    let (n, running) = (all.len(), all.iter().filter(|cut| cut.running).count());
    assert!(n > 100 && running * 10 > n * 8, "{running} of {n}");
}
