use std::cell::RefCell;

use super::{BlockMut, EncodedBatch, Encoder, Fit, encode_in_blocks};
use crate::Result;
use crate::dictionary::Codebooks;
use crate::kernels::matmul::{Matrix, multiply};
use crate::kernels::scan::at_least;
use crate::kernels::vector::{add_scaled, dot_mixed, raise, square, subtract_scaled};
use crate::threads::Threads;

/// Fewest and most sums that are followed side by side, those of some vectors: each reading of a codebook serves all of
/// them, and is laid out anew for them.
const SUMS: (usize, usize) = (128, 512);
/// Correlations with the first codebook's atoms that stay in a core's cache.
const CORRELATIONS: usize = 1 << 17;
/// Blocks that vectors are at least cut into, as far as blocks are large enough, so that threads share them.
const BLOCKS: usize = 8;
/// Sums that are followed for every vector where nothing else is asked for.
pub const BEAM_WIDTH: usize = 8;
/// Larger numbers are coded as this one, far beyond what atoms reach, so that squares stay finite.
const LARGEST: f32 = 1e15;

/// The largest scale that additive codes have.
const MAX_SCALE: f64 = 2.0;

/// Beam search for additive codes, one atom of each of the first [`Codebooks`].
///
/// Codebook by codebook every vector's nearest sums so far, as many as the beam is wide, are continued with every atom
/// of the codebook, and the nearest of all those are kept (beam search, as Babenko & Lempitsky 2014 encode additive
/// quantisation). A beam of width 1 is matching pursuit. `O(N·m·b)` a vector for a beam of width `b`.
#[derive(Debug)]
pub struct BeamSearch<'d> {
    codebooks: &'d Codebooks,
    /// Half the squared length of every atom.
    half_squares: Vec<f32>,
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
        let atoms = codebooks.atoms().chunks_exact(codebooks.head_dim());
        Ok(Self {
            codebooks,
            half_squares: atoms.map(|atom| 0.5 * square(atom) as f32).collect(),
            sparsity,
            beam_width: BEAM_WIDTH,
            fit: Fit::default(),
        })
    }

    /// Follows `width` sums of every vector, at least one.
    #[must_use]
    pub fn with_beam_width(mut self, width: usize) -> Self {
        self.beam_width = width.max(1);
        self
    }

    /// Sets the length of what codes stand for, as far as a scale from 1 to 2 does. Relative errors stay those of the
    /// sums alone.
    #[must_use]
    pub fn with_fit(mut self, fit: Fit) -> Self {
        self.fit = fit;
        self
    }

    /// Returns how many of `n` vectors are searched for side by side.
    fn block(&self, n: usize) -> usize {
        let of_sums = |sums: usize| (sums / self.beam_width).max(1);
        let first = self.codebooks.sizes().size(0);
        let least = of_sums(SUMS.0);
        let most = of_sums(SUMS.1).min(CORRELATIONS / first).max(least);
        n.div_ceil(BLOCKS).clamp(least, most)
    }

    /// Finds the nearest sums for a block of vectors; `lengths` says after how many codebooks each ends.
    fn search(&self, vectors: &[f32], lengths: &[u16], scratch: &mut Scratch, indices: &mut [u16]) {
        let (m, s) = (self.codebooks.head_dim(), self.sparsity);
        let sizes = self.codebooks.sizes();
        let Scratch {
            beams,
            next,
            correlations,
            largest,
            candidates,
            ranked,
        } = scratch;
        beams.clear();
        for (v, x) in vectors.chunks_exact(m).enumerate() {
            beams
                .residuals
                .extend(x.iter().map(|x| x.clamp(-LARGEST, LARGEST)));
            beams.sums.push(Sum {
                vector: v,
                gain: 0.0,
            });
            beams.chosen.resize(beams.chosen.len() + s, 0);
        }
        for codebook in 0..s {
            let atoms = self.codebooks.codebook(codebook);
            let count = atoms.len() / m;
            let half_squares = &self.half_squares[sizes.start(codebook)..][..count];
            correlations.resize(beams.sums.len() * count, 0.0);
            let residuals = Matrix::by_rows(&beams.residuals, beams.sums.len(), m);
            let atoms_across = Matrix::by_rows(atoms, count, m).transposed();
            multiply(correlations, false, residuals, atoms_across);
            next.clear();
            let mut first = 0;
            for own in beams.sums.chunk_by(|a, b| a.vector == b.vector) {
                let vector = own[0].vector;
                let gains = &mut correlations[first * count..][..own.len() * count];
                let last = usize::from(lengths[vector]) == codebook + 1;
                let keep = if last { 1 } else { self.beam_width };
                // By how much half the squared distance falls, from that of the vector itself.
                largest.clear();
                largest.resize(count, f32::NEG_INFINITY);
                for (gains, sum) in gains.chunks_exact_mut(count).zip(own) {
                    raise(gains, sum.gain, half_squares, largest);
                }
                best(gains, largest, keep, candidates, ranked);
                for &(gain, candidate) in ranked.iter() {
                    let (parent, atom) = (first + candidate / count, candidate % count);
                    let chosen = &beams.chosen[parent * s..][..s];
                    if last {
                        let out = &mut indices[vector * s..][..s];
                        out.copy_from_slice(chosen);
                        out[codebook] = (sizes.start(codebook) + atom) as u16;
                        continue;
                    }
                    next.sums.push(Sum { vector, gain });
                    next.chosen.extend_from_slice(chosen);
                    let row = next.chosen.len() - s + codebook;
                    next.chosen[row] = (sizes.start(codebook) + atom) as u16;
                    let start = next.residuals.len();
                    next.residuals
                        .extend_from_slice(&beams.residuals[parent * m..][..m]);
                    add_scaled(&mut next.residuals[start..], -1.0, &atoms[atom * m..][..m]);
                }
                first += own.len();
            }
            std::mem::swap(beams, next);
        }
    }

    /// Returns `‖x − x̂‖ / ‖x‖` of the sum `x̂` of atoms, 0 for a zero vector, and the code's scale.
    fn judge(&self, x: &[f32], indices: &[u16]) -> (f32, f32) {
        let mut rest: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for &i in indices {
            subtract_scaled(&mut rest, 1.0, self.codebooks.atom(usize::from(i)));
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
        let block = self.block(vectors.len() / m);
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
        encode_in_blocks(self, vectors, sparsities, block, threads, encode_block)
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
}

/// Scratch memory of one thread.
#[derive(Default)]
struct Scratch {
    beams: Beams,
    next: Beams,
    /// Correlations of every sum's residual with every atom of a codebook.
    correlations: Vec<f32>,
    /// The largest gain with each atom.
    largest: Vec<f32>,
    candidates: Vec<u32>,
    ranked: Vec<(f32, usize)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The `keep` largest of `gains` `[sums, atoms]`, the largest first, the first of equals; `largest` has the
/// largest of each atom.
fn best(
    gains: &[f32],
    largest: &[f32],
    keep: usize,
    candidates: &mut Vec<u32>,
    ranked: &mut Vec<(f32, usize)>,
) {
    // Each of `keep` parts of the atoms has one that is at least the least of the parts' largest.
    let part = (largest.len() / keep).max(1);
    let enough = largest
        .chunks_exact(part)
        .take(keep)
        .map(|part| part.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)))
        .fold(f32::INFINITY, f32::min);
    let enough = if keep > largest.len() {
        f32::NEG_INFINITY
    } else {
        enough
    };
    candidates.clear();
    at_least(gains, enough, candidates);
    ranked.clear();
    let gain = |&candidate: &u32| (gains[candidate as usize], candidate as usize);
    ranked.extend(candidates.iter().map(gain));
    let order = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if ranked.len() > keep {
        ranked.select_nth_unstable_by(keep - 1, order);
        ranked.truncate(keep);
    }
    ranked.sort_unstable_by(order);
}
