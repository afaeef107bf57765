//! Every kernel in plain Rust, written so that it vectorises at any width.
//!
//! `FMA` says whether the caller is compiled with fused multiply-add: without the instruction
//! `mul_add` would call a slow library function.

use half::{bf16, f16};

use crate::codes::{AdditiveBlock, Block};
use crate::dictionary::{CODEBOOK_ATOMS, MAX_ATOMS};
use crate::kernels::{in_general_register, prefetch};

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

#[inline(always)]
pub(super) fn raise<const FMA: bool>(
    gains: &mut [f32],
    by: f32,
    losses: &[f32],
    largest: &mut [f32],
) {
    for ((gain, &loss), largest) in gains.iter_mut().zip(losses).zip(largest) {
        *gain += by - loss;
        *largest = if *gain > *largest { *gain } else { *largest };
    }
}

/// Independent sums in f64: a register of the widest kind holds eight.
const LANES_F64: usize = 16;

/// Sum of squares, in f64.
#[inline(always)]
pub(super) fn square<const FMA: bool>(a: &[f32]) -> f64 {
    let mut sums = [0f64; LANES_F64];
    let (blocks, rest) = a.as_chunks::<LANES_F64>();
    for a in blocks {
        for l in 0..LANES_F64 {
            sums[l] += f64::from(a[l]) * f64::from(a[l]);
        }
    }
    for (sum, &a) in sums.iter_mut().zip(rest) {
        *sum += f64::from(a) * f64::from(a);
    }
    sums.iter().sum()
}

#[inline(always)]
pub(super) fn dot_mixed<const FMA: bool>(a: &[f32], b: &[f64]) -> f64 {
    let mut sums = [0f64; LANES_F64];
    let (a_blocks, a_rest) = a.as_chunks::<LANES_F64>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES_F64>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for l in 0..LANES_F64 {
            sums[l] += f64::from(a[l]) * b[l];
        }
    }
    for ((sum, &a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += f64::from(a) * b;
    }
    sums.iter().sum()
}

/// `a -= scale · b`, in f64.
#[inline(always)]
pub(super) fn subtract_scaled<const FMA: bool>(a: &mut [f64], scale: f32, b: &[f32]) {
    let scale = f64::from(scale);
    for (a, &b) in a.iter_mut().zip(b) {
        *a -= scale * f64::from(b);
    }
}

/// Rounds `x · inverse` to bytes; returns the sums of squares of what rounding took, and of `x`, both in
/// the bytes' units.
#[inline(always)]
pub(super) fn round_to_bytes<const FMA: bool>(
    x: &[f32],
    inverse: f32,
    out: &mut [i8],
) -> (f32, f32) {
    let mut rests = [0f32; LANES];
    let mut wholes = [0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<LANES>();
    let mut one = |x: f32, out: &mut i8, l: usize| {
        let scaled = x * inverse;
        let rounded = scaled.round_ties_even();
        let off = scaled - rounded;
        rests[l] = multiply_add::<FMA>(off, off, rests[l]);
        wholes[l] = multiply_add::<FMA>(scaled, scaled, wholes[l]);
        *out = rounded as i8;
    };
    for (x, out) in blocks.iter().zip(out_blocks) {
        for l in 0..LANES {
            one(x[l], &mut out[l], l);
        }
    }
    for (l, (&x, out)) in rest.iter().zip(out_rest).enumerate() {
        one(x, out, l);
    }
    (rests.iter().sum(), wholes.iter().sum())
}

/// Numbers that are passed over at once where none is large enough.
const CANDIDATE_BLOCK: usize = 64;

/// Appends the numbers of those entries that are at least `enough`.
#[inline(always)]
pub(super) fn at_least<const FMA: bool>(a: &[f32], enough: f32, found: &mut Vec<u32>) {
    for (block, a) in a.chunks(CANDIDATE_BLOCK).enumerate() {
        // All of them, which vectorises.
        if !a.iter().fold(false, |any, &x| any | (x >= enough)) {
            continue;
        }
        for (i, &x) in a.iter().enumerate() {
            if x >= enough {
                found.push((block * CANDIDATE_BLOCK + i) as u32);
            }
        }
    }
}

/// The largest magnitude.
#[inline(always)]
pub(super) fn peak<const FMA: bool>(a: &[f32]) -> f32 {
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
    peaks.iter().fold(0f32, |peak, &x| peak.max(x))
}

#[inline(always)]
pub(super) fn dots_f32(rows: &[f32], queries: &[f32], m: usize, group: usize, out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(m).zip(out.chunks_exact_mut(group)) {
        for (query, out) in queries.chunks_exact(m).zip(out) {
            *out = dot::<false>(row, query);
        }
    }
}

#[inline(always)]
pub(super) fn combine_f32(weights: &[f32], rows: &[f32], m: usize, group: usize, out: &mut [f32]) {
    for (weights, row) in weights.chunks_exact(group).zip(rows.chunks_exact(m)) {
        for (&weight, out) in weights.iter().zip(out.chunks_exact_mut(m)) {
            add_scaled::<false>(out, weight, row);
        }
    }
}

/// Below this `exp` is subnormal in f32.
const SMALLEST_EXPONENT: f32 = -87.3;
/// Added to a number of moderate size, this leaves its nearest integer in the lowest bits.
const ROUNDING: f32 = 12_582_912.0;

/// `eˣ` for `x ≤ 88`, to two units in the last place; 0 where it would be subnormal, NaN for NaN.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    // A power of two, and the rest within ln 2 / 2 of 0 by the polynomial of Cephes' expf (Moshier 1989);
    // ln 2 in two parts, so that the product with the first is exact (Cody & Waite 1980).
    let rounded = multiply_add::<FMA>(x, std::f32::consts::LOG2_E, ROUNDING);
    let power = rounded - ROUNDING;
    let rest = multiply_add::<FMA>(power, -0.693_359_4, x);
    let rest = multiply_add::<FMA>(power, 2.121_944_4e-4, rest);
    let mut sum = 1.987_569_1e-4;
    for term in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        sum = multiply_add::<FMA>(sum, rest, term);
    }
    let sum = multiply_add::<FMA>(sum * rest, rest, rest) + 1.0;
    // The integer goes into the exponent; that of a NaN ends in zeros, so that `sum` stays one.
    let result = f32::from_bits(sum.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x < SMALLEST_EXPONENT { 0.0 } else { result }
}

#[inline(always)]
pub(super) fn largest<const FMA: bool>(scores: &[f32], largest: &mut [f32]) {
    let group = largest.len();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = scores.as_chunks::<LANES>();
    for block in blocks {
        for l in 0..LANES {
            lanes[l] = if block[l] > lanes[l] {
                block[l]
            } else {
                lanes[l]
            };
        }
    }
    for (lane, &score) in lanes.iter_mut().zip(rest) {
        *lane = lane.max(score);
    }
    for (l, &lane) in lanes.iter().enumerate() {
        largest[l % group] = largest[l % group].max(lane);
    }
}

#[inline(always)]
pub(super) fn exponentials<const FMA: bool>(scores: &mut [f32], largest: &[f32], sums: &mut [f32]) {
    let group = largest.len();
    let mut base = [0f32; LANES];
    for (l, base) in base.iter_mut().enumerate() {
        *base = largest[l % group];
    }
    let mut lanes = [0f32; LANES];
    let (blocks, rest) = scores.as_chunks_mut::<LANES>();
    for block in blocks {
        for l in 0..LANES {
            block[l] = exp::<FMA>(block[l] - base[l]);
            lanes[l] += block[l];
        }
    }
    for (l, score) in rest.iter_mut().enumerate() {
        *score = exp::<FMA>(*score - base[l]);
        lanes[l] += *score;
    }
    for (l, &lane) in lanes.iter().enumerate() {
        sums[l % group] += lane;
    }
}

/// Bytes between the codes that are read and those that are fetched for later: enough for memory to answer.
const AHEAD: usize = 2048;

/// A stored coefficient; what it stands for is multiplied by its vector's scale.
pub(crate) trait Coefficient: Copy {
    fn value(self, table: &[f32; 256]) -> f32;
}

impl Coefficient for u8 {
    #[inline(always)]
    fn value(self, table: &[f32; 256]) -> f32 {
        table[usize::from(self)]
    }
}

impl Coefficient for i8 {
    #[inline(always)]
    fn value(self, table: &[f32; 256]) -> f32 {
        // One load; a conversion and its spreading over a register take three instructions.
        table[usize::from(self as u8)]
    }
}

impl Coefficient for f32 {
    #[inline(always)]
    fn value(self, _: &[f32; 256]) -> f32 {
        self
    }
}

/// Rows of a table by a 16-bit index, each there: no index needs a check.
fn table<const G: usize>(rows: &[f32]) -> &[[f32; G]; MAX_ATOMS] {
    match rows.as_chunks::<G>().0.first_chunk() {
        Some(table) => table,
        None => unreachable!("callers give whole tables"),
    }
}

fn table_mut<const G: usize>(rows: &mut [f32]) -> &mut [[f32; G]; MAX_ATOMS] {
    match rows.as_chunks_mut::<G>().0.first_chunk_mut() {
        Some(table) => table,
        None => unreachable!("callers give whole tables"),
    }
}

/// `sums += c · row`.
#[inline(always)]
fn add_row<const FMA: bool, const G: usize>(sums: &mut [f32; G], c: f32, row: &[f32; G]) {
    for g in 0..G {
        sums[g] = multiply_add::<FMA>(c, row[g], sums[g]);
    }
}

#[inline(always)]
fn scores<const FMA: bool, C: Coefficient>(
    block: Block<'_, C>,
    p: &[f32],
    group: usize,
    out: &mut [f32],
) {
    match group {
        1 => scores_of_group::<FMA, C, 1>(block, table(p), out),
        2 => scores_of_group::<FMA, C, 2>(block, table(p), out),
        4 => scores_of_group::<FMA, C, 4>(block, table(p), out),
        8 => scores_of_group::<FMA, C, 8>(block, table(p), out),
        16 => scores_of_group::<FMA, C, 16>(block, table(p), out),
        _ => scores_of_group::<FMA, C, 32>(block, table(p), out),
    }
}

#[inline(always)]
fn scores_of_group<const FMA: bool, C: Coefficient, const G: usize>(
    block: Block<'_, C>,
    p: &[[f32; G]; MAX_ATOMS],
    out: &mut [f32],
) {
    let values = block.values;
    let mut outs = out.as_chunks_mut::<G>().0.iter_mut();
    block.for_each(
        #[inline(always)]
        |indices, coefficients, scale| {
            let Some(out) = outs.next() else { return };
            prefetch(indices.as_ptr(), AHEAD);
            prefetch(coefficients.as_ptr(), AHEAD);
            // Two sums, so that additions wait less for each other.
            let mut sums = [[0f32; G]; 2];
            let (index_fours, index_rest) = indices.as_chunks::<4>();
            let (fours, rest) = coefficients.as_chunks::<4>();
            for (indices, coefficients) in index_fours.iter().zip(fours) {
                for j in 0..4 {
                    let c = coefficients[j].value(values);
                    add_row::<FMA, G>(&mut sums[j % 2], c, &p[usize::from(indices[j])]);
                }
            }
            for (&i, &c) in index_rest.iter().zip(rest) {
                add_row::<FMA, G>(&mut sums[0], c.value(values), &p[usize::from(i)]);
            }
            for g in 0..G {
                out[g] = (sums[0][g] + sums[1][g]) * scale;
            }
        },
    );
}

#[inline(always)]
fn accumulate<const FMA: bool, C: Coefficient>(
    block: Block<'_, C>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    match group {
        1 => accumulate_group::<FMA, C, 1>(block, weights, table_mut(u)),
        2 => accumulate_group::<FMA, C, 2>(block, weights, table_mut(u)),
        4 => accumulate_group::<FMA, C, 4>(block, weights, table_mut(u)),
        8 => accumulate_group::<FMA, C, 8>(block, weights, table_mut(u)),
        16 => accumulate_group::<FMA, C, 16>(block, weights, table_mut(u)),
        _ => accumulate_group::<FMA, C, 32>(block, weights, table_mut(u)),
    }
}

#[inline(always)]
fn accumulate_group<const FMA: bool, C: Coefficient, const G: usize>(
    block: Block<'_, C>,
    weights: &[f32],
    u: &mut [[f32; G]; MAX_ATOMS],
) {
    let values = block.values;
    let mut rows = weights.as_chunks::<G>().0.iter();
    block.for_each(
        #[inline(always)]
        |indices, coefficients, scale| {
            let Some(weights) = rows.next() else { return };
            prefetch(indices.as_ptr(), AHEAD);
            prefetch(coefficients.as_ptr(), AHEAD);
            let scaled = weights.map(|weight| weight * scale);
            let (index_fours, index_rest) = indices.as_chunks::<4>();
            let (fours, rest) = coefficients.as_chunks::<4>();
            for (indices, coefficients) in index_fours.iter().zip(fours) {
                for j in 0..4 {
                    let c = coefficients[j].value(values);
                    add_row::<FMA, G>(&mut u[usize::from(indices[j])], c, &scaled);
                }
            }
            for (&i, &c) in index_rest.iter().zip(rest) {
                add_row::<FMA, G>(&mut u[usize::from(i)], c.value(values), &scaled);
            }
        },
    );
}

/// Vectors whose packed codes are gone through together, some groups after the other: so many that fetching the
/// rows of those groups costs little beside looking them up, so few that their numbers stay near.
const TILE: usize = 1024;

/// Calls a kernel that is unrolled for a number of groups of atoms, up to eight.
macro_rules! unrolled {
    ($count:ident, $kernel:ident($($argument:expr),*)) => {
        match $count {
            1 => $kernel::<G, 1>($($argument),*),
            2 => $kernel::<G, 2>($($argument),*),
            3 => $kernel::<G, 3>($($argument),*),
            4 => $kernel::<G, 4>($($argument),*),
            5 => $kernel::<G, 5>($($argument),*),
            6 => $kernel::<G, 6>($($argument),*),
            7 => $kernel::<G, 7>($($argument),*),
            _ => $kernel::<G, 8>($($argument),*),
        }
    };
}

/// Divides `all` groups into parts of nearly one size, at most `most`: where each begins, and its size.
#[inline(always)]
fn parts(all: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = all.div_ceil(most);
    let bound = move |part: usize| all * part / count;
    (0..count).map(move |part| (bound(part), bound(part + 1) - bound(part)))
}

/// Of packed codes of a tile of vectors, the atoms of `K` groups.
#[derive(Clone, Copy)]
struct Atoms<'a, const K: usize> {
    /// Those of all groups but the first, `[n, each]`.
    bytes: &'a [u8],
    each: usize,
    /// The number of the first of the groups.
    from: usize,
}

impl<const K: usize> Atoms<'_, K> {
    /// Calls `visit` with a vector's number and its `K` bytes, the first the lowest, one vector after another.
    #[inline(always)]
    fn for_each(self, mut visit: impl FnMut(usize, u64)) {
        let Self { bytes, each, from } = self;
        let count = bytes.len() / each;
        // Vectors after whose first of these bytes there are seven more, theirs or others'.
        let whole = (bytes.len() + each).saturating_sub(from + 8) / each;
        let whole = whole.min(count);
        let start = bytes.as_ptr();
        // Each pass over a tile fetches its share of the next one, so that memory is never idle.
        let ahead = bytes.len() + from * count;
        for v in 0..whole {
            prefetch(start, ahead + v * K);
            // SAFETY: eight bytes from there on are within `bytes`: `from + (whole − 1) · each + 8 ≤ len`.
            let word = unsafe { start.add(from + v * each).cast::<[u8; 8]>().read() };
            visit(v, u64::from_le_bytes(word));
        }
        for v in whole..count {
            let own = bytes[from + v * each..][..K].iter().rev();
            visit(v, own.fold(0, |word, &byte| word << 8 | u64::from(byte)));
        }
    }
}

/// Bytes from the beginning of the first of `K` groups' rows to the rows of the atoms whose numbers are the bytes
/// of a word: within those rows for every word.
#[inline(always)]
fn row_offsets<const G: usize, const K: usize>(word: u64) -> [usize; K] {
    let shift = size_of::<[f32; G]>().trailing_zeros();
    std::array::from_fn(|k| {
        let at = 8 * k as u32;
        let byte = if at < shift {
            in_general_register(word) << (shift - at)
        } else {
            in_general_register(word) >> (at - shift)
        };
        (byte & (0xff << shift)) as usize + k * size_of::<[[f32; G]; CODEBOOK_ATOMS]>()
    })
}

#[inline(always)]
pub(super) fn scores_additive<const FMA: bool>(
    block: AdditiveBlock<'_>,
    p: &[f32],
    group: usize,
    out: &mut [f32],
) {
    // CodebookSizes of atoms at a time: so many that their rows leave some of the first cache to other things.
    match group {
        1 => scores_additive_tiled::<1, 8>(block, table(p), out),
        2 => scores_additive_tiled::<2, 8>(block, table(p), out),
        4 => scores_additive_tiled::<4, 5>(block, table(p), out),
        8 => scores_additive_tiled::<8, 4>(block, table(p), out),
        16 => scores_additive_of::<16>(block, table(p), out),
        _ => scores_additive_of::<32>(block, table(p), out),
    }
}

/// Tile by tile, up to `MAX` groups of atoms at a time.
#[inline(always)]
fn scores_additive_tiled<const G: usize, const MAX: usize>(
    block: AdditiveBlock<'_>,
    p: &[[f32; G]; MAX_ATOMS],
    out: &mut [f32],
) {
    let (own, others) = (block.first_rows(p), block.other_groups(p));
    let scales = block.scales();
    let each = block.sparsity - 1;
    let tiles = block.first.chunks(TILE).zip(block.rest_tiles(TILE));
    for ((first, rest), out) in tiles.zip(out.as_chunks_mut::<G>().0.chunks_mut(TILE)) {
        for (&first, out) in first.iter().zip(&mut *out) {
            *out = own[first.atom()];
        }
        for (from, count) in parts(each, MAX) {
            unrolled!(count, add_rows(&others[from..], rest, each, from, out));
        }
        for (&first, out) in first.iter().zip(&mut *out) {
            let scale = first.scale(scales);
            out.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

/// Adds to each vector's numbers the rows of its atoms of `K` groups, the first of them number `from`.
#[inline(always)]
fn add_rows<const G: usize, const K: usize>(
    groups: &[[[f32; G]; CODEBOOK_ATOMS]],
    bytes: &[u8],
    each: usize,
    from: usize,
    out: &mut [[f32; G]],
) {
    assert!(
        groups.len() >= K && out.len() == bytes.len() / each,
        "all groups and vectors"
    );
    let start = groups.as_ptr();
    Atoms::<K> { bytes, each, from }.for_each(|v, word| {
        // SAFETY: there are as many as vectors.
        let out = unsafe { out.get_unchecked_mut(v) };
        let mut sums = *out;
        for offset in row_offsets::<G, K>(word) {
            // SAFETY: the offset is that of a row of one of `K` groups, all there.
            let row = unsafe { &*start.byte_add(offset).cast::<[f32; G]>() };
            for g in 0..G {
                sums[g] += row[g];
            }
        }
        *out = sums;
    });
}

/// Many queries: each row is so long that what it takes to find it matters little.
#[inline(always)]
fn scores_additive_of<const G: usize>(
    block: AdditiveBlock<'_>,
    p: &[[f32; G]; MAX_ATOMS],
    out: &mut [f32],
) {
    let (own, others) = (block.first_rows(p), block.other_groups(p));
    let scales = block.scales();
    let rows = block.first.iter().zip(block.rest_rows());
    for ((&first, rest), out) in rows.zip(out.as_chunks_mut::<G>().0) {
        prefetch(rest.as_ptr(), AHEAD);
        // Two sums, so that additions wait less for each other.
        let mut sums = [own[first.atom()], [0f32; G]];
        let scale = first.scale(scales);
        for (j, (&atom, group)) in rest.iter().zip(others).enumerate() {
            let row = &group[usize::from(atom)];
            for g in 0..G {
                sums[j % 2][g] += row[g];
            }
        }
        for g in 0..G {
            out[g] = (sums[0][g] + sums[1][g]) * scale;
        }
    }
}

#[inline(always)]
pub(super) fn accumulate_additive<const FMA: bool>(
    block: AdditiveBlock<'_>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    match group {
        1 => accumulate_additive_tiled::<1, 8>(block, weights, table_mut(u)),
        2 => accumulate_additive_tiled::<2, 8>(block, weights, table_mut(u)),
        4 => accumulate_additive_tiled::<4, 5>(block, weights, table_mut(u)),
        8 => accumulate_additive_tiled::<8, 3>(block, weights, table_mut(u)),
        16 => accumulate_additive_of::<16>(block, weights, table_mut(u)),
        _ => accumulate_additive_of::<32>(block, weights, table_mut(u)),
    }
}

/// Tile by tile, up to `MAX` groups of atoms at a time.
#[inline(always)]
fn accumulate_additive_tiled<const G: usize, const MAX: usize>(
    block: AdditiveBlock<'_>,
    weights: &[f32],
    u: &mut [[f32; G]; MAX_ATOMS],
) {
    let (own, others) = u.split_at_mut(block.groups.first);
    let others = others.as_chunks_mut::<CODEBOOK_ATOMS>().0;
    let scales = block.scales();
    let each = block.sparsity - 1;
    let mut scaled = [[0f32; G]; TILE];
    let tiles = block.first.chunks(TILE).zip(block.rest_tiles(TILE));
    for ((first, rest), weights) in tiles.zip(weights.as_chunks::<G>().0.chunks(TILE)) {
        for ((&first, weights), scaled) in first.iter().zip(weights).zip(&mut scaled) {
            let row = &mut own[first.atom()];
            let scale = first.scale(scales);
            for g in 0..G {
                scaled[g] = weights[g] * scale;
                row[g] += scaled[g];
            }
        }
        let weights = &scaled[..first.len()];
        for (from, count) in parts(each, MAX) {
            unrolled!(
                count,
                add_to_rows(&mut others[from..], rest, each, from, weights)
            );
        }
    }
}

/// Adds each vector's weights to the rows of its atoms of `K` groups, the first of them number `from`.
#[inline(always)]
fn add_to_rows<const G: usize, const K: usize>(
    groups: &mut [[[f32; G]; CODEBOOK_ATOMS]],
    bytes: &[u8],
    each: usize,
    from: usize,
    weights: &[[f32; G]],
) {
    assert!(
        groups.len() >= K && weights.len() == bytes.len() / each,
        "all groups and vectors"
    );
    let start = groups.as_mut_ptr();
    Atoms::<K> { bytes, each, from }.for_each(|v, word| {
        // SAFETY: there are as many as vectors.
        let weights = *unsafe { weights.get_unchecked(v) };
        for offset in row_offsets::<G, K>(word) {
            // SAFETY: the offset is that of a row of one of `K` groups, all there.
            let row = unsafe { &mut *start.byte_add(offset).cast::<[f32; G]>() };
            for g in 0..G {
                row[g] += weights[g];
            }
        }
    });
}

/// As [`scores_additive_of`].
#[inline(always)]
fn accumulate_additive_of<const G: usize>(
    block: AdditiveBlock<'_>,
    weights: &[f32],
    u: &mut [[f32; G]; MAX_ATOMS],
) {
    let (own, others) = u.split_at_mut(block.groups.first);
    let others = others.as_chunks_mut::<CODEBOOK_ATOMS>().0;
    let scales = block.scales();
    let rows = block.first.iter().zip(block.rest_rows());
    for ((&first, rest), weights) in rows.zip(weights.as_chunks::<G>().0) {
        prefetch(rest.as_ptr(), AHEAD);
        let scale = first.scale(scales);
        let add = |row: &mut [f32; G]| {
            for g in 0..G {
                row[g] += weights[g] * scale;
            }
        };
        add(&mut own[first.atom()]);
        for (&atom, group) in rest.iter().zip(others.iter_mut()) {
            add(&mut group[usize::from(atom)]);
        }
    }
}

#[inline(always)]
pub(super) fn scores_i8<const FMA: bool>(
    block: Block<'_, i8>,
    p: &[f32],
    group: usize,
    out: &mut [f32],
) {
    scores::<FMA, i8>(block, p, group, out);
}

#[inline(always)]
pub(super) fn scores_f8<const FMA: bool>(
    block: Block<'_, u8>,
    p: &[f32],
    group: usize,
    out: &mut [f32],
) {
    scores::<FMA, u8>(block, p, group, out);
}

#[inline(always)]
pub(super) fn scores_f32<const FMA: bool>(
    block: Block<'_, f32>,
    p: &[f32],
    group: usize,
    out: &mut [f32],
) {
    scores::<FMA, f32>(block, p, group, out);
}

#[inline(always)]
pub(super) fn accumulate_i8<const FMA: bool>(
    block: Block<'_, i8>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    accumulate::<FMA, i8>(block, weights, group, u);
}

#[inline(always)]
pub(super) fn accumulate_f8<const FMA: bool>(
    block: Block<'_, u8>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    accumulate::<FMA, u8>(block, weights, group, u);
}

#[inline(always)]
pub(super) fn accumulate_f32<const FMA: bool>(
    block: Block<'_, f32>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    accumulate::<FMA, f32>(block, weights, group, u);
}
