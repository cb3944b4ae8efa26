//! What a machine can do at most: loops that only read, and loops that only multiply, without a clock of their own.

use crate::lanes::Lanes;
use crate::lines::Lines;
use crate::{Cpu, Isa, WeightType};
use std::hint::black_box;

/// Streams that a thread may read side by side; more of them keep more lines of memory on their way.
pub const STREAMS: [usize; 3] = [1, 4, 8];

/// Iterations of the loops that multiply, a few tens of microseconds.
const TURNS: usize = 1 << 14;

/// Accumulators of a vector loop: enough to hide the latency of a multiply-add on every set.
const CHAINS: usize = 12;

/// Memory to read, on pages as large as those of weights.
pub struct Buffer(Lines<f32>);

impl Buffer {
    /// `bytes` bytes, written once so that they are there.
    pub fn new(bytes: usize) -> Self {
        let mut lines = Lines::zeroed(bytes / size_of::<f32>());
        lines.as_mut_slice().fill(1.0);
        Buffer(lines)
    }

    /// Its content.
    pub fn data(&self) -> &[f32] {
        self.0.as_slice()
    }
}

impl Cpu {
    /// Reads every element once on all threads, each in `streams` streams of its own part.
    pub fn read_all(&self, data: &[f32], streams: usize) {
        let threads = self.pool().threads();
        let part = data.len() / threads;
        self.pool().run(threads, &|thread| {
            let part = &data[thread * part..(thread + 1) * part];
            black_box(dispatch!(self.isa(), read(part, streams)));
        });
    }

    /// Multiplies and adds in registers on all threads, as products of `dtype` weights do. Returns the number of
    /// operations done, a multiplication and an addition counted apart.
    pub fn multiply_all(&self, dtype: WeightType) -> u64 {
        let threads = self.pool().threads();
        let per_thread = operations(self.isa(), dtype);
        self.pool().run(threads, &|_| multiply(self.isa(), dtype));
        per_thread * threads as u64
    }
}

/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn read<L: Lanes>(data: &[f32], streams: usize) -> f32 {
    const UNROLL: usize = 4;
    let per_stream = data.len() / streams / (UNROLL * L::WIDTH) * (UNROLL * L::WIDTH);
    // SAFETY: every stream lies in the slice, and is a multiple of what one turn reads.
    unsafe {
        let mut sums = [L::zero(); UNROLL];
        for at in (0..per_stream).step_by(UNROLL * L::WIDTH) {
            for stream in 0..streams {
                let from = data.as_ptr().add(stream * per_stream + at);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.max(L::load(from.add(i * L::WIDTH)));
                }
            }
        }
        sums.into_iter().fold(L::zero(), |a, b| a.max(b)).reduce_sum()
    }
}

/// The loop that [`Cpu::multiply_all`] runs for weights of this type.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loop {
    Lanes,
    #[cfg(target_arch = "x86_64")]
    Bf16Dot,
    #[cfg(target_arch = "x86_64")]
    Int8Dot,
    #[cfg(target_arch = "x86_64")]
    Int8Pairs,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Tiles,
}

fn chosen(isa: Isa, dtype: WeightType) -> Loop {
    match (isa, dtype) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        (Isa::Amx, WeightType::Bf16 | WeightType::Int8) => Loop::Tiles,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, WeightType::Bf16) if isa.has_bf16_dot() => Loop::Bf16Dot,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, WeightType::Int8) if isa.has_unsigned_dot() => Loop::Int8Dot,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx2, WeightType::Int8) => Loop::Int8Pairs,
        _ => Loop::Lanes,
    }
}

/// Operations of one thread's loop.
fn operations(isa: Isa, dtype: WeightType) -> u64 {
    let chains = (TURNS * CHAINS) as u64;
    match chosen(isa, dtype) {
        Loop::Lanes => chains * 2 * dispatch!(isa, width()) as u64,
        #[cfg(target_arch = "x86_64")]
        Loop::Bf16Dot => chains * 64,
        #[cfg(target_arch = "x86_64")]
        Loop::Int8Dot => chains * 128,
        #[cfg(target_arch = "x86_64")]
        Loop::Int8Pairs => chains * 64,
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Loop::Tiles => TURNS as u64 * crate::gemm::TILE_OPERATIONS * if dtype == WeightType::Int8 { 2 } else { 1 },
    }
}

fn multiply(isa: Isa, dtype: WeightType) {
    match chosen(isa, dtype) {
        Loop::Lanes => {
            black_box(dispatch!(isa, lanes(black_box(0.5))));
        }
        // SAFETY: the loop was chosen for a set that the host has.
        #[cfg(target_arch = "x86_64")]
        Loop::Bf16Dot => unsafe { x86::bf16_dot() },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Loop::Int8Dot => unsafe { x86::int8_dot() },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Loop::Int8Pairs => unsafe { x86::int8_pairs() },
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Loop::Tiles => crate::gemm::multiply_tiles(dtype, TURNS),
    }
}

/// # Safety
/// None: generic so that [`dispatch!`] can ask for the width.
#[inline(always)]
unsafe fn width<L: Lanes>() -> usize {
    L::WIDTH
}

/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn lanes<L: Lanes>(x: f32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let (factor, addend) = (L::splat(x), L::splat(x));
        let mut sums = [L::zero(); CHAINS];
        for _ in 0..TURNS {
            for sum in &mut sums {
                *sum = sum.fma(factor, addend);
            }
        }
        sums.into_iter().fold(L::zero(), |a, b| a.add(b)).reduce_sum()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, TURNS, black_box};
    use std::arch::x86_64::*;

    /// # Safety
    /// The host must have the BF16 dot.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn bf16_dot() {
        // SAFETY: 512 bits have no invalid pattern.
        let one: __m512bh = unsafe { std::mem::transmute(black_box(_mm512_set1_epi16(0x3f80))) };
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..TURNS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, one, one);
            }
        }
        black_box(sums);
    }

    /// # Safety
    /// The host must have the VNNI dot.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn int8_dot() {
        let one = black_box(_mm512_set1_epi8(1));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..TURNS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, one, one);
            }
        }
        black_box(sums);
    }

    /// # Safety
    /// The host must have AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn int8_pairs() {
        let (one, ones) = (black_box(_mm256_set1_epi8(1)), _mm256_set1_epi16(1));
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..TURNS {
            for sum in &mut sums {
                // The weights carry the sum, so that no product can be taken out of the loop.
                let pairs = _mm256_maddubs_epi16(one, _mm256_sign_epi8(*sum, one));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(sums);
    }
}
