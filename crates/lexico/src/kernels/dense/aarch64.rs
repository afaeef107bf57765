//! The registers of NEON, and the dense kernels compiled for them.

use core::arch::aarch64::*;

use half::f16;

use super::generic::{self, AT_ONCE, Register, by_intrinsics};
use super::{MAX_GROUP, Rows};

impl Register for float32x4_t {
    const WIDTH: usize = 4;
    const MANY: bool = true;

    by_intrinsics! {
        splat(x: f32) -> Self = vdupq_n_f32(x);
        load(from: *const f32) -> Self = vld1q_f32(from);
        load_i8(from: *const i8) -> Self = widen(from.cast::<[i8; 4]>().read());
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

/// Four bytes as numbers.
#[inline]
#[target_feature(enable = "neon")]
fn widen(numbers: [i8; 4]) -> float32x4_t {
    let [a, b, c, d] = numbers;
    let bytes = i64::from_le_bytes([a as u8, b as u8, c as u8, d as u8, 0, 0, 0, 0]);
    let words = vmovl_s8(vreinterpret_s8_s64(vdup_n_s64(bytes)));
    vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))
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
