use super::pages::{Page, Run, growth};
use crate::dictionary::{CODEBOOK_ATOMS, CodebookSizes, MAX_ATOMS, MAX_FIRST_ATOMS};
use crate::encode::EncodedBatch;
use crate::kernels::additive::{AdditiveBlock, Leading};
use crate::kernels::prefetch_first;
use crate::{Error, Result};

/// The format of additive codes: one atom of each of the first [`Codebooks`](crate::dictionary::Codebooks), whose atoms
/// have lengths of their own, and one scale from 1 to 2 for their sum in steps of 2 %.
///
/// A vector takes `s + 1` bytes: two for the scale and the index in the first codebook, one for every other index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdditiveFormat {
    /// `s`, the atoms of a vector.
    pub sparsity: usize,
    /// The sizes of the codebooks.
    pub sizes: CodebookSizes,
}

impl AdditiveFormat {
    pub(super) fn check(self) -> Result<Self> {
        let (sparsity, first) = (self.sparsity, self.sizes.first);
        if sparsity == 0
            || !(1..=MAX_FIRST_ATOMS).contains(&first)
            || sparsity > MAX_ATOMS / CODEBOOK_ATOMS
            || self.sizes.atoms(sparsity) > MAX_ATOMS
        {
            return Err(Error::AdditiveCodes { sparsity, first });
        }
        Ok(self)
    }

    /// The bytes of a vector.
    pub fn bytes(self) -> usize {
        Self::bytes_of(self.sparsity)
    }

    /// The bytes of a vector of `sparsity` atoms, whatever the codebooks' sizes.
    pub(crate) fn bytes_of(sparsity: usize) -> usize {
        sparsity + 1
    }
}

/// The additive codes of some vectors in a row.
#[derive(Debug, Clone)]
pub(super) struct AdditivePage {
    pub(super) format: AdditiveFormat,
    /// The first codebook's atom and the scale of each vector.
    pub(super) first: Vec<Leading>,
    /// The other codebooks' atoms of each vector, by their numbers in these, `[n, s − 1]`.
    pub(super) rest: Vec<u8>,
}

impl Page for AdditivePage {
    type Format = AdditiveFormat;
    type Block<'a> = AdditiveBlock<'a>;

    fn new(format: AdditiveFormat) -> Self {
        Self {
            format,
            first: Vec::new(),
            rest: Vec::new(),
        }
    }

    fn len(&self) -> usize {
        self.first.len()
    }

    fn extend(&mut self, batch: &EncodedBatch, first: usize, count: usize) {
        let AdditiveFormat { sparsity, sizes } = self.format;
        if self.first.capacity() - self.first.len() < count {
            let vectors = count.max(growth(self.len()));
            self.first.reserve_exact(vectors);
            self.rest.reserve_exact(vectors * (sparsity - 1));
        }
        for v in first..first + count {
            let (indices, coefficients) = batch.row(v);
            // All coefficients of a vector are its scale.
            self.first.push(Leading::new(indices[0], coefficients[0]));
            for (codebook, &index) in indices.iter().enumerate().skip(1) {
                let own = usize::from(index) - sizes.start(codebook);
                debug_assert!(own < CODEBOOK_ATOMS, "one atom of each codebook");
                self.rest.push(own as u8);
            }
        }
    }

    fn drop_front(&mut self, count: usize) {
        self.first.drain(..count);
        self.rest.drain(..count * (self.format.sparsity - 1));
    }

    fn bytes(&self) -> usize {
        self.first.capacity() * size_of::<Leading>() + self.rest.capacity()
    }

    fn bytes_used(&self) -> usize {
        self.first.len() * size_of::<Leading>() + self.rest.len()
    }

    fn prefetch(&self) {
        prefetch_first(&self.first);
        prefetch_first(&self.rest);
    }

    fn block(&self) -> AdditiveBlock<'_> {
        AdditiveBlock {
            first: &self.first,
            rest: &self.rest,
            sizes: self.format.sizes,
            sparsity: self.format.sparsity,
        }
    }

    fn largest_index(&self) -> u16 {
        let block = self.block();
        let indices = (0..self.len()).flat_map(|v| block.indices(v));
        indices.max().unwrap_or(0) as u16
    }

    fn for_each(&self, mut visit: impl FnMut(usize, usize, f32)) {
        let block = self.block();
        for v in 0..self.len() {
            let scale = block.scale(v);
            block.indices(v).for_each(|index| visit(v, index, scale));
        }
    }
}

impl Run for AdditiveBlock<'_> {
    fn split_at(self, count: usize) -> (Self, Self) {
        AdditiveBlock::split_at(self, count)
    }
}
