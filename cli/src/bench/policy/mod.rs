//! `unmask bench policy`: goodput of the automatic block size against every fixed setting that is good enough, under the same loads
//! and with the same prompts, in one cluster in this process.
//!
//! [`report`] compares and prints; this file measures.

pub mod report;

use super::machine::Machine;
use super::serve::args::{CONCURRENCY_LIMIT, duration, milliseconds};
use super::serve::load;
use super::serve::progress::Progress;
use super::serve::prompts::Prompts;
use super::serve::schedule::Extent;
use super::serve::summary::{Load, Slo, Summary};
use super::serve::target::{Questions, Target};
use crate::args::ModelArgs;
use crate::local::{Cluster, Listeners, connect};
use crate::policy::TYPICAL_CONTEXT;
use crate::tls::ClientTlsArgs;
use crate::{models, output};
use anyhow::{Context, bail, ensure};
use clap::Args;
use report::{Compared, FORMAT, InForce, Report, Setting, Side};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use unmask_controller::policy::{Candidate, Choice, Load as PolicyLoad, Profile, Quality, Verdict, choose};
use unmask_proto::v1::admin_service_client::AdminServiceClient;
use unmask_proto::v1::policy::{Autoregressive, Kind, SelfSpeculative, Threshold};
use unmask_proto::v1::policy_intent::{Automatic, Kind as Intent};
use unmask_proto::v1::{Decoding, GetStatusRequest, Policy, PolicyIntent, SetPolicyRequest};

/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:
  unmask bench policy
  unmask bench policy --closed 1,8,32 --slo-block-ms 20 --repeats 9 --json

What each number means: docs/benchmarks.md";

/// `unmask bench policy`
#[derive(Debug, Args)]
pub struct PolicyBenchArgs {
    /// The model, and how it runs in this process; its quality.json names the settings
    #[command(flatten)]
    pub model: ModelArgs,
    /// Streams at a time, each asking again when it is answered; several are run one after another
    #[arg(long, value_name = "STREAMS", value_delimiter = ',', default_value = "1,4,16,64",
          value_parser = clap::value_parser!(u64).range(1..=CONCURRENCY_LIMIT))]
    pub closed: Vec<u64>,
    /// How long each setting is measured in each repeat
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "3s")]
    pub duration: Duration,
    /// How long a load lasts before it is measured: the policy follows it within some ten seconds
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "12s")]
    pub settle: Duration,
    /// How often every setting is measured, in turn
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub repeats: u32,
    /// Good is a request whose first block came within this
    #[arg(long, value_name = "MS", value_parser = milliseconds, default_value = "100")]
    pub slo_first_block_ms: f64,
    /// And each later one within this of the one before; the automatic policy is told so
    #[arg(long, value_name = "MS", value_parser = milliseconds, default_value = "50")]
    pub slo_block_ms: f64,
    /// Least pass rate (lower end of its 95% interval), 0 to 1; default: two points below the best
    #[arg(long)]
    pub floor: Option<f64>,
    /// JSON objects with a `prompt`, one a line; default: a list of function signatures
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Most tokens of a request
    #[arg(long, default_value_t = 64)]
    pub max_tokens: u32,
    /// Of the choice of prompts and of the requests' own draws
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The report as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// The model has no measured quality, the cluster does not start, or a request fails.
pub fn run(args: &PolicyBenchArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let report = runtime.block_on(bench(args));
    runtime.shutdown_background();
    let report = report?;
    output::out(&if args.json { format!("{}\n", serde_json::to_string(&report)?) } else { report.table() })?;
    Ok(ExitCode::SUCCESS)
}

async fn bench(args: &PolicyBenchArgs) -> anyhow::Result<Report> {
    let folder = models::find(args.model.model.as_deref())?;
    let quality = read(&folder.join("quality.json"), Quality::parse)?;
    let data = tempfile::tempdir().context("cannot make a temporary folder")?;
    // Measured anew: what an earlier run found is of another moment of the machine.
    let profiles = data.path().join("profiles");
    let listeners = Listeners::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).await?;
    let store = data.path().join("store");
    let mut cluster = Cluster::start_profiled(listeners, &args.model, store, Some(profiles.clone()))?;
    let mut client = cluster.ready().await?;
    let served = client.list_models(unmask_proto::v1::ListModelsRequest {}).await?.into_inner().models;
    let model = served.first().context("no model is served")?.name.clone();
    let bench = Bench { args, quality, profile: profile(&profiles)?, cluster, model };
    bench.ask_for_automatic().await?;
    let mut compared = Vec::new();
    for &streams in &args.closed {
        compared.push(bench.compare(streams).await?);
    }
    let report = Report {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::here(),
        model: bench.model.clone(),
        slo_first_block_ms: args.slo_first_block_ms,
        slo_block_ms: args.slo_block_ms,
        floor: bench.floor(),
        duration_s: args.duration.as_secs_f64(),
        repeats: args.repeats,
        seed: args.seed,
        loads: compared,
    };
    if let Err(error) = bench.cluster.stop().await {
        // What was measured stands.
        output::error(&error);
    }
    Ok(report)
}

fn read<T, E: std::error::Error + Send + Sync + 'static>(
    path: &Path,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

/// The profile that the worker measured.
fn profile(folder: &Path) -> anyhow::Result<Profile> {
    for file in std::fs::read_dir(folder).context("the worker measured no step times")? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            return read(&path, Profile::parse);
        }
    }
    bail!("the worker measured no step times")
}

struct Bench<'a> {
    args: &'a PolicyBenchArgs,
    quality: Quality,
    profile: Profile,
    cluster: Cluster,
    model: String,
}

impl Bench<'_> {
    fn floor(&self) -> f64 {
        self.args.floor.unwrap_or_else(|| self.quality.default_floor())
    }

    fn admin(&self) -> anyhow::Result<AdminServiceClient<tonic::transport::Channel>> {
        Ok(AdminServiceClient::new(connect(&self.cluster.controller.to_string(), &ClientTlsArgs::default())?))
    }

    async fn ask_for_automatic(&self) -> anyhow::Result<()> {
        let (latency_ms, floor) = (Some(self.args.slo_block_ms), Some(self.floor()));
        let automatic = Automatic { latency_ms, floor, block_sizes: Vec::new() };
        let intent = Some(PolicyIntent { kind: Some(Intent::Automatic(automatic)) });
        self.admin()?.set_policy(SetPolicyRequest { model: self.model.clone(), intent }).await?;
        Ok(())
    }

    /// What the automatic policy has in force.
    async fn in_force(&self) -> anyhow::Result<InForce> {
        let status = self.admin()?.get_status(GetStatusRequest {}).await?.into_inner();
        let policy = status.policies.into_iter().find(|policy| policy.model == self.model);
        let policy = policy.context("the controller has no policy of the model")?;
        let setting = policy.current.as_ref().map(|current| match current.policy.and_then(|policy| policy.kind) {
            Some(Kind::Threshold(Threshold { tau })) => Setting::blocks(current.block_size, tau),
            Some(Kind::SelfSpeculative(SelfSpeculative { tau })) => {
                Setting { self_speculative: true, ..Setting::blocks(current.block_size, tau) }
            }
            _ => Setting { block_size: 1, threshold: None, self_speculative: false },
        });
        let revision = policy.current.map_or(0, |current| current.revision);
        Ok(InForce { setting, revision, concurrency: policy.concurrency, why: policy.why })
    }

    /// What the profile promises of every measured setting.
    fn promised(&self, streams: u64) -> Choice {
        let load = PolicyLoad {
            concurrency: streams as u32,
            context: TYPICAL_CONTEXT,
            latency_ms: Some(self.args.slo_block_ms),
            floor: self.floor(),
            block_sizes: Vec::new(),
        };
        choose(&self.profile, &self.quality, &load)
    }

    async fn target(&self, setting: Option<Setting>, streams: u64) -> anyhow::Result<Target> {
        let policy = setting.map(|setting| match setting.threshold {
            Some(tau) if setting.self_speculative => Kind::SelfSpeculative(SelfSpeculative { tau }),
            Some(tau) => Kind::Threshold(Threshold { tau }),
            None => Kind::Autoregressive(Autoregressive {}),
        });
        let decoding = Decoding {
            max_tokens: Some(self.args.max_tokens),
            block_size: setting.filter(|setting| setting.threshold.is_some()).map(|setting| setting.block_size),
            policy: policy.map(|kind| Policy { kind: Some(kind) }),
            ..Decoding::default()
        };
        let prompts = self.args.prompts.as_deref().map_or_else(|| Ok(Prompts::built_in()), Prompts::read)?;
        let questions = Questions { seed: self.args.seed, prompts, decoding, timeout: TIMEOUT };
        Target::connect(
            &format!("http://{}", self.cluster.gateway),
            &ClientTlsArgs::default(),
            None,
            streams,
            questions,
        )
        .await
    }

    /// One load: every setting in turn, in every repeat.
    async fn compare(&self, streams: u64) -> anyhow::Result<Compared> {
        let good_enough = |verdict: &Verdict| !matches!(verdict, Verdict::BelowFloor { .. } | Verdict::OtherWeights);
        let promised = self.promised(streams);
        let mut sides = vec![Side::new(None, None)];
        for candidate in promised.candidates.iter().filter(|candidate| good_enough(&candidate.verdict)) {
            let threshold = candidate.threshold.map(|threshold| threshold as f32);
            let Candidate { block_size, self_speculative, .. } = *candidate;
            let setting = Setting { block_size, threshold, self_speculative };
            sides.push(Side::new(Some(setting), Some(candidate.prediction.tokens_per_s)));
        }
        ensure!(sides.len() > 1, "quality.json has no setting of these weights that is good enough");
        let mut targets = Vec::new();
        for side in &sides {
            targets.push(self.target(side.setting, streams).await?);
        }
        self.measure(&targets[0], streams, self.args.settle, &format!("{streams} streams, settling")).await?;
        let before = self.in_force().await?;
        for repeat in 1..=self.args.repeats {
            for (side, target) in sides.iter_mut().zip(&targets) {
                let name = format!("{streams} streams, {}, {repeat} of {}", side.name(), self.args.repeats);
                side.take(&self.measure(target, streams, self.args.duration, &name).await?);
            }
        }
        let after = self.in_force().await?;
        Ok(Compared::of(streams, sides, before, after))
    }

    async fn measure(&self, target: &Target, streams: u64, time: Duration, name: &str) -> anyhow::Result<Summary> {
        let never = CancellationToken::new();
        let progress = Progress::new(name.to_owned(), None);
        let (load, extent) = (Load::Closed { streams }, Extent::Duration(time));
        let recording = load::closed(target, load, streams as usize, extent, &never, progress).await;
        let bound = |ms: f64| Some(Duration::from_secs_f64(ms / 1e3));
        let slo = Slo { first_block: bound(self.args.slo_first_block_ms), block: bound(self.args.slo_block_ms) };
        let summary = Summary::of(&recording, slo);
        if let Some((code, failures)) = summary.requests.failed.first_key_value() {
            bail!("{name}: {} requests failed with {code}, the first: {}", failures.count, failures.first);
        }
        ensure!(summary.requests.ok > 0, "{name}: no request was answered in {time:?}");
        Ok(summary)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::args::Cli;
    use clap::Parser;

    #[test]
    fn every_example_parses() {
        let examples: Vec<&str> = EXAMPLES.lines().filter(|line| line.trim().starts_with("unmask ")).collect();
        assert_eq!(examples.len(), 2);
        for example in examples {
            Cli::try_parse_from(example.split_whitespace()).unwrap();
        }
    }
}
