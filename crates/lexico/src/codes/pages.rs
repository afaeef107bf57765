use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::dictionary::Atoms;
use crate::encode::EncodedBatch;

/// The vectors of a page: growth never copies more, and every page's beginning is read more slowly than the rest.
pub(crate) const PAGE: usize = 8192;
/// The fewest vectors by which a page grows.
const GROWTH: usize = 4;

/// The codes of some vectors in a row, of one family.
pub(super) trait Page: Debug + Clone {
    /// The format of the codes.
    type Format: Copy + Debug;
    /// The codes as kernels take them.
    type Block<'a>: Run
    where
        Self: 'a;

    fn new(format: Self::Format) -> Self;

    /// The number of vectors.
    fn len(&self) -> usize;

    /// Appends the codes of vectors `first` to `first + count` of a batch.
    fn extend(&mut self, batch: &EncodedBatch, first: usize, count: usize);

    /// Drops the `count` oldest vectors.
    fn drop_front(&mut self, count: usize);

    /// The bytes allocated.
    fn bytes(&self) -> usize;

    /// The bytes in use.
    fn bytes_used(&self) -> usize;

    /// Fetches the beginning into the caches: kernels fetch what lies ahead, but not beyond a page.
    fn prefetch(&self);

    fn block(&self) -> Self::Block<'_>;

    /// The largest index of an atom; 0 where there is none.
    fn largest_index(&self) -> u16;

    /// Calls `visit` with the number of each vector, and each of its indices and coefficients.
    fn for_each(&self, visit: impl FnMut(usize, usize, f32));
}

/// A block of codes that can be taken apart.
pub(super) trait Run: Copy {
    /// The first `count` vectors, which must be there, and the others.
    fn split_at(self, count: usize) -> (Self, Self);
}

/// The vectors by which a page of `len` grows: a 64th rather than as many again, since what is allocated is what the
/// cache weighs, and pages bound what is copied.
pub(super) fn growth(len: usize) -> usize {
    GROWTH.max(len / 64).min(PAGE.saturating_sub(len))
}

/// Codes of one family in pages. Copies share them: a page that has more than one owner no longer grows.
#[derive(Debug, Clone)]
pub(super) struct Pages<P: Page> {
    format: P::Format,
    len: usize,
    pages: Vec<Arc<P>>,
    /// So that users of the codes can check them against a dictionary at once.
    largest_index: u16,
}

impl<P: Page> Pages<P> {
    pub(super) fn new(format: P::Format) -> Self {
        Self {
            format,
            len: 0,
            pages: Vec::new(),
            largest_index: 0,
        }
    }

    pub(super) fn extend(&mut self, batch: &EncodedBatch) {
        let mut done = 0;
        while done < batch.len() {
            let newest = self.pages.last_mut().and_then(Arc::get_mut);
            if newest.is_none_or(|page| page.len() >= PAGE) {
                self.pages.reserve_exact(1);
                self.pages.push(Arc::new(P::new(self.format)));
            }
            let Some(page) = self.pages.last_mut().and_then(Arc::get_mut) else {
                return;
            };
            let count = (batch.len() - done).min(PAGE - page.len());
            page.extend(batch, done, count);
            done += count;
        }
        self.len += batch.len();
        let largest = batch.indices.iter().copied().max().unwrap_or(0);
        self.largest_index = self.largest_index.max(largest);
    }

    /// Appends a page, which must be of this format.
    pub(super) fn push(&mut self, page: P) {
        self.largest_index = self.largest_index.max(page.largest_index());
        self.len += page.len();
        self.pages.reserve_exact(1);
        self.pages.push(Arc::new(page));
    }

    pub(super) fn drop_front(&mut self, count: usize) {
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
            Arc::make_mut(&mut self.pages[0]).drop_front(left);
        }
        self.len -= count;
    }

    pub(super) fn format(&self) -> P::Format {
        self.format
    }

    pub(super) fn pages(&self) -> impl Iterator<Item = &P> + Clone {
        self.pages.iter().map(Arc::as_ref)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn largest_index(&self) -> u16 {
        self.largest_index
    }

    pub(super) fn bytes(&self) -> usize {
        let pages: usize = self.pages().map(P::bytes).sum();
        // Beside a page in its `Arc` stand two counts.
        let page = size_of::<P>() + 2 * size_of::<usize>();
        self.pages.capacity() * size_of::<Arc<P>>() + self.pages.len() * page + pages
    }

    pub(super) fn bytes_used(&self) -> usize {
        self.pages().map(P::bytes_used).sum()
    }

    pub(super) fn decode(&self, atoms: Atoms<'_>) -> Vec<f32> {
        let m = atoms.head_dim();
        let mut vectors = vec![0.0; self.len * m];
        let mut rest = &mut vectors[..];
        for page in self.pages() {
            let (own, later) = rest.split_at_mut(page.len() * m);
            page.for_each(|v, index, coefficient| {
                let row = atoms.rows(index, 1);
                row.add_scaled_to(coefficient, &mut own[v * m..][..m]);
            });
            rest = later;
        }
        vectors
    }

    /// Calls `visit` with the blocks that hold the vectors of `range`, page by page, and the number of vectors before each.
    pub(super) fn visit<'a>(
        &'a self,
        range: Range<usize>,
        mut visit: impl FnMut(P::Block<'a>, usize),
    ) {
        let mut before = 0;
        for (number, page) in self.pages.iter().enumerate() {
            let after = before + page.len();
            let (start, end) = (range.start.max(before), range.end.min(after));
            if start < end {
                if let Some(next) = self.pages.get(number + 1) {
                    next.prefetch();
                }
                let (_, rest) = page.block().split_at(start - before);
                let (block, _) = rest.split_at(end - start);
                visit(block, start - range.start);
            }
            before = after;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use super::*;
    use crate::codes::AdditiveFormat;
    use crate::codes::additive::AdditivePage;
    use crate::dictionary::CodebookSizes;

    fn batch(count: usize) -> EncodedBatch {
        EncodedBatch {
            sparsity: 1,
            lengths: vec![1; count],
            indices: (0..count as u16).collect(),
            coefficients: vec![1.0; count],
            relative_errors: vec![0.0; count],
        }
    }

    #[test]
    fn copies_share_what_is_there_and_nothing_that_comes_later() {
        let format = AdditiveFormat {
            sparsity: 1,
            sizes: CodebookSizes { first: 100 },
        };
        let mut pages = Pages::<AdditivePage>::new(format);
        pages.extend(&batch(10));
        let mut copy = pages.clone();
        assert!(Arc::ptr_eq(&pages.pages[0], &copy.pages[0]));
        pages.extend(&batch(3));
        copy.extend(&batch(4));
        copy.drop_front(2);
        assert_eq!((pages.len(), copy.len()), (13, 12));
        assert_eq!(pages.pages().map(Page::len).collect::<Vec<_>>(), [10, 3]);
        assert_eq!(copy.pages().map(Page::len).collect::<Vec<_>>(), [8, 4]);
        // Alone again, the last page grows.
        drop(copy);
        pages.extend(&batch(5));
        assert_eq!(pages.pages().map(Page::len).collect::<Vec<_>>(), [10, 8]);
    }
}
