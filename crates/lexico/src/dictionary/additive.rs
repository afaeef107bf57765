use super::Dictionary;
use crate::dictionary::extension::Atoms;
use crate::{Error, Result};

/// Atoms of every group but the first: what one byte tells apart.
pub const CODEBOOK_ATOMS: usize = 256;

/// The most atoms of the first group: what eleven bits tell apart.
pub const MAX_FIRST_ATOMS: usize = 2048;

/// How the atoms of a [`Codebooks`] fall into groups: the first has a size of its own, every other has
/// [`CODEBOOK_ATOMS`] atoms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodebookSizes {
    /// Atoms of the first group.
    pub first: usize,
}

impl CodebookSizes {
    /// The number of the first atom of group `group`.
    pub fn start(self, group: usize) -> usize {
        match group {
            0 => 0,
            group => self.first + (group - 1) * CODEBOOK_ATOMS,
        }
    }

    /// Atoms of group `group`.
    pub fn size(self, group: usize) -> usize {
        match group {
            0 => self.first,
            _ => CODEBOOK_ATOMS,
        }
    }

    /// Atoms of the first `groups` groups.
    pub fn atoms(self, groups: usize) -> usize {
        self.start(groups)
    }

    /// CodebookSizes that `atoms` atoms fill.
    fn count(self, atoms: usize) -> usize {
        1 + (atoms - self.first) / CODEBOOK_ATOMS
    }
}

/// Atoms in groups: a code of sparsity `s` is the sum of one atom of each of the first `s` groups, so that an index
/// needs no more bits than its group has atoms and no coefficient is stored. Every group codes what the
/// groups before it left over, and its atoms have the length that this has.
///
/// Residual and additive quantisation (Chen, Guan, Wang 2010; Babenko & Lempitsky 2014), which for one atom a
/// group of a Gaussian's residual reaches the rate-distortion function (sparse regression codes, Venkataramanan,
/// Sarkar, Tatikonda 2014).
#[derive(Debug, Clone, PartialEq)]
pub struct Codebooks {
    atoms: Dictionary,
    groups: CodebookSizes,
}

impl Codebooks {
    /// Takes `[N, m]` atoms of any length, the groups one after the other.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the numbers do not fill whole rows and groups, `N` is above 65,536, or an atom
    /// is not finite.
    pub fn new(atoms: Vec<f32>, head_dim: usize, groups: CodebookSizes) -> Result<Self> {
        let atoms = Dictionary::of_any_length(atoms, head_dim)?;
        let count = atoms.len();
        if !(1..=MAX_FIRST_ATOMS).contains(&groups.first)
            || count < groups.first
            || !(count - groups.first).is_multiple_of(CODEBOOK_ATOMS)
        {
            let first = groups.first;
            let reason = format!(
                "{count} atoms are not a first group of {first}, {MAX_FIRST_ATOMS} at the most, and others of {CODEBOOK_ATOMS} each"
            );
            return Err(Error::Dictionary(reason));
        }
        Ok(Self { atoms, groups })
    }

    /// How the atoms fall into groups.
    pub fn groups(&self) -> CodebookSizes {
        self.groups
    }

    /// Number of groups, and so the largest sparsity.
    #[allow(clippy::len_without_is_empty)] // there is always a first group
    pub fn len(&self) -> usize {
        self.groups.count(self.atoms.len())
    }

    /// `m`, the length of an atom.
    pub fn head_dim(&self) -> usize {
        self.atoms.head_dim()
    }

    /// All atoms, group by group.
    pub fn dictionary(&self) -> &Dictionary {
        &self.atoms
    }

    /// What codes of sparsity `sparsity` or less are over: the atoms of the first groups.
    ///
    /// # Panics
    /// Where there are fewer groups.
    pub fn atoms(&self, sparsity: usize) -> Atoms<'_> {
        Atoms::first(&self.atoms, self.groups.atoms(sparsity))
    }

    /// The atoms of one group, `[N, m]` row by row.
    pub(crate) fn group(&self, group: usize) -> &[f32] {
        let m = self.head_dim();
        &self.atoms.atoms()[self.groups.start(group) * m..self.groups.start(group + 1) * m]
    }

    /// Checks that codes over this dictionary can have `sparsity` atoms: 1 to the number of groups.
    ///
    /// # Errors
    /// [`Error::CodebookSizes`].
    pub fn check_sparsity(&self, sparsity: usize) -> Result<()> {
        if (1..=self.len()).contains(&sparsity) {
            return Ok(());
        }
        Err(Error::CodebookSizes {
            sparsity,
            groups: self.len(),
        })
    }

    /// The dictionary as a file keeps it: atoms in half precision.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where a number lies beyond half precision's range.
    pub fn in_half_precision(self) -> Result<Self> {
        let m = self.head_dim();
        let numbers = self.atoms.atoms().iter();
        let rounded = numbers.map(|&x| half::f16::from_f32(x).to_f32()).collect();
        Self::new(rounded, m, self.groups)
    }

    /// A checksum of the atoms and groups, so that codes can say which dictionary they need.
    pub fn checksum(&self) -> u32 {
        self.atoms.checksum() ^ self.groups.first as u32
    }
}
