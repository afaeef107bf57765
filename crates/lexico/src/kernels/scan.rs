//! Correlations of many atoms with some vectors in 8-bit integers: the widest products there are.

#[cfg(target_arch = "aarch64")]
use super::aarch64;
use super::level::{Level, level};
#[cfg(target_arch = "x86_64")]
use super::x86_64;

/// Numbers that one instruction multiplies and adds at a time.
pub(crate) const QUAD: usize = 4;
/// Atoms of a tile.
pub(crate) const TILE_ATOMS: usize = 16;
/// Tiles that are looked over together: with eight vectors 24 sums, as many as registers hold beside the
/// operands.
pub(crate) const GROUP_TILES: usize = 3;
/// Vectors of a block.
pub(crate) const LANES: usize = 8;

/// Atoms and vectors in 8-bit integers.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// The atoms' numbers, from −127 to 127, with 128 added, `[atoms / 16, quads, 16, 4]`: whole groups of
    /// tiles.
    pub(crate) tiles: &'a [u8],
    /// What each atom's products are multiplied by.
    pub(crate) scales: &'a [f32],
    /// The vectors' numbers, up to [`largest_number`] either way, `[vectors / 8, quads, 8]` of four each:
    /// whole blocks.
    pub(crate) vectors: &'a [u32],
    /// Quads of an atom and of a vector.
    pub(crate) quads: usize,
}

impl<'a> Operands<'a> {
    /// Results of a vector.
    pub(super) fn row(self) -> usize {
        self.scales.len() / GROUP_TILES
    }

    /// The quads of vector `v`.
    pub(super) fn vector(self, v: usize) -> impl Iterator<Item = [i8; QUAD]> + 'a {
        let block = &self.vectors[v / LANES * self.quads * LANES..][..self.quads * LANES];
        let own = block.iter().skip(v % LANES).step_by(LANES);
        own.map(|quad| quad.to_le_bytes().map(|byte| byte as i8))
    }

    /// What sums of the tiles' products with vector `v` start from: the tiles' numbers are 128 too large.
    pub(super) fn start(self, v: usize) -> i32 {
        -128 * self.vector(v).flatten().map(i32::from).sum::<i32>()
    }

    fn check(self, out: usize, largest: usize) {
        let atoms = self.scales.len();
        assert!(
            self.quads > 0 && atoms > 0 && atoms.is_multiple_of(GROUP_TILES * TILE_ATOMS),
            "whole groups"
        );
        assert_eq!(
            self.tiles.len(),
            atoms * self.quads * QUAD,
            "an atom has its quads"
        );
        assert_eq!(out, largest * self.row(), "a vector has its results");
        assert!(
            self.vectors.len() >= largest.div_ceil(LANES) * self.quads * LANES,
            "a vector has its quads"
        );
    }
}

/// How large the numbers of vectors may be.
pub(crate) fn largest_number() -> u8 {
    largest_number_at(level())
}

fn largest_number_at(level: Level) -> u8 {
    match level {
        // Sums of two products are held in 16 bits, and 2 · 255 · 64 is as much as they hold.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => 64,
        _ => 127,
    }
}

/// For each vector `v`, group of tiles and place in a tile, the largest of `scales[i] · |⟨tiles_i − 128, vectors_v⟩|`
/// over the group's atoms in that place: `out` is `[vectors, atoms / GROUP_TILES]`. And the largest of those of
/// vector `v` in each place of a tile, where it is above what `largest[v]` has.
pub(crate) fn scan(operands: Operands<'_>, out: &mut [f32], largest: &mut [[f32; TILE_ATOMS]]) {
    scan_at(level(), operands, out, largest);
}

fn scan_at(
    level: Level,
    operands: Operands<'_>,
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    operands.check(out.len(), largest.len());
    match level {
        Level::Portable => portable(operands, out, largest),
        // SAFETY: such a level is only where its instructions are; the sizes are checked.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86_64::scan::avx2(operands, out, largest) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::AvxVnni => unsafe { x86_64::scan::avx_vnni(operands, out, largest) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86_64::scan::avx512(operands, out, largest) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Level::Neon => unsafe { aarch64::scan::neon(operands, out, largest) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Level::DotProduct => unsafe { aarch64::scan::dot_product(operands, out, largest) },
    }
}

fn portable(operands: Operands<'_>, out: &mut [f32], largest: &mut [[f32; TILE_ATOMS]]) {
    let quads = operands.quads;
    let row = operands.row();
    out.fill(0.0);
    let numbers: Vec<[i16; QUAD]> = (0..largest.len())
        .flat_map(|v| operands.vector(v).map(|x| x.map(i16::from)))
        .collect();
    let starts: Vec<i32> = (0..largest.len()).map(|v| operands.start(v)).collect();
    let tiles = operands.tiles.chunks_exact(quads * TILE_ATOMS * QUAD);
    let tiles = tiles.zip(operands.scales.chunks_exact(TILE_ATOMS));
    for (t, (tile, scales)) in tiles.enumerate() {
        let tile = tile.as_chunks().0;
        let vectors = numbers.chunks_exact(quads).zip(&starts);
        let results = out.chunks_exact_mut(row).zip(largest.iter_mut());
        for ((numbers, &start), (out, largest)) in vectors.zip(results) {
            let out = &mut out[t / GROUP_TILES * TILE_ATOMS..][..TILE_ATOMS];
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

/// Products of a tile's atoms with a vector, added to `start`.
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
            let mut draw = |largest: i32| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let drawn = (state >> 16) as i32 % (2 * largest + 1) - largest;
                // Sums of products must not overflow anywhere on the way.
                if extreme { largest * drawn.signum() } else { drawn }
            };
            let atoms = groups * GROUP_TILES * TILE_ATOMS;
            let tiles: Vec<u8> = (0..atoms * quads * QUAD).map(|_| (draw(127) + 128) as u8).collect();
            let scales: Vec<f32> = (0..atoms).map(|i| 1.0 / (i + 1) as f32).collect();
            let row = atoms / GROUP_TILES;
            for level in Level::all() {
                let number = i32::from(largest_number_at(level));
                let vectors: Vec<u32> = (0..count.div_ceil(LANES) * quads * LANES)
                    .map(|_| u32::from_le_bytes([0; QUAD].map(|_: u8| draw(number) as u8)))
                    .collect();
                let mut exact = vec![0f32; count * row];
                let mut most = vec![[0f32; TILE_ATOMS]; count];
                for v in 0..count {
                    for (i, scale) in scales.iter().enumerate() {
                        let sum: i64 = (0..quads)
                            .map(|q| {
                                let x = vectors[(v / LANES * quads + q) * LANES + v % LANES].to_le_bytes();
                                let at = ((i / TILE_ATOMS * quads + q) * TILE_ATOMS + i % TILE_ATOMS) * QUAD;
                                (0..QUAD).map(|k| (i64::from(tiles[at + k]) - 128) * i64::from(x[k] as i8)).sum::<i64>()
                            })
                            .sum();
                        let place = i % TILE_ATOMS;
                        let scaled = sum.abs() as f32 * scale;
                        let exact = &mut exact[v * row + i / (GROUP_TILES * TILE_ATOMS) * TILE_ATOMS + place];
                        *exact = exact.max(scaled);
                        most[v][place] = most[v][place].max(scaled);
                    }
                }
                let operands = Operands { tiles: &tiles, scales: &scales, vectors: &vectors, quads };
                let mut out = vec![f32::NAN; count * row];
                let mut largest = vec![[0f32; TILE_ATOMS]; count];
                scan_at(level, operands, &mut out, &mut largest);
                prop_assert!(out == exact, "{:?}", level);
                prop_assert!(largest == most, "{:?}", level);
            }
        }
    }
}
