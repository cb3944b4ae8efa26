//! Plain Rust, eight lanes.

use super::Lanes;
use half::bf16;

const WIDTH: usize = 8;

/// Eight f32.
#[derive(Clone, Copy)]
pub(crate) struct F32s([f32; WIDTH]);

impl F32s {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        F32s(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

// Unsafe only by the trait: nothing here needs an instruction set.
impl Lanes for F32s {
    const WIDTH: usize = WIDTH;
    #[inline(always)]
    unsafe fn zero() -> Self {
        F32s([0.0; WIDTH])
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        F32s([x; WIDTH])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        F32s(unsafe { from.cast::<[f32; WIDTH]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; WIDTH]>().read_unaligned() };
        F32s(bits.map(|b| bf16::from_bits(b).to_f32()))
    }
    #[inline(always)]
    unsafe fn load_int(from: *const i32, less: *const i32) -> Self {
        // SAFETY: the caller's promise.
        let (from, less) =
            unsafe { (from.cast::<[i32; WIDTH]>().read_unaligned(), less.cast::<[i32; WIDTH]>().read_unaligned()) };
        F32s(std::array::from_fn(|i| from[i].wrapping_sub(less[i]) as f32))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; WIDTH]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // Not `mul_add`: without the instruction it is a slow library call.
        F32s(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn pow2(self) -> Self {
        F32s(self.0.map(|x| f32::from_bits(((x as i32 + 127) as u32) << 23)))
    }
    #[inline(always)]
    unsafe fn any_equal(self, other: Self) -> bool {
        self.0.iter().zip(other.0).fold(false, |any, (&a, b)| any | (a == b))
    }
}
