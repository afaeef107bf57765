//! Orthogonal matching pursuit: a few atoms and their least-squares coefficients for each vector.

mod adaptive;
mod beam;
pub mod oracle;
pub(crate) mod scan;

use std::cell::RefCell;

use crate::dictionary::{Atoms, Dictionary, Extension};
use crate::kernels::dense::{Rows, combine, dots};
use crate::kernels::{add_scaled, at_least, dot, dot_mixed, square, subtract_scaled};
use crate::threads::{Rayon, Threads, for_each};
use crate::{Error, Result};
pub use adaptive::AdaptivePursuit;
pub use beam::{BEAM_WIDTH, BeamSearch};
use scan::{RoundedAtoms, RoundedVectors};

/// Relative residual below which f32 arithmetic has nothing more to find.
const EXACT: f32 = 1e-6;
/// Vectors that are coded side by side: each reading of the dictionary serves all of them.
const BLOCK: usize = 16;
/// An atom whose part outside the span of the support is shorter than this adds nothing but noise.
const DEPENDENT: f32 = 1e-4;

/// Sparse codes of a batch of vectors, as the pursuit finds them: f32 coefficients.
///
/// Vector `v` has `lengths[v]` nonzeros; its indices and coefficients begin at `v · sparsity`,
/// in the order in which the atoms were chosen; the rest of its row is zero.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedBatch {
    /// `s`, the room of a row.
    pub sparsity: usize,
    /// Nonzeros of each vector.
    pub lengths: Vec<u16>,
    /// Atoms, `[n, s]`.
    pub indices: Vec<u16>,
    /// Coefficients, `[n, s]`.
    pub coefficients: Vec<f32>,
    /// `‖x − x̂‖ / ‖x‖` of each vector, 0 for a zero vector.
    pub relative_errors: Vec<f32>,
}

impl EncodedBatch {
    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Whether there are no vectors.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Indices and coefficients of vector `v`.
    ///
    /// # Panics
    /// Where `v` is not below [`EncodedBatch::len`].
    pub fn row(&self, v: usize) -> (&[u16], &[f32]) {
        let start = v * self.sparsity;
        let end = start + usize::from(self.lengths[v]);
        (&self.indices[start..end], &self.coefficients[start..end])
    }

    /// Takes the codes of vectors `[heads, n]` apart, those of each head having at most its own of `sparsities`.
    fn by_head(&self, sparsities: &[usize]) -> Vec<Self> {
        let each = self.len() / sparsities.len().max(1);
        let heads = sparsities.iter().enumerate();
        heads
            .map(|(head, &sparsity)| self.part(head * each, each, sparsity))
            .collect()
    }

    /// The codes of `count` vectors from `first` on, none of which has more than `sparsity` nonzeros.
    fn part(&self, first: usize, count: usize, sparsity: usize) -> Self {
        let rows = first..first + count;
        let narrow = |v: usize| v * self.sparsity..v * self.sparsity + sparsity;
        Self {
            sparsity,
            lengths: self.lengths[rows.clone()].to_vec(),
            indices: rows
                .clone()
                .flat_map(|v| &self.indices[narrow(v)])
                .copied()
                .collect(),
            coefficients: rows
                .clone()
                .flat_map(|v| &self.coefficients[narrow(v)])
                .copied()
                .collect(),
            relative_errors: self.relative_errors[rows].to_vec(),
        }
    }

    /// Scales every vector's coefficients up so that `⟨x̂, x⟩ = ‖x‖²`.
    ///
    /// Least squares gives `⟨x̂, x⟩ = (1 − e²) ‖x‖²` for a relative error `e`: whatever is long in the direction of
    /// `x`, a query that attends to it above all, finds it shorter than it was. Scaled by `1 / (1 − e²)` it finds the
    /// length, at the price of a larger distance `‖x − x̂‖` (the estimator of RaBitQ, Gao & Long 2024, for
    /// sparse codes). Vectors of an error above 0.95 are scaled as those of 0.95; the relative errors stay
    /// those of least squares.
    pub fn unbias(&mut self) {
        const MAX: f32 = 0.95;
        if self.sparsity == 0 {
            return;
        }
        let rows = self.coefficients.chunks_exact_mut(self.sparsity);
        for (row, &error) in rows.zip(&self.relative_errors) {
            let factor = 1.0 / (1.0 - error.min(MAX).powi(2));
            for c in row {
                // A coefficient at f32's limits stays finite.
                *c = (*c * factor).clamp(f32::MIN, f32::MAX);
            }
        }
    }

    /// Puts the code of vector `from` of another batch of this sparsity in the place of that of vector `v`.
    fn replace(&mut self, v: usize, other: &Self, from: usize) {
        let s = self.sparsity;
        let (to, own) = (v * s..(v + 1) * s, from * s..(from + 1) * s);
        self.indices[to.clone()].copy_from_slice(&other.indices[own.clone()]);
        self.coefficients[to].copy_from_slice(&other.coefficients[own]);
        self.lengths[v] = other.lengths[from];
        self.relative_errors[v] = other.relative_errors[from];
    }

    /// Mean of the relative errors, 0 for no vectors.
    pub fn mean_relative_error(&self) -> f32 {
        mean(&self.relative_errors)
    }
}

/// Checks that `vectors` are whole vectors of finite numbers.
pub(crate) fn check_vectors(vectors: &[f32], head_dim: usize) -> Result<()> {
    if !vectors.len().is_multiple_of(head_dim) {
        return Err(Error::VectorLength {
            found: vectors.len(),
            head_dim,
        });
    }
    let finite = |x: &[f32]| x.iter().all(|v| v.is_finite());
    match vectors.chunks_exact(head_dim).position(|x| !finite(x)) {
        Some(row) => Err(Error::NotFinite { row }),
        None => Ok(()),
    }
}

/// How many of `n` vectors each head has.
///
/// # Panics
/// Where a sparsity is 0 or above `most`, or the vectors are not as many for each head.
pub(crate) fn vectors_a_head(n: usize, sparsities: &[usize], most: usize) -> usize {
    let possible = sparsities.iter().all(|s| (1..=most).contains(s));
    assert!(possible, "sparsities that the pursuit allows");
    let each = n / sparsities.len().max(1);
    assert_eq!(each * sparsities.len(), n, "as many vectors for each head");
    each
}

pub(crate) fn mean(numbers: &[f32]) -> f32 {
    let sum: f64 = numbers.iter().map(|&x| f64::from(x)).sum();
    // A sum of nothing is −0.
    (sum / numbers.len().max(1) as f64 + 0.0) as f32
}

/// Orthogonal matching pursuit over one dictionary, and what a session may have added to it (Pati, Rezaiifar,
/// Krishnaprasad 1993).
///
/// Each step picks the atom of largest correlation with the residual and orthonormalises it
/// against the support. Correlations are looked over in 8-bit integers and the few that may be the
/// largest computed exactly, so that the choice is that of exact arithmetic and no Gram matrix of
/// `N²` numbers is needed: `O(s·N·m)` a vector, on the widest integer products that the processor has. Added
/// atoms are few and kept in f16 only: all their correlations are computed.
#[derive(Debug)]
pub struct Pursuit<'d> {
    atoms: Atoms<'d>,
    sparsity: usize,
    tolerance: f32,
}

impl<'d> Pursuit<'d> {
    /// At most `sparsity` atoms a vector.
    ///
    /// # Errors
    /// [`Error::Sparsity`] unless `1 ≤ sparsity ≤ min(m, N)`.
    pub fn new(dictionary: &'d Dictionary, sparsity: usize) -> Result<Self> {
        dictionary.check_sparsity(sparsity)?;
        Ok(Self {
            atoms: dictionary.into(),
            sparsity,
            tolerance: 0.0,
        })
    }

    /// Stops early where the residual is at most `tolerance · ‖x‖`; 0 stops only where f32 arithmetic
    /// has nothing more to find, at a relative residual of 1e-6.
    ///
    /// # Errors
    /// [`Error::Tolerance`] unless `0 ≤ tolerance < 1`.
    pub fn with_tolerance(mut self, tolerance: f32) -> Result<Self> {
        if !(0.0..1.0).contains(&tolerance) {
            return Err(Error::Tolerance(tolerance));
        }
        self.tolerance = tolerance;
        Ok(self)
    }

    /// The same over the dictionary and what a session has added to it.
    ///
    /// # Panics
    /// As [`Atoms::extended`].
    pub fn over<'a>(&'a self, extension: &'a Extension) -> Pursuit<'a> {
        Pursuit {
            atoms: Atoms::extended(self.atoms.dictionary(), extension),
            ..*self
        }
    }

    /// Codes `vectors` `[n, m]`, spread over the current rayon pool.
    ///
    /// # Errors
    /// [`Error::VectorLength`] where the numbers do not fill whole vectors,
    /// [`Error::NotFinite`] where one holds a NaN or an infinity.
    pub fn encode(&self, vectors: &[f32]) -> Result<EncodedBatch> {
        self.encode_on(vectors, &Rayon)
    }

    /// Codes `vectors` `[n, m]`, spread over `threads`.
    ///
    /// # Errors
    /// As [`Pursuit::encode`].
    pub fn encode_on(&self, vectors: &[f32], threads: &dyn Threads) -> Result<EncodedBatch> {
        self.encode_limited(vectors, &|_| self.sparsity, threads)
    }

    /// Codes the vectors of several heads, `[heads, n, m]`, those of each with at most its own of `sparsities`, and
    /// gives a batch a head. Each reading of the dictionary serves vectors of all heads.
    ///
    /// # Errors
    /// As [`Pursuit::encode`].
    ///
    /// # Panics
    /// Where a sparsity is 0 or above the pursuit's, or the vectors are not as many for each head.
    pub fn encode_heads_on(
        &self,
        vectors: &[f32],
        sparsities: &[usize],
        threads: &dyn Threads,
    ) -> Result<Vec<EncodedBatch>> {
        let n = vectors.len() / self.atoms.head_dim();
        let each = vectors_a_head(n, sparsities, self.sparsity);
        let all = self.encode_limited(vectors, &|v| sparsities[v / each], threads)?;
        Ok(all.by_head(sparsities))
    }

    /// Codes every vector with at most the atoms that `limit` says for its number.
    fn encode_limited(
        &self,
        vectors: &[f32],
        limit: &(dyn Fn(usize) -> usize + Sync),
        threads: &dyn Threads,
    ) -> Result<EncodedBatch> {
        let (m, s) = (self.atoms.head_dim(), self.sparsity);
        check_vectors(vectors, m)?;
        let n = vectors.len() / m;
        let mut batch = EncodedBatch {
            sparsity: s,
            lengths: vec![0; n],
            indices: vec![0; n * s],
            coefficients: vec![0.0; n * s],
            relative_errors: vec![0.0; n],
        };
        let found = batch
            .indices
            .chunks_mut(BLOCK * s)
            .zip(batch.coefficients.chunks_mut(BLOCK * s))
            .zip(batch.lengths.chunks_mut(BLOCK))
            .zip(batch.relative_errors.chunks_mut(BLOCK))
            .map(
                |(((indices, coefficients), lengths), relative_errors)| Found {
                    indices,
                    coefficients,
                    lengths,
                    relative_errors,
                },
            );
        for_each(
            threads,
            vectors.chunks(BLOCK * m).zip(found).enumerate(),
            |(block, (vectors, found))| {
                WORKSPACE.with_borrow_mut(|workspace| {
                    workspace.make_room(self, vectors.len() / m);
                    let limit = |v| limit(block * BLOCK + v);
                    self.encode_block(vectors, &limit, workspace, found);
                });
            },
        );
        Ok(batch)
    }

    /// Codes a block of finite vectors in lockstep: step `k` chooses atom `k` of each.
    fn encode_block(
        &self,
        vectors: &[f32],
        limit: &dyn Fn(usize) -> usize,
        workspace: &mut Workspace,
        found: Found<'_>,
    ) {
        let (m, s) = (self.atoms.head_dim(), self.sparsity);
        let rounded_atoms = self.atoms.dictionary().rounded();
        let room = rounded_atoms.room();
        let Workspace {
            residuals,
            rounded,
            correlations,
            directions,
            triangles,
            weights,
            corrections,
            exact,
            states,
            active,
            candidates,
            along,
            added,
            widened,
        } = workspace;
        states.clear();
        for (v, (x, residual)) in vectors.chunks(m).zip(residuals.chunks_mut(m)).enumerate() {
            // Powers of two scale exactly: huge and tiny vectors take the same path as any other.
            let exponent = binary_exponent(x).unwrap_or(0);
            scale_by_power(x, -exponent, residual);
            let whole = square(residual).sqrt() as f32;
            states.push(State {
                exponent,
                limit: limit(v),
                whole,
                rest: whole,
            });
            found.lengths[v] = 0;
        }
        active.clear();
        active.extend((0..states.len()).filter(|&v| states[v].whole > 0.0));
        for step in 0..s {
            active.retain(|&v| {
                let state = &states[v];
                step < state.limit && state.rest > self.tolerance.max(EXACT) * state.whole
            });
            if active.is_empty() {
                break;
            }
            for (slot, &v) in active.iter().enumerate() {
                rounded_atoms.round(&residuals[v * m..(v + 1) * m], slot, rounded);
            }
            rounded_atoms.scan(rounded, active.len(), correlations);
            let mut slot = 0;
            active.retain(|&v| {
                let looked_over = &correlations[slot * room..][..room];
                candidates.clear();
                at_least(looked_over, rounded.enough(slot), candidates);
                let state = &mut states[v];
                let residual = &mut residuals[v * m..(v + 1) * m];
                let chosen = &found.indices[v * s..v * s + step];
                let scanned = (&*rounded, slot);
                let best = self.choose(candidates, looked_over, scanned, residual, chosen);
                let (atom, correlation) = self.choose_added(best, residual, chosen, added);
                slot += 1;
                if correlation <= EXACT * state.whole {
                    return false;
                }
                let (earlier, rest) = directions[v * s * m..].split_at_mut(step * m);
                let direction = &mut rest[..m];
                direction.copy_from_slice(self.atoms.atom(atom, widened));
                let row = &mut triangles[(v * s + step) * s..][..step + 1];
                let outside = orthonormalise(direction, earlier, row, along);
                if outside <= DEPENDENT {
                    return false;
                }
                row[step] = outside;
                found.indices[v * s + step] = atom as u16;
                found.lengths[v] += 1;
                let weight = dot(direction, residual);
                weights[v * s + step] = weight;
                add_scaled(residual, -weight, direction);
                state.rest = square(residual).sqrt() as f32;
                true
            });
        }
        for (v, state) in states.iter().enumerate() {
            let length = usize::from(found.lengths[v]);
            let indices = &found.indices[v * s..][..length];
            let coefficients = &mut found.coefficients[v * s..][..length];
            let triangle = &triangles[v * s * s..(v + 1) * s * s];
            let directions = &directions[v * s * m..][..length * m];
            let weights = &mut weights[v * s..][..length];
            solve(triangle, s, weights, coefficients);
            // One step of iterative refinement, residuals in f64: an ill-conditioned support would
            // else magnify the rounding of its directions.
            let x = &mut residuals[v * m..(v + 1) * m];
            scale_by_power(&vectors[v * m..(v + 1) * m], -state.exponent, x);
            self.residual(x, indices, coefficients, exact, widened);
            for (weight, direction) in weights.iter_mut().zip(directions.chunks_exact(m)) {
                *weight = dot_mixed(direction, exact) as f32;
            }
            let corrections = &mut corrections[..length];
            solve(triangle, s, weights, corrections);
            for (c, correction) in coefficients.iter_mut().zip(corrections) {
                *c += *correction;
            }
            self.residual(x, indices, coefficients, exact, widened);
            let rest = exact.iter().map(|r| r * r).sum::<f64>().sqrt() as f32;
            found.relative_errors[v] = rest / state.whole.max(f32::MIN_POSITIVE);
            for c in coefficients {
                *c = scale_one(*c, state.exponent);
            }
        }
    }

    /// `x − Σ c_j · D[i_j]`, in f64.
    fn residual(
        &self,
        x: &[f32],
        indices: &[u16],
        coefficients: &[f32],
        out: &mut [f64],
        widened: &mut Vec<f32>,
    ) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = f64::from(x);
        }
        for (&i, &c) in indices.iter().zip(coefficients) {
            let atom = self.atoms.atom(usize::from(i), widened);
            subtract_scaled(out, c, atom);
        }
    }

    /// The atom of largest correlation with a residual, and that correlation's magnitude, among
    /// those of the `candidates` that are not `chosen` already; `looked_over` has their rounded
    /// correlations with the residual, number `slot` of `rounded`.
    fn choose(
        &self,
        candidates: &mut [u32],
        looked_over: &[f32],
        (rounded, slot): (&RoundedVectors, usize),
        residual: &[f32],
        chosen: &[u16],
    ) -> (usize, f32) {
        // The likeliest first: what it is exactly rules most of the others out.
        let likeliness = |candidate: u32| looked_over[candidate as usize];
        let by_likeliness = |&a: &usize, &b: &usize| {
            likeliness(candidates[a]).total_cmp(&likeliness(candidates[b]))
        };
        let likeliest = (0..candidates.len()).max_by(by_likeliness);
        if let Some(likeliest) = likeliest {
            candidates.swap(0, likeliest);
        }
        let dictionary = self.atoms.dictionary();
        let mut best = (0, 0.0);
        for &candidate in candidates.iter() {
            if rounded.at_most(slot, likeliness(candidate)) < best.1 {
                continue;
            }
            for atom in RoundedAtoms::atoms_of(candidate) {
                // Rounding must not bring a chosen atom back.
                if atom >= dictionary.len() || chosen.contains(&(atom as u16)) {
                    continue;
                }
                let exact = dot(dictionary.atom(atom), residual).abs();
                if exact > best.1 || (exact == best.1 && atom < best.0) {
                    best = (atom, exact);
                }
            }
        }
        best
    }

    /// `best`, or the added atom not `chosen` already that correlates more with a residual.
    fn choose_added(
        &self,
        mut best: (usize, f32),
        residual: &[f32],
        chosen: &[u16],
        correlations: &mut Vec<f32>,
    ) -> (usize, f32) {
        let first = self.atoms.dictionary().len();
        let count = self.atoms.len() - first;
        if count == 0 {
            return best;
        }
        correlations.resize(count, 0.0);
        dots(
            self.atoms.added(),
            residual,
            residual.len(),
            1,
            correlations,
        );
        for (i, correlation) in correlations.iter().enumerate() {
            let (atom, magnitude) = (first + i, correlation.abs());
            if magnitude > best.1 && !chosen.contains(&(atom as u16)) {
                best = (atom, magnitude);
            }
        }
        best
    }
}

/// Where a block's codes go.
struct Found<'a> {
    indices: &'a mut [u16],
    coefficients: &'a mut [f32],
    lengths: &'a mut [u16],
    relative_errors: &'a mut [f32],
}

/// How far one vector of a block has come.
struct State {
    /// The vector was scaled by `2^-exponent`.
    exponent: i32,
    /// The most atoms that it may have.
    limit: usize,
    /// Norm of the scaled vector.
    whole: f32,
    /// Norm of its residual.
    rest: f32,
}

/// Scratch memory of one thread, for a block of `b` vectors at a time.
#[derive(Default)]
struct Workspace {
    /// `[b, m]`
    residuals: Vec<f32>,
    /// The residuals in 8 bits.
    rounded: RoundedVectors,
    /// Rounded ones of every atom with each active residual, `[b, N]`.
    correlations: Vec<f32>,
    /// The orthonormalised supports, `[b, s, m]`.
    directions: Vec<f32>,
    /// Row `k` writes atom `k` of a support in its first `k + 1` directions, `[b, s, s]`.
    triangles: Vec<f32>,
    /// Each vector in its directions, `[b, s]`.
    weights: Vec<f32>,
    /// Of one vector's coefficients, `[s]`.
    corrections: Vec<f32>,
    /// One vector's residual, `[m]`.
    exact: Vec<f64>,
    states: Vec<State>,
    /// The vectors whose pursuit goes on.
    active: Vec<usize>,
    /// Which atoms may correlate most with one residual.
    candidates: Vec<u32>,
    /// Parts of one atom along the directions before it.
    along: Vec<f32>,
    /// Correlations of the added atoms with one residual.
    added: Vec<f32>,
    /// One added atom, `[m]`.
    widened: Vec<f32>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

impl Workspace {
    /// Room for a block of `b` vectors; what is there is of no meaning.
    fn make_room(&mut self, pursuit: &Pursuit<'_>, b: usize) {
        let m = pursuit.atoms.head_dim();
        let s = pursuit.sparsity;
        let room = |numbers: &mut Vec<f32>, count: usize| {
            numbers.resize(numbers.len().max(count), 0.0);
        };
        room(&mut self.residuals, b * m);
        room(
            &mut self.correlations,
            b * pursuit.atoms.dictionary().rounded().room(),
        );
        room(&mut self.directions, b * s * m);
        room(&mut self.triangles, b * s * s);
        room(&mut self.weights, b * s);
        room(&mut self.corrections, s);
        self.exact.resize(m, 0.0);
    }
}

/// Makes `x` a unit vector orthogonal to the orthonormal rows of `basis`, adds its parts along
/// them to `parts` (set to zero first), and returns the length of what was outside their span.
fn orthonormalise(x: &mut [f32], basis: &[f32], parts: &mut [f32], along: &mut Vec<f32>) -> f32 {
    let m = x.len();
    parts.fill(0.0);
    along.resize(basis.len() / m, 0.0);
    // Twice is enough (Giraud, Langou, Rozložník 2005): once loses orthogonality in f32.
    for _ in 0..2 {
        dots(Rows::F32(basis), x, m, 1, along);
        for (part, along) in parts.iter_mut().zip(along.iter_mut()) {
            *part += *along;
            *along = -*along;
        }
        combine(along, Rows::F32(basis), m, 1, x);
    }
    let outside = square(x).sqrt() as f32;
    if outside > DEPENDENT {
        x.iter_mut().for_each(|v| *v /= outside);
    }
    outside
}

/// Coefficients of the atoms from the weights of the directions: back substitution.
fn solve(triangle: &[f32], stride: usize, weights: &[f32], coefficients: &mut [f32]) {
    for k in (0..weights.len()).rev() {
        let mut value = f64::from(weights[k]);
        for later in k + 1..weights.len() {
            value -= f64::from(triangle[later * stride + k]) * f64::from(coefficients[later]);
        }
        coefficients[k] = (value / f64::from(triangle[k * stride + k])) as f32;
    }
}

/// `e` such that the largest magnitude in `x` is in `[2^e, 2^(e+1))`; `None` for a zero vector.
fn binary_exponent(x: &[f32]) -> Option<i32> {
    let largest = x.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    // In f64 every f32 is a normal number, so its exponent field is exact.
    (largest > 0.0).then(|| ((f64::from(largest).to_bits() >> 52) as i32) - 1023)
}

fn scale_by_power(x: &[f32], exponent: i32, out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = scale_one(x, exponent);
    }
}

/// `x · 2^exponent`, held at the largest finite number rather than overflowing.
fn scale_one(x: f32, exponent: i32) -> f32 {
    let scaled = f64::from(x) * 2f64.powi(exponent);
    scaled.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}
