use std::cell::RefCell;

use super::{BlockMut, EncodedBatch, Encoder, Fit, encode_in_blocks};
use crate::dictionary::Dictionary;
use crate::kernels::dense::{combine, dots};
use crate::kernels::rows::Rows;
use crate::kernels::scan::{RoundedAtoms, RoundedVectors, at_least};
use crate::kernels::vector::{add_scaled, dot, dot_mixed, square};
use crate::threads::Threads;
use crate::{Error, Result};

/// Relative residual below which f32 arithmetic has nothing more to find.
const EXACT: f32 = 1e-6;
/// Vectors that are coded side by side: each reading of the dictionary serves all of them.
const BLOCK: usize = 16;
/// An atom whose part outside the span of the support is shorter than this adds nothing but noise.
const DEPENDENT: f32 = 1e-4;
/// Vectors of a larger relative error are scaled as those of this one.
const MAX_SCALED_ERROR: f32 = 0.95;

/// Orthogonal matching pursuit over one dictionary (Pati, Rezaiifar, Krishnaprasad 1993): sparse codes of any atoms
/// with coefficients.
///
/// Each step picks the atom of largest correlation with the residual and orthonormalises it
/// against the support. Correlations are looked over in 8-bit integers and the few that may be the
/// largest computed exactly, so that the choice is that of exact arithmetic and no Gram matrix of
/// `N²` numbers is needed: `O(s·N·m)` a vector, on the widest integer products that the processor has.
#[derive(Debug)]
pub struct Pursuit<'d> {
    dictionary: &'d Dictionary,
    sparsity: usize,
    tolerance: f32,
    fit: Fit,
}

impl<'d> Pursuit<'d> {
    /// Makes a pursuit of up to `sparsity` atoms a vector.
    ///
    /// # Errors
    /// [`Error::Sparsity`] unless `1 ≤ sparsity ≤ min(m, N)`.
    pub fn new(dictionary: &'d Dictionary, sparsity: usize) -> Result<Self> {
        dictionary.check_sparsity(sparsity)?;
        Ok(Self {
            dictionary,
            sparsity,
            tolerance: 0.0,
            fit: Fit::default(),
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

    /// Sets the length of what codes stand for. Relative errors stay those of least squares.
    #[must_use]
    pub fn with_fit(mut self, fit: Fit) -> Self {
        self.fit = fit;
        self
    }

    /// Codes a block of finite vectors in lockstep: step `k` chooses atom `k` of each.
    fn encode_block(&self, vectors: &[f32], workspace: &mut Workspace, found: BlockMut<'_>) {
        let (m, s) = (self.dictionary.head_dim(), self.sparsity);
        let rounded_atoms = self.dictionary.rounded();
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
        } = workspace;
        states.clear();
        for (v, (x, residual)) in vectors.chunks(m).zip(residuals.chunks_mut(m)).enumerate() {
            // Powers of two scale exactly: huge and tiny vectors take the same path as any other.
            let exponent = binary_exponent(x).unwrap_or(0);
            scale_by_power(x, -exponent, residual);
            let whole = square(residual).sqrt() as f32;
            states.push(State {
                exponent,
                limit: usize::from(found.lengths[v]),
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
                let (atom, correlation) =
                    self.choose(candidates, looked_over, scanned, residual, chosen);
                slot += 1;
                if correlation <= EXACT * state.whole {
                    return false;
                }
                let (earlier, rest) = directions[v * s * m..].split_at_mut(step * m);
                let direction = &mut rest[..m];
                self.dictionary.row(atom).widen_to(m, direction);
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
            self.residual(x, indices, coefficients, exact);
            for (weight, direction) in weights.iter_mut().zip(directions.chunks_exact(m)) {
                *weight = dot_mixed(direction, exact) as f32;
            }
            let corrections = &mut corrections[..length];
            solve(triangle, s, weights, corrections);
            for (c, correction) in coefficients.iter_mut().zip(corrections) {
                *c += *correction;
            }
            self.residual(x, indices, coefficients, exact);
            let rest = exact.iter().map(|r| r * r).sum::<f64>().sqrt() as f32;
            found.relative_errors[v] = rest / state.whole.max(f32::MIN_POSITIVE);
            let error = found.relative_errors[v].min(MAX_SCALED_ERROR);
            let unbiased = f64::from(1.0 / (1.0 - error.powi(2)));
            let scale = self.fit.scale(unbiased, f64::INFINITY) as f32;
            for c in coefficients {
                // A coefficient at f32's limits stays finite.
                *c = (scale_one(*c, state.exponent) * scale).clamp(f32::MIN, f32::MAX);
            }
        }
    }

    /// `x − Σ c_j · D[i_j]`, in f64.
    fn residual(&self, x: &[f32], indices: &[u16], coefficients: &[f32], out: &mut [f64]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = f64::from(x);
        }
        for (&i, &c) in indices.iter().zip(coefficients) {
            self.dictionary
                .row(usize::from(i))
                .subtract_scaled_from(c, out);
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
        let dictionary = self.dictionary;
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
                let exact = dictionary.row(atom).dot(residual).abs();
                if exact > best.1 || (exact == best.1 && atom < best.0) {
                    best = (atom, exact);
                }
            }
        }
        best
    }
}

impl Encoder for Pursuit<'_> {
    fn head_dim(&self) -> usize {
        self.dictionary.head_dim()
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
        let encode_block = |vectors: &[f32], block: BlockMut<'_>| {
            WORKSPACE.with_borrow_mut(|workspace| {
                workspace.make_room(self, block.lengths.len());
                self.encode_block(vectors, workspace, block);
            });
        };
        encode_in_blocks(self, vectors, sparsities, BLOCK, threads, encode_block)
    }
}

/// The progress of one vector of a block.
struct State {
    /// The vector was scaled by `2^-exponent`.
    exponent: i32,
    /// Max atoms that it may have.
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
    /// Corrections of one vector's coefficients, `[s]`.
    corrections: Vec<f32>,
    /// One vector's residual, `[m]`.
    exact: Vec<f64>,
    states: Vec<State>,
    /// The vectors whose pursuit goes on.
    active: Vec<usize>,
    /// Atoms that may be the one of largest correlation with a residual.
    candidates: Vec<u32>,
    /// Parts of one atom along the directions before it.
    along: Vec<f32>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

impl Workspace {
    /// Room for a block of `b` vectors; what is there is of no meaning.
    fn make_room(&mut self, pursuit: &Pursuit<'_>, b: usize) {
        let m = pursuit.head_dim();
        let s = pursuit.sparsity;
        let room = |numbers: &mut Vec<f32>, count: usize| {
            numbers.resize(numbers.len().max(count), 0.0);
        };
        room(&mut self.residuals, b * m);
        room(
            &mut self.correlations,
            b * pursuit.dictionary.rounded().room(),
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
