//! A quick look over all atoms, in 8-bit integers, for those that a residual may correlate with most.
//!
//! Rounding moves a correlation by no more than the two rounding errors' lengths allow
//! (Cauchy–Schwarz), so that the atoms whose rounded correlation comes within twice that of the
//! largest hold the true largest for certain; those few are then compared exactly.

use crate::arch::scan::{LANES, QUAD, TILE_ATOMS, scan};
use crate::dictionary::norm;

/// Atoms rounded to 8 bits: `N·m` bytes and a scale each.
#[derive(Debug, Clone)]
pub(crate) struct RoundedAtoms {
    /// Sixteen atoms side by side, four of their numbers at a time: `[N / 16, m / 4, 16, 4]`, what is
    /// missing at the edges filled up with zeros; every number has 128 added.
    tiles: Vec<u8>,
    /// What an atom's numbers are multiples of, `[N]` filled up with zeros.
    scales: Vec<f32>,
    /// Quads in an atom, `m / 4`.
    quads: usize,
    /// Length of what rounding took from an atom, at the most.
    rounding: f32,
}

/// A block's residuals rounded to 8 bits.
#[derive(Debug, Default)]
pub(super) struct RoundedVectors {
    /// `[vectors / LANES, m / 4, LANES]`, four numbers in each.
    quads: Vec<u32>,
    /// By how much a scanned correlation may be off, in the scan's own units, `[vectors]`.
    bounds: Vec<f32>,
}

impl RoundedAtoms {
    pub(crate) fn new(atoms: &[f32], head_dim: usize) -> Self {
        let quads = head_dim.div_ceil(QUAD);
        let count = atoms.len() / head_dim;
        let filled = count.next_multiple_of(TILE_ATOMS);
        let mut tiles = vec![128; filled * quads * QUAD];
        let mut scales = vec![0.0; filled];
        let mut rounding = 0f64;
        let mut rest = vec![0.0; head_dim];
        for (i, atom) in atoms.chunks_exact(head_dim).enumerate() {
            let scale = unit(atom);
            scales[i] = scale;
            for (k, (&x, rest)) in atom.iter().zip(&mut rest).enumerate() {
                let rounded = (x / scale).round_ties_even();
                *rest = x - rounded * scale;
                let tile = (i / TILE_ATOMS * quads + k / QUAD) * TILE_ATOMS + i % TILE_ATOMS;
                tiles[tile * QUAD + k % QUAD] = (rounded as i16 + 128) as u8;
            }
            rounding = rounding.max(norm(&rest));
        }
        Self {
            tiles,
            scales,
            quads,
            rounding: rounding as f32,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tiles.capacity() + self.scales.capacity() * size_of::<f32>()
    }

    /// Atoms and what fills the last tile.
    pub(super) fn room(&self) -> usize {
        self.scales.len()
    }

    /// Magnitudes of the rounded correlations with `count` rounded vectors, `[count, room]`.
    pub(super) fn scan(&self, vectors: &RoundedVectors, count: usize, out: &mut [f32]) {
        scan(
            &self.tiles,
            &self.scales,
            self.quads,
            &vectors.quads,
            &mut out[..count * self.room()],
        );
    }

    /// Rounds a vector, none of whose numbers may be beyond the powers of two that f32 inverts, as
    /// number `slot` of a block.
    pub(super) fn round(&self, x: &[f32], slot: usize, block: &mut RoundedVectors) {
        let scale = unit(x);
        let inverse = 1.0 / scale;
        let (mut rest, mut whole) = (0f32, 0f32);
        let first = slot / LANES * self.quads * LANES + slot % LANES;
        let filled = (slot / LANES + 1) * self.quads * LANES;
        if block.quads.len() < filled {
            block.quads.resize(filled, 0);
        }
        for (quad, x) in x.chunks(QUAD).enumerate() {
            let mut bytes = [0; QUAD];
            for (byte, &x) in bytes.iter_mut().zip(x) {
                let rounded = (x * inverse).round_ties_even();
                rest += (x - rounded * scale).powi(2);
                whole += x * x;
                *byte = (rounded as i8) as u8;
            }
            block.quads[first + quad * LANES] = u32::from_le_bytes(bytes);
        }
        // The atom's rounding against the vector, the vector's against the rounded atom; and the
        // bound's own rounding.
        let (whole, rest) = (whole.sqrt(), rest.sqrt());
        let bound = self.rounding * whole + (1.02 + self.rounding) * rest + 1e-5 * whole;
        block.bounds.resize(block.bounds.len().max(slot + 1), 0.0);
        block.bounds[slot] = bound * inverse;
    }
}

impl RoundedVectors {
    /// Twice what a correlation with vector `slot` may be off: how far below the largest the true
    /// largest may seem.
    pub(super) fn margin(&self, slot: usize) -> f32 {
        2.0 * self.bounds[slot]
    }
}

/// What a vector's numbers are rounded to multiples of: the largest is 127 of them.
fn unit(x: &[f32]) -> f32 {
    let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    if largest > 0.0 { largest / 127.0 } else { 1.0 }
}
