//! Correlations of many atoms with some vectors in 8-bit integers: the widest products there are.

#[cfg(target_arch = "x86_64")]
use super::level::{Level, level};

/// Numbers that one instruction multiplies and adds at a time.
pub(crate) const QUAD: usize = 4;
/// Atoms of a tile.
pub(crate) const TILE_ATOMS: usize = 16;
/// Tiles that are looked over together: with eight vectors 24 sums, as many as registers hold beside the
/// operands.
pub(crate) const GROUP_TILES: usize = 3;
/// Vectors of a block.
pub(crate) const LANES: usize = 8;

/// For each vector `v`, group of tiles and place in a tile, the largest of `scales[i] · |⟨tiles_i − 128, vectors_v⟩|`
/// over the group's atoms in that place: `out` is `[vectors, atoms / GROUP_TILES]`. And the largest of those of
/// vector `v` in each place of a tile, where it is above what `largest[v]` has.
///
/// `tiles` are `[atoms / 16, quads, 16, 4]` numbers with 128 added, whole groups; `vectors` `[vectors / 8, quads, 8]`
/// of four numbers each; numbers are from −127 to 127.
pub(crate) fn scan(
    tiles: &[u8],
    scales: &[f32],
    quads: usize,
    vectors: &[u32],
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    let atoms = scales.len();
    assert!(
        quads > 0 && atoms.is_multiple_of(GROUP_TILES * TILE_ATOMS),
        "whole groups"
    );
    assert_eq!(tiles.len(), atoms * quads * QUAD, "an atom has its quads");
    let row = atoms / GROUP_TILES;
    assert!(row > 0 && out.len().is_multiple_of(row), "whole rows");
    let count = out.len() / row;
    assert_eq!(largest.len(), count, "a vector has its largest");
    assert!(
        vectors.len() >= count.div_ceil(LANES) * quads * LANES,
        "a vector has its quads"
    );
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: `level` says Avx512 only where its features, VNNI among them, were detected; the
        // sizes are as the function asks.
        Level::Avx512 => unsafe {
            return super::x86_64::scan::avx512(tiles, scales, quads, vectors, out, largest);
        },
        // SAFETY: `level` says Avx2 only where its features were detected; the sizes are as the
        // function asks.
        Level::Avx2 | Level::AvxVnni => unsafe {
            return super::x86_64::scan::avx2(tiles, scales, quads, vectors, out, largest);
        },
        Level::Portable => {}
    }
    portable(tiles, scales, quads, vectors, out, largest);
}

pub(super) fn portable(
    tiles: &[u8],
    scales: &[f32],
    quads: usize,
    vectors: &[u32],
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    let tile_bytes = quads * TILE_ATOMS * QUAD;
    let row = scales.len() / GROUP_TILES;
    out.fill(0.0);
    for (v, (out, largest)) in out.chunks_exact_mut(row).zip(largest).enumerate() {
        let block = &vectors[v / LANES * quads * LANES..][..quads * LANES];
        let own = block.iter().skip(v % LANES).step_by(LANES);
        let numbers: Vec<[i32; QUAD]> = own
            .map(|quad| quad.to_le_bytes().map(|byte| i32::from(byte as i8)))
            .collect();
        // Numbers of the tiles are 128 too large: what that adds to every sum.
        let start = -128 * numbers.iter().flatten().sum::<i32>();
        let rows = tiles
            .chunks_exact(tile_bytes)
            .zip(scales.chunks_exact(TILE_ATOMS));
        for (number, (tile, scales)) in rows.enumerate() {
            let out = &mut out[number / GROUP_TILES * TILE_ATOMS..][..TILE_ATOMS];
            let mut sums = [start; TILE_ATOMS];
            let atoms = tile.as_chunks::<{ TILE_ATOMS * QUAD }>().0;
            for (atoms, x) in atoms.iter().zip(&numbers) {
                // Shifts of whole quads vectorise where steps over bytes do not.
                let mut quads = [0u32; TILE_ATOMS];
                for (quad, bytes) in quads.iter_mut().zip(atoms.as_chunks::<QUAD>().0) {
                    *quad = u32::from_le_bytes(*bytes);
                }
                for (sum, quad) in sums.iter_mut().zip(quads) {
                    for (k, x) in x.iter().enumerate() {
                        *sum += ((quad >> (8 * k)) & 0xff) as i32 * x;
                    }
                }
            }
            for (((out, sum), scale), largest) in
                out.iter_mut().zip(sums).zip(scales).zip(largest.iter_mut())
            {
                *out = out.max(sum.unsigned_abs() as f32 * scale);
                *largest = largest.max(*out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_level_sums_exactly(
            quads in 1usize..40, groups in 1usize..5, count in 1usize..20, seed: u32, extreme: bool,
        ) {
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let drawn = (state >> 16) as i32 % 255 - 127;
                // Sums of products must not overflow anywhere on the way.
                if extreme { 127 * drawn.signum() } else { drawn }
            };
            let atoms = groups * GROUP_TILES * TILE_ATOMS;
            let packed: Vec<u8> = (0..atoms * quads * QUAD).map(|_| (draw() + 128) as u8).collect();
            let scales: Vec<f32> = (0..atoms).map(|i| 1.0 / (i + 1) as f32).collect();
            let room = count.div_ceil(LANES) * quads * LANES;
            let vectors: Vec<u32> = (0..room)
                .map(|_| u32::from_le_bytes([0; 4].map(|_: u8| draw() as i8 as u8)))
                .collect();
            let row = atoms / GROUP_TILES;
            let mut exact = vec![0f32; count * row];
            for v in 0..count {
                for (i, scale) in scales.iter().enumerate() {
                    let sum: i64 = (0..quads)
                        .map(|q| {
                            let x = vectors[(v / LANES * quads + q) * LANES + v % LANES].to_le_bytes();
                            let at = ((i / TILE_ATOMS * quads + q) * TILE_ATOMS + i % TILE_ATOMS) * QUAD;
                            (0..QUAD).map(|k| (i64::from(packed[at + k]) - 128) * i64::from(x[k] as i8)).sum::<i64>()
                        })
                        .sum();
                    let place = i / (GROUP_TILES * TILE_ATOMS) * TILE_ATOMS + i % TILE_ATOMS;
                    let exact = &mut exact[v * row + place];
                    *exact = exact.max(sum.abs() as f32 * scale);
                }
            }
            let mut most = vec![[0f32; TILE_ATOMS]; count];
            for (v, exact) in exact.chunks(row).enumerate() {
                for (i, &x) in exact.iter().enumerate() {
                    most[v][i % TILE_ATOMS] = most[v][i % TILE_ATOMS].max(x);
                }
            }
            let mut out = vec![f32::NAN; count * row];
            let mut largest = vec![[0f32; TILE_ATOMS]; count];
            portable(&packed, &scales, quads, &vectors, &mut out, &mut largest);
            prop_assert_eq!(&out, &exact);
            prop_assert_eq!(&largest, &most);
            #[cfg(target_arch = "x86_64")]
            {
                use crate::arch::x86_64;
                if level() != Level::Portable {
                    out.fill(f32::NAN);
                    largest.fill([0.0; TILE_ATOMS]);
                    // SAFETY: the level says that its features are there; the sizes are right.
                    unsafe { x86_64::scan::avx2(&packed, &scales, quads, &vectors, &mut out, &mut largest) };
                    prop_assert_eq!(&out, &exact);
                    prop_assert_eq!(&largest, &most);
                }
                if level() == Level::Avx512 {
                    out.fill(f32::NAN);
                    largest.fill([0.0; TILE_ATOMS]);
                    // SAFETY: as above.
                    unsafe { x86_64::scan::avx512(&packed, &scales, quads, &vectors, &mut out, &mut largest) };
                    prop_assert_eq!(&out, &exact);
                    prop_assert_eq!(&largest, &most);
                }
            }
        }
    }
}
