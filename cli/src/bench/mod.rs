//! `unmask bench`: measurements.
//!
//! - [`roof`]: what the machine can do at most
//! - [`step`], [`shapes`]: one forward pass against that, operation by operation
//! - [`streams`]: many requests in one engine against that
//! - [`serve`]: the whole path under load
//! - `twin`: a model against its autoregressive decoding (with the cargo feature `train`)
//! - [`machine`], [`memory`]: what a measurement ran on, and what it held

pub mod machine;
pub mod memory;
pub mod roof;
pub mod serve;
pub mod shapes;
pub mod step;
pub mod streams;
#[cfg(feature = "train")]
pub mod twin;

use clap::{Args, Subcommand};
use std::process::ExitCode;

/// `unmask bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure
    #[command(subcommand)]
    pub what: BenchCommand,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Measure what this machine can do at most: read bandwidth and arithmetic
    #[command(after_help = roof::EXAMPLES)]
    Roof(roof::RoofArgs),
    /// Measure forward passes against the machine's roof
    #[command(after_help = step::EXAMPLES)]
    Step(step::StepArgs),
    /// Measure many requests in one engine against the bare forward pass of as many rows
    #[command(after_help = streams::EXAMPLES)]
    Streams(streams::StreamsArgs),
    /// Serving: latency, throughput and goodput from client to worker
    #[command(after_help = serve::args::EXAMPLES)]
    Serve(Box<serve::args::ServeArgs>),
    /// Compare a model with autoregressive decoding on held-out tasks: tokens/s, passes, pass rate
    #[cfg(feature = "train")]
    #[command(after_help = twin::EXAMPLES)]
    Twin(twin::TwinArgs),
}

/// Runs the command.
///
/// # Errors
/// Those of the measurement.
pub fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        BenchCommand::Roof(args) => roof::run(&args),
        BenchCommand::Step(args) => step::run(&args),
        BenchCommand::Streams(args) => streams::run(&args),
        BenchCommand::Serve(args) => serve::run(*args),
        #[cfg(feature = "train")]
        BenchCommand::Twin(args) => twin::run(&args),
    }
}
