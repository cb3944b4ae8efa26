//! Once its buffers have grown, a step takes no memory.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use unmask_kernels::{
    AttentionWeights, Bans, Cpu, Draw, Epilogue, Expert, FeedForwardWeights, Half, HeadShape, Isa, KvCache, KvType,
    Norm, PAGE_SLOTS, ProductShape, QkNorm, Record, Rotary, Row, RowTable, StepBuffers, StepRows, WeightType,
};

struct Counting;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HIDDEN: usize = 128;
const VOCAB: usize = 1500;
const ROWS: usize = 20;
const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 32 };
/// Pages of the only sequence: more keys than one chunk of attention.
const PAGES: u32 = 80;

#[test]
fn operations_take_no_memory_once_their_buffers_have_grown() {
    for isa in Isa::available() {
        for dtype in [WeightType::F32, WeightType::Bf16, WeightType::Int8] {
            let cpu = Cpu::new(isa, 2);
            let fill = |row: usize, out: &mut [f32]| {
                out.iter_mut().enumerate().for_each(|(i, w)| *w = ((row * 7 + i) % 11) as f32 - 5.0)
            };
            let qkv_weights = cpu.pack_rows(ProductShape::new(HEADS.qkv_width(), HIDDEN), dtype, &fill);
            let gated = ProductShape { gated: true, ..ProductShape::new(2 * HIDDEN, HIDDEN) };
            let (gate_up, down) = (
                cpu.pack_rows(gated, dtype, &fill),
                cpu.pack_rows(ProductShape::new(HIDDEN, HIDDEN).in_pieces(), dtype, &fill),
            );
            let head = cpu.pack_rows(ProductShape::new(VOCAB, HIDDEN), dtype, &fill);
            let mut kv = KvCache::new(1, &HEADS, PAGES as usize, KvType::Bf16);
            let rotary = Rotary::new(HEADS.head_dim, HEADS.head_dim, 1e4, PAGES as usize * PAGE_SLOTS);
            let (ones, weight) = (vec![1.0; HEADS.head_dim], vec![1.0; HIDDEN]);
            let norms = QkNorm { q: &ones, k: &ones, eps: 1e-6 };
            let end = PAGES * PAGE_SLOTS as u32;
            let rows: Vec<Row> = (end - ROWS as u32..end).map(|position| Row { sequence: 0, position, end }).collect();
            let table: Vec<u32> = (0..PAGES).collect();
            let tables = [table.as_slice()];
            let rows = RowTable { rows: &rows, tables: &tables };
            let ids: Vec<u32> = (0..ROWS as u32).collect();
            let (mut stream, mut normed) = (vec![0.0; ROWS * HIDDEN], vec![0.0; ROWS * HIDDEN]);
            let (mut qkv, mut mixed) = (vec![0.0; ROWS * HEADS.qkv_width()], vec![0.0; ROWS * HEADS.out_width()]);
            let (bans, draws) = (Bans { vocab: VOCAB, ..Bans::default() }, [Draw::default(); ROWS]);
            let mut records = [Record::default(); ROWS];
            let norm = || Norm { weight: weight.clone(), eps: 1e-6 };
            let halves = [
                Half::Attention(AttentionWeights {
                    layer: 0,
                    norm: norm(),
                    qkv: cpu.pack_rows(ProductShape::new(HEADS.qkv_width(), HIDDEN), dtype, &fill),
                    bias: None,
                    qk_norm: Some([ones.clone(), ones.clone()]),
                    out: cpu.pack_rows(ProductShape::new(HIDDEN, HEADS.out_width()), dtype, &fill),
                }),
                Half::FeedForward(FeedForwardWeights {
                    norm: norm(),
                    expert: Expert {
                        gate_up: cpu.pack_rows(gated, dtype, &fill),
                        down: cpu.pack_rows(ProductShape::new(HIDDEN, HIDDEN), dtype, &fill),
                    },
                }),
            ];
            let of_halves = StepRows { shape: HEADS, rotary: &rotary, table: rows, outputs: &ids };
            let mut step = || {
                cpu.embed_tied(&ids, &head, 0, &mut stream);
                cpu.rms_norm(&stream, &weight, 1e-6, &mut normed);
                cpu.gemm(&normed, &qkv_weights, Epilogue::Store, &mut qkv);
                cpu.rope_append(&mut qkv, &HEADS, &rotary, Some(norms), &rows, 0, &mut kv);
                cpu.attention(&qkv, &HEADS, &rows, 0, &kv, &mut mixed);
                cpu.gemm(&mixed, &down, Epilogue::Add, &mut stream);
                cpu.gemm(&stream, &gate_up, Epilogue::SiluMul, &mut normed);
                let (stream, qkv, mixed, gated) = (&mut stream, &mut qkv, &mut mixed, &mut normed);
                cpu.halves(&halves, &of_halves, &mut kv, StepBuffers { stream, partial: None, qkv, mixed, gated });
                cpu.vocab_reduce(&normed, &head, &bans, &draws, &mut records);
            };
            // Either thread may come first to a kind of task: a few steps until both have been everywhere.
            let steps = (0..50).map(|_| {
                let before = TAKEN.load(Ordering::Relaxed);
                step();
                TAKEN.load(Ordering::Relaxed) - before
            });
            let last = steps.last();
            assert_eq!(last, Some(0), "{} {}", isa.name(), dtype.name());
        }
    }
}
