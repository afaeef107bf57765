//! Scores and weighted sums of additive codes: one atom of each codebook, and a scale.
//!
//! There is no file for a kind of processor: `compile!` makes `avx2::scores` and so on of `portable::scores`. A form that is
//! written for one belongs in `x86_64.rs`, and `mod.rs` asks for the level, as in `sparse`.

mod portable;

use std::sync::LazyLock;

use super::rows::{Number, Rows, with_numbers};
use super::{MAX_ATOMS, compile, dispatch, table};

compile! {
    scores(block: AdditiveBlock<'_>, p: &[f32], group: usize, out: &mut [f32]);
    accumulate(block: AdditiveBlock<'_>, weights: &[f32], group: usize, u: &mut [f32]);
    rebuild(block: AdditiveBlock<'_>, atoms: &[impl Number], units: &[f32], m: usize, out: &mut [f32]);
}

/// Atoms of every codebook but the first: as many as one byte tells apart.
pub const CODEBOOK_ATOMS: usize = 256;

/// Atoms of the first codebook at the most: as many as eleven bits tell apart.
pub const MAX_FIRST_ATOMS: usize = 1 << ATOM_BITS;

/// Sizes of codebooks whose atoms are numbered one codebook after the other: the first has a size of its own, every
/// other has [`CODEBOOK_ATOMS`] atoms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodebookSizes {
    /// Atoms of the first codebook.
    pub first: usize,
}

impl CodebookSizes {
    /// The number of the first atom of codebook `codebook`.
    pub fn start(self, codebook: usize) -> usize {
        match codebook {
            0 => 0,
            codebook => self.first + (codebook - 1) * CODEBOOK_ATOMS,
        }
    }

    /// Atoms of codebook `codebook`.
    pub fn size(self, codebook: usize) -> usize {
        match codebook {
            0 => self.first,
            _ => CODEBOOK_ATOMS,
        }
    }

    /// Atoms of the first `codebooks` codebooks.
    pub fn atoms(self, codebooks: usize) -> usize {
        self.start(codebooks)
    }

    /// Codebooks that `atoms` atoms fill.
    pub(crate) fn count(self, atoms: usize) -> usize {
        1 + (atoms - self.first) / CODEBOOK_ATOMS
    }
}

/// Bits that name the atom of the first codebook; those above it are the vector's scale.
const ATOM_BITS: u32 = 11;
/// Scales that there are: `2^(k/32)`, from 1 to nearly 2.
const SCALES: usize = 1 << (u16::BITS - ATOM_BITS);

/// The factor that each number of a scale stands for.
static SCALE_VALUES: LazyLock<[f32; SCALES]> =
    LazyLock::new(|| std::array::from_fn(|k| 2f32.powf(k as f32 / SCALES as f32)));

/// A vector's atom of the first codebook and its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Leading(pub(crate) u16);

impl Leading {
    /// The atom, and the scale nearest to `scale`.
    pub(crate) fn new(atom: u16, scale: f32) -> Self {
        let number = (scale.log2() * SCALES as f32).round();
        let number = number.clamp(0.0, (SCALES - 1) as f32) as u16;
        Self(atom | number << ATOM_BITS)
    }

    /// The inverse of [`Self::atom`] and [`Self::scale_number`]; `None` where there is no such scale.
    pub(crate) fn of_numbers(atom: u16, scale: u8) -> Option<Self> {
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
    pub(super) fn scale(self, values: &[f32; SCALES]) -> f32 {
        values[usize::from(self.0 >> ATOM_BITS)]
    }
}

/// Codes of some vectors as they are stored.
#[derive(Clone, Copy)]
pub(crate) struct AdditiveBlock<'a> {
    /// Each vector's atom of the first codebook and its scale.
    pub(crate) first: &'a [Leading],
    /// Each vector's atoms of the other codebooks, by their numbers in these, `[n, s − 1]`.
    pub(crate) rest: &'a [u8],
    pub(crate) sizes: CodebookSizes,
    pub(crate) sparsity: usize,
}

impl<'a> AdditiveBlock<'a> {
    /// Number of vectors.
    pub(crate) fn len(&self) -> usize {
        self.first.len()
    }

    /// The first `count` vectors, which must be there, and the others.
    pub(crate) fn split_at(self, count: usize) -> (Self, Self) {
        let first = self.first.split_at(count);
        let rest = self.rest.split_at(count * (self.sparsity - 1));
        let block = |first, rest| AdditiveBlock {
            first,
            rest,
            ..self
        };
        (block(first.0, rest.0), block(first.1, rest.1))
    }

    /// Numbers of the atoms of vector `v` among those of all codebooks.
    pub(crate) fn indices(self, v: usize) -> impl Iterator<Item = usize> + 'a {
        let each = self.sparsity - 1;
        let rest = self.rest[v * each..][..each].iter().zip(1..);
        let rest = rest.map(move |(&own, codebook)| self.sizes.start(codebook) + usize::from(own));
        std::iter::once(self.first[v].atom()).chain(rest)
    }

    /// The factor of the sum of vector `v`'s atoms.
    pub(crate) fn scale(self, v: usize) -> f32 {
        self.first[v].scale(&SCALE_VALUES)
    }

    /// The factors that the numbers of scales stand for.
    #[inline(always)]
    pub(super) fn scales(self) -> &'static [f32; SCALES] {
        &SCALE_VALUES
    }

    /// The atoms after the first of every `count` vectors.
    #[inline(always)]
    pub(super) fn rest_tiles(self, count: usize) -> impl Iterator<Item = &'a [u8]> {
        let each = self.sparsity - 1;
        let starts = (0..self.first.len()).step_by(count);
        starts.map(move |v| &self.rest[v * each..(v + count).min(self.first.len()) * each])
    }

    /// The atoms after the first of each vector.
    #[inline(always)]
    pub(crate) fn rest_rows(self) -> impl Iterator<Item = &'a [u8]> {
        let each = self.sparsity - 1;
        (0..self.first.len()).map(move |v| &self.rest[v * each..][..each])
    }

    /// The rows of the first codebook's atoms, of a table with a row for every index.
    #[inline(always)]
    pub(super) fn first_rows<R>(self, table: &[R; MAX_ATOMS]) -> &[R] {
        &table[..self.sizes.first]
    }

    /// The rows of the other codebooks' atoms, of a table with a row for every index.
    #[inline(always)]
    pub(super) fn other_rows<R>(self, table: &[R; MAX_ATOMS]) -> &[[R; CODEBOOK_ATOMS]] {
        table[self.sizes.first..].as_chunks().0
    }
}

/// `out[t][g] = scale_t · Σ_j p[i_j][g]` for the codes `t` of a block: `p` is `[MAX_ATOMS, group]`, `out`
/// `[n, group]`, the query group `group` a power of two up to [`MAX_QUERIES`](super::softmax::MAX_QUERIES).
pub(crate) fn scores(block: AdditiveBlock<'_>, p: &[f32], group: usize, out: &mut [f32]) {
    table::check(block.len(), group, out.len(), p.len());
    dispatch!(scores(block, p, group, out));
}

/// `u[i_j][g] += scale_t · weights[t][g]` for the codes `t` of a block: `u` is `[MAX_ATOMS, group]`,
/// `weights` `[n, group]`, the query group `group` a power of two up to [`MAX_QUERIES`](super::softmax::MAX_QUERIES).
pub(crate) fn accumulate(block: AdditiveBlock<'_>, weights: &[f32], group: usize, u: &mut [f32]) {
    table::check(block.len(), group, weights.len(), u.len());
    dispatch!(accumulate(block, weights, group, u));
}

/// `out_t = scale_t · Σ_j atoms_{i_j}` for the codes `t` of a block: `atoms` is `[N, m]`, `out` `[n, m]`.
///
/// # Panics
/// Where `out` has not a row for each code, or a code names an atom that there is not.
pub(crate) fn rebuild(block: AdditiveBlock<'_>, atoms: Rows<'_>, m: usize, out: &mut [f32]) {
    assert!(m > 0, "vectors have numbers");
    assert_eq!(out.len(), block.len() * m, "a row a code");
    with_numbers!(atoms, (atoms, units) => dispatch!(rebuild(block, atoms, units, m, out)));
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::{at_level, close, levels};

    /// Codes of `n` vectors, the first codebook having `first` atoms.
    fn codes(
        n: usize,
        sparsity: usize,
        first: usize,
        mut draw: impl FnMut() -> u32,
    ) -> (Vec<Leading>, Vec<u8>) {
        let firsts = (0..n).map(|_| {
            let atom = (draw() as usize % first) as u16;
            Leading::new(atom, 1.0 + (draw() % 64) as f32 / 64.0)
        });
        let firsts = firsts.collect();
        (
            firsts,
            (0..n * (sparsity - 1))
                .map(|_| (draw() >> 8) as u8)
                .collect(),
        )
    }

    proptest! {
        #[test]
        fn codes_are_gathered_and_scattered(
            power in 0u32..6, sparsity in 1usize..40, n in prop_oneof![4 => 0usize..70, 1 => 1000usize..2100],
            first in prop_oneof![Just(1), Just(255), Just(256), Just(2048), 1usize..2048], seed: u32,
        ) {
            let sizes = CodebookSizes { first };
            let (group, atoms) = (1usize << power, sizes.atoms(sparsity));
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 8
            };
            let (firsts, rest) = codes(n, sparsity, first, &mut draw);
            let mut number = || draw() as f32 / (1 << 23) as f32 - 1.0;
            // Nothing beyond the atoms may be read: it would show.
            let mut p = vec![f32::NAN; MAX_ATOMS * group];
            p[..atoms * group].fill_with(&mut number);
            let weights: Vec<f32> = (0..n * group).map(|_| number()).collect();
            let start: Vec<f32> = (0..MAX_ATOMS * group).map(|_| number()).collect();
            let mut expected_scores = vec![0f64; n * group];
            let mut expected_u: Vec<f64> = start.iter().map(|&u| f64::from(u)).collect();
            // Sums of magnitudes: rounding is in proportion to them.
            let mut summed: Vec<f64> = expected_u.iter().map(|u| u.abs()).collect();
            for v in 0..n {
                let own = &rest[v * (sparsity - 1)..][..sparsity - 1];
                let own = own.iter().enumerate().map(|(j, &byte)| first + j * 256 + usize::from(byte));
                let scale = f64::from(2f32.powf(f32::from(firsts[v].0 >> 11) / 32.0));
                for atom in std::iter::once(firsts[v].atom()).chain(own) {
                    for g in 0..group {
                        expected_scores[v * group + g] += scale * f64::from(p[atom * group + g]);
                        let weight = scale * f64::from(weights[v * group + g]);
                        expected_u[atom * group + g] += weight;
                        summed[atom * group + g] += weight.abs();
                    }
                }
            }
            let block = AdditiveBlock { first: &firsts, rest: &rest, sizes, sparsity };
            for level in levels() {
                let mut out = vec![f32::NAN; n * group];
                let mut u = start.clone();
                at_level(level, || {
                    scores(block, &p, group, &mut out);
                    accumulate(block, &weights, group, &mut u);
                });
                for (&got, &want) in out.iter().zip(&expected_scores) {
                    prop_assert!(close(got, want, 2.0 * sparsity as f64), "{:?}: {} for {}", level, got, want);
                }
                for ((&got, &want), &size) in u.iter().zip(&expected_u).zip(&summed) {
                    prop_assert!(close(got, want, size), "{:?}: {} for {}", level, got, want);
                }
            }
        }

        #[test]
        fn vectors_are_rebuilt(
            m in 1usize..200, sparsity in 1usize..20, n in 0usize..9, first in 1usize..300, precision in 0..3, seed: u32,
        ) {
            let sizes = CodebookSizes { first };
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 8
            };
            let (firsts, rest) = codes(n, sparsity, first, &mut draw);
            let atoms: Vec<f32> = (0..sizes.atoms(sparsity) * m).map(|_| draw() as f32 / (1 << 23) as f32 - 1.0).collect();
            let halves: Vec<f16> = atoms.iter().map(|&x| f16::from_f32(x)).collect();
            let bytes: Vec<i8> = atoms.iter().map(|x| (x * 127.0) as i8).collect();
            let units: Vec<f32> = (0..sizes.atoms(sparsity)).map(|_| draw() as f32 / (1 << 30) as f32).collect();
            let rows = match precision {
                0 => Rows::F32(&atoms),
                1 => Rows::F16(&halves),
                _ => Rows::I8 { numbers: &bytes, units: &units },
            };
            let mut wide = Vec::new();
            let wide = rows.widened(m, &mut wide).to_vec();
            let block = AdditiveBlock { first: &firsts, rest: &rest, sizes, sparsity };
            for level in levels() {
                let mut out = vec![f32::NAN; n * m];
                at_level(level, || rebuild(block, rows, m, &mut out));
                for (v, out) in out.chunks_exact(m).enumerate() {
                    for (k, &got) in out.iter().enumerate() {
                        let sum: f64 = block.indices(v).map(|i| f64::from(wide[i * m + k])).sum();
                        let want = sum * f64::from(block.scale(v));
                        prop_assert!(close(got, want, 2.0 * sparsity as f64), "{:?}: {} for {}", level, got, want);
                    }
                }
            }
        }
    }
}
