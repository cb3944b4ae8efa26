//! `unmask apply`: what is wanted of models, from files; and how it stands with that.

use crate::control::{ControllerAddress, ask, block_on};
use crate::output;
use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt::Write;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use unmask_engine::model::{ModelConfig, Overrides, Share};
use unmask_proto::v1::policy_intent::{Automatic, Kind};
use unmask_proto::v1::{
    ApplyRequest, DesiredModel, GetStatusRequest, GroupState, GroupStatus, ModelStatus, PolicyIntent,
};

/// Examples for the help.
pub const EXAMPLES: &str = "Example:
  unmask apply -f model.yaml --wait

A file says what is wanted of one model, for workers that were started with --pool:
  name: python-tasks-3m
  path: /models/python-tasks-3m   # the model's folder, the same on every worker
  replicas: 2                     # groups; 0 ends them all
  tensor_parallel: 1              # ranks of a group: 1, 2, 4 or 8
  spares: 1                       # workers to keep free for ranks that are lost
  dtype: bf16                     # f32, bf16 or int8
  memory: 2GiB                    # least memory of a rank's worker
  policy:                         # block size and threshold by load (unmask policy)
    latency_ms: 20
    quality_floor: 0.9
    block_sizes: [4, 8, 16]";

/// Longest file (bytes).
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Degrees at which models can be shared out, where they can.
const DEGREES: [usize; 4] = [1, 2, 4, 8];
/// Between looks with `--wait`.
const LOOK: Duration = Duration::from_millis(200);

/// `unmask apply`
#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// What is wanted of a model, as YAML; - reads standard input
    #[arg(short = 'f', long = "file", required = true)]
    pub files: Vec<PathBuf>,
    /// The controller
    #[command(flatten)]
    pub at: ControllerAddress,
    /// Wait until all groups serve
    #[arg(long)]
    pub wait: bool,
    /// With --wait: give up after so many seconds
    #[arg(long, requires = "wait", default_value_t = 600)]
    pub limit_s: u64,
    /// Print what became of it as JSON
    #[arg(long)]
    pub json: bool,
}

/// A file as written. Unknown keys are errors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    name: Option<String>,
    path: Option<String>,
    replicas: Option<u32>,
    tensor_parallel: Option<u32>,
    spares: Option<u32>,
    dtype: Option<String>,
    memory: Option<Bytes>,
    policy: Option<RawPolicy>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Bytes {
    Number(u64),
    Text(String),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    latency_ms: Option<f64>,
    quality_floor: Option<f64>,
    #[serde(default)]
    block_sizes: Vec<u32>,
}

/// Reads a file; the controller checks the values.
fn parse(text: &str) -> anyhow::Result<DesiredModel> {
    let raw: RawModel = serde_saphyr::from_str(text)?;
    let (mut problems, memory) = (Vec::new(), raw.memory.map_or(Ok(0), |memory| memory.read()));
    let mut missing = |key: &str, there: bool| {
        if !there {
            problems.push(format!("{key}: is missing"));
        }
    };
    missing("name", raw.name.is_some());
    missing("path", raw.path.is_some() || raw.replicas == Some(0));
    problems.extend(memory.as_ref().err().cloned());
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    let policy = raw.policy.map(|RawPolicy { latency_ms, quality_floor, block_sizes }| {
        let automatic = Automatic { latency_ms, floor: quality_floor, block_sizes };
        PolicyIntent { kind: Some(Kind::Automatic(automatic)) }
    });
    Ok(DesiredModel {
        name: raw.name.unwrap_or_default(),
        path: raw.path.unwrap_or_default(),
        replicas: raw.replicas.unwrap_or(1),
        tensor_parallel: raw.tensor_parallel.unwrap_or(1),
        spares: raw.spares.unwrap_or(0),
        dtype: raw.dtype.unwrap_or_else(|| "bf16".into()),
        memory_bytes: memory.unwrap_or_default(),
        policy,
    })
}

impl Bytes {
    /// A number of bytes, or one with a binary or decimal unit.
    fn read(self) -> Result<u64, String> {
        match self {
            Bytes::Number(bytes) => Ok(bytes),
            Bytes::Text(text) => parse_bytes(&text).map_err(|problem| format!("memory: {problem}")),
        }
    }
}

/// Bytes, with a unit or without: `2GiB`, `500MB`, `1024`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => 0,
    };
    let bytes = digits.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    bytes.filter(|_| unit > 0).ok_or_else(|| format!("`{text}` is no size: give bytes, or 2GiB, 500MB"))
}

fn read(path: &Path) -> anyhow::Result<DesiredModel> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin().take(FILE_BYTES_MAX).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
    };
    read.with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

/// Whether the model can be shared out among so many ranks, where its folder is on this machine too. What is not here, or
/// cannot be read, is for the workers to say.
fn check_degree(model: &DesiredModel) -> anyhow::Result<()> {
    let (wanted, dir) = (model.tensor_parallel as usize, Path::new(&model.path));
    // The controller refuses other degrees.
    if model.replicas == 0 || !DEGREES.contains(&wanted) || !dir.join("config.json").is_file() {
        return Ok(());
    }
    let Ok(config) = ModelConfig::load(dir, &Overrides::default()) else { return Ok(()) };
    let problems = |ranks| Share { rank: 0, ranks }.problems(&config);
    let can: Vec<String> =
        DEGREES.into_iter().filter(|ranks| problems(*ranks).is_empty()).map(|n| n.to_string()).collect();
    let why = problems(wanted);
    ensure!(
        why.is_empty(),
        "tensor_parallel: is {wanted}, {} can have {}: {}",
        model.path,
        can.join(", "),
        why.join("; ")
    );
    Ok(())
}

/// Says what is wanted; all files are read before the first is sent.
///
/// # Errors
/// A file is not what it should be; no controller answers, or it refuses; with `--wait`, the limit passes.
pub fn run(args: &ApplyArgs) -> anyhow::Result<ExitCode> {
    let mut models = Vec::new();
    for path in &args.files {
        let model = read(path)?;
        check_degree(&model).with_context(|| path.display().to_string())?;
        models.push(model);
    }
    for model in &models {
        let answer = block_on(ask(&args.at, |mut client| {
            let request = ApplyRequest { model: Some(model.clone()) };
            async move { client.apply(request).await.map(tonic::Response::into_inner) }
        }))?;
        output::note(&format!("{}: revision {}", model.name, answer.revision));
    }
    let ours = |status: &ModelStatus| {
        status.desired.as_ref().is_some_and(|desired| models.iter().any(|model| model.name == desired.name))
    };
    let look = || Ok::<_, anyhow::Error>(get(&args.at)?.into_iter().filter(ours).collect::<Vec<_>>());
    let status = if args.wait { wait(look, Duration::from_secs(args.limit_s))? } else { look()? };
    let json = || Value::from(status.iter().map(model_json).collect::<Vec<_>>());
    output::out(&if args.json { format!("{:#}\n", json()) } else { table(&status) })?;
    Ok(ExitCode::SUCCESS)
}

fn get(at: &ControllerAddress) -> anyhow::Result<Vec<ModelStatus>> {
    let status = block_on(ask(at, |mut client| async move {
        client.get_status(GetStatusRequest {}).await.map(tonic::Response::into_inner)
    }))?;
    Ok(status.models)
}

fn wait(look: impl Fn() -> anyhow::Result<Vec<ModelStatus>>, limit: Duration) -> anyhow::Result<Vec<ModelStatus>> {
    let begun = Instant::now();
    let mut said = String::new();
    loop {
        let status = look()?;
        let pending = status.iter().flat_map(|model| &model.groups).find(|group| group.state() != GroupState::Serving);
        let Some(group) = pending else { return Ok(status) };
        let state = format!("{}: {}{}", group.group_id, name(group), because(group));
        if begun.elapsed() > limit {
            bail!("not all groups serve after {} s: {state}", limit.as_secs());
        }
        if said != state {
            output::note(&state);
            said = state;
        }
        std::thread::sleep(LOOK);
    }
}

fn name(group: &GroupStatus) -> &'static str {
    match group.state() {
        GroupState::Pending | GroupState::Unspecified => "pending",
        GroupState::Forming => "forming",
        GroupState::Serving => "serving",
        GroupState::Fenced => "fenced",
    }
}

fn because(group: &GroupStatus) -> String {
    if group.why.is_empty() { String::new() } else { format!(" ({})", group.why) }
}

/// What is wanted of models, and what became of it.
pub fn table(models: &[ModelStatus]) -> String {
    let mut text = String::new();
    for model in models {
        let desired = model.desired.clone().unwrap_or_default();
        let _ = writeln!(
            text,
            "{}: {} of {} groups of {} serve, revision {}",
            desired.name,
            model.groups.iter().filter(|group| group.state() == GroupState::Serving).count(),
            desired.replicas,
            desired.tensor_parallel,
            model.revision
        );
        for group in &model.groups {
            let (state, why) = (name(group), because(group));
            let _ = writeln!(
                text,
                "  {}  {state:7}  epoch {}  {}{why}",
                group.group_id,
                group.epoch,
                group.ranks.join(", ")
            );
        }
        if desired.spares > 0 {
            let short = if model.short.is_empty() { String::new() } else { format!(" ({})", model.short) };
            let _ = writeln!(text, "  spares: {}{short}", model.spares.join(", "));
        }
    }
    text
}

/// The same as JSON.
pub fn model_json(model: &ModelStatus) -> Value {
    let desired = model.desired.clone().unwrap_or_default();
    let group = |group: &GroupStatus| {
        json!({
            "group_id": group.group_id, "epoch": group.epoch, "state": name(group), "ranks": group.ranks,
            "why": group.why,
        })
    };
    json!({
        "name": desired.name, "path": desired.path, "replicas": desired.replicas,
        "tensor_parallel": desired.tensor_parallel, "dtype": desired.dtype, "memory_bytes": desired.memory_bytes,
        "revision": model.revision, "groups": model.groups.iter().map(group).collect::<Vec<_>>(),
        "spares": model.spares, "spares_wanted": desired.spares, "short": model.short,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_read_with_defaults_and_units() {
        let model = parse(
            "name: m\npath: /m  # where\nreplicas: 2\nmemory: 2GiB\npolicy:\n  latency_ms: 20\n  block_sizes: [4, 8]\n",
        );
        let model = model.unwrap();
        assert_eq!((model.replicas, model.tensor_parallel, model.memory_bytes), (2, 1, 2 << 30));
        let automatic = Automatic { latency_ms: Some(20.0), floor: None, block_sizes: vec![4, 8] };
        assert_eq!(model.policy.unwrap().kind, Some(Kind::Automatic(automatic)));
        assert_eq!(parse("name: m\npath: /m\nmemory: 4096\n").unwrap().memory_bytes, 4096);
        assert!(parse("name: m\nreplicas: 0\n").is_ok());
    }

    #[test]
    fn a_degree_that_the_model_cannot_have_is_refused_before_it_is_sent() {
        // Four heads over two of keys and values.
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/sdar");
        let model = |tensor_parallel| DesiredModel {
            path: path.into(),
            replicas: 1,
            tensor_parallel,
            ..DesiredModel::default()
        };
        assert!(check_degree(&model(4)).is_ok());
        let refused = check_degree(&model(8)).unwrap_err().to_string();
        assert!(refused.starts_with("tensor_parallel: is 8") && refused.contains("can have 1, 2, 4: "), "{refused}");
        let elsewhere = DesiredModel { path: "/nowhere".into(), ..model(8) };
        assert!(check_degree(&elsewhere).is_ok() && check_degree(&DesiredModel { replicas: 0, ..model(8) }).is_ok());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_key() {
        let unknown = parse("name: m\npath: /m\nreplica: 2\n").unwrap_err();
        assert!(format!("{unknown:#}").contains("replica"), "{unknown:#}");
        let several = parse("memory: 2 lots\n").unwrap_err().to_string();
        for key in ["name", "path", "memory"] {
            assert!(several.contains(key), "{key}: {several}");
        }
    }
}
