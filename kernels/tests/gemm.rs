//! Products against the f64 definition, and bit for bit against themselves.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use proptest::prelude::*;
use std::hint::black_box;
use std::time::Instant;
use unmask_kernels::{Cpu, Epilogue, Isa, MatRef, Packed, ProductShape, WeightType};

fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

/// y (m, n) in f64, with the inputs as the kernel sees them.
fn product(x: &[f32], w: &[f32], n: usize, k: usize) -> Vec<f64> {
    x.chunks(k)
        .flat_map(|row| (0..n).map(|j| row.iter().zip(&w[j * k..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()))
        .collect()
}

fn close(got: &[f32], want: &[f64], k: usize, what: &str) {
    let tolerance = 1e-6 * k as f64 + 1e-5;
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() < tolerance, "{what}: element {i} is {g}, should be {w}");
    }
}

const DTYPES: [WeightType; 3] = [WeightType::F32, WeightType::Bf16, WeightType::Int8];

/// A row in whole units of a 127th of its largest element; `whole` divides by the unit.
fn int8(row: &[f32], whole: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    let largest = row.iter().fold(f32::MIN_POSITIVE, |max, x| max.max(x.abs()));
    row.iter().map(|&x| whole(x, largest).round_ties_even() * (largest / 127.0)).collect()
}

/// Weights as packed: int8 scales are per row.
fn stored(w: &[f32], k: usize, dtype: WeightType) -> Vec<f32> {
    match dtype {
        WeightType::F32 => w.to_vec(),
        WeightType::Bf16 => w.iter().copied().map(bf16).collect(),
        WeightType::Int8 => w.chunks(k).flat_map(|row| int8(row, |w, largest| w / (largest / 127.0))).collect(),
    }
}

/// Inputs as multiplied: int8 scales are per row and piece.
fn seen(x: &[f32], shape: &ProductShape, dtype: WeightType, isa: Isa) -> Vec<f32> {
    match dtype {
        WeightType::Bf16 if isa.has_bf16_dot() => x.iter().copied().map(bf16).collect(),
        WeightType::Int8 => {
            x.chunks(shape.k / shape.pieces).flat_map(|x| int8(x, |x, largest| x * (127.0 / largest))).collect()
        }
        _ => x.to_vec(),
    }
}

fn pack(cpu: &Cpu, shape: ProductShape, dtype: WeightType, w: &[f32]) -> Packed {
    cpu.pack_rows(shape, dtype, &|row, out| out.copy_from_slice(&w[row * shape.k..][..shape.k]))
}

fn agreement(m: usize, n: usize, k: usize, dtype: WeightType, seed: u64) {
    let (x, w) = (numbers(seed, m * k), numbers(seed + 1, n * k));
    let pieces = [8, 4, 2, 1].into_iter().find(|pieces| k.is_multiple_of(*pieces)).unwrap();
    let shape = ProductShape { pieces, ..ProductShape::new(n, k) };
    for isa in Isa::available() {
        let what = format!("{} {dtype:?} m {m} n {n} k {k}", isa.name());
        let cpu = Cpu::new(isa, 2);
        let packed = pack(&cpu, shape, dtype, &w);
        let want = product(&seen(&x, &shape, dtype, isa), &stored(&w, k, dtype), n, k);
        let mut out = vec![1.0; m * n];
        cpu.gemm(&x, &packed, Epilogue::Store, &mut out);
        close(&out, &want, k, &what);
        cpu.gemm(&x, &packed, Epilogue::Add, &mut out);
        close(&out, &want.iter().map(|y| 2.0 * y).collect::<Vec<_>>(), k, &what);
        let bias = numbers(seed + 2, n);
        cpu.gemm(&x, &packed, Epilogue::Bias(&bias), &mut out);
        let biased: Vec<f64> = want.iter().enumerate().map(|(i, y)| y + f64::from(bias[i % n])).collect();
        close(&out, &biased, k, &what);
        if n.is_multiple_of(2) {
            let packed = pack(&cpu, ProductShape { gated: true, ..shape }, dtype, &w);
            let mut gated = vec![0.0; m * n / 2];
            cpu.gemm(&x, &packed, Epilogue::SiluMul, &mut gated);
            let silu = |g: f64| g / (1.0 + (-g).exp());
            close(&gated, &want.chunks(2).map(|p| silu(p[0]) * p[1]).collect::<Vec<_>>(), 8 * k, &what);
        }
        let mut rows = vec![0.0; n * k];
        cpu.embed_tied(&(0..n as u32).collect::<Vec<_>>(), &packed, 0, &mut rows);
        close(&rows, &stored(&w, k, dtype).iter().map(|w| f64::from(*w)).collect::<Vec<_>>(), 1, &what);
    }
}

#[test]
fn edge_shapes_agree_with_the_definition() {
    for (m, n, k) in [
        (1, 1, 1),
        (1, 33, 7),
        (3, 31, 2),
        (8, 64, 64),
        (9, 96, 65),
        (17, 130, 300),
        (64, 40, 33),
        (5, 2, 1),
        (16, 32, 512),
        (33, 34, 1024),
    ] {
        for dtype in DTYPES {
            agreement(m, n, k, dtype, (m * n * k) as u64);
        }
    }
}

/// Int8 sums are exact, so every instruction set gives the same bits.
#[test]
fn int8_products_agree_bit_for_bit_between_instruction_sets() {
    let shape = ProductShape::new(70, 1000).in_pieces();
    let (x, w) = (numbers(8, 19 * shape.k), numbers(9, shape.n * shape.k));
    let run = |isa| {
        let cpu = Cpu::new(isa, 2);
        let mut out = vec![0.0; 19 * shape.n];
        cpu.gemm(&x, &pack(&cpu, shape, WeightType::Int8, &w), Epilogue::Store, &mut out);
        out
    };
    let expected = run(Isa::Portable);
    Isa::available().into_iter().for_each(|isa| assert_eq!(run(isa), expected, "{}", isa.name()));
}

/// I11: ranks that each hold some pieces of k, summed in the tree, give the bits of one that holds all.
#[test]
fn i11_pieces_summed_over_ranks_give_the_same_bits() {
    let (m, n, k) = (5, 96, 768);
    let (x, w) = (numbers(3, m * k), numbers(4, n * k));
    for (isa, dtype) in Isa::available().into_iter().flat_map(|isa| DTYPES.map(|dtype| (isa, dtype))) {
        let cpu = Cpu::new(isa, 2);
        let part = |ranks: usize, rank: usize| {
            let own = k / ranks;
            let x: Vec<f32> = x.chunks(k).flat_map(|row| &row[rank * own..][..own]).copied().collect();
            let shape = ProductShape::new(n, k).in_pieces().share(rank, ranks);
            let packed = cpu.pack_rows(shape, dtype, &|row, out| out.copy_from_slice(&w[row * k..][..k]));
            let mut out = vec![0.0; m * n];
            cpu.gemm(&x, &packed, Epilogue::Store, &mut out);
            out
        };
        let whole = part(1, 0);
        for ranks in [2, 4, 8] {
            let mut parts: Vec<Vec<f32>> = (0..ranks).map(|rank| part(ranks, rank)).collect();
            while parts.len() > 1 {
                parts = parts.chunks(2).map(|p| p[0].iter().zip(&p[1]).map(|(a, b)| a + b).collect()).collect();
            }
            assert!(parts[0] == whole, "{} {dtype:?} {ranks} ranks", isa.name());
        }
    }
}

/// I4: a row's bits depend neither on the number of rows nor on threads.
#[test]
fn rows_are_bit_identical_alone_and_together() {
    let (n, k) = (200, 104);
    let (x, w) = (numbers(5, 64 * k), numbers(6, n * k));
    for isa in Isa::available() {
        for dtype in DTYPES {
            let alone = Cpu::new(isa, 1);
            let packed = pack(&alone, ProductShape::new(n, k).in_pieces(), dtype, &w);
            let mut rows = vec![0.0; 64 * n];
            for (x, out) in x.chunks(k).zip(rows.chunks_mut(n)) {
                alone.gemm(x, &packed, Epilogue::Store, out);
            }
            for threads in 1..=4 {
                let cpu = Cpu::new(isa, threads);
                for m in 1..=64 {
                    let mut out = vec![0.0; m * n];
                    cpu.gemm(&x[..m * k], &packed, Epilogue::Store, &mut out);
                    assert_eq!(out, rows[..m * n], "{} {dtype:?} {m} rows, {threads} threads", isa.name());
                }
            }
        }
    }
}

fn transpose(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| data[i % rows * cols + i / rows]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn drawn_shapes_agree_with_the_definition(m in 1usize..40, n in 1usize..150, k in 1usize..200, seed in 0u64..1000) {
        DTYPES.into_iter().for_each(|dtype| agreement(m, n, k, dtype, seed));
    }

    #[test]
    fn dense_products_agree_under_every_transpose(
        m in 1usize..120, n in 1usize..80, k in 1usize..600, batch in 1usize..4, seed in 0u64..1000,
        (flip_a, flip_b) in any::<(bool, bool)>(),
    ) {
        let (a, b) = (numbers(seed, batch * m * k), numbers(seed + 1, batch * k * n));
        let mut want = Vec::new();
        let (mut stored_a, mut stored_b) = (Vec::new(), Vec::new());
        for i in 0..batch {
            let (a, b) = (&a[i * m * k..][..m * k], &b[i * k * n..][..k * n]);
            want.extend(product(a, &transpose(b, k, n), n, k));
            stored_a.extend(if flip_a { transpose(a, m, k) } else { a.to_vec() });
            stored_b.extend(if flip_b { transpose(b, k, n) } else { b.to_vec() });
        }
        let a = MatRef { data: &stored_a, batch, rows: m, cols: k, transposed: flip_a };
        let b = MatRef { data: &stored_b, batch, rows: k, cols: n, transposed: flip_b };
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 3);
            let mut c = vec![0.0; batch * m * n];
            cpu.matmul(a, b, &mut c, false);
            close(&c, &want, k, isa.name());
            cpu.matmul(a, b, &mut c, true);
            close(&c, &want.iter().map(|y| 2.0 * y).collect::<Vec<_>>(), k, isa.name());
        }
    }
}

/// Partial panels, partial tiles, several tasks and blocks of k, shallow and deep.
#[test]
fn dense_bits_do_not_depend_on_threads() {
    for (batch, m, n, k) in [(1, 203, 300, 520), (3, 101, 288, 32), (5, 9, 40, 33)] {
        let (a, b) = (numbers(1, batch * m * k), numbers(2, batch * k * n));
        for isa in Isa::available() {
            for transposed in [false, true] {
                let a = MatRef { data: &a, batch, rows: m, cols: k, transposed };
                let b = MatRef { data: &b, batch, rows: k, cols: n, transposed };
                let run = |threads| {
                    let mut c = numbers(3, batch * m * n);
                    Cpu::new(isa, threads).matmul(a, b, &mut c, true);
                    c
                };
                let alone = run(1);
                (2..=4).for_each(|threads| assert_eq!(run(threads), alone, "{} {threads} threads", isa.name()));
            }
        }
    }
}

#[test]
fn empty_products_are_empty_sums() {
    let cpu = Cpu::new(Isa::Portable, 2);
    let (a, b) = (MatRef::new(&[], 3, 0), MatRef::new(&[], 0, 2));
    let mut c = vec![7.0; 6];
    cpu.matmul(a, b, &mut c, true);
    assert_eq!(c, [7.0; 6]);
    cpu.matmul(a, b, &mut c, false);
    assert_eq!(c, [0.0; 6]);
    for dtype in DTYPES {
        cpu.gemm(&[], &cpu.pack(2, 3, &[1.0; 6], dtype), Epilogue::Store, &mut []);
    }
}

/// The best and the median of 101 runs, in seconds: the best is what other programs disturb least.
fn time(mut run: impl FnMut()) -> (f64, f64) {
    let mut times: Vec<f64> = (0..101)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[50])
}

/// Not a test of anything but speed: prints GFLOP/s of the best and of the median run.
#[test]
#[ignore = "prints speeds: run with --release -- --ignored --nocapture"]
fn speeds() {
    let isa = Isa::detect().unwrap();
    let cores = std::thread::available_parallelism().unwrap().get();
    for threads in [1, cores] {
        let cpu = Cpu::new(isa, threads);
        println!("{}, {threads} threads: best (median) GFLOP/s", isa.name());
        for dtype in DTYPES {
            for m in [1, 4, 16, 64, 256] {
                gemm_speed(&cpu, m, 4096, 1024, dtype);
            }
        }
        for (m, n, k) in [(4096, 512, 192), (4096, 192, 512), (192, 512, 4096), (8192, 1024, 256)] {
            for (flip_a, flip_b) in [(false, false), (false, true), (true, false)] {
                matmul_speed(&cpu, (1, m, n, k), flip_a, flip_b);
            }
        }
        matmul_speed(&cpu, (64, 512, 512, 32), false, true);
        matmul_speed(&cpu, (64, 512, 32, 512), false, false);
    }
}

fn gemm_speed(cpu: &Cpu, m: usize, n: usize, k: usize, dtype: WeightType) {
    let (x, w) = (numbers(1, m * k), numbers(2, n * k));
    let packed = cpu.pack(n, k, &w, dtype);
    let mut out = vec![0.0; m * n];
    let (best, median) = time(|| cpu.gemm(black_box(&x), &packed, Epilogue::Store, &mut out));
    let (work, bytes) = (2.0 * (m * n * k) as f64 / 1e9, packed.bytes() as f64 / 1e9);
    println!("gemm {dtype:?} {m}x{n}x{k}: {:.1} ({:.1}), weights {:.1} GB/s", work / best, work / median, bytes / best);
}

fn matmul_speed(cpu: &Cpu, (batch, m, n, k): (usize, usize, usize, usize), flip_a: bool, flip_b: bool) {
    let (a, b) = (numbers(1, batch * m * k), numbers(2, batch * n * k));
    let mut c = vec![0.0; batch * m * n];
    let a = MatRef { data: &a, batch, rows: m, cols: k, transposed: flip_a };
    let b = MatRef { data: &b, batch, rows: k, cols: n, transposed: flip_b };
    let (best, median) = time(|| cpu.matmul(black_box(a), b, &mut c, false));
    let work = 2.0 * (batch * m * n * k) as f64 / 1e9;
    let stored = match (flip_a, flip_b) {
        (false, false) => "A B",
        (true, false) => "A^T B",
        _ => "A B^T",
    };
    println!("matmul {batch}x{m}x{n}x{k} {stored}: {:.1} ({:.1})", work / best, work / median);
}
