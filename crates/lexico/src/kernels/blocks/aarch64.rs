//! Products by NEON, with and without its products of 8-bit integers.

use core::arch::aarch64::*;
use core::arch::asm;
use std::ops::Range;

use super::product::{Lanes, low_bits, multiply_with};
use super::{BlockMatrix, Panel};

/// Four lanes in one register; `DOT` says whether there are products of 8-bit integers.
struct Quarter<const DOT: bool>;

impl<const DOT: bool> Lanes for Quarter<DOT> {
    const LANES: usize = 4;
    const SIGNED: Option<u32> = None;
    type Bytes = uint8x16_t;
    /// Sums of a lane's first and last two products, of the first two lanes and of the others; by `DOT`, the lanes' own
    /// sums, and zeros.
    type Ints = [int32x4_t; 2];
    type Floats = float32x4_t;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> uint8x16_t {
        // SAFETY: the caller's promise, here and below.
        unsafe { vld1q_u8(from) }
    }

    #[inline(always)]
    unsafe fn bits(bytes: uint8x16_t, from: u32, to: u32, count: u32) -> uint8x16_t {
        // SAFETY: as above.
        unsafe {
            // A negative shift is one to the right.
            let moved = vshlq_u8(bytes, vdupq_n_s8(to as i8 - from as i8));
            vandq_u8(moved, vdupq_n_u8(low_bits(count) << to))
        }
    }

    #[inline(always)]
    unsafe fn or(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
        // SAFETY: as above.
        unsafe { vorrq_u8(a, b) }
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, a: uint8x16_t, x: *const i8) -> Self::Ints {
        // SAFETY: as above. Bytes below 64 have no sign.
        unsafe { Self::dot_signed(sums, a, x) }
    }

    #[inline(always)]
    unsafe fn dot_signed(sums: Self::Ints, a: uint8x16_t, x: *const i8) -> Self::Ints {
        // SAFETY: as above.
        unsafe {
            let a = vreinterpretq_s8_u8(a);
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()));
            let [mut first, mut second] = sums;
            if DOT {
                // The intrinsic is not stable.
                asm!(
                    "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                    inout(vreg) first,
                    in(vreg) a,
                    in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags),
                );
            } else {
                first = vpadalq_s16(first, vmull_s8(vget_low_s8(a), vget_low_s8(x)));
                second = vpadalq_s16(second, vmull_high_s8(a, x));
            }
            [first, second]
        }
    }

    #[inline(always)]
    unsafe fn shifted(number: *const i32, by: u32) -> Self::Ints {
        // SAFETY: as above.
        unsafe {
            let number = number.read() << by;
            let zeros = vdupq_n_s32(0);
            if DOT {
                return [vdupq_n_s32(number), zeros];
            }
            // Once in each lane's pair of sums.
            let pairs = vreinterpretq_s32_s64(vdupq_n_s64(i64::from(number as u32)));
            [pairs, pairs]
        }
    }

    #[inline(always)]
    unsafe fn zeros() -> Self::Ints {
        // SAFETY: as above.
        unsafe { [vdupq_n_s32(0); 2] }
    }

    #[inline(always)]
    unsafe fn to_floats([first, second]: Self::Ints) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            vcvtq_f32_s32(match DOT {
                true => first,
                false => vpaddq_s32(first, second),
            })
        }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> float32x4_t {
        // SAFETY: as above. The intrinsic is not stable.
        unsafe {
            let halves = vld1_u8(from);
            let floats: float32x4_t;
            asm!(
                "fcvtl {0:v}.4s, {1:v}.4h",
                out(vreg) floats,
                in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags),
            );
            floats
        }
    }

    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            let bytes = vcreate_u8(u64::from(from.cast::<u32>().read_unaligned()));
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
        }
    }

    #[inline(always)]
    unsafe fn signed(from: *const u8) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            let bytes = vcreate_s8(u64::from(from.cast::<u32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
        }
    }

    #[inline(always)]
    unsafe fn splat(number: *const f32) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vdupq_n_f32(number.read()) }
    }

    #[inline(always)]
    unsafe fn no_floats() -> float32x4_t {
        // SAFETY: as above.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn multiply(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    unsafe fn store(floats: float32x4_t, to: *mut f32) {
        // SAFETY: as above.
        unsafe { vst1q_f32(to, floats) }
    }
}

level!(neon, Quarter<false>, "neon");
level!(dot_product, Quarter<true>, "neon,dotprod");
