//! One atom a group: a byte for each but the first, and two bytes for that and the vector's scale.

use std::sync::LazyLock;

use super::GROWTH;
use crate::dictionary::{CODEBOOK_ATOMS, CodebookSizes, MAX_ATOMS, MAX_FIRST_ATOMS};

/// Bits that name the atom of the first group; those above it are the vector's scale.
const ATOM_BITS: u32 = 11;
/// Scales that there are: `2^(k/32)`, from 1 to nearly 2.
const SCALES: usize = 1 << (u16::BITS - ATOM_BITS);

/// What the sums of atoms are multiplied by.
static SCALE_VALUES: LazyLock<[f32; SCALES]> =
    LazyLock::new(|| std::array::from_fn(|k| 2f32.powf(k as f32 / SCALES as f32)));

/// What the scale of this number is.
#[cfg(feature = "cuda")]
pub(crate) fn scale_of_number(number: u8) -> f32 {
    SCALE_VALUES[usize::from(number)]
}

/// A vector's atom of the first group and its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Leading(pub(crate) u16);

impl Leading {
    /// The scale nearest to `scale`.
    pub(crate) fn new(atom: u16, scale: f32) -> Self {
        let number = (scale.log2() * SCALES as f32).round();
        let number = number.clamp(0.0, (SCALES - 1) as f32) as u16;
        Self(atom | number << ATOM_BITS)
    }

    /// As [`Self::atom`] and [`Self::scale_number`] give it; `None` where there is no such scale.
    pub(super) fn of_numbers(atom: u16, scale: u8) -> Option<Self> {
        (usize::from(scale) < SCALES).then_some(Self(atom | u16::from(scale) << ATOM_BITS))
    }

    #[inline(always)]
    pub(crate) fn atom(self) -> usize {
        usize::from(self.0) & (MAX_FIRST_ATOMS - 1)
    }

    /// The scale's number among all scales.
    pub(crate) fn scale_number(self) -> u8 {
        (self.0 >> ATOM_BITS) as u8
    }

    #[inline(always)]
    pub(crate) fn scale(self, values: &[f32; SCALES]) -> f32 {
        values[usize::from(self.0 >> ATOM_BITS)]
    }
}

/// The codes of some vectors in a row.
#[derive(Debug, Clone, Default)]
pub(super) struct AdditivePage {
    /// Of each vector.
    pub(super) first: Vec<Leading>,
    /// Of each vector the atoms of the other groups, by their numbers in these, `[n, s − 1]`.
    pub(super) rest: Vec<u8>,
}

/// Some vectors' codes as they are stored.
#[derive(Clone, Copy)]
pub(crate) struct AdditiveBlock<'a> {
    /// Of each vector.
    pub(crate) first: &'a [Leading],
    /// `[n, s − 1]`
    pub(crate) rest: &'a [u8],
    /// Where the groups begin.
    pub(crate) groups: CodebookSizes,
    pub(crate) sparsity: usize,
}

impl AdditivePage {
    pub(super) fn len(&self) -> usize {
        self.first.len()
    }

    /// Makes room for `vectors` more, where it is short for so many that pages are seldom copied.
    pub(super) fn reserve(&mut self, sparsity: usize, vectors: usize, most: usize) {
        if self.first.capacity() - self.first.len() < vectors {
            let growth = GROWTH
                .max(self.len() / 64)
                .min(most.saturating_sub(self.len()));
            let vectors = vectors.max(growth);
            self.first.reserve_exact(vectors);
            self.rest.reserve_exact(vectors * (sparsity - 1));
        }
    }

    /// Appends the code whose atoms have these numbers among all of the dictionary, their sum multiplied by `scale`.
    pub(super) fn push(&mut self, groups: CodebookSizes, indices: &[u16], scale: f32) {
        for (group, &index) in indices.iter().enumerate() {
            match group {
                0 => self.first.push(Leading::new(index, scale)),
                group => {
                    let own = usize::from(index) - groups.start(group);
                    debug_assert!(own <= usize::from(u8::MAX), "one atom a group");
                    self.rest.push(own as u8);
                }
            }
        }
    }

    pub(super) fn drop_front(&mut self, sparsity: usize, count: usize) {
        self.first.drain(..count);
        self.rest.drain(..count * (sparsity - 1));
    }

    /// The largest number of an atom among all of the dictionary: one of the last group.
    pub(super) fn largest_index(&self, groups: CodebookSizes, sparsity: usize) -> u16 {
        let first = self
            .first
            .iter()
            .map(|first| first.atom() as u16)
            .max()
            .unwrap_or(0);
        let last = self.rest.iter().skip(sparsity.saturating_sub(2));
        match last.step_by(sparsity.saturating_sub(1).max(1)).max() {
            Some(&own) => (groups.start(sparsity - 1) + usize::from(own)) as u16,
            None => first,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.first.capacity() * size_of::<Leading>() + self.rest.capacity()
    }

    pub(super) fn bytes_used(&self) -> usize {
        self.first.len() * size_of::<Leading>() + self.rest.len()
    }

    pub(super) fn prefetch(&self) {
        crate::kernels::prefetch_first(&self.first);
        crate::kernels::prefetch_first(&self.rest);
    }

    pub(super) fn block(&self, groups: CodebookSizes, sparsity: usize) -> AdditiveBlock<'_> {
        AdditiveBlock {
            first: &self.first,
            rest: &self.rest,
            groups,
            sparsity,
        }
    }
}

impl<'a> AdditiveBlock<'a> {
    /// The first `count` vectors, which must be there, and the others.
    pub(super) fn split_at(self, count: usize) -> (Self, Self) {
        let first = self.first.split_at(count);
        let rest = self.rest.split_at(count * (self.sparsity - 1));
        let block = |first, rest| AdditiveBlock {
            first,
            rest,
            ..self
        };
        (block(first.0, rest.0), block(first.1, rest.1))
    }

    /// Numbers of the atoms of vector `v` among all of the dictionary.
    pub(super) fn indices(self, v: usize) -> impl Iterator<Item = usize> + 'a {
        let each = self.sparsity - 1;
        let rest = &self.rest[v * each..][..each];
        let rest = rest.iter().zip(1..);
        let rest = rest.map(move |(&own, group)| self.groups.start(group) + usize::from(own));
        std::iter::once(self.first[v].atom()).chain(rest)
    }

    /// What the sum of vector `v`'s atoms is multiplied by.
    pub(super) fn scale(self, v: usize) -> f32 {
        self.first[v].scale(&SCALE_VALUES)
    }

    /// What the numbers of scales stand for.
    #[inline(always)]
    pub(crate) fn scales(self) -> &'static [f32; SCALES] {
        &SCALE_VALUES
    }

    /// Of every `count` vectors, the atoms of the groups after the first.
    #[inline(always)]
    pub(crate) fn rest_tiles(self, count: usize) -> impl Iterator<Item = &'a [u8]> {
        let each = self.sparsity - 1;
        let starts = (0..self.first.len()).step_by(count);
        starts.map(move |v| &self.rest[v * each..(v + count).min(self.first.len()) * each])
    }

    /// Of each vector, the atoms of the groups after the first.
    #[inline(always)]
    pub(crate) fn rest_rows(self) -> impl Iterator<Item = &'a [u8]> {
        let each = self.sparsity - 1;
        (0..self.first.len()).map(move |v| &self.rest[v * each..][..each])
    }

    /// Of a table with a row for every index, those of the first group's atoms.
    #[inline(always)]
    pub(crate) fn first_rows<R>(self, table: &[R; MAX_ATOMS]) -> &[R] {
        &table[..self.groups.first]
    }

    /// Of a table with a row for every index, those of the other groups' atoms.
    #[inline(always)]
    pub(crate) fn other_groups<R>(self, table: &[R; MAX_ATOMS]) -> &[[R; CODEBOOK_ATOMS]] {
        table[self.groups.first..].as_chunks().0
    }
}
