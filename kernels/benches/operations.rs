//! Operations of a step: `cargo bench -p unmask-kernels`. Throughput is in operations (multiplications and additions)
//! a second; the roof to compare with is printed by `unmask bench roof`.
//!
//! Weights of `cached` products stay in a core's cache: what the loops do. Those of `streamed` ones come from memory.

// The macro makes a public function of its own.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use unmask_kernels::{
    Bans, Cpu, Draw, Epilogue, HeadShape, Isa, KvCache, KvType, PAGE_SLOTS, ProductShape, Record, Row, RowTable,
    WeightType,
};

const TYPES: [WeightType; 3] = [WeightType::F32, WeightType::Bf16, WeightType::Int8];
const ROWS: [usize; 4] = [1, 8, 16, 64];
/// Inputs of every product.
const K: usize = 1024;
/// Bytes of weights that do not fit any cache.
const STREAMED_BYTES: usize = 256 << 20;

fn cpu() -> Cpu {
    let isa = Isa::detect().unwrap_or_else(|error| panic!("{error}"));
    Cpu::new(isa, std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// Numbers of about a weight's size, the same each time.
fn drawn(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(next).collect()
}

fn products(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("gemm");
    for dtype in TYPES {
        for (place, n) in [("cached", 128 * cpu.pool().threads()), ("streamed", STREAMED_BYTES / K / dtype.bytes())] {
            let w = cpu.pack(n, K, &drawn(n * K), dtype);
            for rows in ROWS {
                let (x, mut out) = (drawn(rows * K), vec![0.0; rows * n]);
                group.throughput(Throughput::Elements((2 * rows * n * K) as u64));
                group.bench_function(BenchmarkId::new(format!("{}/{place}", dtype.name()), rows), |b| {
                    b.iter(|| cpu.gemm(black_box(&x), &w, Epilogue::Store, black_box(&mut out)));
                });
            }
        }
    }
}

/// The products of a layer of Qwen3-0.6B in the order of a step, in as many copies as no cache holds.
fn layers(c: &mut Criterion) {
    const LAYERS: usize = 8;
    const ROWS: usize = 16;
    let cpu = cpu();
    let gated = ProductShape { gated: true, ..ProductShape::new(6144, 1024) };
    let shapes = [
        ("qkv", ProductShape::new(4096, 1024)),
        ("out", ProductShape::new(1024, 2048).in_pieces()),
        ("gate_up", gated),
        ("down", ProductShape::new(1024, 3072).in_pieces()),
    ];
    let mut group = c.benchmark_group("layers");
    for dtype in [WeightType::Bf16, WeightType::Int8] {
        for (name, shape) in shapes {
            let row = |_: usize, out: &mut [f32]| out.copy_from_slice(&drawn(out.len()));
            let weights: Vec<_> = (0..LAYERS).map(|_| cpu.pack_rows(shape, dtype, &row)).collect();
            let (x, mut out) = (drawn(ROWS * shape.k), vec![0.0; ROWS * shape.width()]);
            let epilogue = || if shape.gated { Epilogue::SiluMul } else { Epilogue::Store };
            group.throughput(Throughput::Elements((LAYERS * 2 * ROWS * shape.n * shape.k) as u64));
            group.bench_function(BenchmarkId::new(dtype.name(), name), |b| {
                b.iter(|| weights.iter().for_each(|w| cpu.gemm(black_box(&x), w, epilogue(), black_box(&mut out))));
            });
        }
    }
}

fn vocabulary(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("vocab_reduce");
    let n = 32_768;
    let bans = Bans { vocab: n, ..Bans::default() };
    for dtype in [WeightType::Bf16, WeightType::Int8] {
        let head = cpu.pack(n, K, &drawn(n * K), dtype);
        for rows in ROWS {
            let (x, draws) = (drawn(rows * K), vec![Draw::default(); rows]);
            let mut out = vec![Record::default(); rows];
            group.throughput(Throughput::Elements((2 * rows * n * K) as u64));
            group.bench_function(BenchmarkId::new(dtype.name(), rows), |b| {
                b.iter(|| cpu.vocab_reduce(black_box(&x), &head, &bans, &draws, black_box(&mut out)));
            });
        }
    }
}

fn attention(c: &mut Criterion) {
    let cpu = cpu();
    let shape = HeadShape { heads: 16, kv_heads: 8, head_dim: 128 };
    let mut group = c.benchmark_group("attention");
    for rows in [1, 16] {
        for context in [128, 1024, 8192usize] {
            let slots = context + rows;
            let pages = slots.div_ceil(PAGE_SLOTS);
            let kv = KvCache::new(1, &shape, pages, KvType::Bf16);
            let qkv = drawn(rows * shape.qkv_width());
            let table: Vec<u32> = (0..pages as u32).collect();
            let row = |i| Row { sequence: 0, position: (context + i) as u32, end: slots as u32 };
            let entries: Vec<Row> = (0..rows).map(row).collect();
            let table = RowTable { rows: &entries, tables: &[&table] };
            let mut out = vec![0.0; rows * shape.out_width()];
            group.throughput(Throughput::Elements((4 * rows * slots * shape.out_width()) as u64));
            group.bench_function(BenchmarkId::new(format!("{rows} rows"), context), |b| {
                b.iter(|| cpu.attention(black_box(&qkv), &shape, &table, 0, &kv, black_box(&mut out)));
            });
        }
    }
}

criterion_group! {
    name = operations;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(1));
    targets = products, layers, vocabulary, attention
}
criterion_main!(operations);
