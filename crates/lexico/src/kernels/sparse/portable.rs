//! Scores and weighted sums of sparse codes in plain Rust, which vectorises at any width.

use super::{Coefficient, Nonzeros};
use crate::kernels::memory::prefetch;
use crate::kernels::rows::{Number, unit};
use crate::kernels::table::{AHEAD, table, table_mut};
use crate::kernels::{MAX_ATOMS, multiply_add};

/// `sums += c · row`.
#[inline(always)]
fn add_row<const FMA: bool, const G: usize>(sums: &mut [f32; G], c: f32, row: &[f32; G]) {
    for g in 0..G {
        sums[g] = multiply_add::<FMA>(c, row[g], sums[g]);
    }
}

/// Calls `add` with each nonzero of a vector: the number of the sum that it belongs to, its coefficient and its index.
/// There are two sums, so that additions wait less for each other.
#[inline(always)]
fn for_each_nonzero<C: Coefficient>(
    indices: &[u16],
    coefficients: &[C],
    mut add: impl FnMut(usize, f32, usize),
) {
    prefetch(indices.as_ptr(), AHEAD);
    prefetch(coefficients.as_ptr(), AHEAD);
    let (index_fours, index_rest) = indices.as_chunks::<4>();
    let (fours, rest) = coefficients.as_chunks::<4>();
    for (indices, coefficients) in index_fours.iter().zip(fours) {
        for j in 0..4 {
            add(j % 2, coefficients[j].value(), usize::from(indices[j]));
        }
    }
    for (&i, &c) in index_rest.iter().zip(rest) {
        add(0, c.value(), usize::from(i));
    }
}

#[inline(always)]
pub(super) fn scores<const FMA: bool>(
    block: Nonzeros<'_, impl Coefficient>,
    p: &[f32],
    group: usize,
    out: &mut [f32],
) {
    match group {
        1 => scores_of_group::<FMA, 1>(block, table(p), out),
        2 => scores_of_group::<FMA, 2>(block, table(p), out),
        4 => scores_of_group::<FMA, 4>(block, table(p), out),
        8 => scores_of_group::<FMA, 8>(block, table(p), out),
        16 => scores_of_group::<FMA, 16>(block, table(p), out),
        _ => scores_of_group::<FMA, 32>(block, table(p), out),
    }
}

#[inline(always)]
fn scores_of_group<const FMA: bool, const G: usize>(
    block: Nonzeros<'_, impl Coefficient>,
    p: &[[f32; G]; MAX_ATOMS],
    out: &mut [f32],
) {
    block.for_each(
        out.as_chunks_mut::<G>().0.iter_mut(),
        #[inline(always)]
        |out, indices, coefficients, scale| {
            let mut sums = [[0f32; G]; 2];
            for_each_nonzero(
                indices,
                coefficients,
                #[inline(always)]
                |sum, c, i| add_row::<FMA, G>(&mut sums[sum], c, &p[i]),
            );
            for g in 0..G {
                out[g] = (sums[0][g] + sums[1][g]) * scale;
            }
        },
    );
}

#[inline(always)]
pub(super) fn accumulate<const FMA: bool>(
    block: Nonzeros<'_, impl Coefficient>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    match group {
        1 => accumulate_group::<FMA, 1>(block, weights, table_mut(u)),
        2 => accumulate_group::<FMA, 2>(block, weights, table_mut(u)),
        4 => accumulate_group::<FMA, 4>(block, weights, table_mut(u)),
        8 => accumulate_group::<FMA, 8>(block, weights, table_mut(u)),
        16 => accumulate_group::<FMA, 16>(block, weights, table_mut(u)),
        _ => accumulate_group::<FMA, 32>(block, weights, table_mut(u)),
    }
}

#[inline(always)]
fn accumulate_group<const FMA: bool, const G: usize>(
    block: Nonzeros<'_, impl Coefficient>,
    weights: &[f32],
    u: &mut [[f32; G]; MAX_ATOMS],
) {
    block.for_each(
        weights.as_chunks::<G>().0.iter(),
        #[inline(always)]
        |weights, indices, coefficients, scale| {
            let scaled = weights.map(|weight| weight * scale);
            for_each_nonzero(
                indices,
                coefficients,
                #[inline(always)]
                |_, c, i| add_row::<FMA, G>(&mut u[i], c, &scaled),
            );
        },
    );
}

#[inline(always)]
pub(super) fn rebuild<const FMA: bool>(
    block: Nonzeros<'_, impl Coefficient>,
    atoms: &[impl Number],
    units: &[f32],
    m: usize,
    out: &mut [f32],
) {
    block.for_each(
        out.chunks_exact_mut(m),
        |out, indices, coefficients, scale| {
            out.fill(0.0);
            for (&index, &coefficient) in indices.iter().zip(coefficients) {
                let index = usize::from(index);
                let coefficient = coefficient.value() * scale * unit(units, index);
                let row = &atoms[index * m..][..m];
                for (x, &y) in out.iter_mut().zip(row) {
                    *x = multiply_add::<FMA>(coefficient, y.widen(), *x);
                }
            }
        },
    );
}
