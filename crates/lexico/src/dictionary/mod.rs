//! Dictionaries of unit-norm atoms, and codebooks: one of each for the keys and one for the values of every layer.

mod additive;
mod allocation;
mod atoms;
mod basis;
mod maps;
mod rotary;
mod set;
mod unit;

pub use additive::Codebooks;
pub(crate) use additive::RoundedCodebook;
pub use allocation::{CodingLosses, LayerLosses, LayerSparsities};
pub use atoms::Atoms;
pub use basis::{HeadBasis, JointBasis, JointLayers};
pub(crate) use maps::for_heads;
pub use maps::{HeadMaps, RotaryOffsets};
pub use rotary::RotaryMeans;
pub use set::{
    DictionarySet, FORMATS, LayerDictionaries, LayerErrors, ModelIdentity, RotaryIdentity,
    Training, additive_sparsity,
};
pub use unit::Dictionary;

pub use crate::kernels::MAX_ATOMS;
pub use crate::kernels::additive::{CODEBOOK_ATOMS, CodebookSizes, MAX_FIRST_ATOMS};
pub(crate) use crate::kernels::vector::norm;

use crate::{Error, Result};

/// The two kinds of codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeFamily {
    /// The sum of one atom of each of the first [`Codebooks`], found by beam search.
    Additive,
    /// Any atoms of a [`Dictionary`] with coefficients, found by orthogonal matching pursuit.
    Sparse,
}

pub(crate) fn check_sparsity(sparsity: usize, head_dim: usize, atoms: usize) -> Result<()> {
    let max = head_dim.min(atoms);
    if (1..=max).contains(&sparsity) {
        return Ok(());
    }
    Err(Error::Sparsity {
        sparsity,
        max,
        head_dim,
        atoms,
    })
}
