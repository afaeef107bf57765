//! The softmax of scores that come block by block.

mod portable;

use super::{compile, dispatch};
pub(super) use portable::exp;

compile! {
    largest(scores: &[f32], largest: &mut [f32]);
    exponentials(scores: &mut [f32], largest: &[f32], sums: &mut [f32]);
}

/// Queries of the largest query group that kernels know.
pub(crate) const MAX_QUERIES: usize = 32;

/// Largest difference of a score and what is taken off before the exponential: far from f32's limits, so that
/// sums rarely need to be scaled anew (as in FlashAttention-4, 2025).
const HEADROOM: f32 = 16.0;

/// The softmax of a query group's scores `[n, group]`, as far as they go: replaces every score `s` of a query by
/// `exp(s − reference)`, and adds those to `sums`. A reference stays where no score lies more than 16 above it,
/// else it is raised to the largest. A score of `−∞` becomes 0 even where there is no other; NaN stays NaN.
pub(crate) fn softmax(scores: &mut [f32], references: &mut [f32], sums: &mut [f32]) {
    let group = references.len();
    assert!(
        group.is_power_of_two() && group <= MAX_QUERIES && sums.len() == group,
        "a query group that kernels know"
    );
    let mut largest = [f32::NEG_INFINITY; MAX_QUERIES];
    dispatch!(largest(scores, &mut largest[..group]));
    let mut base = [0f32; MAX_QUERIES];
    for ((reference, largest), base) in references.iter_mut().zip(largest).zip(&mut base) {
        if largest > *reference + HEADROOM {
            *reference = largest;
        }
        // Nothing seen: any number does, but the difference of two infinities.
        *base = if *reference == f32::NEG_INFINITY {
            0.0
        } else {
            *reference
        };
    }
    dispatch!(exponentials(scores, &base[..group], sums))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::levels;

    proptest! {
        #[test]
        fn a_softmax_is_that_of_f64(
            power in 0u32..6, n in 0usize..70, hidden in 0usize..80, shift in -200f32..200.0, seed: u32,
        ) {
            let group = 1usize << power;
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 20) as f32 - 8.0 + shift
            };
            let mut scores: Vec<f32> = (0..n * group).map(|_| draw()).collect();
            let hidden = (hidden * group).min(scores.len());
            scores[..hidden].fill(f32::NEG_INFINITY);
            let before: Vec<f32> = (0..group).map(|_| draw()).collect();
            let mut largest = before.clone();
            let mut sums = vec![0.0; group];
            let mut weights = scores.clone();
            let mut references = before.clone();
            softmax(&mut weights, &mut references, &mut sums);
            let mut outputs = Vec::new();
            for level in levels() {
                let mut raised = before.clone();
                dispatch!(level, largest(&scores, &mut raised));
                for g in 0..group {
                    let own = scores.iter().skip(g).step_by(group);
                    prop_assert_eq!(raised[g], own.fold(before[g], |a, &b| a.max(b)));
                }
                largest.copy_from_slice(&raised);
                let mut weights = scores.clone();
                dispatch!(level, exponentials(&mut weights, &references, &mut vec![0.0; group]));
                outputs.push(weights);
            }
            for g in 0..group {
                let raised = largest[g] > before[g] + HEADROOM;
                prop_assert_eq!(references[g], if raised { largest[g] } else { before[g] });
            }
            let largest = references;
            let mut exact = vec![0f64; group];
            for (i, &score) in scores.iter().enumerate() {
                let x = f64::from(score) - f64::from(largest[i % group]);
                let want = x.exp();
                // Beside its own rounding, that of the difference.
                let close = (3e-7 + if x.is_finite() { 6e-8 * x.abs() } else { 0.0 }) * want + 1e-37;
                exact[i % group] += want;
                for got in outputs.iter().chain([&weights]).map(|weights| weights[i]) {
                    prop_assert!((f64::from(got) - want).abs() <= close, "{} for {}", got, want);
                }
            }
            for (got, want) in sums.iter().zip(exact) {
                prop_assert!((f64::from(*got) - want).abs() <= 1e-5 * want, "{} for {}", got, want);
            }
        }
    }
}
