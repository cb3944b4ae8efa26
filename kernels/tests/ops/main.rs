//! Every operation but the matrix products, on every ISA of the host, against the f64 reference; and the bits of a row
//! alone, in a batch, and on any number of threads.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod experts;
mod long_context;
mod vocabulary;

use proptest::prelude::*;
use unmask_kernels::reference::{self, History, RotaryRule};
use unmask_kernels::{
    Bans, Cpu, Draw, EmbeddingTable, HeadShape, Isa, KvCache, KvType, PAGE_SLOTS, QkNorm, Record, Rotary, Row,
    RowTable, WeightType,
};
use vocabulary::Vocabulary;

/// splitmix64, scaled to a roughly normal variate.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn value(&mut self) -> f32 {
        (0..4).map(|_| (self.next() >> 40) as f32 / (1u32 << 24) as f32 - 0.5).sum::<f32>() * 1.7
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    fn shuffled(&mut self, count: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..count as u32).collect();
        for i in (1..count).rev() {
            ids.swap(i, self.below(i + 1));
        }
        ids
    }
}

fn cpus() -> Vec<Cpu> {
    Isa::available().into_iter().map(|isa| Cpu::new(isa, 2)).collect()
}

fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        assert!((f64::from(a) - e).abs() <= tolerance * e.abs().max(1.0), "{what}: element {i} is {a}, expected {e}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn embedding(table: &[f32], width: usize, dtype: WeightType) -> EmbeddingTable {
    EmbeddingTable::new(table.len() / width, width, dtype, &|row, out| {
        out.copy_from_slice(&table[row * width..][..width])
    })
}

#[test]
fn rms_norm_and_embed_agree_with_the_reference() {
    for cpu in cpus() {
        let mut noise = Noise(1);
        for (rows, width) in [(1, 1), (3, 7), (16, 192), (5, 1000), (70, 1024), (0, 16)] {
            let (x, weight) = (noise.values(rows * width), noise.values(width));
            let mut out = vec![0.0; x.len()];
            cpu.rms_norm(&x, &weight, 1e-6, &mut out);
            assert_close(&out, &reference::rms_norm(&x, &weight, 1e-6), 1e-6, cpu.isa().name());
            let table = noise.values(50 * width);
            let ids: Vec<u32> = (0..rows).map(|_| noise.below(50) as u32).collect();
            cpu.embed(&ids, &embedding(&table, width, WeightType::F32), &mut out);
            assert_close(&out, &reference::embed(&ids, &table, width), 0.0, cpu.isa().name());
            cpu.embed(&ids, &embedding(&table, width, WeightType::Bf16), &mut out);
            assert_close(&out, &reference::embed(&ids, &table, width), 1.0 / 256.0, cpu.isa().name());
        }
    }
}

/// Sequences with scattered pages, and rows over them.
struct Scene {
    shape: HeadShape,
    rows: Vec<Row>,
    tables: Vec<Vec<u32>>,
    pages: usize,
}

impl Scene {
    /// `lengths[s]` slots are reserved for sequence `s`; `rows` are `(sequence, position, end)`.
    fn new(shape: HeadShape, lengths: &[usize], rows: &[(u32, u32, u32)], noise: &mut Noise) -> Scene {
        let needed: Vec<usize> = lengths.iter().map(|l| l.div_ceil(PAGE_SLOTS)).collect();
        let pages = needed.iter().sum::<usize>() + 2;
        let mut ids = noise.shuffled(pages);
        let tables = needed.iter().map(|&n| ids.split_off(ids.len() - n)).collect();
        let rows = rows.iter().map(|&(sequence, position, end)| Row { sequence, position, end }).collect();
        Scene { shape, rows, tables, pages }
    }

    fn views(&self) -> Vec<&[u32]> {
        self.tables.iter().map(Vec::as_slice).collect()
    }

    /// A cache whose slots below the largest end of each sequence hold noise; all others hold NaN, as stale slots may.
    fn filled(&self, cpu: &Cpu, dtype: KvType, noise: &mut Noise) -> KvCache {
        let mut kv = KvCache::new(2, &self.shape, self.pages, dtype);
        let still = Rotary::new(self.shape.head_dim, 0, 1e4, self.pages * PAGE_SLOTS);
        let every: Vec<u32> = (0..self.pages as u32).collect();
        let mut rows: Vec<Row> =
            (0..self.pages * PAGE_SLOTS).map(|p| Row { sequence: 0, position: p as u32, end: 1 }).collect();
        let mut data = vec![f32::NAN; rows.len() * self.shape.qkv_width()];
        cpu.rope_append(&mut data, &self.shape, &still, None, &RowTable { rows: &rows, tables: &[&every] }, 1, &mut kv);
        rows.clear();
        for sequence in 0..self.tables.len() as u32 {
            let end = self.rows.iter().filter(|r| r.sequence == sequence).map(|r| r.end).max().unwrap_or(0);
            rows.extend((0..end).map(|position| Row { sequence, position, end: 1 }));
        }
        let mut data = noise.values(rows.len() * self.shape.qkv_width());
        let table = RowTable { rows: &rows, tables: &self.views() };
        cpu.rope_append(&mut data, &self.shape, &still, None, &table, 1, &mut kv);
        kv
    }

    fn histories(&self, kv: &KvCache) -> Vec<History> {
        let read = |table: &Vec<u32>| {
            let mut history = History::default();
            for position in 0..table.len() * PAGE_SLOTS {
                let (page, slot) = reference::slot(table, position);
                for head in 0..self.shape.kv_heads {
                    let (key, value) = kv.read(1, page, head, slot);
                    history.keys.extend(key.iter().map(|&v| f64::from(v)));
                    history.values.extend(value.iter().map(|&v| f64::from(v)));
                }
            }
            history
        };
        self.tables.iter().map(read).collect()
    }

    fn attend(&self, cpu: &Cpu, qkv: &[f32], kv: &KvCache, rows: std::ops::Range<usize>) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows.len() * self.shape.out_width()];
        let width = self.shape.qkv_width();
        let table = RowTable { rows: &self.rows[rows.clone()], tables: &self.views() };
        cpu.attention(&qkv[rows.start * width..rows.end * width], &self.shape, &table, 1, kv, &mut out);
        out
    }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { heads, kv_heads, head_dim }
}

/// Denoise rows of one sequence, store and causal rows of others, a single autoregressive row, ends around boundaries.
fn mixed_rows() -> (Vec<usize>, Vec<(u32, u32, u32)>) {
    let mut rows: Vec<(u32, u32, u32)> = (32..48).map(|p| (0, p, 48)).collect();
    rows.extend((20..41).map(|p| (1, p, p + 1)));
    rows.extend([(2, 0, 1), (3, 0, 31), (3, 1, 32), (3, 2, 33), (3, 3, 63), (3, 4, 64), (3, 5, 65)]);
    rows.extend((90..99).map(|p| (4, p, 99)));
    rows.push((2, 1, 2));
    (vec![48, 41, 2, 70, 99], rows)
}

#[test]
fn attention_agrees_with_the_reference() {
    let shapes = [
        shape(2, 2, 16),
        shape(6, 2, 32),
        shape(4, 1, 64),
        shape(3, 3, 80),
        shape(8, 2, 128),
        shape(9, 1, 20),
        shape(1, 1, 1),
    ];
    let (lengths, rows) = mixed_rows();
    for cpu in cpus() {
        for (i, &shape) in shapes.iter().enumerate() {
            for dtype in [KvType::F32, KvType::Bf16] {
                let noise = &mut Noise(i as u64);
                let scene = Scene::new(shape, &lengths, &rows, noise);
                let kv = scene.filled(&cpu, dtype, noise);
                let qkv: Vec<f32> = noise.values(rows.len() * shape.qkv_width()).iter().map(|v| v * 3.0).collect();
                let out = scene.attend(&cpu, &qkv, &kv, 0..rows.len());
                let expected = reference::attention(&qkv, &shape, &scene.rows, &scene.histories(&kv));
                assert_close(&out, &expected, 5e-6, &format!("{} {shape:?} {dtype:?}", cpu.isa().name()));
            }
        }
    }
}

#[test]
fn i1_i4_attention_bits_do_not_depend_on_batch_pages_or_threads() {
    let (lengths, rows) = mixed_rows();
    for isa in Isa::available() {
        for (shape, dtype) in [(shape(6, 2, 32), KvType::F32), (shape(5, 1, 80), KvType::Bf16)] {
            let mut seen: Option<Vec<u32>> = None;
            for threads in 1..=4 {
                let cpu = Cpu::new(isa, threads);
                let noise = &mut Noise(5);
                let mut scene = Scene::new(shape, &lengths, &rows, noise);
                let qkv = noise.values(rows.len() * shape.qkv_width());
                // Other pages for each number of threads, the same contents.
                let mut ids = Noise(threads as u64).shuffled(scene.pages);
                for page in scene.tables.iter_mut().flatten() {
                    *page = ids.pop().unwrap();
                }
                let kv = scene.filled(&cpu, dtype, noise);
                let together = scene.attend(&cpu, &qkv, &kv, 0..rows.len());
                let alone: Vec<f32> = (0..rows.len()).flat_map(|r| scene.attend(&cpu, &qkv, &kv, r..r + 1)).collect();
                let chunked: Vec<f32> = (0..rows.len())
                    .step_by(3)
                    .flat_map(|r| scene.attend(&cpu, &qkv, &kv, r..rows.len().min(r + 3)))
                    .collect();
                assert_eq!(bits(&together), bits(&alone), "{} alone", isa.name());
                assert_eq!(bits(&together), bits(&chunked), "{} chunked", isa.name());
                assert_eq!(*seen.get_or_insert(bits(&together)), bits(&together), "{} threads {threads}", isa.name());
            }
        }
    }
}

#[test]
fn rope_append_agrees_with_the_reference() {
    let cases = [
        (shape(6, 2, 32), 32),
        (shape(4, 4, 16), 8),
        (shape(3, 1, 80), 40),
        (shape(2, 1, 64), 64),
        (shape(2, 2, 6), 0),
    ];
    let (lengths, rows) = mixed_rows();
    for cpu in cpus() {
        for (shape, rotary_dim) in cases {
            for (dtype, normed) in [(KvType::F32, true), (KvType::F32, false), (KvType::Bf16, true)] {
                let noise = &mut Noise(9);
                let scene = Scene::new(shape, &lengths, &rows, noise);
                let mut kv = KvCache::new(2, &shape, scene.pages, dtype);
                let rotary = Rotary::new(shape.head_dim, rotary_dim, 1e4, 128);
                let (q, k) = (noise.values(shape.head_dim), noise.values(shape.head_dim));
                let before = noise.values(rows.len() * shape.qkv_width());
                let mut qkv = before.clone();
                let norms = normed.then_some(QkNorm { q: &q, k: &k, eps: 1e-6 });
                let table = RowTable { rows: &scene.rows, tables: &scene.views() };
                cpu.rope_append(&mut qkv, &shape, &rotary, norms, &table, 1, &mut kv);
                let rule = RotaryRule { dims: rotary_dim, theta: 1e4 };
                let norms = normed.then_some((q.as_slice(), k.as_slice(), 1e-6));
                let expected = reference::rope(&before, &shape, rule, norms, &scene.rows);
                assert_close(&qkv, &expected, 2e-6, &format!("{} {shape:?}", cpu.isa().name()));
                let mut histories = vec![History::default(); lengths.len()];
                reference::append(&expected, &shape, &scene.rows, &mut histories);
                let tolerance = if dtype == KvType::F32 { 2e-6 } else { 1.0 / 256.0 };
                assert_stored(&scene, &kv, &histories, tolerance);
            }
        }
    }
}

fn assert_stored(scene: &Scene, kv: &KvCache, histories: &[History], tolerance: f64) {
    let dims = scene.shape.head_dim;
    for row in &scene.rows {
        let (table, history) = (&scene.tables[row.sequence as usize], &histories[row.sequence as usize]);
        let (page, slot) = reference::slot(table, row.position as usize);
        for head in 0..scene.shape.kv_heads {
            let at = (row.position as usize * scene.shape.kv_heads + head) * dims;
            let (key, value) = kv.read(1, page, head, slot);
            assert_close(&key, &history.keys[at..at + dims], tolerance, "key");
            assert_close(&value, &history.values[at..at + dims], tolerance, "value");
            assert!(kv.read(0, page, head, slot).0.iter().all(|&v| v == 0.0), "another layer was written");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn drawn_attention_agrees(
        kv_heads in 1usize..4,
        group in 1usize..5,
        half_dim in 1usize..40,
        sequences in prop::collection::vec((1usize..100, 1usize..12), 1..4),
        bf16: bool,
        seed: u64,
    ) {
        let shape = shape(kv_heads * group, kv_heads, half_dim * 2);
        let noise = &mut Noise(seed);
        let mut rows = Vec::new();
        for (s, &(length, count)) in sequences.iter().enumerate() {
            rows.extend((0..count).map(|_| (s as u32, noise.below(length) as u32, 1 + noise.below(length) as u32)));
        }
        let lengths: Vec<usize> = sequences.iter().map(|s| s.0).collect();
        let scene = Scene::new(shape, &lengths, &rows, noise);
        for cpu in cpus() {
            let kv = scene.filled(&cpu, if bf16 { KvType::Bf16 } else { KvType::F32 }, noise);
            let qkv = noise.values(rows.len() * shape.qkv_width());
            let out = scene.attend(&cpu, &qkv, &kv, 0..rows.len());
            let expected = reference::attention(&qkv, &shape, &scene.rows, &scene.histories(&kv));
            assert_close(&out, &expected, 5e-6, cpu.isa().name());
        }
    }

    #[test]
    fn drawn_vocabularies_agree(n in 1usize..1700, k in 1usize..40, rows in 1usize..20, seed: u64) {
        let vocabulary = Vocabulary::new(n, k, rows, &mut Noise(seed));
        for cpu in cpus() {
            vocabulary.check(&cpu, WeightType::F32);
        }
    }
}

#[test]
#[ignore = "prints speeds: run with -- --ignored --nocapture"]
#[allow(clippy::print_stdout)]
fn speeds() {
    let best = |run: &mut dyn FnMut()| {
        let time = |run: &mut dyn FnMut()| {
            let start = std::time::Instant::now();
            run();
            start.elapsed().as_secs_f64()
        };
        (0..30).map(|_| time(run)).fold(f64::INFINITY, f64::min)
    };
    for cpu in cpus() {
        let noise = &mut Noise(0);
        for (shape, count, end) in
            [(shape(16, 8, 128), 16, 1024), (shape(6, 2, 32), 16, 512), (shape(16, 8, 128), 1, 1024)]
        {
            let rows: Vec<_> = (0..count).map(|r| (0, end - count + r, end)).collect();
            let scene = Scene::new(shape, &[end as usize], &rows, noise);
            for dtype in [KvType::F32, KvType::Bf16] {
                let kv = scene.filled(&cpu, dtype, noise);
                let qkv = noise.values(rows.len() * shape.qkv_width());
                let seconds = best(&mut || drop(scene.attend(&cpu, &qkv, &kv, 0..rows.len())));
                let work = f64::from(count * end) * (shape.out_width() * 4) as f64;
                let name = cpu.isa().name();
                println!(
                    "attention {name} {shape:?} {count} rows of {end} {dtype:?}: {:.0} GFLOP/s",
                    work / seconds / 1e9
                );
            }
        }
        for (n, k) in [(1024, 192), (32_768, 64), (32_768, 1024)] {
            let vocabulary = Vocabulary::new(n, k, 16, noise);
            let head = cpu.pack(n, k, &vocabulary.weights, WeightType::Bf16);
            for temperature in [0.0, 0.7] {
                let draws = [Draw { temperature, key: [1, 2] }; 16];
                let mut out = [Record::default(); 16];
                let seconds = best(&mut || {
                    cpu.vocab_reduce(&vocabulary.hidden, &head, &vocabulary.bans, &draws, &mut out);
                });
                let mut logits = vec![0.0; 16 * n];
                let product = best(&mut || cpu.logits(&vocabulary.hidden, &head, &mut logits));
                let (name, micros, alone) = (cpu.isa().name(), seconds * 1e6, product * 1e6);
                println!("vocab_reduce {name} {n} x {k} T {temperature}: {micros:.0} us, its product {alone:.0} us");
            }
        }
    }
}
