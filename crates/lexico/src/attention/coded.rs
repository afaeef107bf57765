//! Coded positions: scores from `p = Dₖq`, values by way of `u`, which is summed as codes. Where positions are few, the products with all
//! atoms would be most of the work, and blocks of vectors are rebuilt in the processor's cache instead.
//!
//! Heads that are coded together see the same codes, of several parts, each in its own way: their queries are gone through as those of one
//! large group, so that codes are read once for all of them.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use super::RunningSoftmax;
use crate::codes::{CodeFormat, Codes};
use crate::dictionary::{Atoms, HeadBasis, MAX_ATOMS, RotaryOffsets};
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

/// Codes that some KV heads see, and the positions of them that are seen.
pub(super) struct Coded<'a> {
    /// A head's own codes; those of all parts of heads that are coded together.
    codes: KeyValue<Vec<&'a Codes>>,
    /// How many of the atoms, from the first on, each may name: those of few atoms a code leave the last codebooks alone.
    named: KeyValue<Vec<usize>>,
    pub(super) atoms: KeyValue<Atoms<'a>>,
    /// How each of the heads sees the parts; none of a head that sees its own codes.
    views: Vec<KeyValue<HeadBasis<'a>>>,
    /// What the scores of each of the heads lack; none where they lack nothing.
    offsets: Vec<RotaryOffsets<'a>>,
    seen: Range<usize>,
}

impl<'a> Coded<'a> {
    /// Checks that there are as many of all parts, and that all atoms are there.
    pub(super) fn new(
        codes: KeyValue<Vec<&'a Codes>>,
        view: Option<KeyValue<HeadBasis<'a>>>,
        atoms: KeyValue<Atoms<'a>>,
        offsets: Option<RotaryOffsets<'a>>,
        seen: Range<usize>,
    ) -> Self {
        let all = codes.keys.iter().chain(&codes.values);
        let mut lengths = all.map(|codes| codes.len());
        let first = lengths.next();
        assert!(lengths.all(|len| Some(len) == first), "one value a key");
        let named = codes.as_ref().zip(atoms).map(|(parts, atoms)| {
            let parts = parts.iter().map(|codes| named(codes, atoms));
            parts.collect()
        });
        Self {
            codes,
            named,
            atoms,
            views: view.into_iter().collect(),
            offsets: offsets.into_iter().collect(),
            seen,
        }
    }

    /// Heads that see the codes.
    fn heads(&self) -> usize {
        self.views.len().max(1)
    }

    /// Whether another head sees the same positions of the same codes.
    fn are_those_of(&self, other: &Self) -> bool {
        let same = |(own, others): (&Vec<&Codes>, &Vec<&Codes>)| {
            let mut both = own.iter().zip(others);
            own.len() == others.len() && both.all(|(own, other)| std::ptr::eq(*own, *other))
        };
        let codes = self.codes.as_ref().zip(other.codes.as_ref()).map(same);
        let joint = !self.views.is_empty() && !other.views.is_empty();
        joint && codes.keys && codes.values && self.seen == other.seen
    }

    /// The rows that the queries of all heads make, `group` of each.
    fn rows(&self, group: usize) -> usize {
        (self.heads() * group).next_power_of_two()
    }

    /// Queries `[heads, group, m]` as each part of the keys sees them, `[parts, rows, m]`.
    fn queries<'q>(&self, queries: &'q [f32], group: usize) -> Cow<'q, [f32]> {
        if self.views.is_empty() {
            return Cow::Borrowed(queries);
        }
        let own = queries.len() / self.heads();
        let each = own / group * self.rows(group);
        let mut of_parts = vec![0.0; self.codes.keys.len() * each];
        for (head, (view, queries)) in self.views.iter().zip(queries.chunks_exact(own)).enumerate()
        {
            let seen = view.keys.queries(queries);
            let parts = of_parts.chunks_exact_mut(each).zip(seen.chunks_exact(own));
            parts.for_each(|(part, seen)| part[head * own..][..own].copy_from_slice(seen));
        }
        Cow::Owned(of_parts)
    }

    /// Whether rebuilding vectors costs less, for so many queries, than the products with all atoms named, and the sums over them.
    fn are_few(&self, rows: usize) -> bool {
        let named = self.named.keys.iter().chain(&self.named.values);
        let of_tables: usize = named.map(|atoms| atoms * rows).sum();
        let codes = self.codes.keys.iter().chain(&self.codes.values);
        let of_vector = |codes: &&Codes| ATOM_COST * codes.format().sparsity() + rows;
        let of_vectors: usize = codes.map(of_vector).sum();
        self.seen.len() * of_vectors < of_tables
    }
}

/// How many of the atoms, from the first on, codes may name.
fn named(codes: &Codes, atoms: Atoms<'_>) -> usize {
    let fits = codes.is_empty() || usize::from(codes.largest_index()) < atoms.len();
    assert!(fits, "codes name atoms that there are");
    // Not by the largest index there is or was: attention must not depend on codes that are gone.
    match codes.format() {
        _ if codes.is_empty() => 0,
        CodeFormat::Additive(format) => format.sizes.atoms(format.sparsity).min(atoms.len()),
        CodeFormat::Sparse(_) => atoms.len(),
    }
}

/// Takes heads that see the same codes together, as many as have up to `most` queries, `group` each.
pub(super) fn join(heads: Vec<Coded<'_>>, group: usize, most: usize) -> Vec<Coded<'_>> {
    let mut joined: Vec<Coded<'_>> = Vec::with_capacity(heads.len());
    for head in heads {
        match joined.last_mut() {
            Some(last) if last.are_those_of(&head) && (last.heads() + 1) * group <= most => {
                last.views.extend(head.views);
                last.offsets.extend(head.offsets);
            }
            _ => joined.push(head),
        }
    }
    joined
}

/// Tables with a row for every index that a code can hold, so that none needs a check; only the rows
/// of a dictionary's own atoms are ever touched, and so take memory.
#[derive(Default)]
struct Scratch {
    /// `[heads, parts, MAX_ATOMS, rows]`
    p: Vec<f32>,
    /// `[heads, parts, MAX_ATOMS, rows]`
    u: Vec<f32>,
    weights: Weights,
    /// Of keys and of values, `[REBUILT, m]`.
    vectors: KeyValue<Vec<f32>>,
    /// Atoms in f32, `[N, m]`.
    atoms: Vec<f32>,
}

/// Scores, and then weights, of positions, `[positions, rows]`.
#[derive(Default)]
struct Weights {
    all: Vec<f32>,
    /// Scores of one part, to be added.
    part: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The bytes of a line of the processor's cache.
const CACHE_LINE: usize = 64;

/// Room for so many numbers that begins with a line of the cache: rows read from anywhere do not lie across more lines than they must.
fn tables(memory: &mut Vec<f32>, numbers: usize) -> &mut [f32] {
    let room = numbers + CACHE_LINE;
    if memory.len() < room {
        // Zeros all at once: rows that are not touched take no memory.
        *memory = vec![0.0; room];
    }
    let before = memory.as_ptr().align_offset(CACHE_LINE);
    &mut memory[before.min(CACHE_LINE)..][..numbers]
}

/// Attention of some heads on the codes that they see.
struct Attending<'a, 's> {
    codes: &'a Coded<'a>,
    /// Of each head.
    softmaxes: &'s mut [RunningSoftmax],
    /// `[heads, group, m]`
    queries: &'a [f32],
    /// As each part sees them, `[parts, rows, m]`.
    of_parts: Cow<'a, [f32]>,
    /// The softmax over the codes, of all heads, and what the values of each part sum up to, `[parts, rows, m]`; of heads that
    /// are coded together alone.
    joint: Option<(RunningSoftmax, Vec<f32>)>,
    rows: usize,
}

impl<'a, 's> Attending<'a, 's> {
    fn new(
        codes: &'a Coded<'a>,
        softmaxes: &'s mut [RunningSoftmax],
        queries: &'a [f32],
        m: usize,
    ) -> Self {
        let group = softmaxes[0].rows();
        let rows = codes.rows(group);
        let joint = (!codes.views.is_empty()).then(|| {
            let sums = vec![0.0; codes.codes.values.len() * rows * m];
            (RunningSoftmax::new(rows, 0), sums)
        });
        Self {
            of_parts: codes.queries(queries, group),
            codes,
            softmaxes,
            queries,
            joint,
            rows,
        }
    }

    /// The softmax over the codes.
    fn softmax(&mut self) -> &mut RunningSoftmax {
        match &mut self.joint {
            Some((softmax, _)) => softmax,
            None => &mut self.softmaxes[0],
        }
    }

    /// What the values of each part sum up to.
    fn sums(&mut self) -> &mut [f32] {
        match &mut self.joint {
            Some((_, sums)) => sums,
            None => &mut self.softmaxes[0].output,
        }
    }

    /// Scales what was summed of each query's values by what [`RunningSoftmax::weigh`] says, where it did not.
    fn keep(&mut self, kept: Kept, m: usize) {
        if let Some((_, sums)) = &mut self.joint {
            shrink(sums, kept, self.rows, m);
        }
    }

    /// Gives the heads what was found.
    fn finish(self, m: usize) {
        let Some((found, sums)) = self.joint else {
            return;
        };
        let group = self.softmaxes[0].rows();
        let heads = self.softmaxes.iter_mut().zip(&self.codes.views);
        for (head, (softmax, view)) in heads.enumerate() {
            let own = head * group..(head + 1) * group;
            let numbers = own.start * m..own.end * m;
            let parts = sums.chunks_exact(self.rows * m);
            let parts = parts.flat_map(|sums| &sums[numbers.clone()]);
            let parts: Vec<f32> = parts.copied().collect();
            let mut output = vec![0.0; group * m];
            view.values.add(&parts, &mut output);
            softmax.merge(RunningSoftmax {
                head_dim: m,
                references: found.references[own.clone()].to_vec(),
                sums: found.sums[own].to_vec(),
                output,
            });
        }
    }
}

/// Adds the codes that KV heads see to the softmax of each; `queries` `[heads, group, m]` are scaled already.
/// The dictionaries are read once for all heads.
pub(super) fn add_heads(softmaxes: &mut [RunningSoftmax], queries: &[f32], codes: &[Coded<'_>]) {
    let group = softmaxes[0].rows();
    let m = codes[0].atoms.keys.head_dim();
    SCRATCH.with_borrow_mut(|scratch| {
        let mut by_table = Vec::with_capacity(codes.len());
        let (mut softmaxes, mut queries) = (softmaxes, queries);
        for codes in codes {
            let (own, others) = softmaxes.split_at_mut(codes.heads());
            let (asked, rest) = queries.split_at(codes.heads() * group * m);
            (softmaxes, queries) = (others, rest);
            let attending = Attending::new(codes, own, asked, m);
            if codes.are_few(attending.rows) {
                rebuild_codes(attending, scratch, |_, _| ());
            } else {
                by_table.push(attending);
            }
        }
        // Groups of heads that are coded together may differ in size; products are of one at a time.
        by_table.sort_by_key(|attending| attending.rows);
        for alike in by_table.chunk_by_mut(|a, b| a.rows == b.rows) {
            add_by_table(alike, scratch);
        }
        by_table
            .into_iter()
            .for_each(|attending| attending.finish(m));
    });
}

/// Adds the codes that some heads see by tables, all of as many rows.
fn add_by_table(all: &mut [Attending<'_, '_>], scratch: &mut Scratch) {
    let (atoms, rows) = (all[0].codes.atoms, all[0].rows);
    let m = atoms.keys.head_dim();
    let table = MAX_ATOMS * rows;
    let parts = all.iter().map(|own| own.codes.codes.as_ref().map(Vec::len));
    let parts: KeyValue<Vec<usize>> = parts.collect();
    let counts = parts.as_ref().map(|parts| parts.iter().sum::<usize>());
    let p = tables(&mut scratch.p, counts.keys * table);
    let mut room = p.chunks_exact_mut(table);
    let wanted = all.iter().flat_map(|own| {
        let queries = own.of_parts.chunks_exact(rows * m);
        let parts = queries.zip(&own.codes.named.keys).zip(&mut room);
        let parts = parts.map(|((queries, &atoms), out)| Products {
            queries,
            atoms,
            out,
        });
        parts.collect::<Vec<_>>()
    });
    let mut wanted: Vec<_> = wanted.collect();
    products(atoms.keys.all(), m, rows, &mut wanted);
    let u = tables(&mut scratch.u, counts.values * table);
    let (mut rest, mut room) = (&*p, &mut *u);
    for (number, own) in all.iter_mut().enumerate() {
        let (p, others) = rest.split_at(parts.keys[number] * table);
        let (u, free) = room.split_at_mut(parts.values[number] * table);
        (rest, room) = (others, free);
        sum_codes(own, p, u, &mut scratch.weights, |_, _| ());
    }
    let mut weighed = u.chunks_exact(table);
    let wanted = all.iter_mut().flat_map(|own| {
        let named = &own.codes.named.values;
        let parts = own.sums().chunks_exact_mut(rows * m).zip(named);
        let parts = parts.zip(&mut weighed);
        let parts = parts.map(|((out, &atoms), weights)| Sums {
            weights,
            atoms,
            out,
        });
        parts.collect::<Vec<_>>()
    });
    let mut wanted: Vec<_> = wanted.collect();
    sums(atoms.values.all(), m, rows, &mut wanted);
}

/// Adds the codes that one KV head sees for many queries; `queries` `[group, m]` are scaled already and do not
/// see the first `hidden[query]` positions.
pub(super) fn add_many(
    softmax: &mut RunningSoftmax,
    queries: &[f32],
    hidden: &[usize],
    codes: Coded<'_>,
) {
    let KeyValue { keys, values } = codes.atoms;
    let (m, group) = (keys.head_dim(), softmax.rows());
    let hide = |first: usize, scores: &mut [f32]| {
        for (query, &hidden) in hidden.iter().enumerate() {
            let scores = scores[query..].iter_mut().step_by(group);
            let hidden = hidden.saturating_sub(first);
            scores.take(hidden).for_each(|x| *x = f32::NEG_INFINITY);
        }
    };
    SCRATCH.with_borrow_mut(|scratch| {
        let mut own = Attending::new(&codes, std::slice::from_mut(softmax), queries, m);
        if codes.are_few(group) {
            rebuild_codes(own, scratch, hide);
            return;
        }
        let table = MAX_ATOMS * group;
        let p = tables(&mut scratch.p, codes.codes.keys.len() * table);
        let u = tables(&mut scratch.u, codes.codes.values.len() * table);
        let parts = own.of_parts.chunks_exact(group * m);
        let parts = parts.zip(&codes.named.keys);
        for ((queries, &n), p) in parts.zip(p.chunks_exact_mut(table)) {
            let rows = keys.rows(0, n).widened(m, &mut scratch.atoms);
            let rows = Matrix::by_rows(rows, n, m);
            let columns = Matrix::by_rows(queries, group, m).transposed();
            multiply(&mut p[..n * group], false, rows, columns);
        }
        sum_codes(&mut own, p, u, &mut scratch.weights, hide);
        let parts = own.sums().chunks_exact_mut(group * m);
        for ((out, &n), u) in parts.zip(&codes.named.values).zip(u.chunks_exact(table)) {
            let u = Matrix::by_rows(&u[..n * group], n, group).transposed();
            let rows = values.rows(0, n).widened(m, &mut scratch.atoms);
            let rows = Matrix::by_rows(rows, n, m);
            multiply(out, true, u, rows);
        }
        own.finish(m);
    });
}

/// Scores the codes by `p`, and sums the values' codes by the weights into `u`, of which nothing is read; both are
/// `[parts, MAX_ATOMS, rows]`.
fn sum_codes(
    own: &mut Attending<'_, '_>,
    p: &[f32],
    u: &mut [f32],
    weights: &mut Weights,
    hide: impl FnMut(usize, &mut [f32]),
) {
    let (codes, rows) = (own.codes, own.rows);
    let table = MAX_ATOMS * rows;
    for (u, &atoms) in u.chunks_exact_mut(table).zip(&codes.named.values) {
        u[..atoms * rows].fill(0.0);
    }
    let KeyValue { keys, values } = &codes.codes;
    let score = |part: usize, range, out: &mut [f32]| {
        let p = &p[part * table..][..table];
        keys[part].visit(range, |block, at| {
            block.scores(p, rows, &mut out[at * rows..][..block.len() * rows]);
        });
    };
    let sum = |_: &mut Attending<'_, '_>, range: Range<usize>, weights: &[f32], kept: Kept| {
        let parts = u.chunks_exact_mut(table).zip(&codes.named.values);
        for ((u, &atoms), values) in parts.zip(values) {
            shrink(&mut u[..atoms * rows], kept, rows, 1);
            values.visit(range.clone(), |block, at| {
                block.accumulate(&weights[at * rows..][..block.len() * rows], rows, u);
            });
        }
    };
    weigh_codes(own, weights, hide, score, sum);
}

/// By how much what each query had summed before has shrunk, where anything has.
type Kept = Option<[f32; MAX_QUERIES]>;

/// Shrinks what was summed before for each of `rows` queries, `each` numbers of one and then of the next.
fn shrink(sums: &mut [f32], kept: Kept, rows: usize, each: usize) {
    let Some(kept) = kept else { return };
    for sums in sums.chunks_exact_mut(rows * each) {
        for (sums, kept) in sums.chunks_exact_mut(each).zip(&kept) {
            sums.iter_mut().for_each(|x| *x *= kept);
        }
    }
}

/// Scores codes, and sums their values, by the vectors that they stand for, a block of them at a time.
fn rebuild_codes(
    mut own: Attending<'_, '_>,
    scratch: &mut Scratch,
    hide: impl FnMut(usize, &mut [f32]),
) {
    let (codes, rows, atoms) = (own.codes, own.rows, own.codes.atoms);
    let m = atoms.keys.head_dim();
    let KeyValue { keys, values } = &codes.codes;
    let vectors = &mut scratch.vectors;
    let of_parts = std::mem::take(&mut own.of_parts);
    let score = |part: usize, range, out: &mut [f32]| {
        let queries = &of_parts[part * rows * m..][..rows * m];
        let keys = keys[part];
        rebuilt(keys, range, atoms.keys, &mut vectors.keys, |keys, at| {
            let count = keys.len() / m;
            let out = &mut out[at * rows..][..count * rows];
            if rows <= MAX_GROUP {
                dots(Rows::F32(keys), queries, m, rows, out);
            } else {
                let queries = Matrix::by_rows(queries, rows, m).transposed();
                multiply(out, false, Matrix::by_rows(keys, count, m), queries);
            }
        });
    };
    let sum = |own: &mut Attending<'_, '_>, range: Range<usize>, weights: &[f32], kept: Kept| {
        own.keep(kept, m);
        for (values, out) in values.iter().zip(own.sums().chunks_exact_mut(rows * m)) {
            let room = &mut vectors.values;
            rebuilt(values, range.clone(), atoms.values, room, |values, at| {
                let count = values.len() / m;
                let weights = &weights[at * rows..][..count * rows];
                if rows <= MAX_GROUP {
                    combine(weights, Rows::F32(values), m, rows, out);
                } else {
                    let weights = Matrix::by_rows(weights, count, rows).transposed();
                    multiply(out, true, weights, Matrix::by_rows(values, count, m));
                }
            });
        }
    };
    weigh_codes(&mut own, &mut scratch.weights, hide, score, sum);
    own.finish(m);
}

/// Has each part of the keys scored, many positions at a time, and the values summed by the weights that the softmax makes of the scores, both
/// `[n, rows]`; `sum` is told by how much what each query had summed before has shrunk, as [`RunningSoftmax::weigh`] says.
fn weigh_codes(
    own: &mut Attending<'_, '_>,
    weights: &mut Weights,
    mut hide: impl FnMut(usize, &mut [f32]),
    mut score: impl FnMut(usize, Range<usize>, &mut [f32]),
    mut sum: impl FnMut(&mut Attending<'_, '_>, Range<usize>, &[f32], Kept),
) {
    let (codes, rows) = (own.codes, own.rows);
    let Weights { all, part } = weights;
    for first in codes.seen.clone().step_by(BLOCK) {
        let range = first..codes.seen.end.min(first + BLOCK);
        all.resize(range.len() * rows, 0.0);
        score(0, range.clone(), all);
        for number in 1..codes.codes.keys.len() {
            part.resize(all.len(), 0.0);
            score(number, range.clone(), part);
            all.iter_mut().zip(&*part).for_each(|(sum, x)| *sum += x);
        }
        RotaryOffsets::add(&codes.offsets, own.queries, rows, first, all);
        hide(first, all);
        let kept = own.softmax().weigh(all);
        sum(own, range, all, kept);
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
        let named_by = [&older, &newer].map(|codes| named(codes, atoms));
        assert_eq!(named_by, [276; 2]);
    }
}
