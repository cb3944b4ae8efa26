//! Attention over more slots than one run: few rows are split among threads, many are not, and the bits are the same.

use super::*;

/// Ends at, before and behind the borders of runs of 1024 slots.
fn rows() -> (Vec<usize>, Vec<(u32, u32, u32)>) {
    let ends = [1023, 1024, 1025, 2047, 2048, 2049, 2500];
    let mut rows: Vec<(u32, u32, u32)> = ends.iter().map(|&end| (0, end - 1, end)).collect();
    rows.extend((2480..2490).map(|position| (0, position, 2490)));
    rows.extend((0..40).map(|position| (1, position, position + 1)));
    (vec![2500, 40], rows)
}

#[test]
fn far_attention_agrees_with_the_reference_and_does_not_depend_on_how_it_is_split() {
    let (lengths, rows) = rows();
    for isa in Isa::available() {
        for (shape, dtype) in [(shape(4, 1, 24), KvType::F32), (shape(6, 2, 32), KvType::Bf16)] {
            let mut seen: Option<Vec<u32>> = None;
            for threads in [1, 2, 8] {
                let cpu = Cpu::new(isa, threads);
                let noise = &mut Noise(9);
                let scene = Scene::new(shape, &lengths, &rows, noise);
                let kv = scene.filled(&cpu, dtype, noise);
                let qkv: Vec<f32> = noise.values(rows.len() * shape.qkv_width()).iter().map(|v| v * 3.0).collect();
                // With one thread 57 rows are tasks enough, with eight they are split, and a row alone always is.
                let together = scene.attend(&cpu, &qkv, &kv, 0..rows.len());
                let alone: Vec<f32> = (0..rows.len()).flat_map(|r| scene.attend(&cpu, &qkv, &kv, r..r + 1)).collect();
                assert_eq!(bits(&together), bits(&alone), "{} {threads} threads", isa.name());
                assert_eq!(*seen.get_or_insert(bits(&together)), bits(&together), "{} {threads} threads", isa.name());
                if threads == 1 {
                    let expected = reference::attention(&qkv, &shape, &scene.rows, &scene.histories(&kv));
                    assert_close(&together, &expected, 5e-6, &format!("{} {shape:?} {dtype:?}", isa.name()));
                }
            }
        }
    }
}
