use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Positions, RunningSoftmax};
use crate::kernels::dense::{MAX_GROUP, Rows, combine, dots};
use crate::kernels::matmul::{Matrix, multiply};
use crate::key_value::KeyValue;

/// Positions that are scored at a time.
const BLOCK: usize = 256;
/// Rows by which storage grows at the least.
const GROWTH: usize = 4;

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

/// A growing list of dense vectors.
#[derive(Debug, Clone)]
pub struct DenseRows {
    head_dim: usize,
    numbers: Numbers,
}

#[derive(Debug, Clone)]
enum Numbers {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl DenseRows {
    /// No vectors yet, each to be of length `head_dim`.
    pub fn new(head_dim: usize, number_type: NumberType) -> Self {
        let numbers = match number_type {
            NumberType::F16 => Numbers::F16(Vec::new()),
            NumberType::F32 => Numbers::F32(Vec::new()),
        };
        Self { head_dim, numbers }
    }

    /// Length of each vector, `m`.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Makes room for so many more vectors and for none beyond them, where they are all that is to come.
    pub fn reserve(&mut self, vectors: usize) {
        match &mut self.numbers {
            Numbers::F16(numbers) => numbers.reserve_exact(vectors * self.head_dim),
            Numbers::F32(numbers) => numbers.reserve_exact(vectors * self.head_dim),
        }
    }

    /// Appends vectors, `[n, m]`.
    pub fn extend(&mut self, vectors: &[f32]) {
        match &mut self.numbers {
            Numbers::F16(numbers) => {
                grow(numbers, vectors.len(), self.head_dim);
                let limit = f16::MAX.to_f32();
                let held = |&x: &f32| f16::from_f32(x.clamp(-limit, limit));
                numbers.extend(vectors.iter().map(held));
            }
            Numbers::F32(numbers) => {
                grow(numbers, vectors.len(), self.head_dim);
                numbers.extend_from_slice(vectors);
            }
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        match &self.numbers {
            Numbers::F16(numbers) => numbers.len() / self.head_dim,
            Numbers::F32(numbers) => numbers.len() / self.head_dim,
        }
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F16(numbers) => numbers.capacity() * size_of::<f16>(),
            Numbers::F32(numbers) => numbers.capacity() * size_of::<f32>(),
        }
    }

    /// Drops the `count` oldest vectors.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn drop_front(&mut self, count: usize) {
        let count = count * self.head_dim;
        match &mut self.numbers {
            Numbers::F16(numbers) => drop(numbers.drain(..count)),
            Numbers::F32(numbers) => drop(numbers.drain(..count)),
        }
    }

    /// Keeps the vectors at `rows`, which ascend, and drops all others. Memory is given back beyond what the next
    /// vectors would have it grow by again.
    ///
    /// # Panics
    /// Where there is no such vector.
    pub fn keep(&mut self, rows: &[usize]) {
        match &mut self.numbers {
            Numbers::F16(numbers) => keep(numbers, rows, self.head_dim),
            Numbers::F32(numbers) => keep(numbers, rows, self.head_dim),
        }
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
            Numbers::F16(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Numbers::F32(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// Appends `count` vectors from `first` on to `out`, in f32.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let before = out.len();
        out.resize(before + count * self.head_dim, 0.0);
        match self.rows(first, count) {
            Rows::F16(numbers) => numbers.convert_to_f32_slice(&mut out[before..]),
            Rows::F32(numbers) => out[before..].copy_from_slice(numbers),
        }
    }

    fn rows(&self, first: usize, count: usize) -> Rows<'_> {
        let range = first * self.head_dim..(first + count) * self.head_dim;
        match &self.numbers {
            Numbers::F16(numbers) => Rows::F16(&numbers[range]),
            Numbers::F32(numbers) => Rows::F32(&numbers[range]),
        }
    }
}

/// Grows by a sixteenth rather than by doubling: what is allocated is what the cache weighs.
fn grow<T>(numbers: &mut Vec<T>, more: usize, head_dim: usize) {
    if numbers.capacity() - numbers.len() < more {
        numbers.reserve_exact(more.max(GROWTH * head_dim).max(numbers.len() / 16));
    }
}

fn keep<T: Copy>(numbers: &mut Vec<T>, rows: &[usize], head_dim: usize) {
    for (to, &from) in rows.iter().enumerate() {
        if to != from {
            let from = from * head_dim;
            numbers.copy_within(from..from + head_dim, to * head_dim);
        }
    }
    numbers.truncate(rows.len() * head_dim);
    numbers.shrink_to(numbers.len() + (GROWTH * head_dim).max(numbers.len() / 16));
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
    for (first, count) in blocks(positions) {
        let rows = rows.map(|rows| rows.rows(first, count));
        add_rows(softmax, queries, rows, count);
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
    let starts = positions.clone().step_by(BLOCK);
    starts.map(move |first| (first, BLOCK.min(positions.end - first)))
}

/// Adds the one position that the queries themselves are at.
pub(super) fn add_own(softmax: &mut RunningSoftmax, queries: &[f32], own: KeyValue<&[f32]>) {
    assert_eq!(own.keys.len(), own.values.len(), "one value a key");
    add_rows(softmax, queries, own.map(Rows::F32), 1);
}

fn add_rows(softmax: &mut RunningSoftmax, queries: &[f32], rows: KeyValue<Rows<'_>>, count: usize) {
    let (m, group) = (softmax.head_dim, softmax.rows());
    let mut weights = [0f32; BLOCK * MAX_GROUP];
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
    let values = values[seen.clone()].chunks(BLOCK * m);
    let blocks = keys[seen].chunks(BLOCK * m).zip(values);
    for (block, (keys, values)) in blocks.enumerate() {
        let start = oldest + block * BLOCK;
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
