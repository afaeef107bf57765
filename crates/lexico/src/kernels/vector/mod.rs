//! Sums, products and searches over vectors.

pub(super) mod portable;

use half::bf16;

use super::rows::Number;
use super::{compile, dispatch};

compile! {
    peak(a: &[f32]) -> f32;
    square(a: &[f32]) -> f64;
    dot_mixed(a: &[f32], b: &[f64]) -> f64;
    subtract_scaled(a: &mut [f64], scale: f64, b: &[impl Number]);
    round_to_bytes(x: &[f32], largest: f32, out: &mut [i8]) -> Rounded;
    add_scaled(a: &mut [f32], scale: f32, b: &[impl Number]);
    widen(a: &[impl Number], unit: f32, out: &mut [f32]);
    dot(a: &[impl Number], b: &[f32]) -> f32;
    dot_bf16(a: &[bf16], b: &[f32]) -> f32;
}

/// The largest magnitude, 0 for no numbers.
pub(crate) fn peak(a: &[f32]) -> f32 {
    dispatch!(peak(a))
}

/// The sum of squares.
pub(crate) fn square(a: &[f32]) -> f64 {
    dispatch!(square(a))
}

/// `⟨a, b⟩`, in f64.
pub(crate) fn dot_mixed(a: &[f32], b: &[f64]) -> f64 {
    dispatch!(dot_mixed(a, b))
}

/// Euclidean length, in f64: that of any finite vector is finite.
pub(crate) fn norm(x: &[f32]) -> f64 {
    square(x).sqrt()
}

/// `a -= scale · b`, in f64.
pub(crate) fn subtract_scaled(a: &mut [f64], scale: f64, b: &[impl Number]) {
    dispatch!(subtract_scaled(a, scale, b))
}

/// What rounding a vector to bytes made of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rounded {
    /// What the bytes are multiples of.
    pub(crate) unit: f32,
    /// The sum of squares of what rounding took, in units.
    pub(crate) rest: f32,
    /// The sum of squares of the whole, in units.
    pub(crate) whole: f32,
    /// The sum of the bytes.
    pub(crate) sum: i32,
}

/// Rounds numbers to bytes, ties to even, in the [`unit`] of which the largest magnitude is `largest`.
pub(crate) fn round_to_bytes(x: &[f32], largest: f32, out: &mut [i8]) -> Rounded {
    assert_eq!(x.len(), out.len(), "a byte for each number");
    dispatch!(round_to_bytes(x, largest, out))
}

/// The unit of numbers whose largest magnitude is `peak` that makes this `largest` units.
#[inline(always)]
pub(crate) fn unit(peak: f32, largest: f32) -> f32 {
    /// Numbers of no vector that counts, of whose inverses nothing is left in f32.
    const NOTHING: f32 = 1e-30;
    if peak > NOTHING { peak / largest } else { 1.0 }
}

/// `a += scale · b`.
pub(crate) fn add_scaled(a: &mut [f32], scale: f32, b: &[impl Number]) {
    dispatch!(add_scaled(a, scale, b))
}

/// `out = unit · a`, signs of zeros kept where the unit is 1.
pub(crate) fn widen(a: &[impl Number], unit: f32, out: &mut [f32]) {
    dispatch!(widen(a, unit, out))
}

/// `⟨a, b⟩`.
pub(crate) fn dot(a: &[impl Number], b: &[f32]) -> f32 {
    dispatch!(dot(a, b))
}

/// `⟨a, b⟩`.
pub fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 {
    dispatch!(dot_bf16(a, b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::matmul::{Matrix, multiply};
    use crate::kernels::testing::{close, every_level};

    fn vectors(rows: usize, columns: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-4f32..4.0, rows * columns)
    }

    proptest! {
        #[test]
        fn products_agree_with_f64((n, m, rows, x) in (1usize..40, 1usize..140)
            .prop_flat_map(|(n, m)| (Just(n), Just(m), vectors(n, m), vectors(1, m))))
        {
            let exact: Vec<f64> = rows.chunks(m)
                .map(|row| row.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum())
                .collect();
            let mut out = vec![0.0; n];
            let (matrix, vector) = (Matrix::by_rows(&rows, n, m), Matrix::by_rows(&x, 1, m));
            multiply(&mut out, false, matrix, vector.transposed());
            for (row, (&got, &want)) in rows.chunks(m).zip(out.iter().zip(&exact)) {
                prop_assert!(close(got, want, 16.0 * m as f64));
                for got in every_level!(dot(row, &x)) {
                    prop_assert!(close(got, want, 16.0 * m as f64));
                }
            }
            for row in rows.chunks(m) {
                let brains: Vec<bf16> = row.iter().map(|&x| bf16::from_f32(x)).collect();
                let product = |numbers: Vec<f32>| -> f64 {
                    numbers.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
                };
                let want = product(brains.iter().map(|x| x.to_f32()).collect());
                for got in every_level!(dot_bf16(&brains, &x)) {
                    prop_assert!(close(got, want, 16.0 * m as f64));
                }
            }
            // The levels run one after the other on the same numbers.
            let mut sum = rows[..m].to_vec();
            let levels = every_level!(add_scaled(&mut sum, 0.5, &x)).len() as f64;
            for ((&got, &a), &b) in sum.iter().zip(&rows).zip(&x) {
                prop_assert!(close(got, f64::from(a) + levels * 0.5 * f64::from(b), 8.0));
            }
        }

        #[test]
        fn the_peak_is_the_largest_magnitude(a in prop::collection::vec(-9f32..9.0, 0..600)) {
            let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for magnitude in every_level!(peak(&a)) {
                prop_assert_eq!(magnitude, largest);
            }
        }

        #[test]
        fn sums_in_f64_and_rounded_bytes(a in prop::collection::vec(-9f32..9.0, 0..300), largest in 1f32..127.0) {
            let wide: Vec<f64> = a.iter().map(|&x| 1.0 + f64::from(x) / 3.0).collect();
            let exact: f64 = a.iter().map(|&x| f64::from(x).powi(2)).sum();
            let mixed: f64 = a.iter().zip(&wide).map(|(&x, y)| f64::from(x) * y).sum();
            for got in every_level!(square(&a)) {
                prop_assert!((got - exact).abs() <= 1e-12 * exact);
            }
            for got in every_level!(dot_mixed(&a, &wide)) {
                prop_assert!((got - mixed).abs() <= 1e-9);
            }
            let mut rest = wide.clone();
            let levels = every_level!(subtract_scaled(&mut rest, 0.5, &a)).len() as f64;
            for ((rest, wide), &a) in rest.iter().zip(&wide).zip(&a) {
                prop_assert!((rest - (wide - levels * 0.5 * f64::from(a))).abs() <= 1e-12);
            }
            let mut bytes = vec![0; a.len()];
            for rounded in every_level!(round_to_bytes(&a, largest, &mut bytes)) {
                prop_assert_eq!(rounded.unit, unit(a.iter().fold(0f32, |peak, x| peak.max(x.abs())), largest));
                let scaled = || a.iter().map(|&x| f64::from(x * (1.0 / rounded.unit)));
                let rests: f64 = scaled().zip(&bytes).map(|(x, &b)| (x - f64::from(b)).powi(2)).sum();
                prop_assert!((f64::from(rounded.rest) - rests).abs() <= 1e-4 * rests + 1e-6);
                let wholes: f64 = scaled().map(|x| x * x).sum();
                prop_assert!((f64::from(rounded.whole) - wholes).abs() <= 1e-4 * wholes);
                prop_assert_eq!(rounded.sum, bytes.iter().map(|&b| i32::from(b)).sum::<i32>());
                for (x, &b) in scaled().zip(&bytes) {
                    prop_assert!((x - f64::from(b)).abs() <= 0.5);
                }
            }
        }
    }
}
