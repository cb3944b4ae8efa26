//! This build cannot train.

use crate::args::TrainArgs;
use std::process::ExitCode;

/// Says so.
///
/// # Errors
/// Always.
pub fn run(_: TrainArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("this build has no trainer: build with the cargo feature `train`")
}
