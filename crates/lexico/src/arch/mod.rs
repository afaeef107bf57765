//! The inner loops, chosen once at run time for the machine at hand.
//!
//! `portable` holds every kernel as plain Rust that vectorises by itself; `x86_64` compiles the
//! same code for AVX2 and AVX-512 and picks one when the program first needs it, in the manner of
//! the memchr crate. On aarch64 the portable code already is NEON, which that target always has.

pub(crate) mod matmul;
mod portable;
pub(crate) mod scan;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use half::{bf16, f16};

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

/// `a += scale · b`.
pub(crate) fn add_scaled(a: &mut [f32], scale: f32, b: &[f32]) {
    dispatch!(add_scaled(a, scale, b))
}

/// `⟨a, b⟩`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    dispatch!(dot(a, b))
}

/// `⟨a, b⟩`.
pub(crate) fn dot_f16(a: &[f16], b: &[f32]) -> f32 {
    dispatch!(dot_f16(a, b))
}

/// `⟨a, b⟩`.
pub(crate) fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 {
    dispatch!(dot_bf16(a, b))
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

    /// Runs a kernel at every level that this machine has and gives all results.
    macro_rules! every_level {
        ($name:ident($($argument:expr),*)) => {{
            let mut results = vec![portable::$name::<false>($($argument),*)];
            #[cfg(target_arch = "x86_64")]
            {
                use x86_64::Level;
                if matches!(x86_64::level(), Level::Avx2 | Level::Avx512) {
                    // SAFETY: the level says that avx2, fma and f16c are there.
                    results.push(unsafe { x86_64::avx2::$name($($argument),*) });
                }
                if matches!(x86_64::level(), Level::Avx512) {
                    // SAFETY: the level says that avx512f and avx512vl are there too.
                    results.push(unsafe { x86_64::avx512::$name($($argument),*) });
                }
            }
            results
        }};
    }

    fn close(a: f32, b: f64, size: f64) -> bool {
        (f64::from(a) - b).abs() <= 1e-5 * size.max(1e-30)
    }

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
                let halves: Vec<f16> = row.iter().map(|&x| f16::from_f32(x)).collect();
                let brains: Vec<bf16> = row.iter().map(|&x| bf16::from_f32(x)).collect();
                let product = |numbers: Vec<f32>| -> f64 {
                    numbers.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
                };
                let want = product(halves.iter().map(|x| x.to_f32()).collect());
                for got in every_level!(dot_f16(&halves, &x)) {
                    prop_assert!(close(got, want, 16.0 * m as f64));
                }
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
        fn the_peak_is_the_largest_magnitude(a in prop::collection::vec(-9f32..9.0, 1..600)) {
            let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (index, magnitude) in every_level!(peak(&a)) {
                prop_assert_eq!(magnitude, largest);
                prop_assert_eq!(Some(index), a.iter().position(|x| x.abs() == largest));
            }
        }

        #[test]
        fn codes_are_gathered_and_scattered(
            group in prop_oneof![1usize..9, Just(17)], lengths in prop::collection::vec(0usize..9, 0..30), seed: u32,
        ) {
            const ATOMS: usize = 23;
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 8
            };
            let nonzeros: usize = lengths.iter().sum();
            let indices: Vec<u16> = (0..nonzeros).map(|_| (draw() % ATOMS as u32) as u16).collect();
            let mut number = || draw() as f32 / (1 << 23) as f32 - 1.0;
            let coefficients: Vec<f32> = (0..nonzeros).map(|_| number()).collect();
            let p: Vec<f32> = (0..ATOMS * group).map(|_| number()).collect();
            let weights: Vec<f32> = (0..lengths.len() * group).map(|_| number()).collect();
            let ends: Vec<usize> = lengths.iter().scan(0, |end, l| { *end += l; Some(*end) }).collect();
            let block = Block { indices: &indices, coefficients: &coefficients, ends: &ends };

            let mut expected_scores = vec![0f64; lengths.len() * group];
            let mut expected_u = vec![0f64; ATOMS * group];
            for (t, (indices, coefficients)) in block.vectors().enumerate() {
                for (&i, &c) in indices.iter().zip(coefficients) {
                    for g in 0..group {
                        let (at, own) = (usize::from(i) * group + g, t * group + g);
                        expected_scores[own] += f64::from(c) * f64::from(p[at]);
                        expected_u[at] += f64::from(c) * f64::from(weights[own]);
                    }
                }
            }
            let mut out = vec![f32::NAN; lengths.len() * group];
            let mut u = vec![0.0; ATOMS * group];
            every_level!(scores(block, &p, group, &mut out));
            let levels = every_level!(accumulate(block, &weights, group, &mut u)).len() as f64;
            for (&got, want) in out.iter().zip(expected_scores) {
                prop_assert!(close(got, want, 20.0));
            }
            for (&got, want) in u.iter().zip(expected_u) {
                prop_assert!(close(got, levels * want, 20.0 * lengths.len() as f64));
            }
        }
    }
}
