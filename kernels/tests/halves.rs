//! Halves of layers, all threads side by side, give the bits of their operations one by one.

use unmask_kernels::{
    AttentionWeights, Cpu, Epilogue, Expert, FeedForwardWeights, Half, HeadShape, Isa, KvCache, KvType, Norm,
    PAGE_SLOTS, ProductShape, QkNorm, Rotary, Row, RowTable, StepBuffers, StepRows, WeightType,
};

const HIDDEN: usize = 128;
const WIDTH: usize = 224;
const LAYERS: usize = 2;
const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 32 };

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
                qk_norm: (!bias).then(|| [7, 8].map(|seed| norm(seed, HEADS.head_dim).weight)),
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
                let norms = qk_norm.as_ref().map(|[q, k]| QkNorm { q, k, eps: norm.eps });
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

/// Rows of one sequence behind `context` positions, and those that go on after the last attention.
#[derive(Clone, Copy, Debug)]
struct Case {
    context: u32,
    count: usize,
    outputs: usize,
    /// The rows are shared out among so many sequences.
    sequences: usize,
}

fn case(context: u32, count: usize, outputs: usize, sequences: usize) -> Case {
    Case { context, count, outputs, sequences }
}

impl Case {
    fn table(&self) -> Vec<Row> {
        let each = self.count / self.sequences;
        let row = |i: usize| {
            let (sequence, at) = ((i / each) as u32, (i % each) as u32);
            Row { sequence, position: self.context + at, end: self.context + each as u32 }
        };
        (0..self.count).map(row).collect()
    }

    fn outputs(&self) -> Vec<u32> {
        let last = (0..self.count as u32).rev().step_by(self.count / self.outputs.max(1)).take(self.outputs);
        let mut outputs: Vec<u32> = last.collect();
        outputs.reverse();
        outputs
    }
}

fn halves_are_their_operations(isa: Isa, threads: usize, dtype: WeightType, kv_type: KvType) {
    let (cpu, alone) = (Cpu::new(isa, threads), Cpu::new(isa, 1));
    let halves = layers(&alone, dtype, kv_type == KvType::F32);
    let rotary = Rotary::new(HEADS.head_dim, HEADS.head_dim, 1e4, 2048);
    // Rows that threads make for themselves, that they share, and that go from these to those; keys in one run and in several.
    let near = [(1, 1, 1), (3, 2, 1), (8, 8, 2), (9, 0, 1), (70, 60, 2), (100, 3, 1)];
    let near = near.map(|(count, outputs, sequences)| case(40, count, outputs, sequences));
    for case in near.into_iter().chain([case(1500, 1, 1, 1), case(1500, 9, 4, 1)]) {
        let (table, outputs) = (case.table(), case.outputs());
        let per_sequence = (case.context as usize + case.count).div_ceil(PAGE_SLOTS) as u32;
        let pages = case.sequences as u32 * per_sequence;
        let tables: Vec<Vec<u32>> = (0..case.sequences as u32)
            .map(|sequence| (sequence * per_sequence..(sequence + 1) * per_sequence).rev().collect())
            .collect();
        let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        let rows = StepRows {
            shape: HEADS,
            rotary: &rotary,
            table: RowTable { rows: &table, tables: &tables },
            outputs: &outputs,
        };
        let new_kv = || KvCache::new(LAYERS, &HEADS, pages as usize, kv_type);
        let mut given = vec![0.0; case.count * HIDDEN];
        noise(case.count, &mut given);
        let (mut expected, mut expected_kv) = (given.clone(), new_kv());
        one_by_one(&alone, &halves, &rows, &mut expected_kv, &mut expected);
        for together in [2 * LAYERS, 1] {
            let what = format!("{} x{threads} {} {kv_type:?} {case:?}", isa.name(), dtype.name());
            let (mut stream, mut kv) = (given.clone(), new_kv());
            let left = run(&cpu, &halves, together, &rows, &mut kv, &mut stream);
            assert_eq!(left, outputs.len());
            assert!(stream[..left * HIDDEN] == expected[..], "{what}");
            for (row, layer, head) in table.iter().flat_map(|row| (0..4).map(move |i| (row, i / 2, i % 2))) {
                let page = tables[row.sequence as usize][row.position as usize / PAGE_SLOTS] as usize;
                let read = |kv: &KvCache| kv.read(layer, page, head, row.position as usize % PAGE_SLOTS);
                assert_eq!(read(&kv), read(&expected_kv), "{what}: {row:?}");
            }
        }
    }
}

/// So many halves at a time; returns how many rows are left.
fn run(
    cpu: &Cpu,
    halves: &[Half],
    together: usize,
    rows: &StepRows<'_>,
    kv: &mut KvCache,
    stream: &mut [f32],
) -> usize {
    let mut left = rows.table.rows.len();
    let (mut qkv, mut mixed) = (vec![0.0; left * HEADS.qkv_width()], vec![0.0; left * HEADS.out_width()]);
    let mut gated = vec![0.0; left * WIDTH];
    for halves in halves.chunks(together) {
        let stream = &mut stream[..left * HIDDEN];
        let (qkv, mixed, gated) = (&mut qkv, &mut mixed, &mut gated);
        left = cpu.halves(halves, rows, kv, StepBuffers { stream, partial: None, qkv, mixed, gated });
    }
    left
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

/// What ranks make of a half, they add themselves; of the rows that are left where not all go on.
#[test]
fn a_part_of_a_sum_leaves_the_stream_alone() {
    let cpu = Cpu::new(Isa::available()[0], 2);
    let halves = layers(&cpu, WeightType::Bf16, false);
    let rotary = Rotary::new(HEADS.head_dim, HEADS.head_dim, 1e4, 64);
    let case = case(0, 5, 2, 1);
    let (table, outputs) = (case.table(), case.outputs());
    let table = RowTable { rows: &table, tables: &[&[0]] };
    let rows = StepRows { shape: HEADS, rotary: &rotary, table, outputs: &outputs };
    let mut before = vec![0.0; 5 * HIDDEN];
    noise(1, &mut before);
    for half in halves.chunks(1) {
        let [mut whole, mut stream] = [before.clone(), before.clone()];
        let (mut partial, mut left) = (vec![0.0; 5 * HIDDEN], 0);
        for (stream, partial) in [(&mut whole, None), (&mut stream, Some(partial.as_mut_slice()))] {
            let mut kv = KvCache::new(LAYERS, &HEADS, 1, KvType::F32);
            let (qkv, mixed) = (&mut [0.0; 5 * 8 * 32], &mut [0.0; 5 * 4 * 32]);
            left = cpu.halves(
                half,
                &rows,
                &mut kv,
                StepBuffers { stream, partial, qkv, mixed, gated: &mut [0.0; 5 * WIDTH] },
            );
        }
        let kept = if left == 5 { (0..5).collect() } else { outputs.clone() };
        let kept: Vec<f32> = kept.iter().flat_map(|&row| &before[row as usize * HIDDEN..][..HIDDEN]).copied().collect();
        assert_eq!(stream[..left * HIDDEN], kept);
        let sum: Vec<f32> = kept.iter().zip(&partial).map(|(x, y)| x + y).collect();
        assert_eq!(sum, whole[..left * HIDDEN]);
    }
}
