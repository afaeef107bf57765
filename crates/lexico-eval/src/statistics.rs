//! Estimates with confidence intervals.

/// Half the width of a 95 % interval, in standard errors.
const Z: f64 = 1.959_963_984_540_054;
/// The same where the error is estimated with 1, 2, … degrees of freedom (Student 1908).
const T: [f64; 30] = [
    12.706_2, 4.302_65, 3.182_45, 2.776_45, 2.570_58, 2.446_91, 2.364_62, 2.306_00, 2.262_16,
    2.228_14, 2.200_99, 2.178_81, 2.160_37, 2.144_79, 2.131_45, 2.119_91, 2.109_82, 2.100_92,
    2.093_02, 2.085_96, 2.079_61, 2.073_87, 2.068_66, 2.063_90, 2.059_54, 2.055_53, 2.051_83,
    2.048_41, 2.045_23, 2.042_27,
];

/// A figure and its 95 % confidence interval.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Interval, from where to where; none where there is too little to tell.
    pub interval: Option<(f64, f64)>,
}

impl Estimate {
    /// The same estimate on another scale; `f` rises.
    #[must_use]
    pub fn map(self, f: fn(f64) -> f64) -> Self {
        Self {
            value: f(self.value),
            interval: self.interval.map(|(low, high)| (f(low), f(high))),
        }
    }

    /// The same, knowing that it cannot lie outside.
    #[must_use]
    pub fn clamped(self, least: f64, most: f64) -> Self {
        let interval = self
            .interval
            .map(|(low, high)| (low.max(least), high.min(most)));
        Self { interval, ..self }
    }
}

/// `right` of `of` (Wilson 1927); with none, nothing is known.
pub fn share(right: usize, of: usize) -> Estimate {
    if of == 0 {
        return Estimate::default();
    }
    let (p, n) = (right as f64 / of as f64, of as f64);
    let denominator = 1.0 + Z * Z / n;
    let middle = (p + Z * Z / (2.0 * n)) / denominator;
    let half = Z / denominator * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    Estimate {
        value: p,
        interval: Some(((middle - half).max(0.0), (middle + half).min(1.0))),
    }
}

/// The difference of two shares of the same `of` items, of which `won` are only in the first and `lost` only in the second
/// (Tango 1998); with none, nothing is known.
pub fn paired_shares(won: usize, lost: usize, of: usize) -> Estimate {
    if of == 0 {
        return Estimate::default();
    }
    let (won, lost, n) = (won as f64, lost as f64, of as f64);
    let value = (won - lost) / n;
    // How far the difference found is from `d`, in its standard errors if `d` is the true one; it falls as `d` rises.
    let score = |d: f64| {
        // The likeliest share of `lost` where the difference is `d`.
        let b = (2.0 * n + lost - won) * d - won - lost;
        let root = (b * b + 8.0 * n * lost * d * (1.0 - d)).max(0.0).sqrt();
        let share = ((root - b) / (4.0 * n)).max(0.0);
        let variance = (n * (2.0 * share + d * (1.0 - d))).max(1e-12);
        (won - lost - n * d) / variance.sqrt()
    };
    let end = |mut low: f64, mut high: f64, wanted: f64| {
        for _ in 0..60 {
            let middle = f64::midpoint(low, high);
            if score(middle) > wanted {
                low = middle;
            } else {
                high = middle;
            }
        }
        f64::midpoint(low, high)
    };
    Estimate {
        value,
        interval: Some((end(-1.0, value, Z), end(value, 1.0, -Z))),
    }
}

/// The mean of some numbers, by its standard error and Student's distribution.
pub fn mean(numbers: &[f64]) -> Estimate {
    let (value, variance) = moments(numbers);
    let error = variance.map(|v| (v / numbers.len() as f64).sqrt() * quantile(numbers.len() - 1));
    Estimate {
        value,
        interval: error.map(|error| (value - error, value + error)),
    }
}

/// The mean of groups' means, each counting alike; the interval needs two numbers of each.
pub fn mean_of_groups(groups: &[Vec<f64>]) -> Estimate {
    let n = groups.len().max(1) as f64;
    let (means, variances): (Vec<f64>, Vec<Option<f64>>) =
        groups.iter().map(|group| moments(group)).unzip();
    let value = means.iter().sum::<f64>() / n;
    let variances: Option<Vec<f64>> = variances.into_iter().collect();
    let error = variances.filter(|_| !groups.is_empty()).map(|variances| {
        // Welch and Satterthwaite's degrees of freedom.
        let (mut sum, mut squares) = (0.0, 0.0);
        for (variance, group) in variances.iter().zip(groups) {
            let own = variance / group.len() as f64;
            sum += own;
            squares += own * own / (group.len() - 1) as f64;
        }
        let freedom: f64 = if squares > 0.0 {
            sum * sum / squares
        } else {
            1.0
        };
        sum.sqrt() / n * quantile(freedom as usize)
    });
    Estimate {
        value,
        interval: error.map(|error| (value - error, value + error)),
    }
}

/// Mean and variance of some numbers; no variance of less than two.
fn moments(numbers: &[f64]) -> (f64, Option<f64>) {
    let n = numbers.len() as f64;
    let mean = numbers.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = numbers.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, (numbers.len() > 1).then(|| squares / (n - 1.0)))
}

/// Half the width of a 95 % interval with so many degrees of freedom.
fn quantile(freedom: usize) -> f64 {
    let n = freedom as f64;
    match freedom {
        0 => T[0],
        1..=30 => T[freedom - 1],
        // Cornish and Fisher's expansion: right to five digits from here on.
        _ => {
            Z + (Z.powi(3) + Z) / (4.0 * n)
                + (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / (96.0 * n * n)
                + (3.0 * Z.powi(7) + 19.0 * Z.powi(5) + 17.0 * Z.powi(3) - 15.0 * Z)
                    / (384.0 * n.powi(3))
        }
    }
}

/// The value that a share `p` of the numbers does not exceed: the nearest rank. 0 where there are none.
pub fn percentile(numbers: &[f32], p: f64) -> f32 {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable_by(f32::total_cmp);
    // A rank that is whole but for the last bits is that rank.
    let rank = (p * numbers.len() as f64 - 1e-9).ceil() as usize;
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
        let (low, high) = estimate.interval.unwrap();
        for (got, expected) in [estimate.value, low, high].iter().zip(expected) {
            assert!((got - expected).abs() < 5e-5, "{estimate:?}");
        }
    }

    /// Values of R's `prop.test(k, n, correct = FALSE)`.
    #[test]
    fn intervals_of_shares_are_wilsons() {
        close(share(8, 10), [0.8, 0.490_16, 0.943_32]);
        close(share(0, 20), [0.0, 0.0, 0.161_13]);
        close(share(300, 300), [1.0, 0.987_36, 1.0]);
        assert_eq!(share(0, 0).interval, None);
    }

    /// Ends of the same interval by a search for the likeliest shares (scipy's `minimize_scalar` and `brentq`).
    #[test]
    fn intervals_of_paired_shares_are_tangos() {
        close(paired_shares(12, 2, 50), [0.2, 0.061_11, 0.344_71]);
        close(paired_shares(2, 12, 50), [-0.2, -0.344_71, -0.061_11]);
        close(paired_shares(0, 5, 280), [-0.017_86, -0.041_11, -0.004_08]);
        close(paired_shares(3, 40, 280), [-0.132_14, -0.179_47, -0.091_96]);
        // What is the same on all items may differ on others.
        close(paired_shares(0, 0, 300), [0.0, -0.012_64, 0.012_64]);
        let (low, high) = paired_shares(0, 4, 4).interval.unwrap();
        assert!(low == -1.0 && (-1.0..0.0).contains(&high), "{low} {high}");
        assert_eq!(paired_shares(0, 0, 0).interval, None);
    }

    #[test]
    fn intervals_of_means_are_students() {
        // Standard deviation 1, error 1/√3, two degrees of freedom: 4.30265/√3.
        close(mean(&[1.0, 2.0, 3.0]), [2.0, -0.484_13, 4.484_13]);
        close(mean(&[1.0, 2.0, 3.0]).clamped(0.0, 3.0), [2.0, 0.0, 3.0]);
        assert_eq!(mean(&[5.0]).interval, None);
        // Both halves alike: four degrees of freedom, error √(2/3)/2.
        let groups = [vec![1.0, 2.0, 3.0], vec![1.0, 2.0, 3.0]];
        let half = 2.776_45 * (2.0f64 / 3.0).sqrt() / 2.0;
        close(mean_of_groups(&groups), [2.0, 2.0 - half, 2.0 + half]);
        let lone = mean_of_groups(&[vec![1.0], vec![0.0, 1.0]]);
        assert_eq!((lone.value, lone.interval), (0.75, None));
    }

    /// Values of R's `qt(0.975, n)`.
    #[test]
    fn quantiles_go_on_where_the_table_ends() {
        for (freedom, expected) in [
            (1, 12.7062),
            (30, 2.042_27),
            (31, 2.039_51),
            (60, 2.000_30),
            (1000, 1.962_34),
        ] {
            assert!(
                (quantile(freedom) - expected).abs() < 5e-5,
                "{freedom}: {}",
                quantile(freedom)
            );
        }
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let numbers = || (1..=200).rev().map(|x| x as f32).collect::<Vec<_>>();
        assert_eq!(percentile(&numbers(), 0.99), 198.0);
        assert_eq!(percentile(&numbers(), 0.999), 200.0);
        assert_eq!(percentile(&numbers(), 1.0), 200.0);
        let many: Vec<f32> = (1..=3000).map(|x| x as f32).collect();
        assert_eq!(percentile(&many, 0.999), 2997.0);
        assert_eq!(percentile(&[3.0], 0.99), 3.0);
        assert_eq!(percentile(&[], 0.99), 0.0);
    }
}
