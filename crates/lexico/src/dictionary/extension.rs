use std::borrow::Cow;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Dictionary, norm};
use crate::kernels::dense::Rows;
use crate::{Error, Result};

/// Atoms that one session adds to a dictionary that it shares with others: `2m` bytes each, in half precision.
/// Codes name them by the numbers from the dictionary's `N` on. Clones share them.
#[derive(Debug, Clone, PartialEq)]
pub struct Extension {
    atoms: Arc<[f16]>,
    head_dim: usize,
}

impl Extension {
    /// No atoms yet; they will have length `head_dim`.
    pub fn new(head_dim: usize) -> Self {
        Self {
            atoms: Arc::default(),
            head_dim,
        }
    }

    /// The atoms `[n, m]` of an extension that was saved.
    ///
    /// # Errors
    /// [`Error::Adaptive`] where they are not whole or not finite.
    pub fn of_atoms(atoms: Vec<f16>, head_dim: usize) -> Result<Self> {
        if head_dim == 0 || !atoms.len().is_multiple_of(head_dim) {
            let reason = format!("{} numbers are no atoms of length {head_dim}", atoms.len());
            return Err(Error::Adaptive(reason));
        }
        if atoms.iter().any(|x| !x.is_finite()) {
            return Err(Error::Adaptive("one is not finite".to_owned()));
        }
        Ok(Self {
            atoms: atoms.into(),
            head_dim,
        })
    }

    /// Number of atoms.
    pub fn len(&self) -> usize {
        self.atoms.len() / self.head_dim.max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.atoms.is_empty()
    }

    /// The atoms, `[n, m]` row by row.
    pub fn atoms(&self) -> &[f16] {
        &self.atoms
    }

    /// `m`, the length of an atom.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of the atoms.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.atoms)
    }

    /// A copy with the vectors `x` `[n, m]` added, none of which is zero, scaled to unit length.
    pub(crate) fn with(&self, x: &[f32]) -> Self {
        let mut atoms = self.atoms.to_vec();
        for x in x.chunks_exact(self.head_dim) {
            let length = norm(x);
            atoms.extend(x.iter().map(|&x| f16::from_f64(f64::from(x) / length)));
        }
        Self {
            atoms: atoms.into(),
            head_dim: self.head_dim,
        }
    }
}

/// The atoms that codes are over: a dictionary's, and then those that a session has added.
#[derive(Debug, Clone, Copy)]
pub struct Atoms<'a> {
    dictionary: &'a Dictionary,
    /// How many of the dictionary's, from the first on.
    own: usize,
    added: &'a [f16],
}

impl<'a> From<&'a Dictionary> for Atoms<'a> {
    fn from(dictionary: &'a Dictionary) -> Self {
        Self::first(dictionary, dictionary.len())
    }
}

impl<'a> Atoms<'a> {
    /// The first `count` atoms of a dictionary.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn first(dictionary: &'a Dictionary, count: usize) -> Self {
        assert!(count <= dictionary.len(), "atoms that there are");
        Self {
            dictionary,
            own: count,
            added: &[],
        }
    }

    /// A dictionary with what a session has added to it.
    ///
    /// # Panics
    /// Where their atoms differ in length, or both together have more than
    /// [`MAX_ATOMS`](super::MAX_ATOMS).
    pub fn extended(dictionary: &'a Dictionary, extension: &'a Extension) -> Self {
        assert_eq!(
            dictionary.head_dim, extension.head_dim,
            "atoms of one length"
        );
        let atoms = Self {
            added: &extension.atoms,
            ..dictionary.into()
        };
        assert!(
            atoms.len() <= super::MAX_ATOMS,
            "indices are stored in 16 bits"
        );
        atoms
    }

    /// Number of atoms, those added included.
    #[allow(clippy::len_without_is_empty)] // a dictionary always has atoms
    pub fn len(self) -> usize {
        self.own + self.added.len() / self.head_dim()
    }

    /// `m`, the length of an atom.
    pub fn head_dim(self) -> usize {
        self.dictionary.head_dim
    }

    /// The dictionary's own.
    pub(crate) fn dictionary(self) -> &'a Dictionary {
        self.dictionary
    }

    /// Those that were added.
    pub(crate) fn added(self) -> Rows<'a> {
        Rows::F16(self.added)
    }

    /// Atom `i`, in `widened` where it was added.
    pub(crate) fn atom<'b>(self, i: usize, widened: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        let m = self.head_dim();
        let Some(added) = i.checked_sub(self.own) else {
            return self.dictionary.atom(i);
        };
        widened.resize(m, 0.0);
        self.added[added * m..][..m].convert_to_f32_slice(widened);
        widened
    }

    /// The atoms in blocks of `block` at the most, each with the number of its first and how many it has.
    pub(crate) fn blocks(self, block: usize) -> impl Iterator<Item = (usize, usize, Rows<'a>)> {
        let (n, m) = (self.own, self.head_dim());
        let own = (0..n).step_by(block).map(move |first| {
            let count = block.min(n - first);
            (first, count, self.dictionary.rows(first, count))
        });
        let added = self.added.chunks(block * m).enumerate();
        own.chain(added.map(move |(i, atoms)| (n + i * block, atoms.len() / m, Rows::F16(atoms))))
    }

    /// The atoms in f32, `[n, m]` each: the dictionary's and, where there are any, those added, with the number
    /// of the first.
    pub(crate) fn matrices(self) -> impl Iterator<Item = (usize, Cow<'a, [f32]>)> {
        let own = &self.dictionary.atoms()[..self.own * self.head_dim()];
        let own = (0, Cow::Borrowed(own));
        let added = (!self.added.is_empty()).then(|| {
            let mut widened = vec![0.0; self.added.len()];
            self.added.convert_to_f32_slice(&mut widened);
            (self.own, Cow::Owned(widened))
        });
        std::iter::once(own).chain(added)
    }

    /// Whether these are the same atoms as `other`, at the same place in memory.
    pub(crate) fn are(self, other: Atoms<'_>) -> bool {
        std::ptr::eq(self.dictionary, other.dictionary)
            && self.own == other.own
            && std::ptr::eq(self.added, other.added)
    }
}
