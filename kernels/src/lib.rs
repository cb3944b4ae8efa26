//! Operations of a denoising step on CPU buffers, and the thread pool that runs them.
//!
//! It knows numbers, shapes and instruction sets. It does not know what a model, a request or a block is.
//! The only crate with `unsafe`: vector instructions, and buffers that several threads write in disjoint parts.
//!
//! Modules in reading order:
//! - [`reference`]: every operation in plain f64, the definition the others are compared with
//! - [`isa`], [`pool`], `lanes`: instruction sets, threads, vectors
//! - [`pack`], [`gemm`]: products with packed weights, the bulk of a step
//! - [`dense`]: products of two plain matrices, for the trainer
//! - [`kv`], [`rope`], [`attention`]: key/value pages and what reads them
//! - [`experts`]: routers, and products of those rows that go to an expert
//! - [`norm`], [`embed`], [`vocab`]: the rest of a step
//! - [`layer`]: the halves of layers, all their operations as one
//! - [`comm`]: sums and messages between the ranks of a group
//! - [`roof`]: the most that a machine can do
//! - [`file`]: mapped checkpoints

#![allow(unsafe_code)]

#[macro_use]
mod lanes;

pub mod attention;
pub mod comm;
pub mod dense;
pub mod embed;
mod exp;
pub mod experts;
pub mod file;
pub mod gemm;
pub mod isa;
pub mod kv;
pub mod layer;
mod lines;
pub mod norm;
pub mod pack;
pub mod pool;
pub mod reference;
pub mod roof;
pub mod rope;
mod rows;
pub mod vocab;

pub use dense::MatRef;
pub use embed::EmbeddingTable;
pub use experts::{Choice, Expert, ExpertBuffers, Router, Score};
pub use file::{Mapped, map_read_only};
pub use gemm::Epilogue;
pub use isa::{Isa, IsaError};
pub use kv::{HeadShape, KvCache, KvType, PAGE_SLOTS, Row, RowTable};
pub use layer::{AttentionWeights, FeedForwardWeights, Half, StepBuffers, StepRows};
pub use norm::Norm;
pub use pack::{PIECES, Packed, ProductShape, WeightType};
pub use pool::Pool;
pub use rope::{QkNorm, Rotary};
pub use vocab::{Bans, Draw, PARTIAL_BYTES, Partial, Record, VocabShard, gumbel, merge_pairwise};

/// An instruction set and the threads that use it.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
}

impl Cpu {
    /// Kernels of `isa` on `threads` threads (at least 1).
    ///
    /// # Panics
    /// This host cannot run `isa`: only what [`Isa::available`] lists may be named.
    pub fn new(isa: Isa, threads: usize) -> Cpu {
        assert!(isa.supported(), "this host cannot run the {} kernels", isa.name());
        Cpu { isa, pool: Pool::new(threads) }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
}
