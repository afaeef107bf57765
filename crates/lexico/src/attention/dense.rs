use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Positions, RunningSoftmax};
use crate::kernels::dense::{MAX_GROUP, combine, dots};
use crate::kernels::matmul::{Matrix, multiply};
use crate::kernels::rows::Rows;
use crate::key_value::KeyValue;

/// Vectors of a page, and positions that are scored at a time.
pub(crate) const PAGE: usize = 256;
/// Rows by which storage grows at the least.
const GROWTH: usize = 4;
/// Rows that there may be room for where others were dropped: most come again soon.
const SPARE: usize = 32;
/// Rows that there is room for beyond those that are held, at the most.
pub(crate) const ROOM: usize = SPARE + PAGE / 16;

/// Number type of dense keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NumberType {
    /// Half precision; a number beyond its range is held at ±65,504.
    #[default]
    F16,
    /// Single precision, for tests and comparison.
    F32,
}

impl NumberType {
    /// The bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => size_of::<f16>(),
            Self::F32 => size_of::<f32>(),
        }
    }
}

/// A growing list of dense vectors, in pages: growth copies no more than one, and what is dropped is given back.
///
/// Pages begin at whole multiples of their length, counted from the first vector that ever came: sums over the vectors are
/// taken in an order that does not depend on how the list came about.
#[derive(Debug, Clone)]
pub struct DenseRows {
    head_dim: usize,
    /// The number of vectors before the first one that is held.
    passed: usize,
    numbers: Numbers,
}

#[derive(Debug, Clone)]
enum Numbers {
    F16(Pages<f16>),
    F32(Pages<f32>),
}

/// Does the same with pages of either number type.
macro_rules! with_pages {
    ($numbers:expr, $pages:ident => $work:expr) => {
        match $numbers {
            Numbers::F16($pages) => $work,
            Numbers::F32($pages) => $work,
        }
    };
}

impl DenseRows {
    /// No vectors yet, each to be of length `head_dim`.
    pub fn new(head_dim: usize, number_type: NumberType) -> Self {
        let numbers = match number_type {
            NumberType::F16 => Numbers::F16(Pages::new(head_dim)),
            NumberType::F32 => Numbers::F32(Pages::new(head_dim)),
        };
        Self {
            head_dim,
            passed: 0,
            numbers,
        }
    }

    /// Length of each vector, `m`.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Makes room for so many vectors, a page at the most, and for none beyond them, where they are all that is to come.
    pub fn reserve(&mut self, vectors: usize) {
        with_pages!(&mut self.numbers, pages => pages.reserve(vectors));
    }

    /// Appends vectors, `[n, m]`.
    pub fn extend(&mut self, vectors: &[f32]) {
        let mut rest = vectors;
        while !rest.is_empty() {
            let room = PAGE - (self.passed + self.len()) % PAGE;
            let (own, later) = rest.split_at(rest.len().min(room * self.head_dim));
            match &mut self.numbers {
                Numbers::F16(pages) => {
                    let own = own.iter().map(|&x| held(x));
                    pages.last_for(own.len(), room).extend(own);
                }
                Numbers::F32(pages) => {
                    pages.last_for(own.len(), room).extend_from_slice(own);
                }
            }
            rest = later;
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        with_pages!(&self.numbers, pages => pages.numbers()) / self.head_dim
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        with_pages!(&self.numbers, pages => pages.bytes())
    }

    /// Drops the `count` oldest vectors.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn drop_front(&mut self, count: usize) {
        with_pages!(&mut self.numbers, pages => pages.drop_front(count));
        self.passed += count;
    }

    /// Makes each vector what `map` makes of it, a page of vectors `[n, m]` at a time.
    pub(crate) fn map(&mut self, mut map: impl FnMut(&[f32]) -> Vec<f32>) {
        match &mut self.numbers {
            Numbers::F16(pages) => {
                for page in &mut pages.pages {
                    let mapped = map(&page.to_f32_vec());
                    page.iter_mut().zip(mapped).for_each(|(x, y)| *x = held(y));
                }
            }
            Numbers::F32(pages) => {
                for page in &mut pages.pages {
                    let mapped = map(page);
                    page.copy_from_slice(&mapped);
                }
            }
        }
    }

    /// Counts vectors that come and go without being held.
    ///
    /// # Panics
    /// Where any are held.
    pub(crate) fn pass(&mut self, count: usize) {
        assert!(self.is_empty(), "older vectors go first");
        self.passed += count;
    }

    /// Keeps the vectors at `rows`, which ascend, and drops all others. Memory is given back beyond what the next
    /// vectors would have it grow by again.
    ///
    /// # Panics
    /// Where there is no such vector.
    pub fn keep(&mut self, rows: &[usize]) {
        let first = PAGE - self.passed % PAGE;
        with_pages!(&mut self.numbers, pages => pages.keep(rows, first));
    }

    /// All vectors in f32, `[n, m]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = Vec::new();
        self.read(0, self.len(), &mut out);
        out
    }

    /// The numbers as they are stored, little-endian.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        match &self.numbers {
            Numbers::F16(pages) => pages.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Numbers::F32(pages) => pages.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// Appends `count` vectors from `first` on to `out`, in f32.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        assert!(first + count <= self.len(), "vectors that are there");
        for (rows, count) in self.blocks(first..first + count) {
            let before = out.len();
            out.resize(before + count * self.head_dim, 0.0);
            match rows {
                Rows::F16(numbers) => numbers.convert_to_f32_slice(&mut out[before..]),
                rows => rows.widen_to(self.head_dim, &mut out[before..]),
            }
        }
    }

    /// The vectors of a range, page by page, and how many they are.
    fn blocks(&self, range: Range<usize>) -> impl Iterator<Item = (Rows<'_>, usize)> {
        let (m, before) = (self.head_dim, self.passed % PAGE);
        let pages = (range.start + before) / PAGE..(range.end + before).div_ceil(PAGE);
        let pages = pages.take(if range.is_empty() { 0 } else { usize::MAX });
        pages.map(move |page| {
            // Where the page's first vector stands, the first page's that are gone counted in.
            let start = (page * PAGE).max(before + range.start);
            let end = ((page + 1) * PAGE).min(before + range.end);
            let gone = page * PAGE + if page == 0 { before } else { 0 };
            let numbers = (start - gone) * m..(end - gone) * m;
            let rows = match &self.numbers {
                Numbers::F16(pages) => Rows::F16(&pages.pages[page][numbers]),
                Numbers::F32(pages) => Rows::F32(&pages.pages[page][numbers]),
            };
            (rows, end - start)
        })
    }
}
/// A number in half precision, at ±65,504 where it is beyond.
fn held(x: f32) -> f16 {
    let limit = f16::MAX.to_f32();
    f16::from_f32(x.clamp(-limit, limit))
}

/// Numbers in pages; none is empty, and all but the first and the last hold a whole page.
#[derive(Debug, Clone)]
struct Pages<T> {
    head_dim: usize,
    pages: Vec<Vec<T>>,
}

impl<T: Copy> Pages<T> {
    fn new(head_dim: usize) -> Self {
        Self {
            head_dim,
            pages: Vec::new(),
        }
    }

    fn iter(&self) -> impl Iterator<Item = T> {
        self.pages.iter().flatten().copied()
    }

    /// The number of numbers.
    fn numbers(&self) -> usize {
        let whole = self.pages.len().saturating_sub(2) * PAGE * self.head_dim;
        let ends = self.pages.first().into_iter();
        let ends = ends.chain(self.pages.get(1..).and_then(<[_]>::last));
        ends.map(Vec::len).sum::<usize>() + whole
    }

    fn bytes(&self) -> usize {
        let pages = self
            .pages
            .iter()
            .map(|page| page.capacity() * size_of::<T>());
        self.pages.capacity() * size_of::<Vec<T>>() + pages.sum::<usize>()
    }

    fn push(&mut self, page: Vec<T>) {
        self.pages.reserve_exact(1);
        self.pages.push(page);
    }

    fn reserve(&mut self, vectors: usize) {
        let numbers = vectors.min(PAGE) * self.head_dim;
        match self.pages.last_mut() {
            Some(page) => page.reserve_exact(numbers),
            None => self.push(Vec::with_capacity(numbers)),
        }
    }

    /// The page that `more` numbers are to go to, with room for them; `room` vectors are left in the last one, and a new one is begun
    /// where that is a whole page.
    fn last_for(&mut self, more: usize, room: usize) -> &mut Vec<T> {
        let begins = room == PAGE && self.pages.last().is_some_and(|page| !page.is_empty());
        if begins || self.pages.is_empty() {
            self.push(Vec::new());
        }
        let last = self.pages.len() - 1;
        let page = &mut self.pages[last];
        if page.capacity() - page.len() < more {
            let grown = growth(page.len(), more, self.head_dim);
            page.reserve_exact(grown.min(room * self.head_dim));
        }
        page
    }

    fn drop_front(&mut self, vectors: usize) {
        let mut left = vectors * self.head_dim;
        assert!(left <= self.numbers(), "vectors that are there");
        let whole = self.pages.iter().take_while(|page| {
            let goes = page.len() <= left;
            left -= if goes { page.len() } else { 0 };
            goes
        });
        let whole = whole.count();
        self.pages.drain(..whole);
        self.pages.shrink_to(self.pages.len() + 1);
        if let Some(first) = self.pages.first_mut() {
            first.drain(..left);
        }
        match &mut self.pages[..] {
            // It never grows again.
            [first, _, ..] => first.shrink_to_fit(),
            [only] if only.capacity() - only.len() > SPARE * self.head_dim => {
                only.shrink_to(only.len() + GROWTH * self.head_dim);
            }
            _ => {}
        }
    }

    /// Keeps the vectors at `rows`; the first page has room for `first`.
    fn keep(&mut self, rows: &[usize], first: usize) {
        let m = self.head_dim;
        let place = |row: usize| match row.checked_sub(first) {
            None => (0, row * m),
            Some(later) => (1 + later / PAGE, later % PAGE * m),
        };
        for (to, &from) in rows.iter().enumerate() {
            let ((to_page, to), (from_page, from)) = (place(to), place(from));
            if to_page == from_page {
                self.pages[to_page].copy_within(from..from + m, to);
            } else {
                let (before, after) = self.pages.split_at_mut(from_page);
                before[to_page][to..to + m].copy_from_slice(&after[0][from..from + m]);
            }
        }
        let mut left = rows.len() * m;
        for page in &mut self.pages {
            page.truncate(left);
            left -= page.len();
        }
        self.pages.retain(|page| !page.is_empty());
        if let Some(last) = self.pages.last_mut() {
            last.shrink_to(last.len() + growth(last.len(), 0, m));
        }
    }
}

/// The numbers that storage of `held` grows by for `more`: a sixteenth rather than as many again, since what is allocated is
/// what the cache weighs.
fn growth(held: usize, more: usize, head_dim: usize) -> usize {
    more.max(GROWTH * head_dim).max(held / 16)
}

impl Positions for KeyValue<&DenseRows> {
    fn len(&self) -> usize {
        assert_eq!(self.keys.len(), self.values.len(), "one value a key");
        self.keys.len()
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        self.keys.read(first, count, keys);
        self.values.read(first, count, values);
    }
}

/// Adds some dense positions for the few queries of one position; `queries` `[group, m]` are scaled already.
pub(super) fn add_few(
    softmax: &mut RunningSoftmax,
    queries: &[f32],
    positions: Range<usize>,
    rows: KeyValue<&DenseRows>,
) {
    let keys = rows.keys.blocks(positions.clone());
    for ((keys, count), (values, of_values)) in keys.zip(rows.values.blocks(positions)) {
        assert_eq!(count, of_values, "keys and values came together");
        add_rows(softmax, queries, KeyValue { keys, values }, count);
    }
}

/// Adds, like [`add_few`], positions that are turned back into vectors.
pub(super) fn add_few_decoded(
    softmax: &mut RunningSoftmax,
    queries: &[f32],
    positions: Range<usize>,
    decoded: &dyn Positions,
) {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for (first, count) in blocks(positions) {
        keys.clear();
        values.clear();
        decoded.read(first, count, &mut keys, &mut values);
        let rows = KeyValue::new(Rows::F32(&keys), Rows::F32(&values));
        add_rows(softmax, queries, rows, count);
    }
}

/// The first position and the number of positions of each block.
fn blocks(positions: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let starts = positions.clone().step_by(PAGE);
    starts.map(move |first| (first, PAGE.min(positions.end - first)))
}

/// Adds the one position that the queries themselves are at.
pub(super) fn add_own(softmax: &mut RunningSoftmax, queries: &[f32], own: KeyValue<&[f32]>) {
    assert_eq!(own.keys.len(), own.values.len(), "one value a key");
    add_rows(softmax, queries, own.map(Rows::F32), 1);
}

fn add_rows(softmax: &mut RunningSoftmax, queries: &[f32], rows: KeyValue<Rows<'_>>, count: usize) {
    let (m, group) = (softmax.head_dim, softmax.rows());
    let mut weights = [0f32; PAGE * MAX_GROUP];
    let weights = &mut weights[..count * group];
    dots(rows.keys, queries, m, group, weights);
    softmax.weigh(weights);
    combine(weights, rows.values, m, group, &mut softmax.output);
}

/// Adds positions that are turned back into vectors; `queries` `[rows, m]` are scaled already and do not see the first
/// `hidden[row]` of them.
pub(super) fn add(
    softmax: &mut RunningSoftmax,
    queries: &[f32],
    hidden: &[usize],
    positions: &dyn Positions,
) {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let unseen = hidden.iter().min().copied().unwrap_or(0);
    for (first, count) in blocks(unseen..positions.len()) {
        keys.clear();
        values.clear();
        positions.read(first, count, &mut keys, &mut values);
        let sees = |row: usize, i: usize| first + i >= hidden[row];
        add_block(softmax, queries, &keys, &values, sees);
    }
}

/// Adds the queries' own positions: row `r` is at `own[r]` of them.
pub(super) fn add_causal(
    softmax: &mut RunningSoftmax,
    queries: &[f32],
    hidden: &[usize],
    own: &[usize],
    KeyValue { keys, values }: KeyValue<&[f32]>,
) {
    let m = softmax.head_dim;
    assert_eq!(keys.len(), values.len(), "one value a key");
    let newest = own.iter().max().copied().unwrap_or(0);
    let oldest = hidden.iter().min().copied().unwrap_or(0).min(newest);
    let seen = oldest * m..(newest + 1) * m;
    let values = values[seen.clone()].chunks(PAGE * m);
    let blocks = keys[seen].chunks(PAGE * m).zip(values);
    for (block, (keys, values)) in blocks.enumerate() {
        let start = oldest + block * PAGE;
        let sees = |row: usize, i: usize| (hidden[row]..=own[row]).contains(&(start + i));
        add_block(softmax, queries, keys, values, sees);
    }
}

fn add_block(
    softmax: &mut RunningSoftmax,
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    sees: impl Fn(usize, usize) -> bool,
) {
    let (rows, m) = (softmax.rows(), softmax.head_dim);
    let count = keys.len() / m;
    let queries = Matrix::by_rows(queries, rows, m);
    let mut weights = vec![0.0; rows * count];
    let keys = Matrix::by_rows(keys, count, m).transposed();
    multiply(&mut weights, false, queries, keys);
    for (row, scores) in weights.chunks_exact_mut(count).enumerate() {
        for (i, score) in scores.iter_mut().enumerate() {
            if !sees(row, i) {
                *score = f32::NEG_INFINITY;
            }
        }
        softmax.weigh_one(row, scores);
    }
    let weights = Matrix::by_rows(&weights, rows, count);
    let values = Matrix::by_rows(values, count, m);
    multiply(&mut softmax.output, true, weights, values);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Event {
        Extend(usize),
        Drop(usize),
        Keep(usize),
        Double,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            4 => (0usize..700).prop_map(Event::Extend),
            3 => (0usize..20).prop_map(Event::Extend),
            3 => (0usize..600).prop_map(Event::Drop),
            1 => (1usize..5).prop_map(Event::Keep),
            1 => Just(Event::Double),
        ];
        prop::collection::vec(event, 1..20)
    }

    proptest! {
        #[test]
        fn pages_are_a_list(m in 1usize..5, f16: bool, passed in 0usize..600, events in events()) {
            let number_type = if f16 { NumberType::F16 } else { NumberType::F32 };
            let mut rows = DenseRows::new(m, number_type);
            rows.pass(passed);
            let mut list: Vec<f32> = Vec::new();
            let (mut came, mut kept) = (0, false);
            for event in events {
                match event {
                    Event::Extend(count) => {
                        // Numbers that either type holds.
                        let new: Vec<f32> = (came..came + count * m).map(|x| (x % 1000) as f32).collect();
                        came += new.len();
                        rows.extend(&new);
                        list.extend(new);
                    }
                    Event::Drop(count) => {
                        let count = count.min(rows.len());
                        rows.drop_front(count);
                        list.drain(..count * m);
                    }
                    Event::Keep(every) => {
                        let chosen: Vec<usize> = (0..rows.len()).step_by(every).collect();
                        rows.keep(&chosen);
                        list = list.chunks(m).step_by(every).flatten().copied().collect();
                        kept |= every > 1;
                    }
                    Event::Double => {
                        rows.map(|page| page.iter().map(|x| 2.0 * x % 1024.0).collect());
                        list.iter_mut().for_each(|x| *x = 2.0 * *x % 1024.0);
                    }
                }
                prop_assert_eq!(rows.len(), list.len() / m);
                prop_assert_eq!(&rows.to_f32(), &list);
                let (first, count) = (rows.len() / 3, rows.len() / 2);
                let mut some = Vec::new();
                rows.read(first, count, &mut some);
                prop_assert_eq!(&some[..], &list[first * m..(first + count) * m]);
                let number = number_type.bytes();
                let pages = rows.len() / PAGE + 2;
                let room = ROOM * m * number + 2 * pages * size_of::<Vec<u16>>();
                let most = if kept { usize::MAX } else { rows.len() * m * number + room };
                prop_assert!(rows.is_empty() || rows.bytes() <= most, "{} for {most}", rows.bytes());
                // Pages do not depend on what came before.
                let mut again = DenseRows::new(m, number_type);
                again.pass(rows.passed);
                again.extend(&list);
                let lengths = |rows: &DenseRows| -> Vec<usize> {
                    rows.blocks(0..rows.len()).map(|(_, count)| count).collect()
                };
                prop_assert_eq!(lengths(&rows), lengths(&again));
            }
        }
    }
}
