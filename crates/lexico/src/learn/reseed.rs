//! Atoms that are worth nothing.

use crate::dictionary::Dictionary;
use crate::kernels::matmul::{Matrix, multiply};
use crate::threads::{Threads, for_each};

/// Cosine, whatever the sign, above which one of two atoms does as well as both.
const ALIKE: f32 = 0.99;
/// Number of atoms that are compared with all others at once.
const BLOCK: usize = 128;

/// Finds the atoms that are nearly an earlier one, or its opposite, in rising order: `O(N²·m)`.
pub(super) fn near_duplicates(dictionary: &Dictionary, threads: &dyn Threads) -> Vec<usize> {
    let (m, n) = (dictionary.head_dim(), dictionary.len());
    let atoms = dictionary.atoms();
    let mut pairs: Vec<Vec<(usize, usize)>> = vec![Vec::new(); n.div_ceil(BLOCK)];
    for_each(threads, pairs.iter_mut().enumerate(), |(block, pairs)| {
        let first = block * BLOCK;
        let count = BLOCK.min(n - first);
        let later = &atoms[first * m..];
        let mut cosines = vec![0.0; count * (n - first)];
        let rows = Matrix::by_rows(&later[..count * m], count, m);
        let others = Matrix::by_rows(later, n - first, m);
        multiply(&mut cosines, false, rows, others.transposed());
        for (i, cosines) in cosines.chunks_exact(n - first).enumerate() {
            let after = cosines.iter().enumerate().skip(i + 1);
            let alike = after.filter(|(_, cosine)| cosine.abs() > ALIKE);
            pairs.extend(alike.map(|(j, _)| (first + i, first + j)));
        }
    });
    let mut double = vec![false; n];
    for (i, j) in pairs.into_iter().flatten() {
        if !double[i] {
            double[j] = true;
        }
    }
    (0..n).filter(|&i| double[i]).collect()
}
