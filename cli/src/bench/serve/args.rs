//! What may be typed after `unmask bench serve`, and the numbers that it takes.

use crate::args::ModelArgs;
use crate::request::PolicyArg;
use crate::tls::ClientTlsArgs;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Streams that may be open at once, at most; also the most `--concurrency-max` takes.
pub const CONCURRENCY_LIMIT: u64 = 4096;
/// Load points of one run, at most.
pub const LOADS_MAX: usize = 16;
/// Requests of one load point, at most.
pub const REQUESTS_MAX: u64 = 200_000;
/// Requests per second of one load point, at most.
const RATE_MAX: f64 = 100_000.0;
/// Longest duration that may be typed.
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// End of the help.
pub const EXAMPLES: &str = "Examples:
  unmask bench serve --rate 4 --duration 20s
  unmask bench serve --rate 2,4,8,16 --slo-first-block-ms 200 --slo-block-ms 100 --json
  unmask bench serve --closed 8,32 --block-size 16 --policy threshold=0.9
  unmask bench serve --closed 8 --policy autoregressive --requests 100
  unmask bench serve --endpoint http://127.0.0.1:7700
  unmask bench serve --rate 8 --arrivals burst --burst-size 16 --prompts humaneval.jsonl

What each number means: docs/benchmarks.md";

/// `unmask bench serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Load this gateway instead of starting a cluster in this process
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Of the gateway's link
    #[command(flatten)]
    pub tls: ClientTlsArgs,
    /// The model, and how it runs in this process
    #[command(flatten)]
    pub model: ModelArgs,
    /// Open loop: requests per second, whatever the answers take. Several are run one after another
    #[arg(long, value_name = "PER_SECOND", value_delimiter = ',', value_parser = rate, default_value = "4")]
    pub rate: Vec<f64>,
    /// Closed loop instead: so many streams, each asking again when it is answered. For throughput, not for latency
    #[arg(long, value_name = "STREAMS", value_delimiter = ',', conflicts_with_all = ["rate", "arrivals", "burst_size"],
          value_parser = clap::value_parser!(u64).range(1..=CONCURRENCY_LIMIT))]
    pub closed: Vec<u64>,
    /// How long requests arrive, such as 500ms, 20s or 2m
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "20s")]
    pub duration: Duration,
    /// Stop after so many requests instead
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..=REQUESTS_MAX))]
    pub requests: Option<u64>,
    /// Open requests at most; an arrival above it is shed and counted, never delayed
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=CONCURRENCY_LIMIT))]
    pub concurrency_max: u64,
    /// How arrivals are spaced
    #[arg(long, value_enum, default_value = "poisson")]
    pub arrivals: Arrivals,
    /// Requests of a burst
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=REQUESTS_MAX))]
    pub burst_size: u64,
    /// Of arrivals, of the choice of prompts and of the requests' own draws
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// JSON objects with a `prompt`, one a line (HumanEval's format); default: a list of function signatures
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Most tokens of a request
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Positions decoded together
    #[arg(long)]
    pub block_size: Option<u32>,
    /// As in `unmask generate`
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<PolicyArg>,
    /// Goodput counts only requests whose first block came within this
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    pub slo_first_block_ms: Option<f64>,
    /// Goodput counts only requests of which no block took longer after the one before
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    pub slo_block_ms: Option<f64>,
    /// Requests before the measurement, one after another
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(0..=REQUESTS_MAX))]
    pub warmup: u64,
    /// A request that takes longer has failed with DEADLINE_EXCEEDED
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s")]
    pub timeout: Duration,
    /// The report as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// How arrivals are spaced; the mean rate is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Arrivals {
    /// Independent of each other, as those of many users are
    Poisson,
    /// Equal gaps
    Uniform,
    /// Many at the same moment, then nothing
    Burst,
}

impl Arrivals {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Arrivals::Poisson => "poisson",
            Arrivals::Uniform => "uniform",
            Arrivals::Burst => "burst",
        }
    }
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse::<f64>().map_err(|error| error.to_string())?;
    if rate > 0.0 && rate <= RATE_MAX { Ok(rate) } else { Err(format!("must be above 0 and at most {RATE_MAX}")) }
}

/// Above 0, at most a day.
pub(in crate::bench) fn milliseconds(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().map_err(|error| error.to_string())?;
    let max = DURATION_MAX.as_secs_f64() * 1e3;
    if value > 0.0 && value <= max { Ok(value) } else { Err(format!("must be above 0 and at most {max}")) }
}

/// A number with its unit: ms, s, m or h.
pub(in crate::bench) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("must be a number with its unit, such as 500ms, 20s or 2m".into()),
    };
    let seconds = number.parse::<f64>().map_err(|error| error.to_string())? * scale;
    let found = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    let fits = !found.is_zero() && found <= DURATION_MAX;
    if fits { Ok(found) } else { Err("must be above 0 and at most 24h".into()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::args::{Cli, Command};
    use crate::bench::BenchCommand;
    use clap::Parser;

    fn parse(flags: &str) -> Result<ServeArgs, clap::Error> {
        let words = ["unmask", "bench", "serve"].into_iter().chain(flags.split_whitespace());
        let Command::Bench(args) = Cli::try_parse_from(words)?.command else { panic!("no bench") };
        let BenchCommand::Serve(args) = args.what else { panic!("not bench serve") };
        Ok(*args)
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("20s"), Ok(Duration::from_secs(20)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["20", "s", "0s", "-1s", "25h", "1e3s", "1..2s", ""] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn loads_are_lists_and_open_or_closed() {
        assert_eq!(parse("").unwrap().rate, [4.0]);
        assert_eq!(parse("--rate 1,2.5 --rate 8").unwrap().rate, [1.0, 2.5, 8.0]);
        assert_eq!(parse("--closed 8,32").unwrap().closed, [8, 32]);
        let bad = ["--rate 0", "--rate nan", "--closed 0", "--closed 8 --rate 2", "--closed 8 --arrivals uniform"];
        for flags in bad.into_iter().chain(["--requests 0", "--requests 3 --duration 1s", "--slo-block-ms 0"]) {
            assert!(parse(flags).is_err(), "{flags}");
        }
    }

    #[test]
    fn every_example_parses() {
        let examples: Vec<&str> =
            EXAMPLES.lines().filter_map(|line| line.trim().strip_prefix("unmask bench serve")).collect();
        assert_eq!(examples.len(), 6);
        for flags in examples {
            parse(flags).unwrap();
        }
    }
}
