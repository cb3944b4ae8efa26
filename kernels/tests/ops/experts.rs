//! Routers and experts against the reference, and the bits of a row alone and among others.

use super::{Noise, assert_close, bits, cpus};
use proptest::prelude::*;
use unmask_kernels::experts::combine;
use unmask_kernels::reference;
use unmask_kernels::{Choice, Cpu, Epilogue, Expert, ExpertBuffers, Packed, ProductShape, Router, Score, WeightType};

fn router(noise: &mut Noise) -> Router {
    let groups = [1, 2, 4][noise.below(3)];
    let size = 2 + noise.below(7);
    let groups_chosen = 1 + noise.below(groups);
    Router {
        experts: groups * size,
        chosen: 1 + noise.below((groups_chosen * size).min(8)),
        score: [Score::Softmax, Score::Sigmoid][noise.below(2)],
        renormalise: noise.below(2) == 0,
        scale: 1.0 + noise.below(3) as f32,
        groups,
        groups_chosen,
    }
}

proptest! {
    #[test]
    fn the_best_experts_of_the_best_groups_are_chosen(seed: u64) {
        let mut noise = Noise(seed);
        let router = router(&mut noise);
        let logits = noise.values(router.experts);
        let bias = if noise.below(2) == 0 { Vec::new() } else { noise.values(router.experts) };
        let mut chosen = vec![Choice::default(); router.chosen];
        router.choose(&logits, &bias, &mut chosen);
        let expected = reference::choose(&router, &logits, &bias);
        let experts: Vec<usize> = chosen.iter().map(|choice| choice.expert as usize).collect();
        prop_assert_eq!(experts, expected.iter().map(|(i, _)| *i).collect::<Vec<_>>());
        let weights: Vec<f32> = chosen.iter().map(|choice| choice.weight).collect();
        assert_close(&weights, &expected.iter().map(|(_, w)| *w).collect::<Vec<_>>(), 1e-5, "weights");
    }
}

#[test]
fn equal_scores_go_to_the_lowest_numbers() {
    let router = Router {
        experts: 6,
        chosen: 2,
        score: Score::Softmax,
        renormalise: true,
        scale: 1.0,
        groups: 1,
        groups_chosen: 1,
    };
    let mut chosen = [Choice::default(); 2];
    router.choose(&[0.5; 6], &[], &mut chosen);
    assert_eq!(chosen.map(|choice| (choice.expert, choice.weight)), [(0, 0.5), (1, 0.5)]);
}

fn pack(cpu: &Cpu, shape: ProductShape, dtype: WeightType, weights: &[f32]) -> Packed {
    cpu.pack_rows(shape, dtype, &|row, out| out.copy_from_slice(&weights[row * out.len()..][..out.len()]))
}

#[test]
fn rows_get_the_sum_of_their_experts_whoever_else_goes_there() {
    let (hidden, width, experts, chosen, rows) = (24, 16, 5, 2, 7);
    let mut noise = Noise(3);
    let gate_up: Vec<Vec<f32>> = (0..experts).map(|_| noise.values(2 * width * hidden)).collect();
    let down: Vec<Vec<f32>> = (0..experts).map(|_| noise.values(hidden * width)).collect();
    let (x, before) = (noise.values(rows * hidden), noise.values(rows * hidden));
    let choices: Vec<Choice> = (0..rows)
        .flat_map(|_| {
            // Expert 4 gets no row.
            let first = noise.below(3) as u32;
            [first, first + 1].map(|expert| Choice { expert, weight: noise.value() })
        })
        .collect();
    let mut expected: Vec<f64> = before.iter().map(|&v| f64::from(v)).collect();
    for (slot, choice) in choices.iter().enumerate() {
        let (row, e) = (slot / chosen, choice.expert as usize);
        let x = &x[row * hidden..(row + 1) * hidden];
        let gated = reference::gemm(x, &gate_up[e], hidden, &Epilogue::SiluMul, &[]);
        let gated: Vec<f32> = gated.iter().map(|&v| v as f32).collect();
        let y = reference::gemm(&gated, &down[e], width, &Epilogue::Store, &[]);
        for (sum, y) in expected[row * hidden..].iter_mut().zip(y) {
            *sum += f64::from(choice.weight) * y;
        }
    }
    for cpu in cpus() {
        let weights: Vec<Expert> = (0..experts)
            .map(|e| {
                let shape = ProductShape { gated: true, ..ProductShape::new(2 * width, hidden) };
                let back = ProductShape::new(hidden, width).in_pieces();
                Expert {
                    gate_up: pack(&cpu, shape, WeightType::F32, &gate_up[e]),
                    down: pack(&cpu, back, WeightType::F32, &down[e]),
                }
            })
            .collect();
        let mut buffers = ExpertBuffers::new(rows * chosen, hidden, chosen, width);
        let mut run = |x: &[f32], choices: &[Choice], before: &[f32]| {
            let (mut slots, mut stream) = (vec![0.0; choices.len() * hidden], before.to_vec());
            cpu.experts(x, choices, &weights, &mut buffers, &mut slots);
            combine(choices, &slots, &mut stream, hidden);
            stream
        };
        let all = run(&x, &choices, &before);
        assert_close(&all, &expected, 1e-4, cpu.isa().name());
        for row in 0..rows {
            let at = row * hidden..(row + 1) * hidden;
            let alone = run(&x[at.clone()], &choices[row * chosen..(row + 1) * chosen], &before[at.clone()]);
            assert_eq!(bits(&alone), bits(&all[at]), "row {row} on {}", cpu.isa().name());
        }
    }
}
