//! Codes as they are kept: 16-bit indices, compressed coefficients, sizes in bytes as allocated.

mod additive;
mod coefficients;
mod file;
pub mod stored;

pub use coefficients::CoefficientFormat;
pub use file::{CodeFile, FORMAT};

use crate::dictionary::{Atoms, CODEBOOK_ATOMS, MAX_ATOMS, MAX_FIRST_ATOMS};
use crate::encode::EncodedBatch;
use crate::{Error, Result};
use additive::AdditivePage;
#[cfg(feature = "cuda")]
pub(crate) use additive::scale_of_number;
pub(crate) use additive::{AdditiveBlock, Leading};
use coefficients::Coefficients;
pub(crate) use coefficients::Scales;
#[cfg(test)]
pub(crate) use coefficients::{f8_values, i8_values};

/// Vectors by which storage grows at the least.
const GROWTH: usize = 4;
/// Vectors of a page: growth never copies more, and every page's beginning is read more slowly than the rest.
const PAGE: usize = 8192;

/// How codes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeFormat {
    /// `s`, the most nonzeros of a vector.
    pub sparsity: usize,
    /// Whether each vector keeps only the nonzeros it has, and one byte for their number; else
    /// every vector takes room for `s`.
    pub variable: bool,
    /// How coefficients are stored.
    pub coefficients: CoefficientFormat,
}

/// Sparse codes of a growing list of vectors, each one's nonzeros in ascending order of their atoms.
///
/// A vector with `k` nonzeros takes `3k + 1` bytes with coefficients of a byte (2 for the index and 1
/// for the coefficient of each nonzero, 1 for the vector's scale), `6k` with f32, and one more
/// where lengths vary. With fixed sparsity `k = s` always. Codes of one atom a group take `s + 1` bytes a vector.
#[derive(Debug, Clone)]
pub struct Codes {
    format: CodeFormat,
    len: usize,
    pages: Vec<Page>,
    /// So that users of the codes can check them against a dictionary at once.
    largest_index: u16,
}

/// The codes of some vectors in a row. All pages but the newest are full, or were.
#[derive(Debug, Clone)]
enum Page {
    Sparse(SparsePage),
    Additive(AdditivePage),
}

impl Page {
    fn new(format: CodeFormat) -> Self {
        match format.coefficients {
            CoefficientFormat::InAtoms(_) => Self::Additive(AdditivePage::default()),
            _ => Self::Sparse(SparsePage::new(format)),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Sparse(page) => page.len,
            Self::Additive(page) => page.len(),
        }
    }

    /// Appends the codes of vectors `first` to `first + count` of a batch.
    fn extend(&mut self, format: CodeFormat, batch: &EncodedBatch, first: usize, count: usize) {
        let rows = (first..first + count).map(|v| batch.row(v));
        match (self, format.coefficients) {
            (Self::Additive(page), CoefficientFormat::InAtoms(groups)) => {
                page.reserve(format.sparsity, count, PAGE);
                rows.for_each(|(indices, coefficients)| {
                    // All coefficients of a vector are its scale.
                    page.push(groups, indices, coefficients[0]);
                });
            }
            (Self::Sparse(page), _) => {
                let nonzeros = if format.variable {
                    rows.clone().map(|(indices, _)| indices.len()).sum()
                } else {
                    count * format.sparsity
                };
                page.reserve(format, count, nonzeros);
                let mut nonzeros = Vec::with_capacity(format.sparsity);
                for (indices, coefficients) in rows {
                    nonzeros.clear();
                    if !format.variable {
                        // Room for nonzeros that a vector does not have is atom 0 with coefficient 0.
                        nonzeros.resize(format.sparsity - indices.len(), (0, 0.0));
                    }
                    nonzeros.extend(indices.iter().copied().zip(coefficients.iter().copied()));
                    nonzeros.sort_unstable_by_key(|&(i, c)| (i, c != 0.0));
                    page.push(format, &nonzeros);
                }
            }
            _ => unreachable!("pages are of their codes' format"),
        }
    }

    fn drop_front(&mut self, format: CodeFormat, count: usize) {
        match self {
            Self::Sparse(page) => page.drop_front(format, count),
            Self::Additive(page) => page.drop_front(format.sparsity, count),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Sparse(page) => page.bytes(),
            Self::Additive(page) => page.bytes(),
        }
    }

    fn bytes_used(&self) -> usize {
        match self {
            Self::Sparse(page) => page.bytes_used(),
            Self::Additive(page) => page.bytes_used(),
        }
    }

    /// Fetches the beginning into the caches: kernels fetch what lies ahead, but not beyond a page.
    fn prefetch(&self) {
        match self {
            Self::Sparse(page) => page.prefetch(),
            Self::Additive(page) => page.prefetch(),
        }
    }

    fn blocks(&self, format: CodeFormat) -> Blocks<'_> {
        match (self, format.coefficients) {
            (Self::Additive(page), CoefficientFormat::InAtoms(groups)) => {
                Blocks::Additive(page.block(groups, format.sparsity))
            }
            (Self::Sparse(page), _) => page.blocks(format),
            _ => unreachable!("pages are of their codes' format"),
        }
    }

    fn largest_index(&self, format: CodeFormat) -> u16 {
        match (self, format.coefficients) {
            (Self::Additive(page), CoefficientFormat::InAtoms(groups)) => {
                page.largest_index(groups, format.sparsity)
            }
            (Self::Sparse(page), _) => page.indices.iter().copied().max().unwrap_or(0),
            _ => unreachable!("pages are of their codes' format"),
        }
    }

    /// Calls `visit` with the number of each vector, and each of its indices and coefficients.
    fn for_each(&self, format: CodeFormat, mut visit: impl FnMut(usize, usize, f32)) {
        match (self, format.coefficients) {
            (Self::Additive(page), CoefficientFormat::InAtoms(groups)) => {
                let block = page.block(groups, format.sparsity);
                for v in 0..page.len() {
                    let scale = block.scale(v);
                    block.indices(v).for_each(|index| visit(v, index, scale));
                }
            }
            (Self::Sparse(page), _) => {
                let mut nonzero = 0;
                for v in 0..page.len {
                    for _ in 0..page.length(format, v) {
                        let coefficient = page.coefficients.get(v, nonzero);
                        visit(v, usize::from(page.indices[nonzero]), coefficient);
                        nonzero += 1;
                    }
                }
            }
            _ => unreachable!("pages are of their codes' format"),
        }
    }
}

/// The codes of some vectors in a row.
#[derive(Debug, Clone)]
struct SparsePage {
    len: usize,
    indices: Vec<u16>,
    coefficients: Coefficients,
    /// Nonzeros of each vector, where they vary.
    lengths: Vec<u8>,
}

impl SparsePage {
    fn new(format: CodeFormat) -> Self {
        Self {
            len: 0,
            indices: Vec::new(),
            coefficients: Coefficients::new(format.coefficients),
            lengths: Vec::new(),
        }
    }

    /// Grows by a 64th rather than by doubling: what is allocated is what the cache weighs, and pages bound what
    /// is copied.
    fn reserve(&mut self, format: CodeFormat, vectors: usize, nonzeros: usize) {
        if self.indices.capacity() - self.indices.len() < nonzeros
            || self.coefficients.spare_vectors() < vectors
            || (format.variable && self.lengths.capacity() - self.lengths.len() < vectors)
        {
            let growth = GROWTH.max(self.len / 64).min(PAGE.saturating_sub(self.len));
            let vectors = vectors.max(growth);
            let nonzeros = nonzeros
                .max(self.indices.len() / 64)
                .max(if format.variable {
                    GROWTH
                } else {
                    vectors * format.sparsity
                });
            self.indices.reserve_exact(nonzeros);
            self.coefficients.reserve_exact(vectors, nonzeros);
            if format.variable {
                self.lengths.reserve_exact(vectors);
            }
        }
    }

    /// Takes a vector's nonzeros, which ascend by atom: the order in which they are stored too, so that sums over
    /// codes that were stored and read again are the same to the last bit.
    fn push(&mut self, format: CodeFormat, nonzeros: &[(u16, f32)]) {
        self.indices.extend(nonzeros.iter().map(|&(i, _)| i));
        let coefficients: Vec<f32> = nonzeros.iter().map(|&(_, c)| c).collect();
        self.coefficients.push_vector(&coefficients);
        if format.variable {
            self.lengths.push(nonzeros.len() as u8);
        }
        self.len += 1;
    }

    fn drop_front(&mut self, format: CodeFormat, count: usize) {
        let nonzeros = (0..count).map(|v| self.length(format, v)).sum();
        self.indices.drain(..nonzeros);
        self.coefficients.drop_front(count, nonzeros);
        if format.variable {
            self.lengths.drain(..count);
        }
        self.len -= count;
    }

    fn length(&self, format: CodeFormat, v: usize) -> usize {
        if format.variable {
            usize::from(self.lengths[v])
        } else {
            format.sparsity
        }
    }

    fn bytes(&self) -> usize {
        self.indices.capacity() * size_of::<u16>()
            + self.coefficients.bytes()
            + self.lengths.capacity()
    }

    fn bytes_used(&self) -> usize {
        self.indices.len() * size_of::<u16>() + self.coefficients.bytes_used() + self.lengths.len()
    }

    fn prefetch(&self) {
        crate::kernels::prefetch_first(&self.indices);
        self.coefficients.prefetch();
    }

    fn blocks(&self, format: CodeFormat) -> Blocks<'_> {
        let lengths = if format.variable {
            Lengths::Variable(&self.lengths)
        } else {
            Lengths::Fixed(format.sparsity, self.len)
        };
        self.coefficients.blocks(&self.indices, lengths)
    }
}

impl Codes {
    /// No codes yet.
    ///
    /// # Errors
    /// [`Error::VariableSparsity`] where a length would not fit its byte.
    pub fn new(format: CodeFormat) -> Result<Self> {
        if format.variable && format.sparsity > usize::from(u8::MAX) {
            return Err(Error::VariableSparsity(format.sparsity));
        }
        if let CoefficientFormat::InAtoms(groups) = format.coefficients
            && (format.variable
                || format.sparsity == 0
                || !(1..=MAX_FIRST_ATOMS).contains(&groups.first)
                || format.sparsity > MAX_ATOMS / CODEBOOK_ATOMS
                || groups.atoms(format.sparsity) > MAX_ATOMS)
        {
            return Err(Error::AdditiveCodes {
                sparsity: format.sparsity,
                variable: format.variable,
            });
        }
        Ok(Self {
            format,
            len: 0,
            pages: Vec::new(),
            largest_index: 0,
        })
    }

    /// Appends the codes of a batch. What is there already stays where it is, but for the newest 8,192 vectors
    /// at the most.
    ///
    /// # Panics
    /// Where the batch has another sparsity than these codes.
    pub fn extend(&mut self, batch: &EncodedBatch) {
        let format = self.format;
        assert_eq!(batch.sparsity, format.sparsity, "codes of one sparsity");
        let mut done = 0;
        while done < batch.len() {
            if self.pages.last().is_none_or(|page| page.len() >= PAGE) {
                self.pages.reserve_exact(1);
                self.pages.push(Page::new(format));
            }
            let Some(page) = self.pages.last_mut() else {
                return;
            };
            let count = (batch.len() - done).min(PAGE - page.len());
            page.extend(format, batch, done, count);
            done += count;
        }
        self.len += batch.len();
        let largest = batch.indices.iter().copied().max().unwrap_or(0);
        self.largest_index = self.largest_index.max(largest);
    }

    /// Appends a page, which must be of these codes' format.
    fn push_page(&mut self, page: Page) {
        self.largest_index = self.largest_index.max(page.largest_index(self.format));
        self.len += page.len();
        self.pages.push(page);
    }

    /// Drops the `count` oldest vectors.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn drop_front(&mut self, count: usize) {
        let mut left = count;
        let mut whole = 0;
        while let Some(page) = self.pages.get(whole)
            && page.len() <= left
        {
            left -= page.len();
            whole += 1;
        }
        self.pages.drain(..whole);
        if left > 0 {
            self.pages[0].drop_front(self.format, left);
        }
        self.len -= count;
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How they are stored.
    pub fn format(&self) -> CodeFormat {
        self.format
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        let pages: usize = self.pages.iter().map(Page::bytes).sum();
        self.pages.capacity() * size_of::<Page>() + pages
    }

    /// Bytes in use: [`Codes::bytes`] less bookkeeping and the room kept for growth.
    pub fn bytes_used(&self) -> usize {
        self.pages.iter().map(Page::bytes_used).sum()
    }

    /// The codes of the vectors from `first` on.
    pub(crate) fn runs_from(&self, first: usize) -> Runs<'_> {
        let (mut page, mut before) = (0, 0);
        while page < self.pages.len() && before + self.pages[page].len() <= first {
            before += self.pages[page].len();
            page += 1;
        }
        let mut runs = Runs {
            format: self.format,
            pages: self.pages[page..].iter(),
            rest: None,
        };
        runs.next(first - before, |_, _| ());
        runs
    }

    /// The largest index of an atom; 0 where there is none.
    pub(crate) fn largest_index(&self) -> u16 {
        self.largest_index
    }

    /// Checks that the codes are over `count` atoms.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where an index lies outside them.
    pub fn check_atoms(&self, count: usize) -> Result<()> {
        if usize::from(self.largest_index) >= count && self.bytes_used() > 0 {
            let index = self.largest_index;
            let reason = format!("the codes name atom {index}, the dictionary has {count}");
            return Err(Error::Dictionary(reason));
        }
        Ok(())
    }

    /// Rebuilds all vectors, `[n, m]` in f32: for tests, files and error figures, never for attention.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where an index lies outside the dictionary.
    pub fn decode<'a>(&self, atoms: impl Into<Atoms<'a>>) -> Result<Vec<f32>> {
        let atoms = atoms.into();
        self.check_atoms(atoms.len())?;
        let m = atoms.head_dim();
        let mut widened = Vec::new();
        let mut vectors = vec![0.0; self.len * m];
        let mut rest = &mut vectors[..];
        for page in &self.pages {
            let (own, later) = rest.split_at_mut(page.len() * m);
            page.for_each(self.format, |v, index, coefficient| {
                let atom = atoms.atom(index, &mut widened);
                crate::kernels::add_scaled(&mut own[v * m..][..m], coefficient, atom);
            });
            rest = later;
        }
        Ok(vectors)
    }
}

/// Codes as they are stored, from first to last.
pub(crate) struct Runs<'a> {
    format: CodeFormat,
    pages: std::slice::Iter<'a, Page>,
    /// What is left of the page at hand.
    rest: Option<Blocks<'a>>,
}

impl Runs<'_> {
    /// Calls `visit` with the next `count` vectors, page by page, and how many came before in this call.
    pub(crate) fn next(&mut self, count: usize, mut visit: impl FnMut(Blocks<'_>, usize)) {
        let mut done = 0;
        while done < count {
            let Some(rest) = self.rest else {
                let Some(page) = self.pages.next() else {
                    return;
                };
                self.rest = Some(page.blocks(self.format));
                if let [next, ..] = self.pages.as_slice() {
                    next.prefetch();
                }
                continue;
            };
            let (run, rest) = rest.split_at(rest.len().min(count - done));
            visit(run, done);
            done += run.len();
            self.rest = (rest.len() > 0).then_some(rest);
        }
    }
}

/// Some vectors' codes as they are stored, by how their coefficients are.
#[derive(Clone, Copy)]
pub(crate) enum Blocks<'a> {
    I8(Block<'a, i8>),
    F8(Block<'a, u8>),
    F32(Block<'a, f32>),
    Additive(AdditiveBlock<'a>),
}

/// Some vectors' codes as they are stored.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a, C> {
    /// Of all nonzeros, vector by vector.
    pub(crate) indices: &'a [u16],
    /// Of all nonzeros.
    pub(crate) coefficients: &'a [C],
    /// What each vector's coefficients are multiplied by.
    pub(crate) scales: Scales<'a>,
    /// Nonzeros of each vector.
    pub(crate) lengths: Lengths<'a>,
    /// What a coefficient of a byte stands for.
    pub(crate) values: &'a [f32; 256],
}

/// How many nonzeros vectors have.
#[derive(Clone, Copy)]
pub(crate) enum Lengths<'a> {
    /// So many in each of so many vectors.
    Fixed(usize, usize),
    Variable(&'a [u8]),
}

impl Blocks<'_> {
    /// Vectors.
    pub(crate) fn len(&self) -> usize {
        let lengths = match self {
            Blocks::I8(Block { lengths, .. })
            | Blocks::F8(Block { lengths, .. })
            | Blocks::F32(Block { lengths, .. }) => lengths,
            Blocks::Additive(block) => return block.first.len(),
        };
        match lengths {
            Lengths::Fixed(_, count) => *count,
            Lengths::Variable(lengths) => lengths.len(),
        }
    }

    /// The first `count` vectors, which must be there, and the others.
    fn split_at(self, count: usize) -> (Self, Self) {
        match self {
            Blocks::I8(block) => {
                let (first, rest) = block.split_at(count);
                (Blocks::I8(first), Blocks::I8(rest))
            }
            Blocks::F8(block) => {
                let (first, rest) = block.split_at(count);
                (Blocks::F8(first), Blocks::F8(rest))
            }
            Blocks::F32(block) => {
                let (first, rest) = block.split_at(count);
                (Blocks::F32(first), Blocks::F32(rest))
            }
            Blocks::Additive(block) => {
                let (first, rest) = block.split_at(count);
                (Blocks::Additive(first), Blocks::Additive(rest))
            }
        }
    }
}

impl<'a, C> Block<'a, C> {
    /// The first `count` vectors, which must be there, and the others.
    pub(crate) fn split_at(self, count: usize) -> (Self, Self) {
        let (nonzeros, lengths) = match self.lengths {
            Lengths::Fixed(length, all) => {
                let lengths = (
                    Lengths::Fixed(length, count),
                    Lengths::Fixed(length, all - count),
                );
                (count * length, lengths)
            }
            Lengths::Variable(lengths) => {
                let (first, rest) = lengths.split_at(count);
                let nonzeros = first.iter().map(|&l| usize::from(l)).sum();
                (
                    nonzeros,
                    (Lengths::Variable(first), Lengths::Variable(rest)),
                )
            }
        };
        let indices = self.indices.split_at(nonzeros);
        let coefficients = self.coefficients.split_at(nonzeros);
        let scales = match self.scales {
            Scales::One => (Scales::One, Scales::One),
            Scales::Powers(exponents) => {
                let (first, rest) = exponents.split_at(count);
                (Scales::Powers(first), Scales::Powers(rest))
            }
        };
        let block = |indices, coefficients, scales, lengths| Block {
            indices,
            coefficients,
            scales,
            lengths,
            values: self.values,
        };
        (
            block(indices.0, coefficients.0, scales.0, lengths.0),
            block(indices.1, coefficients.1, scales.1, lengths.1),
        )
    }

    /// Calls `visit` with the indices, coefficients and scale of one vector after another.
    #[inline(always)]
    pub(crate) fn for_each(self, mut visit: impl FnMut(&'a [u16], &'a [C], f32)) {
        match self.lengths {
            // Usual sizes by name: their loops are unrolled.
            Lengths::Fixed(4, count) => self.for_each_of::<4>(count, visit),
            Lengths::Fixed(8, count) => self.for_each_of::<8>(count, visit),
            Lengths::Fixed(16, count) => self.for_each_of::<16>(count, visit),
            Lengths::Fixed(24, count) => self.for_each_of::<24>(count, visit),
            Lengths::Fixed(32, count) => self.for_each_of::<32>(count, visit),
            Lengths::Fixed(length, count) => {
                let rows = self.indices.chunks_exact(length);
                let rows = rows.zip(self.coefficients.chunks_exact(length));
                for (v, (indices, coefficients)) in rows.take(count).enumerate() {
                    visit(indices, coefficients, self.scales.get(v));
                }
            }
            Lengths::Variable(lengths) => {
                let (mut indices, mut coefficients) = (self.indices, self.coefficients);
                for (v, &length) in lengths.iter().enumerate() {
                    let (own, later) = indices.split_at(usize::from(length));
                    let (own_coefficients, later_coefficients) =
                        coefficients.split_at(usize::from(length));
                    visit(own, own_coefficients, self.scales.get(v));
                    (indices, coefficients) = (later, later_coefficients);
                }
            }
        }
    }

    #[inline(always)]
    fn for_each_of<const S: usize>(
        self,
        count: usize,
        mut visit: impl FnMut(&'a [u16], &'a [C], f32),
    ) {
        let rows = self.indices.as_chunks::<S>().0.iter();
        let rows = rows.zip(self.coefficients.as_chunks::<S>().0);
        match self.scales {
            Scales::Powers(exponents) => {
                for ((indices, coefficients), &exponent) in rows.take(count).zip(exponents) {
                    visit(indices, coefficients, Scales::power(exponent));
                }
            }
            Scales::One => {
                for (indices, coefficients) in rows.take(count) {
                    visit(indices, coefficients, 1.0);
                }
            }
        }
    }
}
