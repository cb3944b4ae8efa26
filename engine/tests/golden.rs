//! Logits and decodes of other implementations, reproduced (tests/golden/README.md defines the data).
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use unmask_engine::raw::{LoopKind, Parameters, RawDecode, decode, logits};
use unmask_engine::{LoadError, LoadOptions, Model, Reach};

const FAMILIES: [&str; 11] = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "stable_diffcoder",
    "sdar",
    "sdar_moe",
    "fast_dllm_v2",
    "llada2_moe",
    "llada",
    "dream",
];
/// Largest absolute difference of logits.
const LOGITS_TOLERANCE: f32 = 1e-3;
/// Largest difference of confidences.
const CONFIDENCE_TOLERANCE: f64 = 5e-4;

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family)
}

fn load(family: &str) -> (Arc<Model>, Value) {
    let text = std::fs::read_to_string(folder(family).join("expected.json")).unwrap();
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    (Arc::new(Model::load(&folder(family), &options).unwrap()), serde_json::from_str(&text).unwrap())
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn logits_agree() {
    for family in FAMILIES {
        let (model, expected) = load(family);
        let bytes = std::fs::read(folder(family).join("expected.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for case in expected["logits"].as_array().unwrap() {
            let reach = Reach::from_name(case["attention"].as_str().unwrap()).unwrap();
            let block = case["block_length"].as_u64().unwrap_or(1) as u32;
            let got = logits(&model, &ids(&case["input_ids"]), reach, block).unwrap();
            let view = tensors.tensor(case["tensor"].as_str().unwrap()).unwrap();
            let want = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
            assert!(worst < LOGITS_TOLERANCE, "{family} {}: {worst}", case["id"]);
        }
    }
}

#[test]
fn decodes_agree() {
    for family in FAMILIES {
        let (model, expected) = load(family);
        for case in expected["decode"].as_array().unwrap() {
            let what = format!("{family} {}", case["id"]);
            let request = RawDecode {
                prompt: ids(&case["prompt_ids"]),
                loop_kind: LoopKind::from_name(case["loop"].as_str().unwrap()).unwrap(),
                parameters: serde_json::from_value::<Parameters>(case["parameters"].clone()).unwrap(),
            };
            let got = decode(&model, &request).unwrap();
            assert_eq!(got.output_ids, ids(&case["output_ids"]), "{what} output");
            assert_eq!(got.answer_ids, ids(&case["answer_ids"]), "{what} answer");
            assert_eq!(got.finish_reason, case["finish_reason"], "{what} reason");
            assert_eq!(u64::from(got.denoise), case["totals"]["denoise"].as_u64().unwrap(), "{what} denoise");
            assert_eq!(u64::from(got.decode), case["totals"]["decode"].as_u64().unwrap(), "{what} decode");
            let commits = &case["commits"];
            let positions: Vec<u32> = got.commits.iter().map(|c| c.position).collect();
            assert_eq!(positions, ids(&commits["position"]), "{what} positions");
            assert_eq!(got.commits.iter().map(|c| c.token).collect::<Vec<_>>(), ids(&commits["token"]), "{what}");
            let passes: Vec<i64> = commits["pass"].as_array().unwrap().iter().map(|p| p.as_i64().unwrap()).collect();
            assert_eq!(got.commits.iter().map(|c| i64::from(c.pass)).collect::<Vec<_>>(), passes, "{what} passes");
            let edits = &case["edits"];
            if !edits.is_null() {
                let all: Vec<_> = got.edits.iter().map(|e| (e.position, e.old, e.new)).collect();
                let (old, new) = (ids(&edits["old"]), ids(&edits["new"]));
                let want = ids(&edits["position"]).into_iter().zip(old).zip(new).map(|((at, old), new)| (at, old, new));
                assert_eq!(all, want.collect::<Vec<_>>(), "{what} edits");
            }
            for (commit, want) in got.commits.iter().zip(commits["confidence"].as_array().unwrap()) {
                let difference = (f64::from(commit.confidence) - want.as_f64().unwrap()).abs();
                assert!(difference < CONFIDENCE_TOLERANCE, "{what} confidence at {}", commit.position);
            }
        }
    }
}

fn copy(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(folder(family).join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn refusal(dir: &Path) -> LoadError {
    Model::load(dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).err().unwrap()
}

#[test]
fn truncated_and_corrupt_weights_are_named() {
    let dir = copy("sdar");
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = refusal(dir.path());
        assert!(matches!(error, LoadError::Corrupt { .. }) || len == 0, "{len}: {error}");
        assert!(error.to_string().contains("model.safetensors"), "{len}: {error}");
    }
    let mut header = whole.clone();
    header[20] = b'#';
    std::fs::write(&path, header).unwrap();
    assert!(matches!(refusal(dir.path()), LoadError::Corrupt { .. }));
    std::fs::remove_file(&path).unwrap();
    assert!(refusal(dir.path()).to_string().contains("model.safetensors"));
}

fn with_config(dir: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> String {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    std::fs::write(&path, config.to_string()).unwrap();
    refusal(dir).to_string()
}

#[test]
fn every_missing_and_unusable_key_is_named_at_once() {
    let error = with_config(copy("qwen3").path(), |config| {
        config.remove("hidden_size");
        config.remove("rms_norm_eps");
        config.insert("hidden_act".into(), "gelu".into());
        config.insert("num_hidden_layers".into(), "three".into());
    });
    for part in ["hidden_size is missing", "rms_norm_eps is missing", "hidden_act", "num_hidden_layers"] {
        assert!(error.contains(part), "{error}");
    }
    let error = with_config(copy("qwen3").path(), |config| {
        config.insert("architectures".into(), serde_json::json!(["GPT2LMHeadModel"]));
    });
    assert!(error.contains("GPT2LMHeadModel") && error.contains("SDARForCausalLM"), "{error}");
    let error = with_config(copy("qwen3").path(), |config| {
        config.insert("num_hidden_layers".into(), 2.into());
        config.insert("intermediate_size".into(), 128.into());
    });
    assert!(error.contains("model.layers.2") && error.contains("unknown") && error.contains("shape"), "{error}");
    let dir = copy("sdar");
    std::fs::write(dir.path().join("config.json"), "{\"architectures\": [").unwrap();
    assert!(refusal(dir.path()).to_string().contains("not valid JSON"));
    assert!(refusal(&dir.path().join("nowhere")).to_string().contains("no such file"));
}
