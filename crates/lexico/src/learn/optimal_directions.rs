//! The method of optimal directions, MOD (Engan, Aase, Husøy 1999).

use super::users;
use crate::dictionary::{Dictionary, norm};
use crate::encode::EncodedBatch;

/// Steps of conjugate gradients; what is left after them, the next codes change anyway.
const ITERATIONS: usize = 15;
/// Squared length of the gradient, over that at the start, at which nothing is left to be gained.
const SOLVED: f64 = 1e-12;

/// Moves all atoms at once to where they serve the vectors best with the codes fixed, then back to unit length.
///
/// The least squares of `CD = X` are solved by conjugate gradients from the atoms as they are, so that no
/// `N × N` matrix is needed, and atoms that nothing uses stay: `O(n·s·m)` an iteration.
pub(super) fn step(dictionary: &mut Dictionary, batch: &[f32], codes: &EncodedBatch) {
    let m = dictionary.head_dim();
    let solved = solve(dictionary, batch, codes);
    let atoms = dictionary.atoms_mut().chunks_exact_mut(m);
    for (atom, solved) in atoms.zip(solved.chunks_exact(m)) {
        let length = norm(solved);
        if length.is_normal() {
            let units = solved.iter().map(|&x| (f64::from(x) / length) as f32);
            atom.iter_mut().zip(units).for_each(|(atom, x)| *atom = x);
        }
    }
}

/// Atoms `[N, m]` of any length that leave the least of `‖X − CD‖²`.
fn solve(dictionary: &Dictionary, batch: &[f32], codes: &EncodedBatch) -> Vec<f32> {
    let m = dictionary.head_dim();
    let users = users(codes, dictionary.len());
    // Cᵀ times what has a row for every vector.
    let gather = |vectors: &[f32], out: &mut [f32]| {
        for (out, users) in out.chunks_exact_mut(m).zip(&users) {
            out.fill(0.0);
            for &(v, c) in users {
                crate::kernels::add_scaled(out, c, &vectors[v as usize * m..][..m]);
            }
        }
    };
    let mut atoms = dictionary.atoms().to_vec();
    let mut gradient = vec![0.0; atoms.len()];
    gather(&super::residuals(dictionary, batch, codes), &mut gradient);
    let mut direction = gradient.clone();
    let mut square = crate::kernels::square(&gradient);
    let enough = square * SOLVED;
    let (mut rebuilt, mut applied) = (vec![0.0; batch.len()], vec![0.0; atoms.len()]);
    for _ in 0..ITERATIONS {
        for (v, rebuilt) in rebuilt.chunks_exact_mut(m).enumerate() {
            rebuilt.fill(0.0);
            let (indices, coefficients) = codes.row(v);
            for (&i, &c) in indices.iter().zip(coefficients) {
                let direction = &direction[usize::from(i) * m..][..m];
                crate::kernels::add_scaled(rebuilt, c, direction);
            }
        }
        // ⟨direction, CᵀC direction⟩
        let curvature = crate::kernels::square(&rebuilt);
        if square <= enough || !curvature.is_normal() {
            break;
        }
        gather(&rebuilt, &mut applied);
        let length = (square / curvature) as f32;
        crate::kernels::add_scaled(&mut atoms, length, &direction);
        crate::kernels::add_scaled(&mut gradient, -length, &applied);
        let before = std::mem::replace(&mut square, crate::kernels::square(&gradient));
        let kept = (square / before) as f32;
        for (direction, gradient) in direction.iter_mut().zip(&gradient) {
            *direction = gradient + kept * *direction;
        }
    }
    atoms
}

#[cfg(test)]
mod tests {
    use super::super::tests::drawn_codes;
    use super::*;

    #[test]
    fn nothing_is_left_along_any_atom() {
        for seed in 0..20 {
            let (mut dictionary, batch, codes) = drawn_codes(seed);
            let m = dictionary.head_dim();
            let solved = solve(&dictionary, &batch, &codes);
            let gradient = |atoms: &[f32]| {
                let mut gradient = vec![0.0; atoms.len()];
                for (v, x) in batch.chunks_exact(m).enumerate() {
                    let (indices, coefficients) = codes.row(v);
                    let code = || indices.iter().zip(coefficients);
                    for k in 0..m {
                        let rebuilt = code().map(|(&i, &c)| {
                            f64::from(c) * f64::from(atoms[usize::from(i) * m + k])
                        });
                        let left = f64::from(x[k]) - rebuilt.sum::<f64>();
                        for (&i, &c) in code() {
                            gradient[usize::from(i) * m + k] += f64::from(c) * left;
                        }
                    }
                }
                gradient.iter().map(|x| x * x).sum::<f64>().sqrt()
            };
            let (before, after) = (gradient(dictionary.atoms()), gradient(&solved));
            // Of what is hard to tell apart a little is left, and rounding leaves something everywhere.
            let least = 0.05 * before + 1e-5;
            assert!(after < least, "seed {seed}: {before}, then {after}");
            let start = dictionary.clone();
            step(&mut dictionary, &batch, &codes);
            let users = users(&codes, start.len());
            for (i, users) in users.iter().enumerate() {
                assert!((norm(dictionary.atom(i)) - 1.0).abs() < 1e-6);
                assert!(!users.is_empty() || dictionary.atom(i) == start.atom(i));
            }
        }
    }
}
