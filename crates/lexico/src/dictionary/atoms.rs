use std::sync::OnceLock;

use half::f16;

use super::{MAX_ATOMS, norm};
use crate::kernels::check_level;
use crate::kernels::dense::Rows;
use crate::{Error, Result};

/// `N` finite rows of length `m`: what a [`Dictionary`](super::Dictionary) and [`Codebooks`](super::Codebooks) keep.
#[derive(Debug, Clone)]
pub(super) struct AtomMatrix {
    numbers: Vec<f32>,
    head_dim: usize,
    /// The numbers in f16, where that is exactly what they are, as it is after reading a file; made when a
    /// decoding step first needs them.
    halves: OnceLock<Option<Vec<f16>>>,
    /// Made once: it takes a pass over all numbers, and is asked for whenever a cache is saved or loaded.
    checksum: OnceLock<u32>,
}

impl PartialEq for AtomMatrix {
    fn eq(&self, other: &Self) -> bool {
        (&self.numbers, self.head_dim) == (&other.numbers, other.head_dim)
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
            numbers,
            head_dim,
            halves: OnceLock::new(),
            checksum: OnceLock::new(),
        })
    }

    pub(super) fn numbers(&self) -> &[f32] {
        &self.numbers
    }

    pub(super) fn numbers_mut(&mut self) -> &mut [f32] {
        self.halves.take();
        self.checksum.take();
        &mut self.numbers
    }

    pub(super) fn into_numbers(self) -> Vec<f32> {
        self.numbers
    }

    pub(super) fn atom(&self, i: usize) -> &[f32] {
        &self.numbers[i * self.head_dim..(i + 1) * self.head_dim]
    }

    pub(super) fn len(&self) -> usize {
        self.numbers.len() / self.head_dim
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The bytes held: those of the numbers; once codes have been attended to, of a copy in f16.
    pub(super) fn bytes(&self) -> usize {
        let halves = self.halves.get().and_then(Option::as_ref);
        self.numbers.capacity() * size_of::<f32>()
            + halves.map_or(0, Vec::capacity) * size_of::<f16>()
    }

    /// The numbers as a file keeps them.
    pub(super) fn in_half_precision(&self) -> Vec<f32> {
        let numbers = self.numbers.iter();
        numbers.map(|&x| f16::from_f32(x).to_f32()).collect()
    }

    /// A checksum of the numbers, so that codes can say what they are over.
    pub(super) fn checksum(&self) -> u32 {
        *self.checksum.get_or_init(|| {
            let mut hasher = crc32fast::Hasher::new();
            // An atom at a time: the hasher is slow on few bytes.
            let mut bytes = Vec::with_capacity(size_of::<f32>() * self.head_dim);
            for atom in self.numbers.chunks_exact(self.head_dim) {
                bytes.clear();
                bytes.extend(atom.iter().flat_map(|x| x.to_le_bytes()));
                hasher.update(&bytes);
            }
            hasher.finalize()
        })
    }

    /// Atoms `first` to `first + count`, in the fewest bytes that hold them exactly.
    fn rows(&self, first: usize, count: usize) -> Rows<'_> {
        let range = first * self.head_dim..(first + count) * self.head_dim;
        let halves = self.halves.get_or_init(|| {
            let halves = self.numbers.iter().map(|&x| {
                let half = f16::from_f32(x);
                (half.to_f32() == x).then_some(half)
            });
            halves.collect()
        });
        match halves {
            Some(halves) => Rows::F16(&halves[range]),
            None => Rows::F32(&self.numbers[range]),
        }
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

    /// The atoms, `[N, m]` row by row.
    pub fn numbers(self) -> &'a [f32] {
        &self.matrix.numbers[..self.len * self.head_dim()]
    }

    /// Atom `i`.
    ///
    /// # Panics
    /// Where `i` is not below [`Atoms::len`].
    pub fn atom(self, i: usize) -> &'a [f32] {
        let m = self.head_dim();
        &self.numbers()[i * m..(i + 1) * m]
    }

    /// A checksum of all atoms of the dictionary or the codebooks, so that codes can say which they need.
    pub fn checksum(self) -> u32 {
        self.matrix.checksum()
    }

    /// The atoms in blocks of up to `block`, each with the number of its first and how many it has.
    pub(crate) fn blocks(self, block: usize) -> impl Iterator<Item = (usize, usize, Rows<'a>)> {
        (0..self.len).step_by(block).map(move |first| {
            let count = block.min(self.len - first);
            (first, count, self.matrix.rows(first, count))
        })
    }

    /// Returns whether these are the same atoms as `other`, at the same place in memory.
    pub(crate) fn are(self, other: Atoms<'_>) -> bool {
        std::ptr::eq(self.matrix, other.matrix) && self.len == other.len
    }
}
