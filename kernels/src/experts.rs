//! Mixtures of experts: which experts a row goes to, and their products. Each expert's weights are read once a step,
//! for all rows that go there.

use crate::{Cpu, Epilogue, Packed};

/// Most experts of a layer.
pub const EXPERTS_MAX: usize = 512;
/// Most experts that a row goes to.
pub const CHOSEN_MAX: usize = 32;
/// Keeps a sum of weights from being zero (LLaDA2's modelling code).
const SUM_MIN: f32 = 1e-20;

/// What a router makes of its logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Chances that sum to one over all experts (Shazeer et al. 2017; Qwen3-MoE).
    Softmax,
    /// Each expert by itself (DeepSeek-V3; LLaDA2).
    Sigmoid,
}

/// How a layer's router chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// Experts, at most [`EXPERTS_MAX`].
    pub experts: usize,
    /// Experts of a row, at most [`CHOSEN_MAX`].
    pub chosen: usize,
    /// What the logits become.
    pub score: Score,
    /// Weights of a row are divided by their sum.
    pub renormalise: bool,
    /// Factor of every weight.
    pub scale: f32,
    /// Groups of equal size that the experts form; divides `experts`.
    pub groups: usize,
    /// Groups, by the sum of their two best, from which experts are chosen.
    pub groups_chosen: usize,
}

/// An expert that a row goes to.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Choice {
    /// Its number.
    pub expert: u32,
    /// Factor of its output.
    pub weight: f32,
}

impl Router {
    /// The experts of one row, ascending by number: those of the highest scores, with `bias` added for the choice only
    /// (empty: none). Ties: the lowest number first.
    ///
    /// # Panics
    /// Lengths or limits do not fit the router's numbers.
    pub fn choose(&self, logits: &[f32], bias: &[f32], out: &mut [Choice]) {
        assert!(logits.len() == self.experts && self.experts <= EXPERTS_MAX, "one logit per expert");
        assert!(bias.is_empty() || bias.len() == self.experts, "one bias per expert");
        assert!(out.len() == self.chosen && self.chosen <= CHOSEN_MAX, "one place per chosen expert");
        let (mut scores, mut ranking) = ([0.0; EXPERTS_MAX], [f32::NEG_INFINITY; EXPERTS_MAX]);
        let (scores, ranking) = (&mut scores[..self.experts], &mut ranking[..self.experts]);
        self.score(logits, scores);
        for (i, rank) in ranking.iter_mut().enumerate() {
            *rank = scores[i] + bias.get(i).unwrap_or(&0.0);
        }
        if self.groups_chosen < self.groups {
            self.leave_groups_out(ranking);
        }
        for choice in out.iter_mut() {
            let best = best(ranking);
            ranking[best] = f32::NEG_INFINITY;
            *choice = Choice { expert: best as u32, weight: scores[best] };
        }
        let sum = if self.renormalise { out.iter().map(|choice| choice.weight).sum::<f32>() + SUM_MIN } else { 1.0 };
        out.iter_mut().for_each(|choice| choice.weight = choice.weight / sum * self.scale);
        out.sort_unstable_by_key(|choice| choice.expert);
    }

    fn score(&self, logits: &[f32], scores: &mut [f32]) {
        match self.score {
            Score::Sigmoid => scores.iter_mut().zip(logits).for_each(|(s, x)| *s = 1.0 / (1.0 + (-x).exp())),
            Score::Softmax => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().zip(logits).for_each(|(s, x)| *s = (x - max).exp());
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|s| *s /= sum);
            }
        }
    }

    /// Leaves only the best groups in the ranking.
    fn leave_groups_out(&self, ranking: &mut [f32]) {
        let size = self.experts / self.groups;
        let mut kept = [false; EXPERTS_MAX];
        let mut sums = [f32::NEG_INFINITY; EXPERTS_MAX];
        for (sum, group) in sums.iter_mut().zip(ranking.chunks_exact(size)) {
            let first = best(group);
            let second = (0..size).filter(|&i| i != first).map(|i| group[i]).fold(f32::NEG_INFINITY, f32::max);
            *sum = group[first] + if size > 1 { second } else { 0.0 };
        }
        for _ in 0..self.groups_chosen {
            let best = best(&sums[..self.groups]);
            (kept[best], sums[best]) = (true, f32::NEG_INFINITY);
        }
        for (group, _) in ranking.chunks_exact_mut(size).zip(kept).filter(|(_, kept)| !kept) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Index of the largest value, the first among equals.
fn best(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

/// One expert's weights: `down(silu(gate x) * up x)`.
pub struct Expert {
    /// Rows gate 0, up 0, gate 1, up 1, ..
    pub gate_up: Packed,
    /// Back to the width of the stream.
    pub down: Packed,
}

/// Rows of one expert at a time.
#[derive(Debug)]
pub struct ExpertBuffers {
    /// (rows, hidden)
    gathered: Vec<f32>,
    /// (rows, width of an expert)
    gated: Vec<f32>,
    /// (rows, hidden)
    products: Vec<f32>,
    /// Slots by expert.
    order: Vec<u32>,
}

impl ExpertBuffers {
    /// Buffers for up to `rows` rows of `hidden` elements that go to `chosen` experts of `width` each.
    pub fn new(rows: usize, hidden: usize, chosen: usize, width: usize) -> Self {
        Self {
            gathered: vec![0.0; rows * hidden],
            gated: vec![0.0; rows * width],
            products: vec![0.0; rows * hidden],
            order: Vec::with_capacity(rows * chosen),
        }
    }
}

impl Cpu {
    /// What every chosen expert makes of its rows: `slots` (rows, chosen, hidden) of `x` (rows, hidden) for `choices`
    /// (rows, chosen). A slot's bits depend on its row and expert only.
    ///
    /// # Panics
    /// Lengths do not fit each other or the buffers.
    pub fn experts(
        &self,
        x: &[f32],
        choices: &[Choice],
        experts: &[Expert],
        buffers: &mut ExpertBuffers,
        slots: &mut [f32],
    ) {
        let Some(first) = experts.first() else { return };
        let (hidden, width) = (first.gate_up.k(), first.down.k());
        let chosen = (choices.len() * hidden).checked_div(x.len()).unwrap_or(1).max(1);
        assert_eq!(slots.len(), choices.len() * hidden, "slots must be (rows, chosen, hidden)");
        let ExpertBuffers { gathered, gated, products, order } = buffers;
        order.clear();
        order.extend(0..choices.len() as u32);
        order.sort_unstable_by_key(|&slot| (choices[slot as usize].expert, slot));
        let expert_of = |slot: &u32| choices[*slot as usize].expert;
        for group in order.chunk_by(|a, b| expert_of(a) == expert_of(b)) {
            let (expert, rows) = (&experts[expert_of(&group[0]) as usize], group.len());
            for (to, &slot) in gathered.chunks_exact_mut(hidden).zip(group) {
                to.copy_from_slice(&x[slot as usize / chosen * hidden..][..hidden]);
            }
            let (gated, products) = (&mut gated[..rows * width], &mut products[..rows * hidden]);
            self.gemm(&gathered[..rows * hidden], &expert.gate_up, Epilogue::SiluMul, gated);
            self.gemm(gated, &expert.down, Epilogue::Store, products);
            for (from, &slot) in products.chunks_exact(hidden).zip(group) {
                slots[slot as usize * hidden..][..hidden].copy_from_slice(from);
            }
        }
    }
}

/// Adds the weighted slots (rows, chosen, hidden) to `stream` (rows, hidden), in the order of the choices.
pub fn combine(choices: &[Choice], slots: &[f32], stream: &mut [f32], hidden: usize) {
    let chosen = (choices.len() * hidden).checked_div(stream.len()).unwrap_or(1).max(1);
    let rows = stream.chunks_exact_mut(hidden).zip(choices.chunks_exact(chosen));
    for ((sum, choices), slots) in rows.zip(slots.chunks_exact(chosen * hidden)) {
        for (choice, slot) in choices.iter().zip(slots.chunks_exact(hidden)) {
            sum.iter_mut().zip(slot).for_each(|(sum, y)| *sum += choice.weight * y);
        }
    }
}
