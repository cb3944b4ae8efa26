//! What an evaluation found, as JSON and as one page that needs nothing else.

use super::bits::Bits;
use super::score::Row;
use crate::bench::machine::Machine;
use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};
use unmask_trainer::progress::Record;

/// The page; the report's JSON is put where the marker is.
const PAGE: &str = include_str!("report.html");
const MARKER: &str = "/*REPORT*/null";
/// Points of a curve at most; more are averaged.
const CURVE_POINTS_MAX: usize = 200;

/// What an evaluation found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// "unmask.eval/1"
    pub format: &'static str,
    /// What was typed.
    pub command: String,
    /// Where the questions were asked from; the model runs there too unless an endpoint was named.
    pub machine: Machine,
    /// The model.
    pub model: ModelFacts,
    /// File of the tasks.
    pub tasks: String,
    /// Requests at once.
    pub streams: usize,
    /// Functions to write, one row per point.
    pub rows: Vec<Row>,
    /// A line taken out of each function.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub infill: Vec<Row>,
    /// Whether it was told how many tokens the line had.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub gaps_given: bool,
    /// First lines of functions of real code: what counts is the parse rate.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub code: Vec<Row>,
    /// Real code, autoregressively.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// The model's measured step times (profile.json), where it has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Value>,
    /// Logs of training.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
}

/// The model, as its gateway describes it.
#[derive(Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct ModelFacts {
    pub name: String,
    pub numerics_id: String,
    pub dtype: String,
    pub parameters: u64,
}

/// One stage's log.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Name of its folder.
    pub name: String,
    /// (step, mean loss of noisy tokens, mean loss of next tokens), nats.
    pub losses: Vec<(f64, f64, f64)>,
    /// Rounds of on-policy training: (step, pass rate, tokens per pass).
    pub rounds: Vec<(usize, f64, f64)>,
}

/// What of an earlier report is drawn again.
#[derive(Deserialize)]
struct Drawn {
    #[serde(default)]
    stages: Vec<Stage>,
}

impl Stage {
    /// Reads `log.jsonl` of a stage, or of its folder; of a report all that it has.
    ///
    /// # Errors
    /// It cannot be read, or a line is malformed (with its number).
    pub fn read(path: &Path) -> anyhow::Result<Vec<Stage>> {
        let file: PathBuf = if path.is_dir() { path.join("log.jsonl") } else { path.to_owned() };
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        if file.extension().is_some_and(|extension| extension == "json") {
            let drawn: Drawn = serde_json::from_str(&text).with_context(|| format!("{}", file.display()))?;
            return Ok(drawn.stages);
        }
        let folder = file.canonicalize().ok().and_then(|file| Some(file.parent()?.file_name()?.to_owned()));
        let mut stage = Stage { name: folder.unwrap_or_default().to_string_lossy().into_owned(), ..Stage::default() };
        let mut losses = Vec::new();
        for (line, text) in text.lines().enumerate() {
            match serde_json::from_str(text).with_context(|| format!("{}:{}", file.display(), line + 1))? {
                Record::Step(step) => losses.push((step.step as f64, step.mask_loss, step.next_loss)),
                Record::Round(round) => stage.rounds.push((round.step, round.pass_rate, round.tpf)),
                Record::Eval(_) => {}
            }
        }
        stage.losses = thinned(&losses);
        Ok(vec![stage])
    }
}

/// Means over equal runs of points.
fn thinned(points: &[(f64, f64, f64)]) -> Vec<(f64, f64, f64)> {
    let mean = |run: &[(f64, f64, f64)]| {
        let (a, b, c) = run.iter().fold((0.0, 0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1, sum.2 + p.2));
        let n = run.len() as f64;
        (a / n, b / n, c / n)
    };
    points.chunks(points.len().div_ceil(CURVE_POINTS_MAX).max(1)).map(mean).collect()
}

impl Report {
    /// Writes `report.json` and `report.html` into `out`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, out: &Path) -> anyhow::Result<PathBuf> {
        let put = |name: &str, text: String| {
            let path = out.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display())).map(|()| path)
        };
        put("report.json", self.json()?)?;
        put("report.html", self.page()?)
    }

    /// As JSON.
    ///
    /// # Errors
    /// Never, in practice: a number is not finite.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    fn page(&self) -> anyhow::Result<String> {
        // A script ends at the first `</script`, also inside a string.
        let json = serde_json::to_string(self)?.replace("</", "<\\/");
        let (before, after) = PAGE.split_once(MARKER).ok_or_else(|| anyhow!("the page has no place for the report"))?;
        Ok(format!("{before}{json}{after}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_stage_is_read_from_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("on-policy");
        std::fs::create_dir(&folder).unwrap();
        let step = |step: usize| {
            format!(
                r#"{{"kind":"step","step":{step},"mask_loss":1.5,"next_loss":0.5,"block_size":4,"rate":0.1,"gradient_norm":1.0,"tokens":9,"tokens_per_second":1.0,"gflops":1.0}}"#
            )
        };
        let round = r#"{"kind":"round","step":2,"pass_rate":0.9,"tpf":3.0,"prompts":9,"kept":8,"kept_tpf":3.1,"passing":[0.9]}"#;
        std::fs::write(folder.join("log.jsonl"), [step(1), step(2), round.into()].join("\n")).unwrap();
        let stages = Stage::read(&folder).unwrap();
        let stage = &stages[0];
        assert_eq!(
            (stage.name.as_str(), stage.losses.len(), &stage.rounds[..]),
            ("on-policy", 2, &[(2, 0.9, 3.0)][..])
        );
        let report = dir.path().join("report.json");
        std::fs::write(&report, serde_json::json!({ "format": "unmask.eval/1", "stages": stages }).to_string())
            .unwrap();
        assert_eq!(Stage::read(&report).unwrap(), stages);
        std::fs::write(folder.join("log.jsonl"), "{").unwrap();
        assert!(format!("{:#}", Stage::read(&folder).unwrap_err()).contains("log.jsonl:1"));
    }

    #[test]
    fn long_curves_are_averaged() {
        let points: Vec<_> = (0..1000).map(|i| (f64::from(i), 1.0, 2.0)).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0]), (200, (2.0, 1.0, 2.0)));
    }

    #[test]
    fn the_page_holds_the_report_and_cannot_be_broken_out_of() {
        let report = Report {
            format: "unmask.eval/1",
            command: "</script><b>".into(),
            machine: Machine::here(),
            model: ModelFacts { name: "m".into(), numerics_id: "n".into(), dtype: "bf16".into(), parameters: 1 },
            tasks: "t".into(),
            streams: 1,
            rows: Vec::new(),
            infill: Vec::new(),
            gaps_given: false,
            code: Vec::new(),
            bits: None,
            profile: None,
            stages: Vec::new(),
        };
        let page = report.page().unwrap();
        assert!(!page.contains("</script><b>") && page.contains(r#""format":"unmask.eval/1""#));
        for foreign in ["src=", "<link", "@import", "fetch(", "https://"] {
            assert!(!page.contains(foreign), "the page needs nothing else than itself: {foreign}");
        }
    }
}
