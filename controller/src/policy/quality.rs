//! What a model's directory says of its quality: pass rate and tokens per pass for every way to decode that was
//! measured.

use super::ReadError;
use serde::Deserialize;

/// Tag of the format that is read.
pub const FORMAT: &str = "unmask.quality/1";
/// Two-sided 95% of the normal distribution.
const Z_95: f64 = 1.96;
/// How far below the best lower bound a model may decode when nobody says (pass rate): about what some hundred tasks can
/// tell apart.
pub const FLOOR_MARGIN: f64 = 0.02;

/// `quality.json` as written; keys that no policy needs are not looked at.
#[derive(Debug, Deserialize)]
struct RawQuality {
    format: String,
    rows: Vec<RawRow>,
}

#[derive(Debug, Deserialize)]
struct RawRow {
    policy: String,
    block_size: u32,
    threshold: Option<f64>,
    dtype: String,
    n: u32,
    pass_rate: f64,
    tpf: f64,
    rows: Option<f64>,
}

/// Measured ways to decode.
#[derive(Debug, Clone, PartialEq)]
pub struct Quality {
    /// In the order of the file.
    pub rows: Vec<Row>,
}

/// One measured way to decode.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Positions decoded together; 1 is autoregressive.
    pub block_size: u32,
    /// Confidence threshold; `None` is autoregressive.
    pub threshold: Option<f64>,
    /// Masks draft and causal rows decide.
    pub self_speculative: bool,
    /// Type of the weights it was measured with.
    pub dtype: String,
    /// Tasks.
    pub n: u32,
    /// Of them passed.
    pub passes: u32,
    /// Tokens committed per forward pass.
    pub tpf: f64,
    /// Rows of a pass, where they were counted.
    pub rows: Option<f64>,
}

impl Row {
    /// Lower end of the 95% interval of the pass rate (Wilson 1927).
    pub fn pass_rate_low(&self) -> f64 {
        let (n, passes) = (f64::from(self.n), f64::from(self.passes));
        let share = passes / n;
        let centre = share + Z_95 * Z_95 / (2.0 * n);
        let spread = Z_95 * (share * (1.0 - share) / n + Z_95 * Z_95 / (4.0 * n * n)).sqrt();
        ((centre - spread) / (1.0 + Z_95 * Z_95 / n)).max(0.0)
    }

    /// Share of tasks that passed.
    pub fn pass_rate(&self) -> f64 {
        f64::from(self.passes) / f64::from(self.n)
    }

    /// Rows one request has in a step, on average, where they were not counted: its block, and once in the
    /// `block_size / tpf` passes of a block the rows of the block before, whose keys are stored; the masks of a draft, and
    /// the draft of about `tpf` tokens that is checked. Autoregressive is exactly one row.
    pub fn rows_per_step(&self) -> f64 {
        self.rows.unwrap_or(match self.threshold {
            None => 1.0,
            Some(_) => f64::from(self.block_size) + self.tpf,
        })
    }

    /// Passes from one commit to the next: a block's, or one where causal rows decide.
    pub fn passes_per_commit(&self) -> f64 {
        if self.self_speculative { 1.0 } else { f64::from(self.block_size) / self.tpf }
    }
}

impl Quality {
    /// Reads a `quality.json`.
    ///
    /// # Errors
    /// [`ReadError`]: not JSON, another format, no rows, or rows that cannot be.
    pub fn parse(json: &str) -> Result<Self, ReadError> {
        let raw: RawQuality =
            serde_json::from_str(json).map_err(|error| ReadError("quality", vec![error.to_string()]))?;
        let mut problems = Vec::new();
        if raw.format != FORMAT {
            problems.push(format!("format: is {:?}, known is {FORMAT:?}", raw.format));
        }
        if raw.rows.is_empty() {
            problems.push("rows: there are none".into());
        }
        for (i, row) in raw.rows.iter().enumerate() {
            problems.extend(row.problem().map(|problem| format!("rows[{i}]: {problem}")));
        }
        if !problems.is_empty() {
            return Err(ReadError("quality", problems));
        }
        Ok(Self { rows: raw.rows.into_iter().map(RawRow::validated).collect() })
    }

    /// The floor where nobody names one: [`FLOOR_MARGIN`] below the best lower bound.
    pub fn default_floor(&self) -> f64 {
        let best = self.rows.iter().map(Row::pass_rate_low).fold(0.0, f64::max);
        (best - FLOOR_MARGIN).max(0.0)
    }
}

impl RawRow {
    fn problem(&self) -> Option<String> {
        let alone = match self.policy.as_str() {
            "autoregressive" => true,
            "threshold" | "self_speculative" => false,
            other => return Some(format!("policy: {other:?} is not known")),
        };
        if alone != (self.block_size == 1) || alone != self.threshold.is_none() {
            return Some("autoregressive has block_size 1 and no threshold, others have both".into());
        }
        let counts = self.block_size > 0 && self.n > 0 && (0.0..=1.0).contains(&self.pass_rate);
        let speed = self.tpf > 0.0 && self.tpf <= f64::from(self.block_size);
        if self.rows.is_some_and(|rows| !(rows > 0.0 && rows.is_finite())) {
            return Some("rows: must be positive".into());
        }
        if !(counts && speed) {
            return Some("block_size, n and tpf must be positive, pass_rate at most 1, tpf at most block_size".into());
        }
        None
    }

    fn validated(self) -> Row {
        Row {
            block_size: self.block_size,
            threshold: self.threshold,
            self_speculative: self.policy == "self_speculative",
            dtype: self.dtype,
            n: self.n,
            passes: (self.pass_rate * f64::from(self.n)).round() as u32,
            tpf: self.tpf,
            rows: self.rows,
        }
    }
}
