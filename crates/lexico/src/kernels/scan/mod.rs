//! Correlations of many atoms with some vectors in 8-bit integers, the widest products there are; and the search
//! for those that are large.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod portable;
mod rounded;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64::{dot_product, neon};
pub(crate) use rounded::{RoundedAtoms, RoundedVectors};
#[cfg(target_arch = "x86_64")]
use x86_64::{amx, avx_vnni, avx2, avx512};

use super::dispatch;
#[cfg(target_arch = "x86_64")]
use super::level::Level;
use super::level::level;

/// Numbers that one instruction multiplies and adds at a time.
pub(super) const QUAD: usize = 4;
/// Atoms of a tile.
pub(crate) const TILE_ATOMS: usize = 16;
/// Tiles of a strip, which are looked over together: with eight vectors 24 sums, as many as registers hold beside
/// the operands.
pub(super) const STRIP_TILES: usize = 3;
/// Vectors of a block.
pub(super) const LANES: usize = 8;

/// Atoms and vectors in 8-bit integers.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// The atoms' numbers, from −127 to 127, with 128 added, `[atoms / 16, quads, 16, 4]`: whole strips.
    pub(super) tiles: &'a [u8],
    /// The factor of each atom's products.
    pub(super) scales: &'a [f32],
    /// The vectors' numbers, up to [`largest_number`] either way, `[vectors / 8, quads, 8]` of four each:
    /// whole blocks.
    pub(super) vectors: &'a [u32],
    /// Where sums of each vector's products start: the tiles' numbers are 128 too large, see [`start`].
    pub(super) starts: &'a [i32],
    /// Quads of an atom and of a vector.
    pub(super) quads: usize,
}

/// What sums of products of numbers of that sum with tiles' numbers, which are 128 too large, start from.
fn start(sum: i32) -> i32 {
    -128 * sum
}

impl<'a> Operands<'a> {
    /// Number of a vector's results.
    pub(super) fn row(self) -> usize {
        self.scales.len() / STRIP_TILES
    }

    /// The vectors' numbers from those of vector `v` on, of which every block's next quad lies [`LANES`] further.
    pub(super) fn numbers_from(self, v: usize) -> &'a [u32] {
        &self.vectors[v / LANES * self.quads * LANES + v % LANES..]
    }

    /// The quads of vector `v`.
    pub(super) fn vector(self, v: usize) -> impl Iterator<Item = [i8; QUAD]> + 'a {
        let own = self.numbers_from(v).iter().step_by(LANES).take(self.quads);
        own.map(|quad| quad.to_le_bytes().map(|byte| byte as i8))
    }

    fn check(self, out: usize, largest: usize) {
        self.check_vectors(largest);
        assert_eq!(out, largest * self.row(), "a vector has its results");
    }

    fn check_vectors(self, count: usize) {
        let atoms = self.scales.len();
        assert!(
            self.quads > 0 && atoms > 0 && atoms.is_multiple_of(STRIP_TILES * TILE_ATOMS),
            "whole strips"
        );
        assert_eq!(
            self.tiles.len(),
            atoms * self.quads * QUAD,
            "an atom has its quads"
        );
        assert!(
            self.vectors.len() >= count.div_ceil(LANES) * self.quads * LANES
                && self.starts.len() >= count,
            "a vector has its quads and its start"
        );
    }
}

/// Magnitude of a vector's largest number.
fn largest_number() -> u8 {
    match level() {
        // Sums of two products are held in 16 bits, and 2 · 255 · 64 is as much as they hold.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => 64,
        _ => 127,
    }
}

/// Writes, for each vector `v`, strip of tiles and place in a tile, the largest of
/// `scales[i] · |⟨tiles_i − 128, vectors_v⟩|` over the strip's atoms in that place: `out` is
/// `[vectors, atoms / STRIP_TILES]`. Raises `largest[v]` in each place of a tile to the largest of these.
fn scan(operands: Operands<'_>, out: &mut [f32], largest: &mut [[f32; TILE_ATOMS]]) {
    operands.check(out.len(), largest.len());
    dispatch!(scan(operands, out, largest))
}

/// Writes `⟨tiles_i − 128, vectors_v⟩` for each of `count` vectors `v` and the atoms `i` of the first tiles, as many as there
/// is room for: `out` is `[vectors, tiles]`.
fn products(operands: Operands<'_>, count: usize, out: &mut [[i32; TILE_ATOMS]]) {
    operands.check_vectors(count);
    assert!(
        out.len().is_multiple_of(count) && out.len() / count * TILE_ATOMS <= operands.scales.len(),
        "products of tiles that there are"
    );
    dispatch!(products(operands, count, out))
}

/// Appends the numbers of those entries of `a` that are at least `enough`, in order.
pub(crate) fn at_least(a: &[f32], enough: f32, found: &mut Vec<u32>) {
    dispatch!(at_least(a, enough, found))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::{at_level, every_level, levels};

    proptest! {
        #[test]
        fn every_large_number_is_found(a in prop::collection::vec(-9f32..9.0, 0..600), enough in -10f32..10.0) {
            let wanted: Vec<u32> = (0..).zip(&a).filter(|(_, x)| **x >= enough).map(|(i, _)| i).collect();
            let mut found = Vec::new();
            let levels = every_level!(at_least(&a, enough, &mut found)).len();
            prop_assert_eq!(found, wanted.repeat(levels));
        }

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
            let atoms = groups * STRIP_TILES * TILE_ATOMS;
            let tiles: Vec<u8> = (0..atoms * quads * QUAD).map(|_| (draw(127) + 128) as u8).collect();
            let scales: Vec<f32> = (0..atoms).map(|i| 1.0 / (i + 1) as f32).collect();
            let row = atoms / STRIP_TILES;
            for level in levels() {
                let mut number = 0;
                at_level(level, || number = i32::from(largest_number()));
                let vectors: Vec<u32> = (0..count.div_ceil(LANES) * quads * LANES)
                    .map(|_| u32::from_le_bytes([0; QUAD].map(|_: u8| draw(number) as u8)))
                    .collect();
                let mut exact = vec![0f32; count * row];
                let mut wanted = vec![[0f32; TILE_ATOMS]; count];
                let mut sums = vec![Vec::new(); count];
                for v in 0..count {
                    for (i, scale) in scales.iter().enumerate() {
                        let sum: i64 = (0..quads)
                            .map(|q| {
                                let x = vectors[(v / LANES * quads + q) * LANES + v % LANES].to_le_bytes();
                                let at = ((i / TILE_ATOMS * quads + q) * TILE_ATOMS + i % TILE_ATOMS) * QUAD;
                                (0..QUAD).map(|k| (i64::from(tiles[at + k]) - 128) * i64::from(x[k] as i8)).sum::<i64>()
                            })
                            .sum();
                        sums[v].push(sum as i32);
                        let place = i % TILE_ATOMS;
                        let scaled = sum.abs() as f32 * scale;
                        let exact = &mut exact[v * row + i / (STRIP_TILES * TILE_ATOMS) * TILE_ATOMS + place];
                        *exact = exact.max(scaled);
                        wanted[v][place] = wanted[v][place].max(scaled);
                    }
                }
                let own = Operands { tiles: &tiles, scales: &scales, vectors: &vectors, starts: &[], quads };
                let starts: Vec<i32> = (0..count).map(|v| start(own.vector(v).flatten().map(i32::from).sum())).collect();
                let operands = Operands { starts: &starts, ..own };
                let mut out = vec![f32::NAN; count * row];
                let mut largest = vec![[0f32; TILE_ATOMS]; count];
                at_level(level, || scan(operands, &mut out, &mut largest));
                prop_assert!(out == exact, "{:?}", level);
                prop_assert!(largest == wanted, "{:?}", level);
                let tiles = (seed as usize % (groups * STRIP_TILES)) + 1;
                let mut all = vec![[i32::MIN; TILE_ATOMS]; count * tiles];
                at_level(level, || products(operands, count, &mut all));
                for (v, own) in all.chunks_exact(tiles).enumerate() {
                    for (i, &sum) in own.as_flattened().iter().enumerate() {
                        prop_assert_eq!(sum, sums[v][i], "{:?}", level);
                    }
                }
            }
        }
    }
}
