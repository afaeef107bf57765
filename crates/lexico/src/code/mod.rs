//! Codes as they are kept: 16-bit indices, compressed coefficients, sizes in bytes as allocated.

mod coefficients;
mod file;

pub use coefficients::CoefficientFormat;
pub use file::{CodeFile, FORMAT};

use crate::dictionary::Dictionary;
use crate::pursuit::SparseBatch;
use crate::{Error, Result};
use coefficients::Coefficients;
pub(crate) use coefficients::Scales;
#[cfg(test)]
pub(crate) use coefficients::f8_values;

/// Vectors by which storage grows at the least.
const GROWTH: usize = 16;

/// How codes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeFormat {
    /// `s`, the most nonzeros of a vector.
    pub sparsity: usize,
    /// Whether each vector keeps only the nonzeros it has, and one byte for their number; else
    /// every vector takes room for `s`.
    pub variable: bool,
    /// How coefficients are stored.
    pub coefficients: CoefficientFormat,
}

/// Sparse codes of a growing list of vectors.
///
/// A vector with `k` nonzeros takes `3k + 1` bytes with FP8 coefficients (2 for the index and 1
/// for the coefficient of each nonzero, 1 for the vector's scale), `6k` with f32, and one more
/// where lengths vary. With fixed sparsity `k = s` always.
#[derive(Debug, Clone)]
pub struct Codes {
    format: CodeFormat,
    len: usize,
    indices: Vec<u16>,
    coefficients: Coefficients,
    /// Nonzeros of each vector, where they vary.
    lengths: Vec<u8>,
    /// So that users of the codes can check them against a dictionary at once.
    largest_index: u16,
}

impl Codes {
    /// No codes yet.
    ///
    /// # Errors
    /// [`Error::VariableSparsity`] where a length would not fit its byte.
    pub fn new(format: CodeFormat) -> Result<Self> {
        if format.variable && format.sparsity > usize::from(u8::MAX) {
            return Err(Error::VariableSparsity(format.sparsity));
        }
        Ok(Self {
            format,
            len: 0,
            indices: Vec::new(),
            coefficients: Coefficients::new(format.coefficients),
            lengths: Vec::new(),
            largest_index: 0,
        })
    }

    /// Appends the codes of a batch.
    ///
    /// # Panics
    /// Where the batch has another sparsity than these codes.
    pub fn extend(&mut self, batch: &SparseBatch) {
        assert_eq!(
            batch.sparsity, self.format.sparsity,
            "codes of one sparsity"
        );
        let nonzeros = if self.format.variable {
            batch.lengths.iter().map(|&l| usize::from(l)).sum()
        } else {
            batch.len() * batch.sparsity
        };
        self.reserve(batch.len(), nonzeros);
        for v in 0..batch.len() {
            let (indices, coefficients) = batch.row(v);
            self.indices.extend_from_slice(indices);
            self.coefficients.push_vector(coefficients);
            if self.format.variable {
                self.lengths.push(indices.len() as u8);
            } else {
                let missing = self.format.sparsity - indices.len();
                self.indices.extend(std::iter::repeat_n(0, missing));
                self.coefficients.push_zeros(missing);
            }
        }
        self.len += batch.len();
        let largest = batch.indices.iter().copied().max().unwrap_or(0);
        self.largest_index = self.largest_index.max(largest);
    }

    /// Grows by a sixteenth rather than by doubling: what is allocated is what the cache weighs.
    fn reserve(&mut self, vectors: usize, nonzeros: usize) {
        if self.indices.capacity() - self.indices.len() < nonzeros
            || self.coefficients.spare_vectors() < vectors
            || (self.format.variable && self.lengths.capacity() - self.lengths.len() < vectors)
        {
            let vectors = vectors.max(GROWTH).max(self.len / 16);
            let nonzeros = nonzeros
                .max(self.indices.len() / 16)
                .max(if self.format.variable {
                    GROWTH
                } else {
                    vectors * self.format.sparsity
                });
            self.indices.reserve_exact(nonzeros);
            self.coefficients.reserve_exact(vectors, nonzeros);
            if self.format.variable {
                self.lengths.reserve_exact(vectors);
            }
        }
    }

    /// Drops the `count` oldest vectors.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn drop_front(&mut self, count: usize) {
        let nonzeros = (0..count).map(|v| self.length(v)).sum();
        self.indices.drain(..nonzeros);
        self.coefficients.drop_front(count, nonzeros);
        if self.format.variable {
            self.lengths.drain(..count);
        }
        self.len -= count;
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How they are stored.
    pub fn format(&self) -> CodeFormat {
        self.format
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.indices.capacity() * size_of::<u16>()
            + self.coefficients.bytes()
            + self.lengths.capacity()
    }

    /// Bytes in use: [`Codes::bytes`] less the room kept for growth.
    pub fn bytes_used(&self) -> usize {
        self.indices.len() * size_of::<u16>() + self.coefficients.bytes_used() + self.lengths.len()
    }

    /// The codes of the vectors from `first` on.
    ///
    /// # Panics
    /// Where there are fewer vectors.
    pub(crate) fn blocks_from(&self, first: usize) -> Blocks<'_> {
        let nonzero = if self.format.variable {
            self.lengths[..first].iter().map(|&l| usize::from(l)).sum()
        } else {
            first * self.format.sparsity
        };
        let lengths = if self.format.variable {
            Lengths::Variable(&self.lengths[first..])
        } else {
            Lengths::Fixed(self.format.sparsity, self.len - first)
        };
        let indices = &self.indices[nonzero..];
        self.coefficients
            .blocks_from(first, nonzero, indices, lengths)
    }

    /// The largest index of an atom; 0 where there is none.
    pub(crate) fn largest_index(&self) -> u16 {
        self.largest_index
    }

    fn length(&self, v: usize) -> usize {
        if self.format.variable {
            usize::from(self.lengths[v])
        } else {
            self.format.sparsity
        }
    }

    /// Rebuilds all vectors, `[n, m]` in f32: for tests, files and error figures, never for attention.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where an index lies outside the dictionary.
    pub fn decode(&self, dictionary: &Dictionary) -> Result<Vec<f32>> {
        let atoms = dictionary.len();
        if usize::from(self.largest_index) >= atoms && !self.indices.is_empty() {
            let index = self.largest_index;
            let reason = format!("the codes name atom {index}, the dictionary has {atoms}");
            return Err(Error::Dictionary(reason));
        }
        let m = dictionary.head_dim();
        let mut vectors = vec![0.0; self.len * m];
        let mut nonzero = 0;
        for (v, out) in vectors.chunks_exact_mut(m).enumerate() {
            for j in nonzero..nonzero + self.length(v) {
                let atom = dictionary.atom(usize::from(self.indices[j]));
                crate::arch::add_scaled(out, self.coefficients.get(v, j), atom);
            }
            nonzero += self.length(v);
        }
        Ok(vectors)
    }
}

/// Some vectors' codes as they are stored, by how their coefficients are.
#[derive(Clone, Copy)]
pub(crate) enum Blocks<'a> {
    F8(Block<'a, u8>),
    F32(Block<'a, f32>),
}

/// Some vectors' codes as they are stored.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a, C> {
    /// Of all nonzeros, vector by vector.
    pub(crate) indices: &'a [u16],
    /// Of all nonzeros.
    pub(crate) coefficients: &'a [C],
    /// What each vector's coefficients are multiplied by.
    pub(crate) scales: Scales<'a>,
    /// Nonzeros of each vector.
    pub(crate) lengths: Lengths<'a>,
    /// What a coefficient of a byte stands for.
    pub(crate) values: &'a [f32; 256],
}

/// How many nonzeros vectors have.
#[derive(Clone, Copy)]
pub(crate) enum Lengths<'a> {
    /// So many in each of so many vectors.
    Fixed(usize, usize),
    Variable(&'a [u8]),
}

impl Blocks<'_> {
    /// Vectors.
    pub(crate) fn len(&self) -> usize {
        let (Blocks::F8(Block { lengths, .. }) | Blocks::F32(Block { lengths, .. })) = self;
        match lengths {
            Lengths::Fixed(_, count) => *count,
            Lengths::Variable(lengths) => lengths.len(),
        }
    }
}

impl<'a, C> Block<'a, C> {
    /// Calls `visit` with the indices, coefficients and scale of one vector after another.
    #[inline(always)]
    pub(crate) fn for_each(self, mut visit: impl FnMut(&'a [u16], &'a [C], f32)) {
        match self.lengths {
            // Usual sizes by name: their loops are unrolled.
            Lengths::Fixed(4, count) => self.for_each_of::<4>(count, visit),
            Lengths::Fixed(8, count) => self.for_each_of::<8>(count, visit),
            Lengths::Fixed(16, count) => self.for_each_of::<16>(count, visit),
            Lengths::Fixed(length, count) => {
                let rows = self.indices.chunks_exact(length);
                let rows = rows.zip(self.coefficients.chunks_exact(length));
                for (v, (indices, coefficients)) in rows.take(count).enumerate() {
                    visit(indices, coefficients, self.scales.get(v));
                }
            }
            Lengths::Variable(lengths) => {
                let (mut indices, mut coefficients) = (self.indices, self.coefficients);
                for (v, &length) in lengths.iter().enumerate() {
                    let (own, later) = indices.split_at(usize::from(length));
                    let (own_coefficients, later_coefficients) =
                        coefficients.split_at(usize::from(length));
                    visit(own, own_coefficients, self.scales.get(v));
                    (indices, coefficients) = (later, later_coefficients);
                }
            }
        }
    }

    #[inline(always)]
    fn for_each_of<const S: usize>(
        self,
        count: usize,
        mut visit: impl FnMut(&'a [u16], &'a [C], f32),
    ) {
        let rows = self.indices.as_chunks::<S>().0.iter();
        let rows = rows.zip(self.coefficients.as_chunks::<S>().0);
        match self.scales {
            Scales::Powers(exponents) => {
                for ((indices, coefficients), &exponent) in rows.take(count).zip(exponents) {
                    visit(indices, coefficients, Scales::power(exponent));
                }
            }
            Scales::One => {
                for (indices, coefficients) in rows.take(count) {
                    visit(indices, coefficients, 1.0);
                }
            }
        }
    }
}
