//! Attention of one KV head's queries over coded and dense positions together: one softmax.
//!
//! Every source of positions adds its part to a running softmax (Milakov & Gimelshein 2018;
//! Dao et al. 2022): the largest score so far, the sum of exponentials, the unnormalised output.

mod accumulated;
mod coded;
mod dense;

pub use accumulated::accumulated_attention;
pub use dense::{DenseRows, NumberType};
pub(crate) use dense::{PAGE, ROOM};

use std::ops::Range;

use crate::codes::Codes;
use crate::dictionary::{Atoms, HeadBasis, RotaryOffsets};
use crate::kernels::dense::MAX_GROUP;
use crate::kernels::softmax::{MAX_QUERIES, softmax};
use crate::kernels::tables::MAX_GROUP as JOINED;
use crate::key_value::KeyValue;
use crate::threads::{Threads, for_each};
use coded::Coded;

/// Some positions to attend to.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Coded positions, all of them before every query.
    Codes {
        /// Codes of the keys and of the values.
        codes: KeyValue<&'a Codes>,
        /// Atoms that the codes are over.
        atoms: KeyValue<Atoms<'a>>,
        /// What the keys' scores lack.
        offsets: Option<RotaryOffsets<'a>>,
    },
    /// Coded positions of a group of heads that are coded together, all of them before every query.
    Joint {
        /// Codes of the parts of the keys and of the values.
        codes: KeyValue<&'a [&'a Codes]>,
        /// What of them the head sees.
        basis: KeyValue<HeadBasis<'a>>,
        /// Atoms that the codes are over.
        atoms: KeyValue<Atoms<'a>>,
        /// What the keys' scores lack.
        offsets: Option<RotaryOffsets<'a>>,
    },
    /// Dense positions, all of them before every query.
    Dense(KeyValue<&'a DenseRows>),
    /// Positions in a form of their own, all of them before every query; turned back into vectors, some at a time,
    /// as they are attended to.
    Decoded(&'a dyn Positions),
    /// The queries' own positions, `[t, m]`: query `i` of `t` sees the first `i + 1`.
    Causal(KeyValue<&'a [f32]>),
}

/// Keys and values in a form that is turned back into vectors to attend to them.
pub trait Positions: Sync {
    /// Number of positions held.
    fn len(&self) -> usize;

    /// Returns whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the keys and the values, `[count, m]` each, of `count` positions from `first` on.
    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>);
}

impl<'a> Source<'a> {
    /// The codes, of the positions in `seen`, where these are coded positions.
    fn coded(&self, seen: Range<usize>) -> Option<Coded<'a>> {
        match *self {
            Source::Codes {
                codes,
                atoms,
                offsets,
            } => {
                let codes = codes.map(|codes| vec![codes]);
                Some(Coded::new(codes, None, atoms, offsets, seen))
            }
            Source::Joint {
                codes,
                basis,
                atoms,
                offsets,
            } => {
                let codes = codes.map(<[_]>::to_vec);
                Some(Coded::new(codes, Some(basis), atoms, offsets, seen))
            }
            _ => None,
        }
    }

    /// Heads that are coded together.
    fn together(&self) -> usize {
        match self {
            Source::Joint { codes, .. } => codes.keys.len(),
            _ => 1,
        }
    }

    /// Number of positions.
    fn len(&self, head_dim: usize) -> usize {
        match self {
            Source::Codes { codes, .. } => codes.keys.len(),
            Source::Joint { codes, .. } => codes.keys.first().map_or(0, |codes| codes.len()),
            Source::Dense(rows) => rows.len(),
            Source::Decoded(positions) => positions.len(),
            Source::Causal(vectors) => vectors.keys.len() / head_dim,
        }
    }
}

/// The queries of one KV head, what they attend to, and where the result goes.
pub struct Head<'a> {
    /// `[G, t, m]`
    pub queries: &'a [f32],
    /// The past in order of position, the queries' own positions last.
    pub sources: &'a [Source<'a>],
    /// Room for the result, of the queries' shape.
    pub out: &'a mut [f32],
}

impl<'a> Head<'a> {
    /// Takes the queries and the room for results of a layer, `[heads, G, t, m]` each, apart: one part for each of
    /// `sources`.
    pub fn split<S: AsRef<[Source<'a>]>>(
        queries: &'a [f32],
        sources: &'a [S],
        out: &'a mut [f32],
    ) -> Vec<Self> {
        let each = queries.len() / sources.len();
        let parts = queries.chunks_exact(each).zip(out.chunks_exact_mut(each));
        let heads = parts.zip(sources).map(|((queries, out), sources)| Self {
            queries,
            sources: sources.as_ref(),
            out,
        });
        heads.collect()
    }
}

/// Rows of queries that one task takes where there are many positions: prefill splits evenly.
const ROWS: usize = MAX_QUERIES;

/// Attention of each of a layer's KV heads over its sources, scores scaled by `1/√m`.
///
/// Query `r` of a head is at position `r % t` of the `t` newest ones, as [`Source::Causal`] counts
/// them. With a sliding window of `window` positions a query sees its own and the `window − 1`
/// before it. Outputs are zero where there is nothing to attend to. Of codes
/// scores come from `p = Dₖq`, the products of the query with all atoms, and outputs from `u`, the
/// weights summed up by atom: `O(N·m)` a query plus `O(s)` a position. Where that is more, blocks of vectors are rebuilt in the
/// processor's cache: `O(s·m)` a position. In decoding the context of each head is split where there are more threads than
/// heads; but for the order of those sums, results do not depend on the number of threads.
///
/// A NaN in a query, key or value makes the outputs it reaches NaN.
///
/// # Panics
/// Where the slices' lengths do not agree, there are not as many keys as values, `head_dim` or `t`
/// is 0, codes name atoms that they are not over, or heads differ in the shape of their
/// queries, in the kinds of their sources or in dictionaries.
pub fn attend_heads(
    heads: &mut [Head<'_>],
    head_dim: usize,
    t: usize,
    window: Option<usize>,
    threads: &dyn Threads,
) {
    let Some(queries) = heads.first().map(|head| head.queries.len()) else {
        return;
    };
    assert!(queries.is_multiple_of(head_dim * t), "whole query heads");
    for head in heads.iter() {
        assert_eq!(head.queries.len(), queries, "heads of one shape");
        assert_eq!(head.out.len(), queries, "one output a query");
    }
    if t == 1 && queries / head_dim <= MAX_GROUP {
        attend_one(heads, head_dim, window, threads);
        return;
    }
    let chunk = ROWS * head_dim;
    let tasks = heads.iter_mut().flat_map(|head| {
        let parts = head.queries.chunks(chunk).zip(head.out.chunks_mut(chunk));
        parts
            .enumerate()
            .map(|(task, (queries, out))| (task, queries, out, head.sources))
    });
    for_each(threads, tasks, |(task, queries, out, sources)| {
        let rows = queries.len() / head_dim;
        let own: Vec<usize> = (0..rows).map(|row| (task * ROWS + row) % t).collect();
        attend_many(queries, head_dim, &own, window, sources, out);
    });
}

/// Queries scaled by `1/√m`, filled up with zeros to a power of two.
fn scaled(queries: &[f32], head_dim: usize) -> Vec<f32> {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let group = (queries.len() / head_dim).next_power_of_two();
    let mut scaled: Vec<f32> = queries.iter().map(|q| q * scale).collect();
    scaled.resize(group * head_dim, 0.0);
    scaled
}

/// Fewest positions that a part of a context has: each part computes `p` and sums up its `u` for itself.
const PART: usize = 8192;

/// Decoding: the queries of one new position.
fn attend_one(heads: &mut [Head<'_>], m: usize, window: Option<usize>, threads: &dyn Threads) {
    let count = threads.count().max(1);
    let past = |head: &Head<'_>| head.sources.iter().map(|s| s.len(m)).sum::<usize>();
    let seen = window
        .unwrap_or(usize::MAX)
        .min(heads.iter().map(past).max().unwrap_or(0));
    // Heads that are coded together read codes once.
    let joint = heads[0].sources.iter().map(Source::together).max();
    let group = (heads[0].queries.len() / m).next_power_of_two();
    let together = joint.unwrap_or(1).min(JOINED / group).max(1);
    let units = heads.len().div_ceil(together);
    let parts = (count / units).min(seen / PART).max(1);
    // A task takes some whole heads, for which it reads the dictionaries once, or a part of the context of those that go together.
    let share = if parts == 1 {
        units.div_ceil(count) * together
    } else {
        together
    };
    let tasks = heads.len().div_ceil(share) * parts;
    let mut found: Vec<Vec<RunningSoftmax>> = (0..tasks).map(|_| Vec::new()).collect();
    for_each(threads, found.iter_mut().enumerate(), |(task, found)| {
        let first = task / parts * share;
        let own = &heads[first..heads.len().min(first + share)];
        *found = attend_part(own, m, window, task % parts, parts);
    });
    for (heads, found) in heads.chunks_mut(share).zip(found.chunks_exact_mut(parts)) {
        for head in heads.iter_mut().rev() {
            let mut parts = found.iter_mut().filter_map(Vec::pop);
            if let Some(mut softmax) = parts.next() {
                parts.for_each(|part| softmax.merge(part));
                softmax.finish(head.out);
            }
        }
    }
}

/// Attention of some heads' queries of one new position to part `part` of `parts` of what they see.
fn attend_part(
    heads: &[Head<'_>],
    m: usize,
    window: Option<usize>,
    part: usize,
    parts: usize,
) -> Vec<RunningSoftmax> {
    let queries: Vec<f32> = heads
        .iter()
        .flat_map(|head| scaled(head.queries, m))
        .collect();
    let each = queries.len() / heads.len();
    let mut softmaxes: Vec<RunningSoftmax> = heads
        .iter()
        .map(|_| RunningSoftmax::new(each / m, m))
        .collect();
    let seen: Vec<Range<usize>> = heads
        .iter()
        .map(|head| {
            let positions: usize = head.sources.iter().map(|source| source.len(m)).sum();
            let hidden = window.map_or(0, |w| positions.saturating_sub(w));
            let bound = |part: usize| hidden + (positions - hidden) * part / parts;
            bound(part)..bound(part + 1)
        })
        .collect();
    let mut before = vec![0; heads.len()];
    for number in 0..heads[0].sources.len() {
        // The positions that are seen of every head's source.
        let ranges: Vec<Range<usize>> = heads
            .iter()
            .zip(&seen)
            .zip(&mut before)
            .map(|((head, seen), before)| {
                let len = head.sources[number].len(m);
                let own = |position: usize| position.saturating_sub(*before).min(len);
                let range = own(seen.start)..own(seen.end);
                *before += len;
                range
            })
            .collect();
        let coded = heads.iter().zip(&ranges);
        let coded = coded.filter_map(|(head, range)| head.sources[number].coded(range.clone()));
        let codes: Vec<Coded<'_>> = coded.collect();
        if let Some(first) = codes.first().map(|own| own.atoms) {
            let shared = |own: &Coded<'_>| {
                own.atoms.keys.are(first.keys) && own.atoms.values.are(first.values)
            };
            let alike = codes.len() == heads.len() && codes.iter().all(shared);
            assert!(alike, "heads of a layer share dictionaries");
            let codes = coded::join(codes, each / m, JOINED);
            coded::add_heads(&mut softmaxes, &queries, &codes);
        }
        let each_head = softmaxes
            .iter_mut()
            .zip(queries.chunks_exact(each))
            .zip(ranges);
        for (head, ((softmax, queries), range)) in heads.iter().zip(each_head) {
            match head.sources[number] {
                Source::Codes { .. } | Source::Joint { .. } => {}
                Source::Dense(rows) => dense::add_few(softmax, queries, range, rows),
                Source::Decoded(positions) => {
                    dense::add_few_decoded(softmax, queries, range, positions);
                }
                Source::Causal(vectors) => {
                    assert_eq!(vectors.keys.len(), m, "one new position");
                    if !range.is_empty() {
                        dense::add_own(softmax, queries, vectors);
                    }
                }
            }
        }
    }
    softmaxes
}

/// Prefill: some queries of one head, at the new positions `own`.
fn attend_many(
    queries: &[f32],
    m: usize,
    own: &[usize],
    window: Option<usize>,
    sources: &[Source<'_>],
    out: &mut [f32],
) {
    let queries = scaled(queries, m);
    let mut softmax = RunningSoftmax::new(queries.len() / m, m);
    // Queries that fill up their number see nothing; what they would see is thrown away.
    let mut own = own.to_vec();
    own.resize(softmax.rows(), 0);
    let is_past = |source: &&Source<'_>| !matches!(source, Source::Causal { .. });
    let past: usize = sources.iter().filter(is_past).map(|s| s.len(m)).sum();
    let mut before = 0;
    for source in sources {
        // How many of the source's oldest positions lie outside each query's window.
        let hidden: Vec<usize> = own
            .iter()
            .map(|i| window.map_or(0, |w| (past + i + 1).saturating_sub(w + before)))
            .collect();
        before += source.len(m);
        match *source {
            Source::Codes { .. } | Source::Joint { .. } => {
                if let Some(codes) = source.coded(0..source.len(m)) {
                    coded::add_many(&mut softmax, &queries, &hidden, codes);
                }
            }
            Source::Dense(ref rows) => dense::add(&mut softmax, &queries, &hidden, rows),
            Source::Decoded(positions) => dense::add(&mut softmax, &queries, &hidden, positions),
            Source::Causal(vectors) => {
                dense::add_causal(&mut softmax, &queries, &hidden, &own, vectors);
            }
        }
    }
    softmax.finish(out);
}

/// A softmax over scores that come source by source, and its weighted values.
struct RunningSoftmax {
    head_dim: usize,
    /// Number taken off each query's scores before the exponential, as [`softmax`] chooses it.
    references: Vec<f32>,
    /// Sum of `exp(score − reference)` of each query.
    sums: Vec<f32>,
    /// Weighted values of each query, not yet divided by the sums, `[rows, m]`.
    output: Vec<f32>,
}

impl RunningSoftmax {
    fn new(rows: usize, head_dim: usize) -> Self {
        Self {
            head_dim,
            references: vec![f32::NEG_INFINITY; rows],
            sums: vec![0.0; rows],
            output: vec![0.0; rows * head_dim],
        }
    }

    fn rows(&self) -> usize {
        self.sums.len()
    }

    /// Turns scores `[n, rows]` into weights, and scales what was summed before to match; where anything was,
    /// returns each query's factor. `−∞` marks a position that a query does not see.
    fn weigh(&mut self, scores: &mut [f32]) -> Option<[f32; MAX_QUERIES]> {
        let mut factors = [1f32; MAX_QUERIES];
        let mut before = [0f32; MAX_QUERIES];
        let rows = self.rows();
        before[..rows].copy_from_slice(&self.references);
        let mut sums = [0f32; MAX_QUERIES];
        softmax(scores, &mut self.references, &mut sums[..rows]);
        for row in 0..rows {
            factors[row] = self.carry(row, before[row], sums[row]);
        }
        factors.iter().any(|&kept| kept != 1.0).then_some(factors)
    }

    /// Turns the scores of query `row` alone into weights, like [`RunningSoftmax::weigh`].
    fn weigh_one(&mut self, row: usize, scores: &mut [f32]) {
        let before = self.references[row];
        let mut sum = [0.0];
        softmax(scores, &mut self.references[row..=row], &mut sum);
        self.carry(row, before, sum[0]);
    }

    /// Scales what query `row` had summed when its reference was `before`, and adds to its sum; returns the factor.
    fn carry(&mut self, row: usize, before: f32, sum: f32) -> f32 {
        let kept = if before == self.references[row] || before == f32::NEG_INFINITY {
            1.0
        } else {
            (before - self.references[row]).exp()
        };
        self.sums[row] = self.sums[row] * kept + sum;
        if kept != 1.0 {
            let output = &mut self.output[row * self.head_dim..][..self.head_dim];
            output.iter_mut().for_each(|x| *x *= kept);
        }
        kept
    }

    /// Adds what another has summed over other positions.
    fn merge(&mut self, mut other: Self) {
        for row in 0..self.rows() {
            let (own, others) = (self.references[row], other.references[row]);
            for (part, before) in [(&mut *self, own), (&mut other, others)] {
                part.references[row] = own.max(others);
                part.carry(row, before, 0.0);
            }
            self.sums[row] += other.sums[row];
        }
        let outputs = self.output.iter_mut().zip(other.output);
        outputs.for_each(|(x, more)| *x += more);
    }

    /// Writes the outputs of the queries, without those that filled up their number.
    fn finish(self, out: &mut [f32]) {
        let rows = self.output.chunks_exact(self.head_dim).zip(&self.sums);
        for (out, (row, &sum)) in out.chunks_exact_mut(self.head_dim).zip(rows) {
            for (out, &x) in out.iter_mut().zip(row) {
                *out = if sum == 0.0 { x } else { x / sum };
            }
        }
    }
}
