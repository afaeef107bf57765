//! Dictionaries: unit-norm atoms, one matrix for keys and one for values in every layer.

mod additive;
mod allocation;
mod extension;
mod set;

pub use additive::{CODEBOOK_ATOMS, CodebookSizes, Codebooks, MAX_FIRST_ATOMS};
pub use allocation::{CodingLosses, LayerLosses, LayerSparsities};
pub use extension::{Atoms, Extension};
pub use set::{
    DictionarySet, FORMAT, LayerCodebooks, LayerDictionaries, LayerErrors, ModelIdentity,
    RotaryIdentity, Training, additive_sparsity,
};

use std::path::Path;
use std::sync::OnceLock;

use half::f16;

use crate::encode::scan::RoundedAtoms;
use crate::kernels::dense::Rows;
use crate::tensor_file::TensorFile;
use crate::{Error, Result};

/// How far from 1 an atom's norm may lie: bf16 rounding moves it by less.
const NORM_TOLERANCE: f64 = 1e-2;
/// The most atoms a dictionary can have: indices are stored in 16 bits.
pub const MAX_ATOMS: usize = 1 << 16;

/// `N` unit-norm atoms of length `m`, one a row.
#[derive(Debug, Clone)]
pub struct Dictionary {
    atoms: Vec<f32>,
    head_dim: usize,
    /// Made when a pursuit first needs them.
    rounded: OnceLock<RoundedAtoms>,
    /// The atoms in f16, where that is exactly what they are, as it is after reading a file; made when a
    /// decoding step first needs them.
    halves: OnceLock<Option<Vec<f16>>>,
}

impl PartialEq for Dictionary {
    fn eq(&self, other: &Self) -> bool {
        (&self.atoms, self.head_dim) == (&other.atoms, other.head_dim)
    }
}

impl Dictionary {
    /// Takes `[N, m]` atoms, row by row.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the numbers do not fill whole rows, `N` is 0 or above 65,536,
    /// or an atom is not finite or not of unit length.
    pub fn new(atoms: Vec<f32>, head_dim: usize) -> Result<Self> {
        check_shape(&atoms, head_dim)?;
        for (i, atom) in atoms.chunks_exact(head_dim).enumerate() {
            let norm = norm(atom);
            if !norm.is_finite() {
                return Err(Error::Dictionary(format!(
                    "atom {i} holds a NaN or an infinity"
                )));
            }
            if norm == 0.0 {
                return Err(Error::Dictionary(format!("atom {i} is all zeros")));
            }
            if (norm - 1.0).abs() > NORM_TOLERANCE {
                let reason = format!("atom {i} has length {norm}, but atoms are of unit length");
                return Err(Error::Dictionary(reason));
            }
        }
        Ok(Self {
            atoms,
            head_dim,
            rounded: OnceLock::new(),
            halves: OnceLock::new(),
        })
    }

    /// Takes `[N, m]` rows of any length as they are: for dictionaries whose atoms have lengths of their own.
    fn of_any_length(atoms: Vec<f32>, head_dim: usize) -> Result<Self> {
        check_shape(&atoms, head_dim)?;
        if let Some(i) = atoms
            .chunks_exact(head_dim)
            .position(|atom| !norm(atom).is_finite())
        {
            return Err(Error::Dictionary(format!(
                "atom {i} holds a NaN or an infinity"
            )));
        }
        Ok(Self {
            atoms,
            head_dim,
            rounded: OnceLock::new(),
            halves: OnceLock::new(),
        })
    }

    /// Takes `[N, m]` rows of any length and scales each to unit length.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where a row is zero or not finite, or the shape is impossible.
    pub fn normalised(mut atoms: Vec<f32>, head_dim: usize) -> Result<Self> {
        check_shape(&atoms, head_dim)?;
        for atom in atoms.chunks_exact_mut(head_dim) {
            let norm = norm(atom);
            if norm > 0.0 {
                atom.iter_mut()
                    .for_each(|x| *x = (f64::from(*x) / norm) as f32);
            }
        }
        Self::new(atoms, head_dim)
    }

    /// Reads one tensor `[N, m]` of a dictionary file. Of the metadata only `format` is needed.
    ///
    /// # Errors
    /// Those of [`TensorFile`], [`Error::Format`], and [`Error::Tensor`] where the tensor is no dictionary.
    pub fn load(path: impl AsRef<Path>, tensor: &str) -> Result<Self> {
        let file = TensorFile::open(path)?;
        file.check_format(FORMAT, set::CURE)?;
        Self::read(&file, tensor)
    }

    pub(crate) fn read(file: &TensorFile, tensor: &str) -> Result<Self> {
        let (atoms, shape) = file.f32_tensor(tensor, 2)?;
        Self::new(atoms, shape[1]).map_err(|e| {
            let reason = format!("{e} (shape {shape:?}, atoms by rows)");
            Error::tensor(file.path(), tensor, reason)
        })
    }

    /// The atoms, `[N, m]` row by row.
    pub fn atoms(&self) -> &[f32] {
        &self.atoms
    }

    /// Atom `i`.
    ///
    /// # Panics
    /// Where `i` is not below [`Dictionary::len`].
    pub fn atom(&self, i: usize) -> &[f32] {
        &self.atoms[i * self.head_dim..(i + 1) * self.head_dim]
    }

    /// `N`, the number of atoms; never 0.
    #[allow(clippy::len_without_is_empty)] // a dictionary always has atoms
    pub fn len(&self) -> usize {
        self.atoms.len() / self.head_dim
    }

    /// `m`, the length of an atom.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes held: those of the atoms; once vectors have been coded, of a copy in 8 bits; once codes have
    /// been attended to, of a copy in f16.
    pub fn bytes(&self) -> usize {
        let rounded = self.rounded.get().map_or(0, RoundedAtoms::bytes);
        let halves = self
            .halves
            .get()
            .and_then(Option::as_ref)
            .map_or(0, Vec::capacity);
        self.atoms.capacity() * size_of::<f32>() + rounded + halves * size_of::<f16>()
    }

    /// The dictionary as a file keeps it: atoms in half precision.
    ///
    /// # Errors
    /// As [`Dictionary::new`], where rounding leaves nothing of an atom.
    pub fn in_half_precision(self) -> Result<Self> {
        let rounded = self.atoms.iter().map(|&x| f16::from_f32(x).to_f32());
        Self::new(rounded.collect(), self.head_dim)
    }

    /// Atoms `first` to `first + count`, in the fewest bytes that hold them exactly.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Rows<'_> {
        let range = first * self.head_dim..(first + count) * self.head_dim;
        let halves = self.halves.get_or_init(|| {
            let halves = self.atoms.iter().map(|&x| {
                let half = f16::from_f32(x);
                (half.to_f32() == x).then_some(half)
            });
            halves.collect()
        });
        match halves {
            Some(halves) => Rows::F16(&halves[range]),
            None => Rows::F32(&self.atoms[range]),
        }
    }

    pub(crate) fn rounded(&self) -> &RoundedAtoms {
        self.rounded
            .get_or_init(|| RoundedAtoms::new(&self.atoms, self.head_dim))
    }

    /// A checksum of the atoms, so that codes can say which dictionary they need.
    pub fn checksum(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        // An atom at a time: the hasher is slow on few bytes.
        let mut bytes = Vec::with_capacity(size_of::<f32>() * self.head_dim);
        for atom in self.atoms.chunks_exact(self.head_dim) {
            bytes.clear();
            bytes.extend(atom.iter().flat_map(|x| x.to_le_bytes()));
            hasher.update(&bytes);
        }
        hasher.finalize()
    }

    /// Checks that codes over this dictionary can have `sparsity` nonzeros: 1 to `min(m, N)`.
    ///
    /// # Errors
    /// [`Error::Sparsity`].
    pub fn check_sparsity(&self, sparsity: usize) -> Result<()> {
        check_sparsity(sparsity, self.head_dim, self.len())
    }

    pub(crate) fn atoms_mut(&mut self) -> &mut [f32] {
        self.rounded.take();
        self.halves.take();
        &mut self.atoms
    }
}

fn check_shape(atoms: &[f32], head_dim: usize) -> Result<()> {
    if head_dim == 0 || !atoms.len().is_multiple_of(head_dim) {
        let reason = format!("{} numbers do not fill rows of {head_dim}", atoms.len());
        return Err(Error::Dictionary(reason));
    }
    let count = atoms.len() / head_dim;
    if count == 0 || count > MAX_ATOMS {
        let reason = format!("{count} atoms; between 1 and {MAX_ATOMS} are possible");
        return Err(Error::Dictionary(reason));
    }
    Ok(())
}

/// Euclidean length, in f64: that of any finite f32 vector is finite.
pub(crate) fn norm(x: &[f32]) -> f64 {
    crate::kernels::square(x).sqrt()
}

pub(crate) fn check_sparsity(sparsity: usize, head_dim: usize, atoms: usize) -> Result<()> {
    let most = head_dim.min(atoms);
    if (1..=most).contains(&sparsity) {
        return Ok(());
    }
    Err(Error::Sparsity {
        sparsity,
        most,
        head_dim,
        atoms,
    })
}
