use std::cell::RefCell;

use super::{BlockMut, EncodedBatch, Encoder, Fit, encode_in_blocks};
use crate::Result;
use crate::dictionary::{Codebooks, RoundedCodebook};
use crate::kernels::beam::{Continued, ExactGains, Pair, gains, nth_largest, products_of, rests};
use crate::kernels::rows::Rows;
use crate::kernels::scan::{RoundedVectors, TILE_ATOMS, at_least};
use crate::kernels::vector::{dot_mixed, square};
use crate::threads::Threads;

/// Vectors that are searched for side by side: each reading of a codebook serves all of them.
const BLOCK: usize = 32;
/// Sums whose products with a codebook stay in a core's second cache: so many that it matters little what tiles take to begin.
const GROUP: usize = 64;
/// Gains that are rather compared exactly than told from the largest by rounded ones.
const FEW: usize = 4;
/// Sums that are followed for every vector where nothing else is asked for.
pub const BEAM_WIDTH: usize = 8;
/// Sums that can be asked for: memory and time grow with them, and few find nearly all that many find.
pub const MAX_BEAM_WIDTH: usize = 2048;
/// Standard deviations of rounding within which two gains may have changed places: one in thousands is further off.
const MARGIN: f32 = 5.0;
/// Larger numbers are coded as this one, far beyond what atoms reach, so that squares stay finite.
const LARGEST: f32 = 1e15;

/// The largest scale that additive codes have.
const MAX_SCALE: f64 = 2.0;

/// Beam search for additive codes, one atom of each of the first [`Codebooks`].
///
/// Codebook by codebook every vector's nearest sums so far, as many as the beam is wide, are continued with every atom
/// of the codebook, and the nearest of all those are kept (beam search, as Babenko & Lempitsky 2014 encode additive
/// quantisation). A beam of width 1 is matching pursuit. Products are looked over in 8-bit integers, and the few sums that may
/// be among the nearest compared exactly; with AMX, those with atoms in 8 bits are exact at once. `O(N·m·b)` a vector for a beam of width `b`.
#[derive(Debug)]
pub struct BeamSearch<'d> {
    codebooks: &'d Codebooks,
    sparsity: usize,
    beam_width: usize,
    fit: Fit,
}

impl<'d> BeamSearch<'d> {
    /// Makes a search for codes of `sparsity` atoms, one of each of the first `sparsity` codebooks.
    ///
    /// # Errors
    /// [`Error::Codebooks`](crate::Error::Codebooks) unless `1 ≤ sparsity ≤` the number of codebooks.
    pub fn new(codebooks: &'d Codebooks, sparsity: usize) -> Result<Self> {
        codebooks.check_sparsity(sparsity)?;
        Ok(Self {
            codebooks,
            sparsity,
            beam_width: BEAM_WIDTH,
            fit: Fit::default(),
        })
    }

    /// Follows `width` sums of every vector, at least one and at most [`MAX_BEAM_WIDTH`].
    #[must_use]
    pub fn with_beam_width(mut self, width: usize) -> Self {
        self.beam_width = width.clamp(1, MAX_BEAM_WIDTH);
        self
    }

    /// Sets the length of what codes stand for, as far as a scale from 1 to 2 does. Relative errors stay those of the
    /// sums alone.
    #[must_use]
    pub fn with_fit(mut self, fit: Fit) -> Self {
        self.fit = fit;
        self
    }

    /// Finds the nearest sums for a block of vectors; `lengths` says after how many codebooks each ends.
    fn search(&self, vectors: &[f32], lengths: &[u16], scratch: &mut Scratch, indices: &mut [u16]) {
        let (m, s) = (self.codebooks.head_dim(), self.sparsity);
        let Scratch { sums, next, look } = scratch;
        sums.begin(vectors, m, s);
        for (codebook, rounded) in self.codebooks.rounded()[..s].iter().enumerate() {
            let atoms = self.codebooks.rows(codebook);
            look.begin(atoms, rounded);
            let start = self.codebooks.sizes().start(codebook);
            let count = self.codebooks.sizes().size(codebook);
            next.clear();
            let mut first = 0;
            while first < sums.sums.len() {
                let group = sums.group(first);
                let group = first..first + group;
                let residuals = &sums.residuals[group.start * m..group.end * m];
                look.multiply(rounded, residuals, m);
                for of_vector in sums.sums[group.clone()].chunk_by(|a, b| a.vector == b.vector) {
                    let vector = of_vector[0].vector;
                    let last = usize::from(lengths[vector]) == codebook + 1;
                    let keep = if last { 1 } else { self.beam_width };
                    look.find(rounded, first - group.start, of_vector, count, keep);
                    let residuals = &sums.residuals[first * m..][..of_vector.len() * m];
                    look.compare(atoms, rounded, of_vector, residuals, m);
                    look.keep_largest(keep);
                    let chosen = &sums.chosen[first * s..][..of_vector.len() * s];
                    first += of_vector.len();
                    if last {
                        let found = look.found[0];
                        let out = &mut indices[vector * s..][..s];
                        out.copy_from_slice(&chosen[found.sum as usize * s..][..s]);
                        out[codebook] = (start + found.atom as usize) as u16;
                        continue;
                    }
                    for (found, &gain) in look.found.iter().zip(&look.found_gains) {
                        next.sums.push(Sum { vector, gain });
                        let place = next.chosen.len() + codebook;
                        let parent = &chosen[found.sum as usize * s..][..s];
                        next.chosen.extend_from_slice(parent);
                        next.chosen[place] = (start + found.atom as usize) as u16;
                    }
                    let place = next.residuals.len();
                    next.residuals.resize(place + look.found.len() * m, 0.0);
                    let left = &mut next.residuals[place..];
                    rests(&look.found, atoms, residuals, m, left);
                }
            }
            std::mem::swap(sums, next);
        }
    }

    /// Returns `‖x − x̂‖ / ‖x‖` of the sum `x̂` of atoms, 0 for a zero vector, and the code's scale.
    fn judge(&self, x: &[f32], indices: &[u16]) -> (f32, f32) {
        let mut rest: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for &i in indices {
            self.codebooks
                .row(usize::from(i))
                .subtract_scaled_from(1.0, &mut rest);
        }
        let whole = square(x);
        if whole == 0.0 {
            return (0.0, 1.0);
        }
        let along = whole - dot_mixed(x, &rest);
        let unbiased = if along > 0.0 { whole / along } else { 1.0 };
        let error = (rest.iter().map(|r| r * r).sum::<f64>() / whole).sqrt();
        // Next to nothing may come back as far more.
        let error = error.min(f64::from(f32::MAX)) as f32;
        (error, self.fit.scale(unbiased, MAX_SCALE) as f32)
    }
}

impl Encoder for BeamSearch<'_> {
    fn head_dim(&self) -> usize {
        self.codebooks.head_dim()
    }

    fn max_sparsity(&self) -> usize {
        self.sparsity
    }

    fn encode_heads(
        &self,
        vectors: &[f32],
        sparsities: &[usize],
        threads: &dyn Threads,
    ) -> Result<Vec<EncodedBatch>> {
        let (m, s) = (self.head_dim(), self.sparsity);
        let encode_block = |vectors: &[f32], block: BlockMut<'_>| {
            SCRATCH.with_borrow_mut(|scratch| {
                self.search(vectors, block.lengths, scratch, block.indices);
            });
            for (v, x) in vectors.chunks_exact(m).enumerate() {
                let length = usize::from(block.lengths[v]);
                let (error, scale) = self.judge(x, &block.indices[v * s..][..length]);
                block.coefficients[v * s..][..length].fill(scale);
                block.relative_errors[v] = error;
            }
        };
        encode_in_blocks(self, vectors, sparsities, BLOCK, threads, encode_block)
    }
}

/// Sums of atoms that are followed, those of one vector next to each other.
#[derive(Default)]
struct Beams {
    sums: Vec<Sum>,
    /// Rest of its vector that each leaves, `[sums, m]`.
    residuals: Vec<f32>,
    /// The atoms of each, `[sums, s]`.
    chosen: Vec<u16>,
}

struct Sum {
    vector: usize,
    /// Half of what the squared distance to the vector has lost.
    gain: f32,
}

impl Beams {
    fn clear(&mut self) {
        self.sums.clear();
        self.residuals.clear();
        self.chosen.clear();
    }

    /// Begins with nothing taken of `vectors`.
    fn begin(&mut self, vectors: &[f32], m: usize, s: usize) {
        self.clear();
        let numbers = vectors.iter().map(|x| x.clamp(-LARGEST, LARGEST));
        self.residuals.extend(numbers);
        let count = vectors.len() / m;
        self.sums
            .extend((0..count).map(|vector| Sum { vector, gain: 0.0 }));
        self.chosen.resize(count * s, 0);
    }

    /// The number of sums, from sum `first` on, that are looked over together: those of whole vectors.
    fn group(&self, first: usize) -> usize {
        let mut group = 0;
        for of_vector in self.sums[first..].chunk_by(|a, b| a.vector == b.vector) {
            group += of_vector.len();
            if group >= GROUP {
                break;
            }
        }
        group
    }
}

/// Scratch memory of one thread.
#[derive(Default)]
struct Scratch {
    sums: Beams,
    next: Beams,
    look: Look,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A quick look over all sums that can be continued from some: in 8-bit integers, or exactly where the level can.
#[derive(Default)]
struct Look {
    residuals: RoundedVectors,
    /// Products of each rounded residual with each atom, `[sums, tiles]`.
    products: Vec<[i32; TILE_ATOMS]>,
    exact: ExactGains,
    /// Whether the gains are exact.
    is_exact: bool,
    /// Gains of a vector's sums so far.
    sums: Vec<f32>,
    continued: Vec<Continued>,
    /// What each sum of a vector gains with each atom, nearly: `[sums, tiles]`.
    gains: Vec<[f32; TILE_ATOMS]>,
    /// Numbers of gains that may be among the largest.
    large: Vec<u32>,
    /// Those gains.
    rough: Vec<f32>,
    /// Sums continued with atoms that may gain most.
    found: Vec<Pair>,
    /// What each of them gains.
    found_gains: Vec<f32>,
}

impl Look {
    /// Begins with a codebook, whose atoms are kept as `atoms`.
    fn begin(&mut self, atoms: Rows<'_>, codebook: &RoundedCodebook) {
        let tiles = codebook.losses.len();
        self.is_exact = self.exact.begin(atoms, &codebook.atoms, tiles);
    }

    /// Multiplies `residuals` with the codebook's atoms, rounded first where gains are not exact.
    fn multiply(&mut self, codebook: &RoundedCodebook, residuals: &[f32], m: usize) {
        if self.is_exact {
            self.exact.multiply(residuals, m);
            return;
        }
        let count = residuals.len() / m;
        for (slot, residual) in residuals.chunks_exact(m).enumerate() {
            codebook.atoms.round(residual, slot, &mut self.residuals);
        }
        self.products
            .resize(count * codebook.losses.len(), [0; TILE_ATOMS]);
        codebook
            .atoms
            .products(&self.residuals, count, &mut self.products);
    }

    /// Finds what can be among the `keep` largest gains of a vector's sums, of which the first is number `slot` of the group,
    /// with one of `count` atoms.
    fn find(
        &mut self,
        codebook: &RoundedCodebook,
        slot: usize,
        sums: &[Sum],
        count: usize,
        keep: usize,
    ) {
        let tiles = codebook.losses.len();
        let slots = slot..slot + sums.len();
        self.gains.resize(sums.len() * tiles, [0.0; TILE_ATOMS]);
        let (units, losses) = (&codebook.atoms.units()[..tiles], &codebook.losses);
        let (most, margin) = if self.is_exact {
            self.sums.clear();
            self.sums.extend(sums.iter().map(|sum| sum.gain));
            let (own, gains) = (&self.sums, &mut self.gains);
            (self.exact.gains(slot, own, units, losses, gains), 0.0)
        } else {
            let continued = slots.clone().zip(sums).map(|(slot, sum)| Continued {
                unit: self.residuals.unit(slot),
                gain: sum.gain,
            });
            self.continued.clear();
            self.continued.extend(continued);
            let products = &self.products[slots.start * tiles..slots.end * tiles];
            let most = gains(products, &self.continued, units, losses, &mut self.gains);
            let deviations = slots.map(|slot| self.residuals.deviation(slot));
            (most, MARGIN * deviations.fold(0.0, f32::max))
        };
        let gains = self.gains.as_flattened();
        let width = (tiles * TILE_ATOMS) as u32;
        // The `keep`-th largest of some gains is no larger than that of all; rounding can have moved both.
        let least = if keep <= TILE_ATOMS.min(count) {
            nth_largest(most.as_flattened(), keep)
        } else {
            nth_largest(gains, keep)
        };
        self.large.clear();
        at_least(gains, least - margin, &mut self.large);
        if self.large.len() > keep + FEW {
            self.rough.clear();
            let rough = self.large.iter().map(|&i| gains[i as usize]);
            self.rough.extend(rough);
            let enough = nth_largest(&self.rough, keep) - margin;
            self.large.retain(|&i| gains[i as usize] >= enough);
        }
        let pairs = self.large.iter().map(|&i| Pair {
            sum: i / width,
            atom: i % width,
        });
        self.found.clear();
        self.found
            .extend(pairs.filter(|pair| (pair.atom as usize) < count));
        if self.found.is_empty() {
            // Atoms of such lengths that nothing can be said of any.
            self.found.push(Pair { sum: 0, atom: 0 });
        }
        if self.is_exact {
            let found = self.found.iter();
            let own = found.map(|pair| gains[(pair.sum * width + pair.atom) as usize]);
            self.found_gains.clear();
            self.found_gains.extend(own);
        }
    }

    /// Computes what those that were found gain, unless it is known.
    fn compare(
        &mut self,
        atoms: Rows<'_>,
        codebook: &RoundedCodebook,
        sums: &[Sum],
        residuals: &[f32],
        m: usize,
    ) {
        if self.is_exact {
            return;
        }
        self.found_gains.resize(self.found.len(), 0.0);
        products_of(&self.found, atoms, residuals, m, &mut self.found_gains);
        let losses = codebook.losses.as_flattened();
        for (pair, gain) in self.found.iter().zip(&mut self.found_gains) {
            *gain += sums[pair.sum as usize].gain - losses[pair.atom as usize];
        }
    }

    /// Keeps `keep` of those that gain most, the first of equals.
    fn keep_largest(&mut self, keep: usize) {
        let (found, gains) = (&mut self.found, &mut self.found_gains);
        if found.len() <= keep {
            return;
        }
        let least = nth_largest(gains, keep);
        let larger = gains.iter().filter(|&&gain| gain > least).count();
        let (mut equals, mut kept) = (keep - larger, 0);
        for i in 0..found.len() {
            let gain = gains[i];
            if gain > least || (gain == least && equals > 0) {
                equals -= usize::from(gain == least);
                (found[kept], gains[kept]) = (found[i], gain);
                kept += 1;
            }
        }
        // One at the least, also where gains are no numbers.
        found.truncate(kept.max(1));
        gains.truncate(kept.max(1));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_largest_are_kept_and_of_equals_the_first(gains in prop::collection::vec(-9i8..9, 1..300), keep in 1usize..20) {
            let gains: Vec<f32> = gains.into_iter().map(f32::from).collect();
            let pairs = (0..gains.len() as u32).map(|atom| Pair { sum: 0, atom });
            let mut look = Look { found: pairs.collect(), found_gains: gains.clone(), ..Look::default() };
            look.keep_largest(keep);
            let mut wanted: Vec<usize> = (0..gains.len()).collect();
            wanted.sort_by(|&a, &b| gains[b].total_cmp(&gains[a]));
            wanted.truncate(keep);
            wanted.sort_unstable();
            let kept: Vec<usize> = look.found.iter().map(|pair| pair.atom as usize).collect();
            prop_assert_eq!(&kept, &wanted);
            let left: Vec<f32> = wanted.iter().map(|&i| gains[i]).collect();
            prop_assert_eq!(look.found_gains, left);
        }
    }
}
