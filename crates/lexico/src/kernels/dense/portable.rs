//! Products and sums of dense rows in plain Rust, which vectorises at any width.

use half::f16;

use super::Rows;
use crate::kernels::vector::portable::{add_scaled, dot, dot_of};

#[inline(always)]
pub(super) fn dot_f16<const FMA: bool>(a: &[f16], b: &[f32]) -> f32 {
    dot_of::<FMA, f16>(a, b, |a| a.to_f32())
}

#[inline(always)]
pub(super) fn dots<const FMA: bool>(rows: Rows<'_>, queries: &[f32], m: usize, out: &mut [f32]) {
    let group = queries.len() / m;
    rows.widened(m, |first, rows| {
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
    rows.widened(m, |first, rows| {
        let weights = weights[first * group..].chunks_exact(group);
        for (weights, row) in weights.zip(rows.chunks_exact(m)) {
            for (&weight, out) in weights.iter().zip(out.chunks_exact_mut(m)) {
                add_scaled::<FMA>(out, weight, row);
            }
        }
    });
}
