//! Counter-based Gumbel noise and the two transcendental functions that decisions rest on, in plain IEEE arithmetic
//! (no fused operations, no libm), so that every ISA and host computes the same bits. The loops over tokens vectorise.

/// `2^23` and its bits: a small integer in the low mantissa bits converts without an integer-to-float instruction.
const MAGIC: f32 = 8_388_608.0;
const MAGIC_BITS: u32 = 0x4b00_0000;

/// Standard Gumbel variate `-ln(-ln(u))`; `u` has 23 bits hashed from `(key, token)`, so it lies within [-2.78, 16.64].
///
/// `argmax(x / T + gumbel)` samples from `softmax(x / T)` (Gumbel-max; Maddison et al. 2014, "A* Sampling").
#[inline(always)]
pub fn gumbel(key: [u32; 2], token: u32) -> f32 {
    Noise::new(key).at(token)
}

/// The noise of one key; the part of the hash that does not depend on the token is done once.
#[derive(Clone, Copy)]
pub(super) struct Noise {
    outer: u32,
    inner: u32,
}

impl Noise {
    #[inline(always)]
    pub(super) fn new(key: [u32; 2]) -> Noise {
        let inner = mix(key[0] ^ 0x9e37_79b9);
        Noise { inner, outer: mix(key[1] ^ inner) }
    }

    #[inline(always)]
    pub(super) fn at(self, token: u32) -> f32 {
        let hash = mix(scramble(token ^ self.inner) ^ self.outer);
        let integer = f32::from_bits(MAGIC_BITS | (hash >> 9)) - MAGIC;
        let u = (integer + 0.5) * (1.0 / MAGIC);
        -ln(-ln(u))
    }
}

/// Bijective 32-bit mixer of two rounds (C. Wellons, "Prospecting for hash functions", lowbias32).
#[inline(always)]
fn scramble(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Bijective 32-bit mixer of three rounds (same source, triple32).
#[inline(always)]
fn mix(mut x: u32) -> u32 {
    x ^= x >> 17;
    x = x.wrapping_mul(0xed5a_d4bb);
    x ^= x >> 11;
    x = x.wrapping_mul(0xac4c_1b51);
    x ^= x >> 15;
    x = x.wrapping_mul(0x3184_8bab);
    x ^ (x >> 14)
}

/// Natural logarithm of a normal positive `x` within a factor `2^60` of 1; relative error under 2e-7, also near 1.
#[inline(always)]
pub(super) fn ln(x: f32) -> f32 {
    // x = (1 + f) * 2^e with 1 + f in [sqrt(1/2), sqrt(2)); BIAS keeps the exponent field positive. Then Cephes logf.
    const SQRT_HALF: u32 = 0x3f35_04f3;
    const BIAS: u32 = 64;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const POLYNOMIAL: [f32; 8] = [
        -0.115_146_1,
        0.116_769_99,
        -0.124_201_41,
        0.142_493_23,
        -0.166_680_58,
        0.200_007_15,
        -0.249_999_94,
        0.333_333_3,
    ];
    let bits = x.to_bits();
    let exponent = bits.wrapping_sub(SQRT_HALF).wrapping_add(BIAS << 23) >> 23;
    let f = f32::from_bits(bits.wrapping_sub(exponent << 23).wrapping_add(BIAS << 23)) - 1.0;
    let e = f32::from_bits(MAGIC_BITS | exponent) - (MAGIC + BIAS as f32);
    let mut p = 0.070_376_836;
    for c in POLYNOMIAL {
        p = p * f + c;
    }
    let z = f * f;
    let tail = p * f * z + LN2_LOW * e - 0.5 * z;
    (f + tail) + LN2_HIGH * e
}

/// `e^x` for `x <= 0`, relative error under 1e-9; 0 below -708 and for minus infinity.
#[inline(always)]
pub(super) fn exp(x: f64) -> f64 {
    if x < -708.0 {
        return 0.0;
    }
    let n = (x * std::f64::consts::LOG2_E).round();
    let r = x - n * std::f64::consts::LN_2;
    let mut p = 1.0 / 362_880.0;
    for c in [40_320.0, 5_040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        p = p * r + 1.0 / c;
    }
    p * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_agree_with_libm() {
        for i in 1..200_000u32 {
            for x in [f64::from(i) * 1.1e-3, 1.0 - f64::from(i) / 2f64.powi(24)] {
                let (x, exact) = (x as f32, f64::from(x as f32).ln());
                assert!((f64::from(ln(x)) - exact).abs() <= 2e-7 * exact.abs(), "ln {x}: {} {exact}", ln(x));
            }
            let y = f64::from(i) * -3.3e-3;
            assert!((exp(y) - y.exp()).abs() <= 1e-9 * y.exp(), "exp {y}: {} {}", exp(y), y.exp());
        }
        assert_eq!((exp(f64::NEG_INFINITY), exp(-709.0), exp(0.0), ln(1.0)), (0.0, 0.0, 1.0, 0.0));
    }

    #[test]
    fn noise_is_standard_gumbel() {
        let count = 1 << 20;
        for key in [[0, 0], [1, 0], [0, 1], [7, 0xffff_ffff]] {
            let draws: Vec<f64> = (0..count).map(|t| f64::from(gumbel(key, t))).collect();
            let mean = draws.iter().sum::<f64>() / f64::from(count);
            let variance = draws.iter().map(|g| (g - mean) * (g - mean)).sum::<f64>() / f64::from(count);
            assert!((mean - 0.577_215_66).abs() < 5e-3, "mean {mean}");
            assert!((variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 2e-2, "variance {variance}");
            assert!(draws.iter().all(|g| g.is_finite()));
        }
    }

    #[test]
    fn neighbouring_keys_are_uncorrelated() {
        let count = 1 << 16;
        for (a, b) in [([1, 2], [1, 3]), ([1, 2], [2, 2]), ([5, 5], [4, 4])] {
            let (mut product, mut equal) = (0.0, 0);
            for t in 0..count {
                let (x, y) = (f64::from(gumbel(a, t)), f64::from(gumbel(b, t)));
                product += (x - 0.577_215_66) * (y - 0.577_215_66);
                equal += u32::from(x == y);
            }
            assert!((product / f64::from(count)).abs() < 0.05, "covariance {}", product / f64::from(count));
            assert!(equal < 3);
        }
    }

    #[test]
    fn bits_are_pinned() {
        let bits: Vec<u32> = (0..4).map(|t| gumbel([1, 2], t).to_bits()).collect();
        assert_eq!(bits, PINNED);
    }

    const PINNED: [u32; 4] = [3_202_900_250, 1_057_733_311, 3_212_992_522, 1_066_825_491];
}
