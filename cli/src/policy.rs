//! `unmask policy`: `explain` shows the block size and threshold that measurements imply for a load, and why; `get` and `set` are
//! a running cluster's ([`crate::control`]).

use crate::control::{self, SetArgs, StatusArgs};
use crate::output;
use anyhow::Context;
use clap::{Args, Subcommand};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use unmask_controller::policy::{Candidate, Choice, Load, Profile, Quality, ReadError, Verdict, choose};

/// Positions of context of a request where nobody says: a prompt and half an answer of the tasks that quality is
/// measured on.
pub const TYPICAL_CONTEXT: u32 = 256;

/// `unmask policy`
#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// What to do
    #[command(subcommand)]
    pub command: PolicyCommand,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Show which block size and threshold measurements imply, and why the others lose
    #[command(after_help = "Example:
  unmask policy explain --profile profile.json --quality models/python-tasks-3m/quality.json --concurrency 8 --latency-ms 20")]
    Explain(ExplainArgs),
    /// Show the settings that a cluster's models have
    #[command(after_help = "Example:\n  unmask policy get --controller 127.0.0.1:7701 --json")]
    Get(StatusArgs),
    /// Set how the block size and threshold of a cluster's model are chosen
    #[command(after_help = "Examples:
  unmask policy set --model python-tasks-3m --automatic --latency-ms 20
  unmask policy set --model python-tasks-3m --block-size 8 --threshold 0.95
  unmask policy set --model python-tasks-3m --defaults")]
    Set(SetArgs),
}

/// `unmask policy explain`
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Step times, from `unmask profile`
    #[arg(long, value_name = "FILE")]
    pub profile: PathBuf,
    /// Measured quality, from `unmask train measure`
    #[arg(long, value_name = "FILE")]
    pub quality: PathBuf,
    /// Requests at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub concurrency: u32,
    /// Longest time from one committed block of a request to the next, in milliseconds
    #[arg(long, value_name = "MS")]
    pub latency_ms: Option<f64>,
    /// Least pass rate (lower end of its 95% interval), 0 to 1; default: two points below the best
    #[arg(long)]
    pub floor: Option<f64>,
    /// Positions of context of a request
    #[arg(long, default_value_t = TYPICAL_CONTEXT)]
    pub context: u32,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A file cannot be read, or is not what it should be.
pub fn run(args: &PolicyArgs) -> anyhow::Result<ExitCode> {
    let args = match &args.command {
        PolicyCommand::Explain(args) => args,
        PolicyCommand::Get(args) => return control::policies(args),
        PolicyCommand::Set(args) => return control::set(args),
    };
    let profile = read(&args.profile, Profile::parse)?;
    let quality = read(&args.quality, Quality::parse)?;
    let load = Load {
        concurrency: args.concurrency,
        context: args.context,
        latency_ms: args.latency_ms,
        floor: args.floor.unwrap_or_else(|| quality.default_floor()),
        block_sizes: Vec::new(),
    };
    let choice = choose(&profile, &quality, &load);
    output::out(&if args.json {
        let all = serde_json::json!({ "load": load, "chosen": choice.chosen(), "candidates": choice.candidates });
        format!("{all:#}\n")
    } else {
        explain(&profile, &load, &choice)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T, ReadError>) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

fn explain(profile: &Profile, load: &Load, choice: &Choice) -> String {
    let mut text = format!(
        "{} on {} ({}, {} threads, {} weights)\nasked for: {} at a time, {} positions of context, pass rate at least {}",
        profile.model,
        profile.device,
        profile.isa,
        profile.threads,
        profile.dtype,
        load.concurrency,
        load.context,
        percent(load.floor)
    );
    if let Some(latency) = load.latency_ms {
        let _ = write!(text, ", a block within {latency} ms");
    }
    let _ = match choice.chosen() {
        None => writeln!(text, "\nchosen: none, nothing measured is good and quick enough"),
        Some(chosen) => writeln!(
            text,
            "\nchosen: {}, {:.0} tokens/s, a block every {:.2} ms",
            name(chosen),
            chosen.prediction.tokens_per_s,
            chosen.prediction.block_ms
        ),
    };
    text.push_str(
        "\npolicy            block  threshold    pass (at least)    TPF    rows   step ms  block ms  tokens/s\n",
    );
    for candidate in by_speed(choice) {
        let prediction = &candidate.prediction;
        let _ = writeln!(
            text,
            "{:16}  {:5}  {:>9}  {:>6}   {:>8}  {:5.2}  {:6.1}  {:8.3}  {:8.2}  {:8.0}  {}",
            candidate.policy(),
            candidate.block_size,
            candidate.threshold.map_or_else(|| "-".to_owned(), |tau| format!("{tau:.2}")),
            percent(candidate.pass_rate),
            percent(candidate.pass_rate_low),
            candidate.tpf,
            prediction.rows,
            prediction.step_ms,
            prediction.block_ms,
            prediction.tokens_per_s,
            why(&candidate.verdict)
        );
    }
    let most = choice.candidates.iter().map(|candidate| candidate.prediction.rows).fold(0.0, f64::max);
    if most > f64::from(profile.rows_max()) {
        let _ = writeln!(text, "\nstep times beyond {} rows are extrapolated", profile.rows_max());
    }
    text
}

/// The winner, then what is eligible, then the rest; each by tokens per second.
fn by_speed(choice: &Choice) -> Vec<&Candidate> {
    let class = |candidate: &Candidate| match candidate.verdict {
        Verdict::Chosen => 0,
        Verdict::FewerTokens { .. } => 1,
        Verdict::TooSlow { .. } => 2,
        Verdict::BelowFloor { .. } => 3,
        Verdict::NotAllowed => 4,
        Verdict::OtherWeights => 5,
    };
    let mut sorted: Vec<&Candidate> = choice.candidates.iter().collect();
    sorted
        .sort_by(|a, b| class(a).cmp(&class(b)).then(b.prediction.tokens_per_s.total_cmp(&a.prediction.tokens_per_s)));
    sorted
}

fn name(candidate: &Candidate) -> String {
    match candidate.threshold {
        None => "autoregressive".into(),
        Some(threshold) if candidate.self_speculative => {
            format!("self_speculative, block size {}, threshold {threshold}", candidate.block_size)
        }
        Some(threshold) => format!("block size {}, threshold {threshold}", candidate.block_size),
    }
}

fn why(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Chosen => "chosen".into(),
        Verdict::OtherWeights => "measured with other weights".into(),
        Verdict::BelowFloor { floor } => format!("pass rate may be below {}", percent(*floor)),
        Verdict::NotAllowed => "block size is not allowed".into(),
        Verdict::TooSlow { latency_ms } => format!("a block takes over {latency_ms} ms"),
        Verdict::FewerTokens { .. } => "fewer tokens/s".into(),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}
