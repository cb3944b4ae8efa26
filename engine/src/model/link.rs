//! What a pass tells of itself, and what it needs of other ranks.

use std::convert::Infallible;

/// A kind of operation of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Gathering rows of the embedding.
    Embed,
    /// Attention halves of layers, their products and norms included.
    Attention,
    /// Feed-forward halves of layers, and experts that every row goes to.
    FeedForward,
    /// Norms beside those of the halves.
    Norm,
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
            Operation::Attention => "attention",
            Operation::FeedForward => "feed_forward",
            Operation::Norm => "norm",
            Operation::Router => "router",
            Operation::Experts => "experts",
            Operation::Head => "head",
            Operation::AllReduce => "all_reduce",
        }
    }
}

/// What ties the passes of the ranks of a group together, or watches a pass.
pub trait Link {
    /// Why another rank did not answer.
    type Error;
    /// Every rank ends with the sum of all ranks' values.
    ///
    /// # Errors
    /// Another rank failed.
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), Self::Error>;
    /// Whether it wants to see operations end one by one: they take less time together.
    fn watches(&self) -> bool {
        false
    }
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
