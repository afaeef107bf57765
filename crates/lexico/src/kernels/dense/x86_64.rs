//! The registers of AVX2 and AVX-512, and the dense kernels compiled for them.

use core::arch::x86_64::*;

use half::f16;

use super::generic::{self, AT_ONCE, Register, by_intrinsics};
use super::{MAX_GROUP, Rows};

impl Register for __m256 {
    const WIDTH: usize = 8;
    const MANY: bool = false;

    by_intrinsics! {
        splat(x: f32) -> Self = _mm256_set1_ps(x);
        load(from: *const f32) -> Self = _mm256_loadu_ps(from);
        load_f16(from: *const f16) -> Self = _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
        load_i8(from: *const i8) -> Self = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from.cast())));
        store(self: Self, to: *mut f32) = _mm256_storeu_ps(to, self);
        add(self: Self, other: Self) -> Self = _mm256_add_ps(self, other);
        add_product(self: Self, a: Self, b: Self) -> Self = _mm256_fmadd_ps(a, b, self);
    }

    #[inline(always)]
    unsafe fn sums_of<const N: usize>(registers: [Self; N]) -> [f32; N] {
        // SAFETY: the caller's.
        unsafe { sums_of_eights(&registers) }
    }
}

impl Register for __m512 {
    const WIDTH: usize = 16;
    const MANY: bool = true;

    by_intrinsics! {
        splat(x: f32) -> Self = _mm512_set1_ps(x);
        load(from: *const f32) -> Self = _mm512_loadu_ps(from);
        load_f16(from: *const f16) -> Self = _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
        load_i8(from: *const i8) -> Self = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())));
        store(self: Self, to: *mut f32) = _mm512_storeu_ps(to, self);
        add(self: Self, other: Self) -> Self = _mm512_add_ps(self, other);
        add_product(self: Self, a: Self, b: Self) -> Self = _mm512_fmadd_ps(a, b, self);
    }

    #[inline(always)]
    unsafe fn sums_of<const N: usize>(registers: [Self; N]) -> [f32; N] {
        // SAFETY: the caller's.
        unsafe { sums_of_sixteens(&registers) }
    }
}

/// The sum over each register's places; not in the trait, where closures would not be compiled for the instructions.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums_of_eights<const N: usize>(a: &[__m256; N]) -> [f32; N] {
    let a = |i| if i < N { a[i] } else { _mm256_setzero_ps() };
    let pair = |x, y| _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
    let four = |x, y| {
        let (x, y) = (_mm256_castps_pd(x), _mm256_castps_pd(y));
        let (low, high) = (_mm256_unpacklo_pd(x, y), _mm256_unpackhi_pd(x, y));
        _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
    };
    let halves = |x, y| {
        _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(x, y),
            _mm256_permute2f128_ps::<0x31>(x, y),
        )
    };
    let quarter = |i: usize| four(pair(a(i), a(i + 1)), pair(a(i + 2), a(i + 3)));
    let mut sums = [0f32; 8];
    // SAFETY: eight numbers.
    unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), halves(quarter(0), quarter(4))) };
    core::array::from_fn(|i| sums[i])
}

/// The sum over each register's places.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sums_of_sixteens<const N: usize>(a: &[__m512; N]) -> [f32; N] {
    let a = |i| if i < N { a[i] } else { _mm512_setzero_ps() };
    let pair = |x, y| _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    let four = |x, y| {
        let (x, y) = (_mm512_castps_pd(x), _mm512_castps_pd(y));
        let (low, high) = (_mm512_unpacklo_pd(x, y), _mm512_unpackhi_pd(x, y));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    };
    let lanes = |x, y| {
        _mm512_add_ps(
            _mm512_shuffle_f32x4::<0b10_00_10_00>(x, y),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(x, y),
        )
    };
    let quarter = |i: usize| four(pair(a(i), a(i + 1)), pair(a(i + 2), a(i + 3)));
    let low = lanes(quarter(0), quarter(4));
    let high = lanes(quarter(8), quarter(12));
    let mut sums = [0f32; 16];
    // SAFETY: sixteen numbers.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), lanes(low, high)) };
    core::array::from_fn(|i| sums[i])
}

/// AVX2.
pub(super) mod avx2 {
    use super::*;
    generic::compile_for!(__m256, "avx2,fma,f16c");
}

pub(super) use avx2 as avx_vnni;

/// AVX-512.
pub(super) mod avx512 {
    use super::*;
    generic::compile_for!(
        __m512,
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
    );
}

pub(super) use avx512 as amx;
