//! Orthogonal matching pursuit: a few atoms and their least-squares coefficients for each vector.

pub mod oracle;

use rayon::prelude::*;

use crate::arch::matmul::{Matrix, Threads, multiply};
use crate::arch::{add_scaled, correlate, dot, subtract_and_peak};
use crate::dictionary::{Dictionary, norm};
use crate::{Error, Result};

/// Relative residual below which f32 arithmetic has nothing more to find.
const EXACT: f32 = 1e-6;
/// An atom whose part outside the span of the support is shorter than this adds nothing but noise.
const DEPENDENT: f32 = 1e-4;

/// Sparse codes of a batch of vectors, as the pursuit finds them: f32 coefficients.
///
/// Vector `v` has `lengths[v]` nonzeros; its indices and coefficients begin at `v · sparsity`,
/// in the order in which the atoms were chosen; the rest of its row is zero.
#[derive(Debug, Clone, PartialEq)]
pub struct SparseBatch {
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

impl SparseBatch {
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
    /// Where `v` is not below [`SparseBatch::len`].
    pub fn row(&self, v: usize) -> (&[u16], &[f32]) {
        let start = v * self.sparsity;
        let end = start + usize::from(self.lengths[v]);
        (&self.indices[start..end], &self.coefficients[start..end])
    }

    /// Mean of the relative errors, 0 for no vectors.
    pub fn mean_relative_error(&self) -> f32 {
        mean(&self.relative_errors)
    }
}

pub(crate) fn mean(numbers: &[f32]) -> f32 {
    let sum: f64 = numbers.iter().map(|&x| f64::from(x)).sum();
    (sum / numbers.len().max(1) as f64) as f32
}

/// Orthogonal matching pursuit over one dictionary (Pati, Rezaiifar, Krishnaprasad 1993).
///
/// Each step picks the atom of largest correlation with the residual and orthonormalises it
/// against the support; correlations with all atoms are carried along by subtracting the
/// projection of every atom on the new direction, so that no residual is ever correlated again.
/// Those projections cost `O(N·m)` a step, or, with the Gram matrix `DDᵀ`, `O(N·k)` at step `k`
/// (Zhu et al. 2020, variant v0).
#[derive(Debug)]
pub struct Pursuit<'d> {
    dictionary: &'d Dictionary,
    sparsity: usize,
    tolerance: f32,
    /// `DDᵀ`, `[N, N]`, where it was asked for.
    gram: Option<Vec<f32>>,
}

impl<'d> Pursuit<'d> {
    /// At most `sparsity` atoms a vector.
    ///
    /// # Errors
    /// [`Error::Sparsity`] unless `1 ≤ sparsity ≤ min(m, N)`.
    pub fn new(dictionary: &'d Dictionary, sparsity: usize) -> Result<Self> {
        dictionary.check_sparsity(sparsity)?;
        Ok(Self {
            dictionary,
            sparsity,
            tolerance: 0.0,
            gram: None,
        })
    }

    /// Stops early where the residual is at most `tolerance · ‖x‖`; 0 never stops early.
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

    /// Computes the Gram matrix first: `4·N²` bytes and `N²·m` multiply-adds, which pay where
    /// many vectors follow.
    pub fn with_gram(mut self) -> Self {
        let (n, m) = (self.dictionary.len(), self.dictionary.head_dim());
        let atoms = Matrix::by_rows(self.dictionary.atoms(), n, m);
        let mut gram = vec![0.0; n * n];
        multiply(&mut gram, false, atoms, atoms.transposed(), Threads::All);
        self.gram = Some(gram);
        self
    }

    /// Codes `vectors` `[n, m]`, spread over the current rayon pool.
    ///
    /// # Errors
    /// [`Error::VectorLength`] where the numbers do not fill whole vectors,
    /// [`Error::NotFinite`] where one holds a NaN or an infinity.
    pub fn encode(&self, vectors: &[f32]) -> Result<SparseBatch> {
        let (m, s) = (self.dictionary.head_dim(), self.sparsity);
        if !vectors.len().is_multiple_of(m) {
            return Err(Error::VectorLength {
                found: vectors.len(),
                head_dim: m,
            });
        }
        let n = vectors.len() / m;
        let finite = |x: &[f32]| x.iter().all(|v| v.is_finite());
        if let Some(row) = vectors.chunks_exact(m).position(|x| !finite(x)) {
            return Err(Error::NotFinite { row });
        }
        let mut batch = SparseBatch {
            sparsity: s,
            lengths: vec![0; n],
            indices: vec![0; n * s],
            coefficients: vec![0.0; n * s],
            relative_errors: vec![0.0; n],
        };
        (
            vectors.par_chunks_exact(m),
            batch.indices.par_chunks_exact_mut(s),
            batch.coefficients.par_chunks_exact_mut(s),
            &mut batch.lengths,
            &mut batch.relative_errors,
        )
            .into_par_iter()
            .for_each_init(
                || Workspace::new(self),
                |workspace, (x, indices, coefficients, length, relative_error)| {
                    let found = self.encode_one(x, workspace, indices, coefficients);
                    (*length, *relative_error) = found;
                },
            );
        Ok(batch)
    }

    /// Codes one finite vector; returns its number of nonzeros and its relative error.
    fn encode_one(
        &self,
        x: &[f32],
        workspace: &mut Workspace,
        indices: &mut [u16],
        coefficients: &mut [f32],
    ) -> (u16, f32) {
        let m = x.len();
        let Some(exponent) = binary_exponent(x) else {
            return (0, 0.0);
        };
        let Workspace {
            residual,
            correlations,
            projections,
            directions,
            triangle,
            weights,
        } = workspace;
        // Powers of two scale exactly: huge and tiny vectors take the same path as any other.
        scale_by_power(x, -exponent, residual);
        let whole = norm(residual);
        let enough = self.tolerance.max(EXACT) * whole;
        let mut rest = whole;

        correlate(self.dictionary.atoms(), residual, correlations);
        let (mut atom, mut peak) = largest(correlations);
        let mut length = 0;
        while length < self.sparsity && rest > enough && peak > EXACT * whole {
            let (earlier, direction) = directions[..(length + 1) * m].split_at_mut(length * m);
            direction.copy_from_slice(self.dictionary.atom(atom));
            let row = &mut triangle[length * self.sparsity..][..length + 1];
            let outside = orthonormalise(direction, earlier, row);
            if outside <= DEPENDENT {
                break;
            }
            row[length] = outside;
            indices[length] = atom as u16;

            let weight = dot(direction, residual);
            add_scaled(residual, -weight, direction);
            weights[length] = weight;
            rest = norm(residual);
            length += 1;
            if length == self.sparsity || rest <= enough {
                break;
            }
            let projection = self.project(projections, length - 1, atom, direction, row);
            // Rounding must not bring a chosen atom back.
            for &chosen in &indices[..length] {
                correlations[usize::from(chosen)] = 0.0;
                projection[usize::from(chosen)] = 0.0;
            }
            (atom, peak) = subtract_and_peak(correlations, weight, projection);
        }
        solve(triangle, self.sparsity, &weights[..length], &mut coefficients[..length]);
        for c in &mut coefficients[..length] {
            *c = scale_one(*c, exponent);
        }
        (length as u16, rest / whole)
    }

    /// Projections of all atoms on the direction of step `step`, which came of atom `atom`;
    /// `row` says how that atom was made of the directions so far.
    fn project<'a>(
        &self,
        projections: &'a mut [f32],
        step: usize,
        atom: usize,
        direction: &[f32],
        row: &[f32],
    ) -> &'a mut [f32] {
        let n = self.dictionary.len();
        let Some(gram) = &self.gram else {
            let projection = &mut projections[..n];
            correlate(self.dictionary.atoms(), direction, projection);
            return projection;
        };
        let (earlier, rest) = projections.split_at_mut(step * n);
        let projection = &mut rest[..n];
        projection.copy_from_slice(&gram[atom * n..(atom + 1) * n]);
        for (part, earlier) in row[..step].iter().zip(earlier.chunks_exact(n)) {
            add_scaled(projection, -part, earlier);
        }
        let inverse = 1.0 / row[step];
        projection.iter_mut().for_each(|p| *p *= inverse);
        projection
    }
}

/// Scratch memory of one thread.
struct Workspace {
    /// `[m]`
    residual: Vec<f32>,
    /// Of every atom with the residual, `[N]`.
    correlations: Vec<f32>,
    /// Of every atom on the newest direction, `[N]`; with the Gram matrix on each direction, `[s, N]`.
    projections: Vec<f32>,
    /// The orthonormalised support, `[s, m]`.
    directions: Vec<f32>,
    /// Row `k` writes atom `k` of the support in the first `k + 1` directions, `[s, s]`.
    triangle: Vec<f32>,
    /// The vector in the directions, `[s]`.
    weights: Vec<f32>,
}

impl Workspace {
    fn new(pursuit: &Pursuit<'_>) -> Self {
        let (n, m) = (pursuit.dictionary.len(), pursuit.dictionary.head_dim());
        let s = pursuit.sparsity;
        let kept = if pursuit.gram.is_some() { s } else { 1 };
        Self {
            residual: vec![0.0; m],
            correlations: vec![0.0; n],
            projections: vec![0.0; kept * n],
            directions: vec![0.0; s * m],
            triangle: vec![0.0; s * s],
            weights: vec![0.0; s],
        }
    }
}

/// Makes `x` a unit vector orthogonal to the orthonormal rows of `basis`, adds its parts along
/// them to `parts` (set to zero first), and returns the length of what was outside their span.
fn orthonormalise(x: &mut [f32], basis: &[f32], parts: &mut [f32]) -> f32 {
    parts.fill(0.0);
    // Twice is enough (Giraud, Langou, Rozložník 2005): once loses orthogonality in f32.
    for _ in 0..2 {
        for (direction, part) in basis.chunks_exact(x.len()).zip(parts.iter_mut()) {
            let along = dot(direction, x);
            add_scaled(x, -along, direction);
            *part += along;
        }
    }
    let outside = norm(x);
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

fn largest(correlations: &mut [f32]) -> (usize, f32) {
    let (mut best, mut peak) = (0, 0.0);
    for (i, c) in correlations.iter().enumerate() {
        if c.abs() > peak {
            (best, peak) = (i, c.abs());
        }
    }
    (best, peak)
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
