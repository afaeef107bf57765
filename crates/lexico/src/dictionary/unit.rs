use std::borrow::Cow;
use std::path::Path;
use std::sync::OnceLock;

use super::atoms::{AtomMatrix, Atoms};
use super::set::{CURE, FORMATS};
use super::{check_sparsity, norm};
use crate::kernels::rows::Rows;
use crate::kernels::scan::RoundedAtoms;
use crate::tensor_file::TensorFile;
use crate::{Error, Result};

/// Distance from 1 at which an atom's norm may lie: bf16 rounding moves it by less.
const NORM_TOLERANCE: f64 = 1e-2;

/// `N` unit-norm atoms of length `m`, one a row.
#[derive(Debug, Clone)]
pub struct Dictionary {
    atoms: AtomMatrix,
    /// Made when a pursuit first needs them.
    rounded: OnceLock<RoundedAtoms>,
}

impl PartialEq for Dictionary {
    fn eq(&self, other: &Self) -> bool {
        self.atoms == other.atoms
    }
}

impl<'a> From<&'a Dictionary> for Atoms<'a> {
    fn from(dictionary: &'a Dictionary) -> Self {
        Self::new(&dictionary.atoms, dictionary.len())
    }
}

impl Dictionary {
    /// Takes `[N, m]` atoms, row by row.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the numbers do not fill whole rows, `N` is 0 or above 65,536,
    /// or an atom is not finite or not of unit length.
    pub fn new(atoms: Vec<f32>, head_dim: usize) -> Result<Self> {
        let atoms = AtomMatrix::new(atoms, head_dim)?;
        for (i, atom) in atoms.numbers().chunks_exact(head_dim).enumerate() {
            let norm = norm(atom);
            if norm == 0.0 {
                return Err(Error::Dictionary(format!("atom {i} is all zeros")));
            }
            if (norm - 1.0).abs() > NORM_TOLERANCE {
                let reason = format!("atom {i} has length {norm:.4}, but atoms are of unit length");
                return Err(Error::Dictionary(reason));
            }
        }
        Ok(Self {
            atoms,
            rounded: OnceLock::new(),
        })
    }

    /// Takes `[N, m]` rows of any length and scales each to unit length.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where a row is zero or not finite, or the shape is impossible.
    pub fn normalised(atoms: Vec<f32>, head_dim: usize) -> Result<Self> {
        let mut atoms = AtomMatrix::new(atoms, head_dim)?;
        for atom in atoms.numbers_mut().chunks_exact_mut(head_dim) {
            let norm = norm(atom);
            if norm > 0.0 {
                atom.iter_mut()
                    .for_each(|x| *x = (f64::from(*x) / norm) as f32);
            }
        }
        Self::new(atoms.into_numbers(), head_dim)
    }

    /// Reads one tensor `[N, m]` of a dictionary file. Of the metadata only `format` is needed.
    ///
    /// # Errors
    /// Those of [`TensorFile`], [`Error::Format`], and [`Error::Tensor`] where the tensor is no dictionary.
    pub fn load(path: impl AsRef<Path>, tensor: &str) -> Result<Self> {
        let file = TensorFile::open(path)?;
        file.check_format(&FORMATS, CURE)?;
        Self::read(&file, tensor)
    }

    pub(super) fn read(file: &TensorFile, tensor: &str) -> Result<Self> {
        let (atoms, shape) = file.f32_tensor(tensor, 2)?;
        Self::new(atoms, shape[1]).map_err(|e| {
            let reason = format!("{e} (shape {shape:?}, atoms by rows)");
            Error::tensor(file.path(), tensor, reason)
        })
    }

    /// The atoms, `[N, m]` row by row; those of a file, which are kept in fewer bytes, are widened. `O(N·m)` then.
    pub fn atoms(&self) -> Cow<'_, [f32]> {
        self.atoms.numbers()
    }

    /// Atom `i`.
    ///
    /// # Panics
    /// Where `i` is not below [`Dictionary::len`].
    pub fn atom(&self, i: usize) -> Cow<'_, [f32]> {
        self.atoms.numbers_of(i, 1)
    }

    /// Atom `i` as it is kept.
    pub(crate) fn row(&self, i: usize) -> Rows<'_> {
        self.atoms.rows(i, 1)
    }

    /// `N`, the number of atoms; never 0.
    #[allow(clippy::len_without_is_empty)] // a dictionary always has atoms
    pub fn len(&self) -> usize {
        self.atoms.len()
    }

    /// `m`, the length of an atom.
    pub fn head_dim(&self) -> usize {
        self.atoms.head_dim()
    }

    /// The bytes held: those of the atoms, and once vectors have been coded those of a copy in 8 bits.
    pub fn bytes(&self) -> usize {
        self.atoms.bytes() + self.rounded.get().map_or(0, RoundedAtoms::bytes)
    }

    /// The dictionary as a file keeps it: atoms in half precision.
    ///
    /// # Errors
    /// Those of [`Dictionary::new`], where rounding leaves nothing of an atom.
    pub fn in_half_precision(self) -> Result<Self> {
        Self::new(self.atoms.in_half_precision(), self.head_dim())
    }

    pub(crate) fn rounded(&self) -> &RoundedAtoms {
        self.rounded
            .get_or_init(|| RoundedAtoms::new(self.atoms.all(), self.head_dim()))
    }

    /// A checksum of the atoms, so that codes can say which dictionary they need.
    pub fn checksum(&self) -> u32 {
        self.atoms.checksum()
    }

    /// Checks that codes over this dictionary can have `sparsity` nonzeros: 1 to `min(m, N)`.
    ///
    /// # Errors
    /// [`Error::Sparsity`].
    pub fn check_sparsity(&self, sparsity: usize) -> Result<()> {
        check_sparsity(sparsity, self.head_dim(), self.len())
    }

    pub(crate) fn atoms_mut(&mut self) -> &mut [f32] {
        self.rounded.take();
        self.atoms.numbers_mut()
    }
}
