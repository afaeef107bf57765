//! Sums, products and searches over vectors in plain Rust, which vectorises at any width.

use half::bf16;

use super::{Rounded, unit};
use crate::kernels::rows::Number;
use crate::kernels::{LANES, ROUNDING, larger, multiply_add};

#[inline(always)]
pub(in crate::kernels) fn dot<const FMA: bool>(a: &[impl Number], b: &[f32]) -> f32 {
    dot_of::<FMA, _>(a, b, |a| a.widen())
}

#[inline(always)]
pub(super) fn dot_bf16<const FMA: bool>(a: &[bf16], b: &[f32]) -> f32 {
    dot_of::<FMA, bf16>(a, b, |a| f32::from_bits(u32::from(a.to_bits()) << 16))
}

/// `⟨a, b⟩`, each number of `a` widened first.
#[inline(always)]
pub(in crate::kernels) fn dot_of<const FMA: bool, T>(
    a: &[T],
    b: &[f32],
    widen: impl Fn(&T) -> f32,
) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for l in 0..LANES {
            sums[l] = multiply_add::<FMA>(widen(&a[l]), b[l], sums[l]);
        }
    }
    if !a_rest.is_empty() {
        // Zeros fill the last block: sums that are added to one by one would not stay in vector registers.
        let (mut a, mut b) = ([0f32; LANES], [0f32; LANES]);
        for ((a, b), (rest, &other)) in a.iter_mut().zip(&mut b).zip(a_rest.iter().zip(b_rest)) {
            (*a, *b) = (widen(rest), other);
        }
        for l in 0..LANES {
            sums[l] = multiply_add::<FMA>(a[l], b[l], sums[l]);
        }
    }
    across(sums, |a, b| a + b)
}

/// All numbers joined to one, by a tree, which stays in vector registers.
#[inline(always)]
fn across(mut numbers: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            numbers[l] = join(numbers[l], numbers[l + width]);
        }
        width /= 2;
    }
    numbers[0]
}

#[inline(always)]
pub(in crate::kernels) fn add_scaled<const FMA: bool>(
    a: &mut [f32],
    scale: f32,
    b: &[impl Number],
) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a = multiply_add::<FMA>(scale, b.widen(), *a);
    }
}

#[inline(always)]
pub(super) fn widen<const FMA: bool>(a: &[impl Number], unit: f32, out: &mut [f32]) {
    for (out, a) in out.iter_mut().zip(a) {
        *out = unit * a.widen();
    }
}

/// Independent sums in f64: a register of the widest kind holds eight.
const LANES_F64: usize = 16;

/// `⟨a, b⟩`, in f64.
#[inline(always)]
fn dot_f64<T: Copy + Into<f64>>(a: &[f32], b: &[T]) -> f64 {
    let mut sums = [0f64; LANES_F64];
    let (a_blocks, a_rest) = a.as_chunks::<LANES_F64>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES_F64>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for l in 0..LANES_F64 {
            sums[l] += f64::from(a[l]) * b[l].into();
        }
    }
    for ((sum, &a), &b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += f64::from(a) * b.into();
    }
    sums.iter().sum()
}

#[inline(always)]
pub(super) fn square<const FMA: bool>(a: &[f32]) -> f64 {
    dot_f64(a, a)
}

#[inline(always)]
pub(super) fn dot_mixed<const FMA: bool>(a: &[f32], b: &[f64]) -> f64 {
    dot_f64(a, b)
}

/// `a -= scale · b`, in f64.
#[inline(always)]
pub(super) fn subtract_scaled<const FMA: bool>(a: &mut [f64], scale: f64, b: &[impl Number]) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a -= scale * f64::from(b.widen());
    }
}

#[inline(always)]
pub(super) fn round_to_bytes<const FMA: bool>(x: &[f32], largest: f32, out: &mut [i8]) -> Rounded {
    let unit = unit(peak::<FMA>(x), largest);
    let inverse = 1.0 / unit;
    let mut rests = [0f32; LANES];
    let mut wholes = [0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<LANES>();
    let mut one = |x: f32, out: &mut i8, l: usize| {
        let scaled = x * inverse;
        // Vectorises everywhere, unlike a call that rounds and a cast that saturates.
        let biased = scaled + ROUNDING;
        let off = scaled - (biased - ROUNDING);
        rests[l] = multiply_add::<FMA>(off, off, rests[l]);
        wholes[l] = multiply_add::<FMA>(scaled, scaled, wholes[l]);
        *out = biased.to_bits() as i8;
    };
    for (x, out) in blocks.iter().zip(out_blocks) {
        for l in 0..LANES {
            one(x[l], &mut out[l], l);
        }
    }
    for (l, (&x, out)) in rest.iter().zip(out_rest).enumerate() {
        one(x, out, l);
    }
    Rounded {
        unit,
        rest: across(rests, |a, b| a + b),
        whole: across(wholes, |a, b| a + b),
        sum: out.iter().map(|&byte| i32::from(byte)).sum(),
    }
}

/// The largest magnitude.
#[inline(always)]
pub(super) fn peak<const FMA: bool>(a: &[f32]) -> f32 {
    let mut peaks = [0f32; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for a in blocks {
        for l in 0..LANES {
            peaks[l] = larger(a[l].abs(), peaks[l]);
        }
    }
    for (peak, a) in peaks.iter_mut().zip(rest) {
        *peak = peak.max(a.abs());
    }
    across(peaks, larger)
}
