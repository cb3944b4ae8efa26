//! Vectors of f32 whose operations are those of one instruction set. Algorithms are written once over [`Lanes`].

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

use crate::kv::Element;
use half::bf16;

/// A vector of [`Lanes::WIDTH`] f32 values. Every lane does the same arithmetic, wherever it stands.
///
/// Every function is unsafe because it needs its instruction set; pointers must be valid for `WIDTH` elements.
#[allow(clippy::missing_safety_doc)]
pub(crate) trait Lanes: Copy {
    /// Lanes: 4, 8 or 16.
    const WIDTH: usize;
    /// All lanes 0.
    unsafe fn zero() -> Self;
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self;
    /// Unaligned load.
    unsafe fn load(from: *const f32) -> Self;
    /// Unaligned load of bf16, widened.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Unaligned loads of whole numbers: `from - less`, wrapping, then rounded to f32.
    unsafe fn load_int(from: *const i32, less: *const i32) -> Self;
    /// Unaligned store.
    unsafe fn store(self, to: *mut f32);
    /// Unaligned store, rounded to bf16: to nearest even, and a NaN stays one.
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: 16 is the widest; the caller promises the instruction set and `WIDTH` elements at `to`.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, &lane) in lanes[..Self::WIDTH].iter().enumerate() {
                to.add(i).write(<bf16 as Element>::round(lane).to_bits());
            }
        }
    }
    /// Sum.
    unsafe fn add(self, other: Self) -> Self;
    /// Difference.
    unsafe fn sub(self, other: Self) -> Self;
    /// Product.
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`; fused except on [`portable`].
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    /// The larger; `other` where either is not a number.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller; `other` where either is not a number.
    unsafe fn min(self, other: Self) -> Self;
    /// 2 to the power of lanes that hold whole numbers from -126 to 127.
    unsafe fn pow2(self) -> Self;

    /// Whether any lane equals the same lane of `other`.
    unsafe fn any_equal(self, other: Self) -> bool;

    /// Sum of all lanes: halves added pairwise.
    #[inline(always)]
    unsafe fn reduce_sum(self) -> f32 {
        let mut lanes = [0.0f32; 16];
        // SAFETY: 16 is the widest; the caller promises the instruction set.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut width = Self::WIDTH;
        while width > 1 {
            width /= 2;
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        lanes[0]
    }
}

/// Calls `f::<L>(args)` compiled for the lanes of `isa`. `f` is an `#[inline(always)] unsafe fn` generic over [`Lanes`].
macro_rules! dispatch {
    ($isa:expr, $f:ident($($arg:expr),* $(,)?)) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Cpu::new` refuses an instruction set that the host lacks, and kernels take theirs from a `Cpu`.
            $crate::Isa::Avx512 | $crate::Isa::Amx => unsafe {
                $crate::lanes::avx512::enter(#[inline(always)] || $f::<$crate::lanes::avx512::F32x16>($($arg),*))
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::Isa::Avx2 => unsafe {
                $crate::lanes::avx2::enter(#[inline(always)] || $f::<$crate::lanes::avx2::F32x8>($($arg),*))
            },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            $crate::Isa::Neon => unsafe { $f::<$crate::lanes::neon::F32x4>($($arg),*) },
            // SAFETY: portable lanes need no instruction set.
            _ => unsafe { $f::<$crate::lanes::portable::F32s>($($arg),*) },
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[inline(always)]
    unsafe fn arithmetic<L: Lanes>() -> Vec<f32> {
        let a: Vec<f32> = (0..16).map(|i| i as f32 - 5.5).collect();
        let halves: Vec<u16> = a.iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
        let mut out = vec![0.0; 16 * 7];
        // SAFETY: slices hold 16 lanes; dispatch promises the instruction set.
        unsafe {
            for i in (0..16).step_by(L::WIDTH) {
                let x = L::load(a.as_ptr().add(i));
                let y = L::load_bf16(halves.as_ptr().add(i));
                let results = [
                    x.add(y),
                    x.sub(L::splat(2.0)).mul(y),
                    x.fma(y, L::splat(1.0)),
                    x.max(L::zero()),
                    x.min(L::zero()),
                    x.add(L::splat(5.5)).pow2(),
                ];
                for (row, result) in results.into_iter().enumerate() {
                    result.store(out.as_mut_ptr().add(16 * row + i));
                }
            }
            let whole: Vec<i32> = (0..32).map(|i| i * i * 70_001 - 9).collect();
            for i in (0..16).step_by(L::WIDTH) {
                L::load_int(whole.as_ptr().add(i), whole.as_ptr().add(i + 7)).store(out.as_mut_ptr().add(i + 16 * 6));
            }
            let last = L::load(a.as_ptr().add(16 - L::WIDTH));
            out.extend([9.5, 9.0].map(|x| f32::from(u8::from(last.any_equal(L::splat(x))))));
            out.push(L::load(a.as_ptr()).reduce_sum() / L::WIDTH as f32 - L::WIDTH as f32 / 2.0);
        }
        out
    }

    #[test]
    fn every_isa_does_the_same_arithmetic() {
        let expected = dispatch!(Isa::Portable, arithmetic());
        assert_eq!(expected[16 * 5..16 * 5 + 4], [1.0, 2.0, 4.0, 8.0]);
        for isa in Isa::available() {
            assert_eq!(dispatch!(isa, arithmetic()), expected, "{}", isa.name());
        }
    }

    #[inline(always)]
    unsafe fn round<L: Lanes>(x: &[f32; 16]) -> [u16; 16] {
        let mut out = [0; 16];
        for i in (0..16).step_by(L::WIDTH) {
            // SAFETY: arrays hold 16 lanes; dispatch promises the instruction set.
            unsafe { L::load(x.as_ptr().add(i)).store_bf16(out.as_mut_ptr().add(i)) };
        }
        out
    }

    #[test]
    fn every_isa_rounds_to_bf16_alike() {
        let special = [0, 1, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0xffff_ffff, 0x3f80_8000, 0x3f81_8000];
        let drawn = (0..1u32 << 16).map(|i| i.wrapping_mul(0x9e37_79b9));
        let values: Vec<f32> = special.into_iter().chain(drawn).map(f32::from_bits).collect();
        for x in values.as_chunks::<16>().0 {
            let expected = x.map(|x| <bf16 as Element>::round(x).to_bits());
            for isa in Isa::available() {
                assert_eq!(dispatch!(isa, round(x)), expected, "{} {x:?}", isa.name());
            }
        }
    }
}
