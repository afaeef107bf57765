//! Orthogonal matching pursuit in plain f64: slow, obvious, and what every fast path is compared with.

use lexico::Dictionary;

/// Code of one vector.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    /// Atoms in the order chosen.
    pub(crate) support: Vec<usize>,
    /// Least-squares coefficients on the support.
    pub(crate) coefficients: Vec<f64>,
    /// `‖x − x̂‖`.
    pub(crate) residual_norm: f64,
    /// The narrowest lead, over all steps, of the chosen atom's correlation over the runner-up's,
    /// relative to `‖x‖`. Where this is near rounding, arithmetic of less precision may rightly
    /// choose another support.
    pub(crate) narrowest_lead: f64,
}

/// Codes one vector with at most `sparsity` atoms, stopping at a residual of `tolerance · ‖x‖`.
///
/// Every step correlates the true residual with every atom and solves the least-squares problem
/// anew through the QR factorisation (modified Gram–Schmidt, twice). `O(s·N·m + s³·m)`.
pub(crate) fn encode(dictionary: &Dictionary, x: &[f32], sparsity: usize, tolerance: f64) -> Found {
    let x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    let whole = norm(&x);
    let mut found = Found {
        support: Vec::new(),
        coefficients: Vec::new(),
        residual_norm: whole,
        narrowest_lead: f64::INFINITY,
    };
    let mut residual = x.clone();
    while found.support.len() < sparsity && found.residual_norm > tolerance.max(1e-12) * whole {
        let mut best = (0, 0.0);
        let mut second = 0.0;
        for n in 0..dictionary.len() {
            if found.support.contains(&n) {
                continue;
            }
            let correlation = dot_mixed(&dictionary.atom(n), &residual).abs();
            if correlation > best.1 {
                second = best.1;
                best = (n, correlation);
            } else if correlation > second {
                second = correlation;
            }
        }
        if best.1 <= 1e-12 * whole {
            break;
        }
        found.support.push(best.0);
        let Some(coefficients) = least_squares(dictionary, &found.support, &x) else {
            found.support.pop();
            break;
        };
        found.narrowest_lead = found.narrowest_lead.min((best.1 - second) / whole);
        residual = x.clone();
        for (&n, c) in found.support.iter().zip(&coefficients) {
            for (r, &d) in residual.iter_mut().zip(&*dictionary.atom(n)) {
                *r -= c * f64::from(d);
            }
        }
        found.coefficients = coefficients;
        found.residual_norm = norm(&residual);
    }
    found
}

/// Coefficients that bring the atoms of `support` nearest to `x`; `None` where an atom lies in the
/// span of those before it.
pub(crate) fn least_squares(
    dictionary: &Dictionary,
    support: &[usize],
    x: &[f64],
) -> Option<Vec<f64>> {
    let k = support.len();
    let mut directions: Vec<Vec<f64>> = Vec::with_capacity(k);
    let mut triangle = vec![vec![0.0; k]; k];
    for (column, &n) in support.iter().enumerate() {
        let mut v: Vec<f64> = dictionary.atom(n).iter().map(|&a| f64::from(a)).collect();
        for _ in 0..2 {
            for (row, direction) in directions.iter().enumerate() {
                let along = dot(direction, &v);
                triangle[row][column] += along;
                v.iter_mut()
                    .zip(direction)
                    .for_each(|(v, d)| *v -= along * d);
            }
        }
        let outside = norm(&v);
        if outside < 1e-10 {
            return None;
        }
        triangle[column][column] = outside;
        v.iter_mut().for_each(|v| *v /= outside);
        directions.push(v);
    }
    let mut coefficients = vec![0.0; k];
    for row in (0..k).rev() {
        let mut value = dot(&directions[row], x);
        for column in row + 1..k {
            value -= triangle[row][column] * coefficients[column];
        }
        coefficients[row] = value / triangle[row][row];
    }
    Some(coefficients)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn dot_mixed(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum()
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}
