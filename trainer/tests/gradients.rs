//! The model against a slow f64 definition: loss, attention rule, gradients, and what must not leak.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::needless_range_loop)]

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use unmask_trainer::{
    layout::{Batch, Counts, Example},
    model::{Model, ModelShape},
    ops::{Heads, with_floats},
    step::{Spread, gradients},
};

const MASK: u32 = 1;

fn shape() -> ModelShape {
    ModelShape {
        hidden: 24,
        inner: 20,
        layers: 2,
        heads: Heads { heads: 4, kv_heads: 2, head_dim: 6 },
        vocabulary: 37,
        eps: 1e-6,
        theta: 100.0,
        positions: 128,
    }
}

fn weights(rng: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
    let mut weights = shape().initial(rng);
    // Away from the special values of fresh weights.
    for x in weights.iter_mut().flatten() {
        *x = *x * 2.0 + rng.random_range(-0.2..0.2);
    }
    weights
}

/// Blocks of noisy tokens behind a prompt, which need not end where a block would.
fn example(prompt: usize, blocks: usize, block: usize, rng: &mut ChaCha8Rng) -> Example {
    let length = prompt + blocks * block;
    let clean: Vec<u32> = (0..length).map(|_| rng.random_range(2..37)).collect();
    let scored: Vec<bool> = (0..blocks * block).map(|p| p % block == 0 || rng.random::<f32>() < 0.5).collect();
    let noisy = clean[prompt..].iter().zip(&scored).map(|(&c, &s)| if s { MASK } else { c }).collect();
    Example { clean, noisy, scored, block, length: length - 1 }
}

/// Number of the block of position `p`; `None` in the prompt.
fn block_of(example: &Example, p: usize) -> Option<usize> {
    p.checked_sub(example.prompt()).map(|p| p / example.block)
}

/// Straightforward f64 forward pass over one document; returns the logits of its noisy and then its clean rows.
fn logits(weights: &[Vec<f64>], example: &Example) -> Vec<Vec<f64>> {
    let s = shape();
    let tensors: std::collections::HashMap<String, (Vec<f64>, usize)> = s
        .segments()
        .into_iter()
        .map(|t| (t.name.clone(), (weights[t.parameter][t.range()].to_vec(), t.columns)))
        .collect();
    let get = |name: String| &tensors[&name];
    let linear = |x: &[f64], name: String| -> Vec<f64> {
        let (w, columns) = get(name);
        w.chunks(*columns).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let norm = |x: &[f64], name: String| -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + f64::from(s.eps);
        x.iter().zip(&get(name).0).map(|(v, w)| v / mean.sqrt() * w).collect()
    };
    let rotate = |x: &mut [f64], position: usize| {
        let half = x.len() / 2;
        for i in 0..half {
            let angle = position as f64 * s.theta.powf(-(i as f64) / half as f64);
            let (a, b) = (x[i], x[i + half]);
            x[i] = a * angle.cos() - b * angle.sin();
            x[i + half] = b * angle.cos() + a * angle.sin();
        }
    };
    let (noisy, prompt) = (example.noisy.len(), example.prompt());
    let rows = noisy + example.clean.len();
    let position = |row: usize| if row < noisy { prompt + row } else { row - noisy };
    let visible = |row: usize, key: usize| -> bool {
        let (p, q) = (position(row), position(key));
        let (own, other) = (block_of(example, p), block_of(example, q));
        match (row < noisy, key < noisy) {
            (true, true) => own == other,
            (true, false) => other < own,
            (false, true) => false,
            (false, false) => q <= p,
        }
    };
    let table = &get("model.embed_tokens.weight".into()).0;
    let ids = example.noisy.iter().chain(&example.clean);
    let mut x: Vec<Vec<f64>> = ids.map(|&id| table[id as usize * s.hidden..][..s.hidden].to_vec()).collect();
    let dim = s.heads.head_dim;
    for layer in 0..s.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let heads = |part: &str, normed: Option<&str>| -> Vec<Vec<Vec<f64>>> {
            x.iter()
                .enumerate()
                .map(|(row, x)| {
                    let all = linear(&norm(x, name("input_layernorm")), name(part));
                    let finish = |head: &[f64]| match normed {
                        None => head.to_vec(),
                        Some(weight) => {
                            let mut head = norm(head, name(weight));
                            rotate(&mut head, position(row));
                            head
                        }
                    };
                    all.chunks(dim).map(finish).collect()
                })
                .collect()
        };
        let q = heads("self_attn.q_proj", Some("self_attn.q_norm"));
        let k = heads("self_attn.k_proj", Some("self_attn.k_norm"));
        let v = heads("self_attn.v_proj", None);
        let attended: Vec<Vec<f64>> = (0..rows)
            .map(|row| {
                let mut out = Vec::new();
                for head in 0..s.heads.heads {
                    let kv = head / (s.heads.heads / s.heads.kv_heads);
                    let keys: Vec<usize> = (0..rows).filter(|&key| visible(row, key)).collect();
                    let dot = |key: &usize| -> f64 { q[row][head].iter().zip(&k[*key][kv]).map(|(a, b)| a * b).sum() };
                    let exp: Vec<f64> = keys.iter().map(|key| (dot(key) / (dim as f64).sqrt()).exp()).collect();
                    let total: f64 = exp.iter().sum();
                    for d in 0..dim {
                        out.push(keys.iter().zip(&exp).map(|(&key, e)| e / total * v[key][kv][d]).sum());
                    }
                }
                out
            })
            .collect();
        for (x, attended) in x.iter_mut().zip(&attended) {
            let update = linear(attended, name("self_attn.o_proj"));
            x.iter_mut().zip(update).for_each(|(x, u)| *x += u);
            let normed = norm(x, name("post_attention_layernorm"));
            let (gate, up) = (linear(&normed, name("mlp.gate_proj")), linear(&normed, name("mlp.up_proj")));
            let active: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let update = linear(&active, name("mlp.down_proj"));
            x.iter_mut().zip(update).for_each(|(x, u)| *x += u);
        }
    }
    x.iter().map(|x| linear(&norm(x, "model.norm.weight".into()), "model.embed_tokens.weight".into())).collect()
}

fn cross_entropy(logits: &[f64], target: u32) -> f64 {
    let total: f64 = logits.iter().enumerate().filter(|(id, _)| *id as u32 != MASK).map(|(_, x)| x.exp()).sum();
    total.ln() - logits[target as usize]
}

fn loss(weights: &[Vec<f64>], examples: &[Example], lambda: f64) -> f64 {
    let counts = Counts::of(examples);
    let (mut noisy, mut next) = (0.0, 0.0);
    for example in examples {
        let logits = logits(weights, example);
        for row in (0..example.noisy.len()).filter(|&row| example.scored[row]) {
            noisy += cross_entropy(&logits[row], example.clean[example.prompt() + row]);
        }
        for p in 1..example.length {
            next += cross_entropy(&logits[example.noisy.len() + p - 1], example.clean[p]);
        }
    }
    noisy / counts.noisy as f64 + lambda * next / counts.next as f64
}

fn wide(weights: &[Vec<f32>]) -> Vec<Vec<f64>> {
    weights.iter().map(|w| w.iter().map(|&x| f64::from(x)).collect()).collect()
}

#[test]
fn loss_and_gradients_agree_with_the_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let weights = weights(&mut rng);
    let model = Model::new(shape(), &weights, MASK).unwrap();
    let shapes =
        [(0, 2, 4), (0, 3, 2), (0, 3, 16), (0, 1, 32), (0, 2, 32), (0, 5, 8), (3, 2, 4), (4, 1, 4), (17, 2, 8)];
    let examples: Vec<Example> = shapes.iter().map(|&(p, n, b)| example(p, n, b, &mut rng)).collect();
    let spread = Spread { micro_rows: 100, threads: 2 };
    let (parts, losses) = gradients(&model, &examples, 0.3, spread).unwrap();
    let found = losses.noisy_mean() + 0.3 * losses.next_mean();
    let exact = wide(&weights);
    let want = loss(&exact, &examples, 0.3);
    assert!((found - want).abs() < 2e-5, "{found} {want}");

    // Along random directions within each named tensor.
    for segment in shape().segments() {
        let range = segment.range();
        let direction: Vec<f64> = range.clone().map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut slope = 0.0;
        for part in &parts {
            with_floats(&part[segment.parameter], |g| {
                slope += g[range.clone()].iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum::<f64>();
                Ok(())
            })
            .unwrap();
        }
        let at = |step: f64| {
            let mut moved = exact.clone();
            moved[segment.parameter][range.clone()].iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
            loss(&moved, &examples, 0.3)
        };
        let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((slope - numeric).abs() < 1e-4 + 1e-3 * numeric.abs(), "{}: {slope} {numeric}", segment.name);
    }
}

fn hidden(model: &Model, example: &Example) -> Vec<f32> {
    let batch = Batch::new(std::slice::from_ref(example), (1.0, 1.0));
    model.hidden(&batch, false).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// I13, and that a noisy row never sees the right tokens of its own or a later block.
#[test]
fn nothing_leaks() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let model = Model::new(shape(), &weights(&mut rng), MASK).unwrap();
    for (prompt, block) in [(0, 2), (0, 8), (0, 32), (4, 8), (13, 8), (5, 2)] {
        let base = example(prompt, 96 / block, block, &mut rng);
        let width = shape().hidden;
        let (length, noisy) = (base.clean.len(), base.noisy.len());
        let block_of = |p| block_of(&base, p);
        let before = hidden(&model, &base);
        let mut positions: Vec<usize> = (0..length).collect();
        positions.shuffle(&mut rng);
        for &changed in &positions[..12] {
            let mut other = base.clone();
            other.clean[changed] = if base.clean[changed] == 5 { 6 } else { 5 };
            let after = hidden(&model, &other);
            let same = |row: usize| before[row * width..][..width] == after[row * width..][..width];
            for p in 0..length {
                let unseen = block_of(p) <= block_of(changed);
                assert!(p < prompt || same(p - prompt) == unseen, "noisy row {p}, clean token {changed}");
                assert_eq!(same(noisy + p), p < changed, "clean row {p}, clean token {changed}");
            }
            let Some(row) = changed.checked_sub(prompt) else { continue };
            let mut other = base.clone();
            other.noisy[row] = if base.noisy[row] == 5 { 6 } else { 5 };
            let after = hidden(&model, &other);
            let same = |row: usize| before[row * width..][..width] == after[row * width..][..width];
            for p in 0..length {
                let unseen = block_of(p) != block_of(changed);
                assert!(p < prompt || same(p - prompt) == unseen, "noisy row {p}, noisy token {changed}");
                assert!(same(noisy + p), "clean row {p}, noisy token {changed}");
            }
        }
    }
}

/// Micro-batches and threads change nothing but rounding, and equal spreads change nothing at all.
#[test]
fn gradients_are_deterministic() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let model = Model::new(shape(), &weights(&mut rng), MASK).unwrap();
    let examples: Vec<Example> = (1..12).map(|n| example(n % 3, n, 8, &mut rng)).collect();
    let run = |threads| {
        let (parts, losses) = gradients(&model, &examples, 0.3, Spread { micro_rows: 300, threads }).unwrap();
        let flat: Vec<f32> =
            parts.iter().flatten().flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect();
        (flat, losses)
    };
    assert_eq!(run(2), run(2));
}
