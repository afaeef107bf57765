//! Tables with a row for every atom that an index can name, as the kernels of both families of codes read them.

use super::MAX_ATOMS;
use super::softmax::MAX_QUERIES;

/// Bytes between the codes that are read and those that are fetched for later: enough for memory to answer.
pub(super) const AHEAD: usize = 2048;

/// Rows of a table by a 16-bit index, each there: no index needs a check.
pub(super) fn table<const G: usize>(rows: &[f32]) -> &[[f32; G]; MAX_ATOMS] {
    match rows.as_chunks::<G>().0.first_chunk() {
        Some(table) => table,
        None => unreachable!("callers give whole tables"),
    }
}

pub(super) fn table_mut<const G: usize>(rows: &mut [f32]) -> &mut [[f32; G]; MAX_ATOMS] {
    match rows.as_chunks_mut::<G>().0.first_chunk_mut() {
        Some(table) => table,
        None => unreachable!("callers give whole tables"),
    }
}

/// Checks the sizes of a block's kernel: numbers a vector and query, and a table of `MAX_ATOMS` rows of a query group.
pub(super) fn check(vectors: usize, group: usize, per_vector: usize, table: usize) {
    assert!(
        group.is_power_of_two() && group <= MAX_QUERIES,
        "a query group that kernels know"
    );
    assert_eq!(per_vector, vectors * group, "a number a vector and query");
    assert_eq!(table, MAX_ATOMS * group, "a row for every index");
}
