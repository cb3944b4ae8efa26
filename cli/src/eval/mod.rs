//! `unmask eval`: how good a served model is, in how few passes, and how fast; on tasks with tests, on lines taken out of
//! functions, and on real code. It needs the cargo feature `train`, which brings the sandbox.
//!
//! - [`questions`]: what is asked and when an answer is right
//! - [`ask`]: the client
//! - [`answers`]: the file that an interrupted evaluation goes on from
//! - [`score`], [`bits`]: numbers
//! - [`report`]: JSON, and the page

pub mod answers;
pub mod ask;
pub mod bits;
pub mod questions;
pub mod report;
pub mod score;

use crate::args::ModelArgs;
use crate::bench::machine::Machine;
use crate::local::{self, Gateway};
use crate::tls::ClientTlsArgs;
use crate::{INTERRUPTED, models, output, raw};
use answers::{Answers, Batch, Header, Part};
use anyhow::{Context, bail, ensure};
use ask::{Asker, Question};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use questions::Case;
use report::{ModelFacts, Report, Stage};
use score::Row;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use unmask_proto::v1::Capabilities;
use unmask_trainer::data::corpus::{self, Document};
use unmask_trainer::measure::{self, Point, Rule};
use unmask_trainer::tasks::Task;

/// Largest block of the usual grid (positions): larger ones need room that not every worker has.
const GRID_BLOCK_SIZE_MAX: u32 = 64;
/// Questions between two lines of the file of answers.
const BATCH: usize = 50;
/// Refused questions that are named, of each part at each point.
const REFUSALS_TOLD_MAX: usize = 8;

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:
  unmask train tasks --held-out --seed 9 --count 1000 --out held-out.jsonl
  unmask eval --tasks held-out.jsonl
  unmask eval --tasks held-out.jsonl --block-sizes 1,8 --thresholds 0.95,0.9 --infill 200 --out target/eval
  unmask eval --endpoint http://127.0.0.1:7700 --tasks HumanEval.jsonl --stop \"\ndef\" --limit 50 --json
  unmask eval --tasks held-out.jsonl --code src/ --logs target/train/edit,target/train/on-policy";

/// `unmask eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Ask this gateway instead of starting one in this process
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Of the gateway's link
    #[command(flatten)]
    pub tls: ClientTlsArgs,
    /// The model, and how it runs in this process
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tasks in HumanEval's format, one JSON object per line
    #[arg(long)]
    pub tasks: PathBuf,
    /// Most tasks to take
    #[arg(long)]
    pub limit: Option<usize>,
    /// Block sizes; 1 is autoregressive. Where absent: those up to 64 that the model was trained for, and 1 where it has
    /// a baseline
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub block_sizes: Vec<u32>,
    /// Confidence thresholds
    #[arg(long, value_delimiter = ',', default_value = "0.95,0.9", value_parser = threshold)]
    pub thresholds: Vec<f32>,
    /// Probabilities with which drafts must be right (`self_speculative`), for models that are their own baseline
    #[arg(long, value_delimiter = ',', value_name = "TAU", value_parser = threshold)]
    pub self_speculative: Vec<f32>,
    /// Requests at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: u16,
    /// An answer ends before this string (may be repeated)
    #[arg(long)]
    pub stop: Vec<String>,
    /// Longest answer in tokens; the model's default where absent
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Also take a line out of the functions of this many tasks, and count those put back exactly
    #[arg(long, default_value_t = 0)]
    pub infill: usize,
    /// Also measure on real code: a folder of Python files, or JSONL with a `text` key
    #[arg(long)]
    pub code: Option<PathBuf>,
    /// Documents of real code at most
    #[arg(long, default_value_t = 200)]
    pub code_limit: usize,
    /// Logs of training to draw: folders of stages, their log.jsonl, or an earlier report.json that drew them
    #[arg(long, value_delimiter = ',')]
    pub logs: Vec<PathBuf>,
    /// Folder of the answers and the report; an interrupted evaluation goes on from it
    #[arg(long, default_value = "target/eval")]
    pub out: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

fn threshold(text: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if value > 0.0 && value <= 1.0 { Ok(value) } else { Err("must be in (0, 1]".into()) }
}

/// Runs the command.
///
/// # Errors
/// Files cannot be read or written, the model is not served, or a request fails.
pub fn run(args: &EvalArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async {
        let work = async {
            match &args.endpoint {
                Some(endpoint) => evaluate(args, local::gateway(endpoint, &args.tls)?).await,
                None => local::with_gateway(&args.model, async |client| evaluate(args, client).await).await,
            }
        };
        tokio::select! {
            ended = work => ended.map(|()| ExitCode::SUCCESS),
            _ = tokio::signal::ctrl_c() => {
                output::note("interrupted: the same command goes on from here");
                Ok(ExitCode::from(INTERRUPTED))
            }
        }
    });
    runtime.shutdown_background();
    ended
}

/// Files of questions.
struct Material {
    tasks: Vec<Task>,
    documents: Vec<Document>,
    digest: String,
}

impl Material {
    fn read(args: &EvalArgs) -> anyhow::Result<Material> {
        let mut tasks = measure::read_tasks(&args.tasks)?;
        tasks.truncate(args.limit.unwrap_or(usize::MAX));
        ensure!(!tasks.is_empty(), "--tasks: {} has none", args.tasks.display());
        let mut documents = match &args.code {
            Some(path) => corpus::read(path, &["py"]).context("--code")?,
            None => Vec::new(),
        };
        documents.truncate(args.code_limit);
        ensure!(args.code.is_none() || !documents.is_empty(), "--code: no file of it is usable source");
        let mut hash = Sha256::new();
        for task in &tasks {
            hash.update(serde_json::to_vec(task)?);
        }
        documents.iter().for_each(|document| hash.update(&document.text));
        let digest = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Material { tasks, documents, digest })
    }
}

async fn evaluate(args: &EvalArgs, client: Gateway) -> anyhow::Result<()> {
    let material = Material::read(args)?;
    let stages = args.logs.iter().map(|path| Stage::read(path)).collect::<anyhow::Result<Vec<_>>>()?.concat();
    let name = if args.endpoint.is_some() { args.model.model.as_deref() } else { None };
    let mut asker = Asker::connect(client, name, usize::from(args.streams)).await?;
    (asker.stop, asker.max_tokens) = (args.stop.clone(), args.max_tokens);
    let descriptor = asker.model.descriptor.clone().unwrap_or_default();
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let header = Header {
        format: "unmask.answers/1".into(),
        model: asker.model.name.clone(),
        numerics_id: descriptor.numerics_id.clone(),
        questions: material.digest.clone(),
        infill: args.infill,
        conditions: conditions(args),
        streams: asker.streams,
        stop: args.stop.clone(),
        max_tokens: args.max_tokens,
    };
    let mut answers = Answers::open(args.out.join("answers.jsonl"), &header)?;
    let capabilities = descriptor.capabilities.unwrap_or_default();
    let points = points(args, &descriptor.block_sizes, capabilities.autoregressive);
    let can_fill = capabilities.infill.is_some() || capabilities.infill_by_masks;
    ensure!(args.infill == 0 || can_fill, "--infill: {} was not trained to fill in", asker.model.name);
    let parts = [
        (Part::Tasks, questions::tasks(&material.tasks)),
        (Part::Infill, gaps(&material.tasks[..args.infill.min(material.tasks.len())], &asker, &capabilities).await?),
        (Part::Code, questions::code(&material.documents)),
    ];
    let mut tables = Vec::new();
    for (part, cases) in &parts {
        let mut rows = Vec::new();
        for &point in &points {
            answer(&asker, &mut answers, *part, cases, point).await?;
            rows.extend(score::row(point, answers.of(*part, point)));
        }
        if !args.json {
            output::out(&table(*part, &rows))?;
        }
        tables.push(rows);
    }
    let [rows, infill, code] = <[Vec<Row>; 3]>::try_from(tables).unwrap_or_default();
    let report = Report {
        format: "unmask.eval/1",
        command: std::iter::once("unmask".to_owned()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" "),
        machine: Machine::here(),
        model: ModelFacts {
            name: asker.model.name,
            numerics_id: descriptor.numerics_id,
            dtype: descriptor.dtype,
            parameters: descriptor.parameters,
        },
        tasks: args.tasks.display().to_string(),
        streams: asker.streams,
        rows,
        infill,
        gaps_given: capabilities.infill_by_masks,
        code,
        bits: if capabilities.autoregressive { bits_of(args, &material.documents)? } else { None },
        profile: profile(args),
        stages,
    };
    let page = report.write(&args.out)?;
    if args.json {
        output::out(&report.json()?)?;
    } else if let Some(bits) = &report.bits {
        output::out(&format!("real code: {:.3} bits per byte ({} bytes)\n", bits.bits_per_byte, bits.bytes))?;
    }
    output::note(&format!("report: {}", page.display()));
    Ok(())
}

/// Lines to put back. Where masks fill a gap, its length is part of the question.
async fn gaps(tasks: &[Task], asker: &Asker, capabilities: &Capabilities) -> anyhow::Result<Vec<Case>> {
    let mut cases = questions::infill(tasks);
    if capabilities.infill_by_masks {
        for case in &mut cases {
            if let Some(line) = case.expected() {
                case.max_tokens = Some(asker.count(line).await?);
            }
        }
    }
    Ok(cases)
}

/// What speed depends on, in words.
fn conditions(args: &EvalArgs) -> String {
    let where_to = args.endpoint.as_deref().unwrap_or("in process");
    format!("{:?}, threads {}, {where_to}", Machine::here(), args.model.threads)
}

/// The baseline once, where the model has one; every other block size at every threshold.
fn points(args: &EvalArgs, trained: &[u32], autoregressive: bool) -> Vec<Point> {
    let usual = trained.iter().copied().filter(|&size| size <= GRID_BLOCK_SIZE_MAX);
    let all: Vec<u32> = autoregressive.then_some(1).into_iter().chain(usual).collect();
    let mut sizes = if args.block_sizes.is_empty() { all } else { args.block_sizes.clone() };
    sizes.sort_unstable();
    sizes.dedup();
    let at = |&size: &u32| match size {
        1 => vec![Point::AUTOREGRESSIVE],
        _ => {
            let filled = args.thresholds.iter().map(|&tau| Point::threshold(size, tau));
            filled.chain(args.self_speculative.iter().map(|&tau| Point::self_speculative(size, tau))).collect()
        }
    };
    sizes.iter().flat_map(at).collect()
}

/// Asks what has no answer yet.
async fn answer(asker: &Asker, answers: &mut Answers, part: Part, cases: &[Case], point: Point) -> anyhow::Result<()> {
    let done = answers.done(part, point);
    let open: Vec<Case> = cases.iter().filter(|case| !done.contains(case.id.as_str())).cloned().collect();
    let bar = ProgressBar::new(cases.len() as u64).with_position((cases.len() - open.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")?);
    bar.set_message(match point.block_size {
        1 => format!("{part:?}: autoregressive"),
        size => format!("{part:?}: {}, block {size}, threshold {}", point.name(), point.threshold),
    });
    let mut refused = 0;
    for cases in open.chunks(BATCH) {
        let questions: Vec<Question> = cases.iter().map(Case::question).collect();
        let start = Instant::now();
        let said = asker.ask(questions, point).await?;
        let seconds = start.elapsed().as_secs_f64();
        for (case, answer) in cases.iter().zip(&said) {
            if let Some(why) = &answer.refused {
                refused += 1;
                if refused <= REFUSALS_TOLD_MAX {
                    bar.suspend(|| output::note(&format!("{} is refused, and counts as wrong: {why}", case.id)));
                }
            }
        }
        let cases = cases.to_vec();
        bar.inc(cases.len() as u64);
        let outcomes = tokio::task::spawn_blocking(move || questions::judge(&cases, said)).await??;
        let Point { block_size, threshold, rule } = point;
        let self_speculative = rule == Rule::SelfSpeculative;
        answers.add(Batch { part, block_size, threshold, self_speculative, seconds, outcomes })?;
    }
    bar.finish_and_clear();
    let mut all = answers.of(part, point).flat_map(|batch| &batch.outcomes).map(|outcome| &outcome.answer.refused);
    if let Some(Some(why)) = all.next()
        && all.all(Option::is_some)
    {
        bail!("all questions are refused: {why}");
    }
    Ok(())
}

/// Needs the model's files.
fn bits_of(args: &EvalArgs, documents: &[Document]) -> anyhow::Result<Option<bits::Bits>> {
    if args.endpoint.is_some() || documents.is_empty() {
        return Ok(None);
    }
    let dir = models::find(args.model.model.as_deref())?;
    let model = raw::load(&dir.to_string_lossy(), args.model.dtype, &args.model.overrides)?;
    let bar = ProgressBar::new(documents.len() as u64);
    let bits = bits::bits(&model, &measure::tokenizer(&dir)?, documents, |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    bits.map(Some)
}

fn profile(args: &EvalArgs) -> Option<serde_json::Value> {
    let dir = models::find(args.model.model.as_deref()).ok().filter(|_| args.endpoint.is_none())?;
    serde_json::from_str(&std::fs::read_to_string(dir.join("profile.json")).ok()?).ok()
}

fn table(part: Part, rows: &[Row]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let what = match part {
        Part::Tasks => "functions with tests",
        Part::Infill => "a line taken out",
        Part::Code => "first lines of real functions (right: it parses)",
    };
    let mut text = format!("{what}, {} each\n", first.n);
    text += "policy            block  threshold   right  (95%)           parses  repeats    TPF  tokens/s\n";
    for row in rows {
        let tau = row.threshold.map_or_else(|| "-".into(), |tau| format!("{tau:.2}"));
        let [low, high] = row.pass_rate_interval.map(|end| 100.0 * end);
        let [right, parses, repeats] = [row.pass_rate, row.parse_rate, row.repetition_rate].map(|share| 100.0 * share);
        let refused = if row.refused > 0 { format!("  ({} refused)", row.refused) } else { String::new() };
        text += &format!(
            "{:17} {:5} {tau:>10}  {right:5.1}%  ({low:5.1} to {high:5.1})  {parses:5.1}%   {repeats:5.1}%  {:5.2}  {:8.0}{refused}\n",
            row.policy, row.block_size, row.tpf, row.tokens_per_s
        );
    }
    text + "\n"
}
