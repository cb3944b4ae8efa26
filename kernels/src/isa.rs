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
    /// x86-64 with AVX-512 F, BW, VL and DQ. Products of bf16 and int8 weights use BF16 and VNNI dots where present.
    Avx512,
    /// The same and tile registers (AMX): products of bf16 and int8 weights run on them.
    Amx,
    /// 64-bit Arm.
    Neon,
}

/// The override cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IsaError {
    /// Not a name we know.
    #[error("{ISA_VARIABLE}={0} is unknown: known are portable, avx2, avx512, amx, neon")]
    Unknown(String),
    /// This host lacks it.
    #[error("{ISA_VARIABLE}={0} is not supported by this host: it has {1}")]
    Unsupported(&'static str, String),
}

impl Isa {
    const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx, Isa::Neon];

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
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512.supported() && amx::available(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            _ => false,
        }
    }

    /// Whether products of bf16 weights multiply pairs of bf16 (inputs are then rounded to bf16 too).
    pub fn has_bf16_dot(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512bf16"),
            Isa::Amx => true,
            _ => false,
        }
    }

    /// Whether int8 products take their inputs shifted to unsigned (VNNI).
    pub(crate) fn has_unsigned_dot(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512vnni"),
            _ => false,
        }
    }

    /// Lower-case name, as the override takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
        }
    }
}

/// Whether tile registers are there, the system saves them, and lets this process use them.
#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    use std::sync::OnceLock;

    pub(super) fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| has_instructions() && is_permitted())
    }

    // Reading CPUID became safe after the oldest supported compiler.
    #[allow(unused_unsafe)]
    fn has_instructions() -> bool {
        /// Leaf 7: AMX-BF16, AMX-TILE, AMX-INT8.
        const TILES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        /// Leaf 1: the system has enabled XSAVE, so XCR0 can be read.
        const OSXSAVE: u32 = 1 << 27;
        /// XCR0: the state of tiles and of their configuration is saved.
        const SAVED: u64 = 3 << 17;
        #[target_feature(enable = "xsave")]
        fn enabled() -> u64 {
            // SAFETY: the host has XSAVE and the system enabled it, as the caller checked.
            unsafe { _xgetbv(0) }
        }
        // SAFETY: a host with AVX-512 has CPUID up to leaf 7.
        let (one, seven) = unsafe { (__cpuid(1), __cpuid_count(7, 0)) };
        // SAFETY: XSAVE is enabled, checked before.
        seven.edx & TILES == TILES && one.ecx & OSXSAVE != 0 && unsafe { enabled() } & SAVED == SAVED
    }

    /// Linux grants the large state on request, once per process.
    #[cfg(target_os = "linux")]
    fn is_permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the call reads its two numbers and changes nothing but the permission.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn is_permitted() -> bool {
        false
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
