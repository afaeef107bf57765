//! Rows of activations in 8-bit integers.

use super::super::{compile, dispatch};
use super::{UNIT, portable};

/// A few rows of activations, rounded to 8-bit integers, 32 of them with a scale each.
pub struct Panel {
    rows: usize,
    /// Rows with those of zeros that fill up to what kernels are compiled for: 1, 4 or 8.
    filled: usize,
    columns: usize,
    /// By unit, row and column.
    pub(super) numbers: Vec<i8>,
    /// By unit and row.
    pub(super) scales: Vec<f32>,
    /// Negative sums of the integers: by unit, then of its first half, its second and the whole, by row.
    pub(super) sums: Vec<i32>,
    /// The same sums with the row's scale.
    pub(super) scaled_sums: Vec<f32>,
}

compile! {
    round(x: &[f32; UNIT], numbers: &mut [i8; UNIT]) -> (f32, [i32; 2]);
}

impl Panel {
    /// Rows of a panel at the most.
    pub const ROWS: usize = 8;

    /// Rounds up to [`Panel::ROWS`] rows `x` `[rows, columns]`. A unit with a NaN or an infinity makes NaN of all products.
    ///
    /// # Panics
    /// Where there are no rows or too many, or columns are no multiple of 32.
    pub fn new(x: &[f32], columns: usize) -> Self {
        assert!(columns > 0 && columns.is_multiple_of(UNIT), "whole units");
        let rows = x.len() / columns;
        assert_eq!(x.len(), rows * columns, "whole rows");
        let filled = match rows {
            1 => 1,
            2..=4 => 4,
            5..=Self::ROWS => Self::ROWS,
            _ => unreachable!("callers give a panel of rows"),
        };
        let units = columns / UNIT;
        let mut panel = Self {
            rows,
            filled,
            columns,
            numbers: vec![0; filled * columns],
            scales: vec![0.0; filled * units],
            sums: vec![0; 3 * filled * units],
            scaled_sums: vec![0.0; 3 * filled * units],
        };
        for (r, x) in x.chunks_exact(columns).enumerate() {
            for (unit, x) in x.as_chunks::<UNIT>().0.iter().enumerate() {
                let at = unit * filled + r;
                let numbers = &mut panel.numbers.as_chunks_mut::<UNIT>().0[at];
                let (scale, [first, second]) = dispatch!(round(x, numbers));
                panel.scales[at] = scale;
                for (part, sum) in [first, second, first + second].into_iter().enumerate() {
                    let at = (3 * unit + part) * filled + r;
                    panel.sums[at] = -sum;
                    panel.scaled_sums[at] = -sum as f32 * scale;
                }
            }
        }
        panel
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn filled(&self) -> usize {
        self.filled
    }
}
