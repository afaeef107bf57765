use std::borrow::Cow;
use std::sync::OnceLock;

use half::f16;

use super::{MAX_ATOMS, norm};
use crate::kernels::check_level;
use crate::kernels::rows::Rows;
use crate::kernels::vector::peak;
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
    /// Those of a file that are multiples of a unit of each atom's own, as [`AtomMatrix::in_eight_bits`] makes them.
    I8 {
        numbers: Vec<i8>,
        units: Vec<f32>,
    },
}

impl Numbers {
    fn new(numbers: Vec<f32>, head_dim: usize) -> Self {
        let atoms = || numbers.chunks_exact(head_dim);
        let units = atoms().map(unit_of_multiples).collect::<Option<Vec<f32>>>();
        if let Some(mut units) = units {
            units.shrink_to_fit();
            let atoms = atoms().zip(&units);
            let mut multiples = Vec::with_capacity(numbers.len());
            for (atom, &unit) in atoms {
                multiples.extend(atom.iter().map(|&x| multiple(x, unit)));
            }
            return Self::I8 {
                numbers: multiples,
                units,
            };
        }
        let is_half = |&x: &f32| f16::from_f32(x).to_f32() == x;
        if numbers.iter().all(is_half) {
            return Self::F16(numbers.iter().map(|&x| f16::from_f32(x)).collect());
        }
        Self::F32(numbers)
    }
}

/// The largest multiple of an atom's unit.
const MOST: f32 = 127.0;
/// What the largest number of an atom is a multiple of at the least: units have few bits, and may be larger than they must be.
const LEAST: f32 = 63.0;
/// The smallest number of f16: smaller units than eight of these have fewer bits.
const SMALLEST: f32 = 1.0 / (1 << 24) as f32;
/// Bits of a unit that are not zero: as many as f16 has beside the seven of a multiple, so that it holds every product.
const UNIT_BITS: u32 = 4;

/// The units that an atom can be in multiples of, the smallest first.
fn units(atom: &[f32]) -> impl Iterator<Item = f32> {
    let peak = peak(atom);
    let least = (peak / MOST).max(SMALLEST);
    let step = 1u32 << (f32::MANTISSA_DIGITS - UNIT_BITS);
    let few_bits = move |x: f32| {
        if x <= 8.0 * SMALLEST {
            return (x / SMALLEST).ceil() * SMALLEST;
        }
        f32::from_bits(x.to_bits().next_multiple_of(step))
    };
    let first = few_bits(least);
    let next = move |unit: &f32| Some(few_bits(f32::from_bits(unit.to_bits() + 1)));
    let units = std::iter::successors(Some(first), next);
    units.take_while(move |&unit| unit == first || unit * LEAST <= peak)
}

/// The nearest multiple.
fn multiple(x: f32, unit: f32) -> i8 {
    (x / unit).round_ties_even() as i8
}

/// The unit of an atom whose numbers are all multiples of one.
fn unit_of_multiples(atom: &[f32]) -> Option<f32> {
    // The sign of a zero would be lost.
    let is_multiple = |x: f32, unit: f32| {
        (x / unit).abs() <= MOST && (f32::from(multiple(x, unit)) * unit).to_bits() == x.to_bits()
    };
    units(atom).find(|&unit| atom.iter().all(|&x| is_multiple(x, unit)))
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
            numbers: Numbers::new(numbers, head_dim),
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
            rows => {
                let mut numbers = vec![0.0; count * self.head_dim];
                rows.widen_to(self.head_dim, &mut numbers);
                Cow::Owned(numbers)
            }
        }
    }

    /// The numbers, to be changed: in f32 from now on.
    pub(super) fn numbers_mut(&mut self) -> &mut [f32] {
        self.checksum.take();
        if !matches!(self.numbers, Numbers::F32(_)) {
            self.numbers = Numbers::F32(self.numbers().into_owned());
        }
        match &mut self.numbers {
            Numbers::F32(numbers) => numbers,
            _ => unreachable!("they are in f32 now"),
        }
    }

    pub(super) fn into_numbers(self) -> Vec<f32> {
        match self.numbers {
            Numbers::F32(numbers) => numbers,
            _ => self.numbers().into_owned(),
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
            Numbers::I8 { numbers, units } => {
                numbers.capacity() + units.capacity() * size_of::<f32>()
            }
        }
    }

    /// The numbers as a file keeps them.
    pub(super) fn in_half_precision(&self) -> Vec<f32> {
        let numbers = self.numbers();
        let numbers = numbers.iter();
        numbers.map(|&x| f16::from_f32(x).to_f32()).collect()
    }

    /// The nearest numbers that are multiples of a unit of each atom's own, 127 at the most. The units are such that f16 holds the
    /// numbers exactly: a file keeps them as it keeps others. Numbers beyond f16's range do not fit.
    pub(super) fn in_eight_bits(&self) -> Vec<f32> {
        let numbers = self.numbers();
        let atoms = numbers.chunks_exact(self.head_dim);
        let rounded = atoms.flat_map(|atom| {
            let fewest = units(atom).next().unwrap_or(1.0);
            let unit = unit_of_multiples(atom).unwrap_or(fewest);
            atom.iter()
                .map(move |&x| f32::from(multiple(x, unit)) * unit)
        });
        rounded.collect()
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

    pub(super) fn all(&self) -> Rows<'_> {
        match &self.numbers {
            Numbers::F32(numbers) => Rows::F32(numbers),
            Numbers::F16(numbers) => Rows::F16(numbers),
            Numbers::I8 { numbers, units } => Rows::I8 { numbers, units },
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

    /// The atoms, `[N, m]` row by row; those of a file, which are kept in fewer bytes, are widened. `O(N·m)` then.
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

    /// Returns whether these are the same atoms as `other`, at the same place in memory.
    pub(crate) fn are(self, other: Atoms<'_>) -> bool {
        std::ptr::eq(self.matrix, other.matrix) && self.len == other.len
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn eight_bits_are_told_from_the_numbers(
            m in 1usize..70, count in 1usize..20, exponent in -26i32..14, zero in 0usize..20, seed: u32,
        ) {
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * 2f32.powi(exponent)
            };
            let mut numbers: Vec<f32> = (0..count * m).map(|_| draw()).collect();
            if zero < count {
                numbers[zero * m..][..m].fill(0.0);
            }
            let given = AtomMatrix::new(numbers, m).unwrap();
            let rounded = given.in_eight_bits();
            let kept = AtomMatrix::new(rounded.clone(), m).unwrap();
            let in_bytes = matches!(kept.numbers, Numbers::I8 { .. });
            prop_assert!(in_bytes);
            prop_assert_eq!(&*kept.numbers(), &rounded[..]);
            prop_assert_eq!(kept.bytes(), count * (m + size_of::<f32>()));
            prop_assert_eq!(kept.in_eight_bits(), &rounded[..], "they are what they become");
            prop_assert_eq!(kept.in_half_precision(), &rounded[..], "a file holds them");
            let wide = AtomMatrix { numbers: Numbers::F32(rounded.clone()), ..kept.clone() };
            prop_assert!(wide == kept);
            prop_assert_eq!(wide.checksum(), kept.checksum());
            let pairs = given.numbers().chunks(m).zip(rounded.chunks(m)).map(|(a, b)| (a.to_vec(), b.to_vec())).collect::<Vec<_>>();
            for (atom, rounded) in pairs {
                // Half a unit, which is an eighth larger at the most than the largest number needs, but where f16 has few bits.
                let needed = peak(&atom) / MOST;
                let most = (needed * 1.125).max(needed + SMALLEST) * 0.501;
                for (x, y) in atom.iter().zip(rounded) {
                    prop_assert!((x - y).abs() <= most, "{} for {}", y, x);
                }
            }
        }
    }

    #[test]
    fn other_numbers_are_kept_as_they_are() {
        let halves = vec![0.5, 0.25, 1.0 / 3.0]
            .into_iter()
            .map(|x| f16::from_f32(x).to_f32());
        let halves: Vec<f32> = halves.collect();
        let kept = AtomMatrix::new(halves.clone(), 3).unwrap();
        assert!(matches!(kept.numbers, Numbers::F16(_)));
        assert_eq!(*kept.numbers(), halves[..]);
        let numbers = vec![0.1, 0.2, 0.3];
        let kept = AtomMatrix::new(numbers.clone(), 3).unwrap();
        assert!(matches!(kept.numbers, Numbers::F32(_)));
        assert_eq!(*kept.numbers(), numbers[..]);
    }
}
