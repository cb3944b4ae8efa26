//! What a measurement ran on.

use serde::Serialize;
use unmask_kernels::Isa;

/// A host, as far as its speed depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Name of the processor, where the system tells it.
    pub cpu: Option<String>,
    /// Cores this process may use.
    pub cores: usize,
    /// Instruction set of the kernels, with their bf16 dot where they have it.
    pub isa: Option<String>,
    /// `release` or `debug`: figures of a debug build say little.
    pub build: &'static str,
}

impl Machine {
    /// This host.
    pub fn here() -> Self {
        let isa = Isa::detect().ok().map(|isa| {
            let dot = if isa.has_bf16_dot() { "+bf16" } else { "" };
            format!("{}{dot}", isa.name())
        });
        Self {
            cpu: std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| cpu_name(&text)),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            isa,
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
        }
    }
}

/// The name of the first processor in Linux's `/proc/cpuinfo`.
fn cpu_name(cpuinfo: &str) -> Option<String> {
    let (_, name) =
        cpuinfo.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| key.trim() == "model name")?;
    Some(name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_named_where_the_system_tells_it() {
        let text = "processor\t: 0\nvendor_id\t: X\nmodel name\t: A CPU @ 2.0GHz\nmodel name\t: B\n";
        assert_eq!(cpu_name(text), Some("A CPU @ 2.0GHz".into()));
        assert_eq!(cpu_name("BogoMIPS : 50\n"), None);
        assert!(Machine::here().cores > 0);
    }
}
