//! Attention of one KV head's queries over coded and dense positions together: one softmax.
//!
//! Every source of positions adds its part to a running softmax (Milakov & Gimelshein 2018;
//! Dao et al. 2022): the largest score so far, the sum of exponentials, the unnormalised output.

mod coded;
mod dense;

pub use dense::{DenseRows, NumberType};

use rayon::prelude::*;

use crate::code::Codes;
use crate::dictionary::Dictionary;

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
        key_dictionary: &'a Dictionary,
        /// What the values are coded over.
        value_dictionary: &'a Dictionary,
    },
    /// Dense positions, all of them before every query.
    Dense {
        /// Keys.
        keys: &'a DenseRows,
        /// Values.
        values: &'a DenseRows,
    },
    /// The queries' own positions, `[t, m]`: query `i` of `t` sees the first `i + 1`.
    Causal {
        /// Keys.
        keys: &'a [f32],
        /// Values.
        values: &'a [f32],
    },
}

impl Source<'_> {
    /// Positions.
    fn len(&self, head_dim: usize) -> usize {
        match self {
            Source::Codes { keys, .. } => keys.len(),
            Source::Dense { keys, .. } => keys.len(),
            Source::Causal { keys, .. } => keys.len() / head_dim,
        }
    }
}

/// Rows of queries that one task takes: the query groups of decode fit, prefill splits evenly.
const ROWS: usize = 32;

/// Attention of the queries `[G, t, m]` of one KV head over all `sources`, scores scaled by `1/√m`.
///
/// The sources are the past in order of position, the queries' own positions last. Query `r` is at
/// position `r % t` of the `t` newest ones, as [`Source::Causal`] counts them. With a sliding
/// window of `window` positions a query sees its own and the `window − 1` before it.
/// Writes `out`, of the queries' shape: zeros where there is nothing to attend to. Codes are never
/// turned back into vectors: scores come from `p = Dₖq`, values from the accumulator `u`
/// (METHOD: `O(N·m)` a query plus `O(s)` a position).
///
/// A NaN in a query, key or value makes the outputs it reaches NaN.
///
/// # Panics
/// Where the slices' lengths do not agree, there are not as many keys as values, `head_dim` or `t`
/// is 0, or codes name atoms that their dictionary does not have.
pub fn attend(
    queries: &[f32],
    head_dim: usize,
    t: usize,
    window: Option<usize>,
    sources: &[Source<'_>],
    out: &mut [f32],
) {
    assert_eq!(queries.len(), out.len(), "one output a query");
    assert!(
        queries.len().is_multiple_of(head_dim * t),
        "whole query heads"
    );
    let scale = 1.0 / (head_dim as f32).sqrt();
    let is_past = |source: &&Source<'_>| !matches!(source, Source::Causal { .. });
    let past: usize = sources
        .iter()
        .filter(is_past)
        .map(|s| s.len(head_dim))
        .sum();
    let chunk = ROWS * head_dim;
    let tasks = (queries.par_chunks(chunk), out.par_chunks_mut(chunk));
    tasks
        .into_par_iter()
        .enumerate()
        .for_each(|(task, (queries, out))| {
            let scaled: Vec<f32> = queries.iter().map(|q| q * scale).collect();
            let mut softmax = RunningSoftmax::new(out, head_dim);
            let first = task * ROWS;
            let own: Vec<usize> = (0..softmax.rows()).map(|row| (first + row) % t).collect();
            let mut before = 0;
            for source in sources {
                // How many of the source's oldest positions lie outside each query's window.
                let hidden: Vec<usize> = own
                    .iter()
                    .map(|i| window.map_or(0, |w| (past + i + 1).saturating_sub(w + before)))
                    .collect();
                before += source.len(head_dim);
                match *source {
                    Source::Codes {
                        keys,
                        values,
                        key_dictionary,
                        value_dictionary,
                    } => coded::add(
                        &mut softmax,
                        &scaled,
                        &hidden,
                        (keys, key_dictionary),
                        (values, value_dictionary),
                    ),
                    Source::Dense { keys, values } => {
                        dense::add(&mut softmax, &scaled, &hidden, keys, values);
                    }
                    Source::Causal { keys, values } => {
                        dense::add_causal(&mut softmax, &scaled, &hidden, &own, keys, values);
                    }
                }
            }
            softmax.finish();
        });
}

/// A softmax over scores that come source by source, and its weighted values.
struct RunningSoftmax<'a> {
    head_dim: usize,
    /// Largest score of each query so far.
    largest: Vec<f32>,
    /// Sum of `exp(score − largest)` of each query.
    sums: Vec<f32>,
    /// Weighted values of each query, not yet divided by the sums, `[rows, m]`.
    output: &'a mut [f32],
}

impl<'a> RunningSoftmax<'a> {
    fn new(output: &'a mut [f32], head_dim: usize) -> Self {
        output.fill(0.0);
        let rows = output.len() / head_dim;
        Self {
            head_dim,
            largest: vec![f32::NEG_INFINITY; rows],
            sums: vec![0.0; rows],
            output,
        }
    }

    fn rows(&self) -> usize {
        self.sums.len()
    }

    /// Turns the scores of query `row`, every `stride`-th of `scores`, into weights, and scales
    /// what was summed before to match. `−∞` marks a position that the query does not see.
    fn weigh(&mut self, row: usize, scores: &mut [f32], stride: usize) {
        let own = || scores.iter().step_by(stride);
        let before = self.largest[row];
        let largest = own().fold(before, |largest, &s| largest.max(s));
        // `max` passes over NaN, which must not look like "nothing seen": it goes on as NaN.
        if largest == f32::NEG_INFINITY && own().all(|s| !s.is_nan()) {
            own_mut(scores, stride).for_each(|s| *s = 0.0);
            return;
        }
        let mut sum = 0.0;
        for s in own_mut(scores, stride) {
            *s = (*s - largest).exp();
            sum += *s;
        }
        let kept = (before - largest).exp();
        self.sums[row] = self.sums[row] * kept + sum;
        self.largest[row] = largest;
        if kept != 1.0 {
            let output = &mut self.output[row * self.head_dim..][..self.head_dim];
            output.iter_mut().for_each(|x| *x *= kept);
        }
    }

    fn finish(self) {
        let rows = self.output.chunks_exact_mut(self.head_dim);
        for (out, &sum) in rows.zip(&self.sums) {
            if sum != 0.0 {
                out.iter_mut().for_each(|x| *x /= sum);
            }
        }
    }
}

fn own_mut(scores: &mut [f32], stride: usize) -> impl Iterator<Item = &mut f32> {
    scores.iter_mut().step_by(stride)
}
