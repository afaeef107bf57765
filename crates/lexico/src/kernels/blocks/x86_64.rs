//! Products by AVX2, AVX-VNNI and AVX-512 VNNI.

use core::arch::x86_64::*;
use std::ops::Range;

use super::product::{Lanes, low_bits, multiply_with};
use super::{BlockMatrix, Panel};

/// The bits of each byte from `from` on, moved by shifts of 16-bit lanes, which take constants only.
macro_rules! shifted {
    ($bytes:ident, $from:ident, $to:ident, $right:ident, $left:ident) => {
        match $from as i32 - $to as i32 {
            -4 => $left::<4>($bytes),
            -3 => $left::<3>($bytes),
            -2 => $left::<2>($bytes),
            -1 => $left::<1>($bytes),
            0 => $bytes,
            1 => $right::<1>($bytes),
            2 => $right::<2>($bytes),
            3 => $right::<3>($bytes),
            4 => $right::<4>($bytes),
            5 => $right::<5>($bytes),
            _ => $right::<6>($bytes),
        }
    };
}

/// Four numbers of a row of activations as one integer.
#[inline(always)]
unsafe fn four(x: *const i8) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// Sixteen lanes in one register.
struct Wide;

impl Lanes for Wide {
    const LANES: usize = 16;
    const SIGNED: Option<u32> = Some(7);
    type Bytes = __m512i;
    type Ints = __m512i;
    type Floats = __m512;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn bits(bytes: __m512i, from: u32, to: u32, count: u32) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let moved = shifted!(bytes, from, to, _mm512_srli_epi16, _mm512_slli_epi16);
            _mm512_and_si512(moved, _mm512_set1_epi8((low_bits(count) << to) as i8))
        }
    }

    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn dot(sums: __m512i, a: __m512i, x: *const i8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sums, a, _mm512_set1_epi32(four(x))) }
    }

    #[inline(always)]
    unsafe fn dot_signed(sums: __m512i, a: __m512i, x: *const i8) -> __m512i {
        // SAFETY: as above. The instruction's first factor has no sign.
        unsafe { Self::dot(sums, _mm512_xor_si512(a, _mm512_set1_epi8(i8::MIN)), x) }
    }

    #[inline(always)]
    unsafe fn shifted(number: *const i32, by: u32) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let number = _mm512_set1_epi32(number.read());
            match by {
                2 => _mm512_slli_epi32::<2>(number),
                3 => _mm512_slli_epi32::<3>(number),
                4 => _mm512_slli_epi32::<4>(number),
                5 => _mm512_slli_epi32::<5>(number),
                _ => _mm512_slli_epi32::<7>(number),
            }
        }
    }

    #[inline(always)]
    unsafe fn zeros() -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn to_floats(ints: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(ints) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn signed(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn splat(number: *const f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(number.read()) }
    }

    #[inline(always)]
    unsafe fn no_floats() -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn multiply(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn store(floats: __m512, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, floats) }
    }
}

/// Eight lanes in one register; `VNNI` says whether AVX-VNNI is there.
struct Half<const VNNI: bool>;

impl<const VNNI: bool> Lanes for Half<VNNI> {
    const LANES: usize = 8;
    const SIGNED: Option<u32> = None;
    type Bytes = __m256i;
    type Ints = __m256i;
    type Floats = __m256;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn bits(bytes: __m256i, from: u32, to: u32, count: u32) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let moved = shifted!(bytes, from, to, _mm256_srli_epi16, _mm256_slli_epi16);
            _mm256_and_si256(moved, _mm256_set1_epi8((low_bits(count) << to) as i8))
        }
    }

    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    unsafe fn dot(sums: __m256i, a: __m256i, x: *const i8) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let x = _mm256_set1_epi32(four(x));
            if VNNI {
                return _mm256_dpbusd_avx_epi32(sums, a, x);
            }
            // Pairs of products are below 2^15: 63 · 127 or 128 · 127 twice.
            let pairs = _mm256_maddubs_epi16(a, x);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn dot_signed(sums: __m256i, a: __m256i, x: *const i8) -> __m256i {
        // SAFETY: as above. The instruction's first factor has no sign: the second takes it.
        unsafe {
            let x = _mm256_sign_epi8(_mm256_set1_epi32(four(x)), a);
            let a = _mm256_abs_epi8(a);
            if VNNI {
                return _mm256_dpbusd_avx_epi32(sums, a, x);
            }
            let pairs = _mm256_maddubs_epi16(a, x);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn shifted(number: *const i32, by: u32) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi32(number.read() << by) }
    }

    #[inline(always)]
    unsafe fn zeros() -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn to_floats(ints: __m256i) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi32_ps(ints) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn signed(from: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn splat(number: *const f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_set1_ps(number.read()) }
    }

    #[inline(always)]
    unsafe fn no_floats() -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn multiply(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn store(floats: __m256, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to, floats) }
    }
}

level!(avx2, Half<false>, "avx2,fma,f16c");
level!(avx_vnni, Half<true>, "avx2,fma,f16c,avxvnni");
level!(
    avx512,
    Wide,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
);
