//! `unmask verify`: runs reference data in the format golden/1 and shows where this program differs.
//!
//! [`golden`] reads a folder, [`compute`] runs its cases, [`compare`] says what differs, and this file reports.

pub mod compare;
pub mod compute;
pub mod golden;

use crate::args::Dtype;
use crate::output;
use anyhow::Context;
use clap::Args;
use compare::Verdict;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// `unmask verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Folders of reference data
    #[arg(required = true)]
    pub dirs: Vec<PathBuf>,
    /// Folder to write what was computed to
    #[arg(long)]
    pub out: PathBuf,
    /// The report as JSON
    #[arg(long)]
    pub json: bool,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// Ranks that share the model, threads of this process: 1, 2, 4 or 8
    #[arg(long, default_value_t = 1)]
    pub ranks: usize,
}

/// Runs the command: exit code 1 when anything differs or is not supported.
///
/// # Errors
/// A folder cannot be read, or results cannot be written.
pub fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let mut reports = Vec::new();
    for dir in &args.dirs {
        reports.push(folder(dir, args).with_context(|| dir.display().to_string())?);
    }
    let fine = reports.iter().all(|report| report.unsupported.is_none() && report.differences().next().is_none());
    let text = if args.json { json_report(&reports) } else { table(&reports) };
    output::out(&text)?;
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What came of one folder.
struct Report {
    name: String,
    /// Why nothing could be computed.
    unsupported: Option<String>,
    logits: Vec<(String, Verdict)>,
    worst_logit: f32,
    decode: Vec<(String, Verdict)>,
    tokenizer: Vec<(String, Verdict)>,
}

impl Report {
    fn cases(&self) -> impl Iterator<Item = (&'static str, &(String, Verdict))> {
        let kind = |kind: &'static str, cases: &'_ Vec<(String, Verdict)>| -> Vec<(&'static str, usize)> {
            (0..cases.len()).map(|i| (kind, i)).collect()
        };
        let all =
            [kind("logits", &self.logits), kind("decode", &self.decode), kind("tokenizer", &self.tokenizer)].concat();
        all.into_iter().map(|(kind, i)| {
            let cases = match kind {
                "logits" => &self.logits,
                "decode" => &self.decode,
                _ => &self.tokenizer,
            };
            (kind, &cases[i])
        })
    }

    fn differences(&self) -> impl Iterator<Item = (&'static str, &str, &str)> {
        self.cases().filter_map(|(kind, (id, verdict))| match verdict {
            Verdict::Differs(how) => Some((kind, id.as_str(), how.as_str())),
            _ => None,
        })
    }
}

fn folder(dir: &Path, args: &VerifyArgs) -> anyhow::Result<Report> {
    let name = dir.canonicalize()?.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let golden = golden::read(dir)?;
    let mut report = Report {
        name: name.clone(),
        unsupported: None,
        logits: Vec::new(),
        worst_logit: 0.0,
        decode: Vec::new(),
        tokenizer: Vec::new(),
    };
    let out = args.out.join(&name);
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let actual = match compute::run(dir, &golden, args.dtype, args.ranks) {
        Ok(actual) => actual,
        Err(error) => {
            report.unsupported = Some(format!("{error:#}"));
            return Ok(report);
        }
    };
    for (case, computed) in golden.logits.iter().zip(&actual.logits) {
        let (verdict, worst) = compare::logits(&case.expected, computed);
        report.worst_logit = report.worst_logit.max(worst);
        report.logits.push((case.id.clone(), verdict));
    }
    for (case, computed) in golden.decode.iter().zip(&actual.decode) {
        report.decode.push((case.id.clone(), compare::decode(&case.raw, computed)));
    }
    for (i, (case, computed)) in golden.tokenizer.iter().zip(&actual.tokenizer).enumerate() {
        report.tokenizer.push((format!("tokenizer_{i}"), compare::tokenizer(case, computed)));
    }
    actual.write(&out, &golden)?;
    Ok(report)
}

fn summary(cases: &[(String, Verdict)]) -> String {
    let count = |wanted: fn(&Verdict) -> bool| cases.iter().filter(|(_, verdict)| wanted(verdict)).count();
    let same = count(|v| matches!(v, Verdict::Same));
    let computed = count(|v| matches!(v, Verdict::Computed));
    if computed == cases.len() && computed > 0 {
        return format!("{computed} computed");
    }
    let more = if computed > 0 { format!(", {computed} computed") } else { String::new() };
    format!("{same}/{} exact{more}", cases.len() - computed)
}

fn table(reports: &[Report]) -> String {
    let mut text = format!("{:18} {:26} {:20} tokenizer\n", "folder", "logits (largest error)", "decode");
    for report in reports {
        if let Some(why) = &report.unsupported {
            let _ = writeln!(text, "{:18} not supported: {why}", report.name);
            continue;
        }
        let within = report.logits.iter().filter(|(_, v)| *v == Verdict::Same).count();
        let compared = report.logits.iter().filter(|(_, v)| *v != Verdict::Computed).count();
        let logits = if compared == 0 {
            format!("{} computed", report.logits.len())
        } else {
            format!("{within}/{compared} ({:.1e})", report.worst_logit)
        };
        let _ = writeln!(
            text,
            "{:18} {logits:26} {:20} {}",
            report.name,
            summary(&report.decode),
            summary(&report.tokenizer)
        );
    }
    for report in reports {
        for (kind, id, how) in report.differences() {
            let _ = writeln!(text, "{} {kind} {id}: {how}", report.name);
        }
    }
    text
}

fn json_report(reports: &[Report]) -> String {
    let folders: Vec<Value> = reports
        .iter()
        .map(|report| {
            let cases: Vec<Value> = report
                .cases()
                .map(|(kind, (id, verdict))| match verdict {
                    Verdict::Same => json!({ "kind": kind, "id": id, "verdict": "exact" }),
                    Verdict::Computed => json!({ "kind": kind, "id": id, "verdict": "computed" }),
                    Verdict::Differs(how) => json!({ "kind": kind, "id": id, "verdict": "differs", "how": how }),
                })
                .collect();
            json!({
                "folder": report.name, "unsupported": report.unsupported,
                "largest_logit_error": report.worst_logit, "cases": cases,
            })
        })
        .collect();
    format!("{:#}\n", json!({ "folders": folders }))
}
