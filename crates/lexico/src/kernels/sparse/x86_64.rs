//! Scores and weighted sums on AVX-512, for query groups of four and coefficients of a byte: what is unpacked
//! stays in registers, four nonzeros side by side.

use core::arch::x86_64::*;

use super::{Coefficient, Lengths, Nonzeros, power_of_two};
use crate::kernels::memory::{in_general_register, prefetch};
use crate::kernels::table::AHEAD;

/// The table's rows are of four f32.
const ROW_SHIFT: u32 = 4;

/// True where there is a kernel for codes of this kind.
pub(super) fn takes<C>(block: &Nonzeros<'_, C>, group: usize) -> bool {
    let usual = matches!(block.lengths, Lengths::Fixed { length: 1..=32, .. });
    group == 4 && usual && size_of::<C>() == 1
}

/// A vector's `S` nonzeros, and its scale.
type Vector<'a, C, const S: usize> = ((&'a [u16; S], &'a [C; S]), f32);

fn vectors<C, const S: usize>(block: Nonzeros<'_, C>) -> impl Iterator<Item = Vector<'_, C, S>> {
    let codes = block.indices.as_chunks().0.iter();
    let codes = codes.zip(block.coefficients.as_chunks().0);
    codes.zip(block.scales.unwrap_or(&[]).iter().map(|&e| power_of_two(e)))
}

/// The coefficients of up to 16 nonzeros from `first` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn unpack<C: Coefficient, const S: usize>(coefficients: &[C; S], first: usize) -> __m512 {
    let mask = ((1u32 << (S - first).min(16)) - 1) as __mmask16;
    // SAFETY: the mask ends with the coefficients.
    let bytes = unsafe { _mm_maskz_loadu_epi8(mask, coefficients.as_ptr().add(first).cast()) };
    if C::F8 {
        floats(bytes)
    } else {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    }
}

/// Numbers of FP8 E4M3.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn floats(bytes: __m128i) -> __m512 {
    let bytes = _mm512_cvtepu8_epi32(bytes);
    let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(bytes, _mm512_set1_epi32(0x80)));
    let rest = _mm512_slli_epi32::<20>(_mm512_and_si512(bytes, _mm512_set1_epi32(0x7f)));
    let number = _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
    // FP8's exponent has a bias of 7, f32's of 127; its subnormal numbers are f32's in the same way.
    _mm512_mul_ps(number, _mm512_set1_ps(2f32.powi(120)))
}

/// The coefficient of 16 that each place of a register takes for the nonzeros from `first` on, each four times.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn spread(first: usize) -> __m512i {
    let four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_add_epi32(four, _mm512_set1_epi32(first as i32))
}

/// Bytes from the beginning of a table to the rows of the nonzeros from `first` on, up to four of them, and
/// then to the first row.
#[inline(always)]
fn offsets<const S: usize>(indices: &[u16; S], first: usize) -> [usize; 4] {
    let mut all = match indices[first..].first_chunk::<4>() {
        // SAFETY: four indices take eight bytes.
        Some(four) => unsafe { four.as_ptr().cast::<u64>().read_unaligned() },
        None => {
            let rest = indices[first..].iter().rev();
            rest.fold(0, |all, &index| all << 16 | u64::from(index))
        }
    };
    all = in_general_register(all);
    let mask = (usize::from(u16::MAX)) << ROW_SHIFT;
    let all = all as usize;
    [
        (all << ROW_SHIFT) & mask,
        (all >> (16 - ROW_SHIFT)) & mask,
        (all >> (32 - ROW_SHIFT)) & mask,
        (all >> (48 - ROW_SHIFT)) & mask,
    ]
}

/// Calls the kernel that is unrolled for the sparsity of a block.
macro_rules! by_sparsity {
    ($block:ident, $kernel:ident($from:ident, $to:ident)) => {
        by_sparsity!($block, $kernel($from, $to),
            1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32)
    };
    ($block:ident, $kernel:ident($from:ident, $to:ident), $($sparsity:literal)*) => {
        match $block.lengths {
            // SAFETY: the caller's.
            $(Lengths::Fixed { length: $sparsity, .. } => unsafe {
                $kernel::<_, $sparsity>($block, $from, $to);
            },)*
            _ => unreachable!("callers ask whether there is a kernel"),
        }
    };
}

/// # Safety
/// Needs AVX-512. `p` holds `MAX_ATOMS` rows of four, `out` one for each vector; [`takes`] must say yes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn scores<C: Coefficient>(block: Nonzeros<'_, C>, p: &[f32], out: &mut [f32]) {
    by_sparsity!(block, scores_of(p, out));
}

/// # Safety
/// Like [`scores`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn scores_of<C: Coefficient, const S: usize>(
    block: Nonzeros<'_, C>,
    p: &[f32],
    out: &mut [f32],
) {
    let spreads = [spread(0), spread(4), spread(8), spread(12)];
    let p = p.as_ptr();
    let vectors = vectors::<C, S>(block).zip(out.as_chunks_mut::<4>().0);
    for (((indices, coefficients), scale), out) in vectors {
        prefetch(indices, AHEAD);
        prefetch(coefficients, AHEAD);
        let mut sum = _mm512_setzero_ps();
        for first in (0..S).step_by(16) {
            let sixteen = unpack(coefficients, first);
            for (part, &spread) in spreads.iter().enumerate() {
                let first = first + 4 * part;
                if first >= S {
                    break;
                }
                let rows = offsets(indices, first).map(|offset| p.wrapping_byte_add(offset));
                // SAFETY: offsets are of 16-bit indices, so that the rows lie within `p`.
                let rows = unsafe {
                    let low = _mm256_castps128_ps256(_mm_loadu_ps(rows[0]));
                    let low = _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(rows[1]));
                    let high = _mm256_castps128_ps256(_mm_loadu_ps(rows[2]));
                    let high = _mm256_insertf128_ps::<1>(high, _mm_loadu_ps(rows[3]));
                    _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
                };
                sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(spread, sixteen), rows, sum);
            }
        }
        let half = _mm256_add_ps(
            _mm512_castps512_ps256(sum),
            _mm512_extractf32x8_ps::<1>(sum),
        );
        let sum = _mm_add_ps(
            _mm256_castps256_ps128(half),
            _mm256_extractf128_ps::<1>(half),
        );
        // SAFETY: `out` has room for four.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm_mul_ps(sum, _mm_set1_ps(scale))) };
    }
}

/// # Safety
/// Needs AVX-512. `u` holds `MAX_ATOMS` rows of four, `weights` one for each vector; [`takes`] must say yes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn accumulate<C: Coefficient>(
    block: Nonzeros<'_, C>,
    weights: &[f32],
    u: &mut [f32],
) {
    by_sparsity!(block, accumulate_of(weights, u));
}

/// # Safety
/// Like [`accumulate`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn accumulate_of<C: Coefficient, const S: usize>(
    block: Nonzeros<'_, C>,
    weights: &[f32],
    u: &mut [f32],
) {
    let spreads = [spread(0), spread(4), spread(8), spread(12)];
    let u = u.as_mut_ptr();
    let vectors = vectors::<C, S>(block).zip(weights.as_chunks::<4>().0);
    for (((indices, coefficients), scale), weights) in vectors {
        prefetch(indices, AHEAD);
        prefetch(coefficients, AHEAD);
        // SAFETY: four weights.
        let weights = unsafe { _mm_loadu_ps(weights.as_ptr()) };
        let weights = _mm512_broadcast_f32x4(_mm_mul_ps(weights, _mm_set1_ps(scale)));
        for first in (0..S).step_by(16) {
            let sixteen = unpack(coefficients, first);
            for (part, &spread) in spreads.iter().enumerate() {
                let first = first + 4 * part;
                if first >= S {
                    break;
                }
                let terms = _mm512_mul_ps(_mm512_permutexvar_ps(spread, sixteen), weights);
                let terms = [
                    _mm512_castps512_ps128(terms),
                    _mm512_extractf32x4_ps::<1>(terms),
                    _mm512_extractf32x4_ps::<2>(terms),
                    _mm512_extractf32x4_ps::<3>(terms),
                ];
                // Not to the rows of those that are not there: additions to one row wait for each other.
                let rows = offsets(indices, first).into_iter().zip(terms);
                for (offset, term) in rows.take(S - first) {
                    let row = u.wrapping_byte_add(offset);
                    // SAFETY: offsets are of 16-bit indices, so that the rows lie within `u`.
                    unsafe { _mm_storeu_ps(row, _mm_add_ps(_mm_loadu_ps(row), term)) };
                }
            }
        }
    }
}
