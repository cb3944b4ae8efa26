//! From answers to numbers.

use super::answers::Batch;
use serde::Serialize;
use unmask_trainer::measure::{Point, wilson};

/// Lines that stand this often in succession are a repetition.
const REPEATED_LINES: usize = 3;

/// All answers of one part at one point.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Name of the policy.
    pub policy: &'static str,
    /// Positions decoded together.
    pub block_size: u32,
    /// Confidence threshold; absent for the baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    /// Questions.
    pub n: usize,
    /// Of them, those that the server would not answer; they count as wrong.
    pub refused: usize,
    /// Share that is right.
    pub pass_rate: f64,
    /// 95% (Wilson).
    pub pass_rate_interval: [f64; 2],
    /// Share that Python parses.
    pub parse_rate: f64,
    /// Share in which a line stands three or more times in succession.
    pub repetition_rate: f64,
    /// Committed tokens per forward pass.
    pub tpf: f64,
    /// Of all streams together.
    pub tokens_per_s: f64,
}

/// The numbers of `batches`; none where there are no answers.
pub fn row<'a>(point: Point, batches: impl Iterator<Item = &'a Batch>) -> Option<Row> {
    let (mut n, mut refused, mut passed, mut parsed, mut repeated) = (0, 0, 0, 0, 0);
    let (mut tokens, mut passes, mut seconds) = (0u64, 0u64, 0.0);
    for batch in batches {
        seconds += batch.seconds;
        for outcome in &batch.outcomes {
            n += 1;
            refused += usize::from(outcome.answer.refused.is_some());
            passed += usize::from(outcome.passed);
            parsed += usize::from(outcome.parsed);
            repeated += usize::from(repeats(&outcome.answer.text));
            tokens += u64::from(outcome.answer.tokens);
            passes += u64::from(outcome.answer.passes);
        }
    }
    let share = |count: usize| count as f64 / n as f64;
    let autoregressive = point.block_size == 1;
    (n > 0).then(|| Row {
        policy: point.name(),
        block_size: point.block_size,
        threshold: (!autoregressive).then_some(point.threshold),
        n,
        refused,
        pass_rate: share(passed),
        pass_rate_interval: wilson(passed, n),
        parse_rate: share(parsed),
        repetition_rate: share(repeated),
        tpf: tokens as f64 / passes.max(1) as f64,
        tokens_per_s: tokens as f64 / seconds.max(f64::MIN_POSITIVE),
    })
}

fn repeats(text: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.windows(REPEATED_LINES).any(|lines| !lines[0].is_empty() && lines.iter().all(|line| line == &lines[0]))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::answers::{Outcome, Part};
    use super::super::ask::Answer;
    use super::*;

    #[test]
    fn a_row_adds_up_batches() {
        let outcome = |text: &str, tokens, passed| Outcome {
            id: text.into(),
            answer: Answer {
                text: text.into(),
                tokens,
                passes: 2 * u32::from(tokens > 0),
                refused: (tokens == 0).then(|| "too long".into()),
            },
            passed,
            parsed: true,
        };
        let batch = |outcomes| Batch {
            part: Part::Tasks,
            block_size: 8,
            threshold: 0.9,
            self_speculative: false,
            seconds: 2.0,
            outcomes,
        };
        let point = Point::threshold(8, 0.9);
        let batches = [
            batch(vec![outcome("a\na\na", 6, true)]),
            batch(vec![outcome("a\nb\na\na", 4, false), outcome("", 0, false)]),
        ];
        let row = row(point, batches.iter()).unwrap();
        assert_eq!((row.n, row.refused), (3, 1));
        let third = 1.0 / 3.0;
        assert_eq!((row.pass_rate, row.parse_rate, row.repetition_rate), (third, 1.0, third));
        assert_eq!((row.tpf, row.tokens_per_s), (2.5, 2.5));
        assert_eq!(super::row(point, std::iter::empty()), None);
    }
}
