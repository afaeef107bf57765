//! A matrix in ggml's blocks, laid out for the kernels, and back.

use std::ops::Range;

use bytemuck::{Pod, Zeroable, zeroed_vec};
use half::f16;

use super::product::low_bits;
use super::{BlockType, GROUP, LINE, STEP, STEPS, UNIT, pack as portable};
use crate::kernels::{compile, dispatch};

/// Numbers of sixteen rows and a step of columns: one vector of the widest registers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; LINE]);

// SAFETY: bytes of zero are a line.
unsafe impl Zeroable for Line {}
// SAFETY: it is bytes, and as many as its alignment.
unsafe impl Pod for Line {}

/// Lines of zeros in memory that nothing has touched yet, so that the thread that fills a page is the first to. A `Vec` of
/// them is no such memory: where more than the allocator's own alignment is asked for, zeros are written.
struct Lines {
    storage: Vec<u128>,
    /// Where the first line begins.
    start: usize,
    count: usize,
}

impl Lines {
    const PARTS: usize = LINE / size_of::<u128>();

    fn zeros(count: usize) -> Self {
        let storage: Vec<u128> = zeroed_vec((count + 1) * Self::PARTS);
        let start = storage.as_ptr().align_offset(LINE);
        Self {
            storage,
            start,
            count,
        }
    }

    fn range(&self) -> Range<usize> {
        self.start..self.start + self.count * Self::PARTS
    }

    fn all(&self) -> &[Line] {
        bytemuck::cast_slice(&self.storage[self.range()])
    }

    fn all_mut(&mut self) -> &mut [Line] {
        let range = self.range();
        bytemuck::cast_slice_mut(&mut self.storage[range])
    }
}

compile! {
    lay_out(kind: BlockType, rows: &[u8], row_bytes: usize, quants: &mut [Line], scales: &mut [u8]);
}

/// A matrix of ggml's blocks, sixteen rows side by side.
pub struct BlockMatrix {
    kind: BlockType,
    rows: usize,
    columns: usize,
    /// By group, unit and bits.
    quants: Lines,
    /// By group and half-precision scale.
    scales: Vec<u8>,
}

impl BlockMatrix {
    /// A matrix of zeros.
    ///
    /// # Panics
    /// Where rows do not consist of whole blocks, or are none.
    pub fn new(kind: BlockType, rows: usize, columns: usize) -> Self {
        assert!(
            columns > 0 && columns.is_multiple_of(kind.numbers()),
            "rows of whole blocks"
        );
        let (groups, layout) = (rows.div_ceil(GROUP), kind.layout());
        let units = columns / UNIT;
        let lines = layout.quant_bytes() / LINE;
        Self {
            kind,
            rows,
            columns,
            quants: Lines::zeros(groups * units * lines),
            scales: vec![0; groups * units / layout.units() * layout.scale_bytes()],
        }
    }

    /// A matrix of the blocks of all rows, one after the other, as a GGUF file has them.
    ///
    /// # Panics
    /// Those of [`BlockMatrix::new`], and where there are more or fewer bytes.
    pub fn from_blocks(kind: BlockType, rows: usize, columns: usize, bytes: &[u8]) -> Self {
        let mut matrix = Self::new(kind, rows, columns);
        let row_bytes = matrix.row_bytes();
        for mut part in matrix.parts_mut(rows.div_ceil(GROUP).max(1)) {
            part.fill(&bytes[..rows * row_bytes]);
        }
        matrix
    }

    /// The block type that the matrix came in.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Number of groups of [`GROUP`] rows; the last may be filled up with zeros.
    pub fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    /// Rows of some groups.
    pub fn rows_of(&self, groups: &Range<usize>) -> Range<usize> {
        (groups.start * GROUP).min(self.rows)..(groups.end * GROUP).min(self.rows)
    }

    /// Bytes that the matrix takes here.
    pub fn bytes(&self) -> usize {
        self.quants.count * LINE + self.scales.len()
    }

    /// Bytes of a row in a file.
    pub fn row_bytes(&self) -> usize {
        self.columns / self.kind.numbers() * self.kind.bytes()
    }

    /// Parts of up to `groups` groups each, which can be filled side by side.
    ///
    /// # Panics
    /// Where `groups` is 0.
    pub fn parts_mut(&mut self, groups: usize) -> Vec<BlockRows<'_>> {
        let layout = self.kind.layout();
        let units = self.columns / UNIT;
        let lines = units * layout.quant_bytes() / LINE;
        let scales = units / layout.units() * layout.scale_bytes();
        let (kind, columns, rows) = (self.kind, self.columns, self.rows);
        let quants = self.quants.all_mut().chunks_mut(groups * lines);
        let parts = quants.zip(self.scales.chunks_mut(groups * scales));
        let part = |(part, (quants, scales))| {
            let first = part * groups * GROUP;
            BlockRows {
                kind,
                columns,
                rows: first..(first + groups * GROUP).min(rows),
                quants,
                scales,
            }
        };
        parts.enumerate().map(part).collect()
    }

    /// The lines and the scales of a group.
    pub(super) fn group(&self, group: usize) -> (&[Line], &[u8]) {
        let layout = self.kind.layout();
        let units = self.columns / UNIT;
        let lines = units * layout.quant_bytes() / LINE;
        let scales = units / layout.units() * layout.scale_bytes();
        (
            &self.quants.all()[group * lines..][..lines],
            &self.scales[group * scales..][..scales],
        )
    }

    /// The numbers of a group in a unit, their zero taken away: by step, lane and column.
    pub(super) fn unit(&self, group: usize, unit: usize) -> [[[i8; STEP]; GROUP]; STEPS] {
        let layout = self.kind.layout();
        let lines = layout.quant_bytes() / LINE;
        let lines = &self.group(group).0[unit * lines..][..lines];
        let (low, high) = lines.split_at(layout.low);
        let zero = layout.zero.map_or(0, |zero| 1u8 << zero);
        let mut numbers = [[[0i8; STEP]; GROUP]; STEPS];
        for (step, numbers) in numbers.iter_mut().enumerate() {
            // Bits of as many steps as fit lie over each other in a byte.
            let place = |bits: usize| (step % bits, step / bits * bits, low_bits(bits as u32));
            let (line, shift, mask) = place(layout.low);
            let mut bytes = low[line].0.map(|byte| byte >> shift & mask);
            if layout.high > 0 {
                let (line, shift, mask) = place(layout.high);
                for (byte, high) in bytes.iter_mut().zip(&high[line].0) {
                    *byte |= (high >> shift & mask) << layout.low;
                }
            }
            for (number, byte) in numbers.as_flattened_mut().iter_mut().zip(bytes) {
                *number = byte.wrapping_sub(zero) as i8;
            }
        }
        numbers
    }

    /// The scales and the least values, zeros where there are none, of a group and the columns that share them.
    pub(super) fn scales(&self, group: usize, part: usize) -> ([f32; GROUP], [f32; GROUP]) {
        let layout = self.kind.layout();
        let parts = layout.units() * UNIT / layout.columns;
        let scales = &self.group(group).1[part / parts * layout.scale_bytes()..];
        let (floats, bytes) = scales.split_at(layout.float_bytes());
        let floats = |number: usize| -> [f32; GROUP] {
            let floats = floats[2 * number * GROUP..].as_chunks::<2>().0;
            std::array::from_fn(|lane| f16::from_le_bytes(floats[lane]).to_f32())
        };
        let least = if layout.least {
            floats(1)
        } else {
            [0.0; GROUP]
        };
        if !layout.nested {
            return (floats(0), least);
        }
        let bytes = &bytes[part % parts * layout.pair() * GROUP..];
        let number = |at: usize| match layout.least {
            true => f32::from(bytes[at]),
            false => f32::from(bytes[at] as i8),
        };
        let scales = floats(0);
        let scales = std::array::from_fn(|lane| scales[lane] * number(lane));
        if !layout.least {
            return (scales, least);
        }
        (
            scales,
            std::array::from_fn(|lane| least[lane] * number(GROUP + lane)),
        )
    }

    /// Writes the numbers that one row stands for to `out`, `[columns]`.
    ///
    /// # Panics
    /// Where there is no such row or `out` is of another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns, "a row fits");
        let (group, lane) = (row / GROUP, row % GROUP);
        let columns = self.kind.layout().columns;
        for (unit, out) in out.as_chunks_mut::<UNIT>().0.iter_mut().enumerate() {
            let numbers = self.unit(group, unit);
            for (part, out) in out.chunks_exact_mut(columns).enumerate() {
                let (scales, least) = self.scales(group, unit * UNIT / columns + part);
                for (at, out) in out.iter_mut().enumerate() {
                    let column = part * columns + at;
                    let number = numbers[column / STEP][lane][column % STEP];
                    *out = scales[lane] * f32::from(number) - least[lane];
                }
            }
        }
    }
}

/// Some rows of a [`BlockMatrix`], to be filled.
pub struct BlockRows<'a> {
    kind: BlockType,
    columns: usize,
    rows: Range<usize>,
    quants: &'a mut [Line],
    scales: &'a mut [u8],
}

impl BlockRows<'_> {
    /// Numbers of the rows in their matrix.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Takes the blocks of all these rows, one after the other, as a GGUF file has them.
    ///
    /// # Panics
    /// Where there are more or fewer bytes.
    pub fn fill(&mut self, bytes: &[u8]) {
        let (kind, layout) = (self.kind, self.kind.layout());
        let row_blocks = self.columns / kind.numbers();
        let row_bytes = row_blocks * kind.bytes();
        assert_eq!(
            bytes.len(),
            self.rows.len() * row_bytes,
            "blocks of all rows"
        );
        let units = kind.numbers() / UNIT;
        let lines = units * layout.quant_bytes() / LINE;
        let scale_bytes = units / layout.units() * layout.scale_bytes();
        let quants = self.quants.chunks_exact_mut(row_blocks * lines);
        let scales = self.scales.chunks_exact_mut(row_blocks * scale_bytes);
        let groups = bytes.chunks(GROUP * row_bytes).zip(quants.zip(scales));
        for (rows, (quants, scales)) in groups {
            dispatch!(lay_out(kind, rows, row_bytes, quants, scales));
        }
    }
}
