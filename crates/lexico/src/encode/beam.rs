use std::cell::RefCell;
use std::cmp::Ordering;

use super::{BlockMut, EncodedBatch, Encoder, Fit, encode_in_blocks};
use crate::Result;
use crate::dictionary::{Codebooks, RoundedCodebook};
use crate::kernels::beam::{Continued, gains};
use crate::kernels::larger;
use crate::kernels::scan::{RoundedVectors, TILE_ATOMS, at_least};
use crate::kernels::vector::{dot_mixed, square};
use crate::threads::Threads;

/// Vectors that are searched for side by side: each reading of a codebook serves all of them.
const BLOCK: usize = 32;
/// Sums whose products with a codebook stay in a core's nearest cache.
const GROUP: usize = 16;
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
/// be among the nearest compared exactly. `O(N·m·b)` a vector for a beam of width `b`.
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
            let start = self.codebooks.sizes().start(codebook);
            let count = self.codebooks.sizes().size(codebook);
            next.clear();
            let mut first = 0;
            while first < sums.sums.len() {
                let group = sums.group(first);
                look.multiply(rounded, &sums.residuals[first * m..][..group * m], m);
                let group = first..first + group;
                for of_vector in sums.sums[group.clone()].chunk_by(|a, b| a.vector == b.vector) {
                    let vector = of_vector[0].vector;
                    let last = usize::from(lengths[vector]) == codebook + 1;
                    let keep = if last { 1 } else { self.beam_width };
                    look.find(rounded, first - group.start, of_vector, count, keep);
                    for found in &mut look.found {
                        let (parent, atom) = (first + found.sum as usize, found.atom as usize);
                        let residual = &sums.residuals[parent * m..][..m];
                        let product = atoms.row(atom, m).dot(residual);
                        let loss = rounded.losses.as_flattened()[atom];
                        found.gain = sums.sums[parent].gain - loss + product;
                    }
                    look.found.sort_unstable_by(Found::larger_first);
                    look.found.truncate(keep);
                    for &Found { gain, sum, atom } in &look.found {
                        let (parent, atom) = (first + sum as usize, atom as usize);
                        let chosen = &sums.chosen[parent * s..][..s];
                        if last {
                            let out = &mut indices[vector * s..][..s];
                            out.copy_from_slice(chosen);
                            out[codebook] = (start + atom) as u16;
                            continue;
                        }
                        next.sums.push(Sum { vector, gain });
                        next.chosen.extend_from_slice(chosen);
                        let place = next.chosen.len() - s + codebook;
                        next.chosen[place] = (start + atom) as u16;
                        let place = next.residuals.len();
                        next.residuals
                            .extend_from_slice(&sums.residuals[parent * m..][..m]);
                        atoms
                            .row(atom, m)
                            .add_scaled_to(-1.0, &mut next.residuals[place..]);
                    }
                    first += of_vector.len();
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

/// Sums of atoms that are followed, those of one vector next to each other, the nearest first.
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

/// A quick look over all sums that can be continued from some, in 8-bit integers.
#[derive(Default)]
struct Look {
    residuals: RoundedVectors,
    /// Products of each residual with each atom, `[sums, tiles]`.
    products: Vec<[i32; TILE_ATOMS]>,
    continued: Vec<Continued>,
    /// What each sum of a vector gains with each atom, nearly: `[sums, tiles]`.
    gains: Vec<[f32; TILE_ATOMS]>,
    /// The largest gain with each atom.
    largest: Vec<[f32; TILE_ATOMS]>,
    atoms: Vec<u32>,
    found: Vec<Found>,
}

/// A sum continued with an atom.
#[derive(Debug, Clone, Copy)]
struct Found {
    gain: f32,
    /// The sum's number among its vector's.
    sum: u32,
    atom: u32,
}

impl Found {
    /// The larger gain first, and the first of equals.
    fn larger_first(&self, other: &Self) -> Ordering {
        let place = |found: &Self| (found.sum, found.atom);
        other
            .gain
            .total_cmp(&self.gain)
            .then_with(|| place(self).cmp(&place(other)))
    }
}

impl Look {
    /// Rounds `residuals`, and multiplies them with the codebook's atoms.
    fn multiply(&mut self, codebook: &RoundedCodebook, residuals: &[f32], m: usize) {
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
        self.continued.clear();
        self.continued
            .extend(slots.clone().zip(sums).map(|(slot, sum)| Continued {
                unit: self.residuals.unit(slot),
                gain: sum.gain,
            }));
        self.gains.resize(sums.len() * tiles, [0.0; TILE_ATOMS]);
        self.largest.resize(tiles, [0.0; TILE_ATOMS]);
        let products = &self.products[slot * tiles..][..sums.len() * tiles];
        let units = &codebook.atoms.units()[..tiles];
        gains(
            products,
            &self.continued,
            units,
            &codebook.losses,
            &mut self.gains,
            &mut self.largest,
        );
        // The `keep`-th largest of some gains is no larger than that of all; rounding can have moved both.
        let mut most = [f32::NEG_INFINITY; TILE_ATOMS];
        for largest in &self.largest {
            most.iter_mut()
                .zip(largest)
                .for_each(|(most, &gain)| *most = larger(gain, *most));
        }
        let least = if keep <= TILE_ATOMS.min(count) {
            nth_largest(&most, keep)
        } else {
            nth_largest(&self.largest.as_flattened()[..count], keep)
        };
        let deviations = slots.map(|slot| self.residuals.deviation(slot));
        let margin = MARGIN * deviations.fold(0.0, f32::max);
        self.atoms.clear();
        at_least(
            &self.largest.as_flattened()[..count],
            least - margin,
            &mut self.atoms,
        );
        self.found.clear();
        let (all, width) = (self.gains.as_flattened(), tiles * TILE_ATOMS);
        for &atom in &self.atoms {
            let own = all[atom as usize..].iter().step_by(width);
            for (sum, &gain) in own.enumerate() {
                if gain >= least - margin {
                    let sum = sum as u32;
                    self.found.push(Found { gain, sum, atom });
                }
            }
        }
        if self.found.len() > keep {
            self.found.sort_unstable_by(Found::larger_first);
            let least = self.found[keep - 1].gain;
            let enough = self
                .found
                .partition_point(|found| found.gain >= least - margin);
            self.found.truncate(enough);
        }
        if self.found.is_empty() {
            // Atoms of such lengths that nothing can be said of any.
            self.found.push(Found {
                gain: 0.0,
                sum: 0,
                atom: 0,
            });
        }
    }
}

/// The `n`-th largest of some numbers, −∞ where there are fewer.
fn nth_largest(numbers: &[f32], n: usize) -> f32 {
    if n > numbers.len() {
        return f32::NEG_INFINITY;
    }
    if numbers.len() > TILE_ATOMS {
        let mut numbers = numbers.to_vec();
        return *numbers
            .select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a))
            .1;
    }
    // Of few numbers, without a branch.
    let as_large = |x: f32| numbers.iter().map(|&y| u32::from(y >= x)).sum::<u32>();
    let enough = |x: f32| {
        if as_large(x) as usize >= n {
            x
        } else {
            f32::NEG_INFINITY
        }
    };
    numbers
        .iter()
        .fold(f32::NEG_INFINITY, |nth, &x| nth.max(enough(x)))
}
