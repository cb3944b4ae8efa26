//! `unmask bench`: measurements.
//!
//! - [`roof`]: what the machine can do at most
//! - [`step`], [`shapes`]: one forward pass against that, operation by operation
//! - [`streams`]: many requests in one engine against that
//! - [`serve`]: the whole path under load
//! - [`gateway`]: what the gateway itself costs
//! - [`policy`]: goodput of the automatic block size against every fixed one
//! - `twin`: a model against its autoregressive decoding (with the cargo feature `train`)
//! - [`machine`], [`memory`], [`spread`]: what a measurement ran on, what it held, and what its repeats gave

pub mod gateway;
pub mod machine;
pub mod memory;
pub mod policy;
pub mod roof;
pub mod serve;
pub mod shapes;
pub mod spread;
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
    /// What the gateway itself costs: latency beside the direct way, requests/s, memory per idle stream
    #[command(after_help = gateway::EXAMPLES)]
    Gateway(gateway::GatewayBenchArgs),
    /// Goodput of the automatic block size against every fixed setting of the model's quality.json
    #[command(after_help = policy::EXAMPLES)]
    Policy(policy::PolicyBenchArgs),
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
        BenchCommand::Policy(args) => policy::run(&args),
        BenchCommand::Gateway(args) => gateway::run(&args),
        #[cfg(feature = "train")]
        BenchCommand::Twin(args) => twin::run(&args),
    }
}
