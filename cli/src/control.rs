//! `unmask status`, `drain`, `policy get`, `policy set`: looking at a cluster and steering it, through its controller.

use crate::local::connect;
use crate::tls::ClientTlsArgs;
use crate::{apply, output};
use anyhow::Context;
use clap::{ArgGroup, Args};
use serde_json::{Value, json};
use std::fmt::Write;
use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};
use unmask_proto::controllers::Controllers;
use unmask_proto::v1::admin_service_client::AdminServiceClient;
use unmask_proto::v1::policy::Kind as PolicyKind;
use unmask_proto::v1::policy_intent::{Automatic, FixedSettings, Kind, ModelDefaults};
use unmask_proto::v1::{
    DrainRequest, GetStatusRequest, GetStatusResponse, Member, ModelPolicy, PolicyIntent, PolicyStatus,
    SetPolicyRequest, WorkerState,
};

/// Longest wait for an answer of one replica.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Replicas asked, redirects counted, before the last answer counts.
const ASKED_MAX: usize = 6;

/// Where the controller is.
#[derive(Debug, Args)]
pub struct ControllerAddress {
    /// host:port of the controller, or of its replicas with commas between
    #[arg(long, default_value = "127.0.0.1:7701", value_parser = Controllers::parse)]
    pub controller: Controllers,
    /// Of its link: plain where none is given
    #[command(flatten)]
    pub tls: ClientTlsArgs,
}

/// `unmask status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The controller
    #[command(flatten)]
    pub at: ControllerAddress,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// `unmask drain`
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Worker id, as `unmask status` shows it
    pub worker: String,
    /// The controller
    #[command(flatten)]
    pub at: ControllerAddress,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// `unmask policy set`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("how").required(true).args(["automatic", "defaults", "block_size"]))]
pub struct SetArgs {
    /// Name of the model
    #[arg(long)]
    pub model: String,
    /// The controller
    #[command(flatten)]
    pub at: ControllerAddress,
    /// Choose what commits most tokens per second under the present load, of what was measured
    #[arg(long)]
    pub automatic: bool,
    /// With --automatic: longest time from one committed block of a request to the next, in milliseconds
    #[arg(long, value_name = "MS", requires = "automatic")]
    pub latency_ms: Option<f64>,
    /// With --automatic: least pass rate (lower end of its 95% interval), 0 to 1; default: two points below the best
    #[arg(long, requires = "automatic")]
    pub floor: Option<f64>,
    /// With --automatic: block sizes that may be chosen, 1 being autoregressive; all that were measured where absent
    #[arg(long, value_delimiter = ',', requires = "automatic")]
    pub block_sizes: Vec<u32>,
    /// The model's own settings
    #[arg(long)]
    pub defaults: bool,
    /// This block size; 1 is autoregressive
    #[arg(long)]
    pub block_size: Option<u32>,
    /// With --block-size: confidence threshold
    #[arg(long, requires = "block_size")]
    pub threshold: Option<f64>,
    /// With --threshold: masks draft that far ahead and causal rows decide; a draft must be right with that probability
    #[arg(long, requires = "threshold")]
    pub self_speculative: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

type Client = AdminServiceClient<Channel>;

/// Asks the replica that leads.
pub(crate) async fn ask<T, F: Future<Output = Result<T, Status>>>(
    at: &ControllerAddress,
    mut call: impl FnMut(Client) -> F,
) -> anyhow::Result<T> {
    let (mut controllers, mut last) = (at.controller.clone(), Status::unavailable("not asked"));
    for _ in 0..ASKED_MAX {
        let client = AdminServiceClient::new(connect(controllers.current(), &at.tls)?);
        let late = Status::deadline_exceeded(format!("no answer within {} s", ANSWER_LIMIT.as_secs()));
        match tokio::time::timeout(ANSWER_LIMIT, call(client)).await.unwrap_or(Err(late)) {
            Ok(answer) => return Ok(answer),
            Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => return Err(status.into()),
            Err(status) => {
                last =
                    Status::new(status.code(), format!("{}: {}", controllers.current(), output::with_causes(&status)));
                controllers.failed(&status);
            }
        }
    }
    Err(anyhow::Error::from(last)).context("no controller that leads answers (give its address with --controller)")
}

pub(crate) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn get(at: &ControllerAddress) -> anyhow::Result<GetStatusResponse> {
    block_on(ask(at, |mut client| async move {
        client.get_status(GetStatusRequest {}).await.map(tonic::Response::into_inner)
    }))
}

/// Shows members and policies.
///
/// # Errors
/// No controller answers.
pub fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let status = get(&args.at)?;
    output::out(&if args.json { format!("{:#}\n", to_json(&status)) } else { table(&status) })?;
    Ok(ExitCode::SUCCESS)
}

/// Tells a worker to drain.
///
/// # Errors
/// No controller answers, or none knows the worker.
pub fn drain(args: &DrainArgs) -> anyhow::Result<ExitCode> {
    let request = DrainRequest { worker_id: args.worker.clone() };
    block_on(ask(&args.at, |mut client| {
        let request = request.clone();
        async move { client.drain(request).await }
    }))?;
    if args.json {
        output::out(&format!("{:#}\n", json!({ "worker_id": args.worker, "draining": true })))?;
    } else {
        output::note(&format!("{} finishes what it holds and leaves", args.worker));
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows policies.
///
/// # Errors
/// No controller answers.
pub fn policies(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let status = get(&args.at)?;
    let json = || Value::from(status.policies.iter().map(policy_json).collect::<Vec<_>>());
    output::out(&if args.json { format!("{:#}\n", json()) } else { policies_table(&status) })?;
    Ok(ExitCode::SUCCESS)
}

/// Sets a policy.
///
/// # Errors
/// No controller answers, or it refuses.
pub fn set(args: &SetArgs) -> anyhow::Result<ExitCode> {
    let kind = match args.block_size {
        Some(block_size) => Kind::Fixed(FixedSettings {
            block_size,
            threshold: args.threshold,
            self_speculative: args.self_speculative,
        }),
        None if args.defaults => Kind::ModelDefaults(ModelDefaults {}),
        None => Kind::Automatic(Automatic {
            latency_ms: args.latency_ms,
            floor: args.floor,
            block_sizes: args.block_sizes.clone(),
        }),
    };
    let intent = Some(PolicyIntent { kind: Some(kind) });
    let request = SetPolicyRequest { model: args.model.clone(), intent };
    let answer = block_on(ask(&args.at, |mut client| {
        let request = request.clone();
        async move { client.set_policy(request).await.map(tonic::Response::into_inner) }
    }))?;
    if args.json {
        output::out(&format!("{:#}\n", json!({ "model": args.model, "revision": answer.revision })))?;
    } else {
        output::note(&format!("{}: revision {}", args.model, answer.revision));
    }
    Ok(ExitCode::SUCCESS)
}

fn state(member: &Member) -> &'static str {
    match member.state() {
        WorkerState::Ready => "ready",
        WorkerState::Draining => "draining",
        WorkerState::Spare => "spare",
        WorkerState::Fenced => "fenced",
        WorkerState::Loading | WorkerState::Unspecified => "loading",
    }
}

fn table(status: &GetStatusResponse) -> String {
    let mut text = format!("term {}, routes revision {}\n\n", status.term, status.routes_revision);
    let wide = |of: fn(&Member) -> &str| status.members.iter().map(|member| of(member).len()).max().unwrap_or(0).max(8);
    let (worker, model) = (wide(|member| &member.worker_id), wide(|member| &member.model));
    let _ = writeln!(text, "{:worker$}  {:model$}  epoch  state     requests    rows  heard of", "worker", "model");
    for member in &status.members {
        let heard = if member.connected { "" } else { ", not connected" };
        let _ = writeln!(
            text,
            "{:worker$}  {:model$}  {:5}  {:8}  {:8}  {:6}  {:.1} s ago{heard}",
            member.worker_id,
            member.model,
            member.epoch,
            state(member),
            member.requests,
            member.outstanding_rows,
            member.silent_ms as f64 / 1e3
        );
    }
    if !status.models.is_empty() {
        let _ = write!(text, "\n{}", apply::table(&status.models));
    }
    if !status.policies.is_empty() {
        let _ = write!(text, "\n{}", policies_table(status));
    }
    text
}

fn policies_table(status: &GetStatusResponse) -> String {
    if status.policies.is_empty() {
        return "every model has its own settings (change that with unmask policy set)\n".into();
    }
    let mut text = String::new();
    for policy in &status.policies {
        let in_force = policy.current.as_ref().map_or_else(|| "the model's own settings".into(), setting);
        let revision =
            policy.current.as_ref().map_or_else(String::new, |current| format!(", revision {}", current.revision));
        let taken = policy.current.as_ref().map_or_else(String::new, |current| taken(status, current));
        let _ = writeln!(text, "{}: {in_force}{revision}{taken} ({}; {})", policy.model, asked(policy), policy.why);
    }
    text
}

/// In how many groups requests decode by a policy already.
fn taken(status: &GetStatusResponse, current: &ModelPolicy) -> String {
    let serves = |member: &&Member| member.model == current.model && member.state() == WorkerState::Ready;
    let groups = || status.members.iter().filter(serves);
    let by_it = groups().filter(|member| member.policy_revision >= current.revision).count();
    format!(", taken up by {by_it} of {} groups", groups().count())
}

fn asked(policy: &PolicyStatus) -> String {
    match policy.intent.as_ref().and_then(|intent| intent.kind.as_ref()) {
        Some(Kind::Automatic(Automatic { latency_ms, floor, block_sizes })) => {
            let latency = latency_ms.map_or_else(String::new, |ms| format!(", a block within {ms} ms"));
            let floor = floor.map_or_else(String::new, |floor| format!(", pass rate at least {floor}"));
            let among = match block_sizes.as_slice() {
                [] => String::new(),
                sizes => format!(", block sizes {sizes:?}"),
            };
            format!("automatic{latency}{floor}{among}")
        }
        Some(Kind::Fixed(_)) => "fixed".into(),
        Some(Kind::ModelDefaults(_)) | None => "defaults".into(),
    }
}

fn setting(policy: &ModelPolicy) -> String {
    match policy.policy.and_then(|policy| policy.kind) {
        Some(PolicyKind::Threshold(threshold)) => format!("block {}, threshold {}", policy.block_size, threshold.tau),
        Some(PolicyKind::SelfSpeculative(drafts)) => {
            format!("self_speculative, block {}, threshold {}", policy.block_size, drafts.tau)
        }
        _ => "autoregressive".into(),
    }
}

fn to_json(status: &GetStatusResponse) -> Value {
    let member = |member: &Member| {
        json!({
            "worker_id": member.worker_id, "group_id": member.group_id, "epoch": member.epoch,
            "endpoint": member.endpoint, "model": member.model, "state": state(member), "requests": member.requests,
            "outstanding_rows": member.outstanding_rows, "silent_ms": member.silent_ms,
            "connected": member.connected, "rank": member.rank, "problem": member.problem,
            "loaded_percent": member.loaded_percent, "policy_revision": member.policy_revision,
            "pool": member.capacity.as_ref().map(|capacity| json!({
                "memory_bytes": capacity.memory_bytes, "zone": capacity.zone, "rank_address": capacity.rank_address,
            })),
        })
    };
    json!({
        "term": status.term,
        "routes_revision": status.routes_revision,
        "members": status.members.iter().map(member).collect::<Vec<_>>(),
        "models": status.models.iter().map(apply::model_json).collect::<Vec<_>>(),
        "policies": status.policies.iter().map(policy_json).collect::<Vec<_>>(),
    })
}

fn policy_json(policy: &PolicyStatus) -> Value {
    let current = policy.current.as_ref().map(|current| {
        let (name, threshold) = match current.policy.and_then(|policy| policy.kind) {
            Some(PolicyKind::Threshold(threshold)) => ("threshold", Some(threshold.tau)),
            Some(PolicyKind::SelfSpeculative(drafts)) => ("self_speculative", Some(drafts.tau)),
            _ => ("autoregressive", None),
        };
        json!({
            "revision": current.revision, "policy": name, "block_size": current.block_size, "threshold": threshold,
        })
    });
    json!({
        "model": policy.model, "asked": asked(policy), "current": current, "concurrency": policy.concurrency,
        "why": policy.why,
    })
}
