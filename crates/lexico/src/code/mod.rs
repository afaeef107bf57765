//! Codes as they are kept: 16-bit indices, compressed coefficients, sizes in bytes as allocated.

mod coefficients;
mod file;

pub use coefficients::CoefficientFormat;
pub use file::{CodeFile, FORMAT};

use crate::dictionary::Dictionary;
use crate::pursuit::SparseBatch;
use crate::{Error, Result};
use coefficients::Coefficients;

/// Vectors by which storage grows at the least.
const GROWTH: usize = 16;
/// Vectors that are unpacked at a time.
const BLOCK: usize = 256;

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

    /// Calls `visit` with one block of vectors after another: the first one's number, and the block.
    pub(crate) fn for_each_block(&self, mut visit: impl FnMut(usize, Block<'_>)) {
        let mut ends = Vec::with_capacity(BLOCK);
        let mut coefficients = Vec::new();
        let mut nonzero = 0;
        for first in (0..self.len).step_by(BLOCK) {
            let vectors = first..self.len.min(first + BLOCK);
            ends.clear();
            let mut end = 0;
            ends.extend(vectors.clone().map(|v| {
                end += self.length(v);
                end
            }));
            let nonzeros = nonzero..nonzero + end;
            self.coefficients
                .unpack(&ends, first, nonzeros.clone(), &mut coefficients);
            let block = Block {
                indices: &self.indices[nonzeros],
                coefficients: &coefficients,
                ends: &ends,
            };
            visit(first, block);
            nonzero += end;
        }
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
        if let Some(&index) = self.indices.iter().find(|&&i| usize::from(i) >= atoms) {
            let reason = format!("the codes name atom {index}, the dictionary has {atoms}");
            return Err(Error::Dictionary(reason));
        }
        let m = dictionary.head_dim();
        let mut vectors = vec![0.0; self.len * m];
        self.for_each_block(|first, block| {
            for (v, (indices, coefficients)) in block.vectors().enumerate() {
                let out = &mut vectors[(first + v) * m..(first + v + 1) * m];
                for (&i, &c) in indices.iter().zip(coefficients) {
                    crate::arch::add_scaled(out, c, dictionary.atom(usize::from(i)));
                }
            }
        });
        Ok(vectors)
    }
}

/// Some vectors' codes, coefficients unpacked to f32.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    /// Of all nonzeros, vector by vector.
    pub(crate) indices: &'a [u16],
    /// Of all nonzeros.
    pub(crate) coefficients: &'a [f32],
    /// Where each vector's nonzeros end.
    pub(crate) ends: &'a [usize],
}

impl<'a> Block<'a> {
    /// Indices and coefficients of each vector.
    #[inline(always)]
    pub(crate) fn vectors(self) -> impl Iterator<Item = (&'a [u16], &'a [f32])> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let range = start..end;
            start = end;
            (&self.indices[range.clone()], &self.coefficients[range])
        })
    }
}
