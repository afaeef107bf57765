//! Maps of the KV heads behind which codes are found.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::Result;
use crate::dictionary::{HeadMaps, RotaryMeans};

/// Share of the mean squared length that directions nobody asks for count with: none is given up altogether.
const LEAST: f64 = 1e-3;

/// The rotary embedding of keys.
#[derive(Debug, Clone, Copy)]
pub struct RotaryKeys<'a> {
    /// Radians a position that each pair of numbers is turned by; see [`RotaryMeans`].
    pub frequencies: &'a [f32],
    /// The position of each key of a head.
    pub positions: &'a [u32],
}

/// Makes the maps of a layer's keys, or values, out of vectors of each head, `[heads][n, m]`, and of second moments
/// `[heads, m, m]` of what they are multiplied with: queries, or the rows of the output projection. Keys whose `rotary`
/// embedding is known are coded without their means before it.
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
pub fn head_maps(
    vectors: &[Vec<f32>],
    rotary: Option<RotaryKeys<'_>>,
    moments: &[f64],
    head_dim: usize,
) -> Result<HeadMaps> {
    let m = head_dim;
    assert_eq!(
        moments.len(),
        vectors.len() * m * m,
        "moments of every head"
    );
    let rotary = rotary.map(|rotary| rotary_means(vectors, rotary, m));
    let rotary = rotary.transpose()?;
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
    let matrices: Vec<f32> = matrices.collect();
    let Some((rotary, rest)) = rotary else {
        let means = vectors.iter().flat_map(|own| mean(own, m));
        return HeadMaps::new(&means.collect::<Vec<_>>(), &matrices, m);
    };
    let means = rest.iter().flat_map(|own| mean(own, m));
    HeadMaps::new(&means.collect::<Vec<_>>(), &matrices, m)?.with_rotary_means(rotary)
}

/// The means of keys before their rotary embedding, and the keys without them.
fn rotary_means(
    vectors: &[Vec<f32>],
    rotary: RotaryKeys<'_>,
    m: usize,
) -> Result<(RotaryMeans, Vec<Vec<f32>>)> {
    let RotaryKeys {
        frequencies,
        positions,
    } = rotary;
    let pairs = frequencies.len().min(m / 2);
    let mut sums = vec![0f64; vectors.len() * m];
    for (own, sums) in vectors.iter().zip(sums.chunks_exact_mut(m)) {
        for (x, &position) in own.chunks_exact(m).zip(positions) {
            for (pair, &frequency) in frequencies[..pairs].iter().enumerate() {
                let (sine, cosine) = (f64::from(position) * f64::from(frequency)).sin_cos();
                let [x, y] = [pair, pair + pairs].map(|place| f64::from(x[place]));
                sums[pair] += x * cosine + y * sine;
                sums[pair + pairs] += y * cosine - x * sine;
            }
        }
    }
    let count = positions.len().max(1) as f64;
    let means: Vec<f32> = sums.iter().map(|sum| (sum / count) as f32).collect();
    let means = RotaryMeans::new(frequencies, &means, m)?;
    let rest = vectors.iter().enumerate().map(|(head, own)| {
        let mut rest = own.clone();
        let positions = positions.iter().map(|&position| position as usize);
        means.take_away(head, positions, &mut rest);
        rest
    });
    let rest = rest.collect();
    Ok((means, rest))
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
        let maps = head_maps(&vectors, None, &moments, m).unwrap();
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
