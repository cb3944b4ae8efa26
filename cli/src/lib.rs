//! The command line: starts services, talks to them, looks at models, trains them. The only crate that links all.
//!
//! It knows every other crate's front door. It does not know how any of them works inside.
//!
//! Modules in reading order:
//! - [`args`]: what may be typed
//! - [`generate`], [`edit`], [`request`], [`resume`], [`screen`]: the client
//! - [`local`], [`up`], [`service`]: services in this process
//! - [`tls`]: certificates of clients and services
//! - [`control`], [`apply`]: looking at a cluster and steering it
//! - [`models`]: where models are found
//! - [`inspect`], [`raw`], [`verify`]: looking at checkpoints and comparing with other implementations
//! - `convert`: models from and to other programs' formats (with the cargo feature `train`)
//! - [`bench`]: measuring speed
//! - [`profile`], [`policy`]: step time, and the block size it implies
//! - [`train`]: making models
//! - `eval`: how good a served model is (with the cargo feature `train`)
//! - [`output`]: results on standard output, errors on standard error

pub mod apply;
pub mod args;
pub mod bench;
pub mod control;
#[cfg(feature = "train")]
pub mod convert;
pub mod edit;
#[cfg(feature = "train")]
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod local;
pub mod models;
pub mod output;
pub mod policy;
pub mod profile;
pub mod raw;
pub mod request;
pub mod resume;
pub mod screen;
pub mod service;
pub mod tls;
pub mod train;
pub mod up;
pub mod verify;

use args::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Exit code of a command ended by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// Parses the command line, runs it, and says how it ended: 0, 1 with one line on standard error, 2 for usage.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,unmask_trainer=info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Generate(args) => generate::run(args),
        Command::Edit(args) => edit::run(&args),
        Command::Up(args) => up::run(args),
        Command::Gateway(args) => service::gateway(args),
        Command::Key => service::key(),
        Command::Controller(args) => service::controller(args),
        Command::Worker(args) => service::worker(args),
        Command::Rank(args) => service::rank(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Logits(args) => raw::logits(&args),
        Command::Decode(args) => raw::decode(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Profile(args) => profile::run(&args),
        Command::Status(args) => control::status(&args),
        Command::Apply(args) => apply::run(&args),
        Command::Drain(args) => control::drain(&args),
        Command::Policy(args) => policy::run(&args),
        #[cfg(feature = "train")]
        Command::Convert(args) => convert::run(&args),
        #[cfg(feature = "train")]
        Command::Eval(args) => eval::run(&args),
        Command::Train(args) => train::run(args),
    }
}
