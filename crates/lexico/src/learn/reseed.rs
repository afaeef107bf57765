//! Which atoms are worth nothing, and what takes their place.

use crate::dictionary::Dictionary;
use crate::encode::EncodedBatch;
use crate::kernels::matmul::{Matrix, multiply};
use crate::threads::{Threads, for_each};

/// Atoms of which one does as well as both: a cosine above this, whatever the sign.
const ALIKE: f32 = 0.99;
/// Atoms that are compared with all others at once.
const BLOCK: usize = 128;

/// Atoms that are nearly an earlier one, or its opposite, in rising order: `O(N²·m)`.
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

/// The vectors of a coded batch, the worst coded first.
pub(super) fn worst_first(codes: &EncodedBatch) -> Vec<usize> {
    let mut worst: Vec<usize> = (0..codes.len()).collect();
    let errors = &codes.relative_errors;
    worst.sort_by(|&a, &b| errors[b].total_cmp(&errors[a]));
    worst
}
