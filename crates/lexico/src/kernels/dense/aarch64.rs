//! The registers of NEON, and the dense kernels compiled for them.

use core::arch::aarch64::*;

use half::f16;

use super::Rows;
use super::generic::{self, Register, by_intrinsics};

impl Register for float32x4_t {
    const WIDTH: usize = 4;
    const MANY: bool = true;

    by_intrinsics! {
        splat(x: f32) -> Self = vdupq_n_f32(x);
        load(from: *const f32) -> Self = vld1q_f32(from);
        load_f16(from: *const f16) -> Self = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.cast())));
        store(self: Self, to: *mut f32) = vst1q_f32(to, self);
        add(self: Self, other: Self) -> Self = vaddq_f32(self, other);
        add_product(self: Self, a: Self, b: Self) -> Self = vfmaq_f32(self, a, b);
    }

    #[inline(always)]
    unsafe fn sums_of<const N: usize>(registers: [Self; N]) -> [f32; N] {
        // SAFETY: the caller's.
        unsafe { sums_of_fours(&registers) }
    }
}

/// The sum over each register's places; not in the trait, where closures would not be compiled for the instructions.
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

/// NEON.
pub(super) mod neon {
    use super::*;
    generic::compile_for!(float32x4_t, "neon");
}

pub(super) use neon as dot_product;
