use std::borrow::Cow;
use std::sync::OnceLock;

use half::f16;

use super::atoms::{AtomMatrix, Atoms};
use super::{CODEBOOK_ATOMS, CodebookSizes, MAX_FIRST_ATOMS};
use crate::kernels::rows::Rows;
use crate::kernels::scan::{RoundedAtoms, TILE_ATOMS};
use crate::kernels::vector::square;
use crate::{Error, Result};

/// Codebooks for additive codes: a code of sparsity `s` is the sum of one atom of each of the first `s` codebooks, so
/// that an index needs no more bits than its codebook has atoms, and no coefficient is stored. Every codebook codes what
/// those before it left over, and its atoms have the length that this has.
///
/// Residual and additive quantisation (Chen, Guan, Wang 2010; Babenko & Lempitsky 2014), which for a Gaussian
/// reaches the rate-distortion function (sparse regression codes, Venkataramanan, Sarkar, Tatikonda 2014).
#[derive(Debug, Clone)]
pub struct Codebooks {
    atoms: AtomMatrix,
    sizes: CodebookSizes,
    /// Made when vectors are first coded.
    rounded: OnceLock<Box<[RoundedCodebook]>>,
}

/// A codebook as a search looks over it.
#[derive(Debug, Clone)]
pub(crate) struct RoundedCodebook {
    /// The atoms in 8 bits.
    pub(crate) atoms: RoundedAtoms,
    /// Half the squared length of every atom; infinite for those that fill the last tile.
    pub(crate) losses: Vec<[f32; TILE_ATOMS]>,
}

impl RoundedCodebook {
    fn new(atoms: Rows<'_>, head_dim: usize) -> Self {
        let mut numbers = Vec::new();
        let halves = atoms
            .widened(head_dim, &mut numbers)
            .chunks_exact(head_dim)
            .map(|atom| 0.5 * square(atom) as f32);
        let mut losses = vec![[f32::INFINITY; TILE_ATOMS]; halves.len().div_ceil(TILE_ATOMS)];
        let places = losses.as_flattened_mut().iter_mut();
        places.zip(halves).for_each(|(place, half)| *place = half);
        Self {
            atoms: RoundedAtoms::new(atoms, head_dim),
            losses,
        }
    }

    fn bytes(&self) -> usize {
        self.atoms.bytes() + size_of_val(&self.losses[..])
    }
}

impl PartialEq for Codebooks {
    fn eq(&self, other: &Self) -> bool {
        (&self.atoms, self.sizes) == (&other.atoms, other.sizes)
    }
}

impl<'a> From<&'a Codebooks> for Atoms<'a> {
    fn from(codebooks: &'a Codebooks) -> Self {
        Self::new(&codebooks.atoms, codebooks.atoms.len())
    }
}

impl Codebooks {
    /// Takes `[N, m]` atoms of any length, one codebook after the other.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the numbers do not fill whole rows and codebooks, `N` is above 65,536, or an atom
    /// is not finite.
    pub fn new(atoms: Vec<f32>, head_dim: usize, sizes: CodebookSizes) -> Result<Self> {
        let atoms = AtomMatrix::new(atoms, head_dim)?;
        let (count, first) = (atoms.len(), sizes.first);
        if !(1..=MAX_FIRST_ATOMS).contains(&first)
            || count < first
            || !(count - first).is_multiple_of(CODEBOOK_ATOMS)
        {
            let reason = format!(
                "{count} atoms are not a first codebook of {first}, of up to {MAX_FIRST_ATOMS}, and others of \
                 {CODEBOOK_ATOMS} each"
            );
            return Err(Error::Dictionary(reason));
        }
        Ok(Self {
            atoms,
            sizes,
            rounded: OnceLock::new(),
        })
    }

    /// The sizes of the codebooks.
    pub fn sizes(&self) -> CodebookSizes {
        self.sizes
    }

    /// The number of codebooks, and so the largest sparsity.
    #[allow(clippy::len_without_is_empty)] // there is always a first codebook
    pub fn len(&self) -> usize {
        self.sizes.count(self.atoms.len())
    }

    /// `m`, the length of an atom.
    pub fn head_dim(&self) -> usize {
        self.atoms.head_dim()
    }

    /// The atoms of all codebooks, `[N, m]` row by row; those of a file, which are kept in fewer bytes, are widened. `O(N·m)` then.
    pub fn atoms(&self) -> Cow<'_, [f32]> {
        self.atoms.numbers()
    }

    /// Atom `i` of all codebooks'.
    ///
    /// # Panics
    /// Where there are not so many.
    pub fn atom(&self, i: usize) -> Cow<'_, [f32]> {
        self.atoms.numbers_of(i, 1)
    }

    /// Atom `i` of all codebooks' as it is kept.
    pub(crate) fn row(&self, i: usize) -> Rows<'_> {
        self.atoms.rows(i, 1)
    }

    /// The atoms of the first `codebooks` codebooks: what codes of that sparsity or less are over.
    ///
    /// # Panics
    /// Where there are fewer codebooks.
    pub fn first(&self, codebooks: usize) -> Atoms<'_> {
        Atoms::new(&self.atoms, self.sizes.atoms(codebooks))
    }

    /// The atoms of one codebook, `[N, m]` row by row.
    ///
    /// # Panics
    /// Where there is no such codebook.
    pub fn codebook(&self, codebook: usize) -> Cow<'_, [f32]> {
        let start = self.sizes.start(codebook);
        self.atoms.numbers_of(start, self.sizes.size(codebook))
    }

    /// The atoms of one codebook as they are kept.
    pub(crate) fn rows(&self, codebook: usize) -> Rows<'_> {
        let start = self.sizes.start(codebook);
        self.atoms.rows(start, self.sizes.size(codebook))
    }

    /// Checks that codes can have `sparsity` atoms: 1 to the number of codebooks.
    ///
    /// # Errors
    /// [`Error::Codebooks`].
    pub fn check_sparsity(&self, sparsity: usize) -> Result<()> {
        if (1..=self.len()).contains(&sparsity) {
            return Ok(());
        }
        Err(Error::Codebooks {
            sparsity,
            codebooks: self.len(),
        })
    }

    /// The codebooks as a file keeps them: atoms in half precision.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where a number lies beyond half precision's range.
    pub fn in_half_precision(self) -> Result<Self> {
        Self::new(self.atoms.in_half_precision(), self.head_dim(), self.sizes)
    }

    /// The codebooks as those that are learned are kept: atoms in 8 bits, as multiples of units such that half precision, and so a
    /// file, holds their numbers exactly.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where a number lies beyond half precision's range.
    pub fn in_eight_bits(self) -> Result<Self> {
        let atoms = self.atoms.in_eight_bits();
        if let Some(x) = atoms.iter().find(|x| x.abs() > f16::MAX.to_f32()) {
            let reason = format!("{x} is beyond half precision's range");
            return Err(Error::Dictionary(reason));
        }
        Self::new(atoms, self.head_dim(), self.sizes)
    }

    /// The codebooks as a search looks over them.
    pub(crate) fn rounded(&self) -> &[RoundedCodebook] {
        self.rounded.get_or_init(|| {
            let codebooks = (0..self.len()).map(|codebook| self.rows(codebook));
            codebooks
                .map(|atoms| RoundedCodebook::new(atoms, self.head_dim()))
                .collect()
        })
    }

    /// The bytes held: those of the atoms, and once vectors have been coded those of a copy in 8 bits.
    pub fn bytes(&self) -> usize {
        let rounded = self.rounded.get().into_iter().flatten();
        self.atoms.bytes() + rounded.map(RoundedCodebook::bytes).sum::<usize>()
    }

    /// A checksum of the atoms and sizes, so that codes can say which codebooks they need.
    pub fn checksum(&self) -> u32 {
        self.atoms.checksum() ^ self.sizes.first as u32
    }
}
