//! Checkpoints that somebody made to do harm are read or refused, and nothing else happens. The seeds are those of `/fuzz`.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use unmask_engine::model::weights::Weights;
use unmask_engine::{LoadError, ModelConfig};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Name and bytes of every seed of a fuzz target.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(root().join("fuzz/seeds").join(target)).unwrap().map(Result::unwrap);
    let mut seeds: Vec<_> =
        entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect();
    seeds.sort();
    assert!(seeds.len() > 10, "{target}");
    seeds
}

fn seed(target: &str, name: &str) -> Vec<u8> {
    seeds(target).into_iter().find(|seed| seed.0 == name).unwrap().1
}

/// The folder of a whole tiny model.
fn tiny() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(root().join("fuzz/seeds/tiny_config.json"), dir.path().join("config.json")).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), seed("safetensors", "whole")).unwrap();
    dir
}

fn load(dir: &TempDir, file: &str, bytes: &[u8]) -> Result<(), LoadError> {
    std::fs::write(dir.path().join(file), bytes).unwrap();
    let config = ModelConfig::load(dir.path(), &Default::default())?;
    Weights::open(dir.path())?.check(&config)
}

#[test]
fn hostile_weights_are_refused() {
    let dir = tiny();
    for (name, bytes) in seeds("safetensors") {
        let result = load(&dir, "model.safetensors", &bytes);
        assert_eq!(result.is_ok(), name == "whole", "{name}: {result:?}");
    }
}

#[test]
fn hostile_configs_are_refused() {
    let dir = tiny();
    for (name, bytes) in seeds("config") {
        let result = load(&dir, "config.json", &bytes);
        assert!(result.is_err(), "{name} fits the tensors of another model");
    }
}

#[test]
fn offsets_that_overflow_when_added_up_are_refused() {
    let bytes = seed("safetensors", "offsets_sum_past_64_bits");
    let error = load(&tiny(), "model.safetensors", &bytes).unwrap_err().to_string();
    assert!(error.contains("lies past the end of the file"), "{error}");
}

#[test]
fn files_cut_at_any_byte_are_refused() {
    let dir = tiny();
    for (file, whole) in [
        ("model.safetensors", seed("safetensors", "whole")),
        ("config.json", std::fs::read(root().join("fuzz/seeds/tiny_config.json")).unwrap().trim_ascii_end().to_vec()),
    ] {
        for length in 0..whole.len() {
            assert!(load(&dir, file, &whole[..length]).is_err(), "{file} cut at {length}");
        }
        load(&dir, file, &whole).unwrap();
    }
}

/// What happens to a file: at a place, some bytes make way for others.
type Edits = Vec<(prop::sample::Index, usize, Vec<u8>)>;

/// Bytes, pieces of JSON and numbers at the edges.
fn edits() -> impl Strategy<Value = Edits> {
    let json = prop::sample::select(vec![
        "0",
        "-1",
        "18446744073709551615",
        "4294967296",
        "1e999",
        "null",
        "[",
        "]",
        "{}",
        "\"\"",
        ",",
    ]);
    let new = prop_oneof![prop::collection::vec(any::<u8>(), 0..4), json.prop_map(|text| text.as_bytes().to_vec())];
    prop::collection::vec((any::<prop::sample::Index>(), 0usize..6, new), 1..4)
}

fn edited(mut bytes: Vec<u8>, edits: &Edits) -> Vec<u8> {
    for (at, removed, new) in edits {
        let at = at.index(bytes.len().max(1)).min(bytes.len());
        let end = (at + removed).min(bytes.len());
        bytes.splice(at..end, new.iter().copied());
    }
    bytes
}

proptest! {
    #[test]
    fn an_edited_file_is_read_or_refused(edits in edits(), header in any::<bool>()) {
        let dir = tiny();
        let file = if header { "model.safetensors" } else { "config.json" };
        let whole = std::fs::read(dir.path().join(file)).unwrap();
        // Mostly of the header: what stands in the data says nothing about memory.
        let cut = whole.len().min(1200);
        let bytes = [edited(whole[..cut].to_vec(), &edits), whole[cut..].to_vec()].concat();
        let _ = load(&dir, file, &bytes);
    }
}
