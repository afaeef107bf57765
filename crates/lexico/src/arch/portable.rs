//! Every kernel in plain Rust, written so that it vectorises at any width.
//!
//! `FMA` says whether the caller is compiled with fused multiply-add: without the instruction
//! `mul_add` would call a slow library function.

use half::{bf16, f16};

use crate::code::Block;

/// Independent sums that a loop carries: enough to fill the widest registers and hide latency.
const LANES: usize = 32;

#[inline(always)]
fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
pub(super) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    dot_of::<FMA, f32>(a, b, |&a| a)
}

#[inline(always)]
pub(super) fn dot_bf16<const FMA: bool>(a: &[bf16], b: &[f32]) -> f32 {
    dot_of::<FMA, bf16>(a, b, |a| f32::from_bits(u32::from(a.to_bits()) << 16))
}

#[inline(always)]
pub(super) fn dot_f16<const FMA: bool>(a: &[f16], b: &[f32]) -> f32 {
    dot_of::<FMA, f16>(a, b, |a| a.to_f32())
}

#[inline(always)]
fn dot_of<const FMA: bool, T>(a: &[T], b: &[f32], widen: impl Fn(&T) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for l in 0..LANES {
            sums[l] = multiply_add::<FMA>(widen(&a[l]), b[l], sums[l]);
        }
    }
    for (l, (a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[l] = multiply_add::<FMA>(widen(a), b, sums[l]);
    }
    // A tree keeps the addition vectorised.
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
}

#[inline(always)]
pub(super) fn add_scaled<const FMA: bool>(a: &mut [f32], scale: f32, b: &[f32]) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a = multiply_add::<FMA>(scale, b, *a);
    }
}

/// Entries whose maximum is taken before the index is looked for.
const PEAK_BLOCK: usize = 256;

#[inline(always)]
pub(super) fn peak<const FMA: bool>(a: &[f32]) -> (usize, f32) {
    let mut best = (0, 0f32);
    for (block, a) in a.chunks(PEAK_BLOCK).enumerate() {
        best = later_peak(best, block, a);
    }
    best
}

/// The peak so far, or that of a further block where it is larger.
#[inline(always)]
fn later_peak(best: (usize, f32), block: usize, a: &[f32]) -> (usize, f32) {
    let mut peaks = [0f32; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for a in blocks {
        for l in 0..LANES {
            let magnitude = a[l].abs();
            peaks[l] = if magnitude > peaks[l] {
                magnitude
            } else {
                peaks[l]
            };
        }
    }
    for (peak, a) in peaks.iter_mut().zip(rest) {
        *peak = peak.max(a.abs());
    }
    let peak = peaks.iter().fold(0f32, |peak, &x| peak.max(x));
    if peak <= best.1 {
        return best;
    }
    let within = a.iter().position(|x| x.abs() == peak).unwrap_or(0);
    (block * PEAK_BLOCK + within, peak)
}

#[inline(always)]
pub(super) fn scores<const FMA: bool>(block: Block<'_>, p: &[f32], group: usize, out: &mut [f32]) {
    match group {
        1 => scores_of_group::<FMA, 1>(block, p, out),
        2 => scores_of_group::<FMA, 2>(block, p, out),
        4 => scores_of_group::<FMA, 4>(block, p, out),
        8 => scores_of_group::<FMA, 8>(block, p, out),
        _ => {
            for ((indices, coefficients), out) in block.vectors().zip(out.chunks_exact_mut(group)) {
                out.fill(0.0);
                for (&i, &c) in indices.iter().zip(coefficients) {
                    let p = &p[usize::from(i) * group..][..group];
                    add_scaled::<FMA>(out, c, p);
                }
            }
        }
    }
}

#[inline(always)]
fn scores_of_group<const FMA: bool, const G: usize>(block: Block<'_>, p: &[f32], out: &mut [f32]) {
    let p = p.as_chunks::<G>().0;
    for ((indices, coefficients), out) in block.vectors().zip(out.as_chunks_mut::<G>().0) {
        let mut sums = [0f32; G];
        for (&i, &c) in indices.iter().zip(coefficients) {
            let p = &p[usize::from(i)];
            for g in 0..G {
                sums[g] = multiply_add::<FMA>(c, p[g], sums[g]);
            }
        }
        *out = sums;
    }
}

#[inline(always)]
pub(super) fn accumulate<const FMA: bool>(
    block: Block<'_>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    match group {
        1 => accumulate_group::<FMA, 1>(block, weights, u),
        2 => accumulate_group::<FMA, 2>(block, weights, u),
        4 => accumulate_group::<FMA, 4>(block, weights, u),
        8 => accumulate_group::<FMA, 8>(block, weights, u),
        _ => {
            for ((indices, coefficients), w) in block.vectors().zip(weights.chunks_exact(group)) {
                for (&i, &c) in indices.iter().zip(coefficients) {
                    let u = &mut u[usize::from(i) * group..][..group];
                    add_scaled::<FMA>(u, c, w);
                }
            }
        }
    }
}

#[inline(always)]
fn accumulate_group<const FMA: bool, const G: usize>(
    block: Block<'_>,
    weights: &[f32],
    u: &mut [f32],
) {
    let u = u.as_chunks_mut::<G>().0;
    for ((indices, coefficients), w) in block.vectors().zip(weights.as_chunks::<G>().0) {
        for (&i, &c) in indices.iter().zip(coefficients) {
            let u = &mut u[usize::from(i)];
            for g in 0..G {
                u[g] = multiply_add::<FMA>(c, w[g], u[g]);
            }
        }
    }
}
