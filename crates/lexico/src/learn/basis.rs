//! The basis that heads are coded in together.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::Result;
use crate::dictionary::JointBasis;
use crate::kernels::matmul::{Matrix, multiply};

/// Finds the basis in which `together` heads each of mapped vectors `[heads, n, m]` are coded: the eigenvectors of their
/// second moments, so that what heads have in common is told once (principal components: Pearson 1901), dealt out to
/// the parts in turn, there and back, from the largest eigenvalue on, so that all parts are alike and one set of
/// codebooks serves them. `O(n·heads·h·m² + heads·h²·m³)`.
///
/// # Errors
/// Those of [`JointBasis::new`].
///
/// # Panics
/// Where the vectors are not whole.
pub fn joint_basis(
    vectors: &[f32],
    heads: usize,
    together: usize,
    head_dim: usize,
) -> Result<JointBasis> {
    let (m, h) = (head_dim, together);
    let whole = heads * m > 0 && vectors.len().is_multiple_of(heads * m);
    assert!(whole, "whole vectors of every head");
    let (n, width) = (vectors.len() / (heads * m), h * m);
    let mut numbers = Vec::with_capacity(heads * h * m * m);
    for group in vectors.chunks_exact(vectors.len() / heads * h) {
        let rows = (0..n).flat_map(|row| (0..h).map(move |head| (row, head)));
        let rows = rows.flat_map(|(row, head)| &group[(head * n + row) * m..][..m]);
        let rows: Vec<f32> = rows.copied().collect();
        let rows = Matrix::by_rows(&rows, n, width);
        let mut moments = vec![0.0; width * width];
        multiply(&mut moments, false, rows.transposed(), rows);
        let moments = moments.iter().map(|&x| f64::from(x));
        let eigen = SymmetricEigen::new(DMatrix::from_iterator(width, width, moments));
        let mut order: Vec<usize> = (0..width).collect();
        order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
        for part in 0..h {
            for turn in 0..m {
                let place = if turn % 2 == 0 { part } else { h - 1 - part };
                let vector = eigen.eigenvectors.column(order[turn * h + place]);
                numbers.extend(vector.iter().map(|&x| x as f32));
            }
        }
    }
    JointBasis::new(&numbers, heads, together, m)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Heads that are all the same but for a little: the first components of the parts hold nearly everything.
    #[test]
    fn what_heads_have_in_common_is_told_once() {
        let (heads, h, m, n) = (6, 3, 4, 200);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut draw = |scale: f32| rng.random_range(-scale..scale);
        let mut vectors = vec![0.0; heads * n * m];
        for row in 0..n {
            for group in 0..heads / h {
                let common: Vec<f32> = (0..m).map(|i| draw(1.0 + i as f32)).collect();
                for head in 0..h {
                    let own = &mut vectors[((group * h + head) * n + row) * m..][..m];
                    let both = own.iter_mut().zip(&common);
                    both.for_each(|(x, common)| *x = common + draw(0.01));
                }
            }
        }
        let basis = joint_basis(&vectors, heads, h, m).unwrap();
        let parts = basis.apply(&vectors);
        let square = |x: f32| f64::from(x).powi(2);
        let all: f64 = vectors.iter().map(|&x| square(x)).sum();
        // Four numbers of twelve: two of the first part, one of each other.
        let mut kept = 0.0;
        let mut squares = vec![0.0; heads];
        for (part, own) in parts.chunks_exact(n * m).enumerate() {
            for x in own.chunks_exact(m) {
                let most = if part % h == h - 1 { 2 } else { 1 };
                kept += x[..most].iter().map(|&x| square(x)).sum::<f64>();
                squares[part] += x.iter().map(|&x| square(x)).sum::<f64>();
            }
        }
        assert!(kept > 0.999 * all, "{kept} of {all}");
        let turned: f64 = squares.iter().sum();
        assert!((turned / all - 1.0).abs() < 1e-4, "{turned} for {all}");
    }
}
