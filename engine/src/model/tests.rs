//! Checkpoints as users have them: every spelling, every source type, shards, and every way to be wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod families;

use super::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use tempfile::TempDir;
use unmask_kernels::{KvType, Row, RowTable, WeightType};

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family)
}

fn options() -> LoadOptions {
    LoadOptions { threads: 1, ..LoadOptions::default() }
}

fn copy(family: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        std::fs::copy(golden(family).join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(value.as_object_mut().unwrap());
    std::fs::write(path, value.to_string()).unwrap();
}

/// A copy of `family` with another config.
fn with_config(family: &str, change: impl FnOnce(&mut Map<String, Value>)) -> TempDir {
    let dir = copy(family);
    edit_json(&dir.path().join("config.json"), change);
    dir
}

fn set(config: &mut Map<String, Value>, values: Value) {
    config.extend(values.as_object().unwrap().clone());
}

fn config(dir: &TempDir) -> ModelConfig {
    ModelConfig::load(dir.path(), &Overrides::default()).unwrap()
}

fn refusal(dir: &TempDir) -> String {
    Model::load(dir.path(), &options()).err().expect("must be refused").to_string()
}

fn origin(config: &ModelConfig, key: &str) -> (String, &'static str) {
    let found: Vec<_> = config.entries().iter().filter(|entry| entry.key == key).collect();
    assert_eq!(found.len(), 1, "{key} must be listed once: {found:?}");
    (found[0].value.clone(), found[0].origin)
}

/// Name to type, shape and bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(dir: &TempDir) -> Tensors {
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap().tensors();
    all.into_iter().map(|(name, v)| (name, (v.dtype(), v.shape().to_vec(), v.data().to_vec()))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views =
        tensors.iter().map(|(n, (dtype, shape, data))| (n, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn change_tensors(dir: &TempDir, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = read(dir);
    change(&mut tensors);
    write(&dir.path().join("model.safetensors"), &tensors);
}

fn convert(tensors: &mut Tensors, dtype: Dtype) {
    for (is, _, data) in tensors.values_mut() {
        let values = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        *data = match dtype {
            Dtype::F16 => values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
            _ => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        };
        *is = dtype;
    }
}

/// Raw head rows of `outputs` of one pass over `ids`.
fn rows_of(model: &Model, ids: &[u32], reach: Reach, block: u32, outputs: &[u32]) -> Vec<f32> {
    let length = ids.len() as u32;
    let pages: Vec<u32> = (0..length.div_ceil(32)).collect();
    let rows: Vec<Row> = (0..length)
        .map(|position| Row { sequence: 0, position, end: row_end(reach, position, block, length) })
        .collect();
    let (mut kv, mut scratch) = (model.new_kv(pages.len()), model.new_scratch(ids.len()));
    model.forward(ids, &RowTable { rows: &rows, tables: &[&pages] }, outputs, &mut kv, &mut scratch);
    let mut out = vec![0.0; outputs.len() * model.config().vocab_rows as usize];
    model.logits(&scratch, &mut out);
    out
}

fn all_rows(model: &Model, ids: &[u32]) -> Vec<f32> {
    rows_of(model, ids, model.config().open_reach, 4, &(0..ids.len() as u32).collect::<Vec<_>>())
}

fn all_floats(view: &TensorView<'_>) -> Vec<f32> {
    let mut values = vec![0.0; view.shape().iter().product()];
    super::weights::floats(view, 0, &mut values);
    values
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

const IDS: [u32; 11] = [3, 17, 40, 5, 200, 77, 8, 150, 33, 90, 12];

#[test]
fn rows_without_a_head_change_no_bit() {
    let model = Model::load(&golden("sdar"), &options()).unwrap();
    let vocab = model.config().vocab_rows as usize;
    let all = all_rows(&model, &IDS);
    for outputs in [vec![], vec![0], vec![10], vec![2, 3, 9], (4..11).collect::<Vec<u32>>()] {
        let some = rows_of(&model, &IDS, Reach::Block, 4, &outputs);
        let want: Vec<f32> = outputs.iter().flat_map(|&r| &all[r as usize * vocab..][..vocab]).copied().collect();
        assert_eq!(some, want, "{outputs:?}");
    }
}

/// Half-precision files give exactly the bits of the same values stored as f32; what rounding costs the logits
/// shrinks with the format's step (f16 has three more bits than bf16).
#[test]
#[allow(clippy::print_stdout)]
fn half_precision_sources_lose_nothing_but_their_rounding() {
    let full = all_rows(&Model::load(&golden("qwen3"), &options()).unwrap(), &IDS);
    let load = |dir: &TempDir, dtype| Model::load(dir.path(), &LoadOptions { dtype, ..options() }).unwrap();
    let errors = [Dtype::F16, Dtype::BF16].map(|dtype| {
        let (half, widened) = (copy("qwen3"), copy("qwen3"));
        change_tensors(&half, |tensors| convert(tensors, dtype));
        change_tensors(&widened, |tensors| {
            convert(tensors, dtype);
            for (is, shape, data) in tensors.values_mut() {
                let view = TensorView::new(*is, shape.clone(), data).unwrap();
                let floats = all_floats(&view);
                (*is, *data) = (Dtype::F32, floats.iter().flat_map(|x| x.to_le_bytes()).collect());
            }
        });
        for weights in [WeightType::F32, WeightType::Bf16] {
            let (a, b) = (all_rows(&load(&half, weights), &IDS), all_rows(&load(&widened, weights), &IDS));
            assert_eq!(a, b, "{dtype:?} as {weights:?}");
        }
        let packed = worst(&all_rows(&load(&half, WeightType::Bf16), &IDS), &full);
        let error = worst(&all_rows(&load(&half, WeightType::F32), &IDS), &full);
        println!("{dtype:?}: {error:.3}, packed as bf16 {packed:.3}");
        assert!(packed < 1.0, "{dtype:?}: {packed}, logits reach about 18");
        error
    });
    assert!(errors[0] > 0.0 && errors[0] * 2.0 < errors[1] && errors[1] < 2.0, "{errors:?}");
}

#[test]
fn shards_are_one_checkpoint() {
    let dir = copy("llama");
    let whole = Model::load(dir.path(), &options()).unwrap();
    let mut first = read(&dir);
    let second = first.split_off("model.layers.1.");
    let file = |name: &str| if first.contains_key(name) { "a.safetensors" } else { "b.safetensors" };
    let map: Map<String, Value> = first.keys().chain(second.keys()).map(|n| (n.clone(), file(n).into())).collect();
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    write(&dir.path().join("a.safetensors"), &first);
    assert!(refusal(&dir).contains("b.safetensors"), "a missing shard is named");
    write(&dir.path().join("b.safetensors"), &second);
    let model = Model::load(dir.path(), &options()).unwrap();
    assert_eq!(all_rows(&model, &IDS), all_rows(&whole, &IDS));
    assert_eq!(model.parameters(), whole.parameters());

    write(&dir.path().join("b.safetensors"), &first.clone().into_iter().chain(second).collect());
    assert!(refusal(&dir).contains("is in another file too"));
    for bad in [json!({}), json!({ "weight_map": { "a": "../a.safetensors" } }), json!({ "weight_map": { "a": 1 } })] {
        std::fs::write(&index, bad.to_string()).unwrap();
        let error = refusal(&dir);
        assert!(error.contains("index.json") && error.contains("weight_map"), "{error}");
    }
}

#[test]
fn missing_unknown_and_misshapen_tensors_are_listed() {
    let dir = copy("sdar");
    change_tensors(&dir, |tensors| {
        let norm = tensors.remove("model.norm.weight").unwrap();
        tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        tensors.insert("model.surprise".into(), norm.clone());
        tensors.insert("model.layers.0.self_attn.o_proj.bias".into(), norm.clone());
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), norm.clone());
        tensors.insert("model.layers.0.self_attn.q_norm.weight".into(), norm);
        let head = tensors.get_mut("lm_head.weight").unwrap();
        *head = (Dtype::U8, head.1.clone(), vec![0; head.1.iter().product()]);
    });
    let error = refusal(&dir);
    for part in [
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.surprise is unknown",
        "o_proj.bias: a bias of the attention's output is not implemented",
        "q_norm.weight has shape [64], the config says [16]",
        "lm_head.weight has type U8",
    ] {
        assert!(error.contains(part), "{part:?} not in {error}");
    }
    assert!(!error.contains("inv_freq"), "{error}");
    let dir = with_config("sdar", |config| set(config, json!({ "num_hidden_layers": 100 })));
    assert!(refusal(&dir).contains("and "), "a long list is cut");
}

#[test]
fn files_cut_at_any_length_are_refused() {
    let dir = copy("qwen2");
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 1, 7, 8, 9, header - 1, header, header + 1, whole.len() / 2, whole.len() - 4, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = Model::load(dir.path(), &options()).err().unwrap();
        assert!(matches!(&error, LoadError::Corrupt { path: named, .. } if *named == path), "{length}: {error}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for bytes in [longer, huge, b"{}".to_vec(), vec![0xff; 4096]] {
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(Model::load(dir.path(), &options()), Err(LoadError::Corrupt { .. })));
    }
}

#[test]
fn values_name_their_origin() {
    let config = |family: &str| ModelConfig::load(&golden(family), &Overrides::default()).unwrap();
    let sdar = config("sdar");
    assert_eq!(origin(&sdar, "mask_token_id"), ("299".into(), "config.json"));
    assert_eq!(origin(&sdar, "eos_token_id"), ("[294, 292]".into(), "generation_config.json"));
    assert_eq!(origin(&sdar, "block_sizes"), ("[4]".into(), "config.json"));
    assert_eq!(origin(&sdar, "kept_reach"), ("block_causal".into(), "family default"));
    assert_eq!((sdar.tokenizer_size, sdar.vocab_rows), (300, 305));
    let stable = config("stable_diffcoder");
    assert_eq!(origin(&stable, "mask_token_id"), ("5".into(), "tokenizer"));
    assert_eq!(origin(&stable, "block_sizes"), ("[4]".into(), "family default"));
    assert!(config("qwen2").qkv_bias && config("qwen2").tied && !config("qwen2").qk_norm);
    assert_eq!((config("qwen3").rope_theta, config("qwen3").rotary_dim), (1e6, 32));
    let overrides = Overrides { mask_id: Some(7), block_size: Some(8), ..Overrides::default() };
    let changed = ModelConfig::load(&golden("sdar"), &overrides).unwrap();
    assert_eq!(origin(&changed, "mask_token_id"), ("7".into(), "override"));
    assert_eq!((changed.block_sizes, changed.decode.block_size), (vec![8], 8));
    let far = Overrides { mask_id: Some(305), ..Overrides::default() };
    assert!(
        ModelConfig::load(&golden("sdar"), &far).unwrap_err().to_string().contains("outside the vocabulary of 305")
    );
    let error = ModelConfig::load(&golden("llama"), &overrides).unwrap_err().to_string();
    assert!(error.contains("mask_token_id") && error.contains("block_size"), "{error}");
}

#[test]
fn both_rotary_spellings_mean_the_same() {
    let newer = with_config("llama", |config| {
        let theta = config.remove("rope_theta").unwrap();
        config.insert("rope_parameters".into(), json!({ "rope_type": "default", "rope_theta": theta }));
    });
    assert_eq!(config(&newer).rope_theta, 500_000.0);
    let full = all_rows(&Model::load(&golden("llama"), &options()).unwrap(), &IDS);
    assert_eq!(all_rows(&Model::load(newer.path(), &options()).unwrap(), &IDS), full);
    for spelling in
        [json!({ "partial_rotary_factor": 0.5 }), json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } })]
    {
        let partial = with_config("llama", |config| set(config, spelling));
        assert_eq!(config(&partial).rotary_dim, 8);
        assert_ne!(all_rows(&Model::load(partial.path(), &options()).unwrap(), &IDS), full);
    }
}

#[test]
fn a_bias_of_the_projections_is_honoured_where_the_config_says_so() {
    let dir = with_config("llama", |config| set(config, json!({ "attention_bias": true })));
    assert!(refusal(&dir).contains("self_attn.q_proj.bias is missing"));
    change_tensors(&dir, |tensors| {
        for layer in 0..3 {
            for (name, rows) in [("q", 64), ("k", 32), ("v", 32)] {
                let zeros = (Dtype::F32, vec![rows], vec![0; rows * 4]);
                tensors.insert(format!("model.layers.{layer}.self_attn.{name}_proj.bias"), zeros);
            }
        }
    });
    let plain = Model::load(&golden("llama"), &options()).unwrap();
    let biased = Model::load(dir.path(), &options()).unwrap();
    assert!(biased.config().qkv_bias);
    assert_eq!(all_rows(&biased, &IDS), all_rows(&plain, &IDS), "zero biases change nothing");
    assert_ne!(biased.numerics_id(), plain.numerics_id());
}

#[test]
fn what_would_be_computed_wrongly_is_refused() {
    for (family, change, part) in [
        ("llama", json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0 } }), "rope_scaling.factor"),
        ("llama", json!({ "rope_scaling": { "factor": 2.0 } }), "rope_scaling.factor"),
        ("llama", json!({ "rope_scaling": "linear" }), "rope_scaling must be"),
        (
            "qwen3",
            json!({ "rope_parameters": { "rope_theta": 1e6, "rope_type": "yarn" } }),
            "rope_parameters.rope_type",
        ),
        ("qwen3", json!({ "rope_parameters": {} }), "rope_theta is missing"),
        ("qwen3", json!({ "layer_types": ["full_attention", "sliding_attention", "full_attention"] }), "layer_types"),
        ("qwen2", json!({ "use_sliding_window": true }), "use_sliding_window"),
        ("qwen2", json!({ "hidden_act": "gelu" }), "hidden_act"),
        ("llama", json!({ "mlp_bias": true }), "mlp_bias"),
        ("llama", json!({ "partial_rotary_factor": 1.5 }), "partial_rotary_factor"),
        ("llama", json!({ "rope_theta": 0 }), "rope_theta"),
        ("llama", json!({ "num_key_value_heads": 3 }), "multiple of num_key_value_heads"),
        ("llama", json!({ "head_dim": 15 }), "head_dim"),
        ("llama", json!({ "head_dim": null, "hidden_size": 66 }), "no multiple of the 4 heads"),
        ("llama", json!({ "head_dim": null, "hidden_size": 3 }), "head_dim"),
        ("llama", json!({ "hidden_size": 1e30 }), "hidden_size"),
        ("llama", json!({ "tie_word_embeddings": "yes" }), "tie_word_embeddings"),
        ("sdar", json!({ "mask_token_id": -1 }), "mask_token_id must be a token id"),
        ("sdar", json!({ "mask_token_id": 298 }), "is 299: override it"),
        ("sdar", json!({ "block_size": 0 }), "block_sizes"),
        ("llada", json!({ "include_bias": true }), "include_bias must be false"),
        ("llada", json!({ "layer_norm_type": "low_precision" }), "layer_norm_type must be \"rms\""),
        // In the words of the file.
        ("llada", json!({ "n_heads": null }), "n_heads is missing"),
        ("llada", json!({ "activation_type": "gelu" }), "activation_type must be silu"),
        ("llada2_moe", json!({ "score_function": "softmax" }), "score_function must be sigmoid"),
        ("llada2_moe", json!({ "n_group": 3 }), "n_group 3 must divide num_experts 16"),
        ("llada2_moe", json!({ "num_experts_per_tok": 9 }), "num_experts_per_tok 9 is more"),
        ("llada2_moe", json!({ "_moe_implementation": "fused" }), "_moe_implementation"),
        ("qwen3_moe", json!({ "num_experts": 100000 }), "num_experts must be a whole number from 1 to 512"),
        ("sdar", json!({ "architectures": [] , "model_type": "gpt2" }), "architecture gpt2 is not supported"),
    ] {
        let error = refusal(&with_config(family, |config| set(config, change.clone())));
        assert!(error.contains("config.json") && error.contains(part), "{change}: {error}");
    }
}

#[test]
fn every_missing_key_is_named_and_nothing_that_follows_from_it() {
    let dir = with_config("sdar", Map::clear);
    assert!(refusal(&dir).contains("(none named)"));
    let dir = with_config("sdar", |config| config.retain(|key, _| key == "architectures" || key == "mask_token_id"));
    let LoadError::Config { problems, .. } = Model::load(dir.path(), &options()).err().unwrap() else { panic!() };
    let mut keys: Vec<&str> = problems.iter().filter_map(|problem| problem.strip_suffix(" is missing")).collect();
    keys.sort_unstable();
    let needed = [
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "rope_theta",
        "vocab_size",
    ];
    assert_eq!((keys.as_slice(), problems.len()), (needed.as_slice(), needed.len()), "{problems:?}");
}

#[test]
fn broken_side_files_are_named() {
    for (name, change, part) in [
        ("tokenizer.json", json!({ "added_tokens": [{ "content": "<|MASK|>", "id": u64::MAX }] }), "<|MASK|>"),
        ("tokenizer.json", json!({ "added_tokens": [{ "id": 4 }] }), "no content"),
        ("tokenizer.json", json!({ "model": { "vocab": { "a": "b" } } }), "\"a\""),
        ("tokenizer_config.json", json!({ "added_tokens_decoder": { "x": { "content": "y" } } }), "\"y\""),
        ("generation_config.json", json!({ "eos_token_id": "end" }), "eos_token_id (generation_config.json)"),
        ("generation_config.json", json!({ "eos_token_id": [294, 4000] }), "eos_token_id 4000"),
    ] {
        let dir = copy("sdar");
        edit_json(&dir.path().join(name), |object| set(object, change.clone()));
        let error = refusal(&dir);
        assert!(error.contains(part), "{name} {change}: {error}");
        std::fs::write(dir.path().join(name), "[1, 2").unwrap();
        let error = refusal(&dir);
        assert!(error.contains(name) && error.contains("not valid JSON"), "{error}");
    }
    let dir = copy("sdar");
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    assert_eq!(config(&dir).tokenizer_size, 305, "without a tokenizer every row counts");
}

/// The format of our own checkpoints, over the tensors of a golden one (QK-norm, no biases, tied here).
fn own(change: Value) -> TempDir {
    let dir = copy("sdar");
    std::fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    let mut config = json!({
        "architectures": ["UnmaskForBlockDiffusion"], "model_type": "unmask", "hidden_size": 64,
        "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 305, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 1024, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "block_sizes": [4, 8, 16, 32], "kept_reach": "causal", "open_reach": "block", "shift": false,
        "mask_token_id": 1, "eos_token_id": [0], "pad_token_id": 0,
        "infill": { "prefix": 2, "suffix": 3, "middle": 4 }, "edit": "none",
        "decode": { "block_size": 16, "policy": { "threshold": { "tau": 0.9 } }, "max_tokens": 256, "temperature": 0.0 }
    });
    set(config.as_object_mut().unwrap(), change);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    change_tensors(&dir, |tensors| drop(tensors.remove("lm_head.weight")));
    dir
}

#[test]
fn our_own_format_is_closed_and_checked() {
    let dir = own(json!({}));
    let model = Model::load(dir.path(), &options()).unwrap();
    let config = model.config();
    assert_eq!((config.mask_id, &config.eos_ids[..], config.edit), (Some(1), &[0][..], false));
    assert_eq!((config.decode.block_size, config.block_sizes.len()), (16, 4));
    assert_eq!((config.open_reach, config.kept_reach), (Reach::Block, Reach::Causal));
    assert!(config.can_autoregress() && config.can_diffuse() && config.tied && config.qk_norm);
    assert!(all_rows(&model, &IDS).iter().all(|x| x.is_finite()));
    for (change, part) in [
        (json!({ "rope_scaling": null }), "rope_scaling is unknown"),
        (json!({ "kept_reach": "block" }), "kept_reach must be causal"),
        (json!({ "shift": true }), "shift must be false"),
        (json!({ "infill": { "prefix": 2, "suffix": 3, "middle": 305 } }), "infill.middle 305"),
        (json!({ "infill": { "prefix": 2 } }), "infill: missing field"),
        (json!({ "edit": 3 }), "edit must be"),
        (json!({ "block_sizes": [4, 65] }), "block_sizes must be"),
        (json!({ "max_position_embeddings": 0 }), "max_position_embeddings"),
    ] {
        let error = refusal(&own(change.clone()));
        assert!(error.contains(part), "{change}: {error}");
    }
    for (key, value, part) in [
        ("block_size", json!(64), "decode.block_size 64 is none of block_sizes"),
        ("temperature", json!(-1.0), "decode.temperature"),
        ("max_tokens", json!(0), "decode.max_tokens"),
        ("policy", json!({ "threshold": { "tau": 1.5 } }), "tau"),
        ("policy", json!("guess"), "decode: unknown variant"),
        ("speed", json!(1), "decode: unknown field"),
    ] {
        let mut decode = json!({ "block_size": 16, "policy": { "threshold": { "tau": 0.9 } }, "max_tokens": 256, "temperature": 0.0 });
        set(decode.as_object_mut().unwrap(), json!({ key: value }));
        let error = refusal(&own(json!({ "decode": decode })));
        assert!(error.contains(part), "{key}: {error}");
    }
}

#[test]
fn the_numerics_id_names_everything_that_decides_bits() {
    let base = Model::load(&golden("qwen3"), &options()).unwrap();
    let id = |options: LoadOptions| Model::load(&golden("qwen3"), &options).unwrap().numerics_id().to_owned();
    assert_eq!(base.numerics_id(), id(LoadOptions { threads: 3, ..options() }), "threads change no bit");
    assert_ne!(base.numerics_id(), id(LoadOptions { dtype: WeightType::Bf16, ..options() }));
    assert_ne!(base.numerics_id(), id(LoadOptions { kv_type: KvType::Bf16, ..options() }));
    let theta = json!({ "rope_parameters": { "rope_theta": 9e5 } });
    let other = with_config("qwen3", |config| set(config, theta));
    assert_ne!(base.numerics_id(), Model::load(other.path(), &options()).unwrap().numerics_id());
    let nudged = copy("qwen3");
    change_tensors(&nudged, |tensors| tensors.get_mut("model.norm.weight").unwrap().2[0] ^= 1);
    assert_ne!(base.numerics_id(), Model::load(nudged.path(), &options()).unwrap().numerics_id());
}

#[test]
fn rows_end_where_their_reach_does() {
    let ends = |reach, block| (0..7).map(|p| row_end(reach, p, block, 7)).collect::<Vec<_>>();
    assert_eq!(ends(Reach::Causal, 4), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(ends(Reach::Block, 4), [4, 4, 4, 4, 7, 7, 7]);
    assert_eq!(ends(Reach::Bidirectional, 4), [7; 7]);
}
