//! Scores and weighted sums of additive codes in plain Rust, which vectorises at any width.

use super::{AdditiveBlock, CODEBOOK_ATOMS};
use crate::kernels::memory::{in_general_register, prefetch};
use crate::kernels::rows::{Number, unit};
use crate::kernels::table::{AHEAD, table, table_mut};
use crate::kernels::{MAX_ATOMS, multiply_add};

/// Vectors whose codes are gone through together, some codebooks after the other: so many that fetching the rows
/// of those codebooks costs little beside looking them up, so few that their numbers stay near.
const TILE: usize = 1024;

/// Calls a kernel that is unrolled for a number of codebooks, up to eight.
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

/// Divides `all` codebooks into parts of nearly one size, `max` at the most: the first of each, and its size.
#[inline(always)]
fn parts(all: usize, max: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = all.div_ceil(max);
    let bound = move |part: usize| all * part / count;
    (0..count).map(move |part| (bound(part), bound(part + 1) - bound(part)))
}

/// The atoms of `K` codebooks in the codes of a tile of vectors.
#[derive(Clone, Copy)]
struct Atoms<'a, const K: usize> {
    /// Atoms of all codebooks after the first, `[n, each]`.
    bytes: &'a [u8],
    each: usize,
    /// First of the `K` codebooks, counted from the second of all.
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

/// Bytes from the beginning of the rows of `K` codebooks to the rows of the atoms whose numbers are the bytes of a
/// word: within those rows for every word.
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
pub(super) fn scores<const FMA: bool>(
    block: AdditiveBlock<'_>,
    p: &[f32],
    group: usize,
    out: &mut [f32],
) {
    // Codebooks at a time: so many that their rows leave some of the first cache to other things.
    match group {
        1 => scores_tiled::<1, 8>(block, table(p), out),
        2 => scores_tiled::<2, 8>(block, table(p), out),
        4 => scores_tiled::<4, 5>(block, table(p), out),
        8 => scores_tiled::<8, 4>(block, table(p), out),
        16 => scores_of::<16>(block, table(p), out),
        _ => scores_of::<32>(block, table(p), out),
    }
}

/// Goes tile by tile, up to `MAX` codebooks at a time.
#[inline(always)]
fn scores_tiled<const G: usize, const MAX: usize>(
    block: AdditiveBlock<'_>,
    p: &[[f32; G]; MAX_ATOMS],
    out: &mut [f32],
) {
    let (own, others) = (block.first_rows(p), block.other_rows(p));
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

/// Adds to each vector's numbers the rows of its atoms of `K` codebooks, the first of them number `from`.
#[inline(always)]
fn add_rows<const G: usize, const K: usize>(
    codebooks: &[[[f32; G]; CODEBOOK_ATOMS]],
    bytes: &[u8],
    each: usize,
    from: usize,
    out: &mut [[f32; G]],
) {
    assert!(
        codebooks.len() >= K && out.len() == bytes.len() / each,
        "all codebooks and vectors"
    );
    let start = codebooks.as_ptr();
    Atoms::<K> { bytes, each, from }.for_each(|v, word| {
        // SAFETY: there are as many as vectors.
        let out = unsafe { out.get_unchecked_mut(v) };
        let mut sums = *out;
        for offset in row_offsets::<G, K>(word) {
            // SAFETY: the offset is that of a row of one of `K` codebooks, all there.
            let row = unsafe { &*start.byte_add(offset).cast::<[f32; G]>() };
            for g in 0..G {
                sums[g] += row[g];
            }
        }
        *out = sums;
    });
}

/// Serves large query groups: rows are so long that finding them costs little.
#[inline(always)]
fn scores_of<const G: usize>(block: AdditiveBlock<'_>, p: &[[f32; G]; MAX_ATOMS], out: &mut [f32]) {
    let (own, others) = (block.first_rows(p), block.other_rows(p));
    let scales = block.scales();
    let rows = block.first.iter().zip(block.rest_rows());
    for ((&first, rest), out) in rows.zip(out.as_chunks_mut::<G>().0) {
        prefetch(rest.as_ptr(), AHEAD);
        // Two sums, so that additions wait less for each other.
        let mut sums = [own[first.atom()], [0f32; G]];
        let scale = first.scale(scales);
        for (j, (&atom, codebook)) in rest.iter().zip(others).enumerate() {
            let row = &codebook[usize::from(atom)];
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
pub(super) fn accumulate<const FMA: bool>(
    block: AdditiveBlock<'_>,
    weights: &[f32],
    group: usize,
    u: &mut [f32],
) {
    match group {
        1 => accumulate_tiled::<1, 8>(block, weights, table_mut(u)),
        2 => accumulate_tiled::<2, 8>(block, weights, table_mut(u)),
        4 => accumulate_tiled::<4, 5>(block, weights, table_mut(u)),
        8 => accumulate_tiled::<8, 3>(block, weights, table_mut(u)),
        16 => accumulate_of::<16>(block, weights, table_mut(u)),
        _ => accumulate_of::<32>(block, weights, table_mut(u)),
    }
}

/// Goes tile by tile, up to `MAX` codebooks at a time.
#[inline(always)]
fn accumulate_tiled<const G: usize, const MAX: usize>(
    block: AdditiveBlock<'_>,
    weights: &[f32],
    u: &mut [[f32; G]; MAX_ATOMS],
) {
    let (own, others) = u.split_at_mut(block.sizes.first);
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

/// Adds each vector's weights to the rows of its atoms of `K` codebooks, the first of them number `from`.
#[inline(always)]
fn add_to_rows<const G: usize, const K: usize>(
    codebooks: &mut [[[f32; G]; CODEBOOK_ATOMS]],
    bytes: &[u8],
    each: usize,
    from: usize,
    weights: &[[f32; G]],
) {
    assert!(
        codebooks.len() >= K && weights.len() == bytes.len() / each,
        "all codebooks and vectors"
    );
    let start = codebooks.as_mut_ptr();
    Atoms::<K> { bytes, each, from }.for_each(|v, word| {
        // SAFETY: there are as many as vectors.
        let weights = *unsafe { weights.get_unchecked(v) };
        for offset in row_offsets::<G, K>(word) {
            // SAFETY: the offset is that of a row of one of `K` codebooks, all there.
            let row = unsafe { &mut *start.byte_add(offset).cast::<[f32; G]>() };
            for g in 0..G {
                row[g] += weights[g];
            }
        }
    });
}

/// Serves large query groups, like [`scores_of`].
#[inline(always)]
fn accumulate_of<const G: usize>(
    block: AdditiveBlock<'_>,
    weights: &[f32],
    u: &mut [[f32; G]; MAX_ATOMS],
) {
    let (own, others) = u.split_at_mut(block.sizes.first);
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
        for (&atom, codebook) in rest.iter().zip(others.iter_mut()) {
            add(&mut codebook[usize::from(atom)]);
        }
    }
}

/// Numbers of a vector that are summed at a time: as many as registers hold.
const PART: usize = 64;

#[inline(always)]
pub(super) fn rebuild<const FMA: bool>(
    block: AdditiveBlock<'_>,
    atoms: &[impl Number],
    units: &[f32],
    m: usize,
    out: &mut [f32],
) {
    for (v, out) in out.chunks_exact_mut(m).enumerate() {
        let scale = block.scale(v);
        let (parts, rest) = out.as_chunks_mut::<PART>();
        let mut from = 0;
        for part in parts {
            let mut sums = [0f32; PART];
            for i in block.indices(v) {
                let (row, unit) = (&atoms[i * m..][..m], unit(units, i));
                if let Some(row) = row[from..].first_chunk::<PART>() {
                    for k in 0..PART {
                        sums[k] = multiply_add::<FMA>(unit, row[k].widen(), sums[k]);
                    }
                }
            }
            *part = sums.map(|x| x * scale);
            from += PART;
        }
        rest.fill(0.0);
        for i in block.indices(v) {
            let (row, unit) = (&atoms[i * m..][..m], unit(units, i));
            let pairs = rest.iter_mut().zip(&row[from..]);
            pairs.for_each(|(x, y)| *x = multiply_add::<FMA>(unit, y.widen(), *x));
        }
        rest.iter_mut().for_each(|x| *x *= scale);
    }
}
