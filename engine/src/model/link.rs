//! What a pass tells of itself, and what it needs of other ranks.

use std::convert::Infallible;

/// A kind of operation of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Gathering rows of the embedding.
    Embed,
    /// Any RMS norm.
    Norm,
    /// Product to queries, keys and values.
    Qkv,
    /// Norms of heads, rotation, append to the cache.
    RopeAppend,
    /// Attention over the cache.
    Attention,
    /// Product of attention's output, with the residual.
    Out,
    /// Product to gates and ups, with the activation.
    GateUp,
    /// Product back to the stream, with the residual.
    Down,
    /// Which experts rows go to.
    Router,
    /// Products of the experts, and their sum.
    Experts,
    /// Product with the head, and the reduction of its logits.
    Head,
    /// Sums over the ranks of a group.
    AllReduce,
}

impl Operation {
    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Embed => "embed",
            Operation::Norm => "norm",
            Operation::Qkv => "qkv",
            Operation::RopeAppend => "rope_append",
            Operation::Attention => "attention",
            Operation::Out => "out",
            Operation::GateUp => "gate_up",
            Operation::Down => "down",
            Operation::Router => "router",
            Operation::Experts => "experts",
            Operation::Head => "head",
            Operation::AllReduce => "all_reduce",
        }
    }
}

/// What ties the passes of the ranks of a group together; also sees every operation end.
pub trait Link {
    /// Why another rank did not answer.
    type Error;
    /// Every rank ends with the sum of all ranks' values.
    ///
    /// # Errors
    /// Another rank failed.
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), Self::Error>;
    /// An operation has ended.
    fn after(&mut self, _operation: Operation) {}
}

/// The link of a whole model: there is nobody else.
pub struct Alone;

impl Link for Alone {
    type Error = Infallible;

    fn all_reduce(&mut self, _: &mut [f32]) -> Result<(), Infallible> {
        Ok(())
    }
}
