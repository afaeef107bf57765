//! A quick look over all atoms, in 8-bit integers, for those with which a residual may correlate best.
//!
//! Rounding moves a correlation by no more than the two rounding errors' lengths allow
//! (Cauchy–Schwarz), so that the atoms whose rounded correlation comes within twice that of the
//! largest hold the true largest for certain; those few are then compared exactly.

use super::{
    LANES, Operands, QUAD, STRIP_TILES, TILE_ATOMS, largest_number, products, scan, start,
};
use crate::kernels::rows::Rows;
use crate::kernels::vector::{Rounded, norm, peak, round_to_bytes, unit};

/// Atoms rounded to 8 bits: `N·m` bytes and a scale each.
#[derive(Debug, Clone)]
pub(crate) struct RoundedAtoms {
    /// Sixteen atoms side by side, four of their numbers at a time: `[N / 16, m / 4, 16, 4]`, what is
    /// missing at the edges filled up with zeros; every number has 128 added. Whole strips of tiles.
    tiles: Vec<u8>,
    /// The unit that an atom's numbers are multiples of, `[N]` filled up with zeros.
    scales: Vec<f32>,
    /// Quads in an atom, `m / 4`.
    quads: usize,
    /// Length of an atom at the most.
    longest: f32,
    /// Length of what rounding took from an atom, at the most.
    rounding: f32,
    /// Mean squares of an atom's numbers, and of what rounding took from each.
    squares: (f32, f32),
}

/// A block's residuals rounded to 8 bits.
#[derive(Debug, Default)]
pub(crate) struct RoundedVectors {
    /// `[vectors / LANES, m / 4, LANES]`, four numbers in each.
    quads: Vec<u32>,
    /// What sums of each vector's products start from.
    starts: Vec<i32>,
    /// One vector, filled up with zeros.
    bytes: Vec<i8>,
    /// The largest rounded correlation of each vector, among the atoms of each place in a tile.
    largest: Vec<[f32; TILE_ATOMS]>,
    /// Largest error of a scanned correlation, in the scan's own units, `[vectors]`.
    bounds: Vec<f32>,
    /// Standard deviation of what rounding adds to a correlation.
    deviations: Vec<f32>,
    /// The unit that each vector's numbers are multiples of.
    units: Vec<f32>,
}

impl RoundedAtoms {
    /// Rounds `[N, m]` atoms; those in 8 bits stay as they are.
    pub(crate) fn new(atoms: Rows<'_>, head_dim: usize) -> Self {
        let quads = head_dim.div_ceil(QUAD);
        let count = atoms.len() / head_dim;
        let filled = count.next_multiple_of(STRIP_TILES * TILE_ATOMS);
        let mut tiles = vec![128; filled * quads * QUAD];
        let mut scales = vec![0.0; filled];
        let (mut longest, mut rounding) = (0f64, 0f64);
        let (mut whole, mut taken) = (0f64, 0f64);
        let (mut bytes, mut rest) = (vec![0; head_dim], vec![0.0; head_dim]);
        let mut room = Vec::new();
        for (i, place) in scales.iter_mut().enumerate().take(count) {
            let row = atoms.row(i, head_dim);
            let atom = row.widened(head_dim, &mut room);
            *place = if let Rows::I8 { numbers, units } = row {
                bytes.copy_from_slice(numbers);
                units[0]
            } else {
                let scale = unit(peak(atom), 127.0);
                for ((byte, rest), &x) in bytes.iter_mut().zip(&mut rest).zip(atom) {
                    let rounded = (x / scale).round_ties_even();
                    *rest = x - rounded * scale;
                    *byte = rounded as i8;
                }
                scale
            };
            for (k, &byte) in bytes.iter().enumerate() {
                let tile = (i / TILE_ATOMS * quads + k / QUAD) * TILE_ATOMS + i % TILE_ATOMS;
                tiles[tile * QUAD + k % QUAD] = (i16::from(byte) + 128) as u8;
            }
            let (length, lost) = (norm(atom), norm(&rest));
            (longest, rounding) = (longest.max(length), rounding.max(lost));
            (whole, taken) = (whole + length * length, taken + lost * lost);
        }
        let numbers = atoms.len() as f64;
        Self {
            tiles,
            scales,
            quads,
            longest: longest as f32,
            rounding: rounding as f32,
            squares: ((whole / numbers) as f32, (taken / numbers) as f32),
        }
    }

    /// The quads of each tile's atoms, numbers with 128 added: `[tiles, quads, 16, 4]`.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::kernels) fn tiles(&self) -> &[[[u8; QUAD]; TILE_ATOMS]] {
        self.tiles.as_chunks::<QUAD>().0.as_chunks().0
    }

    /// Quads of an atom.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::kernels) fn quads(&self) -> usize {
        self.quads
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tiles.capacity() + self.scales.capacity() * size_of::<f32>()
    }

    /// Number of candidates, each of several atoms.
    pub(crate) fn room(&self) -> usize {
        self.scales.len() / STRIP_TILES
    }

    /// The atoms that a candidate stands for; numbers from `N` on are no atoms.
    pub(crate) fn atoms_of(candidate: u32) -> impl Iterator<Item = usize> {
        let candidate = candidate as usize;
        let strip = candidate / TILE_ATOMS * STRIP_TILES;
        (strip..strip + STRIP_TILES).map(move |tile| tile * TILE_ATOMS + candidate % TILE_ATOMS)
    }

    /// Magnitudes of the rounded correlations with `count` rounded vectors, `[count, room]`: for each
    /// candidate that of the atom with the largest.
    pub(crate) fn scan(&self, vectors: &mut RoundedVectors, count: usize, out: &mut [f32]) {
        let mut largest = std::mem::take(&mut vectors.largest);
        largest.clear();
        largest.resize(count, [0.0; TILE_ATOMS]);
        scan(
            self.operands(vectors),
            &mut out[..count * self.room()],
            &mut largest,
        );
        vectors.largest = largest;
    }

    fn operands<'a>(&'a self, vectors: &'a RoundedVectors) -> Operands<'a> {
        Operands {
            tiles: &self.tiles,
            scales: &self.scales,
            vectors: &vectors.quads,
            starts: &vectors.starts,
            quads: self.quads,
        }
    }

    /// The unit that each atom's numbers are multiples of, those that fill the last tile 0.
    pub(crate) fn units(&self) -> &[[f32; TILE_ATOMS]] {
        self.scales.as_chunks().0
    }

    /// Products of the atoms of the first tiles with `count` rounded vectors, `[count, tiles]`, in the units of both.
    pub(crate) fn products(
        &self,
        vectors: &RoundedVectors,
        count: usize,
        out: &mut [[i32; TILE_ATOMS]],
    ) {
        products(self.operands(vectors), count, out);
    }

    /// Rounds a vector, none of whose numbers may be beyond the powers of two that f32 inverts, as
    /// number `slot` of a block.
    pub(crate) fn round(&self, x: &[f32], slot: usize, block: &mut RoundedVectors) {
        let filled = (slot / LANES + 1) * self.quads * LANES;
        if block.quads.len() < filled {
            block.quads.resize(filled, 0);
        }
        block.bytes.resize(self.quads * QUAD, 0);
        let (bytes, fill) = block.bytes.split_at_mut(x.len());
        fill.fill(0);
        let Rounded {
            unit,
            rest,
            whole,
            sum,
        } = round_to_bytes(x, f32::from(largest_number()), bytes);
        let first = slot / LANES * self.quads * LANES + slot % LANES;
        let places = block.quads[first..].iter_mut().step_by(LANES);
        for (place, bytes) in places.zip(block.bytes.as_chunks::<QUAD>().0) {
            *place = u32::from_le_bytes(bytes.map(|byte| byte as u8));
        }
        let variance = self.squares.0 * rest + self.squares.1 * whole;
        // The atom's rounding against the vector, the vector's against the rounded atom; and the
        // bound's own rounding.
        let (whole, rest) = (whole.sqrt(), rest.sqrt());
        let bound = self.rounding * whole
            + (1.02 * self.longest + self.rounding) * rest
            + 1e-5 * self.longest * whole;
        let slots = block.bounds.len().max(slot + 1);
        block.bounds.resize(slots, 0.0);
        block.bounds[slot] = bound;
        block.deviations.resize(slots, 0.0);
        block.deviations[slot] = variance.sqrt() * unit;
        block.starts.resize(slots, 0);
        block.starts[slot] = start(sum);
        block.units.resize(slots, 0.0);
        block.units[slot] = unit;
    }
}

impl RoundedVectors {
    /// The least that the rounded correlation of the truly largest atom with vector `slot` can be: the largest
    /// less twice what rounding may have moved one.
    pub(crate) fn enough(&self, slot: usize) -> f32 {
        let largest = self.largest[slot].iter().fold(0f32, |a, &b| a.max(b));
        largest - 2.0 * self.bounds[slot]
    }

    /// The unit that the numbers of vector `slot` are multiples of.
    pub(crate) fn unit(&self, slot: usize) -> f32 {
        self.units[slot]
    }

    /// The standard deviation of what rounding has added to correlations with vector `slot`.
    pub(crate) fn deviation(&self, slot: usize) -> f32 {
        self.deviations[slot]
    }

    /// The most that a correlation with vector `slot` can be, whose rounded one is `rounded`.
    pub(crate) fn at_most(&self, slot: usize, rounded: f32) -> f32 {
        (rounded + self.bounds[slot]) * self.units[slot]
    }
}
