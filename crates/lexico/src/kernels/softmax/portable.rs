//! The largest scores and their exponentials in plain Rust, which vectorises at any width.

use crate::kernels::{LANES, ROUNDING, larger, multiply_add};

/// Below this `exp` is subnormal in f32.
const SMALLEST_EXPONENT: f32 = -87.3;

/// `eˣ` for `x ≤ 88`, to two units in the last place; 0 where it would be subnormal, NaN for NaN.
#[inline(always)]
pub(in crate::kernels) fn exp<const FMA: bool>(x: f32) -> f32 {
    // A power of two, and the rest within ln 2 / 2 of 0 by the polynomial of Cephes' expf (Moshier 1989);
    // ln 2 in two parts, so that the product with the first is exact (Cody & Waite 1980).
    let rounded = multiply_add::<FMA>(x, std::f32::consts::LOG2_E, ROUNDING);
    let power = rounded - ROUNDING;
    let rest = multiply_add::<FMA>(power, -0.693_359_4, x);
    let rest = multiply_add::<FMA>(power, 2.121_944_4e-4, rest);
    let mut sum = 1.987_569_1e-4;
    for term in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        sum = multiply_add::<FMA>(sum, rest, term);
    }
    let sum = multiply_add::<FMA>(sum * rest, rest, rest) + 1.0;
    // The integer goes into the exponent; that of a NaN ends in zeros, so that `sum` stays one.
    let result = f32::from_bits(sum.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x < SMALLEST_EXPONENT { 0.0 } else { result }
}

#[inline(always)]
pub(super) fn largest<const FMA: bool>(scores: &[f32], largest: &mut [f32]) {
    let group = largest.len();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = scores.as_chunks::<LANES>();
    for block in blocks {
        for l in 0..LANES {
            lanes[l] = larger(block[l], lanes[l]);
        }
    }
    for (lane, &score) in lanes.iter_mut().zip(rest) {
        *lane = lane.max(score);
    }
    for (l, &lane) in lanes.iter().enumerate() {
        largest[l % group] = largest[l % group].max(lane);
    }
}

#[inline(always)]
pub(super) fn exponentials<const FMA: bool>(scores: &mut [f32], largest: &[f32], sums: &mut [f32]) {
    let group = largest.len();
    let mut base = [0f32; LANES];
    for (l, base) in base.iter_mut().enumerate() {
        *base = largest[l % group];
    }
    let mut lanes = [0f32; LANES];
    let (blocks, rest) = scores.as_chunks_mut::<LANES>();
    for block in blocks {
        for l in 0..LANES {
            block[l] = exp::<FMA>(block[l] - base[l]);
            lanes[l] += block[l];
        }
    }
    for (l, score) in rest.iter_mut().enumerate() {
        *score = exp::<FMA>(*score - base[l]);
        lanes[l] += *score;
    }
    for (l, &lane) in lanes.iter().enumerate() {
        sums[l % group] += lane;
    }
}
