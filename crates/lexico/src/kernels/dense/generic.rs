//! The kernels, written once for vector registers of any width.

use half::f16;

use super::{MAX_GROUP, WIDEST};
use crate::kernels::memory::prefetch_lines;
use crate::kernels::rows::Number;

/// A register of f32 numbers.
///
/// # Safety
/// All functions need the register's instructions; they are inlined into functions compiled for them.
pub(super) trait Register: Copy {
    /// Numbers that it holds.
    const WIDTH: usize;
    /// True where a processor has 32 of them, not 16.
    const MANY: bool;

    /// One number in all places.
    unsafe fn splat(x: f32) -> Self;
    /// The numbers that lie at `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// The numbers that lie at `from`.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// The numbers that lie at `from`.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Writes the numbers to `to`.
    unsafe fn store(self, to: *mut f32);
    /// The sum, place by place.
    unsafe fn add(self, other: Self) -> Self;
    /// `self + a · b`, place by place.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// The sum over each register's places, of up to 16 registers where there are many, else up to 8.
    unsafe fn sums_of<const N: usize>(registers: [Self; N]) -> [f32; N];
}

/// Functions of a [`Register`] that are an expression of intrinsics each.
macro_rules! by_intrinsics {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? = $intrinsics:expr;)*) => {
        $(#[inline(always)]
        unsafe fn $name($($argument: $type),*) $(-> $result)? {
            // SAFETY: the caller's.
            unsafe { $intrinsics }
        })*
    };
}
pub(super) use by_intrinsics;

/// Numbers that registers are loaded from.
pub(super) trait Loaded: Number {
    /// # Safety
    /// As for [`Register`]; as many numbers as it has places must lie at `from`.
    unsafe fn load<R: Register>(from: *const Self) -> R;
}

impl Loaded for f32 {
    #[inline(always)]
    unsafe fn load<R: Register>(from: *const Self) -> R {
        // SAFETY: the caller's.
        unsafe { R::load(from) }
    }
}

impl Loaded for i8 {
    #[inline(always)]
    unsafe fn load<R: Register>(from: *const Self) -> R {
        // SAFETY: the caller's.
        unsafe { R::load_i8(from) }
    }
}

impl Loaded for f16 {
    #[inline(always)]
    unsafe fn load<R: Register>(from: *const Self) -> R {
        // SAFETY: the caller's.
        unsafe { R::load_f16(from) }
    }
}

/// Bytes between rows that are multiplied and those that are fetched for later: enough for memory to answer.
const AHEAD: usize = 16 * 1024;

/// # Safety
/// As for [`Register`]. `rows` `[n, m]`, `queries` `[group, m]`, `out` `[n, group]`, the query group
/// a power of two up to 8; `m` at least a register's places.
#[inline(always)]
pub(super) unsafe fn dots<R: Register, N: Loaded>(
    rows: &[N],
    queries: &[f32],
    m: usize,
    out: &mut [f32],
) {
    let group = queries.len() / m;
    // What does not fill a register is multiplied in one that ends with it.
    let rest = m % R::WIDTH;
    let mut ends = None;
    if rest > 0 {
        let mut all = [[0f32; WIDEST]; MAX_GROUP];
        for (end, query) in all.iter_mut().zip(queries.chunks_exact(m)) {
            end[R::WIDTH - rest..R::WIDTH].copy_from_slice(&query[m - rest..]);
        }
        ends = Some(all);
    }
    let mut products = Products {
        rows: rows.as_ptr(),
        n: rows.len() / m,
        queries: queries.as_ptr(),
        ends: ends.as_ref().map(|ends| ends.as_ptr()),
        m,
        out: out.as_mut_ptr(),
        group,
    };
    // SAFETY: so many rows, queries and results lie within their slices.
    unsafe {
        // So many sums at a time, whatever the query group.
        match (group, R::MANY) {
            (1, true) => products.write::<R, 16, 1, 16>(),
            (1, false) => products.write::<R, 8, 1, 8>(),
            (2, true) => products.write::<R, 8, 2, 16>(),
            (2, false) => products.write::<R, 4, 2, 8>(),
            (_, true) => products.write::<R, 4, 4, 16>(),
            (_, false) => products.write::<R, 2, 4, 8>(),
        }
        // The rows that are left.
        match group {
            1 => {
                products.write::<R, 4, 1, 4>();
                products.write::<R, 1, 1, 1>();
            }
            2 => products.write::<R, 1, 2, 2>(),
            _ => products.write::<R, 1, 4, 4>(),
        }
    }
}

/// Rows, queries, and where their products go.
struct Products<N> {
    rows: *const N,
    n: usize,
    queries: *const f32,
    /// The last register of each query, zeros where the one before it has been.
    ends: Option<*const [f32; WIDEST]>,
    m: usize,
    out: *mut f32,
    group: usize,
}

impl<N: Loaded> Products<N> {
    /// Writes the products of `ROWS` rows at a time, for `Q` queries at a time, as long as there are so many
    /// rows; those are no longer among its own then. `ALL` is `ROWS · Q`.
    ///
    /// # Safety
    /// As for [`Register`]; the rows, the queries and their results lie behind the pointers.
    #[inline(always)]
    unsafe fn write<R: Register, const ROWS: usize, const Q: usize, const ALL: usize>(&mut self) {
        while self.n >= ROWS {
            prefetch_lines(self.rows, ROWS * self.m * size_of::<N>(), AHEAD);
            for first in (0..self.group).step_by(Q) {
                // SAFETY: the caller's.
                unsafe { self.write_block::<R, ROWS, Q, ALL>(first) };
            }
            self.rows = self.rows.wrapping_add(ROWS * self.m);
            self.out = self.out.wrapping_add(ROWS * self.group);
            self.n -= ROWS;
        }
    }

    /// # Safety
    /// As for [`Register`]; `ROWS` rows, `Q` queries from `first` on and their `ALL` results lie behind the
    /// pointers.
    #[inline(always)]
    unsafe fn write_block<R: Register, const ROWS: usize, const Q: usize, const ALL: usize>(
        &self,
        first: usize,
    ) {
        let (m, queries) = (self.m, self.queries.wrapping_add(first * self.m));
        // SAFETY: the caller's; registers of rows and queries from `k` on, and those that end with them,
        // lie within them.
        unsafe {
            let mut sums = [[R::splat(0.0); Q]; ROWS];
            let mut k = 0;
            while k + R::WIDTH <= m {
                let mut x = [R::splat(0.0); Q];
                for (q, x) in x.iter_mut().enumerate() {
                    *x = R::load(queries.add(q * m + k));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let row: R = N::load(self.rows.add(r * m + k));
                    for (sum, &x) in sums.iter_mut().zip(&x) {
                        *sum = sum.add_product(row, x);
                    }
                }
                k += R::WIDTH;
            }
            if let Some(ends) = self.ends {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let row: R = N::load(self.rows.add((r + 1) * m - R::WIDTH));
                    for (q, sum) in sums.iter_mut().enumerate() {
                        *sum = sum.add_product(row, R::load(ends.add(first + q).cast()));
                    }
                }
            }
            let flat: [R; ALL] = core::array::from_fn(|i| sums[i / Q][i % Q]);
            let all = R::sums_of(flat);
            for (r, all) in all.as_chunks::<Q>().0.iter().enumerate() {
                let out = self.out.add(r * self.group + first);
                out.cast::<[f32; Q]>().write(*all);
            }
        }
    }
}

/// Bytes of rows that are gone over column by column before the next: what was fetched stays in the first
/// cache for all columns and queries.
const STRETCH: usize = 8 * 1024;

/// # Safety
/// As for [`Register`]. `weights` `[n, group]`, `rows` `[n, m]`, `out` `[group, m]`, the query group
/// a power of two up to 8; `m` at least a register's places.
#[inline(always)]
pub(super) unsafe fn combine<R: Register, N: Loaded>(
    weights: &[f32],
    rows: &[N],
    m: usize,
    out: &mut [f32],
) {
    let group = out.len() / m;
    let at_once = (STRETCH / (m * size_of::<N>())).max(1);
    let rest = m % R::WIDTH;
    let stretches = rows.chunks(at_once * m);
    for (weights, rows) in weights.chunks(at_once * group).zip(stretches) {
        for first in (0..group).step_by(4) {
            let columns = |column: usize, out: *mut f32, out_stride: usize| Columns {
                weights: weights[first..].as_ptr(),
                rows: rows[column..].as_ptr(),
                out,
                out_stride,
                n: rows.len() / m,
                m,
                group,
            };
            let out = &mut out[first * m..];
            let mut column = 0;
            while column < m - rest {
                let columns = columns(column, out[column..].as_mut_ptr(), m);
                // SAFETY: so many registers of columns from here on, and so many queries, lie within
                // their slices.
                column += unsafe {
                    match (group, (m - column) / R::WIDTH) {
                        (1, 8..) => columns.add::<R, 1, 8>(),
                        (1, 4..) => columns.add::<R, 1, 4>(),
                        (1, _) => columns.add::<R, 1, 1>(),
                        (2, 8..) if R::MANY => columns.add::<R, 2, 8>(),
                        (2, 4..) => columns.add::<R, 2, 4>(),
                        (2, _) => columns.add::<R, 2, 1>(),
                        (_, 4..) if R::MANY => columns.add::<R, 4, 4>(),
                        (_, 2..) => columns.add::<R, 4, 2>(),
                        (_, _) => columns.add::<R, 4, 1>(),
                    }
                };
            }
            if rest > 0 {
                // What does not fill a register is summed in one that ends with it.
                let mut ends = [[0f32; WIDEST]; 4];
                let columns = columns(m - R::WIDTH, ends.as_mut_ptr().cast(), WIDEST);
                // SAFETY: as above; and so many queries have room in `ends`.
                unsafe {
                    match group {
                        1 => columns.add::<R, 1, 1>(),
                        2 => columns.add::<R, 2, 1>(),
                        _ => columns.add::<R, 4, 1>(),
                    };
                }
                for (out, end) in out.chunks_exact_mut(m).zip(ends).take(group) {
                    let sums = &end[R::WIDTH - rest..R::WIDTH];
                    for (out, sum) in out[m - rest..].iter_mut().zip(sums) {
                        *out += sum;
                    }
                }
            }
        }
    }
}

/// Some columns of rows, and where their weighted sums go.
struct Columns<N> {
    weights: *const f32,
    rows: *const N,
    out: *mut f32,
    /// Numbers from a query's sums to the next one's.
    out_stride: usize,
    n: usize,
    m: usize,
    group: usize,
}

impl<N: Loaded> Columns<N> {
    /// Adds to the sums; returns the number of columns.
    ///
    /// # Safety
    /// As for [`Register`]; `Q` queries and `C` registers of columns lie behind the pointers.
    #[inline(always)]
    unsafe fn add<R: Register, const Q: usize, const C: usize>(&self) -> usize {
        // SAFETY: the columns of each row, its weight for each query, and the columns of each query.
        unsafe {
            let mut sums = [[R::splat(0.0); C]; Q];
            let (mut numbers, mut weights) = (self.rows, self.weights);
            for _ in 0..self.n {
                prefetch_lines(numbers, C * R::WIDTH * size_of::<N>(), STRETCH);
                let mut row = [R::splat(0.0); C];
                for (c, row) in row.iter_mut().enumerate() {
                    *row = N::load(numbers.add(c * R::WIDTH));
                }
                for (q, sums) in sums.iter_mut().enumerate() {
                    let weight = R::splat(*weights.add(q));
                    for (sum, &row) in sums.iter_mut().zip(&row) {
                        *sum = sum.add_product(weight, row);
                    }
                }
                numbers = numbers.wrapping_add(self.m);
                weights = weights.wrapping_add(self.group);
            }
            for (q, sums) in sums.iter().enumerate() {
                for (c, &sum) in sums.iter().enumerate() {
                    let at = self.out.add(q * self.out_stride + c * R::WIDTH);
                    R::load(at).add(sum).store(at);
                }
            }
        }
        C * R::WIDTH
    }
}

/// `⟨a, b⟩`.
///
/// # Safety
/// As for [`Register`].
#[inline(always)]
pub(super) unsafe fn dot<R: Register, N: Loaded>(a: &[N], b: &[f32]) -> f32 {
    /// Registers that the loop carries, so that sums do not wait for each other.
    const AT_ONCE: usize = 4;
    let n = a.len().min(b.len());
    // SAFETY: numbers from `k` on of either, as many as are left.
    unsafe {
        let mut sums = [R::splat(0.0); AT_ONCE];
        let mut k = 0;
        while k + AT_ONCE * R::WIDTH <= n {
            for (i, sum) in sums.iter_mut().enumerate() {
                let at = k + i * R::WIDTH;
                let (a, b) = (N::load(a.as_ptr().add(at)), R::load(b.as_ptr().add(at)));
                *sum = sum.add_product(a, b);
            }
            k += AT_ONCE * R::WIDTH;
        }
        while k + R::WIDTH <= n {
            let (a, b) = (N::load(a.as_ptr().add(k)), R::load(b.as_ptr().add(k)));
            sums[0] = sums[0].add_product(a, b);
            k += R::WIDTH;
        }
        let [sum] = R::sums_of([sums[0].add(sums[1]).add(sums[2].add(sums[3]))]);
        let rest: f32 = a[k..n]
            .iter()
            .zip(&b[k..n])
            .map(|(&a, b)| a.widen() * b)
            .sum();
        sum + rest
    }
}

/// Rows whose weights are multiplied by their units at a time.
pub(super) const AT_ONCE: usize = 64;

/// The kernels for a kind of register, compiled for its instructions.
macro_rules! compile_for {
    ($register:ty, $features:literal) => {
        /// # Safety
        /// As [`generic::dots`].
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn dots(rows: Rows<'_>, queries: &[f32], m: usize, out: &mut [f32]) {
            // SAFETY: the caller's, and the register's instructions are there.
            unsafe {
                match rows {
                    Rows::F32(rows) => generic::dots::<$register, _>(rows, queries, m, out),
                    Rows::F16(rows) => generic::dots::<$register, _>(rows, queries, m, out),
                    Rows::I8 { numbers, units } => {
                        generic::dots::<$register, _>(numbers, queries, m, out);
                        let group = queries.len() / m;
                        for (out, unit) in out.chunks_exact_mut(group).zip(units) {
                            out.iter_mut().for_each(|out| *out *= unit);
                        }
                    }
                }
            }
        }

        /// # Safety
        /// As [`generic::combine`].
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn combine(weights: &[f32], rows: Rows<'_>, m: usize, out: &mut [f32]) {
            // SAFETY: the caller's, and the register's instructions are there.
            unsafe {
                match rows {
                    Rows::F32(rows) => generic::combine::<$register, _>(weights, rows, m, out),
                    Rows::F16(rows) => generic::combine::<$register, _>(weights, rows, m, out),
                    Rows::I8 { numbers, units } => {
                        let group = out.len() / m;
                        let mut scaled = [0f32; AT_ONCE * MAX_GROUP];
                        let rows = numbers.chunks(AT_ONCE * m).zip(units.chunks(AT_ONCE));
                        for ((rows, units), weights) in rows.zip(weights.chunks(AT_ONCE * group)) {
                            let pairs = weights.chunks_exact(group).zip(units);
                            let own = scaled.chunks_exact_mut(group);
                            for (scaled, (weights, unit)) in own.zip(pairs) {
                                scaled
                                    .iter_mut()
                                    .zip(weights)
                                    .for_each(|(s, w)| *s = w * unit);
                            }
                            let scaled = &scaled[..weights.len()];
                            generic::combine::<$register, _>(scaled, rows, m, out);
                        }
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn dot_f16(a: &[f16], b: &[f32]) -> f32 {
            // SAFETY: the register's instructions are there.
            unsafe { generic::dot::<$register, f16>(a, b) }
        }
    };
}
pub(super) use compile_for;
