//! NEON: four lanes.

use super::Lanes;
use std::arch::aarch64::*;

/// Four f32.
#[derive(Clone, Copy)]
pub(crate) struct F32x4(float32x4_t);

// SAFETY of every block below: NEON is part of every 64-bit Arm; callers promise valid pointers.
impl Lanes for F32x4 {
    const WIDTH: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: above.
        unsafe { F32x4(vdupq_n_f32(0.0)) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vdupq_n_f32(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vld1q_f32(from)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from)))) }
    }
    #[inline(always)]
    unsafe fn load_int(from: *const i32, less: *const i32) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vcvtq_f32_s32(vsubq_s32(vld1q_s32(from), vld1q_s32(less)))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: above.
        unsafe { vst1q_f32(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vaddq_f32(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vsubq_f32(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vmulq_f32(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vfmaq_f32(addend.0, self.0, factor.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vbslq_f32(vcgtq_f32(self.0, other.0), self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x4(vbslq_f32(vcltq_f32(self.0, other.0), self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn pow2(self) -> Self {
        // SAFETY: above.
        unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(self.0), vdupq_n_s32(127));
            F32x4(vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
        }
    }
    #[inline(always)]
    unsafe fn any_equal(self, other: Self) -> bool {
        // SAFETY: above.
        unsafe { vmaxvq_u32(vceqq_f32(self.0, other.0)) != 0 }
    }
}
