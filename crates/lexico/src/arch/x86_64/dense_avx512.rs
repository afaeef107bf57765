//! Products of rows with a few queries, and sums of weighted rows, on AVX-512.

use core::arch::x86_64::*;

use half::f16;

use crate::arch::dense::{AHEAD, STRETCH};
use crate::arch::prefetch_lines;

const WIDTH: usize = 16;

/// Numbers that registers are loaded from.
pub(in super::super) trait Number: Copy {
    /// # Safety
    /// Needs AVX-512; 16 numbers must lie at `from`.
    unsafe fn load(from: *const Self) -> __m512;
    /// # Safety
    /// Needs AVX-512; a number must lie wherever `mask` has a bit.
    unsafe fn load_some(mask: __mmask16, from: *const Self) -> __m512;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_some(mask: __mmask16, from: *const Self) -> __m512 {
        // SAFETY: the caller's; what is masked is not read.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Number for f16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_some(mask: __mmask16, from: *const Self) -> __m512 {
        // SAFETY: the caller's; what is masked is not read.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast())) }
    }
}

/// The mask of the last, incomplete register of a row.
fn tail(m: usize) -> __mmask16 {
    ((1u32 << (m % WIDTH)) - 1) as __mmask16
}

/// # Safety
/// Needs AVX-512 (f, bw, vl). `rows` `[n, m]`, `queries` `[group, m]`, `out` `[n, group]`, `group` a power
/// of two up to 8.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in super::super) unsafe fn dots<N: Number>(
    rows: &[N],
    queries: &[f32],
    m: usize,
    group: usize,
    out: &mut [f32],
) {
    let n = rows.len() / m;
    // Sixteen sums at a time, whatever the group.
    let step = WIDTH / group.min(4);
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
                    1 => dots_of::<N, 16, 1>(rows, queries, m, 1, out),
                    2 => dots_of::<N, 8, 2>(rows, queries, m, 2, out),
                    _ => dots_of::<N, 4, 4>(rows, queries, m, group, out),
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn dots_of<N: Number, const R: usize, const Q: usize>(
    rows: *const N,
    queries: *const f32,
    m: usize,
    stride: usize,
    out: *mut f32,
) {
    let mut sums = [[_mm512_setzero_ps(); Q]; R];
    let whole = m - m % WIDTH;
    let mut k = 0;
    while k < whole {
        let mut x = [_mm512_setzero_ps(); Q];
        for (q, x) in x.iter_mut().enumerate() {
            // SAFETY: 16 numbers of query `q` from `k` on.
            *x = unsafe { _mm512_loadu_ps(queries.add(q * m + k)) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: 16 numbers of row `r` from `k` on.
            let row = unsafe { N::load(rows.add(r * m + k)) };
            for (sum, &x) in sums.iter_mut().zip(&x) {
                *sum = _mm512_fmadd_ps(row, x, *sum);
            }
        }
        k += WIDTH;
    }
    if whole < m {
        let mask = tail(m);
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the mask ends with the row and the query.
            unsafe {
                let row = N::load_some(mask, rows.add(r * m + whole));
                for (q, sum) in sums.iter_mut().enumerate() {
                    let x = _mm512_maskz_loadu_ps(mask, queries.add(q * m + whole));
                    *sum = _mm512_fmadd_ps(row, x, *sum);
                }
            }
        }
    }
    if R * Q < WIDTH {
        for (r, sums) in sums.iter().enumerate() {
            for (q, &sum) in sums.iter().enumerate() {
                // SAFETY: the place of row `r` and query `q`.
                unsafe { *out.add(r * stride + q) = _mm512_reduce_add_ps(sum) };
            }
        }
        return;
    }
    let mut flat = [_mm512_setzero_ps(); WIDTH];
    for (i, flat) in flat.iter_mut().enumerate() {
        *flat = sums[i / Q][i % Q];
    }
    let all = sums_of(flat);
    if stride == Q {
        // SAFETY: the 16 results lie side by side.
        unsafe { _mm512_storeu_ps(out, all) };
        return;
    }
    let parts = [
        _mm512_extractf32x4_ps::<0>(all),
        _mm512_extractf32x4_ps::<1>(all),
        _mm512_extractf32x4_ps::<2>(all),
        _mm512_extractf32x4_ps::<3>(all),
    ];
    for (r, &part) in parts.iter().enumerate() {
        // SAFETY: the four results of row `r`: a stride beyond `Q` means that `Q` is 4.
        unsafe { _mm_storeu_ps(out.add(r * stride), part) };
    }
}

/// The sum of each of 16 registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sums_of(a: [__m512; WIDTH]) -> __m512 {
    let pair =
        |x: __m512, y: __m512| _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    let four = |x: __m512, y: __m512| {
        let (x, y) = (_mm512_castps_pd(x), _mm512_castps_pd(y));
        let (low, high) = (_mm512_unpacklo_pd(x, y), _mm512_unpackhi_pd(x, y));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    };
    let lanes = |x: __m512, y: __m512| {
        let (even, odd) = (
            _mm512_shuffle_f32x4::<0b10_00_10_00>(x, y),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(x, y),
        );
        _mm512_add_ps(even, odd)
    };
    let quarter = |i: usize| four(pair(a[i], a[i + 1]), pair(a[i + 2], a[i + 3]));
    lanes(
        lanes(quarter(0), quarter(4)),
        lanes(quarter(8), quarter(12)),
    )
}

/// # Safety
/// Needs AVX-512 (f, bw, vl). `weights` `[n, group]`, `rows` `[n, m]`, `out` `[group, m]`, `group` a power of two
/// up to 8.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
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
                // SAFETY: so many registers of columns from here on, the last under its mask, and so
                // many queries, lie within their slices.
                column += unsafe {
                    match (group, (m - column) / WIDTH) {
                        (1, 8..) => place.add::<1, 8>(!0),
                        (1, 4..) => place.add::<1, 4>(!0),
                        (1, 2..) => place.add::<1, 2>(!0),
                        (1, 1) => place.add::<1, 1>(!0),
                        (1, 0) => place.add::<1, 1>(tail(m)),
                        (2, 8..) => place.add::<2, 8>(!0),
                        (2, 4..) => place.add::<2, 4>(!0),
                        (2, 2..) => place.add::<2, 2>(!0),
                        (2, 1) => place.add::<2, 1>(!0),
                        (2, 0) => place.add::<2, 1>(tail(m)),
                        (_, 4..) => place.add::<4, 4>(!0),
                        (_, 2..) => place.add::<4, 2>(!0),
                        (_, 1) => place.add::<4, 1>(!0),
                        (_, 0) => place.add::<4, 1>(tail(m)),
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
    /// Returns the number of columns, those beyond the mask too.
    ///
    /// # Safety
    /// `Q` queries and `C` registers of columns, all under `mask`, lie behind the pointers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn add<const Q: usize, const C: usize>(&self, mask: __mmask16) -> usize {
        let mut sums = [[_mm512_setzero_ps(); C]; Q];
        let (mut numbers, mut weights) = (self.rows, self.weights);
        for _ in 0..self.n {
            prefetch_lines(numbers, C * WIDTH * size_of::<N>(), STRETCH);
            let mut row = [_mm512_setzero_ps(); C];
            for (c, row) in row.iter_mut().enumerate() {
                // SAFETY: the columns of the row.
                *row = unsafe {
                    if C > 1 {
                        N::load(numbers.add(c * WIDTH))
                    } else {
                        N::load_some(mask, numbers)
                    }
                };
            }
            for (q, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the weight of the row and query `q`.
                let weight = unsafe { _mm512_set1_ps(*weights.add(q)) };
                for (sum, &row) in sums.iter_mut().zip(&row) {
                    *sum = _mm512_fmadd_ps(weight, row, *sum);
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
                    let before = _mm512_maskz_loadu_ps(mask, at);
                    _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(before, sum));
                }
            }
        }
        C * WIDTH
    }
}
