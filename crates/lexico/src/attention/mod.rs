//! Attention of one KV head's queries over coded and dense positions together: one softmax.
//!
//! Every source of positions adds its part to a running softmax (Milakov & Gimelshein 2018;
//! Dao et al. 2022): the largest score so far, the sum of exponentials, the unnormalised output.

mod accumulated;
mod coded;
mod dense;

pub use accumulated::accumulated_attention;
pub use dense::{DenseRows, NumberType};

use std::ops::Range;

use crate::codes::Codes;
use crate::dictionary::Atoms;
use crate::kernels::dense::MAX_GROUP;
use crate::kernels::{MAX_QUERIES, softmax};
use crate::threads::{Rayon, Threads, for_each};
use coded::Coded;

/// Some positions to attend to.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Coded positions, all of them before every query.
    Codes {
        /// Codes of the keys.
        keys: &'a Codes,
        /// Codes of the values.
        values: &'a Codes,
        /// What the keys are coded over.
        key_atoms: Atoms<'a>,
        /// What the values are coded over.
        value_atoms: Atoms<'a>,
    },
    /// Dense positions, all of them before every query.
    Dense {
        /// Keys.
        keys: &'a DenseRows,
        /// Values.
        values: &'a DenseRows,
    },
    /// Positions in a form of their own, all of them before every query; turned back into vectors, some at a time,
    /// as they are attended to.
    Decoded(&'a dyn Positions),
    /// The queries' own positions, `[t, m]`: query `i` of `t` sees the first `i + 1`.
    Causal {
        /// Keys.
        keys: &'a [f32],
        /// Values.
        values: &'a [f32],
    },
}

/// Keys and values in a form that is turned back into vectors to attend to them.
pub trait Positions: Sync {
    /// Positions held.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the keys and the values, `[count, m]` each, of `count` positions from `first` on.
    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>);
}

impl Source<'_> {
    /// Positions.
    fn len(&self, head_dim: usize) -> usize {
        match self {
            Source::Codes { keys, .. } => keys.len(),
            Source::Dense { keys, .. } => keys.len(),
            Source::Decoded(positions) => positions.len(),
            Source::Causal { keys, .. } => keys.len() / head_dim,
        }
    }
}

/// The queries of one KV head, what they attend to, and where the result goes.
pub struct Head<'a> {
    /// `[G, t, m]`
    pub queries: &'a [f32],
    /// The past in order of position, the queries' own positions last.
    pub sources: &'a [Source<'a>],
    /// Of the queries' shape.
    pub out: &'a mut [f32],
}

/// Rows of queries that one task takes where there are many positions: prefill splits evenly.
const ROWS: usize = MAX_QUERIES;

/// Attention of the queries `[G, t, m]` of one KV head; as [`attend_heads`] of it alone.
///
/// # Panics
/// As [`attend_heads`].
pub fn attend(
    queries: &[f32],
    head_dim: usize,
    t: usize,
    window: Option<usize>,
    sources: &[Source<'_>],
    out: &mut [f32],
) {
    let head = Head {
        queries,
        sources,
        out,
    };
    attend_heads(&mut [head], head_dim, t, window, &Rayon);
}

/// Attention of each of a layer's KV heads over its sources, scores scaled by `1/√m`.
///
/// Query `r` of a head is at position `r % t` of the `t` newest ones, as [`Source::Causal`] counts
/// them. With a sliding window of `window` positions a query sees its own and the `window − 1`
/// before it. Outputs are zero where there is nothing to attend to. Codes are never turned back
/// into vectors: scores come from `p = Dₖq`, values from the accumulator `u` (METHOD: `O(N·m)` a
/// query plus `O(s)` a position). In decoding the context of each head is split where there are more threads than
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
    let parts = (count / heads.len()).min(seen / PART).max(1);
    if parts == 1 {
        let share = heads.len().div_ceil(count);
        for_each(threads, heads.chunks_mut(share), |heads| {
            let softmaxes = attend_part(heads, m, window, 0, 1);
            for (head, softmax) in heads.iter_mut().zip(softmaxes) {
                softmax.finish(head.out);
            }
        });
        return;
    }
    let mut softmaxes: Vec<Option<RunningSoftmax>> =
        (0..heads.len() * parts).map(|_| None).collect();
    for_each(
        threads,
        softmaxes.iter_mut().enumerate(),
        |(task, softmax)| {
            let head = task / parts;
            *softmax = attend_part(&heads[head..=head], m, window, task % parts, parts).pop();
        },
    );
    for (head, parts) in heads.iter_mut().zip(softmaxes.chunks_exact_mut(parts)) {
        let mut parts = parts.iter_mut().filter_map(Option::take);
        if let Some(mut softmax) = parts.next() {
            parts.for_each(|part| softmax.merge(&part));
            softmax.finish(head.out);
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
        // Of every head's source, the positions that are seen.
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
        if let Source::Codes {
            key_atoms,
            value_atoms,
            ..
        } = heads[0].sources[number]
        {
            let codes: Vec<Coded<'_>> = heads
                .iter()
                .zip(&ranges)
                .filter_map(|(head, range)| {
                    head.sources[number].codes(range, key_atoms, value_atoms)
                })
                .collect();
            assert_eq!(
                codes.len(),
                heads.len(),
                "heads of a layer share dictionaries"
            );
            coded::add_heads(&mut softmaxes, &queries, &codes, key_atoms, value_atoms);
        }
        let each_head = softmaxes
            .iter_mut()
            .zip(queries.chunks_exact(each))
            .zip(ranges);
        for (head, ((softmax, queries), range)) in heads.iter().zip(each_head) {
            match head.sources[number] {
                Source::Codes { .. } => {}
                Source::Dense { keys, values } => {
                    dense::add_few(softmax, queries, range, keys, values);
                }
                Source::Decoded(positions) => {
                    dense::add_few_decoded(softmax, queries, range, positions);
                }
                Source::Causal { keys, values } => {
                    assert_eq!(keys.len(), m, "one new position");
                    if !range.is_empty() {
                        dense::add_own(softmax, queries, keys, values);
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
    // Those that fill up the group see nothing; what they would see is thrown away.
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
            Source::Codes {
                keys,
                values,
                key_atoms,
                value_atoms,
            } => {
                let codes = Coded {
                    keys,
                    values,
                    first: 0,
                    end: keys.len(),
                };
                codes.check(key_atoms, value_atoms);
                coded::add_many(
                    &mut softmax,
                    &queries,
                    &hidden,
                    codes,
                    key_atoms,
                    value_atoms,
                );
            }
            Source::Dense { keys, values } => {
                assert_eq!(keys.len(), values.len(), "one value a key");
                let read = |first, count, key_block: &mut _, value_block: &mut _| {
                    keys.read(first, count, key_block);
                    values.read(first, count, value_block);
                };
                dense::add(&mut softmax, &queries, &hidden, keys.len(), read);
            }
            Source::Decoded(positions) => {
                let read = |first, count, keys: &mut _, values: &mut _| {
                    positions.read(first, count, keys, values);
                };
                dense::add(&mut softmax, &queries, &hidden, positions.len(), read);
            }
            Source::Causal { keys, values } => {
                dense::add_causal(&mut softmax, &queries, &hidden, &own, keys, values);
            }
        }
    }
    softmax.finish(out);
}

impl<'a> Source<'a> {
    /// Some codes of this source; `None` where it is no codes or over other atoms than these.
    fn codes(
        &self,
        range: &Range<usize>,
        wanted_keys: Atoms<'_>,
        wanted_values: Atoms<'_>,
    ) -> Option<Coded<'a>> {
        match *self {
            Source::Codes {
                keys,
                values,
                key_atoms,
                value_atoms,
            } if key_atoms.are(wanted_keys) && value_atoms.are(wanted_values) => {
                let codes = Coded {
                    keys,
                    values,
                    first: range.start,
                    end: range.end,
                };
                codes.check(key_atoms, value_atoms);
                Some(codes)
            }
            _ => None,
        }
    }
}

/// A softmax over scores that come source by source, and its weighted values.
struct RunningSoftmax {
    head_dim: usize,
    /// What is taken off each query's scores before the exponential, as [`softmax`] chooses it.
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

    /// As [`RunningSoftmax::weigh`], the scores of query `row` alone.
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
    fn merge(&mut self, other: &Self) {
        let m = self.head_dim;
        for row in 0..self.rows() {
            let before = self.references[row];
            let reference = other.references[row];
            self.references[row] = before.max(reference);
            self.carry(row, before, 0.0);
            let kept = if reference == self.references[row] {
                1.0
            } else {
                (reference - self.references[row]).exp()
            };
            self.sums[row] += other.sums[row] * kept;
            let output = &mut self.output[row * m..(row + 1) * m];
            for (x, &more) in output.iter_mut().zip(&other.output[row * m..]) {
                *x += more * kept;
            }
        }
    }

    /// Writes the outputs of the queries, without those that filled up the group.
    fn finish(self, out: &mut [f32]) {
        let rows = self.output.chunks_exact(self.head_dim).zip(&self.sums);
        for (out, (row, &sum)) in out.chunks_exact_mut(self.head_dim).zip(rows) {
            for (out, &x) in out.iter_mut().zip(row) {
                *out = if sum == 0.0 { x } else { x / sum };
            }
        }
    }
}
