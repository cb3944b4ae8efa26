//! `unmask bench roof`: what this machine can do at most. Every other speed is given as a share of it.

use super::machine::Machine;
use crate::output;
use clap::Args;
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use unmask_kernels::{
    Cpu, Isa, WeightType,
    roof::{Buffer, STREAMS},
};

/// Buffers that are read (bytes): one for every kind of memory that weights can lie in.
const BUFFERS: [usize; 4] = [1 << 20, 16 << 20, 256 << 20, 1 << 30];
/// Time for each figure; the best turn counts, being the least disturbed.
const TIME: Duration = Duration::from_millis(400);
/// Largest relative difference of the bandwidth before and after a measurement.
const DRIFT: f64 = 0.1;
/// Measurements before a drifting bandwidth is put up with.
const ATTEMPTS_MAX: usize = 5;
/// Fewest turns of each figure.
const TURNS_MIN: usize = 5;

/// `unmask bench roof`
#[derive(Debug, Args)]
pub struct RoofArgs {
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Examples for the help.
pub const EXAMPLES: &str = "Examples:\n  unmask bench roof\n  unmask bench roof --json";

/// Measured roofs of some threads of a machine.
#[derive(Debug, Clone, Serialize)]
pub struct Roof {
    /// Threads that ran.
    pub threads: usize,
    /// Read bandwidth by size of what is read over and over.
    pub read: Vec<Read>,
    /// f32 multiply-add, 1e9 operations a second.
    pub f32_gflops: f64,
    /// As products of bf16 weights do it, 1e9 operations a second.
    pub bf16_gflops: f64,
    /// As products of int8 weights do it, 1e9 operations a second.
    pub int8_gops: f64,
}

/// Bandwidth of reading one buffer over and over.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Read {
    /// Size of the buffer (bytes).
    pub bytes: usize,
    /// 1e9 bytes a second.
    pub gbps: f64,
}

/// Measures some threads of this machine, as often as wanted.
pub struct Meter {
    cpu: Cpu,
    threads: usize,
    buffer: Buffer,
}

impl Meter {
    /// For `threads` threads.
    pub fn new(isa: Isa, threads: usize) -> Meter {
        Meter { cpu: Cpu::new(isa, threads), threads, buffer: Buffer::new(BUFFERS[BUFFERS.len() - 1]) }
    }

    /// Everything; takes a few seconds.
    pub fn roof(&self) -> Roof {
        let arithmetic = |dtype| {
            let operations = self.cpu.multiply_all(dtype);
            operations as f64 / best(|| _ = self.cpu.multiply_all(dtype)) / 1e9
        };
        Roof {
            threads: self.threads,
            read: BUFFERS.map(|bytes| Read { bytes, gbps: self.gbps(bytes) }).to_vec(),
            f32_gflops: arithmetic(WeightType::F32),
            bf16_gflops: arithmetic(WeightType::Bf16),
            int8_gops: arithmetic(WeightType::Int8),
        }
    }

    fn gbps(&self, bytes: usize) -> f64 {
        let data = &self.buffer.data()[..bytes / 4];
        let fastest = STREAMS.map(|streams| best(|| self.cpu.read_all(data, streams)));
        bytes as f64 / fastest.into_iter().fold(f64::MAX, f64::min) / 1e9
    }

    /// Measures something that reads `bytes` beside the roof of that very moment: on machines whose memory is shared
    /// with others the bandwidth changes within seconds. The bandwidth is read before and after, and everything is
    /// done again while both differ; the larger one counts.
    pub fn beside<T>(&self, roof: &Roof, bytes: usize, mut measure: impl FnMut() -> T) -> (Roof, T) {
        let size = BUFFERS.into_iter().find(|size| *size >= bytes).unwrap_or(BUFFERS[BUFFERS.len() - 1]);
        let mut before = self.gbps(size);
        let mut attempt = 1;
        loop {
            let measured = measure();
            let after = self.gbps(size);
            if attempt == ATTEMPTS_MAX || before.max(after) <= before.min(after) * (1.0 + DRIFT) {
                let gbps = before.max(after);
                let read = roof.read.iter().map(|read| if read.bytes == size { Read { gbps, ..*read } } else { *read });
                return (Roof { read: read.collect(), ..roof.clone() }, measured);
            }
            (before, attempt) = (after, attempt + 1);
        }
    }
}

impl Roof {
    /// Bandwidth (1e9 bytes a second) of reading `bytes` over and over: that of the next larger buffer measured.
    pub fn read_gbps(&self, bytes: usize) -> f64 {
        let fits = self.read.iter().find(|read| read.bytes >= bytes).or(self.read.last());
        fits.map_or(f64::NAN, |read| read.gbps)
    }

    /// Arithmetic (1e9 operations a second) of products with weights of this type.
    pub fn gops(&self, dtype: WeightType) -> f64 {
        match dtype {
            WeightType::F32 => self.f32_gflops,
            WeightType::Bf16 => self.bf16_gflops,
            WeightType::Int8 => self.int8_gops,
        }
    }
}

/// Seconds of the best turn.
fn best(mut turn: impl FnMut()) -> f64 {
    let (begun, mut fastest, mut turns) = (Instant::now(), f64::MAX, 0);
    while turns < TURNS_MIN || begun.elapsed() < TIME {
        let start = Instant::now();
        turn();
        fastest = fastest.min(start.elapsed().as_secs_f64());
        turns += 1;
    }
    fastest
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    roofs: Vec<Roof>,
}

/// Measures one thread and all.
///
/// # Errors
/// `UNMASK_ISA` names an instruction set that this host lacks.
pub fn run(args: &RoofArgs) -> anyhow::Result<ExitCode> {
    let isa = Isa::detect()?;
    let machine = Machine::here();
    let mut threads = vec![1, machine.cores];
    threads.dedup();
    let report =
        Report { roofs: threads.into_iter().map(|threads| Meter::new(isa, threads).roof()).collect(), machine };
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { table(&report) };
    output::out(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn table(report: &Report) -> String {
    let Machine { cpu, cores, isa, .. } = &report.machine;
    let name = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".into());
    let mut text = format!("{}, {cores} cores, {} kernels\n", name(cpu), name(isa));
    for roof in &report.roofs {
        let _ = writeln!(text, "\n{} thread(s)", roof.threads);
        for read in &roof.read {
            let _ = writeln!(text, "  read {:>5} MiB     {:>8.1} GB/s", read.bytes >> 20, read.gbps);
        }
        for (what, speed) in [("f32", roof.f32_gflops), ("bf16", roof.bf16_gflops), ("int8", roof.int8_gops)] {
            let _ = writeln!(text, "  {what:<15} {speed:>8.0} Gop/s");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_that_of_the_memory_that_holds_the_weights() {
        let read = [(1 << 20, 200.0), (1 << 24, 50.0), (1 << 30, 20.0)].map(|(bytes, gbps)| Read { bytes, gbps });
        let roof = Roof { threads: 2, read: read.to_vec(), f32_gflops: 1.0, bf16_gflops: 2.0, int8_gops: 3.0 };
        assert_eq!(
            [1, 1 << 20, (1 << 20) + 1, usize::MAX].map(|bytes| roof.read_gbps(bytes)),
            [200.0, 200.0, 50.0, 20.0]
        );
    }
}
