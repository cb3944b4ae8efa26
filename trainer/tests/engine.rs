//! I12: the trainer's forward pass and the engine's agree on one checkpoint, clean and noisy rows alike.
#![allow(clippy::unwrap_used)]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use unmask_engine::{LoadOptions, Model as EngineModel};
use unmask_kernels::{Row, RowTable};
use unmask_trainer::checkpoint::{Export, Vocabulary, WeightType};
use unmask_trainer::config::RawDecode;
use unmask_trainer::layout::{Batch, Example};
use unmask_trainer::model::{Model, ModelShape};
use unmask_trainer::ops::Heads;

const VOCABULARY: usize = 40;
const BLOCK: usize = 8;
/// Positions.
const LENGTH: usize = 24;

fn shape() -> ModelShape {
    ModelShape {
        hidden: 32,
        inner: 64,
        layers: 2,
        heads: Heads { heads: 4, kv_heads: 2, head_dim: 8 },
        vocabulary: VOCABULARY,
        eps: 1e-6,
        theta: 10_000.0,
        positions: 64,
    }
}

/// Cross-entropy in nats of `target`, the mask's logit left out as in training.
fn cross_entropy(logits: &[f32], target: u32, mask: u32) -> f32 {
    let kept = logits.iter().enumerate().filter(|&(id, _)| id as u32 != mask).map(|(_, &x)| f64::from(x));
    let sum: f64 = kept.map(f64::exp).sum();
    (sum.ln() - f64::from(logits[target as usize])) as f32
}

#[test]
fn trainer_and_engine_give_the_same_losses() {
    // Blocks from the first position on, behind a prompt of whole blocks, and behind one that ends anywhere.
    for (prompt, block) in [(0, BLOCK), (8, BLOCK), (16, BLOCK), (4, 4), (8, 16)] {
        compare(prompt, block);
    }
}

/// Losses of blocks of `block` positions behind `prompt` positions, in the trainer's layout and step by step.
fn compare(prompt: usize, block: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let vocabulary = Vocabulary::standard(VOCABULARY);
    let mut weights = shape().initial(&mut rng);
    // Larger than at the start of training, so that the losses differ from row to row.
    weights[0].iter_mut().for_each(|w| *w *= 10.0);
    let clean: Vec<u32> = (0..LENGTH).map(|_| rng.random_range(5..VOCABULARY as u32)).collect();
    let scored: Vec<bool> = (prompt..LENGTH).map(|_| rng.random_bool(0.5)).collect();
    let noisy: Vec<u32> =
        clean[prompt..].iter().zip(&scored).map(|(&id, &s)| if s { vocabulary.mask } else { id }).collect();
    let example = Example { clean: clean.clone(), noisy: noisy.clone(), scored: scored.clone(), block, length: LENGTH };
    let trained = Model::new(shape(), &weights, vocabulary.mask).unwrap();
    let losses = trained.score(&Batch::new(&[example], (1.0, 1.0)), false).unwrap().losses;

    let dir = tempfile::tempdir().unwrap();
    let decode = RawDecode { block_size: BLOCK, heal: true, ..RawDecode::default() };
    let folder = dir.path().join("model");
    Export {
        shape: &shape(),
        vocabulary: &vocabulary,
        block_sizes: &[4, BLOCK],
        edits: false,
        decode: &decode,
        tokenizer: dir.path(),
    }
    .write(&weights, WeightType::F32, &folder)
    .unwrap();
    let engine = EngineModel::load(&folder, &LoadOptions { threads: 2, ..LoadOptions::default() }).unwrap();
    assert!(engine.config().heal, "what the stage's decode defaults say is exported");
    let (mut kv, mut scratch) = (engine.new_kv(1), engine.new_scratch(LENGTH));
    let mut rows_of = |ids: &[u32], rows: &[Row]| -> Vec<Vec<f32>> {
        let outputs: Vec<u32> = (0..ids.len() as u32).collect();
        let mut out = vec![0.0; ids.len() * VOCABULARY];
        engine.forward(ids, &RowTable { rows, tables: &[&[0]] }, &outputs, &mut kv, &mut scratch);
        engine.logits(&scratch, &mut out);
        out.chunks(VOCABULARY).map(<[f32]>::to_vec).collect()
    };
    let kept = |position: u32| Row { sequence: 0, position, end: position + 1 };
    let next_logits = rows_of(&clean, &(0..LENGTH as u32).map(kept).collect::<Vec<_>>());
    let mut noisy_logits = Vec::new();
    for start in (prompt..LENGTH).step_by(block) {
        // The kept rows before the block, then the block's open rows, in one pass.
        let open = |i: usize| Row { sequence: 0, position: i as u32, end: (start + block) as u32 };
        let rows: Vec<Row> = (0..start as u32).map(kept).chain((start..start + block).map(open)).collect();
        let ids = [&clean[..start], &noisy[start - prompt..][..block]].concat();
        noisy_logits.extend(rows_of(&ids, &rows).split_off(start));
    }
    let masked = (0..noisy.len())
        .filter(|&row| scored[row])
        .map(|row| cross_entropy(&noisy_logits[row], clean[prompt + row], vocabulary.mask));
    let next = (1..LENGTH).map(|p| cross_entropy(&next_logits[p - 1], clean[p], vocabulary.mask));
    let expected: Vec<f32> = masked.chain(next).collect();
    assert_eq!(losses.len(), expected.len());
    for (i, (trainer, engine)) in losses.iter().zip(&expected).enumerate() {
        assert!((trainer - engine).abs() < 1e-4, "target {i}: trainer {trainer}, engine {engine}");
    }
}
