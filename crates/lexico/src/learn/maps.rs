//! Maps of the KV heads behind which codes are found.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::Result;
use crate::dictionary::HeadMaps;

/// Share of the mean squared length that directions nobody asks for count with: none is given up altogether.
const LEAST: f64 = 1e-3;

/// Makes the maps of a layer's keys, or values, out of vectors of each head, `[heads][n, m]`, and of second moments
/// `[heads, m, m]` of what they are multiplied with: queries, or the rows of the output projection.
///
/// A map takes the vectors' mean away and multiplies by the square root of the moments, so that the length of an error
/// is that of what it does to the products. All are scaled by one number, so that the moments' mean is 1 and heads that
/// are multiplied with larger numbers count for more. `O(heads·m³)`.
///
/// # Errors
/// Those of [`HeadMaps::new`].
///
/// # Panics
/// Where the moments are not as many.
pub fn head_maps(vectors: &[Vec<f32>], moments: &[f64], head_dim: usize) -> Result<HeadMaps> {
    let m = head_dim;
    assert_eq!(
        moments.len(),
        vectors.len() * m * m,
        "moments of every head"
    );
    let means = vectors.iter().flat_map(|own| mean(own, m));
    let trace = |own: &[f64]| (0..m).map(|i| own[i * m + i]).sum::<f64>() / m as f64;
    let heads = moments.chunks_exact(m * m);
    let scale = heads.clone().map(trace).sum::<f64>() / vectors.len() as f64;
    let matrices = heads.flat_map(|own| {
        let mut own = DMatrix::from_row_slice(m, m, own);
        if scale > 0.0 {
            own /= scale;
        } else {
            own = DMatrix::identity(m, m);
        }
        // A head that is never asked keeps lengths as they are small.
        let least = (LEAST * own.trace() / m as f64).max(LEAST * LEAST);
        let eigen = SymmetricEigen::new(own);
        let roots = eigen.eigenvalues.map(|x| (x.max(0.0) + least).sqrt());
        let vectors = &eigen.eigenvectors;
        let root = vectors * DMatrix::from_diagonal(&roots) * vectors.transpose();
        let numbers: Vec<f32> = root.iter().map(|&x| x as f32).collect();
        numbers
    });
    HeadMaps::new(&means.collect::<Vec<_>>(), &matrices.collect::<Vec<_>>(), m)
}

fn mean(vectors: &[f32], m: usize) -> Vec<f32> {
    let mut sums = vec![0f64; m];
    for x in vectors.chunks_exact(m) {
        sums.iter_mut()
            .zip(x)
            .for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let count = (vectors.len() / m).max(1) as f64;
    sums.iter().map(|sum| (sum / count) as f32).collect()
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn errors_are_as_long_as_their_scores_are_far_off() {
        let (m, heads) = (6, 2);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut draw = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-2f32..3.0)).collect()
        };
        let vectors: Vec<Vec<f32>> = (0..heads).map(|_| draw(40 * m)).collect();
        let queries: Vec<Vec<f32>> = (0..heads).map(|h| draw((30 + h) * m)).collect();
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum()
        };
        let moments = queries.iter().flat_map(|own| {
            (0..m * m).map(move |place| {
                let rows = own.chunks_exact(m);
                rows.map(|q| f64::from(q[place / m]) * f64::from(q[place % m]))
                    .sum::<f64>()
            })
        });
        let moments: Vec<f64> = moments.collect();
        let maps = head_maps(&vectors, &moments, m).unwrap();
        let mut ratios = Vec::new();
        for head in 0..heads {
            let mapped = maps.apply(head, &vectors[head]);
            // The mean is gone.
            assert!(mean(&mapped, m).iter().all(|x| x.abs() < 1e-3));
            for (pair, own) in vectors[head].chunks(2 * m).zip(mapped.chunks(2 * m)) {
                let difference = |x: &[f32]| -> Vec<f32> {
                    x[..m].iter().zip(&x[m..]).map(|(a, b)| a - b).collect()
                };
                let error = difference(pair);
                let scores = queries[head]
                    .chunks_exact(m)
                    .map(|q| dot(q, &error).powi(2));
                let own = difference(own);
                ratios.push(dot(&own, &own) / scores.sum::<f64>());
            }
        }
        for ratio in &ratios {
            assert!((ratio / ratios[0] - 1.0).abs() < 0.02, "{ratios:?}");
        }
    }
}
