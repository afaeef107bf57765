//! K-SVD (Aharon, Elad, Bruckstein 2006), in the approximation of Rubinstein, Zibulevsky and Elad (2008).

use super::{residuals, users};
use crate::dictionary::{Dictionary, norm};
use crate::encode::EncodedBatch;

/// Moves one atom after the other to where it serves the vectors best that use it, `O(n·s·m)` in all.
///
/// An atom and its coefficients become the best approximation of rank one of what the other atoms leave of
/// those vectors: one step of the power method, from the coefficients as they are. The next atom sees what
/// the last one changed.
pub(super) fn step(dictionary: &mut Dictionary, batch: &[f32], codes: &EncodedBatch) {
    let m = dictionary.head_dim();
    let mut residuals = residuals(dictionary, batch, codes);
    let users = users(codes, dictionary.len());
    let mut moved = vec![0.0; m];
    for (atom, users) in dictionary.atoms_mut().chunks_exact_mut(m).zip(&users) {
        moved.fill(0.0);
        for &(v, c) in users {
            crate::kernels::add_scaled(&mut moved, c, &residuals[v as usize * m..][..m]);
            crate::kernels::add_scaled(&mut moved, c * c, atom);
        }
        let length = norm(&moved);
        // Nothing uses it, or only vectors that are nothing without it.
        if !length.is_normal() {
            continue;
        }
        let scale = (1.0 / length) as f32;
        moved.iter_mut().for_each(|x| *x *= scale);
        for &(v, c) in users {
            let residual = &mut residuals[v as usize * m..][..m];
            crate::kernels::add_scaled(residual, c, atom);
            let c = crate::kernels::dot(residual, &moved);
            crate::kernels::add_scaled(residual, -c, &moved);
        }
        atom.copy_from_slice(&moved);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::drawn_codes;
    use super::*;

    /// With every matrix written out, in f64.
    fn oracle(dictionary: &Dictionary, batch: &[f32], codes: &EncodedBatch) -> Vec<Vec<f64>> {
        let m = dictionary.head_dim();
        let rows = |x: &[f32]| -> Vec<Vec<f64>> {
            let rows = x.chunks_exact(m);
            rows.map(|x| x.iter().map(|&x| f64::from(x)).collect())
                .collect()
        };
        let (mut atoms, vectors) = (rows(dictionary.atoms()), rows(batch));
        let mut dense = vec![vec![0.0; atoms.len()]; vectors.len()];
        for (v, dense) in dense.iter_mut().enumerate() {
            let (indices, coefficients) = codes.row(v);
            for (&i, &c) in indices.iter().zip(coefficients) {
                dense[usize::from(i)] = f64::from(c);
            }
        }
        for i in 0..atoms.len() {
            // What the other atoms leave.
            let left = |atoms: &[Vec<f64>], dense: &[f64], v: usize| -> Vec<f64> {
                let others = |k: usize| {
                    let others = atoms.iter().zip(dense).enumerate();
                    let others = others.filter(|(j, _)| *j != i);
                    others.map(|(_, (atom, c))| c * atom[k]).sum::<f64>()
                };
                (0..m).map(|k| vectors[v][k] - others(k)).collect()
            };
            let users: Vec<usize> = (0..vectors.len()).filter(|&v| dense[v][i] != 0.0).collect();
            let mut moved = vec![0.0; m];
            for &v in &users {
                let left = left(&atoms, &dense[v], v);
                (0..m).for_each(|k| moved[k] += dense[v][i] * left[k]);
            }
            let length = moved.iter().map(|x| x * x).sum::<f64>().sqrt();
            if users.is_empty() {
                continue;
            }
            moved.iter_mut().for_each(|x| *x /= length);
            for &v in &users {
                let left = left(&atoms, &dense[v], v);
                dense[v][i] = left.iter().zip(&moved).map(|(a, b)| a * b).sum();
            }
            atoms[i] = moved;
        }
        atoms
    }

    #[test]
    fn a_step_is_the_oracles() {
        for seed in 0..20 {
            let (mut dictionary, batch, codes) = drawn_codes(seed);
            let expected = oracle(&dictionary, &batch, &codes);
            step(&mut dictionary, &batch, &codes);
            for (i, (found, expected)) in dictionary
                .atoms()
                .iter()
                .zip(expected.iter().flatten())
                .enumerate()
            {
                let off = (f64::from(*found) - expected).abs();
                assert!(off < 1e-4, "seed {seed}, number {i}: {found}, {expected}");
            }
        }
    }
}
