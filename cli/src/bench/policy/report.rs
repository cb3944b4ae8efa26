//! The automatic policy beside the fixed settings, load by load.

use crate::bench::machine::Machine;
use crate::bench::serve::summary::Summary;
use crate::bench::spread::Spread;
use serde::Serialize;
use std::fmt::Write;

/// Name of the form of the JSON object.
pub const FORMAT: &str = "unmask.bench-policy/1";

/// All loads and what they have in common.
#[derive(Debug, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: &'static str,
    /// Of this binary.
    pub version: &'static str,
    /// Client, gateway and worker shared it.
    pub machine: Machine,
    /// What was asked.
    pub model: String,
    /// Bound of the first block of a good request (milliseconds).
    pub slo_first_block_ms: f64,
    /// Bound of each later one (milliseconds), also the policy's latency.
    pub slo_block_ms: f64,
    /// Least lower bound of the pass rate.
    pub floor: f64,
    /// Of each measurement (seconds).
    pub duration_s: f64,
    /// Measurements of each setting.
    pub repeats: u32,
    /// Of prompts and draws.
    pub seed: u64,
    /// One per load.
    pub loads: Vec<Compared>,
}

/// A way to decode.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Setting {
    /// Positions decoded together; 1 is autoregressive.
    pub block_size: u32,
    /// Confidence threshold; `None` is autoregressive.
    pub threshold: Option<f32>,
    /// Masks draft, causal rows decide.
    pub self_speculative: bool,
}

impl Setting {
    /// Blocks of masks that fall at a threshold.
    pub fn blocks(block_size: u32, threshold: f32) -> Setting {
        Setting { block_size, threshold: Some(threshold), self_speculative: false }
    }

    fn name(self) -> String {
        match self.threshold {
            Some(threshold) if self.self_speculative => {
                format!("self_speculative, block {}, threshold {threshold}", self.block_size)
            }
            Some(threshold) => format!("block {}, threshold {threshold}", self.block_size),
            None => "autoregressive".into(),
        }
    }
}

/// What the automatic policy has in force.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InForce {
    /// `None`: the model's own.
    pub setting: Option<Setting>,
    /// Rises with every change.
    pub revision: u64,
    /// Requests at a time that it is chosen for.
    pub concurrency: f64,
    /// In words.
    pub why: String,
}

impl InForce {
    fn name(&self) -> String {
        self.setting.map_or_else(|| "the model's own".into(), Setting::name)
    }
}

/// One setting under one load.
#[derive(Debug, Clone, Serialize)]
pub struct Side {
    /// `None` is the automatic one.
    pub setting: Option<Setting>,
    /// Tokens per second that the worker's profile promises.
    pub promised_per_s: Option<f64>,
    /// Tokens per second of good requests, by repeat.
    pub goodput_per_s: Vec<f64>,
    /// Tokens per second of all requests, by repeat.
    pub tokens_per_s: Vec<f64>,
    /// Good ones among the finished requests of all repeats, and those.
    pub good: [u64; 2],
    /// Between blocks, by repeat (milliseconds, median).
    pub block_p50_ms: Vec<f64>,
}

impl Side {
    /// Before it is measured.
    pub fn new(setting: Option<Setting>, promised_per_s: Option<f64>) -> Self {
        Self {
            setting,
            promised_per_s,
            goodput_per_s: Vec::new(),
            tokens_per_s: Vec::new(),
            good: [0; 2],
            block_p50_ms: Vec::new(),
        }
    }

    /// As it is printed.
    pub fn name(&self) -> String {
        self.setting.map_or_else(|| "automatic".into(), Setting::name)
    }

    /// Takes a repeat.
    pub fn take(&mut self, summary: &Summary) {
        self.goodput_per_s.push(summary.goodput.tokens_per_s);
        self.tokens_per_s.push(summary.tokens.per_s);
        self.good[0] += summary.goodput.requests;
        self.good[1] += summary.requests.ok;
        self.block_p50_ms.push(summary.block_ms.p50.unwrap_or(f64::NAN));
    }

    fn goodput(&self) -> Spread {
        Spread::of(self.goodput_per_s.iter().copied())
    }
}

/// One load.
#[derive(Debug, Serialize)]
pub struct Compared {
    /// Streams at a time.
    pub streams: u64,
    /// The automatic policy first.
    pub sides: Vec<Side>,
    /// What was in force after the load had settled.
    pub before: InForce,
    /// And when all was measured.
    pub after: InForce,
    /// The fixed setting of the highest median goodput.
    pub best: Option<Setting>,
    /// Goodput of the automatic policy over that of the best fixed setting, repeat by repeat.
    pub ratio: Spread,
    /// Whether the best repeat of the automatic policy reaches the worst of the best fixed setting: then the two differ by
    /// no more than repeats do.
    pub as_good: bool,
}

impl Compared {
    /// The automatic policy is the first of `sides`.
    pub fn of(streams: u64, sides: Vec<Side>, before: InForce, after: InForce) -> Self {
        let median = |side: &&Side| side.goodput().median;
        let best = sides[1..].iter().max_by(|a, b| median(a).total_cmp(&median(b)));
        let pairs = |best: &Side| {
            let pairs = sides[0].goodput_per_s.iter().zip(&best.goodput_per_s);
            // Where neither had a good request they are equal.
            pairs.map(|(automatic, best)| if automatic == best { 1.0 } else { automatic / best }).collect::<Vec<_>>()
        };
        let ratio = Spread::of(best.map(pairs).unwrap_or_default().into_iter());
        let as_good = best.is_some_and(|best| sides[0].goodput().max >= best.goodput().min);
        let best = best.and_then(|side| side.setting);
        Self { streams, sides, before, after, best, ratio, as_good }
    }

    fn lines(&self) -> String {
        let mut text = format!(
            "\n{} streams\n  {:<26}{:>10}  {:<30}{:>10}{:>8}  {}\n",
            self.streams, "", "promised", "goodput, tokens/s", "tokens/s", "good", "ms between blocks"
        );
        for side in &self.sides {
            let middle = |values: &[f64]| Spread::of(values.iter().copied()).median;
            let _ = writeln!(
                text,
                "  {:<26}{:>10}  {:<30}{:>10.0}{:>7.1}%  {:.1}",
                side.name(),
                side.promised_per_s.map_or_else(|| "-".into(), |promised| format!("{promised:.0}")),
                side.goodput().text(0),
                middle(&side.tokens_per_s),
                100.0 * side.good[0] as f64 / side.good[1].max(1) as f64,
                middle(&side.block_p50_ms)
            );
        }
        let changed = if self.before.revision == self.after.revision {
            String::new()
        } else {
            format!(", at the end {}", self.after.name())
        };
        let _ = writeln!(text, "  in force: {}{changed} ({})", self.before.name(), self.before.why);
        let best = self.best.map_or_else(|| "none".into(), Setting::name);
        let verdict = if self.as_good { "as good, within the spread" } else { "WORSE" };
        let _ = writeln!(text, "  automatic / best fixed ({best}): {}, {verdict}", self.ratio.text(2));
        text
    }
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let Machine { cpu, cores, build, .. } = &self.machine;
        let cpu = cpu.as_deref().unwrap_or("unknown processor");
        let mut text = format!(
            "model    {}, pass rate at least {:.1}%\nmachine  {cpu}, {cores} cores, {build} build; client, gateway and worker share \
             it\ngood     first block within {} ms and each later one within {} ms\nmedians of {} repeats of {} s (least to \
             most)\n",
            self.model,
            100.0 * self.floor,
            self.slo_first_block_ms,
            self.slo_block_ms,
            self.repeats,
            self.duration_s
        );
        text.extend(self.loads.iter().map(Compared::lines));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(setting: Option<Setting>, goodput: &[f64]) -> Side {
        Side { goodput_per_s: goodput.to_vec(), ..Side::new(setting, None) }
    }

    fn compared(automatic: &[f64]) -> Compared {
        let setting = |block_size| Some(Setting::blocks(block_size, 0.9));
        let sides = vec![
            side(None, automatic),
            side(setting(4), &[100.0, 110.0, 120.0]),
            // The best of one repeat and not the best.
            side(setting(8), &[90.0, 100.0, 900.0]),
        ];
        let in_force = InForce { setting: setting(4), revision: 2, concurrency: 1.0, why: "because".into() };
        Compared::of(4, sides, in_force.clone(), InForce { revision: 3, ..in_force })
    }

    #[test]
    fn the_best_has_the_highest_median_and_repeats_are_compared_in_pairs() {
        let all = compared(&[90.0, 110.0, 114.0]);
        assert_eq!(all.best.map(|best| best.block_size), Some(4));
        assert_eq!(all.ratio, Spread { median: 0.95, min: 0.9, max: 1.0 });
        assert!(all.as_good);
        let text = all.lines();
        assert!(text.contains("best fixed (block 4, threshold 0.9): 0.95 (0.90 to 1.00), as good"), "{text}");
        assert!(text.contains("at the end block 4"), "{text}");
    }

    #[test]
    fn less_than_every_repeat_of_the_best_is_worse() {
        assert!(compared(&[80.0, 90.0, 101.0]).as_good);
        let all = compared(&[99.0, 90.0, 80.0]);
        assert!(!all.as_good && all.lines().contains("WORSE"));
    }
}
