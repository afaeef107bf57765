//! The portable kernels compiled for AVX2 and AVX-512, one of them chosen at run time.

pub(super) mod codes;
pub(super) mod dense;
mod half;
pub(super) mod scan;

use std::sync::OnceLock;

#[derive(Clone, Copy)]
pub(super) enum Level {
    Avx512,
    Avx2,
    Baseline,
}

/// The environment variable that holds the program to a lower level, for tests of every path: `avx2` or
/// `portable`.
const LEVEL_VARIABLE: &str = "LEXICO_LEVEL";

/// What this processor has; asked once.
pub(super) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni");
        let held_to = std::env::var(LEVEL_VARIABLE);
        match held_to.as_deref() {
            Ok("portable") => Level::Baseline,
            Ok("avx2") if avx2 => Level::Avx2,
            _ if avx2 && avx512 => Level::Avx512,
            _ if avx2 => Level::Avx2,
            _ => Level::Baseline,
        }
    })
}

macro_rules! kernels {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        pub(super) mod avx512 {
            use crate::code::Block;
            pub(in super::super) use super::half::dot_f16_avx512 as dot_f16;
            pub(in super::super) use super::scan::at_least_avx512 as at_least;
            $(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            pub(in super::super) fn $name($($argument: $type),*) $(-> $result)? {
                crate::arch::portable::$name::<true>($($argument),*)
            })*
        }
        pub(super) mod avx2 {
            use crate::code::Block;
            pub(in super::super) use super::half::dot_f16_avx2 as dot_f16;
            #[target_feature(enable = "avx2,fma,f16c")]
            pub(in super::super) fn at_least(a: &[f32], enough: f32, found: &mut Vec<u32>) {
                crate::arch::portable::at_least::<true>(a, enough, found);
            }
            $(#[target_feature(enable = "avx2,fma,f16c")]
            pub(in super::super) fn $name($($argument: $type),*) $(-> $result)? {
                crate::arch::portable::$name::<true>($($argument),*)
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
    dot(a: &[f32], b: &[f32]) -> f32;
    dot_bf16(a: &[half::bf16], b: &[f32]) -> f32;
    dots_f32(rows: &[f32], queries: &[f32], m: usize, group: usize, out: &mut [f32]);
    combine_f32(weights: &[f32], rows: &[f32], m: usize, group: usize, out: &mut [f32]);
    largest(scores: &[f32], largest: &mut [f32]);
    exponentials(scores: &mut [f32], largest: &[f32], sums: &mut [f32]);
    scores_f8(block: Block<'_, u8>, p: &[f32], group: usize, out: &mut [f32]);
    scores_f32(block: Block<'_, f32>, p: &[f32], group: usize, out: &mut [f32]);
    accumulate_f8(block: Block<'_, u8>, weights: &[f32], group: usize, u: &mut [f32]);
    accumulate_f32(block: Block<'_, f32>, weights: &[f32], group: usize, u: &mut [f32]);
}

macro_rules! dispatch {
    ($name:ident($($argument:expr),*)) => {
        match crate::arch::x86_64::level() {
            // SAFETY: `level` says Avx512 only where avx512f, avx512vl, avx2, fma and f16c
            // were detected.
            crate::arch::x86_64::Level::Avx512 => unsafe {
                crate::arch::x86_64::avx512::$name($($argument),*)
            },
            // SAFETY: `level` says Avx2 only where avx2, fma and f16c were detected.
            crate::arch::x86_64::Level::Avx2 => unsafe {
                crate::arch::x86_64::avx2::$name($($argument),*)
            },
            crate::arch::x86_64::Level::Baseline => {
                crate::arch::portable::$name::<false>($($argument),*)
            }
        }
    };
}
pub(super) use dispatch;
