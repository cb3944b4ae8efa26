//! What is printed at the end.

use super::summary::{Ended, Goodput, Latency, Load, Summary};
use crate::bench::machine::Machine;
use serde::Serialize;
use serde_json::Value;

/// Name of the form of the JSON object.
pub const FORMAT: &str = "unmask.bench-serve/1";
/// Columns of a label.
const LABEL: usize = 24;
/// Columns of a load point.
const COLUMN: usize = 13;

/// All load points and what they have in common.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: &'static str,
    /// Of this binary.
    pub version: &'static str,
    /// Where this process ran, which is the client's side only when `cluster` is an address.
    pub machine: Machine,
    /// `in process`, or the address of the gateway.
    pub cluster: String,
    /// Threads of the forward pass, where known.
    pub threads: Option<usize>,
    /// What was asked.
    pub model: ModelFacts,
    /// Settings that requests were served with.
    pub settings: Value,
    /// `built-in`, or the file.
    pub prompts: String,
    /// Of arrivals, prompts and draws.
    pub seed: u64,
    /// Requests before the measurement.
    pub warmup: u64,
    /// Open requests at most, in an open loop.
    pub concurrency_max: u64,
    /// One per load point.
    pub runs: Vec<Summary>,
}

/// What the gateway says of the model.
#[derive(Debug, Clone, Serialize)]
pub struct ModelFacts {
    /// Its name.
    pub name: String,
    /// Type of its weights.
    pub dtype: String,
    /// Their number.
    pub parameters: u64,
    /// Digest of all that decides its bits.
    pub numerics_id: String,
}

impl Report {
    /// One JSON object in one line.
    ///
    /// # Errors
    /// A number that JSON lacks.
    pub fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    /// For people: a line per number, a column per load point.
    pub fn table(&self) -> String {
        let mut text = self.heading();
        let names: Vec<String> = self.runs.iter().map(|run| name(&run.load)).collect();
        text += &line("", &names);
        for (label, value) in ROWS {
            let cells: Vec<String> = self.runs.iter().map(value).collect();
            text += &line(label, &cells);
        }
        text += "\n";
        for note in self.runs.iter().flat_map(notes).chain(self.runs.first().map(|run| good(&run.goodput))) {
            text += &format!("{note}\n");
        }
        text
    }

    fn heading(&self) -> String {
        let Machine { cpu, cores, isa, build } = &self.machine;
        let cpu = cpu.as_deref().unwrap_or("unknown processor");
        let isa = isa.as_ref().map(|isa| format!(", {isa}")).unwrap_or_default();
        let threads = self.threads.map(|threads| format!(", {threads} threads")).unwrap_or_default();
        let ModelFacts { name, dtype, parameters, .. } = &self.model;
        format!(
            "model     {name}, {dtype}, {:.1}M parameters\nmachine   {cpu}, {cores} cores{isa}{threads}, {build} build\n\
             cluster   {}\nsettings  {}\nprompts   {}, seed {}, {} to warm up\n\n",
            *parameters as f64 / 1e6,
            self.cluster,
            self.settings,
            self.prompts,
            self.seed,
            self.warmup
        )
    }
}

/// A number of a load point, as text.
type Cell = fn(&Summary) -> String;

const ROWS: [(&str, Cell); 32] = [
    ("requests due", |run| run.requests.due.to_string()),
    ("  sent", |run| run.requests.sent.to_string()),
    ("  ok", |run| run.requests.ok.to_string()),
    ("  failed", |run| run.requests.failed.values().map(|failures| failures.count).sum::<u64>().to_string()),
    ("  shed", |run| run.requests.shed.to_string()),
    ("  cut off", |run| run.requests.cut_off.to_string()),
    ("wall time, s", |run| format!("{:.2}", run.wall_s)),
    ("offered requests/s", |run| run.offered_per_s.map_or_else(|| "-".into(), |rate| format!("{rate:.2}"))),
    ("achieved requests/s", |run| format!("{:.2}", run.achieved_per_s)),
    ("committed tokens", |run| run.tokens.committed.to_string()),
    ("  tokens/s", |run| format!("{:.1}", run.tokens.per_s)),
    ("passes", |run| run.tokens.passes.to_string()),
    ("  tokens per pass (TPF)", |run| format!("{:.2}", run.tokens.per_pass)),
    ("open rows/s", |run| format!("{:.0}", run.tokens.open_rows_per_s)),
    ("first block, ms   p50", |run| cell(&run.first_block_ms, |all| all.p50)),
    ("                  p90", |run| cell(&run.first_block_ms, |all| all.p90)),
    ("                  p99", |run| cell(&run.first_block_ms, |all| all.p99)),
    ("                  max", |run| cell(&run.first_block_ms, |all| all.max)),
    ("between blocks    p50", |run| cell(&run.block_ms, |all| all.p50)),
    ("                  p90", |run| cell(&run.block_ms, |all| all.p90)),
    ("                  p99", |run| cell(&run.block_ms, |all| all.p99)),
    ("                  max", |run| cell(&run.block_ms, |all| all.max)),
    ("end to end        p50", |run| cell(&run.end_to_end_ms, |all| all.p50)),
    ("                  p90", |run| cell(&run.end_to_end_ms, |all| all.p90)),
    ("                  p99", |run| cell(&run.end_to_end_ms, |all| all.p99)),
    ("                  max", |run| cell(&run.end_to_end_ms, |all| all.max)),
    ("send lag          p50", |run| cell(&run.send_lag_ms, |all| all.p50)),
    ("                  p99", |run| cell(&run.send_lag_ms, |all| all.p99)),
    ("                  max", |run| cell(&run.send_lag_ms, |all| all.max)),
    ("good requests", |run| run.goodput.requests.to_string()),
    ("  requests/s", |run| format!("{:.2}", run.goodput.requests_per_s)),
    ("  tokens/s", |run| format!("{:.1}", run.goodput.tokens_per_s)),
];

fn cell(latency: &Latency, value: fn(&Latency) -> Option<f64>) -> String {
    value(latency).map_or_else(|| "-".into(), |ms| format!("{ms:.1}"))
}

fn line(label: &str, cells: &[String]) -> String {
    let cells: String = cells.iter().map(|cell| format!("{cell:>COLUMN$}")).collect();
    format!("{label:<LABEL$}{cells}\n")
}

/// Name of a load point.
pub fn name(load: &Load) -> String {
    match load {
        Load::Open { rate, .. } => format!("open {rate}/s"),
        Load::Closed { streams } => format!("closed {streams}"),
    }
}

/// What must be known to read a load point's numbers.
fn notes(run: &Summary) -> Vec<String> {
    let name = name(&run.load);
    let mut notes = Vec::new();
    match run.ended {
        Ended::Complete => {}
        Ended::Interrupted => notes.push(format!("{name}: interrupted; what was measured until then")),
        Ended::SampleLimit => notes.push(format!("{name}: ended early, as many samples as are kept were taken")),
    }
    for (code, failures) in &run.requests.failed {
        notes.push(format!("{name}: {} failed with {code}, first: {}", failures.count, failures.first));
    }
    if matches!(run.load, Load::Closed { .. }) {
        notes.push(format!("{name}: a closed loop; its latencies leave out what later requests would have waited"));
    }
    notes
}

/// What goodput counted.
fn good(goodput: &Goodput) -> String {
    let first = goodput.slo_first_block_ms.map(|ms| format!("its first block came within {ms} ms"));
    let block = goodput.slo_block_ms.map(|ms| format!("each later one came within {ms} ms"));
    let bounds: Vec<String> = first.into_iter().chain(block).collect();
    if bounds.is_empty() {
        return "good: every finished request, for no bounds were given (--slo-first-block-ms, --slo-block-ms)".into();
    }
    format!("good: {}", bounds.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::super::summary::{Recording, Slo};
    use super::*;
    use std::time::Duration;

    fn report() -> Report {
        let run = |load| {
            let span = Duration::from_secs(2);
            let recording = Recording { load, observations: Vec::new(), shed: 3, span, ended: Ended::Interrupted };
            Summary::of(&recording, Slo { first_block: Some(Duration::from_millis(80)), block: None })
        };
        let open = Load::Open { rate: 2.5, arrivals: "poisson" };
        Report {
            format: FORMAT,
            version: "0",
            machine: Machine { cpu: None, cores: 2, isa: None, build: "release" },
            cluster: "http://host".into(),
            threads: None,
            model: ModelFacts {
                name: "m".into(),
                dtype: "bf16".into(),
                parameters: 2_600_000,
                numerics_id: "id".into(),
            },
            settings: Value::Null,
            prompts: "built-in".into(),
            seed: 1,
            warmup: 0,
            concurrency_max: 4,
            runs: vec![run(open), run(Load::Closed { streams: 8 })],
        }
    }

    #[test]
    fn a_column_for_each_load_point_and_what_one_must_know_to_read_it() {
        let table = report().table();
        let lines: Vec<String> =
            table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for line in ["open 2.5/s closed 8", "requests due 3 3", "first block, ms p50 - -"] {
            assert!(lines.iter().any(|found| found == line), "{line}: {table}");
        }
        for note in ["closed 8: a closed loop", "open 2.5/s: interrupted", "good: its first block came within 80 ms\n"]
        {
            assert!(table.contains(note), "{note}: {table}");
        }
        assert!(!table.contains("open 2.5/s: a closed loop"));
    }

    #[test]
    fn json_is_one_line() -> serde_json::Result<()> {
        let text = report().json()?;
        let value: Value = serde_json::from_str(&text)?;
        assert_eq!(text.lines().count(), 1);
        assert_eq!(value["runs"][0]["load"], serde_json::json!({ "loop": "open", "rate": 2.5, "arrivals": "poisson" }));
        assert_eq!(value["runs"][1]["ended"], "interrupted");
        Ok(())
    }
}
