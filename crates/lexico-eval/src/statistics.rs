//! Estimates with confidence intervals.

use serde::{Deserialize, Serialize};

/// Half the width of a 95 % interval, in standard errors.
const Z: f64 = 1.959_963_984_540_054;

/// A figure and its 95 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// The interval's lower end.
    pub low: f64,
    /// The interval's upper end.
    pub high: f64,
}

impl Estimate {
    /// The same estimate on another scale; `f` rises.
    pub fn map(self, f: fn(f64) -> f64) -> Self {
        Self {
            value: f(self.value),
            low: f(self.low),
            high: f(self.high),
        }
    }

    fn around(value: f64, error: f64) -> Self {
        Self {
            value,
            low: value - Z * error,
            high: value + Z * error,
        }
    }
}

/// `right` of `of` (Wilson 1927); with none, all is possible.
pub fn share(right: usize, of: usize) -> Estimate {
    if of == 0 {
        return Estimate {
            value: 0.0,
            low: 0.0,
            high: 1.0,
        };
    }
    let (p, n) = (right as f64 / of as f64, of as f64);
    let denominator = 1.0 + Z * Z / n;
    let middle = (p + Z * Z / (2.0 * n)) / denominator;
    let half = Z / denominator * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    Estimate {
        value: p,
        low: (middle - half).max(0.0),
        high: (middle + half).min(1.0),
    }
}

/// The mean of some numbers, by its standard error; of a single one the interval is itself.
pub fn mean(numbers: &[f64]) -> Estimate {
    let n = numbers.len().max(1) as f64;
    let mean = numbers.iter().sum::<f64>() / n;
    let squares: f64 = numbers.iter().map(|x| (x - mean).powi(2)).sum();
    Estimate::around(mean, (squares / (n - 1.0).max(1.0) / n).sqrt())
}

/// The mean of independent estimates, each counting alike.
pub fn mean_of(estimates: &[Estimate]) -> Estimate {
    let n = estimates.len().max(1) as f64;
    let mean = estimates.iter().map(|e| e.value).sum::<f64>() / n;
    let error = |e: &Estimate| (e.high - e.low) / (2.0 * Z);
    let variance: f64 = estimates.iter().map(|e| error(e).powi(2)).sum();
    Estimate::around(mean, variance.sqrt() / n)
}

/// The value that a share `p` of the numbers does not exceed: the nearest rank. 0 where there are none.
pub fn percentile(mut numbers: Vec<f32>, p: f64) -> f32 {
    numbers.sort_unstable_by(f32::total_cmp);
    let rank = (p * numbers.len() as f64).ceil() as usize;
    let last = numbers.len().saturating_sub(1);
    numbers
        .get(rank.saturating_sub(1).min(last))
        .copied()
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(estimate: Estimate, expected: [f64; 3]) {
        let got = [estimate.value, estimate.low, estimate.high];
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 5e-5, "{estimate:?}");
        }
    }

    /// Of R's `prop.test(k, n, correct = FALSE)`.
    #[test]
    fn intervals_of_shares_are_wilsons() {
        close(share(8, 10), [0.8, 0.490_16, 0.943_32]);
        close(share(0, 20), [0.0, 0.0, 0.161_13]);
        close(share(300, 300), [1.0, 0.987_36, 1.0]);
        close(share(0, 0), [0.0, 0.0, 1.0]);
    }

    #[test]
    fn intervals_of_means_come_from_the_standard_error() {
        // Standard deviation 1, error 1/√3.
        close(mean(&[1.0, 2.0, 3.0]), [2.0, 0.868_41, 3.131_59]);
        close(mean(&[5.0]), [5.0, 5.0, 5.0]);
        let one = mean(&[1.0, 2.0, 3.0]);
        let two = mean_of(&[one, one]);
        close(
            two,
            [
                2.0,
                2.0 - 1.131_59 / 2f64.sqrt(),
                2.0 + 1.131_59 / 2f64.sqrt(),
            ],
        );
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let numbers = || (1..=200).rev().map(|x| x as f32).collect::<Vec<_>>();
        assert_eq!(percentile(numbers(), 0.99), 198.0);
        assert_eq!(percentile(numbers(), 1.0), 200.0);
        assert_eq!(percentile(vec![3.0], 0.99), 3.0);
        assert_eq!(percentile(vec![], 0.99), 0.0);
    }
}
