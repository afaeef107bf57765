//! Products and sums of dense rows in plain Rust, which vectorises at any width.

use half::f16;

use super::Rows;
use crate::kernels::LANES;
use crate::kernels::vector::portable::{add_scaled, dot, dot_of};

#[inline(always)]
pub(super) fn dot_f16<const FMA: bool>(a: &[f16], b: &[f32]) -> f32 {
    dot_of::<FMA, f16>(a, b, |a| a.to_f32())
}

#[inline(always)]
pub(super) fn dots<const FMA: bool>(rows: Rows<'_>, queries: &[f32], m: usize, out: &mut [f32]) {
    let group = queries.len() / m;
    rows.in_blocks(m, |first, rows| {
        let out = out[first * group..].chunks_exact_mut(group);
        for (row, out) in rows.chunks_exact(m).zip(out) {
            for (query, out) in queries.chunks_exact(m).zip(out) {
                *out = dot::<FMA>(row, query);
            }
        }
    });
}

#[inline(always)]
pub(super) fn combine<const FMA: bool>(weights: &[f32], rows: Rows<'_>, m: usize, out: &mut [f32]) {
    let group = out.len() / m;
    rows.in_blocks(m, |first, rows| {
        let weights = &weights[first * group..];
        let weighted = || weights.chunks_exact(group).zip(rows.chunks_exact(m));
        for (g, out) in out.chunks_exact_mut(m).enumerate() {
            let (blocks, rest) = out.as_chunks_mut::<LANES>();
            let start = m - rest.len();
            for (out, block) in blocks.iter_mut().zip((0..).step_by(LANES)) {
                // Sums stay in registers from row to row.
                let mut sums = *out;
                for (weights, row) in weighted() {
                    add_scaled::<FMA>(&mut sums, weights[g], &row[block..][..LANES]);
                }
                *out = sums;
            }
            if rest.is_empty() {
                continue;
            }
            for (weights, row) in weighted() {
                add_scaled::<FMA>(rest, weights[g], &row[start..]);
            }
        }
    });
}
