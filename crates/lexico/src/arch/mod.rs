//! The inner loops, chosen once at run time for the machine at hand.
//!
//! `portable` holds every kernel as plain Rust that vectorises by itself; `x86_64` compiles the
//! same code for AVX2 and AVX-512 and picks one when the program first needs it, in the manner of
//! the memchr crate. On aarch64 the portable code already is NEON, which that target always has.

pub(crate) mod matmul;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::code::Block;
#[cfg(target_arch = "x86_64")]
use x86_64::dispatch;

#[cfg(not(target_arch = "x86_64"))]
macro_rules! dispatch {
    ($name:ident($($argument:expr),*)) => { portable::$name::<false>($($argument),*) };
}

/// Index and magnitude of the entry that is largest in magnitude.
pub(crate) fn peak(a: &[f32]) -> (usize, f32) {
    dispatch!(peak(a))
}

/// `a -= scale · b`, then the index and magnitude of the entry of `a` that is largest in magnitude.
pub(crate) fn subtract_and_peak(a: &mut [f32], scale: f32, b: &[f32]) -> (usize, f32) {
    dispatch!(subtract_and_peak(a, scale, b))
}

/// `a += scale · b`.
pub(crate) fn add_scaled(a: &mut [f32], scale: f32, b: &[f32]) {
    dispatch!(add_scaled(a, scale, b))
}

/// `⟨a, b⟩`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    dispatch!(dot(a, b))
}

/// `out[t][g] = Σ_j c_j · p[i_j][g]` for the codes `t` of a block; `p` is `[N, group]`.
pub(crate) fn scores(block: Block<'_>, p: &[f32], group: usize, out: &mut [f32]) {
    dispatch!(scores(block, p, group, out))
}

/// `u[i_j][g] += c_j · weights[t][g]` for the codes `t` of a block; `u` is `[N, group]`.
pub(crate) fn accumulate(block: Block<'_>, weights: &[f32], group: usize, u: &mut [f32]) {
    dispatch!(accumulate(block, weights, group, u))
}

#[cfg(test)]
mod tests {
    use super::matmul::{Matrix, multiply};
    use super::*;
    use proptest::prelude::*;

    fn close(a: f32, b: f64, size: f64) -> bool {
        (f64::from(a) - b).abs() <= 1e-5 * size.max(1e-30)
    }

    fn vectors(rows: usize, columns: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-4f32..4.0, rows * columns)
    }

    proptest! {
        #[test]
        fn kernels_agree_with_f64((n, m, rows, x) in (1usize..40, 1usize..140)
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
                prop_assert!(close(dot(row, &x), want, 16.0 * m as f64));
            }
            let mut sum = rows[..m].to_vec();
            add_scaled(&mut sum, 0.5, &x);
            for ((&got, &a), &b) in sum.iter().zip(&rows).zip(&x) {
                prop_assert!(close(got, f64::from(a) + 0.5 * f64::from(b), 8.0));
            }
        }

        #[test]
        fn the_peak_is_the_largest_magnitude(mut a in prop::collection::vec(-9f32..9.0, 1..300), scale in -2f32..2.0) {
            let b: Vec<f32> = a.iter().rev().copied().collect();
            let mut expected = a.clone();
            expected.iter_mut().zip(&b).for_each(|(a, b)| *a -= scale * b);
            let (index, magnitude) = subtract_and_peak(&mut a, scale, &b);
            prop_assert_eq!(a[index].abs(), magnitude);
            prop_assert_eq!(peak(&a), (index, magnitude));
            for (&got, &want) in a.iter().zip(&expected) {
                prop_assert!((got - want).abs() <= 1e-4);
                prop_assert!(got.abs() <= magnitude);
            }
        }
    }
}
