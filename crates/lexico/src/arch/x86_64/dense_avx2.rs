//! Products of rows with a few queries, and sums of weighted rows, on AVX2.

use core::arch::x86_64::*;

use half::f16;

use crate::arch::dense::{AHEAD, STRETCH};
use crate::arch::prefetch_lines;

const WIDTH: usize = 8;
/// Sums that a loop carries: as many as the processor has multiply-adds under way, and half its registers.
const SUMS: usize = 8;

/// Numbers that registers are loaded from.
pub(in super::super) trait Number: Copy + Default {
    /// # Safety
    /// Needs AVX2 and F16C; 8 numbers must lie at `from`.
    unsafe fn load(from: *const Self) -> __m256;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Number for f16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

/// Fewer than 8 numbers, and zeros after them.
///
/// # Safety
/// Needs AVX2 and F16C; `count` numbers must lie at `from`.
#[inline(always)]
unsafe fn load_some<N: Number>(count: usize, from: *const N) -> __m256 {
    let mut numbers = [N::default(); WIDTH];
    // SAFETY: the caller's, and a register's numbers are there.
    unsafe {
        numbers[..count].copy_from_slice(core::slice::from_raw_parts(from, count));
        N::load(numbers.as_ptr())
    }
}

/// # Safety
/// Needs AVX2, FMA and F16C. `rows` `[n, m]`, `queries` `[group, m]`, `out` `[n, group]`, `group` a power of two
/// up to 8.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn dots<N: Number>(
    rows: &[N],
    queries: &[f32],
    m: usize,
    group: usize,
    out: &mut [f32],
) {
    let n = rows.len() / m;
    let step = SUMS / group.min(4);
    let mut row = 0;
    while row + step <= n {
        let bytes = step * m * size_of::<N>();
        prefetch_lines(rows[row * m..].as_ptr(), bytes, AHEAD);
        for first in (0..group).step_by(4) {
            let rows = rows[row * m..].as_ptr();
            let queries = queries[first * m..].as_ptr();
            let out = out[row * group + first..].as_mut_ptr();
            // SAFETY: `step` rows and so many queries from here on lie within their slices, and so
            // do the results, which lie `group` apart.
            unsafe {
                match group {
                    1 => dots_of::<N, 8, 1>(rows, queries, m, 1, out),
                    2 => dots_of::<N, 4, 2>(rows, queries, m, 2, out),
                    _ => dots_of::<N, 2, 4>(rows, queries, m, group, out),
                }
            }
        }
        row += step;
    }
    for row in row..n {
        for g in 0..group {
            // SAFETY: one row and one query.
            unsafe {
                let (row_at, query) = (rows[row * m..].as_ptr(), queries[g * m..].as_ptr());
                dots_of::<N, 1, 1>(row_at, query, m, 1, out[row * group + g..].as_mut_ptr());
            }
        }
    }
}

/// # Safety
/// `R` rows, `Q` queries and their results, `stride` apart by rows, lie behind the pointers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_of<N: Number, const R: usize, const Q: usize>(
    rows: *const N,
    queries: *const f32,
    m: usize,
    stride: usize,
    out: *mut f32,
) {
    let mut sums = [[_mm256_setzero_ps(); Q]; R];
    let whole = m - m % WIDTH;
    let mut k = 0;
    while k < whole {
        let mut x = [_mm256_setzero_ps(); Q];
        for (q, x) in x.iter_mut().enumerate() {
            // SAFETY: 8 numbers of query `q` from `k` on.
            *x = unsafe { _mm256_loadu_ps(queries.add(q * m + k)) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: 8 numbers of row `r` from `k` on.
            let row = unsafe { N::load(rows.add(r * m + k)) };
            for (sum, &x) in sums.iter_mut().zip(&x) {
                *sum = _mm256_fmadd_ps(row, x, *sum);
            }
        }
        k += WIDTH;
    }
    if whole < m {
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: what is left of the row and of the query.
            unsafe {
                let row = load_some(m - whole, rows.add(r * m + whole));
                for (q, sum) in sums.iter_mut().enumerate() {
                    let x = load_some(m - whole, queries.add(q * m + whole));
                    *sum = _mm256_fmadd_ps(row, x, *sum);
                }
            }
        }
    }
    let mut flat = [_mm256_setzero_ps(); SUMS];
    for (i, flat) in flat[..R * Q].iter_mut().enumerate() {
        *flat = sums[i / Q][i % Q];
    }
    let mut all = [0f32; SUMS];
    // SAFETY: a register holds eight numbers.
    unsafe { _mm256_storeu_ps(all.as_mut_ptr(), sums_of(flat)) };
    for (r, all) in all[..R * Q].as_chunks::<Q>().0.iter().enumerate() {
        // SAFETY: the results of row `r`.
        unsafe { out.add(r * stride).cast::<[f32; Q]>().write(*all) };
    }
}

/// The sum of each of 8 registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums_of(a: [__m256; SUMS]) -> __m256 {
    let pair = |i: usize| _mm256_hadd_ps(a[i], a[i + 1]);
    let (low, high) = (
        _mm256_hadd_ps(pair(0), pair(2)),
        _mm256_hadd_ps(pair(4), pair(6)),
    );
    _mm256_add_ps(
        _mm256_permute2f128_ps::<0x20>(low, high),
        _mm256_permute2f128_ps::<0x31>(low, high),
    )
}

/// # Safety
/// Needs AVX2, FMA and F16C. `weights` `[n, group]`, `rows` `[n, m]`, `out` `[group, m]`, `group` a power of
/// two up to 8.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn combine<N: Number>(
    weights: &[f32],
    rows: &[N],
    m: usize,
    group: usize,
    out: &mut [f32],
) {
    let at_once = (STRETCH / (m * size_of::<N>())).max(1);
    let stretches = rows.chunks(at_once * m);
    for (weights, rows) in weights.chunks(at_once * group).zip(stretches) {
        for first in (0..group).step_by(4) {
            let mut column = 0;
            while column < m {
                let place = Columns {
                    weights: weights[first..].as_ptr(),
                    rows: rows[column..].as_ptr(),
                    out: out[first * m + column..].as_mut_ptr(),
                    n: rows.len() / m,
                    m,
                    group,
                };
                // SAFETY: so many registers of columns from here on, and so many queries, lie within
                // their slices.
                column += unsafe {
                    match (group, (m - column) / WIDTH) {
                        (1, 8..) => place.add::<1, 8>(),
                        (1, 4..) => place.add::<1, 4>(),
                        (1, 1..) => place.add::<1, 1>(),
                        (1, 0) => place.add_last::<1>(m - column),
                        (2, 4..) => place.add::<2, 4>(),
                        (2, 1..) => place.add::<2, 1>(),
                        (2, 0) => place.add_last::<2>(m - column),
                        (_, 2..) => place.add::<4, 2>(),
                        (_, 1) => place.add::<4, 1>(),
                        (_, 0) => place.add_last::<4>(m - column),
                    }
                };
            }
        }
    }
}

/// Some columns of rows, and where their weighted sums go.
struct Columns<N> {
    weights: *const f32,
    rows: *const N,
    out: *mut f32,
    n: usize,
    m: usize,
    group: usize,
}

impl<N: Number> Columns<N> {
    /// Returns the number of columns.
    ///
    /// # Safety
    /// `Q` queries and `C` registers of columns lie behind the pointers.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add<const Q: usize, const C: usize>(&self) -> usize {
        let mut sums = [[_mm256_setzero_ps(); C]; Q];
        let (mut numbers, mut weights) = (self.rows, self.weights);
        for _ in 0..self.n {
            prefetch_lines(numbers, C * WIDTH * size_of::<N>(), STRETCH);
            let mut row = [_mm256_setzero_ps(); C];
            for (c, row) in row.iter_mut().enumerate() {
                // SAFETY: the columns of row `t`.
                *row = unsafe { N::load(numbers.add(c * WIDTH)) };
            }
            for (q, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the weight of row `t` and query `q`.
                let weight = unsafe { _mm256_set1_ps(*weights.add(q)) };
                for (sum, &row) in sums.iter_mut().zip(&row) {
                    *sum = _mm256_fmadd_ps(weight, row, *sum);
                }
            }
            numbers = numbers.wrapping_add(self.m);
            weights = weights.wrapping_add(self.group);
        }
        for (q, sums) in sums.iter().enumerate() {
            for (c, &sum) in sums.iter().enumerate() {
                // SAFETY: the columns of query `q`.
                unsafe {
                    let at = self.out.add(q * self.m + c * WIDTH);
                    _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), sum));
                }
            }
        }
        C * WIDTH
    }

    /// As [`Columns::add`] for fewer columns than a register has.
    ///
    /// # Safety
    /// `Q` queries and `count` columns lie behind the pointers.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_last<const Q: usize>(&self, count: usize) -> usize {
        let mut sums = [_mm256_setzero_ps(); Q];
        for t in 0..self.n {
            // SAFETY: the columns of row `t`.
            let row = unsafe { load_some(count, self.rows.add(t * self.m)) };
            for (q, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the weight of row `t` and query `q`.
                let weight = unsafe { _mm256_set1_ps(*self.weights.add(t * self.group + q)) };
                *sum = _mm256_fmadd_ps(weight, row, *sum);
            }
        }
        for (q, &sum) in sums.iter().enumerate() {
            let mut columns = [0f32; WIDTH];
            // SAFETY: a register holds eight numbers; the columns of query `q` are there.
            unsafe {
                _mm256_storeu_ps(columns.as_mut_ptr(), sum);
                let out = core::slice::from_raw_parts_mut(self.out.add(q * self.m), count);
                for (out, sum) in out.iter_mut().zip(columns) {
                    *out += sum;
                }
            }
        }
        count
    }
}
