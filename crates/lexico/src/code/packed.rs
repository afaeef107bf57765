//! One atom a group: two bytes for the first, a byte for every other, no coefficients.

use super::GROWTH;
use crate::dictionary::{GROUP, Groups, MOST_ATOMS};

/// The codes of some vectors in a row.
#[derive(Debug, Clone, Default)]
pub(super) struct PackedPage {
    /// Atom of the first group, of each vector.
    pub(super) first: Vec<u16>,
    /// Of each vector the atoms of the other groups, by their numbers in these, `[n, s − 1]`.
    pub(super) rest: Vec<u8>,
}

/// Some vectors' codes as they are stored.
#[derive(Clone, Copy)]
pub(crate) struct PackedBlock<'a> {
    /// Of each vector.
    pub(crate) first: &'a [u16],
    /// `[n, s − 1]`
    pub(crate) rest: &'a [u8],
    /// Where the groups begin.
    pub(crate) groups: Groups,
    pub(crate) sparsity: usize,
}

impl PackedPage {
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

    /// Appends the code whose atoms have these numbers among all of the dictionary.
    pub(super) fn push(&mut self, groups: Groups, indices: &[u16]) {
        for (group, &index) in indices.iter().enumerate() {
            match group {
                0 => self.first.push(index),
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

    pub(super) fn bytes(&self) -> usize {
        self.first.capacity() * size_of::<u16>() + self.rest.capacity()
    }

    pub(super) fn bytes_used(&self) -> usize {
        self.first.len() * size_of::<u16>() + self.rest.len()
    }

    pub(super) fn prefetch(&self) {
        crate::arch::prefetch_first(&self.first);
        crate::arch::prefetch_first(&self.rest);
    }

    pub(super) fn block(&self, groups: Groups, sparsity: usize) -> PackedBlock<'_> {
        PackedBlock {
            first: &self.first,
            rest: &self.rest,
            groups,
            sparsity,
        }
    }
}

impl<'a> PackedBlock<'a> {
    /// The first `count` vectors, which must be there, and the others.
    pub(super) fn split_at(self, count: usize) -> (Self, Self) {
        let first = self.first.split_at(count);
        let rest = self.rest.split_at(count * (self.sparsity - 1));
        let block = |first, rest| PackedBlock {
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
        std::iter::once(usize::from(self.first[v])).chain(rest)
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
    pub(crate) fn first_rows<R>(self, table: &[R; MOST_ATOMS]) -> &[R] {
        &table[..self.groups.first]
    }

    /// Of a table with a row for every index, those of the other groups' atoms.
    #[inline(always)]
    pub(crate) fn other_groups<R>(self, table: &[R; MOST_ATOMS]) -> &[[R; GROUP]] {
        table[self.groups.first..].as_chunks().0
    }
}
