use super::RunningSoftmax;
use crate::arch::matmul::{Matrix, multiply};
use crate::arch::{accumulate, scores};
use crate::code::Codes;
use crate::dictionary::Dictionary;

/// Adds coded positions; `queries` `[rows, m]` are scaled already and do not see the first
/// `hidden[row]` positions.
pub(super) fn add(
    softmax: &mut RunningSoftmax<'_>,
    queries: &[f32],
    hidden: &[usize],
    (keys, key_dictionary): (&Codes, &Dictionary),
    (values, value_dictionary): (&Codes, &Dictionary),
) {
    assert_eq!(keys.len(), values.len(), "one value a key");
    if keys.is_empty() {
        return;
    }
    let (rows, m) = (softmax.rows(), softmax.head_dim);
    let queries = Matrix::by_rows(queries, rows, m);
    // `p` and `u` keep a whole query group side by side, so that each nonzero is one short vector.
    let n = key_dictionary.len();
    let mut p = vec![0.0; n * rows];
    let atoms = Matrix::by_rows(key_dictionary.atoms(), n, m);
    multiply(&mut p, false, atoms, queries.transposed());

    let mut weights = vec![0.0; keys.len() * rows];
    keys.for_each_block(|first, block| {
        let out = &mut weights[first * rows..(first + block.ends.len()) * rows];
        scores(block, &p, rows, out);
    });
    for (row, &hidden) in hidden.iter().enumerate() {
        let scores = &mut weights[row..];
        let unseen = scores.iter_mut().step_by(rows).take(hidden);
        unseen.for_each(|s| *s = f32::NEG_INFINITY);
        softmax.weigh(row, scores, rows);
    }

    let n = value_dictionary.len();
    let mut u = vec![0.0; n * rows];
    values.for_each_block(|first, block| {
        let weights = &weights[first * rows..(first + block.ends.len()) * rows];
        accumulate(block, weights, rows, &mut u);
    });
    let u = Matrix::by_rows(&u, n, rows).transposed();
    let atoms = Matrix::by_rows(value_dictionary.atoms(), n, m);
    multiply(softmax.output, true, u, atoms);
}
