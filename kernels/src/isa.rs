//! Which instructions this host has: detected once, overridable.

use thiserror::Error;

/// Environment variable that overrides detection.
pub const ISA_VARIABLE: &str = "UNMASK_ISA";

/// An instruction set that the kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, for any host.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ. Products of bf16 weights use its BF16 dot where present.
    Avx512,
    /// 64-bit Arm.
    Neon,
}

/// The override cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IsaError {
    /// Not a name we know.
    #[error("{ISA_VARIABLE}={0} is unknown: known are portable, avx2, avx512, neon")]
    Unknown(String),
    /// This host lacks it.
    #[error("{ISA_VARIABLE}={0} is not supported by this host: it has {1}")]
    Unsupported(&'static str, String),
}

impl Isa {
    const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Neon];

    /// The best of the host, or what `UNMASK_ISA` names.
    ///
    /// # Errors
    /// The variable names an unknown or unsupported instruction set.
    pub fn detect() -> Result<Isa, IsaError> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) if !name.is_empty() => Self::named(&name),
            _ => Ok(Self::best()),
        }
    }

    /// The supported instruction set of that name.
    ///
    /// # Errors
    /// As [`Isa::detect`].
    pub fn named(name: &str) -> Result<Isa, IsaError> {
        let found = Self::ALL.into_iter().find(|isa| isa.name() == name);
        let isa = found.ok_or_else(|| IsaError::Unknown(name.to_owned()))?;
        let available = Self::available();
        if available.contains(&isa) {
            return Ok(isa);
        }
        let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
        Err(IsaError::Unsupported(isa.name(), names.join(", ")))
    }

    fn best() -> Isa {
        Self::available().last().copied().unwrap_or(Isa::Portable)
    }

    /// All this host can run, slowest first.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.supported()).collect()
    }

    /// Whether this host has it.
    pub(crate) fn supported(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            _ => false,
        }
    }

    /// Whether products of bf16 weights use a bf16 dot instruction (inputs are then rounded to bf16 too).
    pub fn has_bf16_dot(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512bf16"),
            _ => false,
        }
    }

    /// Lower-case name, as the override takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_isa_can_be_named() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()), Ok(isa));
        }
        assert_eq!(Isa::named("sse9"), Err(IsaError::Unknown("sse9".into())));
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        assert!(matches!(Isa::named(foreign), Err(IsaError::Unsupported(..))));
    }

    /// What makes the kernels' safe interface sound: their instructions are reached through a [`crate::Cpu`] only.
    #[test]
    #[should_panic(expected = "cannot run")]
    fn an_isa_of_another_host_is_refused() {
        let foreign = if cfg!(target_arch = "x86_64") { Isa::Neon } else { Isa::Avx2 };
        crate::Cpu::new(foreign, 1);
    }
}
