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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[inline(always)]
    unsafe fn each<L: Lanes>(x: &mut [f32]) {
        for chunk in x.chunks_exact_mut(16) {
            for lane in (0..16).step_by(L::WIDTH) {
                // SAFETY: chunks hold 16 elements; dispatch promises the ISA.
                unsafe { exp(L::load(chunk.as_ptr().add(lane))).store(chunk.as_mut_ptr().add(lane)) };
            }
        }
    }

    #[test]
    fn errors_stay_under_two_units_in_the_last_place() {
        let x: Vec<f32> = (0..1 << 20).map(|i| i as f32 * -8.29e-5).collect();
        for isa in Isa::available() {
            let mut y = x.clone();
            dispatch!(isa, each(&mut y));
            let worst = x.iter().zip(&y).map(|(&x, &y)| {
                let exact = f64::from(x).exp();
                let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                (f64::from(y) - exact).abs() / unit
            });
            let worst = worst.fold(0.0, f64::max);
            assert!(worst < 2.0, "{}: {worst} units", isa.name());
            assert_eq!(y[0], 1.0);
        }
    }
}
