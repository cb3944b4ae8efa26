//! AVX2 with FMA: eight lanes.

use super::Lanes;
use std::arch::x86_64::*;

/// Eight f32.
#[derive(Clone, Copy)]
pub(crate) struct F32x8(pub(crate) __m256);

/// Runs `f` compiled with the features of [`crate::Isa::Avx2`].
///
/// # Safety
/// The host must have them.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn enter<R>(f: impl FnOnce() -> R) -> R {
    f()
}

// SAFETY of every block below: the trait's callers promise the instruction set and valid pointers.
impl Lanes for F32x8 {
    const WIDTH: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_setzero_ps()) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: above.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_int(from: *const i32, less: *const i32) -> Self {
        // SAFETY: above.
        unsafe {
            let (from, less) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(less.cast()));
            F32x8(_mm256_cvtepi32_ps(_mm256_sub_epi32(from, less)))
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: above.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_add_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_sub_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_mul_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_fmadd_ps(self.0, factor.0, addend.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_max_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: above.
        unsafe { F32x8(_mm256_min_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn pow2(self) -> Self {
        // SAFETY: above.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvttps_epi32(self.0), _mm256_set1_epi32(127));
            F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    unsafe fn any_equal(self, other: Self) -> bool {
        // SAFETY: above.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0)) != 0 }
    }
}
