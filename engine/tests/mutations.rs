//! Thousands of changed checkpoints, under a cap of memory. More: `UNMASK_FUZZ_ROUNDS=1000000`.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../fuzz/mutate.rs"]
mod mutate;

use cap::Cap;
use std::alloc::System;
use std::path::{Path, PathBuf};
use unmask_engine::ModelConfig;
use unmask_engine::model::weights::Weights;

/// What asks for more than this ends the test.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 256 << 20);

fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds")
}

/// Loads a tiny model of which one file is another.
fn load(target: &str, file: &str, seed: u64, rounds: u64) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(seeds().join("tiny_config.json"), dir.path().join("config.json")).unwrap();
    std::fs::copy(seeds().join("safetensors/whole"), dir.path().join("model.safetensors")).unwrap();
    mutate::fuzz(&seeds().join(target), seed, rounds, |bytes| {
        std::fs::write(dir.path().join(file), bytes).unwrap();
        if let (Ok(config), Ok(weights)) =
            (ModelConfig::load(dir.path(), &Default::default()), Weights::open(dir.path()))
        {
            let _ = weights.check(&config);
        }
    });
}

#[test]
fn changed_configs_are_read_or_refused() {
    load("config", "config.json", 3, 200);
}

#[test]
fn changed_weights_are_read_or_refused() {
    load("safetensors", "model.safetensors", 4, 2000);
}
