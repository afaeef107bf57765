//! Matrices in half precision, multiplied by rows in single precision.
//!
//! A model's matrices are read from memory once a token, so that half the bytes is twice the speed;
//! products and sums are f32, and no activation is rounded.

use std::cell::RefCell;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use lexico::kernels::matmul::{Matrix, multiply};
use lexico::kernels::{dot_bf16, dot_f16};
use lexico::threads::{Threads, for_each};

/// Products from which widening rows to f32 for one matrix product is faster than single products.
pub(crate) const MANY_PRODUCTS: usize = 8;
/// Rows that one task works on: of a matrix product enough that its right side is rarely packed, of
/// few products so few that a small matrix too keeps all threads busy.
const PRODUCT_ROWS: usize = 256;
const FEW_ROWS: usize = 64;

thread_local! {
    static WIDENED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Numbers of 16 bits.
#[derive(Debug, Clone)]
pub enum Halves {
    /// IEEE half precision.
    F16(Vec<f16>),
    /// The upper half of single precision.
    BF16(Vec<bf16>),
}

impl Halves {
    fn len(&self) -> usize {
        match self {
            Halves::F16(numbers) => numbers.len(),
            Halves::BF16(numbers) => numbers.len(),
        }
    }

    /// The product of the numbers from `first` on with `x`.
    fn dot(&self, first: usize, x: &[f32]) -> f32 {
        match self {
            Halves::F16(numbers) => dot_f16(&numbers[first..][..x.len()], x),
            Halves::BF16(numbers) => dot_bf16(&numbers[first..][..x.len()], x),
        }
    }

    fn widen(&self, first: usize, out: &mut [f32]) {
        match self {
            Halves::F16(numbers) => numbers[first..][..out.len()].convert_to_f32_slice(out),
            Halves::BF16(numbers) => {
                for (out, x) in out.iter_mut().zip(&numbers[first..]) {
                    *out = x.to_f32();
                }
            }
        }
    }
}

/// A matrix in half precision, row by row.
#[derive(Debug, Clone)]
pub struct HalfMatrix {
    numbers: Halves,
    rows: usize,
    columns: usize,
}

impl HalfMatrix {
    /// A matrix of `rows × columns` numbers.
    ///
    /// # Panics
    /// Where there are more or fewer numbers, or none.
    pub fn new(numbers: Halves, rows: usize, columns: usize) -> Self {
        assert_eq!(
            numbers.len(),
            rows * columns,
            "a matrix is filled by its numbers"
        );
        assert!(rows * columns > 0, "a matrix has numbers");
        Self {
            numbers,
            rows,
            columns,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The numbers, row by row.
    pub fn into_numbers(self) -> Halves {
        self.numbers
    }

    /// Writes one row to `out`, `[columns]`.
    ///
    /// # Panics
    /// Where there is no such row or `out` is of another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns, "a row fits");
        self.numbers.widen(row * self.columns, out);
    }

    /// Products of rows `x` `[m, columns]` with every row of the matrix: `[m, rows]`.
    ///
    /// # Panics
    /// Where `x` does not consist of whole rows.
    pub fn multiply(&self, x: &[f32], threads: &dyn Threads) -> Vec<f32> {
        let m = x.len() / self.columns;
        assert_eq!(x.len(), m * self.columns, "whole rows");
        if m == 0 {
            return Vec::new();
        }
        let task_rows = match m < MANY_PRODUCTS {
            true => FEW_ROWS,
            false => PRODUCT_ROWS,
        };
        // Every task writes rows of the transposed product, which lie side by side.
        let mut transposed = vec![0f32; self.rows * m];
        let tasks = transposed.chunks_mut(task_rows * m).enumerate();
        for_each(threads, tasks, |(task, out)| {
            self.multiply_rows(x, m, task * task_rows, out);
        });
        if m == 1 {
            return transposed;
        }
        let mut out = vec![0f32; m * self.rows];
        let rows = out.chunks_mut(self.rows).enumerate();
        for_each(threads, rows, |(i, out)| {
            for (out, products) in out.iter_mut().zip(transposed.chunks_exact(m)) {
                *out = products[i];
            }
        });
        out
    }

    /// Products of the rows from `first` on with `x`: as many as `out` `[rows, m]` holds.
    fn multiply_rows(&self, x: &[f32], m: usize, first: usize, out: &mut [f32]) {
        if m < MANY_PRODUCTS {
            for (row, out) in out.chunks_exact_mut(m).enumerate() {
                let at = (first + row) * self.columns;
                for (x, out) in x.chunks_exact(self.columns).zip(out) {
                    *out = self.numbers.dot(at, x);
                }
            }
            return;
        }
        let rows = out.len() / m;
        let x = Matrix::by_rows(x, m, self.columns);
        WIDENED.with_borrow_mut(|widened| {
            widened.resize(rows * self.columns, 0.0);
            self.numbers.widen(first * self.columns, widened);
            let rows = Matrix::by_rows(widened, rows, self.columns);
            multiply(out, false, rows, x.transposed());
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn products_agree_with_f64(
            rows in 1usize..300, columns in 1usize..70, m in 1usize..12, seed: u32, brain: bool,
        ) {
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let numbers: Vec<f32> = (0..rows * columns).map(|_| draw()).collect();
            let x: Vec<f32> = (0..m * columns).map(|_| draw()).collect();
            let halves = if brain {
                Halves::BF16(numbers.iter().map(|&x| bf16::from_f32(x)).collect())
            } else {
                Halves::F16(numbers.iter().map(|&x| f16::from_f32(x)).collect())
            };
            let rounding = if brain { 4e-3 } else { 5e-4 };
            let matrix = HalfMatrix::new(halves, rows, columns);
            let product = matrix.multiply(&x, &lexico::threads::Rayon);
            prop_assert_eq!(product.len(), m * rows);
            let mut row = vec![0.0; columns];
            for r in 0..rows {
                matrix.read_row(r, &mut row);
                for (exact, &held) in numbers[r * columns..].iter().zip(&row) {
                    prop_assert!((exact - held).abs() <= rounding);
                }
                for i in 0..m {
                    let x = &x[i * columns..][..columns];
                    let want: f64 = row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    let got = f64::from(product[i * rows + r]);
                    prop_assert!((got - want).abs() < 1e-5 * columns as f64, "{} for {}", got, want);
                }
            }
        }
    }
}
