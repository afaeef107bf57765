//! Kernels on half precision: its conversion is an instruction that no plain code compiles to.

use core::arch::x86_64::*;

use half::f16;

/// Registers that a loop carries, so that sums do not wait for each other.
const SUMS: usize = 4;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in super::super) fn dot_f16_avx512(a: &[f16], b: &[f32]) -> f32 {
    const WIDTH: usize = 16;
    let mut sums = [_mm512_setzero_ps(); SUMS];
    let (a_blocks, a_rest) = a.as_chunks::<{ SUMS * WIDTH }>();
    let (b_blocks, b_rest) = b.as_chunks::<{ SUMS * WIDTH }>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a block holds SUMS · WIDTH numbers of either kind; loads need no alignment.
            let (a, b) = unsafe {
                (
                    _mm256_loadu_si256(a.as_ptr().add(i * WIDTH).cast()),
                    _mm512_loadu_ps(b.as_ptr().add(i * WIDTH)),
                )
            };
            *sum = _mm512_fmadd_ps(_mm512_cvtph_ps(a), b, *sum);
        }
    }
    let sum = _mm512_add_ps(
        _mm512_add_ps(sums[0], sums[1]),
        _mm512_add_ps(sums[2], sums[3]),
    );
    _mm512_reduce_add_ps(sum) + rest(a_rest, b_rest)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn dot_f16_avx2(a: &[f16], b: &[f32]) -> f32 {
    const WIDTH: usize = 8;
    let mut sums = [_mm256_setzero_ps(); SUMS];
    let (a_blocks, a_rest) = a.as_chunks::<{ SUMS * WIDTH }>();
    let (b_blocks, b_rest) = b.as_chunks::<{ SUMS * WIDTH }>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a block holds SUMS · WIDTH numbers of either kind; loads need no alignment.
            let (a, b) = unsafe {
                (
                    _mm_loadu_si128(a.as_ptr().add(i * WIDTH).cast()),
                    _mm256_loadu_ps(b.as_ptr().add(i * WIDTH)),
                )
            };
            *sum = _mm256_fmadd_ps(_mm256_cvtph_ps(a), b, *sum);
        }
    }
    let sum = _mm256_add_ps(
        _mm256_add_ps(sums[0], sums[1]),
        _mm256_add_ps(sums[2], sums[3]),
    );
    let mut lanes = [0f32; WIDTH];
    // SAFETY: `lanes` holds WIDTH numbers; stores need no alignment.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
    lanes.iter().sum::<f32>() + rest(a_rest, b_rest)
}

fn rest(a: &[f16], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a.to_f32() * b).sum()
}
