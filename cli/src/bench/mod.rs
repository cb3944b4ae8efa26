//! `unmask bench`: measurements.
//!
//! - [`serve`]: the whole path under load
//! - [`machine`]: what a measurement ran on

pub mod machine;
pub mod serve;

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
    /// Serving: latency, throughput and goodput from client to worker
    #[command(after_help = serve::args::EXAMPLES)]
    Serve(serve::args::ServeArgs),
}

/// Runs the command.
///
/// # Errors
/// Those of the measurement.
pub fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        BenchCommand::Serve(args) => serve::run(args),
    }
}
