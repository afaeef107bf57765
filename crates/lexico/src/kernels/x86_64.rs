//! The portable kernels compiled for AVX2 and AVX-512, one of them chosen at run time.

pub(super) mod codes;
pub(super) mod dense;
pub(super) mod scan;

macro_rules! kernels {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        pub(super) mod avx512 {
            use crate::codes::{Block, AdditiveBlock};
            pub(in super::super) use super::dense::avx512::dot_f16;
            pub(in super::super) use super::scan::at_least_avx512 as at_least;
            $(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            pub(in super::super) fn $name($($argument: $type),*) $(-> $result)? {
                crate::kernels::portable::$name::<true>($($argument),*)
            })*
        }
        pub(super) mod avx2 {
            use crate::codes::{Block, AdditiveBlock};
            pub(in super::super) use super::dense::avx2::dot_f16;
            pub(in super::super) use super::scan::at_least_avx2 as at_least;
            $(#[target_feature(enable = "avx2,fma,f16c")]
            pub(in super::super) fn $name($($argument: $type),*) $(-> $result)? {
                crate::kernels::portable::$name::<true>($($argument),*)
            })*
        }
    };
}

kernels! {
    peak(a: &[f32]) -> f32;
    square(a: &[f32]) -> f64;
    dot_mixed(a: &[f32], b: &[f64]) -> f64;
    subtract_scaled(a: &mut [f64], scale: f32, b: &[f32]);
    round_to_bytes(x: &[f32], inverse: f32, out: &mut [i8]) -> (f32, f32);
    add_scaled(a: &mut [f32], scale: f32, b: &[f32]);
    raise(gains: &mut [f32], by: f32, losses: &[f32], largest: &mut [f32]);
    dot(a: &[f32], b: &[f32]) -> f32;
    dot_bf16(a: &[half::bf16], b: &[f32]) -> f32;
    largest(scores: &[f32], largest: &mut [f32]);
    exponentials(scores: &mut [f32], largest: &[f32], sums: &mut [f32]);
    scores_i8(block: Block<'_, i8>, p: &[f32], group: usize, out: &mut [f32]);
    scores_f8(block: Block<'_, u8>, p: &[f32], group: usize, out: &mut [f32]);
    scores_f32(block: Block<'_, f32>, p: &[f32], group: usize, out: &mut [f32]);
    scores_additive(block: AdditiveBlock<'_>, p: &[f32], group: usize, out: &mut [f32]);
    accumulate_additive(block: AdditiveBlock<'_>, weights: &[f32], group: usize, u: &mut [f32]);
    accumulate_i8(block: Block<'_, i8>, weights: &[f32], group: usize, u: &mut [f32]);
    accumulate_f8(block: Block<'_, u8>, weights: &[f32], group: usize, u: &mut [f32]);
    accumulate_f32(block: Block<'_, f32>, weights: &[f32], group: usize, u: &mut [f32]);
}

/// Runs a kernel at the program's level, or at the one named.
macro_rules! dispatch {
    ($name:ident($($argument:expr),*)) => {
        dispatch!(crate::kernels::level::level(), $name($($argument),*))
    };
    ($level:expr, $name:ident($($argument:expr),*)) => {
        match $level {
            // SAFETY: such a level is only where AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C were
            // detected.
            crate::kernels::level::Level::Avx512 => unsafe {
                crate::kernels::x86_64::avx512::$name($($argument),*)
            },
            // SAFETY: such a level is only where AVX2, FMA and F16C were detected.
            crate::kernels::level::Level::Avx2 | crate::kernels::level::Level::AvxVnni => unsafe {
                crate::kernels::x86_64::avx2::$name($($argument),*)
            },
            crate::kernels::level::Level::Portable => {
                crate::kernels::portable::$name::<false>($($argument),*)
            }
        }
    };
}
pub(super) use dispatch;
