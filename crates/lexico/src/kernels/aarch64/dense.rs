//! The registers of NEON, and the dense kernels compiled for them.

use core::arch::aarch64::*;

use half::f16;

use crate::kernels::dense::Rows;
use crate::kernels::dense::kernels::{self, Register};

impl Register for float32x4_t {
    const WIDTH: usize = 4;
    const MANY: bool = true;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the caller's.
        unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { vst1q_f32(to, self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's.
        unsafe { vaddq_f32(self, other) }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's.
        unsafe { vfmaq_f32(self, a, b) }
    }

    #[inline(always)]
    unsafe fn sums_of<const N: usize>(registers: [Self; N]) -> [f32; N] {
        // SAFETY: the caller's.
        unsafe { sums_of_fours(&registers) }
    }
}

/// Of its own, not in the trait: closures would not be compiled for the instructions there.
#[inline]
#[target_feature(enable = "neon")]
fn sums_of_fours<const N: usize>(a: &[float32x4_t; N]) -> [f32; N] {
    let a = |i| if i < N { a[i] } else { vdupq_n_f32(0.0) };
    let pair = |i| vpaddq_f32(a(i), a(i + 1));
    let mut sums = [0f32; 16];
    for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let four = vpaddq_f32(pair(4 * i), pair(4 * i + 2));
        // SAFETY: four numbers.
        unsafe { vst1q_f32(sums.as_mut_ptr(), four) };
    }
    core::array::from_fn(|i| sums[i])
}

kernels::compiled!(float32x4_t, "neon");
