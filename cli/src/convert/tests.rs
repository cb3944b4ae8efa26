//! Files that mean harm, every stored type against another reading of it, and models that go there and back.
#![allow(clippy::unwrap_used)]

use super::export::Checkpoint;
use super::gguf::{ALIGNMENT, Gguf};
use super::import::import;
use super::names::Order;
use super::tensors::{Target, Tensor};
use super::writer::{self, Item};
use super::{quants, vocabulary};
use candle_core::quantized::GgmlDType;
use indicatif::ProgressBar;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use unmask_engine::model::weights::Weights;
use unmask_engine::model::{ModelConfig, Overrides};
use unmask_text::{Specials, Tokenizer};

fn tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// The model in `dir` as a GGUF file.
fn exported(dir: &Path, target: Option<Target>) -> Vec<u8> {
    let mut file = Vec::new();
    Checkpoint::open(dir).unwrap().write_gguf(dir, target, &mut file).unwrap();
    file
}

/// The smallest model that is read: one layer, 16 values wide, nine tokens.
fn tiny(change: impl FnOnce(&mut Vec<(String, Item)>)) -> Vec<u8> {
    let tokens = ["a", "b", "c", "d", "ab", "e", "f", "<|im_end|>", "g"].map(str::to_owned);
    let mut items: Vec<(String, Item)> = [
        ("general.architecture", Item::Text("llama".into())),
        ("llama.block_count", Item::U32(1)),
        ("llama.context_length", Item::U32(64)),
        ("llama.embedding_length", Item::U32(16)),
        ("llama.feed_forward_length", Item::U32(16)),
        ("llama.attention.head_count", Item::U32(2)),
        ("llama.attention.head_count_kv", Item::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Item::F32(1e-5)),
        ("tokenizer.ggml.model", Item::Text("gpt2".into())),
        ("tokenizer.ggml.pre", Item::Text("smollm".into())),
        ("tokenizer.ggml.tokens", Item::Texts(tokens.to_vec())),
        ("tokenizer.ggml.token_type", Item::Whole(vec![1, 1, 1, 1, 1, 1, 1, 3, 1])),
        ("tokenizer.ggml.merges", Item::Texts(vec!["a b".into()])),
        ("tokenizer.ggml.eos_token_id", Item::U32(7)),
        ("tokenizer.ggml.add_bos_token", Item::Bool(false)),
    ]
    .map(|(key, item)| (key.to_owned(), item))
    .into();
    change(&mut items);
    let values: Vec<u8> = (0..256).flat_map(|i| (i as f32 / 256.0).to_le_bytes()).collect();
    let square: Vec<usize> = vec![16, 16];
    let shapes = [
        ("token_embd.weight", vec![9, 16]),
        ("output_norm.weight", vec![16]),
        ("blk.0.attn_norm.weight", vec![16]),
        ("blk.0.attn_q.weight", square.clone()),
        ("blk.0.attn_k.weight", vec![8, 16]),
        ("blk.0.attn_v.weight", vec![8, 16]),
        ("blk.0.attn_output.weight", square.clone()),
        ("blk.0.ffn_norm.weight", vec![16]),
        ("blk.0.ffn_gate.weight", square.clone()),
        ("blk.0.ffn_up.weight", square.clone()),
        ("blk.0.ffn_down.weight", square),
    ];
    let tensors = shapes.map(|(name, shape)| Tensor {
        name: name.to_owned(),
        shape,
        kind: GgmlDType::F32,
        bytes: &values,
        order: Order::Same,
        target: Target::F32,
    });
    let mut file = Vec::new();
    writer::write(&items, &tensors, &mut file, &ProgressBar::hidden()).unwrap();
    file
}

/// Everything that an import does.
fn attempt(file: &[u8]) -> anyhow::Result<()> {
    let dir = tempfile::tempdir().unwrap();
    import(file, None, dir.path()).map(|_| ())
}

fn refusal(file: &[u8]) -> String {
    format!("{:#}", attempt(file).unwrap_err())
}

fn replaced(key: &str, item: Item) -> Vec<u8> {
    tiny(|items| items.iter_mut().find(|(name, _)| name == key).unwrap().1 = item)
}

fn with(key: &str, item: Item) -> Vec<u8> {
    tiny(|items| items.push((key.to_owned(), item)))
}

/// What the fuzz target starts from is what the tests know; `UNMASK_WRITE_SEEDS=1` writes it anew.
#[test]
fn the_fuzz_seed_is_the_smallest_model() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/gguf/tiny");
    if std::env::var_os("UNMASK_WRITE_SEEDS").is_some() {
        std::fs::write(&path, tiny(|_| {})).unwrap();
    }
    assert_eq!(std::fs::read(path).unwrap(), tiny(|_| {}));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let file = tiny(|_| {});
    attempt(&file).unwrap();
    for end in 0..file.len() {
        // What is padding after the last tensor may be missing.
        assert!(Gguf::parse(&file[..end]).is_err() || file.len() - end < ALIGNMENT, "cut at byte {end}");
    }
}

#[test]
fn no_byte_of_a_header_makes_an_import_panic() {
    let file = tiny(|_| {});
    // Dimensions, type and offset follow the last name.
    let header = find(&file, "blk.0.ffn_down.weight") + 4 + 16 + 4 + 8;
    for at in 0..header {
        for byte in [0, 1, 9, 0x7f, 0x80, 0xff] {
            let mut harmed = file.clone();
            harmed[at] = byte;
            if let Ok(gguf) = Gguf::parse(&harmed) {
                let _ = vocabulary::read(&gguf);
            }
        }
        let mut harmed = file.clone();
        harmed[at] ^= 1 << (at % 8);
        let _ = attempt(&harmed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_mix_of_bytes_makes_an_import_panic(
        changes in prop::collection::vec((0usize..3000, any::<u8>()), 1..20),
        inserted in prop::collection::vec(any::<u8>(), 0..20),
        at in 0usize..3000,
    ) {
        let mut file = tiny(|_| {});
        for (at, byte) in changes {
            let at = at % file.len();
            file[at] = byte;
        }
        let at = at % file.len();
        file.splice(at..at, inserted);
        let _ = attempt(&file);
    }
}

#[test]
fn counts_and_lengths_beyond_the_file_are_refused_before_anything_is_made_of_them() {
    let huge = u64::MAX.to_le_bytes();
    let file = tiny(|_| {});
    for at in [8, 16] {
        let mut harmed = file.clone();
        harmed[at..at + 8].copy_from_slice(&huge);
        assert!(refusal(&harmed).contains("it says it has 18446744073709551615"));
        // Within the limit, and still more than there are.
        harmed[at..at + 8].copy_from_slice(&60_000u64.to_le_bytes());
        assert!(attempt(&harmed).is_err());
    }
    // The length of the first key.
    let mut harmed = file.clone();
    harmed[24..32].copy_from_slice(&huge);
    assert!(refusal(&harmed).contains("ends inside its header"));
    // The length of a list, and the rows of a tensor.
    let list = find(&file, "tokenizer.ggml.token_type") + 8;
    harmed = file.clone();
    harmed[list..list + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    assert!(refusal(&harmed).contains("a list is longer than the file"));
    let rows = find(&file, "blk.0.attn_q.weight") + 12;
    for (rows_said, says) in [(u64::MAX / 2, "too large"), (1 << 40, "more than the file has left"), (0, "empty")] {
        harmed = file.clone();
        harmed[rows..rows + 8].copy_from_slice(&rows_said.to_le_bytes());
        let refused = refusal(&harmed);
        assert!(refused.contains("tensor blk.0.attn_q.weight") && refused.contains(says), "{refused}");
    }
    // Two tensors of the same bytes: what is written could be far more than what was read.
    let offset = find(&file, "blk.0.attn_v.weight") + 4 + 16 + 4;
    harmed = file.clone();
    harmed[offset..offset + 8].copy_from_slice(&0u64.to_le_bytes());
    assert!(refusal(&harmed).contains("tensor blk.0.attn_v.weight begins at 0"));
}

/// One past a name in the file.
fn find(file: &[u8], name: &str) -> usize {
    file.windows(name.len()).position(|bytes| bytes == name.as_bytes()).unwrap() + name.len()
}

fn one_token_more(items: &mut Vec<(String, Item)>) {
    for (_, item) in items {
        match item {
            Item::Texts(tokens) if tokens.len() == 9 => tokens.push("h".into()),
            Item::Whole(kinds) => kinds.push(1),
            _ => {}
        }
    }
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    let text = |text: &str| Item::Text(text.into());
    for (file, says) in [
        (replaced("general.architecture", text("mamba")), "general.architecture \"mamba\" is not read"),
        (replaced("tokenizer.ggml.model", text("llama")), "SentencePiece"),
        (replaced("tokenizer.ggml.pre", text("tekken")), "tokenizer.ggml.pre \"tekken\" is not known"),
        (replaced("llama.block_count", text("one")), "llama.block_count must be there"),
        (replaced("llama.attention.head_count", Item::U32(0)), "num_attention_heads must be a whole number from 1"),
        (replaced("llama.attention.head_count_kv", Item::U32(2)), "k_proj.weight has shape [8, 16]"),
        (replaced("llama.block_count", Item::U32(2)), "model.layers.1.input_layernorm.weight is missing"),
        (replaced("tokenizer.ggml.merges", Item::Texts(vec!["a z".into()])), "tokenizer.json"),
        (replaced("tokenizer.ggml.tokens", Item::Texts(vec!["a".into(); 9])), "token \"a\" is there twice"),
        (replaced("tokenizer.ggml.tokens", Item::Texts(vec!["a".into(); 8])), "8 tokens, but 9 token types"),
        (tiny(one_token_more), "the tokenizer has 10 tokens, token_embd.weight only 9 rows"),
        (with("llama.rope.scaling.type", text("yarn")), "scaled rotary angles"),
        (with("llama.expert_count", Item::U32(8)), "mixtures of experts"),
        (with("llama.rope.dimension_count", Item::U32(4)), "rope.dimension_count 4 is not the 8 of a head"),
        (with("llama.attention.key_length", Item::U32(0)), "head_dim"),
        (with("llama.attention.key_length", Item::U32(7)), "head_dim"),
        (with("\u{1b}[2J", Item::Bool(true)), "control characters"),
        (with("split.count", Item::U32(2)), "join the files"),
        (with("general.alignment", Item::U32(0)), "general.alignment must be a power of two"),
        (with("tokenizer.chat_template", text("{% for %}")), "chat template"),
        (with("llama.block_count", Item::U32(1)), "key llama.block_count is there twice"),
    ] {
        let refused = refusal(&file);
        assert!(refused.contains(says), "{refused}");
    }
}

#[test]
fn weights_that_are_no_numbers_are_refused() {
    let mut file = tiny(|_| {});
    let last = file.len() - 4;
    file[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(refusal(&file).contains("tensor model.layers.0.mlp.down_proj.weight holds"));
}

/// Bytes without rhyme, with the scales at `scales` set to 1/2 and 1/4.
fn block(size: usize, scales: &[usize]) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..size).map(|i| (i * 73 + 19) as u8).collect();
    for (&at, scale) in scales.iter().zip([0x3800u16, 0x3400]) {
        bytes[at..at + 2].copy_from_slice(&scale.to_le_bytes());
    }
    bytes
}

fn decoded(kind: GgmlDType, bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::new();
    quants::decode(kind, bytes, 0, kind.block_size(), &mut out).unwrap();
    out
}

#[test]
fn every_quantised_type_is_read_as_by_ggmls_own_python_package() {
    // Six values of a block and their sum, as package gguf 0.19 gives them for the same bytes.
    let expected: [(u32, &[usize], [f32; 6], f32); 10] = [
        (2, &[0], [-1.5, 3.0, -1.0, 0.0, 1.0, 3.0], -3.5),
        (3, &[0, 2], [3.75, 0.25, 4.25, 0.75, 1.75, 3.75], 125.5),
        (6, &[0], [4.5, -7.0, 5.0, -3.0, -2.0, 0.5], -9.5),
        (7, &[0, 2], [13.75, 10.25, 6.25, 9.75, 2.75, 5.25], 223.5),
        (8, &[0], [-45.5, -9.0, 27.0, 8.0, 25.5, 62.0], 136.0),
        (10, &[80, 82], [4.25, -0.25, 6.25, 9.75, 3.75, 8.75], 956.0),
        (11, &[108], [28.5, -38.0, 10.5, -23.0, 10.5, 0.0], 304.0),
        (12, &[0, 2], [75.75, 323.25, 42.75, 99.25, 43.75, 63.75], 20644.0),
        (13, &[0, 2], [515.75, 323.25, 114.75, 219.25, 53.75, 73.75], 47556.0),
        (14, &[208], [-427.5, 450.0, 49.5, 189.0, -208.0, 52.0], 6150.0),
    ];
    for (code, scales, values, sum) in expected {
        let kind = quants::kind(code).unwrap();
        let out = decoded(kind, &block(kind.type_size(), scales));
        let n = out.len();
        let at = [0, 1, n / 4 + 1, n / 2 + 3, n - 2, n - 1].map(|at| out[at]);
        assert_eq!((at, out.iter().sum::<f32>()), (values, sum), "{}", quants::name(kind));
    }
}

#[test]
fn three_types_are_read_as_their_layout_says() {
    // Q4_0: scale, 16 bytes; low halves are values 0..16, high ones 16..32, less 8.
    let bytes = block(18, &[0]);
    let half = |i: usize| if i < 16 { bytes[2 + i] & 15 } else { bytes[2 + i - 16] >> 4 };
    let by_hand: Vec<f32> = (0..32).map(|i| 0.5 * (f32::from(half(i)) - 8.0)).collect();
    assert_eq!(decoded(GgmlDType::Q4_0, &bytes), by_hand);
    // Q8_0: scale, 32 signed bytes.
    let bytes = block(34, &[0]);
    let by_hand: Vec<f32> = (0..32).map(|i| 0.5 * f32::from(bytes[2 + i] as i8)).collect();
    assert_eq!(decoded(GgmlDType::Q8_0, &bytes), by_hand);
    // Q4_K: scale of scales, scale of minima, 8 scales and 8 minima of 6 bits in 12 bytes, 256 halves of bytes.
    let bytes = block(144, &[0, 2]);
    let packed = &bytes[4..16];
    let scale = |j: usize| if j < 4 { packed[j] & 63 } else { (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4) };
    let least = |j: usize| if j < 4 { packed[j + 4] & 63 } else { (packed[j + 4] >> 4) | (packed[j] >> 6 << 4) };
    let by_hand: Vec<f32> = (0..256)
        .map(|i| {
            let (part, byte) = (i / 32, bytes[16 + i / 64 * 32 + i % 32]);
            let q = if part % 2 == 0 { byte & 15 } else { byte >> 4 };
            0.5 * f32::from(scale(part)) * f32::from(q) - 0.25 * f32::from(least(part))
        })
        .collect();
    assert_eq!(decoded(GgmlDType::Q4K, &bytes), by_hand);
}

#[test]
fn models_of_every_architecture_come_back_as_they_were() {
    let twin = "models/python-tasks-3m-twin";
    for name in ["tests/golden/llama", "tests/golden/qwen2", "tests/golden/qwen3", twin] {
        let (from, out) = (tree(name), tempfile::tempdir().unwrap());
        import(&exported(&from, None), None, out.path()).unwrap();
        let [before, after] = [&from, out.path()].map(|dir| Weights::open(dir).unwrap());
        let (before, after) = (before.tensors().unwrap(), after.tensors().unwrap());
        for (name, view) in &after {
            let [mut was, mut is] = [(); 2].map(|()| Vec::new());
            for (view, out) in [(&before[name], &mut was), (view, &mut is)] {
                let tensor = Tensor::of_view(name.clone(), view).unwrap();
                quants::decode(tensor.kind, tensor.bytes, 0, tensor.values(), out).unwrap();
            }
            assert_eq!((view.shape(), is), (before[name].shape(), was), "{name}");
        }
        let [was, is] = [&from, out.path()].map(|dir| ModelConfig::load(dir, &Overrides::default()).unwrap());
        let facts = |c: &ModelConfig| (c.layers, c.hidden, c.ffn, c.heads, c.vocab_rows, c.tokenizer_size, c.tied);
        assert_eq!(facts(&was), facts(&is));
        assert_eq!((was.rms_eps, was.rope_theta, was.context_length), (is.rms_eps, is.rope_theta, is.context_length));
        assert_eq!((&was.eos_ids, was.architecture), (&is.eos_ids, is.architecture));
    }
}

#[test]
fn tokenizers_made_from_a_files_lists_cut_text_as_the_authors_do() {
    let texts = ["def f(x):\n    return  x*12345\n\n", "It's  'quoted', naïve e\u{301} — 東京 🎉\r\n\t\tend ", ""];
    for name in ["tests/golden/llama", "tests/golden/qwen2", "tests/golden/qwen3"] {
        let from = tree(name);
        let config = ModelConfig::load(&from, &Overrides::default()).unwrap();
        let mut items = vocabulary::items(&from, &config).unwrap();
        items.retain(|(key, _)| key != "tokenizer.huggingface.json");
        let mut file = Vec::new();
        writer::write(&items, &[], &mut file, &ProgressBar::hidden()).unwrap();
        let made = vocabulary::read(&Gguf::parse(&file).unwrap()).unwrap();
        let read = |file: &str| std::fs::read(from.join(file)).unwrap();
        let theirs =
            Tokenizer::from_files(&read("tokenizer.json"), Some(&read("tokenizer_config.json")), None).unwrap();
        let roles = made.config.to_string();
        let ours = Tokenizer::from_files(made.tokenizer.as_bytes(), Some(roles.as_bytes()), None).unwrap();
        for text in texts {
            for specials in [Specials::AsText, Specials::Parse] {
                let ids = [&theirs, &ours].map(|tokenizer| tokenizer.encode(text, specials, true).unwrap());
                assert_eq!(ids[0], ids[1], "{name}: {text:?}");
            }
        }
        assert_eq!((theirs.special_ids(), theirs.vocab_size()), (ours.special_ids(), ours.vocab_size()));
        assert_eq!(theirs.has_chat_template(), ours.has_chat_template());
        assert_eq!(made.ends, config.eos_ids);
    }
}

#[test]
fn families_whose_rows_attend_otherwise_are_not_exported() {
    for name in ["sdar", "stable_diffcoder"] {
        let refused = Checkpoint::open(&tree("tests/golden").join(name)).err().unwrap().to_string();
        assert!(refused.contains(name) && refused.contains("block_causal"), "{refused}");
    }
}
