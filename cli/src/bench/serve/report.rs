//! What is printed at the end.

use super::summary::{Ended, Latency, Load, Summary};
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
        for note in self.runs.iter().flat_map(notes) {
            text += &format!("\n{note}");
        }
        text + "\n"
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
    ("offered requests/s", |run| format!("{:.2}", run.offered_per_s)),
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
    let bound = |ms: Option<f64>| ms.map_or_else(|| "any time".into(), |ms| format!("{ms} ms"));
    let (first, block) = (bound(run.goodput.slo_first_block_ms), bound(run.goodput.slo_block_ms));
    notes.push(format!("{name}: good is a first block within {first} and each later one within {block}"));
    notes
}
