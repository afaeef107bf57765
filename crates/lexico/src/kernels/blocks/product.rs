//! The product itself, once for all levels of instructions and all kinds of blocks.

#![allow(
    clippy::needless_range_loop,
    reason = "rows of several arrays and pointers go together"
)]

use std::ops::Range;

use super::types::{Kind, kind, with_kind};
use super::{BlockMatrix, BlockType, GROUP, LINE, Panel, STEP, STEPS, UNIT};
use crate::kernels::memory::prefetch_lines;

/// Bytes between the numbers that are read and those that are fetched for later: enough for memory to answer.
const AHEAD: usize = 4096;

/// A mask of the lowest bits of a byte.
#[inline(always)]
pub(super) const fn low_bits(count: u32) -> u8 {
    (0xff_u32 >> (8 - count)) as u8
}

/// Registers of a level of instructions: some of a group's sixteen lanes.
///
/// # Safety
/// Every function needs the level's instructions, and pointers to as much as its registers hold.
pub(super) trait Lanes {
    /// Lanes that a register holds.
    const LANES: usize;
    /// The power of two that [`Lanes::dot_signed`] takes numbers to be above; none where it takes them as they are.
    const SIGNED: Option<u32>;
    /// Four bytes a lane.
    type Bytes: Copy;
    /// A 32-bit integer a lane, or several to be added up.
    type Ints: Copy;
    /// A number a lane.
    type Floats: Copy;

    unsafe fn load(from: *const u8) -> Self::Bytes;
    /// `count` bits of each byte from bit `from` on, put at bit `to`.
    unsafe fn bits(bytes: Self::Bytes, from: u32, to: u32, count: u32) -> Self::Bytes;
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Adds the products of a lane's four bytes, each below 64, with four numbers.
    unsafe fn dot(sums: Self::Ints, a: Self::Bytes, x: *const i8) -> Self::Ints;
    /// Adds the products of a lane's four signed bytes with four numbers of magnitude 127 at the most.
    unsafe fn dot_signed(sums: Self::Ints, a: Self::Bytes, x: *const i8) -> Self::Ints;
    /// One number times a power of two in every lane.
    unsafe fn shifted(number: *const i32, by: u32) -> Self::Ints;
    unsafe fn zeros() -> Self::Ints;
    unsafe fn to_floats(ints: Self::Ints) -> Self::Floats;
    /// Half-precision numbers.
    unsafe fn halves(from: *const u8) -> Self::Floats;
    /// Bytes without a sign.
    unsafe fn unsigned(from: *const u8) -> Self::Floats;
    /// Bytes with a sign.
    unsafe fn signed(from: *const u8) -> Self::Floats;
    unsafe fn splat(number: *const f32) -> Self::Floats;
    unsafe fn no_floats() -> Self::Floats;
    unsafe fn multiply(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a · b + c`
    unsafe fn multiply_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    unsafe fn store(floats: Self::Floats, to: *mut f32);
}

/// [`BlockMatrix::multiply`] with the registers of a level.
///
/// # Safety
/// The level's instructions must be there, and sizes must fit as [`BlockMatrix::multiply`] checks.
#[inline(always)]
pub(super) unsafe fn multiply_with<L: Lanes>(
    matrix: &BlockMatrix,
    groups: Range<usize>,
    x: &Panel,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        with_kind!(matrix.kind(), K => multiply_kind::<L, K>(matrix, groups, x, out, stride));
    }
}

#[inline(always)]
unsafe fn multiply_kind<L: Lanes, K: Kind>(
    matrix: &BlockMatrix,
    groups: Range<usize>,
    x: &Panel,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match x.filled() {
            1 => multiply_rows::<L, K, 1>(matrix, groups, x, out, stride),
            4 => multiply_rows::<L, K, 4>(matrix, groups, x, out, stride),
            _ => multiply_rows::<L, K, { Panel::ROWS }>(matrix, groups, x, out, stride),
        }
    }
}

#[inline(always)]
unsafe fn multiply_rows<L: Lanes, K: Kind, const M: usize>(
    matrix: &BlockMatrix,
    groups: Range<usize>,
    x: &Panel,
    out: &mut [f32],
    stride: usize,
) {
    let first = groups.start;
    let units = matrix.columns() / UNIT;
    for group in groups {
        let (quants, scales) = matrix.group(group);
        let mut sums = [[0f32; GROUP]; M];
        for part in (0..GROUP).step_by(L::LANES) {
            // SAFETY: the level's instructions are there; a group has all units' numbers and scales, and a panel as
            // many units of `M` rows.
            unsafe {
                multiply_lanes::<L, K, M>(
                    quants.as_ptr().cast(),
                    scales.as_ptr(),
                    part,
                    units,
                    x,
                    &mut sums,
                );
            }
        }
        let rows = matrix.rows_of(&(group..group + 1)).len();
        let at = (group - first) * GROUP;
        for (r, sums) in sums.iter().enumerate().take(x.rows()) {
            out[r * stride + at..][..rows].copy_from_slice(&sums[..rows]);
        }
    }
}

/// Products of some lanes of a group, from lane `part` on, with all rows of a panel.
#[inline(always)]
unsafe fn multiply_lanes<L: Lanes, K: Kind, const M: usize>(
    quants: *const u8,
    scales: *const u8,
    part: usize,
    units: usize,
    x: &Panel,
    out: &mut [[f32; GROUP]; M],
) {
    let layout = const { K::LAYOUT };
    let halves = UNIT / layout.columns;
    // SAFETY: the caller's promise; every place below is inside what it names.
    unsafe {
        let mut sums = [L::no_floats(); M];
        for unit in 0..units {
            let lines = quants.add(unit * layout.quant_bytes() + part * STEP);
            let numbers = x.numbers.as_ptr().add(unit * M * UNIT);
            if M == 1 {
                prefetch_lines(lines, layout.quant_bytes(), AHEAD);
            }
            let x_scales = x.scales.as_ptr().add(unit * M);
            let floats = scales.add(unit / layout.units() * layout.scale_bytes());
            for half in 0..halves {
                // Sums of a half, or of the whole unit.
                let sum_at = (3 * unit + if halves == 2 { half } else { 2 }) * M;
                let x_sums = x.sums.as_ptr().add(sum_at);
                let zero = if layout.signed {
                    L::SIGNED
                } else {
                    layout.zero
                };
                let mut dots = [L::zeros(); M];
                if let Some(zero) = zero {
                    for r in 0..M {
                        dots[r] = L::shifted(x_sums.add(r), zero);
                    }
                }
                let steps = STEPS / halves;
                // Unrolled, so that shifts are constants.
                if half == 0 {
                    step::<L, K, M>(&mut dots, lines, numbers, 0);
                    step::<L, K, M>(&mut dots, lines, numbers, 1);
                    step::<L, K, M>(&mut dots, lines, numbers, 2);
                    step::<L, K, M>(&mut dots, lines, numbers, 3);
                }
                if half == 1 || steps == STEPS {
                    step::<L, K, M>(&mut dots, lines, numbers, 4);
                    step::<L, K, M>(&mut dots, lines, numbers, 5);
                    step::<L, K, M>(&mut dots, lines, numbers, 6);
                    step::<L, K, M>(&mut dots, lines, numbers, 7);
                }
                let (scale, least) =
                    scale::<L, K>(floats, unit % layout.units() * halves + half, part);
                for r in 0..M {
                    let dot = L::multiply(L::to_floats(dots[r]), L::splat(x_scales.add(r)));
                    sums[r] = L::multiply_add(dot, scale, sums[r]);
                }
                if let Some(least) = least {
                    let x_sums = x.scaled_sums.as_ptr().add(sum_at);
                    for r in 0..M {
                        sums[r] = L::multiply_add(least, L::splat(x_sums.add(r)), sums[r]);
                    }
                }
            }
        }
        for r in 0..M {
            L::store(sums[r], out[r].as_mut_ptr().add(part));
        }
    }
}

/// Adds the products of four columns to those of every row.
#[inline(always)]
unsafe fn step<L: Lanes, K: Kind, const M: usize>(
    dots: &mut [L::Ints; M],
    lines: *const u8,
    numbers: *const i8,
    step: usize,
) {
    let layout = const { K::LAYOUT };
    // SAFETY: the caller's promise.
    unsafe {
        let low = L::load(lines.add(step % layout.low * LINE));
        let mut a = low;
        if layout.low < 8 {
            a = L::bits(
                low,
                (step / layout.low * layout.low) as u32,
                0,
                layout.low as u32,
            );
        }
        if layout.high > 0 {
            let high = L::load(lines.add((layout.low + step % layout.high) * LINE));
            let from = (step / layout.high * layout.high) as u32;
            a = L::or(
                a,
                L::bits(high, from, layout.low as u32, layout.high as u32),
            );
        }
        for r in 0..M {
            let x = numbers.add(r * UNIT + step * STEP);
            dots[r] = match layout.signed {
                true => L::dot_signed(dots[r], a, x),
                false => L::dot(dots[r], a, x),
            };
        }
    }
}

/// The scale, and the least value where there is one, of a part of what half-precision numbers are for.
#[inline(always)]
unsafe fn scale<L: Lanes, K: Kind>(
    floats: *const u8,
    number: usize,
    part: usize,
) -> (L::Floats, Option<L::Floats>) {
    let layout = const { K::LAYOUT };
    // SAFETY: the caller's promise.
    unsafe {
        let scale = L::halves(floats.add(2 * part));
        let least = || L::halves(floats.add(2 * (GROUP + part)));
        if !layout.nested {
            return (scale, if layout.least { Some(least()) } else { None });
        }
        let bytes = floats.add(layout.float_bytes() + number * layout.pair() * GROUP + part);
        if !layout.least {
            return (L::multiply(scale, L::signed(bytes)), None);
        }
        let nested = L::multiply(least(), L::unsigned(bytes.add(GROUP)));
        (L::multiply(scale, L::unsigned(bytes)), Some(nested))
    }
}
