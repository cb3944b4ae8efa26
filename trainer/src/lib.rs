//! Makes the models: reads and generates training documents, trains a block-diffusion decoder on them with candle's
//! autograd, and writes checkpoints that the engine loads.
//!
//! It does not know serving: no sockets, no scheduling.
//!
//! In reading order: `data` and `tasks` (where documents come from), `stream` (their order), `noise` (corruption),
//! `layout` (examples as rows), `ops` (operations with gradients), `model`, `step` (gradients of a batch), `optimizer`,
//! `schedule`, `checkpoint`, `progress`, `config`, `training` (what stages share), `stage_mask` (the first stage),
//! `trajectory` (denoising paths), `order` and `stage_order` (constrained order), `rollout` and `examiner` (what a model
//! writes by itself, and what of it is right) and `stage_on_policy` (the last stage), `measure` and `repair` (quality of
//! the result).

pub mod checkpoint;
pub mod config;
pub mod data;
mod examiner;
pub mod layout;
pub mod measure;
pub mod model;
pub mod noise;
pub mod ops;
pub mod optimizer;
pub mod order;
pub mod progress;
pub mod recipe;
pub mod repair;
pub mod rollout;
pub mod schedule;
pub mod stage_mask;
pub mod stage_on_policy;
pub mod stage_order;
pub mod step;
pub mod stream;
pub mod tasks;
pub mod training;
pub mod trajectory;

pub use config::{MaskStage, RawMaskStage};
pub use stage_mask::train_mask;
pub use training::{Sources, Summary};
