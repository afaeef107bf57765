//! The inner loops, chosen once at run time for the machine at hand.
//!
//! `portable` holds every kernel as plain Rust that vectorises by itself; `x86_64` compiles the
//! same code for AVX2 and AVX-512 and picks one when the program first needs it, in the manner of
//! the memchr crate; `aarch64` adds to plain code, which already is NEON there, what that leaves unused.

#[cfg(target_arch = "aarch64")]
mod aarch64;
pub(crate) mod dense;
mod level;
pub(crate) mod matmul;
mod portable;
pub(crate) mod scan;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use half::{bf16, f16};

use crate::codes::Blocks;
use crate::dictionary::MAX_ATOMS;
#[cfg(target_arch = "aarch64")]
use aarch64::dispatch;
#[cfg(target_arch = "x86_64")]
use x86_64::dispatch;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
macro_rules! dispatch {
    ($name:ident($($argument:expr),*)) => { portable::$name::<false>($($argument),*) };
    ($level:expr, $name:ident($($argument:expr),*)) => {
        match $level {
            level::Level::Portable => portable::$name::<false>($($argument),*),
        }
    };
}

/// Fetches the cache line that lies `ahead` bytes after `from`, where the processor can be told to; whether
/// there is anything does not matter.
#[inline(always)]
fn prefetch<T>(from: *const T, ahead: usize) {
    let line = from.cast::<i8>().wrapping_add(ahead);
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, and it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the instruction never faults.
    unsafe {
        use core::arch::asm;
        asm!("prfm pldl1keep, [{0}]", in(reg) line, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = line;
}

/// The number itself, which the compiler then does not put into a vector register together with others, to take
/// them out one by one where they are needed: that costs twice as much.
#[inline(always)]
fn in_general_register(number: u64) -> u64 {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        let mut number = number;
        // SAFETY: nothing is done.
        unsafe {
            core::arch::asm!("/* {0} */", inout(reg) number, options(pure, nomem, nostack, preserves_flags));
        }
        number
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    number
}

/// Bytes that are fetched at a time.
const CACHE_LINE: usize = 64;

/// As [`prefetch`], all cache lines of `bytes` bytes.
#[inline(always)]
fn prefetch_lines<T>(from: *const T, bytes: usize, ahead: usize) {
    for line in (0..bytes).step_by(CACHE_LINE) {
        prefetch(from, ahead + line);
    }
}

/// Fetches the first numbers, up to 2 KiB, into the caches, where the processor can be told to.
pub(crate) fn prefetch_first<T>(numbers: &[T]) {
    prefetch_lines(numbers.as_ptr(), size_of_val(numbers).min(2048), 0);
}

/// The largest magnitude, 0 for no numbers.
pub(crate) fn peak(a: &[f32]) -> f32 {
    dispatch!(peak(a))
}

/// The sum of squares.
pub(crate) fn square(a: &[f32]) -> f64 {
    dispatch!(square(a))
}

/// `⟨a, b⟩`, in f64.
pub(crate) fn dot_mixed(a: &[f32], b: &[f64]) -> f64 {
    dispatch!(dot_mixed(a, b))
}

/// `a -= scale · b`, in f64.
pub(crate) fn subtract_scaled(a: &mut [f64], scale: f32, b: &[f32]) {
    dispatch!(subtract_scaled(a, scale, b))
}

/// Rounds `x · inverse` to bytes, ties to even; returns the sums of squares of what rounding took and of
/// the whole, in the bytes' units.
pub(crate) fn round_to_bytes(x: &[f32], inverse: f32, out: &mut [i8]) -> (f32, f32) {
    dispatch!(round_to_bytes(x, inverse, out))
}

/// Appends the numbers of those entries of `a` that are at least `enough`, in order.
pub(crate) fn at_least(a: &[f32], enough: f32, found: &mut Vec<u32>) {
    dispatch!(at_least(a, enough, found))
}

/// `gains += by − losses`, and every entry of `largest` that one of them exceeds is raised to it.
pub(crate) fn raise(gains: &mut [f32], by: f32, losses: &[f32], largest: &mut [f32]) {
    dispatch!(raise(gains, by, losses, largest))
}

/// `a += scale · b`.
pub(crate) fn add_scaled(a: &mut [f32], scale: f32, b: &[f32]) {
    dispatch!(add_scaled(a, scale, b))
}

/// `⟨a, b⟩`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    dispatch!(dot(a, b))
}

/// `⟨a, b⟩`.
pub(crate) fn dot_f16(a: &[f16], b: &[f32]) -> f32 {
    dispatch!(dot_f16(a, b))
}

/// `⟨a, b⟩`.
pub(crate) fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 {
    dispatch!(dot_bf16(a, b))
}

/// How far a score may lie above what is taken off before the exponential: far from f32's limits, so that
/// sums rarely need to be scaled anew (as in FlashAttention-4, 2025).
const HEADROOM: f32 = 16.0;

/// The softmax of a group's scores `[n, group]`, as far as they go: replaces every score `s` of a query by
/// `exp(s − reference)`, and adds those to `sums`. A reference stays where no score lies more than 16 above it,
/// else it is raised to the largest. A score of `−∞` becomes 0 even where there is no other; NaN stays NaN.
pub(crate) fn softmax(scores: &mut [f32], references: &mut [f32], sums: &mut [f32]) {
    let group = references.len();
    assert!(
        group.is_power_of_two() && group <= MAX_QUERIES && sums.len() == group,
        "a group that kernels know"
    );
    let mut largest = [f32::NEG_INFINITY; MAX_QUERIES];
    dispatch!(largest(scores, &mut largest[..group]));
    let mut base = [0f32; MAX_QUERIES];
    for ((reference, largest), base) in references.iter_mut().zip(largest).zip(&mut base) {
        if largest > *reference + HEADROOM {
            *reference = largest;
        }
        // Nothing seen: any number does, but the difference of two infinities.
        *base = if *reference == f32::NEG_INFINITY {
            0.0
        } else {
            *reference
        };
    }
    dispatch!(exponentials(scores, &base[..group], sums))
}

/// The largest group of queries that kernels know.
pub(crate) const MAX_QUERIES: usize = 32;

fn check_group(block_len: usize, group: usize, per_vector: usize, table: usize) {
    assert!(
        group.is_power_of_two() && group <= MAX_QUERIES,
        "a group that kernels know"
    );
    assert_eq!(per_vector, block_len * group, "a number a vector and query");
    assert_eq!(table, MAX_ATOMS * group, "a row for every index");
}

/// Whether there is a kernel of its own for such codes on this machine.
#[cfg(target_arch = "x86_64")]
fn has_kernel<C>(block: &crate::codes::Block<'_, C>, group: usize) -> bool {
    level::level() == level::Level::Avx512 && x86_64::codes::takes(block, group)
}

/// `out[t][g] = Σ_j c_j · p[i_j][g]` for the codes `t` of some blocks: `p` is `[MAX_ATOMS, group]`, `out`
/// `[n, group]`, `group` a power of two up to [`MAX_QUERIES`].
pub(crate) fn scores(block: Blocks<'_>, p: &[f32], group: usize, out: &mut [f32]) {
    check_group(block.len(), group, out.len(), p.len());
    match block {
        #[cfg(target_arch = "x86_64")]
        Blocks::I8(block) if has_kernel(&block, group) => {
            // SAFETY: AVX-512 is there, the kernel takes such codes, and the sizes are checked.
            unsafe { x86_64::codes::scores(block, p, out) }
        }
        #[cfg(target_arch = "x86_64")]
        Blocks::F8(block) if has_kernel(&block, group) => {
            // SAFETY: AVX-512 is there, the kernel takes such codes, and the sizes are checked.
            unsafe { x86_64::codes::scores(block, p, out) }
        }
        Blocks::I8(block) => dispatch!(scores_i8(block, p, group, out)),
        Blocks::F8(block) => dispatch!(scores_f8(block, p, group, out)),
        Blocks::F32(block) => dispatch!(scores_f32(block, p, group, out)),
        Blocks::Additive(block) => dispatch!(scores_additive(block, p, group, out)),
    }
}

/// `u[i_j][g] += c_j · weights[t][g]` for the codes `t` of some blocks: `u` is `[MAX_ATOMS, group]`,
/// `weights` `[n, group]`, `group` a power of two up to [`MAX_QUERIES`].
pub(crate) fn accumulate(block: Blocks<'_>, weights: &[f32], group: usize, u: &mut [f32]) {
    check_group(block.len(), group, weights.len(), u.len());
    match block {
        #[cfg(target_arch = "x86_64")]
        Blocks::I8(block) if has_kernel(&block, group) => {
            // SAFETY: as for scores.
            unsafe { x86_64::codes::accumulate(block, weights, u) }
        }
        #[cfg(target_arch = "x86_64")]
        Blocks::F8(block) if has_kernel(&block, group) => {
            // SAFETY: as for scores.
            unsafe { x86_64::codes::accumulate(block, weights, u) }
        }
        Blocks::I8(block) => dispatch!(accumulate_i8(block, weights, group, u)),
        Blocks::F8(block) => dispatch!(accumulate_f8(block, weights, group, u)),
        Blocks::F32(block) => dispatch!(accumulate_f32(block, weights, group, u)),
        Blocks::Additive(block) => dispatch!(accumulate_additive(block, weights, group, u)),
    }
}

#[cfg(test)]
mod tests {
    use super::level::Level;
    use super::matmul::{Matrix, multiply};
    use super::*;
    use crate::codes::{AdditiveBlock, Block, Leading, Lengths, Scales};
    use crate::dictionary::CodebookSizes;
    use proptest::prelude::*;

    /// Runs a kernel at every level that this machine has and gives all results.
    macro_rules! every_level {
        ($name:ident($($argument:expr),*)) => {{
            let levels = Level::all().into_iter();
            levels.map(|level| dispatch!(level, $name($($argument),*))).collect::<Vec<_>>()
        }};
    }

    fn close(a: f32, b: f64, size: f64) -> bool {
        (f64::from(a) - b).abs() <= 1e-5 * size.max(1e-30)
    }

    fn vectors(rows: usize, columns: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-4f32..4.0, rows * columns)
    }

    proptest! {
        #[test]
        fn products_agree_with_f64((n, m, rows, x) in (1usize..40, 1usize..140)
            .prop_flat_map(|(n, m)| (Just(n), Just(m), vectors(n, m), vectors(1, m))))
        {
            let exact: Vec<f64> = rows.chunks(m)
                .map(|row| row.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum())
                .collect();
            let mut out = vec![0.0; n];
            let (matrix, vector) = (Matrix::by_rows(&rows, n, m), Matrix::by_rows(&x, 1, m));
            multiply(&mut out, false, matrix, vector.transposed());
            for (row, (&got, &want)) in rows.chunks(m).zip(out.iter().zip(&exact)) {
                prop_assert!(close(got, want, 16.0 * m as f64));
                for got in every_level!(dot(row, &x)) {
                    prop_assert!(close(got, want, 16.0 * m as f64));
                }
            }
            for row in rows.chunks(m) {
                let halves: Vec<f16> = row.iter().map(|&x| f16::from_f32(x)).collect();
                let brains: Vec<bf16> = row.iter().map(|&x| bf16::from_f32(x)).collect();
                let product = |numbers: Vec<f32>| -> f64 {
                    numbers.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
                };
                let want = product(halves.iter().map(|x| x.to_f32()).collect());
                for got in every_level!(dot_f16(&halves, &x)) {
                    prop_assert!(close(got, want, 16.0 * m as f64));
                }
                let want = product(brains.iter().map(|x| x.to_f32()).collect());
                for got in every_level!(dot_bf16(&brains, &x)) {
                    prop_assert!(close(got, want, 16.0 * m as f64));
                }
            }
            // The levels run one after the other on the same numbers.
            let mut sum = rows[..m].to_vec();
            let levels = every_level!(add_scaled(&mut sum, 0.5, &x)).len() as f64;
            for ((&got, &a), &b) in sum.iter().zip(&rows).zip(&x) {
                prop_assert!(close(got, f64::from(a) + levels * 0.5 * f64::from(b), 8.0));
            }
        }

        #[test]
        fn the_peak_is_the_largest_magnitude(a in prop::collection::vec(-9f32..9.0, 0..600), enough in -10f32..10.0) {
            let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for magnitude in every_level!(peak(&a)) {
                prop_assert_eq!(magnitude, largest);
            }
            let wanted: Vec<u32> = (0..).zip(&a).filter(|(_, x)| **x >= enough).map(|(i, _)| i).collect();
            let mut found = Vec::new();
            let levels = every_level!(at_least(&a, enough, &mut found)).len();
            prop_assert_eq!(found, wanted.repeat(levels));
        }

        #[test]
        fn sums_in_f64_and_rounded_bytes(a in prop::collection::vec(-9f32..9.0, 0..300), inverse in 0.1f32..14.0) {
            let wide: Vec<f64> = a.iter().map(|&x| 1.0 + f64::from(x) / 3.0).collect();
            let exact: f64 = a.iter().map(|&x| f64::from(x).powi(2)).sum();
            let mixed: f64 = a.iter().zip(&wide).map(|(&x, y)| f64::from(x) * y).sum();
            for got in every_level!(square(&a)) {
                prop_assert!((got - exact).abs() <= 1e-12 * exact);
            }
            for got in every_level!(dot_mixed(&a, &wide)) {
                prop_assert!((got - mixed).abs() <= 1e-9);
            }
            let mut rest = wide.clone();
            let levels = every_level!(subtract_scaled(&mut rest, 0.5, &a)).len() as f64;
            for ((rest, wide), &a) in rest.iter().zip(&wide).zip(&a) {
                prop_assert!((rest - (wide - levels * 0.5 * f64::from(a))).abs() <= 1e-12);
            }
            let mut bytes = vec![0; a.len()];
            for (taken, whole) in every_level!(round_to_bytes(&a, inverse, &mut bytes)) {
                let scaled = || a.iter().map(|&x| f64::from(x * inverse));
                let rests: f64 = scaled().zip(&bytes).map(|(x, &b)| (x - f64::from(b)).powi(2)).sum();
                prop_assert!((f64::from(taken) - rests).abs() <= 1e-4 * rests + 1e-6);
                let wholes: f64 = scaled().map(|x| x * x).sum();
                prop_assert!((f64::from(whole) - wholes).abs() <= 1e-4 * wholes);
                for (x, &b) in scaled().zip(&bytes) {
                    prop_assert!((x - f64::from(b)).abs() <= 0.5);
                }
            }
        }

        #[test]
        fn a_softmax_is_that_of_f64(
            power in 0u32..6, n in 0usize..70, hidden in 0usize..80, shift in -200f32..200.0, seed: u32,
        ) {
            let group = 1usize << power;
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 20) as f32 - 8.0 + shift
            };
            let mut scores: Vec<f32> = (0..n * group).map(|_| draw()).collect();
            let hidden = (hidden * group).min(scores.len());
            scores[..hidden].fill(f32::NEG_INFINITY);
            let before: Vec<f32> = (0..group).map(|_| draw()).collect();
            let mut largest = before.clone();
            let mut sums = vec![0.0; group];
            let mut weights = scores.clone();
            let mut references = before.clone();
            softmax(&mut weights, &mut references, &mut sums);
            let mut levels = Vec::new();
            for level in Level::all() {
                let mut raised = before.clone();
                dispatch!(level, largest(&scores, &mut raised));
                for g in 0..group {
                    let own = scores.iter().skip(g).step_by(group);
                    prop_assert_eq!(raised[g], own.fold(before[g], |a, &b| a.max(b)));
                }
                largest.copy_from_slice(&raised);
                let mut weights = scores.clone();
                dispatch!(level, exponentials(&mut weights, &references, &mut vec![0.0; group]));
                levels.push(weights);
            }
            for g in 0..group {
                let raised = largest[g] > before[g] + HEADROOM;
                prop_assert_eq!(references[g], if raised { largest[g] } else { before[g] });
            }
            let largest = references;
            let mut exact = vec![0f64; group];
            for (i, &score) in scores.iter().enumerate() {
                let x = f64::from(score) - f64::from(largest[i % group]);
                let want = x.exp();
                // Beside its own rounding, that of the difference.
                let close = (3e-7 + if x.is_finite() { 6e-8 * x.abs() } else { 0.0 }) * want + 1e-37;
                exact[i % group] += want;
                for got in levels.iter().chain([&weights]).map(|weights| weights[i]) {
                    prop_assert!((f64::from(got) - want).abs() <= close, "{} for {}", got, want);
                }
            }
            for (got, want) in sums.iter().zip(exact) {
                prop_assert!((f64::from(*got) - want).abs() <= 1e-5 * want, "{} for {}", got, want);
            }
        }

        #[test]
        fn codes_are_gathered_and_scattered(
            power in 0u32..6, varied in prop::collection::vec(0usize..9, 0..30), kind in 0..3, seed: u32,
            fixed in prop::option::of(1usize..35),
        ) {
            let lengths: Vec<usize> = varied.iter().map(|&l| fixed.unwrap_or(l)).collect();
            // Indices from the first to nearly the last that there can be.
            const ATOMS: usize = 23;
            const STRIDE: usize = (MAX_ATOMS - 1) / (ATOMS - 1);
            let group = 1usize << power;
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 8
            };
            let nonzeros: usize = lengths.iter().sum();
            let indices: Vec<u16> = (0..nonzeros).map(|_| (draw() as usize % ATOMS * STRIDE) as u16).collect();
            let bytes: Vec<u8> = (0..nonzeros).map(|_| (draw() % 256) as u8).collect();
            let exponents: Vec<u8> = lengths.iter().map(|_| 126 + (draw() % 3) as u8).collect();
            let scales = Scales::Powers(&exponents);
            let mut number = || draw() as f32 / (1 << 23) as f32 - 1.0;
            let values = crate::codes::f8_values();
            // All but NaN, which codes never hold.
            let bytes: Vec<u8> = bytes.into_iter().map(|b| if b & 0x7f == 0x7f { b - 1 } else { b }).collect();
            let floats: Vec<f32> = (0..nonzeros).map(|_| number()).collect();
            let mut p = vec![0.0; MAX_ATOMS * group];
            for row in p.chunks_exact_mut(group).step_by(STRIDE) {
                row.iter_mut().for_each(|p| *p = number());
            }
            let weights: Vec<f32> = (0..lengths.len() * group).map(|_| number()).collect();
            let short: Vec<u8> = lengths.iter().map(|&l| l as u8).collect();
            let lengths_of = match fixed {
                Some(length) => Lengths::Fixed(length, lengths.len()),
                None => Lengths::Variable(&short),
            };
            let in_bytes = Block {
                indices: &indices, coefficients: &bytes, scales, lengths: lengths_of, values,
            };
            let integers: Vec<i8> = bytes.iter().map(|&b| b as i8).collect();
            let in_integers = Block {
                indices: &indices, coefficients: &integers, scales, lengths: lengths_of,
                values: crate::codes::i8_values(),
            };
            let in_floats = Block {
                indices: &indices, coefficients: &floats, scales, lengths: lengths_of, values,
            };
            let mut expected_scores = vec![0f64; lengths.len() * group];
            let mut expected_u = vec![0f64; ATOMS * group];
            let mut at = 0;
            for (t, &length) in lengths.iter().enumerate() {
                for j in at..at + length {
                    let c = match kind {
                        0 => f32::from(integers[j]),
                        1 => values[usize::from(bytes[j])],
                        _ => floats[j],
                    };
                    let c = f64::from(c) * f64::from(scales.get(t));
                    for g in 0..group {
                        let (i, own) = (usize::from(indices[j]), t * group + g);
                        expected_scores[own] += c * f64::from(p[i * group + g]);
                        expected_u[i / STRIDE * group + g] += c * f64::from(weights[own]);
                    }
                }
                at += length;
            }
            let size = 2.0 * 448.0 * 32.0;
            let block = match kind {
                0 => Blocks::I8(in_integers),
                1 => Blocks::F8(in_bytes),
                _ => Blocks::F32(in_floats),
            };
            // And what the program itself would choose.
            let levels = Level::all().into_iter().map(Some).chain([None]);
            for level in levels {
                let mut out = vec![f32::NAN; lengths.len() * group];
                let mut u = vec![0.0; MAX_ATOMS * group];
                match (level, kind) {
                    (None, _) => {
                        scores(block, &p, group, &mut out);
                        accumulate(block, &weights, group, &mut u);
                    }
                    (Some(level), 0) => {
                        dispatch!(level, scores_i8(in_integers, &p, group, &mut out));
                        dispatch!(level, accumulate_i8(in_integers, &weights, group, &mut u));
                    }
                    (Some(level), 1) => {
                        dispatch!(level, scores_f8(in_bytes, &p, group, &mut out));
                        dispatch!(level, accumulate_f8(in_bytes, &weights, group, &mut u));
                    }
                    (Some(level), _) => {
                        dispatch!(level, scores_f32(in_floats, &p, group, &mut out));
                        dispatch!(level, accumulate_f32(in_floats, &weights, group, &mut u));
                    }
                }
                for (&got, &want) in out.iter().zip(&expected_scores) {
                    prop_assert!(close(got, want, size), "{:?}: {} for {}", level, got, want);
                }
                let rows = u.chunks_exact(group).step_by(STRIDE);
                for (&got, &want) in rows.flatten().zip(&expected_u) {
                    prop_assert!(close(got, want, size * lengths.len() as f64), "{:?}: {} for {}", level, got, want);
                }
            }
        }

        #[test]
        fn packed_codes_are_gathered_and_scattered(
            power in 0u32..6, sparsity in 1usize..40, n in prop_oneof![4 => 0usize..70, 1 => 1000usize..2100],
            first in prop_oneof![Just(1), Just(255), Just(256), Just(2048), 1usize..2048], seed: u32,
        ) {
            let groups = CodebookSizes { first };
            let (group, atoms) = (1usize << power, groups.atoms(sparsity));
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 8
            };
            let firsts: Vec<Leading> = (0..n)
                .map(|_| Leading::new((draw() as usize % first) as u16, 1.0 + (draw() % 64) as f32 / 64.0))
                .collect();
            let rest: Vec<u8> = (0..n * (sparsity - 1)).map(|_| (draw() >> 8) as u8).collect();
            let mut number = || draw() as f32 / (1 << 23) as f32 - 1.0;
            // Nothing beyond the atoms may be read: it would show.
            let mut p = vec![f32::NAN; MAX_ATOMS * group];
            p[..atoms * group].fill_with(&mut number);
            let weights: Vec<f32> = (0..n * group).map(|_| number()).collect();
            let start: Vec<f32> = (0..MAX_ATOMS * group).map(|_| number()).collect();
            let mut expected_scores = vec![0f64; n * group];
            let mut expected_u: Vec<f64> = start.iter().map(|&u| f64::from(u)).collect();
            // Of what is summed, without signs: rounding is in proportion.
            let mut sizes: Vec<f64> = expected_u.iter().map(|u| u.abs()).collect();
            for v in 0..n {
                let own = &rest[v * (sparsity - 1)..][..sparsity - 1];
                let own = own.iter().enumerate().map(|(j, &byte)| first + j * 256 + usize::from(byte));
                let scale = f64::from(2f32.powf(f32::from(firsts[v].0 >> 11) / 32.0));
                for atom in std::iter::once(firsts[v].atom()).chain(own) {
                    for g in 0..group {
                        expected_scores[v * group + g] += scale * f64::from(p[atom * group + g]);
                        let weight = scale * f64::from(weights[v * group + g]);
                        expected_u[atom * group + g] += weight;
                        sizes[atom * group + g] += weight.abs();
                    }
                }
            }
            let block = AdditiveBlock { first: &firsts, rest: &rest, groups, sparsity };
            // And what the program itself would choose.
            for level in Level::all().into_iter().map(Some).chain([None]) {
                let mut out = vec![f32::NAN; n * group];
                let mut u = start.clone();
                match level {
                    Some(level) => {
                        dispatch!(level, scores_additive(block, &p, group, &mut out));
                        dispatch!(level, accumulate_additive(block, &weights, group, &mut u));
                    }
                    None => {
                        scores(Blocks::Additive(block), &p, group, &mut out);
                        accumulate(Blocks::Additive(block), &weights, group, &mut u);
                    }
                }
                for (&got, &want) in out.iter().zip(&expected_scores) {
                    prop_assert!(close(got, want, 2.0 * sparsity as f64), "{:?}: {} for {}", level, got, want);
                }
                for ((&got, &want), &size) in u.iter().zip(&expected_u).zip(&sizes) {
                    prop_assert!(close(got, want, size), "{:?}: {} for {}", level, got, want);
                }
            }
        }
    }
}
