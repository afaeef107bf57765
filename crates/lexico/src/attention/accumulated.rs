use std::ops::Range;

use super::ROWS;
use crate::kernels::matmul::{Matrix, multiply};
use crate::kernels::softmax::softmax;
use crate::threads::{Threads, for_each};

/// Sums that tasks keep apart: they are added in the same order for any number of threads.
const PARTS: usize = 16;

/// Accumulated attention of each of one KV head's positions: the softmax weights of the `newest` last of the queries
/// `[G, t, m]` on the keys `[n, m]`, summed over those queries, `[n]`.
///
/// The queries are at the `t` newest of the `n` positions, and each sees its own and all before it; scores are scaled
/// by `1/√m`. Takes `O(G·newest·n·m)` steps and room for `O(n)` weights a task: no `t × n` matrix is ever there.
///
/// # Panics
/// Where the slices are no whole vectors, there are fewer keys than `t` or fewer queries than `newest`, or `head_dim` or
/// `t` is 0.
pub fn accumulated_attention(
    queries: &[f32],
    head_dim: usize,
    t: usize,
    newest: usize,
    keys: &[f32],
    threads: &dyn Threads,
) -> Vec<f32> {
    let n = keys.len() / head_dim;
    assert_eq!(keys.len(), n * head_dim, "whole keys");
    assert!(queries.len().is_multiple_of(head_dim * t), "whole heads");
    assert!(newest <= t && t <= n, "queries at the newest positions");
    let blocks: Vec<(&[f32], Range<usize>)> = queries
        .chunks_exact(t * head_dim)
        .flat_map(|head| {
            let starts = (t - newest..t).step_by(ROWS);
            starts.map(move |first| (head, first..t.min(first + ROWS)))
        })
        .collect();
    let mut parts = vec![vec![0.0; n]; PARTS.min(blocks.len())];
    for_each(threads, parts.iter_mut().enumerate(), |(part, sums)| {
        for (head, own) in blocks.iter().skip(part).step_by(PARTS) {
            let queries = &head[own.start * head_dim..own.end * head_dim];
            add_weights(queries, head_dim, n - t + own.start, keys, sums);
        }
    });
    let mut sums = parts.pop().unwrap_or_else(|| vec![0.0; n]);
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
    sums
}

/// Adds the weights of queries `[rows, m]`, the first of them at position `first`.
fn add_weights(queries: &[f32], m: usize, first: usize, keys: &[f32], sums: &mut [f32]) {
    let scale = 1.0 / (m as f32).sqrt();
    let queries: Vec<f32> = queries.iter().map(|q| q * scale).collect();
    let rows = queries.len() / m;
    let seen = first + rows;
    let mut scores = vec![0.0; rows * seen];
    let keys = Matrix::by_rows(&keys[..seen * m], seen, m).transposed();
    multiply(&mut scores, false, Matrix::by_rows(&queries, rows, m), keys);
    for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
        let scores = &mut scores[..=first + row];
        let mut sum = [0.0];
        softmax(scores, &mut [f32::NEG_INFINITY], &mut sum);
        for (total, weight) in sums.iter_mut().zip(scores) {
            *total += *weight / sum[0];
        }
    }
}
