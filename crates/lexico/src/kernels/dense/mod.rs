//! Products of dense rows with the queries of a query group, and sums of weighted rows.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod generic;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use half::f16;

#[cfg(target_arch = "aarch64")]
use aarch64::{dot_product, neon};
#[cfg(target_arch = "x86_64")]
use x86_64::{amx, avx_vnni, avx2, avx512};

use super::dispatch;
use super::level::{Level, level};
use super::rows::Rows;

/// Rows that are gone through at a time where there are no kernels for half precision: they stay in the first cache.
const BLOCK: usize = 16;
/// Queries of the largest query group that there are kernels for.
pub(crate) const MAX_GROUP: usize = 8;

impl Rows<'_> {
    fn check(self, m: usize, group: usize, per_row: usize, per_query: usize) {
        assert!(
            group.is_power_of_two() && group <= MAX_GROUP,
            "a small query group"
        );
        assert!(m > 0 && self.len().is_multiple_of(m), "whole rows");
        assert_eq!(per_row, self.len() / m * group, "a number a row and query");
        assert_eq!(per_query, group * m, "whole queries");
    }

    /// Blocks of rows in f32, and the number of each one's first row.
    fn in_blocks(self, m: usize, mut visit: impl FnMut(usize, &[f32])) {
        let (count, mut room) = (self.len() / m, Vec::new());
        for first in (0..count).step_by(BLOCK) {
            let block = self.part(first, BLOCK.min(count - first), m);
            visit(first, block.widened(m, &mut room));
        }
    }
}

/// Numbers that the widest register holds.
const WIDEST: usize = 16;

/// The level for rows of `m` numbers: registers take no rows shorter than themselves.
fn level_for(m: usize) -> Level {
    if m < WIDEST { Level::Portable } else { level() }
}

/// `out[t][g] = ⟨rows_t, queries_g⟩`: `queries` `[group, m]`, `out` `[n, group]`, the query group
/// `group` a power of two up to [`MAX_GROUP`].
pub(crate) fn dots(rows: Rows<'_>, queries: &[f32], m: usize, group: usize, out: &mut [f32]) {
    rows.check(m, group, out.len(), queries.len());
    dispatch!(level_for(m), dots(rows, queries, m, out))
}

/// `out[g] += Σ_t weights[t][g] · rows_t`: `weights` `[n, group]`, `out` `[group, m]`, the query
/// group `group` a power of two up to [`MAX_GROUP`].
pub(crate) fn combine(weights: &[f32], rows: Rows<'_>, m: usize, group: usize, out: &mut [f32]) {
    rows.check(m, group, weights.len(), out.len());
    dispatch!(level_for(m), combine(weights, rows, m, out))
}

/// `⟨a, b⟩`, the product of vectors of one length.
pub fn dot_f16(a: &[f16], b: &[f32]) -> f32 {
    dispatch!(dot_f16(a, b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::{at_level, close, every_level, levels};

    proptest! {
        #[test]
        fn products_and_sums_agree_with_f64(
            n in 0usize..70, m in 1usize..150, power in 0u32..4, precision in 0..3, seed: u32,
        ) {
            let group = 1usize << power;
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let mut numbers: Vec<f32> = (0..n * m).map(|_| draw()).collect();
            let halves: Vec<f16> = numbers.iter().map(|&x| f16::from_f32(x)).collect();
            let bytes: Vec<i8> = numbers.iter().map(|x| (x * 127.0) as i8).collect();
            let units: Vec<f32> = (0..n).map(|_| draw() / 64.0).collect();
            let rows = match precision {
                0 => Rows::F32(&numbers),
                1 => {
                    numbers = halves.iter().map(|x| x.to_f32()).collect();
                    Rows::F16(&halves)
                }
                _ => {
                    let all = bytes.iter().enumerate();
                    numbers = all.map(|(i, &x)| f32::from(x) * units[i / m]).collect();
                    Rows::I8 { numbers: &bytes, units: &units }
                }
            };
            let queries: Vec<f32> = (0..group * m).map(|_| draw()).collect();
            let weights: Vec<f32> = (0..n * group).map(|_| draw()).collect();
            let start: Vec<f32> = (0..group * m).map(|_| draw()).collect();
            for t in 0..n {
                let (row, query) = (&halves[t * m..][..m], &queries[..m]);
                let pairs = row.iter().zip(query);
                let want: f64 = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                for got in every_level!(dot_f16(row, query)) {
                    prop_assert!(close(got, want, m as f64));
                }
            }
            for level in levels() {
                let mut products = vec![f32::NAN; n * group];
                at_level(level, || dots(rows, &queries, m, group, &mut products));
                for t in 0..n {
                    for g in 0..group {
                        let pairs = numbers[t * m..][..m].iter().zip(&queries[g * m..][..m]);
                        let want: f64 = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let got = products[t * group + g];
                        prop_assert!((f64::from(got) - want).abs() < 1e-6 * m as f64, "{:?}: {} for {}", level, got, want);
                    }
                }
                let mut sums = start.clone();
                at_level(level, || combine(&weights, rows, m, group, &mut sums));
                for g in 0..group {
                    for k in 0..m {
                        let terms = (0..n).map(|t| f64::from(weights[t * group + g]) * f64::from(numbers[t * m + k]));
                        let want = f64::from(start[g * m + k]) + terms.sum::<f64>();
                        let got = sums[g * m + k];
                        prop_assert!((f64::from(got) - want).abs() < 1e-6 * (n + 1) as f64, "{:?}: {} for {}", level, got, want);
                    }
                }
            }
        }
    }
}
