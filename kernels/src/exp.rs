//! Pieces of a softmax over lanes, shared by attention and the vocabulary reduction.

use crate::lanes::Lanes;

/// Arguments below this give the smallest normal results; callers zero what must be exactly 0.
pub(crate) const EXP_MIN: f32 = -87.0;

/// `e^x` per lane for `x <= 0`, clamped below at [`EXP_MIN`]; error under 2 units in the last place. Every lane does
/// the same operations, so a value's bits do not depend on its place.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    // Cody-Waite: x = n ln2 + r with ln2 in two parts, then the minimax polynomial of Cephes expf on |r| <= ln2 / 2.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const POLYNOMIAL: [f32; 5] = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // SAFETY: the caller's promise.
    unsafe {
        let x = x.max(L::splat(EXP_MIN));
        let n = x.fma(L::splat(std::f32::consts::LOG2_E), L::splat(ROUND)).sub(L::splat(ROUND));
        let r = n.fma(L::splat(-LN2_LOW), n.fma(L::splat(-LN2_HIGH), x));
        let mut p = L::splat(1.987_569_2e-4);
        for c in POLYNOMIAL {
            p = p.fma(r, L::splat(c));
        }
        let e = p.fma(r.mul(r), r.add(L::splat(1.0)));
        e.mul(n.pow2())
    }
}

/// The largest lane; unspecified where a lane is not a number.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
pub(crate) unsafe fn largest<L: Lanes>(x: L) -> f32 {
    let mut lanes = [0.0f32; 16];
    // SAFETY: 16 is the widest vector; the caller promises the ISA.
    unsafe { x.store(lanes.as_mut_ptr()) };
    let mut width = L::WIDTH;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = if lanes[i] > lanes[i + width] { lanes[i] } else { lanes[i + width] };
        }
    }
    lanes[0]
}
