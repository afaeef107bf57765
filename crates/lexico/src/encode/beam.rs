//! One atom a group: a beam search for the sums of atoms nearest to vectors.

use std::cell::RefCell;

use super::EncodedBatch;
use crate::Result;
use crate::dictionary::Codebooks;
use crate::kernels::matmul::{Matrix, multiply};
use crate::kernels::{add_scaled, at_least, raise, square};
use crate::threads::{Rayon, Threads, for_each};

/// Sums that are followed side by side, those of some vectors: each reading of a group serves all of them.
const SUMS: usize = 128;
/// Sums that are followed for every vector where nothing else is asked for.
pub const BEAM_WIDTH: usize = 8;
/// Larger numbers are coded as this one, far beyond what atoms reach, so that squares stay finite.
const LARGEST: f32 = 1e15;

/// Codes of one atom a group, over a [`Codebooks`].
///
/// Group by group every vector's nearest sums so far, as many as the beam is wide, are continued with every atom of
/// the group, and the nearest of all those are kept (beam search, as Babenko & Lempitsky 2014 encode additive
/// quantisation). A beam of 1 is matching pursuit. `O(N·m·b)` a vector for a beam of `b`.
#[derive(Debug)]
pub struct BeamSearch<'d> {
    dictionary: &'d Codebooks,
    /// Half the squared length of every atom.
    half_squares: Vec<f32>,
    sparsity: usize,
    beam: usize,
    unbiased: bool,
}

impl<'d> BeamSearch<'d> {
    /// Codes of `sparsity` atoms, one of each of the first `sparsity` groups.
    ///
    /// # Errors
    /// [`Error::CodebookSizes`](crate::Error::CodebookSizes) unless `1 ≤ sparsity ≤` the number of groups.
    pub fn new(dictionary: &'d Codebooks, sparsity: usize) -> Result<Self> {
        dictionary.check_sparsity(sparsity)?;
        let atoms = dictionary.dictionary().atoms();
        let atoms = atoms.chunks_exact(dictionary.head_dim());
        Ok(Self {
            dictionary,
            half_squares: atoms.map(|atom| 0.5 * square(atom) as f32).collect(),
            sparsity,
            beam: BEAM_WIDTH,
            unbiased: false,
        })
    }

    /// Follows `beam` sums of every vector, at least one.
    pub fn with_beam(mut self, beam: usize) -> Self {
        self.beam = beam.max(1);
        self
    }

    /// Scales every vector's sum so that `⟨x̂, x⟩ = ‖x‖²`, as far as a factor from 1 to 2 does; see
    /// [`EncodedBatch::unbias`]. Relative errors stay those of the sums alone.
    pub fn unbiased(mut self, unbiased: bool) -> Self {
        self.unbiased = unbiased;
        self
    }

    /// Codes `vectors` `[n, m]`, spread over the current rayon pool: indices are those of the atoms among all
    /// of the dictionary; all coefficients of a vector are its scale, 1 unless it is to be unbiased.
    ///
    /// # Errors
    /// As [`Pursuit::encode`](super::Pursuit::encode).
    pub fn encode(&self, vectors: &[f32]) -> Result<EncodedBatch> {
        self.encode_on(vectors, &Rayon)
    }

    /// As [`BeamSearch::encode`], spread over these threads.
    ///
    /// # Errors
    /// As [`BeamSearch::encode`].
    pub fn encode_on(&self, vectors: &[f32], threads: &dyn Threads) -> Result<EncodedBatch> {
        self.encode_limited(vectors, &|_| self.sparsity, threads)
    }

    /// Codes the vectors of several heads, `[heads, n, m]`, those of each with its own of `sparsities`, and
    /// gives a batch a head.
    ///
    /// # Errors
    /// As [`BeamSearch::encode`].
    ///
    /// # Panics
    /// Where a sparsity is 0 or above the pursuit's, or the vectors are not as many for each head.
    pub fn encode_heads_on(
        &self,
        vectors: &[f32],
        sparsities: &[usize],
        threads: &dyn Threads,
    ) -> Result<Vec<EncodedBatch>> {
        let m = self.dictionary.head_dim();
        let each = super::vectors_a_head(vectors.len() / m, sparsities, self.sparsity);
        let all = self.encode_limited(vectors, &|v| sparsities[v / each], threads)?;
        Ok(all.by_head(sparsities))
    }

    fn encode_limited(
        &self,
        vectors: &[f32],
        limit: &(dyn Fn(usize) -> usize + Sync),
        threads: &dyn Threads,
    ) -> Result<EncodedBatch> {
        let (m, s) = (self.dictionary.head_dim(), self.sparsity);
        super::check_vectors(vectors, m)?;
        let n = vectors.len() / m;
        let mut batch = EncodedBatch {
            sparsity: s,
            lengths: (0..n).map(|v| limit(v) as u16).collect(),
            indices: vec![0; n * s],
            coefficients: vec![0.0; n * s],
            relative_errors: vec![0.0; n],
        };
        let block = (SUMS / self.beam).max(1);
        let found = batch
            .indices
            .chunks_mut(block * s)
            .zip(batch.coefficients.chunks_mut(block * s))
            .zip(batch.lengths.chunks(block))
            .zip(batch.relative_errors.chunks_mut(block));
        for_each(
            threads,
            vectors.chunks(block * m).zip(found),
            |(vectors, (((indices, coefficients), lengths), errors))| {
                SCRATCH.with_borrow_mut(|scratch| {
                    self.search(vectors, lengths, scratch, indices);
                });
                for (v, x) in vectors.chunks_exact(m).enumerate() {
                    let length = usize::from(lengths[v]);
                    let (error, scale) = self.judge(x, &indices[v * s..][..length]);
                    let scale = if self.unbiased { scale } else { 1.0 };
                    coefficients[v * s..][..length].fill(scale);
                    errors[v] = error;
                }
            },
        );
        Ok(batch)
    }

    /// The nearest sums for a block of vectors; `lengths` says after how many groups each ends.
    fn search(&self, vectors: &[f32], lengths: &[u16], scratch: &mut Scratch, indices: &mut [u16]) {
        let (m, s) = (self.dictionary.head_dim(), self.sparsity);
        let groups = self.dictionary.groups();
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
        for group in 0..s {
            let atoms = self.dictionary.group(group);
            let count = atoms.len() / m;
            let half_squares = &self.half_squares[groups.start(group)..][..count];
            correlations.resize(beams.sums.len() * count, 0.0);
            let residuals = Matrix::by_rows(&beams.residuals, beams.sums.len(), m);
            let atoms_across = Matrix::by_rows(atoms, count, m).transposed();
            multiply(correlations, false, residuals, atoms_across);
            next.clear();
            let mut first = 0;
            while first < beams.sums.len() {
                let vector = beams.sums[first].vector;
                let own = beams.sums[first..]
                    .iter()
                    .take_while(|sum| sum.vector == vector)
                    .count();
                let gains = &mut correlations[first * count..][..own * count];
                let last = usize::from(lengths[vector]) == group + 1;
                let keep = if last { 1 } else { self.beam };
                // By how much half the squared distance falls, from that of the vector itself.
                largest.clear();
                largest.resize(count, f32::NEG_INFINITY);
                for (gains, sum) in gains.chunks_exact_mut(count).zip(&beams.sums[first..]) {
                    raise(gains, sum.gain, half_squares, largest);
                }
                best(gains, largest, keep, candidates, ranked);
                for &(gain, candidate) in ranked.iter() {
                    let (parent, atom) = (first + candidate / count, candidate % count);
                    let chosen = &beams.chosen[parent * s..][..s];
                    if last {
                        let out = &mut indices[vector * s..][..s];
                        out.copy_from_slice(chosen);
                        out[group] = (groups.start(group) + atom) as u16;
                        continue;
                    }
                    next.sums.push(Sum { vector, gain });
                    next.chosen.extend_from_slice(chosen);
                    let row = next.chosen.len() - s + group;
                    next.chosen[row] = (groups.start(group) + atom) as u16;
                    let start = next.residuals.len();
                    next.residuals
                        .extend_from_slice(&beams.residuals[parent * m..][..m]);
                    add_scaled(&mut next.residuals[start..], -1.0, &atoms[atom * m..][..m]);
                }
                first += own;
            }
            std::mem::swap(beams, next);
        }
    }

    /// `‖x − x̂‖ / ‖x‖` of the sum `x̂` of atoms, 0 for a zero vector; and `‖x‖² / ⟨x, x̂⟩`, held to what a code's scale
    /// can be.
    fn judge(&self, x: &[f32], indices: &[u16]) -> (f32, f32) {
        let mut rest: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for &i in indices {
            let atom = self.dictionary.dictionary().atom(usize::from(i));
            crate::kernels::subtract_scaled(&mut rest, 1.0, atom);
        }
        let whole = square(x);
        if whole == 0.0 {
            return (0.0, 1.0);
        }
        let along = whole - crate::kernels::dot_mixed(x, &rest);
        let scale = if along > 0.0 { whole / along } else { 1.0 };
        let error = (rest.iter().map(|r| r * r).sum::<f64>() / whole).sqrt();
        // Next to nothing may come back as far more.
        let error = error.min(f64::from(f32::MAX)) as f32;
        (error, scale.clamp(1.0, 2.0) as f32)
    }
}

/// Sums of atoms that are followed, those of one vector next to each other, the nearest first.
#[derive(Default)]
struct Beams {
    sums: Vec<Sum>,
    /// What each leaves of its vector, `[sums, m]`.
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
    /// Of every sum's residual with every atom of a group.
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
    ranked.extend(
        candidates
            .iter()
            .map(|&candidate| (gains[candidate as usize], candidate as usize)),
    );
    let order = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if ranked.len() > keep {
        ranked.select_nth_unstable_by(keep - 1, order);
        ranked.truncate(keep);
    }
    ranked.sort_unstable_by(order);
}
