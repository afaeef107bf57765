//! Encoders: orthogonal matching pursuit for sparse codes, beam search for additive ones.

mod beam;
mod omp;

use crate::threads::{Rayon, Threads, for_each};
use crate::{Error, Result};
pub use beam::{BEAM_WIDTH, BeamSearch, MAX_BEAM_WIDTH};
pub use omp::Pursuit;

/// Finds codes for vectors.
pub trait Encoder: Sync {
    /// `m`, the length of the vectors.
    fn head_dim(&self) -> usize;

    /// The largest sparsity that a head can be given.
    fn max_sparsity(&self) -> usize;

    /// Codes the vectors of several heads, `[heads, n, m]`, those of each with at most its own of `sparsities`, and
    /// gives a batch a head. Each reading of the atoms serves vectors of all heads.
    ///
    /// # Errors
    /// [`Error::VectorLength`] where the numbers do not fill whole vectors,
    /// [`Error::NotFinite`] where one holds a NaN or an infinity.
    ///
    /// # Panics
    /// Where a sparsity is 0 or above [`Encoder::max_sparsity`], or the vectors are not as many for each head.
    fn encode_heads(
        &self,
        vectors: &[f32],
        sparsities: &[usize],
        threads: &dyn Threads,
    ) -> Result<Vec<EncodedBatch>>;

    /// Codes `vectors` `[n, m]` with at most [`Encoder::max_sparsity`] atoms each, spread over `threads`.
    ///
    /// # Errors
    /// Those of [`Encoder::encode_heads`].
    fn encode_on(&self, vectors: &[f32], threads: &dyn Threads) -> Result<EncodedBatch> {
        let mut heads = self.encode_heads(vectors, &[self.max_sparsity()], threads)?;
        Ok(heads.swap_remove(0))
    }

    /// Codes `vectors` `[n, m]` with at most [`Encoder::max_sparsity`] atoms each, spread over the current rayon pool.
    ///
    /// # Errors
    /// Those of [`Encoder::encode_heads`].
    fn encode(&self, vectors: &[f32]) -> Result<EncodedBatch> {
        self.encode_on(vectors, &Rayon)
    }
}

/// The length of what a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fit {
    /// `⟨x̂, x⟩ = ‖x‖²`: whatever is long in the direction of `x`, a query that attends to it above all, finds the
    /// length that it had, at the price of a larger distance `‖x − x̂‖` (the estimator of RaBitQ, Gao & Long 2024).
    #[default]
    Unbiased,
    /// `‖x − x̂‖` is the least, and `x̂` so shorter than `x`: by `1 − e²` for a relative error `e`.
    LeastSquares,
}

impl Fit {
    /// The factor for a code whose `⟨x̂, x⟩` is `‖x‖² / unbiased`, from 1 to `max`.
    fn scale(self, unbiased: f64, max: f64) -> f64 {
        match self {
            Self::Unbiased => unbiased.clamp(1.0, max),
            Self::LeastSquares => 1.0,
        }
    }
}

/// Codes of a batch of vectors, as an [`Encoder`] finds them: f32 coefficients.
///
/// Vector `v` has `lengths[v]` atoms; its indices and coefficients begin at `v · sparsity`,
/// in the order in which the atoms were chosen; the rest of its row is zero. In additive codes index `j` is of
/// codebook `j`, counted among the atoms of all codebooks, and all coefficients of a vector are its scale.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedBatch {
    /// `s`, the length of a row.
    pub sparsity: usize,
    /// The number of atoms of each vector.
    pub lengths: Vec<u16>,
    /// Atoms, `[n, s]`.
    pub indices: Vec<u16>,
    /// Coefficients, `[n, s]`.
    pub coefficients: Vec<f32>,
    /// `‖x − x̂‖ / ‖x‖` of each vector, 0 for a zero vector.
    pub relative_errors: Vec<f32>,
}

impl EncodedBatch {
    /// The number of vectors.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Returns whether there are no vectors.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// The indices and coefficients of vector `v`.
    ///
    /// # Panics
    /// Where `v` is not below [`EncodedBatch::len`].
    pub fn row(&self, v: usize) -> (&[u16], &[f32]) {
        let start = v * self.sparsity;
        let end = start + usize::from(self.lengths[v]);
        (&self.indices[start..end], &self.coefficients[start..end])
    }

    /// Takes the codes of vectors `[heads, n]` apart, those of each head having at most its own of `sparsities`.
    fn into_heads(self, sparsities: &[usize]) -> Vec<Self> {
        if sparsities == [self.sparsity] {
            return vec![self];
        }
        let each = self.len() / sparsities.len().max(1);
        let heads = sparsities.iter().enumerate();
        heads
            .map(|(head, &sparsity)| self.part(head * each, each, sparsity))
            .collect()
    }

    /// The codes of `count` vectors from `first` on, none of which has more than `sparsity` nonzeros.
    fn part(&self, first: usize, count: usize, sparsity: usize) -> Self {
        let rows = first..first + count;
        let all = first * self.sparsity..rows.end * self.sparsity;
        Self {
            sparsity,
            lengths: self.lengths[rows.clone()].to_vec(),
            indices: narrowed(&self.indices[all.clone()], self.sparsity, sparsity),
            coefficients: narrowed(&self.coefficients[all], self.sparsity, sparsity),
            relative_errors: self.relative_errors[rows].to_vec(),
        }
    }

    /// The mean of the relative errors, 0 for no vectors.
    pub fn mean_relative_error(&self) -> f32 {
        mean(&self.relative_errors)
    }
}

/// The first `to` of each row of `from` numbers.
fn narrowed<T: Copy>(numbers: &[T], from: usize, to: usize) -> Vec<T> {
    let rows = numbers.chunks_exact(from);
    rows.flat_map(|row| &row[..to]).copied().collect()
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

/// The vectors of each head, of `n` in all.
///
/// # Panics
/// Where a sparsity is 0 or above `max`, or the vectors are not as many for each head.
pub(crate) fn vectors_per_head(n: usize, sparsities: &[usize], max: usize) -> usize {
    let possible = sparsities.iter().all(|s| (1..=max).contains(s));
    assert!(possible, "sparsities that the encoder allows");
    let each = n / sparsities.len().max(1);
    assert_eq!(each * sparsities.len(), n, "as many vectors for each head");
    each
}

pub(crate) fn mean(numbers: &[f32]) -> f32 {
    let sum: f64 = numbers.iter().map(|&x| f64::from(x)).sum();
    // A sum of nothing is −0.
    (sum / numbers.len().max(1) as f64 + 0.0) as f32
}

/// Room for the codes of a block of vectors, in rows of `s`.
struct BlockMut<'a> {
    /// Max atoms of each vector; then the number that it has.
    lengths: &'a mut [u16],
    indices: &'a mut [u16],
    coefficients: &'a mut [f32],
    relative_errors: &'a mut [f32],
}

/// Does the work of [`Encoder::encode_heads`] by coding blocks of up to `block` vectors, spread over `threads`.
fn encode_in_blocks(
    encoder: &impl Encoder,
    vectors: &[f32],
    sparsities: &[usize],
    block: usize,
    threads: &dyn Threads,
    encode_block: impl Fn(&[f32], BlockMut<'_>) + Sync,
) -> Result<Vec<EncodedBatch>> {
    let (m, s) = (encoder.head_dim(), encoder.max_sparsity());
    let each = vectors_per_head(vectors.len() / m, sparsities, s);
    check_vectors(vectors, m)?;
    let n = vectors.len() / m;
    let mut batch = EncodedBatch {
        sparsity: s,
        lengths: (0..n).map(|v| sparsities[v / each] as u16).collect(),
        indices: vec![0; n * s],
        coefficients: vec![0.0; n * s],
        relative_errors: vec![0.0; n],
    };
    let indices = batch.indices.chunks_mut(block * s);
    let codes = indices.zip(batch.coefficients.chunks_mut(block * s));
    let lengths = batch.lengths.chunks_mut(block);
    let blocks = lengths.zip(batch.relative_errors.chunks_mut(block));
    let blocks = blocks.zip(codes);
    let blocks = blocks.map(
        |((lengths, relative_errors), (indices, coefficients))| BlockMut {
            lengths,
            indices,
            coefficients,
            relative_errors,
        },
    );
    let tasks = vectors.chunks(block * m).zip(blocks);
    for_each(threads, tasks, |(vectors, block)| {
        encode_block(vectors, block)
    });
    Ok(batch.into_heads(sparsities))
}
