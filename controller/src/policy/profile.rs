//! A profile as workers and `unmask profile` write it: step time by rows and context. The controller reads it by
//! itself, because it must not link the engine; a test of the command line holds the two together.

use super::ReadError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Tag of the format that is read.
pub const FORMAT: &str = "profile/1";

/// Measured step times, and of what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    format: String,
    /// Name of the model.
    pub model: String,
    /// Digest of everything that decides a result's bits.
    pub numerics_id: String,
    /// Name of the processor.
    pub device: String,
    /// Instruction set.
    pub isa: String,
    /// Threads of the forward pass, of each rank.
    pub threads: usize,
    /// Ranks that share the model.
    #[serde(default = "one")]
    pub ranks: usize,
    /// Type of the weights.
    pub dtype: String,
    /// Type of cached keys and values.
    pub kv_type: String,
    points: Vec<Point>,
}

fn one() -> usize {
    1
}

/// One measured shape of step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Rows of the step, all of them scored.
    pub rows: u32,
    /// Positions each row attends to before its block.
    pub context: u32,
    /// Median time (milliseconds).
    pub ms: f64,
    /// Distance of the quartiles, as a share of the median.
    pub spread: f64,
}

impl Profile {
    /// Reads a profile's JSON.
    ///
    /// # Errors
    /// [`ReadError`]: not JSON, another format, unknown keys, or points that cannot be.
    pub fn parse(json: &str) -> Result<Self, ReadError> {
        let mut profile: Profile =
            serde_json::from_str(json).map_err(|error| ReadError("profile", vec![error.to_string()]))?;
        let mut problems = Vec::new();
        if profile.format != FORMAT {
            problems.push(format!("format: is {:?}, known is {FORMAT:?}", profile.format));
        }
        if profile.points.is_empty() {
            problems.push("points: there are none".into());
        }
        for (i, point) in profile.points.iter().enumerate() {
            if point.rows == 0 || !(point.ms > 0.0 && point.ms.is_finite()) {
                problems.push(format!("points[{i}]: rows and ms must be positive"));
            }
        }
        let shapes: BTreeSet<_> = profile.points.iter().map(|point| (point.context, point.rows)).collect();
        if shapes.len() != profile.points.len() {
            problems.push("points: a shape is there twice".into());
        }
        if !problems.is_empty() {
            return Err(ReadError("profile", problems));
        }
        profile.points.sort_by_key(|point| (point.context, point.rows));
        Ok(profile)
    }

    /// By context, then rows.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// Most rows that were measured.
    pub fn rows_max(&self) -> u32 {
        self.points.iter().map(|point| point.rows).max().unwrap_or(0)
    }

    /// Time of a step (milliseconds) of `rows` rows at `context` positions of context; fractions are averages of
    /// steps. Piecewise linear through the measured points, never falling as rows or context grow within what was
    /// measured, linear beyond it, and never below the smallest.
    pub fn step_ms(&self, rows: f64, context: f64) -> f64 {
        let curves = self.points.chunk_by(|a, b| a.context == b.context);
        let at_rows = curves.map(|curve| {
            let by_rows = curve.iter().map(|point| (f64::from(point.rows), point.ms));
            (f64::from(curve[0].context), interpolate(by_rows, rows))
        });
        interpolate(at_rows, context)
    }
}

/// The line through `points` (ascending in x) at `x`. What noise made fall is lifted to its predecessor.
fn interpolate(points: impl Iterator<Item = (f64, f64)>, x: f64) -> f64 {
    let mut last = None;
    let mut slope = 0.0;
    for (to, y) in points {
        let Some((from, low)) = last else {
            if x <= to {
                return y;
            }
            last = Some((to, y));
            continue;
        };
        let high = y.max(low);
        slope = (high - low) / (to - from);
        if x <= to {
            return low + slope * (x - from);
        }
        last = Some((to, high));
    }
    last.map_or(0.0, |(from, low)| low + slope * (x - from))
}
