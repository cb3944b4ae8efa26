//! Products on tile registers: 16 rows times two panels, whatever the number of rows that count.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use tiles::{Configured, product};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use tiles::{TILE_OPERATIONS, multiply_tiles};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles {
    use crate::Isa;
    use crate::gemm::tile::Tile;
    use crate::gemm::{BLOCK_WEIGHTS, input::BLOCK};
    use crate::pack::WeightType;
    use std::arch::asm;

    /// Shapes of the tile registers: all 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static WHOLE: Configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// While it lives, this thread's tile registers are configured.
    pub(in crate::gemm) struct Configured(bool);

    impl Configured {
        pub(in crate::gemm) fn new(isa: Isa) -> Self {
            if isa == Isa::Amx {
                // SAFETY: `Cpu::new` refuses this set where tiles are not available; the configuration is valid.
                unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const WHOLE, options(nostack, readonly)) };
            }
            Configured(isa == Isa::Amx)
        }
    }

    impl Drop for Configured {
        fn drop(&mut self) {
            if self.0 {
                // SAFETY: as above. Released, the registers need no saving when the thread sleeps.
                unsafe { asm!("tilerelease", options(nostack, nomem)) };
            }
        }
    }

    /// One loop over blocks of two panels; `$dot` multiplies and adds two tiles. Two panels are two streams of memory.
    macro_rules! blocks {
        ($dot:literal, $x:expr, $first:expr, $second:expr, $count:expr, $out:expr) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{x} + {line}]",
                "tileloadd tmm5, [{first} + {row}]",
                concat!($dot, " tmm0, tmm4, tmm5"),
                "tileloadd tmm6, [{first} + {row} + 64]",
                concat!($dot, " tmm1, tmm4, tmm6"),
                "tileloadd tmm7, [{second} + {row}]",
                concat!($dot, " tmm2, tmm4, tmm7"),
                "tileloadd tmm5, [{second} + {row} + 64]",
                concat!($dot, " tmm3, tmm4, tmm5"),
                "add {x}, 1024",
                "add {first}, 2048",
                "add {second}, 2048",
                "dec {count}",
                "jnz 2b",
                "tilestored [{out} + {row}], tmm0",
                "tilestored [{out} + {row} + 64], tmm1",
                "tilestored [{out} + {row} + 2048], tmm2",
                "tilestored [{out} + {row} + 2112], tmm3",
                x = inout(reg) $x => _,
                first = inout(reg) $first => _,
                second = inout(reg) $second => _,
                count = inout(reg) $count => _,
                out = in(reg) $out,
                line = in(reg) 64usize,
                row = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            )
        };
    }

    /// Inputs `[block][row][group]` times the weights `[block][group][PANEL]` of two panels; int8 leaves the bits of i32
    /// sums. A lone panel is given twice.
    pub(in crate::gemm) fn product(x: &[u32], weights: [&[u32]; 2], dtype: WeightType, tiles: &mut [Tile; 2]) {
        let blocks = x.len() / BLOCK;
        let whole = weights.iter().all(|weights| weights.len() == blocks * BLOCK_WEIGHTS);
        assert!(blocks > 0 && x.len() == blocks * BLOCK && whole);
        let (x, [first, second], out) = (x.as_ptr(), weights.map(<[u32]>::as_ptr), tiles.as_mut_ptr());
        // SAFETY: a block of inputs is 1024 bytes and of weights 2048, the lengths are checked above; a tile's rows are
        // 128 bytes apart and a tile 2048 long; the caller configured the registers, which no compiled code uses.
        unsafe {
            match dtype {
                WeightType::Int8 => blocks!("tdpbssd", x, first, second, blocks, out),
                _ => blocks!("tdpbf16ps", x, first, second, blocks, out),
            }
        }
    }

    /// Operations of one turn of [`multiply_tiles`] on bf16; twice as many on int8.
    pub(crate) const TILE_OPERATIONS: u64 = 2 * (2 * 16 * 16 * 32);

    /// Multiplies tiles without reading memory, `turns` times.
    pub(crate) fn multiply_tiles(dtype: WeightType, turns: usize) {
        let _registers = Configured::new(Isa::Amx);
        macro_rules! turns {
            ($dot:literal) => {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "tilezero tmm4",
                    "2:",
                    concat!($dot, " tmm0, tmm2, tmm3"),
                    concat!($dot, " tmm1, tmm2, tmm4"),
                    "dec {turns}",
                    "jnz 2b",
                    turns = inout(reg) turns => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
                    options(nostack, nomem)
                )
            };
        }
        // SAFETY: chosen only where tiles are available; the registers are configured; `turns` is positive.
        unsafe {
            match dtype {
                WeightType::Int8 => turns!("tdpbssd"),
                _ => turns!("tdpbf16ps"),
            }
        }
    }
}

/// Other hosts have no tile registers.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) use absent::{Configured, product};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod absent {
    use crate::Isa;
    use crate::gemm::tile::Tile;
    use crate::pack::WeightType;

    pub(in crate::gemm) struct Configured;

    impl Configured {
        pub(in crate::gemm) fn new(_: Isa) -> Self {
            Configured
        }
    }

    pub(in crate::gemm) fn product(_: &[u32], _: [&[u32]; 2], _: WeightType, _: &mut [Tile; 2]) {
        unreachable!("this host has no tile registers")
    }
}
