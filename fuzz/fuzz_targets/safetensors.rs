//! `model.safetensors` of a tiny model: opened, then checked against its config.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tempfile::TempDir;
use unmask_engine::model::weights::Weights;
use unmask_engine::model::{ModelConfig, Overrides};

static MODEL: LazyLock<(TempDir, ModelConfig)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), include_bytes!("../seeds/tiny_config.json")).unwrap();
    let config = ModelConfig::load(dir.path(), &Overrides::default()).unwrap();
    (dir, config)
});

fuzz_target!(|bytes: &[u8]| {
    let (dir, config) = &*MODEL;
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    if let Ok(weights) = Weights::open(dir.path()) {
        let _ = weights.check(config);
    }
});
