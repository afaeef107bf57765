//! The scan, and the search for large numbers, in plain Rust, which vectorises at any width.

use super::{Operands, QUAD, STRIP_TILES, TILE_ATOMS};

#[inline(always)]
pub(super) fn scan<const FMA: bool>(
    operands: Operands<'_>,
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    let quads = operands.quads;
    let row = operands.row();
    out.fill(0.0);
    let numbers: Vec<[i16; QUAD]> = (0..largest.len())
        .flat_map(|v| operands.vector(v).map(|x| x.map(i16::from)))
        .collect();
    let tiles = operands.tiles.chunks_exact(quads * TILE_ATOMS * QUAD);
    let tiles = tiles.zip(operands.scales.chunks_exact(TILE_ATOMS));
    for (t, (tile, scales)) in tiles.enumerate() {
        let tile = tile.as_chunks().0;
        let vectors = numbers.chunks_exact(quads).zip(operands.starts);
        let results = out.chunks_exact_mut(row).zip(largest.iter_mut());
        for ((numbers, &start), (out, largest)) in vectors.zip(results) {
            let out = &mut out[t / STRIP_TILES * TILE_ATOMS..][..TILE_ATOMS];
            let sums = tile_sums(tile, numbers, start);
            for (((out, sum), scale), largest) in
                out.iter_mut().zip(sums).zip(scales).zip(largest.iter_mut())
            {
                *out = out.max(sum.unsigned_abs() as f32 * scale);
                *largest = largest.max(*out);
            }
        }
    }
}

#[inline(always)]
pub(super) fn products<const FMA: bool>(
    operands: Operands<'_>,
    count: usize,
    out: &mut [[i32; TILE_ATOMS]],
) {
    let tiles = out.len() / count;
    let all = operands.tiles.as_chunks().0;
    for (v, out) in out.chunks_exact_mut(tiles).enumerate() {
        let numbers: Vec<[i16; QUAD]> = operands.vector(v).map(|x| x.map(i16::from)).collect();
        let start = operands.starts[v];
        for (tile, out) in all.chunks_exact(operands.quads).zip(out) {
            *out = tile_sums(tile, &numbers, start);
        }
    }
}

/// Products of a tile's atoms with a vector, added to `start`.
#[inline(always)]
fn tile_sums(tile: &[[u8; TILE_ATOMS * QUAD]], x: &[[i16; QUAD]], start: i32) -> [i32; TILE_ATOMS] {
    let mut sums = [start; TILE_ATOMS];
    for (atoms, x) in tile.iter().zip(x) {
        // Numbers of 16 bits, which every processor multiplies side by side.
        let x = x.map(i32::from);
        for (sum, quad) in sums.iter_mut().zip(atoms.as_chunks::<QUAD>().0) {
            // Shifts of whole quads vectorise where steps over bytes do not.
            let quad = u32::from_le_bytes(*quad);
            let number = |k: usize| i32::from((quad >> (8 * k)) as u8);
            *sum += number(0) * x[0] + number(1) * x[1] + number(2) * x[2] + number(3) * x[3];
        }
    }
    sums
}

/// Numbers that are passed over at once where none is large enough.
const CANDIDATE_BLOCK: usize = 64;

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
