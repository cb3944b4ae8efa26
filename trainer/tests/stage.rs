//! The mask stage end to end on a toy language.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod toy;

use std::{path::Path, sync::Arc};

use rand_chacha::ChaCha8Rng;
use toy::Copies;
use unmask_engine::{LoadOptions, Model};
use unmask_trainer::{
    MaskStage, Sources,
    checkpoint::{Vocabulary, read_weights},
    data::Documents,
    measure::Point,
    progress::Record,
    rollout::roll_out,
    stage_mask, train_mask,
};

fn stage(out: &Path, steps: usize, more: &str) -> MaskStage {
    toy::stage(out, steps, more).validate().unwrap()
}

fn sources<'a>(vocabulary: &'a Vocabulary, tokenizer: &'a Path) -> Sources<'a> {
    Sources { train: &Copies, held_out: &Copies, vocabulary, tokenizer }
}

/// The same documents by other settings.
struct Others;

impl Documents for Others {
    fn len(&self) -> usize {
        Copies.len()
    }

    fn encode(&self, index: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
        Copies.encode(index, rng)
    }

    fn settings(&self) -> String {
        "others".into()
    }
}

fn steps(out: &Path) -> Vec<(usize, f64, f64, f32)> {
    let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
    let records = log.lines().map(|line| serde_json::from_str::<Record>(line).unwrap());
    records
        .filter_map(|record| match record {
            Record::Step(s) => Some((s.step, s.mask_loss, s.next_loss, s.gradient_norm)),
            Record::Eval(_) | Record::Round(_) => None,
        })
        .collect()
}

#[test]
fn a_resumed_run_continues_exactly() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let vocabulary = Vocabulary::standard(14);
    let (straight, resumed) = (dir.path().join("straight"), dir.path().join("resumed"));
    let one = train_mask(&stage(&straight, 6, ""), sources(&vocabulary, dir.path())).unwrap();
    stage_mask::run(&stage(&resumed, 6, ""), sources(&vocabulary, dir.path()), 3).unwrap();
    let two = train_mask(&stage(&resumed, 6, ""), sources(&vocabulary, dir.path())).unwrap();
    assert_eq!(steps(&straight), steps(&resumed));
    assert_eq!(one.eval, two.eval);
    let weights = |out: &Path| std::fs::read(out.join("model/model.safetensors")).unwrap();
    assert!(weights(&straight) == weights(&resumed));
    assert!(resumed.join("model/tokenizer.json").exists() && resumed.join("step-3").exists());

    // Another configuration does not continue these checkpoints, but may start from one.
    let error = train_mask(&stage(&resumed, 7, ""), sources(&vocabulary, dir.path())).unwrap_err();
    assert!(error.to_string().contains("another configuration"), "{error}");
    let others = Sources { train: &Others, ..sources(&vocabulary, dir.path()) };
    let error = train_mask(&stage(&resumed, 6, ""), others).unwrap_err();
    assert!(error.to_string().contains("or of its data"), "{error}");
    let next = stage(&dir.path().join("next"), 1, &format!("init = {{ checkpoint = {:?} }}", resumed.join("step-6")));
    train_mask(&next, sources(&vocabulary, dir.path())).unwrap();
    let shape = next.shape(14);
    let before = read_weights(&shape, &resumed.join("step-6")).unwrap();
    let after = read_weights(&shape, &dir.path().join("next/step-1")).unwrap();
    let change = before.iter().flatten().zip(after.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(change > 0.0 && change < 0.01, "{change}");
}

#[test]
fn learns_to_copy() {
    let dir = tempfile::tempdir().unwrap();
    let vocabulary = Vocabulary::standard(14);
    let summary = train_mask(&stage(dir.path(), 250, ""), sources(&vocabulary, dir.path())).unwrap();
    let easy = &summary.eval.mask_loss[0].by_noise;
    let first = steps(dir.path())[0];
    assert!((first.1 - (13f64).ln()).abs() < 0.2, "fresh weights know nothing: {first:?}");
    // Half of the text is drawn at random (ln 8 nats per token), the other half copies it.
    assert!(summary.eval.next_loss < 1.35, "{summary:?}");
    assert!(easy[0] < easy[9], "{summary:?}");
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(summary.model.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["vocab_size"], 14);
    assert_eq!(config["block_sizes"], serde_json::json!([4, 8]));
}

#[test]
fn without_blocks_it_learns_next_tokens_and_is_a_plain_decoder() {
    let dir = tempfile::tempdir().unwrap();
    let vocabulary = Vocabulary::standard(14);
    let mut raw = toy::stage(dir.path(), 250, "");
    (raw.batch.block_sizes, raw.batch.next_token, raw.model.max_position_embeddings) = (Vec::new(), 1.0, 512);
    let summary = train_mask(&raw.validate().unwrap(), sources(&vocabulary, dir.path())).unwrap();
    assert!(summary.eval.mask_loss.is_empty() && summary.eval.next_loss < 1.35, "{summary:?}");
    let model = Model::load(&summary.model, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap();
    assert_eq!(model.config().family.name(), "qwen3");
    // The word that was drawn comes again.
    let word = [9, 7, 12, 6, 13, 8, 11];
    let answers =
        roll_out(&Arc::new(model), &[word.to_vec().into()], Point::AUTOREGRESSIVE, 1, |_| {}).unwrap().rollouts;
    assert_eq!(answers[0].answer[..3], word[..3]);
}
