//! `config.json`: resolved, then held against the tensors of a tiny model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tempfile::TempDir;
use unmask_engine::model::weights::Weights;
use unmask_engine::model::{ModelConfig, Overrides};

static MODEL: LazyLock<(TempDir, Weights)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), include_bytes!("../seeds/safetensors/whole")).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    (dir, weights)
});

fuzz_target!(|bytes: &[u8]| {
    let (dir, weights) = &*MODEL;
    std::fs::write(dir.path().join("config.json"), bytes).unwrap();
    if let Ok(config) = ModelConfig::load(dir.path(), &Overrides::default()) {
        let _ = weights.check(&config);
    }
});
