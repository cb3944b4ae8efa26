//! Models as mathematics: configuration, weights, forward pass.
//!
//! Reading order: [`family`] (one row of facts per architecture; `names` of its tensors), [`config`] (every value with its
//! origin; `tokens` for the ids, `moe` for experts), [`weights`] (safetensors), `loader` (tensors to packed panels),
//! [`decoder`] (the forward pass, watched and joined through `link`; `ffn` for layers of experts).

pub mod config;
pub mod decoder;
pub mod family;
mod ffn;
mod json;
mod link;
mod loader;
mod moe;
mod names;
mod tokens;
pub mod weights;

#[cfg(test)]
mod tests;

pub use config::{DecodeDefaults, Entry, Infill, ModelConfig, Overrides};
pub use decoder::{LoadOptions, Model, Progress, Scratch};
pub use family::Family;
pub use link::{Alone, Link, Operation};
pub use loader::Share;
pub use moe::Moe;
pub use unmask_kernels::WeightType;
pub use weights::TensorInfo;

use crate::request::{BLOCK_SIZE_MAX, WHOLE_BLOCK_SIZE_MAX};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a checkpoint cannot be used.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A file that must be there cannot be read.
    #[error("{path}: {error}", path = .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A JSON file is malformed.
    #[error("{path}: not valid JSON: {error}", path = .path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// Where and why.
        error: serde_json::Error,
    },
    /// The architecture is none of the known ones.
    #[error("{path}: architecture {found} is not supported; known: {known}", path = .path.display())]
    Architecture {
        /// The config.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What is known.
        known: String,
    },
    /// Keys of a JSON file are missing or have values this program cannot honour; all of them.
    #[error("{path}: {list}", path = .path.display(), list = .problems.join("; "))]
    Config {
        /// The file.
        path: PathBuf,
        /// One line each, with the key's name.
        problems: Vec<String>,
    },
    /// A weights file is truncated or corrupt.
    #[error("{path}: not a complete safetensors file: {reason}", path = .path.display())]
    Corrupt {
        /// Which.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// Tensors are missing, unknown, or of another shape than the config says; all of them.
    #[error("{path}: {list}", path = .path.display(), list = .problems.join("; "))]
    Tensors {
        /// The model's folder.
        path: PathBuf,
        /// One line each, with the tensor's name.
        problems: Vec<String>,
    },
    /// The model cannot be shared out among that many ranks; all reasons.
    #[error("tensor-parallel degree {ranks}: {list}", list = .problems.join("; "))]
    Share {
        /// Ranks.
        ranks: usize,
        /// One line each.
        problems: Vec<String>,
    },
    /// The instruction set asked for is not available.
    #[error(transparent)]
    Isa(#[from] unmask_kernels::IsaError),
}

impl LoadError {
    fn config(path: &Path, problems: Vec<String>) -> Self {
        LoadError::Config { path: path.to_owned(), problems }
    }
}

/// How far a row attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// To itself.
    Causal,
    /// To the end of its block.
    Block,
    /// To the end of the sequence.
    Bidirectional,
}

impl Reach {
    /// Name as in configs and flags.
    pub fn name(self) -> &'static str {
        match self {
            Reach::Causal => "causal",
            Reach::Block => "block_causal",
            Reach::Bidirectional => "bidirectional",
        }
    }

    /// Largest block whose rows reach so far (positions).
    pub fn block_size_max(self) -> u32 {
        if self == Reach::Bidirectional { WHOLE_BLOCK_SIZE_MAX } else { BLOCK_SIZE_MAX }
    }

    /// The reach of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "causal" => Reach::Causal,
            "block" | "block_causal" => Reach::Block,
            "bidirectional" => Reach::Bidirectional,
            _ => return None,
        })
    }
}

/// One past the last slot that the row at `position` attends to, in a sequence of `length` rows.
pub fn row_end(reach: Reach, position: u32, block_size: u32, length: u32) -> u32 {
    match reach {
        Reach::Causal => position + 1,
        Reach::Block => (position - position % block_size + block_size).min(length),
        Reach::Bidirectional => length,
    }
}
