//! The feed-forward part of a layer: one for all rows, or experts that rows are routed to.

use super::decoder::Model;
use super::link::{Link, Operation};
use unmask_kernels::experts::combine;
use unmask_kernels::{Choice, Epilogue, Expert, ExpertBuffers, Packed, Router};

/// Weights of a layer's feed-forward part.
pub(super) enum Ffn {
    /// For all rows.
    Dense(Expert),
    /// Per row the experts that the router chooses, and one that every row goes to.
    Experts {
        /// In f32, whatever the type of the others: a choice is not to be rounded.
        router: Packed,
        /// Empty for none.
        bias: Vec<f32>,
        experts: Vec<Expert>,
        shared: Option<Expert>,
    },
}

impl Ffn {
    /// Every product.
    pub(super) fn products(&self) -> impl Iterator<Item = &Packed> {
        let (dense, router, experts, shared) = match self {
            Ffn::Dense(dense) => (Some(dense), None, [].as_slice(), None),
            Ffn::Experts { router, experts, shared, .. } => (None, Some(router), experts.as_slice(), shared.as_ref()),
        };
        let all = dense.into_iter().chain(experts).chain(shared);
        all.flat_map(|expert| [&expert.gate_up, &expert.down]).chain(router)
    }
}

/// Buffers of the feed-forward parts of a step.
pub(super) struct FfnScratch {
    /// (rows, widest dense part of the rank)
    pub(super) gated: Vec<f32>,
    /// The rank's part of a sum over ranks (rows, hidden).
    pub(super) partial: Vec<f32>,
    routed: Option<Routed>,
}

struct Routed {
    /// (rows, experts)
    logits: Vec<f32>,
    /// (rows, chosen)
    choices: Vec<Choice>,
    /// (rows, chosen, hidden)
    slots: Vec<f32>,
    buffers: ExpertBuffers,
}

impl FfnScratch {
    /// For up to `rows` rows of `hidden`; `width` and `expert` are the rank's widths, `ranks` how many there are.
    pub(super) fn new(rows: usize, hidden: usize, width: usize, ranks: usize, moe: Option<(&Router, usize)>) -> Self {
        let routed = moe.map(|(router, expert)| Routed {
            logits: vec![0.0; rows * router.experts],
            choices: vec![Choice::default(); rows * router.chosen],
            slots: vec![0.0; rows * router.chosen * hidden],
            buffers: ExpertBuffers::new(rows, hidden, router.chosen, expert),
        });
        let shared = if ranks > 1 { rows * hidden } else { 0 };
        Self { gated: vec![0.0; rows * width], partial: vec![0.0; shared], routed }
    }
}

impl Model {
    /// `stream += ffn(normed)`.
    pub(super) fn feed_forward<L: Link>(
        &self,
        ffn: &Ffn,
        normed: &[f32],
        stream: &mut [f32],
        scratch: &mut FfnScratch,
        link: &mut L,
    ) -> Result<(), L::Error> {
        match ffn {
            Ffn::Dense(dense) => self.dense(dense, normed, stream, scratch, link),
            Ffn::Experts { router, bias, experts, shared } => {
                self.route(router, bias, normed, scratch, link);
                self.add_experts(experts, normed, stream, scratch, link)?;
                match shared {
                    Some(shared) => self.dense(shared, normed, stream, scratch, link),
                    None => Ok(()),
                }
            }
        }
    }

    fn dense<L: Link>(
        &self,
        ffn: &Expert,
        normed: &[f32],
        stream: &mut [f32],
        scratch: &mut FfnScratch,
        link: &mut L,
    ) -> Result<(), L::Error> {
        let FfnScratch { gated, partial, .. } = scratch;
        let gated = &mut gated[..normed.len() / ffn.gate_up.k() * ffn.down.k()];
        self.cpu.gemm(normed, &ffn.gate_up, Epilogue::SiluMul, gated);
        link.after(Operation::GateUp);
        self.add_product(gated, &ffn.down, stream, partial, link, Operation::Down)
    }

    fn route<L: Link>(&self, router: &Packed, bias: &[f32], normed: &[f32], scratch: &mut FfnScratch, link: &mut L) {
        let (Some(routed), Some(moe)) = (&mut scratch.routed, &self.config.moe) else { return };
        let rows = normed.len() / router.k();
        let logits = &mut routed.logits[..rows * moe.router.experts];
        self.cpu.gemm(normed, router, Epilogue::Store, logits);
        let choices = routed.choices.chunks_exact_mut(moe.router.chosen);
        for (logits, choices) in logits.chunks_exact(moe.router.experts).zip(choices) {
            moe.router.choose(logits, bias, choices);
        }
        link.after(Operation::Router);
    }

    /// Adds what the chosen experts make. Ranks sum each expert's output before it is weighted, so that the degree does
    /// not show in the bits (I11).
    fn add_experts<L: Link>(
        &self,
        experts: &[Expert],
        normed: &[f32],
        stream: &mut [f32],
        scratch: &mut FfnScratch,
        link: &mut L,
    ) -> Result<(), L::Error> {
        let (Some(routed), Some(moe)) = (&mut scratch.routed, &self.config.moe) else { return Ok(()) };
        let hidden = self.config.hidden as usize;
        let taken = normed.len() / hidden * moe.router.chosen;
        let (choices, slots) = (&routed.choices[..taken], &mut routed.slots[..taken * hidden]);
        self.cpu.experts(normed, choices, experts, &mut routed.buffers, slots);
        link.after(Operation::Experts);
        if self.vocab.ranks > 1 {
            link.all_reduce(slots)?;
            link.after(Operation::AllReduce);
        }
        combine(choices, slots, stream, hidden);
        link.after(Operation::Experts);
        Ok(())
    }
}
