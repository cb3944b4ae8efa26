//! No file of a checkpoint takes more memory than its size warrants. One test, so that the count is its own.
#![allow(clippy::unwrap_used)]

use cap::Cap;
use std::alloc::System;
use std::path::{Path, PathBuf};
use unmask_engine::ModelConfig;
use unmask_engine::model::weights::Weights;

/// Memory a file may take at its peak, per byte of it.
const PER_BYTE: usize = 64;
/// And besides (bytes).
const BESIDES: usize = 1 << 20;

/// What asks for more than this is stopped.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 1 << 30);

/// Every seed with its target, the shortest first: a peak can only be seen where it is the highest so far.
fn seeds() -> Vec<(&'static str, PathBuf, usize)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    let mut all = Vec::new();
    for (target, file) in [("config", "config.json"), ("safetensors", "model.safetensors")] {
        for entry in std::fs::read_dir(folder.join(target)).unwrap().map(Result::unwrap) {
            all.push((file, entry.path(), entry.metadata().unwrap().len() as usize));
        }
    }
    all.sort_by_key(|seed| seed.2);
    all
}

#[test]
fn no_file_takes_more_memory_than_its_size_warrants() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    let dir = tempfile::tempdir().unwrap();
    for (file, path, size) in seeds() {
        std::fs::copy(folder.join("tiny_config.json"), dir.path().join("config.json")).unwrap();
        std::fs::copy(folder.join("safetensors/whole"), dir.path().join("model.safetensors")).unwrap();
        std::fs::copy(&path, dir.path().join(file)).unwrap();
        let before = ALLOCATOR.allocated();
        if let (Ok(config), Ok(weights)) =
            (ModelConfig::load(dir.path(), &Default::default()), Weights::open(dir.path()))
        {
            let _ = weights.check(&config);
        }
        let peak = ALLOCATOR.max_allocated().saturating_sub(before);
        assert!(peak <= PER_BYTE * size + BESIDES, "{}: {peak} bytes for {size}", path.display());
    }
}
