use std::borrow::Cow;
use std::sync::OnceLock;

use half::f16;

use super::{MAX_ATOMS, norm};
use crate::kernels::check_level;
use crate::kernels::rows::Rows;
use crate::{Error, Result};

/// `N` finite rows of length `m`: what a [`Dictionary`](super::Dictionary) and [`Codebooks`](super::Codebooks) keep.
#[derive(Debug, Clone)]
pub(super) struct AtomMatrix {
    numbers: Numbers,
    head_dim: usize,
    /// Made once: it takes a pass over all numbers, and is asked for whenever a cache is saved or loaded.
    checksum: OnceLock<u32>,
}

/// Numbers in the fewest bytes that hold them exactly.
#[derive(Debug, Clone)]
enum Numbers {
    F32(Vec<f32>),
    /// Those of a file.
    F16(Vec<f16>),
}

impl Numbers {
    fn new(numbers: Vec<f32>) -> Self {
        let halves = numbers.iter().map(|&x| {
            let half = f16::from_f32(x);
            (half.to_f32() == x).then_some(half)
        });
        match halves.collect() {
            Some(halves) => Self::F16(halves),
            None => Self::F32(numbers),
        }
    }
}

impl PartialEq for AtomMatrix {
    fn eq(&self, other: &Self) -> bool {
        self.head_dim == other.head_dim && self.numbers() == other.numbers()
    }
}

impl AtomMatrix {
    pub(super) fn new(numbers: Vec<f32>, head_dim: usize) -> Result<Self> {
        check_level().map_err(Error::Level)?;
        if head_dim == 0 || !numbers.len().is_multiple_of(head_dim) {
            let reason = format!("{} numbers do not fill rows of {head_dim}", numbers.len());
            return Err(Error::Dictionary(reason));
        }
        let count = numbers.len() / head_dim;
        if count == 0 || count > MAX_ATOMS {
            let reason = format!("{count} atoms; between 1 and {MAX_ATOMS} are possible");
            return Err(Error::Dictionary(reason));
        }
        let mut rows = numbers.chunks_exact(head_dim);
        if let Some(i) = rows.position(|atom| !norm(atom).is_finite()) {
            let reason = format!("atom {i} holds a NaN or an infinity");
            return Err(Error::Dictionary(reason));
        }
        Ok(Self {
            numbers: Numbers::new(numbers),
            head_dim,
            checksum: OnceLock::new(),
        })
    }

    pub(super) fn numbers(&self) -> Cow<'_, [f32]> {
        self.numbers_of(0, self.len())
    }

    /// The numbers of atoms `first` to `first + count`.
    pub(super) fn numbers_of(&self, first: usize, count: usize) -> Cow<'_, [f32]> {
        match self.rows(first, count) {
            Rows::F32(numbers) => Cow::Borrowed(numbers),
            rows @ Rows::F16(_) => {
                let mut numbers = vec![0.0; count * self.head_dim];
                rows.widen_to(&mut numbers);
                Cow::Owned(numbers)
            }
        }
    }

    /// The numbers, to be changed: in f32 from now on.
    pub(super) fn numbers_mut(&mut self) -> &mut [f32] {
        self.checksum.take();
        if let Numbers::F16(_) = self.numbers {
            self.numbers = Numbers::F32(self.numbers().into_owned());
        }
        match &mut self.numbers {
            Numbers::F32(numbers) => numbers,
            Numbers::F16(_) => unreachable!("they are in f32 now"),
        }
    }

    pub(super) fn into_numbers(self) -> Vec<f32> {
        match self.numbers {
            Numbers::F32(numbers) => numbers,
            Numbers::F16(_) => self.numbers().into_owned(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.all().len() / self.head_dim
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The bytes held.
    pub(super) fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F32(numbers) => numbers.capacity() * size_of::<f32>(),
            Numbers::F16(numbers) => numbers.capacity() * size_of::<f16>(),
        }
    }

    /// The numbers as a file keeps them.
    pub(super) fn in_half_precision(&self) -> Vec<f32> {
        let numbers = self.numbers();
        let numbers = numbers.iter();
        numbers.map(|&x| f16::from_f32(x).to_f32()).collect()
    }

    /// A checksum of the numbers, so that codes can say what they are over.
    pub(super) fn checksum(&self) -> u32 {
        *self.checksum.get_or_init(|| {
            let mut hasher = crc32fast::Hasher::new();
            // An atom at a time: the hasher is slow on few bytes.
            let mut bytes = Vec::with_capacity(size_of::<f32>() * self.head_dim);
            let numbers = self.numbers();
            for atom in numbers.chunks_exact(self.head_dim) {
                bytes.clear();
                bytes.extend(atom.iter().flat_map(|x| x.to_le_bytes()));
                hasher.update(&bytes);
            }
            hasher.finalize()
        })
    }

    fn all(&self) -> Rows<'_> {
        match &self.numbers {
            Numbers::F32(numbers) => Rows::F32(numbers),
            Numbers::F16(numbers) => Rows::F16(numbers),
        }
    }

    /// Atoms `first` to `first + count`.
    pub(super) fn rows(&self, first: usize, count: usize) -> Rows<'_> {
        self.all().part(first, count, self.head_dim)
    }
}

/// The atoms that codes are over: those of a dictionary, or of the first codebooks.
#[derive(Debug, Clone, Copy)]
pub struct Atoms<'a> {
    matrix: &'a AtomMatrix,
    len: usize,
}

impl<'a> Atoms<'a> {
    /// The first `len` atoms of a matrix, which must be there.
    pub(super) fn new(matrix: &'a AtomMatrix, len: usize) -> Self {
        assert!(len <= matrix.len(), "atoms that there are");
        Self { matrix, len }
    }

    /// The number of atoms.
    #[allow(clippy::len_without_is_empty)] // a dictionary always has atoms
    pub fn len(self) -> usize {
        self.len
    }

    /// `m`, the length of an atom.
    pub fn head_dim(self) -> usize {
        self.matrix.head_dim
    }

    /// The atoms, `[N, m]` row by row; those of a file, which are kept in f16, are widened. `O(N·m)` then.
    pub fn numbers(self) -> Cow<'a, [f32]> {
        self.matrix.numbers_of(0, self.len)
    }

    /// Atom `i`.
    ///
    /// # Panics
    /// Where `i` is not below [`Atoms::len`].
    pub fn atom(self, i: usize) -> Cow<'a, [f32]> {
        assert!(i < self.len, "an atom that there is");
        self.matrix.numbers_of(i, 1)
    }

    /// All atoms as they are kept.
    pub(crate) fn all(self) -> Rows<'a> {
        self.rows(0, self.len)
    }

    /// Atoms `first` to `first + count` as they are kept.
    pub(crate) fn rows(self, first: usize, count: usize) -> Rows<'a> {
        assert!(first + count <= self.len, "atoms that there are");
        self.matrix.rows(first, count)
    }

    /// A checksum of all atoms of the dictionary or the codebooks, so that codes can say which they need.
    pub fn checksum(self) -> u32 {
        self.matrix.checksum()
    }

    /// The atoms in blocks of up to `block`, each with the number of its first and how many it has.
    pub(crate) fn blocks(self, block: usize) -> impl Iterator<Item = (usize, usize, Rows<'a>)> {
        (0..self.len).step_by(block).map(move |first| {
            let count = block.min(self.len - first);
            (first, count, self.rows(first, count))
        })
    }

    /// Returns whether these are the same atoms as `other`, at the same place in memory.
    pub(crate) fn are(self, other: Atoms<'_>) -> bool {
        std::ptr::eq(self.matrix, other.matrix) && self.len == other.len
    }
}
