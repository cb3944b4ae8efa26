//! What was measured, over all repeats.

use super::client::Seen;
use crate::bench::machine::Machine;
use crate::bench::serve::summary;
use crate::bench::spread::Spread;
use serde::Serialize;
use std::fmt::Write;

/// Name of the form of the JSON object.
pub const FORMAT: &str = "unmask.bench-gateway/1";
/// Most memory that an idle stream should take (KiB).
const IDLE_GOAL_KIB: f64 = 64.0;

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: &'static str,
    /// Of this binary.
    pub version: &'static str,
    /// Client, worker and gateway shared it.
    pub machine: Machine,
    /// Step times: `built-in`, or the file.
    pub table: String,
    /// Of an answer.
    pub tokens: u32,
    /// Tokens committed together.
    pub block_size: u32,
    /// How often everything was measured.
    pub repeats: u32,
    /// Of prompts and tokens.
    pub seed: u64,
    /// One per number of streams.
    pub latency: Vec<Latency>,
    /// Where a step takes no time.
    pub saturated: Throughput,
    /// Of streams that are open and idle.
    pub idle: Memory,
}

/// Percentiles of one measurement (milliseconds).
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantiles {
    p50: f64,
    p99: f64,
}

/// One measurement of one way.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    requests: usize,
    first_event: Quantiles,
    block: Quantiles,
}

impl Sample {
    /// Of all requests of a measurement.
    pub fn of(seen: &[Seen]) -> Self {
        let quantiles = |latency: summary::Latency| Quantiles {
            p50: latency.p50.unwrap_or(f64::NAN),
            p99: latency.p99.unwrap_or(f64::NAN),
        };
        Self {
            requests: seen.len(),
            first_event: quantiles(summary::Latency::of(seen.iter().map(|one| one.first_event))),
            block: quantiles(summary::Latency::of(seen.iter().flat_map(|one| one.blocks.iter().copied()))),
        }
    }
}

/// Latency at a number of streams.
#[derive(Debug, Serialize)]
pub struct Latency {
    /// At a time.
    pub streams: u64,
    /// Of a measurement.
    pub requests: usize,
    /// Until a stream begins.
    pub first_event: Overhead,
    /// From the worker's sending of a block to the client.
    pub block: Overhead,
}

/// A latency both ways (milliseconds). The overhead is, in each repeat, the percentile through the gateway minus the
/// percentile of the direct way.
#[derive(Debug, Serialize)]
pub struct Overhead {
    direct_p50_ms: Spread,
    direct_p99_ms: Spread,
    gateway_p50_ms: Spread,
    gateway_p99_ms: Spread,
    overhead_p50_ms: Spread,
    overhead_p99_ms: Spread,
}

impl Latency {
    /// Of the repeats' samples, each direct and through the gateway.
    pub fn of(streams: u64, samples: &[[Sample; 2]]) -> Self {
        Self {
            streams,
            requests: samples.first().map_or(0, |[direct, _]| direct.requests),
            first_event: Overhead::of(samples, |sample| sample.first_event),
            block: Overhead::of(samples, |sample| sample.block),
        }
    }
}

impl Overhead {
    fn of(samples: &[[Sample; 2]], what: fn(&Sample) -> Quantiles) -> Self {
        let spread = |value: &dyn Fn(&Quantiles, &Quantiles) -> f64| {
            Spread::of(samples.iter().map(|[direct, gateway]| value(&what(direct), &what(gateway))))
        };
        Self {
            direct_p50_ms: spread(&|direct, _| direct.p50),
            direct_p99_ms: spread(&|direct, _| direct.p99),
            gateway_p50_ms: spread(&|_, gateway| gateway.p50),
            gateway_p99_ms: spread(&|_, gateway| gateway.p99),
            overhead_p50_ms: spread(&|direct, gateway| gateway.p50 - direct.p50),
            overhead_p99_ms: spread(&|direct, gateway| gateway.p99 - direct.p99),
        }
    }

    fn lines(&self, streams: u64, what: &str) -> String {
        let line = |name: &str, direct: &Spread, gateway: &Spread, overhead: &Spread| {
            let (direct, gateway, overhead) = (direct.text(3), gateway.text(3), overhead.text(3));
            format!("{streams:>7}  {what:<11}  {name:<6}  {direct:<24}  {gateway:<24}  {overhead}\n")
        };
        line("median", &self.direct_p50_ms, &self.gateway_p50_ms, &self.overhead_p50_ms)
            + &line("p99", &self.direct_p99_ms, &self.gateway_p99_ms, &self.overhead_p99_ms)
    }
}

/// One measurement at saturation.
#[derive(Debug, Clone, Copy)]
pub struct Saturated {
    /// Requests per second to the worker itself.
    pub direct_per_s: f64,
    /// Requests per second through the gateway.
    pub gateway_per_s: f64,
    /// Time of the gateway's threads on a processor, per request (microseconds).
    pub cpu_us: f64,
}

/// Requests where a step takes no time.
#[derive(Debug, Serialize)]
pub struct Throughput {
    /// At a time.
    pub streams: u64,
    /// Requests per second without a gateway: what client and worker leave of the machine.
    pub direct_per_s: Spread,
    /// Requests per second through the gateway.
    pub gateway_per_s: Spread,
    /// Time of the gateway's threads on a processor, per request (microseconds).
    pub gateway_cpu_us: Spread,
}

impl Throughput {
    /// Of the repeats.
    pub fn of(streams: u64, all: &[Saturated]) -> Self {
        let spread = |what: fn(&Saturated) -> f64| Spread::of(all.iter().map(what));
        Self {
            streams,
            direct_per_s: spread(|one| one.direct_per_s),
            gateway_per_s: spread(|one| one.gateway_per_s),
            gateway_cpu_us: spread(|one| one.cpu_us),
        }
    }
}

/// Resident bytes of a gateway.
#[derive(Debug, Clone, Copy)]
pub struct Idle {
    /// Warm, without a stream.
    pub before: u64,
    /// With all of them.
    pub after: u64,
}

/// Memory of streams that are open and idle.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// That were open.
    pub streams: u64,
    /// Resident before (MiB).
    pub before_mib: Spread,
    /// Growth over the number of streams (KiB).
    pub per_stream_kib: Spread,
    /// What it should be at most (KiB).
    pub goal_kib: f64,
}

impl Memory {
    /// Of the repeats.
    pub fn of(streams: u64, all: &[Idle]) -> Self {
        let growth = |idle: &Idle| idle.after.saturating_sub(idle.before) as f64 / 1024.0 / streams as f64;
        Self {
            streams,
            before_mib: Spread::of(all.iter().map(|idle| idle.before as f64 / f64::from(1 << 20))),
            per_stream_kib: Spread::of(all.iter().map(growth)),
            goal_kib: IDLE_GOAL_KIB,
        }
    }
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let Machine { cpu, cores, build, .. } = &self.machine;
        let cpu = cpu.as_deref().unwrap_or("unknown processor");
        let mut text = format!(
            "machine  {cpu}, {cores} cores, {build} build; client, worker and gateway share it\nsteps    {}; answers of {} \
             tokens in blocks of {}\nmedians of {} repeats (least to most); every stream had the tokens it must have\n\n",
            self.table, self.tokens, self.block_size, self.repeats
        );
        let _ = writeln!(
            text,
            "{:>7}  {:<11}  {:<6}  {:<24}  {:<24}  overhead, ms",
            "streams", "of", "", "direct, ms", "gateway, ms"
        );
        for latency in &self.latency {
            text += &latency.first_event.lines(latency.streams, "first event");
            text += &latency.block.lines(latency.streams, "block");
        }
        let Throughput { streams, direct_per_s, gateway_per_s, gateway_cpu_us } = &self.saturated;
        let _ = write!(
            text,
            "\nsaturation, {streams} streams, steps that take no time\n  through the gateway  {} requests/s\n  direct               {} \
             requests/s\n  the gateway's CPU    {} us per request\n",
            gateway_per_s.text(0),
            direct_per_s.text(0),
            gateway_cpu_us.text(0)
        );
        let Memory { streams, before_mib, per_stream_kib, goal_kib } = &self.idle;
        let met = if per_stream_kib.median <= *goal_kib { "met" } else { "missed" };
        let _ = write!(
            text,
            "\nmemory, {streams} idle streams\n  before      {} MiB\n  per stream  {} KiB (goal: at most {goal_kib:.0} KiB, {met})\n",
            before_mib.text(1),
            per_stream_kib.text(1)
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn overhead_is_the_difference_of_the_same_percentile_in_each_repeat() {
        let sample = |ms: u64| {
            let (first_event, blocks) = (Duration::from_millis(ms), vec![Duration::from_millis(2 * ms)]);
            Sample::of(&[Seen { index: 0, first_event, blocks }])
        };
        let latency = Latency::of(1, &[[sample(1), sample(3)], [sample(2), sample(8)], [sample(2), sample(5)]]);
        assert_eq!(latency.first_event.overhead_p50_ms, Spread { median: 3.0, min: 2.0, max: 6.0 });
        assert_eq!(latency.block.overhead_p99_ms, Spread { median: 6.0, min: 4.0, max: 12.0 });
    }

    #[test]
    fn memory_is_growth_per_stream() {
        let idle = |before: u64, after: u64| Idle { before: before << 20, after: after << 20 };
        let memory = Memory::of(1024, &[idle(10, 20), idle(10, 42)]);
        assert_eq!((memory.per_stream_kib.min, memory.per_stream_kib.max), (10.0, 32.0));
    }
}
