//! Products in plain Rust.

use std::ops::Range;

use super::{BlockMatrix, GROUP, Panel, STEP, UNIT};
use crate::kernels::{ROUNDING, multiply_add};

/// The largest magnitude of 8-bit numbers here: with −128 the range would lie askew.
const LARGEST: f32 = 127.0;

/// Rounds a unit of activations; returns the scale and the sums of both halves.
#[inline(always)]
pub(super) fn round<const FMA: bool>(x: &[f32; UNIT], numbers: &mut [i8; UNIT]) -> (f32, [i32; 2]) {
    // As bits, magnitudes are in order, infinities and NaN the last.
    let mut peak = 0u32;
    for x in x {
        peak = peak.max(x.abs().to_bits());
    }
    let peak = f32::from_bits(peak);
    let scale = peak / LARGEST;
    // Of the smallest numbers the scale itself would be rounded.
    if !(scale >= f32::MIN_POSITIVE && scale.is_finite()) {
        numbers.fill(0);
        let scale = if peak.is_finite() { 0.0 } else { f32::NAN };
        return (scale, [0, 0]);
    }
    let inverse = LARGEST / peak;
    let mut sums = [0i32; 2];
    for (half, sum) in sums.iter_mut().enumerate() {
        for at in half * (UNIT / 2)..(half + 1) * (UNIT / 2) {
            let number =
                (multiply_add::<FMA>(x[at], inverse, ROUNDING).to_bits() & 255) as u8 as i8;
            numbers[at] = number;
            *sum += i32::from(number);
        }
    }
    (scale, sums)
}

/// [`BlockMatrix::multiply`] in plain Rust: numbers are unpacked a unit at a time, then multiplied by all rows.
#[inline(always)]
pub(super) fn multiply<const FMA: bool>(
    matrix: &BlockMatrix,
    groups: Range<usize>,
    x: &Panel,
    out: &mut [f32],
    stride: usize,
) {
    let layout = matrix.kind().layout();
    let parts = UNIT / layout.columns;
    let m = x.filled();
    let first = groups.start;
    for group in groups {
        let mut sums = [[0f32; GROUP]; Panel::ROWS];
        for unit in 0..matrix.columns() / UNIT {
            let numbers = matrix.unit(group, unit);
            let x_numbers = &x.numbers.as_chunks::<UNIT>().0[unit * m..][..m];
            let x_scales = &x.scales[unit * m..][..m];
            for part in 0..parts {
                let (scales, least) = matrix.scales(group, unit * parts + part);
                let steps = part * layout.columns / STEP..(part + 1) * layout.columns / STEP;
                // Sums of a half, or of the whole unit.
                let sums_at = (3 * unit + if parts == 2 { part } else { 2 }) * m;
                for (r, sums) in sums.iter_mut().enumerate().take(x.rows()) {
                    let mut dots = [0i32; GROUP];
                    let x_steps = x_numbers[r].as_chunks::<STEP>().0;
                    for (numbers, x) in numbers[steps.clone()].iter().zip(&x_steps[steps.clone()]) {
                        for (dot, numbers) in dots.iter_mut().zip(numbers) {
                            for (&number, &x) in numbers.iter().zip(x) {
                                *dot += i32::from(number) * i32::from(x);
                            }
                        }
                    }
                    let (x_scale, x_sum) = (x_scales[r], x.scaled_sums[sums_at + r]);
                    for lane in 0..GROUP {
                        let dot = dots[lane] as f32 * x_scale;
                        let sum = multiply_add::<FMA>(dot, scales[lane], sums[lane]);
                        sums[lane] = multiply_add::<FMA>(least[lane], x_sum, sum);
                    }
                }
            }
        }
        let rows = matrix.rows_of(&(group..group + 1)).len();
        let at = (group - first) * GROUP;
        for (r, sums) in sums.iter().enumerate().take(x.rows()) {
            out[r * stride + at..][..rows].copy_from_slice(&sums[..rows]);
        }
    }
}
