//! One request's life and one denoising step: plan -> forward -> decode -> commit.
//!
//! It knows models as mathematics, blocks, key/value pages and decoding policies. It does not know about
//! networks, protobuf, text, async or clocks: whoever owns an [`Engine`] calls [`Engine::step`] in a loop.
//!
//! Modules in reading order:
//! - [`request`]: what may be asked, the states of a request, the events it causes
//! - [`opening`]: how an output must begin
//! - [`policy`]: the closed set of decoding rules, one pure function each
//! - [`block`]: the open block and how a policy's choice changes it
//! - [`draw`], [`sample`]: counter-based randomness, top-k and top-p
//! - [`prefix`], [`pages`]: names of pages by their content; who holds which
//! - [`plan`]: which rows enter a step
//! - [`pulse`]: signs of life for a watchdog
//! - [`step`]: the engine, and the hot loop
//! - [`model`]: configuration, weights, forward pass
//! - [`profile`]: step time by rows and context
//! - [`group`]: one model over several ranks
//! - [`failpoints`]: a bug for a simulation to find
//! - [`raw`]: token-level access for comparison with other implementations

pub mod block;
pub mod draw;
pub mod failpoints;
pub mod group;
pub mod model;
pub mod opening;
pub mod pages;
pub mod plan;
pub mod policy;
pub mod prefix;
pub mod profile;
pub mod pulse;
pub mod raw;
pub mod request;
pub mod sample;
pub mod step;

pub use model::{LoadError, LoadOptions, Model, ModelConfig, Reach};
pub use policy::Policy;
pub use pulse::Pulse;
pub use request::{BlockTrace, Event, Invalid, Manner, Reason, Refusal, Request, RequestId, Sampling, Settings};
pub use step::{Engine, Limits, Load, StepReport};
