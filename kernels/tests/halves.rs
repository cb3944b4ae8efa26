//! Halves of layers, all threads side by side, give the bits of their operations one by one.

use unmask_kernels::{
    AttentionWeights, Cpu, Epilogue, Expert, FeedForwardWeights, Half, HeadShape, Isa, KvCache, KvType, Norm,
    ProductShape, QkNorm, Rotary, Row, RowTable, StepBuffers, StepRows, WeightType,
};

const HIDDEN: usize = 128;
const WIDTH: usize = 224;
const LAYERS: usize = 2;
const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 32 };
/// Positions before the rows of the only sequence.
const CONTEXT: u32 = 40;

fn noise(seed: usize, out: &mut [f32]) {
    let value = |i: usize| ((seed * 7919 + i * 104_729) % 1009) as f32 / 1009.0 - 0.5;
    out.iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
}

fn norm(seed: usize, width: usize) -> Norm {
    let mut weight = vec![0.0; width];
    noise(seed, &mut weight);
    Norm { weight, eps: 1e-6 }
}

fn layers(cpu: &Cpu, dtype: WeightType, bias: bool) -> Vec<Half> {
    let product = |seed: usize, shape| cpu.pack_rows(shape, dtype, &|row, out| noise(seed + row, out));
    let layer = |layer: usize| {
        let gated = ProductShape { gated: true, ..ProductShape::new(2 * WIDTH, HIDDEN) };
        let mut biases = vec![0.0; HEADS.qkv_width()];
        noise(3, &mut biases);
        [
            Half::Attention(AttentionWeights {
                layer,
                norm: norm(layer, HIDDEN),
                qkv: product(layer + 100, ProductShape::new(HEADS.qkv_width(), HIDDEN)),
                bias: bias.then_some(biases),
                qk_norm: (!bias).then(|| [norm(7, HEADS.head_dim), norm(8, HEADS.head_dim)]),
                out: product(layer + 200, ProductShape::new(HIDDEN, HEADS.out_width()).in_pieces()),
            }),
            Half::FeedForward(FeedForwardWeights {
                norm: norm(layer + 9, HIDDEN),
                expert: Expert {
                    gate_up: product(layer + 300, gated),
                    down: product(layer + 400, ProductShape::new(HIDDEN, WIDTH).in_pieces()),
                },
            }),
        ]
    };
    (0..LAYERS).flat_map(layer).collect()
}

/// Every half, operation by operation.
fn one_by_one(cpu: &Cpu, halves: &[Half], rows: &StepRows<'_>, kv: &mut KvCache, stream: &mut Vec<f32>) {
    let count = rows.table.rows.len();
    let (mut qkv, mut mixed) = (vec![0.0; count * HEADS.qkv_width()], vec![0.0; count * HEADS.out_width()]);
    for half in halves {
        let mut normed = vec![0.0; stream.len()];
        match half {
            Half::Attention(AttentionWeights { layer, norm, qkv: w, bias, qk_norm, out }) => {
                cpu.rms_norm(stream, &norm.weight, norm.eps, &mut normed);
                cpu.gemm(&normed, w, bias.as_deref().map_or(Epilogue::Store, Epilogue::Bias), &mut qkv);
                let norms = qk_norm.as_ref().map(|[q, k]| QkNorm { q: &q.weight, k: &k.weight, eps: q.eps });
                cpu.rope_append(&mut qkv, &HEADS, rows.rotary, norms, &rows.table, *layer, kv);
                cpu.attention(&qkv, &HEADS, &rows.table, *layer, kv, &mut mixed);
                if layer + 1 == LAYERS {
                    let keep = |values: &[f32], width: usize| -> Vec<f32> {
                        rows.outputs.iter().flat_map(|&row| &values[row as usize * width..][..width]).copied().collect()
                    };
                    (*stream, mixed) = (keep(stream, HIDDEN), keep(&mixed, HEADS.out_width()));
                }
                cpu.gemm(&mixed, out, Epilogue::Add, stream);
            }
            Half::FeedForward(FeedForwardWeights { norm, expert }) => {
                let mut gated = vec![0.0; stream.len() / HIDDEN * WIDTH];
                cpu.rms_norm(stream, &norm.weight, norm.eps, &mut normed);
                cpu.gemm(&normed, &expert.gate_up, Epilogue::SiluMul, &mut gated);
                cpu.gemm(&gated, &expert.down, Epilogue::Add, stream);
            }
        }
    }
}

fn halves_are_their_operations(isa: Isa, threads: usize, dtype: WeightType, kv_type: KvType) {
    let (cpu, alone) = (Cpu::new(isa, threads), Cpu::new(isa, 1));
    let halves = layers(&alone, dtype, kv_type == KvType::F32);
    let rotary = Rotary::new(HEADS.head_dim, HEADS.head_dim, 1e4, 256);
    // One thread's own rows, rows that threads share, and outputs that go from these to those.
    for (count, outputs) in [(1, 1), (3, 2), (8, 8), (9, 0), (70, 60), (100, 3)] {
        let end = CONTEXT + count as u32;
        let table: Vec<Row> = (CONTEXT..end).map(|position| Row { sequence: 0, position, end }).collect();
        let outputs: Vec<u32> = (0..count as u32).rev().step_by(count / outputs.max(1)).take(outputs).collect();
        let outputs: Vec<u32> = outputs.into_iter().rev().collect();
        let pages: Vec<u32> = (0..8).rev().collect();
        let tables = [pages.as_slice()];
        let rows = StepRows {
            shape: HEADS,
            rotary: &rotary,
            table: RowTable { rows: &table, tables: &tables },
            outputs: &outputs,
        };
        let mut expected = vec![0.0; count * HIDDEN];
        noise(count, &mut expected);
        for together in [2 * LAYERS, 1] {
            let mut stream = expected.clone();
            let mut kv = KvCache::new(LAYERS, &HEADS, 8, kv_type);
            let (mut qkv, mut mixed) = (vec![0.0; count * HEADS.qkv_width()], vec![0.0; count * HEADS.out_width()]);
            let (mut gated, mut left) = (vec![0.0; count * WIDTH], count);
            for halves in halves.chunks(together) {
                let stream = &mut stream[..left * HIDDEN];
                let (qkv, mixed, gated) = (&mut qkv, &mut mixed, &mut gated);
                left = cpu.halves(halves, &rows, &mut kv, StepBuffers { stream, partial: None, qkv, mixed, gated });
            }
            let (mut one_by_one_stream, mut other) = (expected.clone(), KvCache::new(LAYERS, &HEADS, 8, kv_type));
            one_by_one(&alone, &halves, &rows, &mut other, &mut one_by_one_stream);
            assert_eq!(left, outputs.len());
            let what = format!("{} x{threads} {} {kv_type:?} {count} rows", isa.name(), dtype.name());
            assert!(stream[..left * HIDDEN] == one_by_one_stream[..], "{what}");
            let same = |slot: u32| {
                let (page, slot) = (pages[slot as usize / 32] as usize, slot as usize % 32);
                (0..LAYERS).all(|layer| {
                    (0..2).all(|head| kv.read(layer, page, head, slot) == other.read(layer, page, head, slot))
                })
            };
            assert!((CONTEXT..end).all(same), "{what}: cache");
        }
    }
}

#[test]
fn halves_give_the_bits_of_their_operations() {
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            for dtype in [WeightType::F32, WeightType::Bf16, WeightType::Int8] {
                halves_are_their_operations(isa, threads, dtype, KvType::F32);
                halves_are_their_operations(isa, threads, dtype, KvType::Bf16);
            }
        }
    }
}

/// What ranks make of a half, they add themselves.
#[test]
fn a_part_of_a_sum_leaves_the_stream_alone() {
    let cpu = Cpu::new(Isa::available()[0], 2);
    let halves = layers(&cpu, WeightType::Bf16, false);
    let rotary = Rotary::new(HEADS.head_dim, HEADS.head_dim, 1e4, 64);
    let table = [Row { sequence: 0, position: 0, end: 1 }];
    let tables: [&[u32]; 1] = [&[0]];
    let rows =
        StepRows { shape: HEADS, rotary: &rotary, table: RowTable { rows: &table, tables: &tables }, outputs: &[0] };
    let mut before = vec![0.0; HIDDEN];
    noise(1, &mut before);
    for half in halves.chunks(1) {
        let [mut whole, mut stream] = [before.clone(), before.clone()];
        let mut partial = vec![0.0; HIDDEN];
        for (stream, partial) in [(&mut whole, None), (&mut stream, Some(partial.as_mut_slice()))] {
            let mut kv = KvCache::new(LAYERS, &HEADS, 1, KvType::F32);
            let (mut qkv, mut mixed) = (vec![0.0; HEADS.qkv_width()], vec![0.0; HEADS.out_width()]);
            let (qkv, mixed, gated) = (&mut qkv, &mut mixed, &mut [0.0; WIDTH]);
            cpu.halves(half, &rows, &mut kv, StepBuffers { stream, partial, qkv, mixed, gated });
        }
        assert_eq!(stream, before);
        let sum: Vec<f32> = before.iter().zip(&partial).map(|(x, y)| x + y).collect();
        assert_eq!(sum, whole);
    }
}
