use super::coefficients::{CoefficientFormat, Coefficients};
use super::pages::{Page, Run, growth};
use crate::encode::EncodedBatch;
use crate::kernels::prefetch_first;
use crate::kernels::sparse::{Lengths, SparseBlock};
use crate::{Error, Result};

/// The format of sparse codes: any atoms with coefficients, a vector's atoms in ascending order.
///
/// A vector with `k` nonzeros takes `3k + 1` bytes with coefficients of a byte (2 for the index and 1
/// for the coefficient of each nonzero, 1 for the vector's scale), `6k` with f32, and one more
/// where lengths vary. With fixed sparsity `k = s` always.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseFormat {
    /// `s`, the max nonzeros of a vector.
    pub sparsity: usize,
    /// True where each vector keeps only the nonzeros it has, and one byte for their number; else
    /// every vector takes room for `s`.
    pub variable: bool,
    /// Format of the coefficients.
    pub coefficients: CoefficientFormat,
}

impl SparseFormat {
    pub(super) fn check(self) -> Result<Self> {
        if self.variable && self.sparsity > usize::from(u8::MAX) {
            return Err(Error::VariableSparsity(self.sparsity));
        }
        Ok(self)
    }

    /// Returns the number of nonzeros of each of `count` vectors; `lengths` has it where it varies.
    pub(super) fn each(self, lengths: &[u8], count: usize) -> impl Iterator<Item = usize> {
        (0..count).map(move |v| match self.variable {
            true => usize::from(lengths[v]),
            false => self.sparsity,
        })
    }

    /// The bytes of a vector with as many nonzeros as it may have.
    pub fn bytes(self) -> usize {
        let nonzeros = self.sparsity * (size_of::<u16>() + self.coefficients.bytes());
        nonzeros + usize::from(self.coefficients.is_scaled()) + usize::from(self.variable)
    }
}

/// The sparse codes of some vectors in a row.
#[derive(Debug, Clone)]
pub(super) struct SparsePage {
    pub(super) format: SparseFormat,
    pub(super) len: usize,
    pub(super) indices: Vec<u16>,
    pub(super) coefficients: Coefficients,
    /// The nonzeros of each vector, where they vary.
    pub(super) lengths: Vec<u8>,
}

impl SparsePage {
    fn reserve(&mut self, vectors: usize, nonzeros: usize) {
        let SparseFormat {
            sparsity, variable, ..
        } = self.format;
        if self.indices.capacity() - self.indices.len() < nonzeros
            || self.coefficients.spare_vectors() < vectors
            || (variable && self.lengths.capacity() - self.lengths.len() < vectors)
        {
            let vectors = vectors.max(growth(self.len));
            let nonzeros = nonzeros.max(self.indices.len() / 64).max(if variable {
                growth(0)
            } else {
                vectors * sparsity
            });
            self.indices.reserve_exact(nonzeros);
            self.coefficients.reserve_exact(vectors, nonzeros);
            if variable {
                self.lengths.reserve_exact(vectors);
            }
        }
    }

    /// Takes a vector's nonzeros, which ascend by atom: the order in which they are stored too, so that sums over
    /// codes that were stored and read again are the same to the last bit.
    fn push(&mut self, nonzeros: &[(u16, f32)]) {
        self.indices.extend(nonzeros.iter().map(|&(i, _)| i));
        let coefficients: Vec<f32> = nonzeros.iter().map(|&(_, c)| c).collect();
        self.coefficients.push_vector(&coefficients);
        if self.format.variable {
            self.lengths.push(nonzeros.len() as u8);
        }
        self.len += 1;
    }
}

impl Page for SparsePage {
    type Format = SparseFormat;
    type Block<'a> = SparseBlock<'a>;

    fn new(format: SparseFormat) -> Self {
        Self {
            format,
            len: 0,
            indices: Vec::new(),
            coefficients: Coefficients::new(format.coefficients),
            lengths: Vec::new(),
        }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn extend(&mut self, batch: &EncodedBatch, first: usize, count: usize) {
        let SparseFormat {
            sparsity, variable, ..
        } = self.format;
        let rows = (first..first + count).map(|v| batch.row(v));
        let total = if variable {
            rows.clone().map(|(indices, _)| indices.len()).sum()
        } else {
            count * sparsity
        };
        self.reserve(count, total);
        let mut nonzeros = Vec::with_capacity(sparsity);
        for (indices, coefficients) in rows {
            nonzeros.clear();
            if !variable {
                // Room for nonzeros that a vector does not have is atom 0 with coefficient 0.
                nonzeros.resize(sparsity - indices.len(), (0, 0.0));
            }
            nonzeros.extend(indices.iter().copied().zip(coefficients.iter().copied()));
            nonzeros.sort_unstable_by_key(|&(i, c)| (i, c != 0.0));
            self.push(&nonzeros);
        }
    }

    fn drop_front(&mut self, count: usize) {
        let nonzeros = self.format.each(&self.lengths, count).sum();
        self.indices.drain(..nonzeros);
        self.coefficients.drop_front(count, nonzeros);
        if self.format.variable {
            self.lengths.drain(..count);
        }
        self.len -= count;
    }

    fn bytes(&self) -> usize {
        let indices = self.indices.capacity() * size_of::<u16>();
        indices + self.coefficients.bytes() + self.lengths.capacity()
    }

    fn bytes_used(&self) -> usize {
        let SparseFormat {
            variable,
            coefficients,
            ..
        } = self.format;
        let nonzeros = self.indices.len() * (size_of::<u16>() + coefficients.bytes());
        let each = usize::from(coefficients.is_scaled()) + usize::from(variable);
        nonzeros + self.len * each
    }

    fn prefetch(&self) {
        prefetch_first(&self.indices);
        self.coefficients.prefetch();
    }

    fn block(&self) -> SparseBlock<'_> {
        SparseBlock {
            indices: &self.indices,
            coefficients: self.coefficients.slices(),
            lengths: if self.format.variable {
                Lengths::Variable(&self.lengths)
            } else {
                Lengths::Fixed {
                    length: self.format.sparsity,
                    count: self.len,
                }
            },
        }
    }

    fn largest_index(&self) -> u16 {
        self.indices.iter().copied().max().unwrap_or(0)
    }

    fn for_each(&self, mut visit: impl FnMut(usize, usize, f32)) {
        let mut nonzero = 0;
        for (v, length) in self.format.each(&self.lengths, self.len).enumerate() {
            for _ in 0..length {
                let coefficient = self.coefficients.get(v, nonzero);
                visit(v, usize::from(self.indices[nonzero]), coefficient);
                nonzero += 1;
            }
        }
    }
}

impl Run for SparseBlock<'_> {
    fn split_at(self, count: usize) -> (Self, Self) {
        SparseBlock::split_at(self, count)
    }
}
