//! Codes as they are kept: one type of pages for each family of codes, sizes in bytes as allocated.

mod additive;
mod coefficients;
mod file;
mod pages;
mod sparse;
pub mod stored;

pub use additive::AdditiveFormat;
pub use coefficients::CoefficientFormat;
pub use file::{CodeFile, FORMAT};
pub use sparse::SparseFormat;

use std::ops::Range;

use crate::dictionary::{Atoms, CodeFamily};
use crate::encode::EncodedBatch;
use crate::kernels;
use crate::kernels::additive::AdditiveBlock;
use crate::kernels::rows::Rows;
use crate::kernels::sparse::SparseBlock;
use crate::{Error, Result};
use additive::AdditivePage;
pub(crate) use pages::PAGE;
use pages::Pages;
use sparse::SparsePage;

/// The format of codes, by their family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeFormat {
    /// Any atoms, with coefficients.
    Sparse(SparseFormat),
    /// One atom of each of the first codebooks.
    Additive(AdditiveFormat),
}

impl CodeFormat {
    /// The family.
    pub fn family(self) -> CodeFamily {
        match self {
            Self::Sparse(_) => CodeFamily::Sparse,
            Self::Additive(_) => CodeFamily::Additive,
        }
    }

    /// `s`, the max atoms of a vector.
    pub fn sparsity(self) -> usize {
        match self {
            Self::Sparse(format) => format.sparsity,
            Self::Additive(format) => format.sparsity,
        }
    }

    /// The bytes of a vector with as many atoms as it may have.
    pub fn bytes(self) -> usize {
        match self {
            Self::Sparse(format) => format.bytes(),
            Self::Additive(format) => format.bytes(),
        }
    }
}

impl From<SparseFormat> for CodeFormat {
    fn from(format: SparseFormat) -> Self {
        Self::Sparse(format)
    }
}

impl From<AdditiveFormat> for CodeFormat {
    fn from(format: AdditiveFormat) -> Self {
        Self::Additive(format)
    }
}

/// Codes of a growing list of vectors, in pages of 8,192. A copy shares the pages that are there, and neither changes
/// them any more.
///
/// See [`SparseFormat`] and [`AdditiveFormat`] for the bytes that a vector takes.
#[derive(Debug, Clone)]
pub struct Codes(FamilyPages);

#[derive(Debug, Clone)]
enum FamilyPages {
    Sparse(Pages<SparsePage>),
    Additive(Pages<AdditivePage>),
}

/// Does the same with the pages of either family.
macro_rules! with_pages {
    ($codes:expr, $pages:ident => $what:expr) => {
        match $codes {
            FamilyPages::Sparse($pages) => $what,
            FamilyPages::Additive($pages) => $what,
        }
    };
}

impl Codes {
    /// Makes an empty list.
    ///
    /// # Errors
    /// [`Error::VariableSparsity`] where a length would not fit its byte, [`Error::AdditiveCodes`] for additive codes
    /// of an impossible size.
    pub fn new(format: impl Into<CodeFormat>) -> Result<Self> {
        kernels::check_level().map_err(Error::Level)?;
        Ok(Self(match format.into() {
            CodeFormat::Sparse(format) => FamilyPages::Sparse(Pages::new(format.check()?)),
            CodeFormat::Additive(format) => FamilyPages::Additive(Pages::new(format.check()?)),
        }))
    }

    /// Appends the codes of a batch. What is there already stays where it is, but for up to 8,192 of the newest
    /// vectors.
    ///
    /// # Panics
    /// Where the batch has another sparsity than these codes.
    pub fn extend(&mut self, batch: &EncodedBatch) {
        assert_eq!(
            batch.sparsity,
            self.format().sparsity(),
            "codes of one sparsity"
        );
        with_pages!(&mut self.0, pages => pages.extend(batch));
    }

    /// Drops the `count` oldest vectors.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn drop_front(&mut self, count: usize) {
        with_pages!(&mut self.0, pages => pages.drop_front(count));
    }

    /// The number of vectors.
    pub fn len(&self) -> usize {
        with_pages!(&self.0, pages => pages.len())
    }

    /// Returns whether there are no vectors.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The format.
    pub fn format(&self) -> CodeFormat {
        match &self.0 {
            FamilyPages::Sparse(pages) => pages.format().into(),
            FamilyPages::Additive(pages) => pages.format().into(),
        }
    }

    /// The bytes allocated.
    pub fn bytes(&self) -> usize {
        with_pages!(&self.0, pages => pages.bytes())
    }

    /// The bytes in use: [`Codes::bytes`] less bookkeeping and the room kept for growth.
    pub fn bytes_used(&self) -> usize {
        with_pages!(&self.0, pages => pages.bytes_used())
    }

    /// Calls `visit` with the blocks that hold the vectors of `range`, page by page, and the number of vectors before each.
    pub(crate) fn visit(&self, range: Range<usize>, mut visit: impl FnMut(Block<'_>, usize)) {
        match &self.0 {
            FamilyPages::Sparse(pages) => {
                pages.visit(range, |block, at| visit(Block::Sparse(block), at));
            }
            FamilyPages::Additive(pages) => {
                pages.visit(range, |block, at| visit(Block::Additive(block), at));
            }
        }
    }

    /// The largest index of an atom; 0 where there is none.
    pub(crate) fn largest_index(&self) -> u16 {
        with_pages!(&self.0, pages => pages.largest_index())
    }

    /// Checks that the codes are over `count` atoms.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where an index lies outside them.
    pub fn check_atoms(&self, count: usize) -> Result<()> {
        let index = self.largest_index();
        if usize::from(index) >= count && self.bytes_used() > 0 {
            let reason = format!("the codes name atom {index}, the dictionary has {count}");
            return Err(Error::Dictionary(reason));
        }
        Ok(())
    }

    /// Rebuilds all vectors, `[n, m]` in f32: for tests, files and error figures, not for attention.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where an index lies outside the dictionary.
    pub fn decode<'a>(&self, atoms: impl Into<Atoms<'a>>) -> Result<Vec<f32>> {
        let atoms = atoms.into();
        self.check_atoms(atoms.len())?;
        Ok(with_pages!(&self.0, pages => pages.decode(atoms)))
    }
}

/// Some vectors' codes as they are stored.
#[derive(Clone, Copy)]
pub(crate) enum Block<'a> {
    Sparse(SparseBlock<'a>),
    Additive(AdditiveBlock<'a>),
}

impl Block<'_> {
    /// The number of vectors.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Sparse(block) => block.len(),
            Self::Additive(block) => block.len(),
        }
    }

    /// Scores of the codes from the table `p`; see [`kernels::sparse::scores`].
    pub(crate) fn scores(self, p: &[f32], group: usize, out: &mut [f32]) {
        match self {
            Self::Sparse(block) => kernels::sparse::scores(block, p, group, out),
            Self::Additive(block) => kernels::additive::scores(block, p, group, out),
        }
    }

    /// The vectors that the codes stand for, `[n, m]`, `atoms` being `[N, m]`.
    pub(crate) fn rebuild(self, atoms: Rows<'_>, m: usize, out: &mut [f32]) {
        match self {
            Self::Sparse(block) => kernels::sparse::rebuild(block, atoms, m, out),
            Self::Additive(block) => kernels::additive::rebuild(block, atoms, m, out),
        }
    }

    /// Adds the weighted codes to the table `u`; see [`kernels::sparse::accumulate`].
    pub(crate) fn accumulate(self, weights: &[f32], group: usize, u: &mut [f32]) {
        match self {
            Self::Sparse(block) => kernels::sparse::accumulate(block, weights, group, u),
            Self::Additive(block) => kernels::additive::accumulate(block, weights, group, u),
        }
    }
}
