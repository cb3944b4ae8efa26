//! Feed-forward parts of experts that rows are routed to.

use super::decoder::Model;
use super::link::{Link, Operation};
use unmask_kernels::experts::combine;
use unmask_kernels::{Choice, Epilogue, Expert, ExpertBuffers, Norm, Packed, Router};

/// Half a layer whose rows go to the experts that a router chooses, and to one that every row goes to.
pub(super) struct Experts {
    /// Of the stream, before router and experts.
    pub(super) norm: Norm,
    /// In f32, whatever the type of the others: a choice is not to be rounded.
    pub(super) router: Packed,
    /// Empty for none.
    pub(super) bias: Vec<f32>,
    pub(super) experts: Vec<Expert>,
    pub(super) shared: Option<Expert>,
}

impl Experts {
    /// Every product.
    pub(super) fn products(&self) -> impl Iterator<Item = &Packed> {
        let all = self.experts.iter().chain(&self.shared);
        all.flat_map(|expert| [&expert.gate_up, &expert.down]).chain([&self.router])
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
    /// `stream += experts(norm(stream))`; `normed` is work space.
    pub(super) fn add_routed<L: Link>(
        &self,
        layer: &Experts,
        normed: &mut [f32],
        stream: &mut [f32],
        scratch: &mut FfnScratch,
        link: &mut L,
    ) -> Result<(), L::Error> {
        self.cpu.rms_norm(stream, &layer.norm.weight, layer.norm.eps, normed);
        link.after(Operation::Norm);
        self.route(&layer.router, &layer.bias, normed, scratch, link);
        self.add_experts(&layer.experts, normed, stream, scratch, link)?;
        let Some(Expert { gate_up, down }) = &layer.shared else { return Ok(()) };
        let FfnScratch { gated, partial, .. } = scratch;
        let gated = &mut gated[..normed.len() / gate_up.k() * down.k()];
        self.cpu.gemm(normed, gate_up, Epilogue::SiluMul, gated);
        if self.vocab.ranks == 1 {
            self.cpu.gemm(gated, down, Epilogue::Add, stream);
            link.after(Operation::FeedForward);
            return Ok(());
        }
        let partial = &mut partial[..stream.len()];
        self.cpu.gemm(gated, down, Epilogue::Store, partial);
        link.after(Operation::FeedForward);
        add_of_ranks(partial, stream, link)
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

/// `stream += partial`, summed over the ranks.
pub(super) fn add_of_ranks<L: Link>(partial: &mut [f32], stream: &mut [f32], link: &mut L) -> Result<(), L::Error> {
    link.all_reduce(partial)?;
    stream.iter_mut().zip(partial).for_each(|(sum, y)| *sum += *y);
    link.after(Operation::AllReduce);
    Ok(())
}
