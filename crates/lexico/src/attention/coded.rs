//! Coded positions: scores from `p = Dₖq`, values by way of `u`, which is summed as codes. Where positions are few, the products with all
//! atoms would be most of the work, and blocks of vectors are rebuilt in the processor's cache instead.

use std::cell::RefCell;
use std::ops::Range;

use super::RunningSoftmax;
use crate::codes::{CodeFormat, Codes};
use crate::dictionary::{Atoms, MAX_ATOMS, RotaryOffsets};
use crate::kernels::dense::{MAX_GROUP, combine, dots};
use crate::kernels::matmul::{Matrix, multiply};
use crate::kernels::rows::Rows;
use crate::kernels::softmax::MAX_QUERIES;
use crate::kernels::tables::{Products, Sums, products, sums};
use crate::key_value::KeyValue;

/// Positions that are scored at a time: so many that it matters little that `p` and `u` take each other's
/// place in the first cache, so few that their weights stay in the second.
const BLOCK: usize = 8192;
/// Vectors that are rebuilt at a time, and stay in the first cache.
const REBUILT: usize = 64;
/// What adding an atom to a vector that is rebuilt costs, over the product of an atom with a query, as measured: atoms are fetched from
/// anywhere, where the products read them in order.
const ATOM_COST: usize = 12;

/// Codes of one KV head, and the positions of them that are seen.
pub(super) struct Coded<'a> {
    codes: KeyValue<&'a Codes>,
    /// How many of the atoms, from the first on, the codes may name: heads with fewer atoms a code leave the last codebooks alone.
    named: KeyValue<usize>,
    offsets: Option<RotaryOffsets<'a>>,
    seen: Range<usize>,
}

impl<'a> Coded<'a> {
    /// Checks that there are as many values as keys, and that all atoms are there.
    pub(super) fn new(
        codes: KeyValue<&'a Codes>,
        atoms: KeyValue<Atoms<'_>>,
        offsets: Option<RotaryOffsets<'a>>,
        seen: Range<usize>,
    ) -> Self {
        assert_eq!(codes.keys.len(), codes.values.len(), "one value a key");
        let named = codes.zip(atoms).map(|(codes, atoms)| {
            let fits = codes.is_empty() || usize::from(codes.largest_index()) < atoms.len();
            assert!(fits, "codes name atoms that there are");
            // Not by the largest index there is or was: attention must not depend on codes that are gone.
            match codes.format() {
                _ if codes.is_empty() => 0,
                CodeFormat::Additive(format) => {
                    format.sizes.atoms(format.sparsity).min(atoms.len())
                }
                CodeFormat::Sparse(_) => atoms.len(),
            }
        });
        Self {
            codes,
            named,
            offsets,
            seen,
        }
    }
}

impl Coded<'_> {
    /// Whether rebuilding vectors costs less, for so many queries, than the products with all atoms named, and the sums over them.
    fn are_few(&self, rows: usize) -> bool {
        let of_tables: usize = self.named.into_iter().map(|atoms| atoms * rows).sum();
        let of_vector = |codes: &Codes| ATOM_COST * codes.format().sparsity() + rows;
        let of_vectors: usize = self.codes.into_iter().map(of_vector).sum();
        self.seen.len() * of_vectors < of_tables
    }
}

/// Tables with a row for every index that a code can hold, so that none needs a check; only the rows
/// of a dictionary's own atoms are ever touched, and so take memory.
#[derive(Default)]
struct Scratch {
    /// `[heads, MAX_ATOMS, G]`
    p: Vec<f32>,
    /// `[heads, MAX_ATOMS, G]`
    u: Vec<f32>,
    /// `[positions, G]`
    weights: Vec<f32>,
    /// Of keys and of values, `[REBUILT, m]`.
    vectors: KeyValue<Vec<f32>>,
    /// Atoms in f32, `[N, m]`.
    atoms: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Numbers that the processor's cache reads at a time.
const CACHE_LINE: usize = 16;

/// Tables for so many numbers, none of which has been touched where they are new. They begin with a cache line, so
/// that no row lies in more of them than it must.
fn tables(memory: &mut Vec<f32>, numbers: usize) -> &mut [f32] {
    if memory.len() < numbers + CACHE_LINE {
        *memory = vec![0.0; numbers + CACHE_LINE];
    }
    let before = memory.as_ptr().align_offset(CACHE_LINE * size_of::<f32>());
    // Where the offset cannot be told, any place does.
    &mut memory[before.min(CACHE_LINE)..][..numbers]
}

/// Adds the codes of some KV heads to the softmax of each; `queries` `[heads, group, m]` are scaled already.
/// The dictionaries are read once for all heads.
pub(super) fn add_heads(
    softmaxes: &mut [RunningSoftmax],
    queries: &[f32],
    codes: &[Coded<'_>],
    atoms: KeyValue<Atoms<'_>>,
) {
    let (m, group) = (atoms.keys.head_dim(), softmaxes[0].rows());
    SCRATCH.with_borrow_mut(|scratch| {
        // Each head by itself: which of them a thread takes must not matter.
        let mut by_table = Vec::with_capacity(codes.len());
        let each = queries.chunks_exact(group * m);
        for ((codes, softmax), queries) in codes.iter().zip(softmaxes).zip(each) {
            if codes.are_few(group) {
                rebuild_codes(softmax, codes, queries, atoms, scratch, |_, _| ());
            } else {
                by_table.push((codes, softmax, queries));
            }
        }
        let table = MAX_ATOMS * group;
        let p = tables(&mut scratch.p, by_table.len() * table);
        let wanted = p.chunks_exact_mut(table).zip(&by_table);
        let wanted = wanted.map(|(out, &(codes, _, queries))| Products {
            queries,
            atoms: codes.named.keys,
            out,
        });
        products(atoms.keys.all(), m, group, &mut wanted.collect::<Vec<_>>());
        let u = tables(&mut scratch.u, by_table.len() * table);
        let both = p.chunks_exact(table).zip(u.chunks_exact_mut(table));
        for ((codes, softmax, queries), (p, u)) in by_table.iter_mut().zip(both) {
            let n = codes.named.values;
            u[..n * group].fill(0.0);
            let weights = &mut scratch.weights;
            sum_codes(softmax, codes, queries, n, p, u, weights, |_, _| ());
        }
        let weighed = u.chunks_exact(table).zip(&mut by_table);
        let weighed = weighed.map(|(weights, (codes, softmax, _))| Sums {
            weights,
            atoms: codes.named.values,
            out: &mut softmax.output,
        });
        sums(
            atoms.values.all(),
            m,
            group,
            &mut weighed.collect::<Vec<_>>(),
        );
    });
}

/// Adds the codes of one KV head for many queries; `queries` `[group, m]` are scaled already and do not
/// see the first `hidden[query]` positions.
pub(super) fn add_many(
    softmax: &mut RunningSoftmax,
    queries: &[f32],
    hidden: &[usize],
    codes: Coded<'_>,
    atoms: KeyValue<Atoms<'_>>,
) {
    let (m, group) = (atoms.keys.head_dim(), softmax.rows());
    let hide = |first: usize, scores: &mut [f32]| {
        for (query, &hidden) in hidden.iter().enumerate() {
            let own = scores.iter_mut().skip(query).step_by(group);
            let unseen = own.take(hidden.saturating_sub(first));
            unseen.for_each(|s| *s = f32::NEG_INFINITY);
        }
    };
    SCRATCH.with_borrow_mut(|scratch| {
        if codes.are_few(group) {
            rebuild_codes(softmax, &codes, queries, atoms, scratch, hide);
            return;
        }
        let table = MAX_ATOMS * group;
        let p = tables(&mut scratch.p, table);
        let u = tables(&mut scratch.u, table);
        let n = codes.named.keys;
        let rows = atoms.keys.rows(0, n).widened(m, &mut scratch.atoms);
        let rows = Matrix::by_rows(rows, n, m);
        let columns = Matrix::by_rows(queries, group, m).transposed();
        multiply(&mut p[..n * group], false, rows, columns);
        let n = codes.named.values;
        u[..n * group].fill(0.0);
        let weights = &mut scratch.weights;
        sum_codes(softmax, &codes, queries, n, p, u, weights, hide);
        let u = Matrix::by_rows(&u[..n * group], n, group).transposed();
        let rows = atoms.values.rows(0, n).widened(m, &mut scratch.atoms);
        let rows = Matrix::by_rows(rows, n, m);
        multiply(&mut softmax.output, true, u, rows);
    });
}

/// Scores the codes by `p`, and sums the values' codes over `atoms` atoms by the weights into `u`.
#[allow(clippy::too_many_arguments)] // of one computation
fn sum_codes(
    softmax: &mut RunningSoftmax,
    codes: &Coded<'_>,
    queries: &[f32],
    atoms: usize,
    p: &[f32],
    u: &mut [f32],
    weights: &mut Vec<f32>,
    hide: impl FnMut(usize, &mut [f32]),
) {
    let group = softmax.rows();
    let KeyValue { keys, values } = codes.codes;
    let score = |range, weights: &mut [f32]| {
        keys.visit(range, |block, at| {
            let out = &mut weights[at * group..][..block.len() * group];
            block.scores(p, group, out);
        });
    };
    let sum = |_: &mut RunningSoftmax, range, weights: &[f32], kept: Option<[f32; MAX_QUERIES]>| {
        if let Some(kept) = kept {
            for u in u.chunks_exact_mut(group).take(atoms) {
                u.iter_mut().zip(&kept).for_each(|(u, kept)| *u *= kept);
            }
        }
        values.visit(range, |block, at| {
            block.accumulate(&weights[at * group..][..block.len() * group], group, u);
        });
    };
    weigh_codes(softmax, codes, queries, weights, hide, score, sum);
}

/// Scores codes, and sums their values, by the vectors that they stand for, a block of them at a time.
fn rebuild_codes(
    softmax: &mut RunningSoftmax,
    codes: &Coded<'_>,
    queries: &[f32],
    atoms: KeyValue<Atoms<'_>>,
    scratch: &mut Scratch,
    hide: impl FnMut(usize, &mut [f32]),
) {
    let (m, group) = (atoms.keys.head_dim(), softmax.rows());
    let KeyValue { keys, values } = codes.codes;
    let vectors = &mut scratch.vectors;
    let score = |range, weights: &mut [f32]| {
        rebuilt(keys, range, atoms.keys, &mut vectors.keys, |keys, at| {
            let count = keys.len() / m;
            let out = &mut weights[at * group..][..count * group];
            if group <= MAX_GROUP {
                dots(Rows::F32(keys), queries, m, group, out);
            } else {
                let queries = Matrix::by_rows(queries, group, m).transposed();
                multiply(out, false, Matrix::by_rows(keys, count, m), queries);
            }
        });
    };
    let sum = |softmax: &mut RunningSoftmax, range, weights: &[f32], _| {
        let output = &mut softmax.output;
        rebuilt(
            values,
            range,
            atoms.values,
            &mut vectors.values,
            |values, at| {
                let count = values.len() / m;
                let weights = &weights[at * group..][..count * group];
                if group <= MAX_GROUP {
                    combine(weights, Rows::F32(values), m, group, output);
                } else {
                    let weights = Matrix::by_rows(weights, count, group).transposed();
                    multiply(output, true, weights, Matrix::by_rows(values, count, m));
                }
            },
        );
    };
    weigh_codes(
        softmax,
        codes,
        queries,
        &mut scratch.weights,
        hide,
        score,
        sum,
    );
}

/// Has codes scored, many at a time, and their values summed by the weights that the softmax makes of the scores, both `[n, G]`; `sum` is
/// told by how much what each query had summed before has shrunk, as [`RunningSoftmax::weigh`] says.
fn weigh_codes(
    softmax: &mut RunningSoftmax,
    codes: &Coded<'_>,
    queries: &[f32],
    weights: &mut Vec<f32>,
    mut hide: impl FnMut(usize, &mut [f32]),
    mut score: impl FnMut(Range<usize>, &mut [f32]),
    mut sum: impl FnMut(&mut RunningSoftmax, Range<usize>, &[f32], Option<[f32; MAX_QUERIES]>),
) {
    for first in codes.seen.clone().step_by(BLOCK) {
        let range = first..codes.seen.end.min(first + BLOCK);
        weights.resize(range.len() * softmax.rows(), 0.0);
        score(range.clone(), weights);
        if let Some(offsets) = &codes.offsets {
            offsets.add(queries, first, weights);
        }
        hide(first, weights);
        let kept = softmax.weigh(weights);
        sum(softmax, range, weights, kept);
    }
}

/// Calls `visit` with the vectors of codes of a range, a block at a time, and the number before them.
fn rebuilt(
    codes: &Codes,
    range: Range<usize>,
    atoms: Atoms<'_>,
    vectors: &mut Vec<f32>,
    mut visit: impl FnMut(&[f32], usize),
) {
    let m = atoms.head_dim();
    vectors.resize(REBUILT * m, 0.0);
    for first in range.clone().step_by(REBUILT) {
        codes.visit(first..range.end.min(first + REBUILT), |block, at| {
            let vectors = &mut vectors[..block.len() * m];
            block.rebuild(atoms.all(), m, vectors);
            visit(vectors, first - range.start + at);
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use super::*;
    use crate::codes::AdditiveFormat;
    use crate::dictionary::{CodebookSizes, Codebooks};
    use crate::encode::EncodedBatch;

    #[test]
    fn codes_that_are_gone_name_no_atoms() {
        let sizes = CodebookSizes { first: 20 };
        let codebooks = Codebooks::new(vec![0.5; sizes.atoms(3) * 2], 2, sizes).unwrap();
        let atoms = codebooks.first(3);
        let codes = |indices: &[[u16; 2]]| {
            let format = AdditiveFormat { sparsity: 2, sizes };
            let mut codes = Codes::new(format).unwrap();
            codes.extend(&EncodedBatch {
                sparsity: 2,
                lengths: vec![2; indices.len()],
                indices: indices.as_flattened().to_vec(),
                coefficients: vec![1.0; 2 * indices.len()],
                relative_errors: vec![0.0; indices.len()],
            });
            codes
        };
        let mut older = codes(&[[19, 275], [3, 30]]);
        older.drop_front(1);
        let newer = codes(&[[3, 30]]);
        let named = [&older, &newer].map(|codes| {
            let (codes, atoms) = (KeyValue::new(codes, codes), KeyValue::new(atoms, atoms));
            Coded::new(codes, atoms, None, 0..1).named
        });
        assert_eq!(named, [KeyValue::new(276, 276); 2]);
    }
}
