//! Scores and weighted sums of sparse codes: any atoms, each with a coefficient.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
use super::level::level;
use super::rows::{Number, Rows, with_numbers};
use super::{compile, dispatch, table};

compile! {
    scores(block: Nonzeros<'_, impl Coefficient>, p: &[f32], group: usize, out: &mut [f32]);
    accumulate(block: Nonzeros<'_, impl Coefficient>, weights: &[f32], group: usize, u: &mut [f32]);
    rebuild(block: Nonzeros<'_, impl Coefficient>, atoms: &[impl Number], units: &[f32], m: usize, out: &mut [f32]);
}

/// Nonzeros of some vectors as they are stored, vector by vector.
#[derive(Clone, Copy)]
pub(crate) struct SparseBlock<'a> {
    /// The atoms.
    pub(crate) indices: &'a [u16],
    /// A coefficient for each atom.
    pub(crate) coefficients: CoefficientSlices<'a>,
    pub(crate) lengths: Lengths<'a>,
}

/// Coefficients as they are stored, and the exponent of each vector's scale ([`power_of_two`]).
#[derive(Clone, Copy)]
pub(crate) enum CoefficientSlices<'a> {
    /// 8-bit integers.
    I8 { values: &'a [i8], scales: &'a [u8] },
    /// FP8 E4M3.
    F8 { values: &'a [u8], scales: &'a [u8] },
    /// Single precision, without scales.
    F32(&'a [f32]),
}

/// Nonzeros of each vector.
#[derive(Clone, Copy)]
pub(crate) enum Lengths<'a> {
    /// `length` in each of `count` vectors.
    Fixed {
        length: usize,
        count: usize,
    },
    Variable(&'a [u8]),
}

impl SparseBlock<'_> {
    /// Number of vectors.
    pub(crate) fn len(&self) -> usize {
        match self.lengths {
            Lengths::Fixed { count, .. } => count,
            Lengths::Variable(lengths) => lengths.len(),
        }
    }

    /// The first `count` vectors, which must be there, and the others.
    pub(crate) fn split_at(self, count: usize) -> (Self, Self) {
        let (nonzeros, first, rest) = match self.lengths {
            Lengths::Fixed { length, count: all } => (
                count * length,
                Lengths::Fixed { length, count },
                Lengths::Fixed {
                    length,
                    count: all - count,
                },
            ),
            Lengths::Variable(lengths) => {
                let (first, rest) = lengths.split_at(count);
                let nonzeros = first.iter().map(|&length| usize::from(length)).sum();
                (nonzeros, Lengths::Variable(first), Lengths::Variable(rest))
            }
        };
        let indices = self.indices.split_at(nonzeros);
        let coefficients = self.coefficients.split_at(nonzeros, count);
        let block = |indices, coefficients, lengths| SparseBlock {
            indices,
            coefficients,
            lengths,
        };
        (
            block(indices.0, coefficients.0, first),
            block(indices.1, coefficients.1, rest),
        )
    }
}

impl CoefficientSlices<'_> {
    /// Coefficients of the first `vectors` vectors, which are `nonzeros`, and the others.
    fn split_at(self, nonzeros: usize, vectors: usize) -> (Self, Self) {
        match self {
            Self::I8 { values, scales } => {
                let (values, scales) = (values.split_at(nonzeros), scales.split_at(vectors));
                let part = |values, scales| Self::I8 { values, scales };
                (part(values.0, scales.0), part(values.1, scales.1))
            }
            Self::F8 { values, scales } => {
                let (values, scales) = (values.split_at(nonzeros), scales.split_at(vectors));
                let part = |values, scales| Self::F8 { values, scales };
                (part(values.0, scales.0), part(values.1, scales.1))
            }
            Self::F32(values) => {
                let (first, rest) = values.split_at(nonzeros);
                (Self::F32(first), Self::F32(rest))
            }
        }
    }
}

/// The scale that an exponent's byte stands for, `2^(byte − 127)` (E8M0).
#[inline(always)]
pub(crate) fn power_of_two(exponent: u8) -> f32 {
    // The byte is an f32's exponent field, but for the smallest power, a subnormal number.
    f32::from_bits((u32::from(exponent) << 23).max(1 << 22))
}

/// The number that each byte of FP8 E4M3 stands for.
pub(crate) static F8_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (sign, rest) = (byte as u32 & 0x80, byte as u32 & 0x7f);
        // FP8's exponent has a bias of 7, f32's of 127; its subnormal numbers are f32's in the same way.
        let number = f32::from_bits(sign << 24 | rest << 20) * f32::from_bits((127 + 120) << 23);
        values[byte] = if rest == 0x7f { f32::NAN } else { number };
        byte += 1;
    }
    values
};

/// The number that each integer's byte stands for.
static I8_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        values[byte] = byte as u8 as i8 as f32;
        byte += 1;
    }
    values
};

/// A stored coefficient.
trait Coefficient: Copy {
    /// True for FP8 E4M3.
    #[cfg(target_arch = "x86_64")]
    const F8: bool = false;

    /// The number that it stands for, before its vector's scale.
    fn value(self) -> f32;
}

impl Coefficient for u8 {
    #[cfg(target_arch = "x86_64")]
    const F8: bool = true;

    #[inline(always)]
    fn value(self) -> f32 {
        F8_VALUES[usize::from(self)]
    }
}

impl Coefficient for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        // One load; a conversion and its spreading over a register take three instructions.
        I8_VALUES[usize::from(self as u8)]
    }
}

impl Coefficient for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

/// The nonzeros of a block, its coefficients of one type.
#[derive(Clone, Copy)]
struct Nonzeros<'a, C> {
    indices: &'a [u16],
    coefficients: &'a [C],
    /// Exponents of the vectors' scales; none where all are 1.
    scales: Option<&'a [u8]>,
    lengths: Lengths<'a>,
}

impl<'a, C> Nonzeros<'a, C> {
    fn new(block: SparseBlock<'a>, coefficients: &'a [C], scales: Option<&'a [u8]>) -> Self {
        Self {
            indices: block.indices,
            coefficients,
            scales,
            lengths: block.lengths,
        }
    }

    #[inline(always)]
    fn scale(&self, v: usize) -> f32 {
        self.scales
            .map_or(1.0, |exponents| power_of_two(exponents[v]))
    }

    /// Calls `visit` with each vector's own of `rows`, which has one a vector, its indices, coefficients and scale.
    #[inline(always)]
    fn for_each<T>(
        self,
        rows: impl Iterator<Item = T>,
        mut visit: impl FnMut(T, &'a [u16], &'a [C], f32),
    ) {
        match self.lengths {
            // Usual sizes by name: their loops are unrolled.
            Lengths::Fixed { length: 4, .. } => self.for_each_of::<4, T>(rows, visit),
            Lengths::Fixed { length: 8, .. } => self.for_each_of::<8, T>(rows, visit),
            Lengths::Fixed { length: 16, .. } => self.for_each_of::<16, T>(rows, visit),
            Lengths::Fixed { length: 24, .. } => self.for_each_of::<24, T>(rows, visit),
            Lengths::Fixed { length: 32, .. } => self.for_each_of::<32, T>(rows, visit),
            Lengths::Fixed { length, .. } => {
                let rows = rows.zip(self.indices.chunks_exact(length));
                let rows = rows.zip(self.coefficients.chunks_exact(length));
                for (v, ((row, indices), coefficients)) in rows.enumerate() {
                    visit(row, indices, coefficients, self.scale(v));
                }
            }
            Lengths::Variable(lengths) => {
                let (mut indices, mut coefficients) = (self.indices, self.coefficients);
                for (v, (row, &length)) in rows.zip(lengths).enumerate() {
                    let (own, later) = indices.split_at(usize::from(length));
                    let (own_coefficients, later_coefficients) =
                        coefficients.split_at(usize::from(length));
                    visit(row, own, own_coefficients, self.scale(v));
                    (indices, coefficients) = (later, later_coefficients);
                }
            }
        }
    }

    #[inline(always)]
    fn for_each_of<const S: usize, T>(
        self,
        rows: impl Iterator<Item = T>,
        mut visit: impl FnMut(T, &'a [u16], &'a [C], f32),
    ) {
        // Zipped, all of them are counted by one number.
        let rows = rows.zip(self.indices.as_chunks::<S>().0);
        let rows = rows.zip(self.coefficients.as_chunks::<S>().0);
        match self.scales {
            Some(exponents) => {
                for (((row, indices), coefficients), &exponent) in rows.zip(exponents) {
                    visit(row, indices, coefficients, power_of_two(exponent));
                }
            }
            None => {
                for ((row, indices), coefficients) in rows {
                    visit(row, indices, coefficients, 1.0);
                }
            }
        }
    }
}

/// Evaluates an expression with the nonzeros of a block, whose coefficients are then of one type.
macro_rules! with_nonzeros {
    ($block:ident, $nonzeros:ident => $evaluated:expr) => {
        match $block.coefficients {
            CoefficientSlices::I8 { values, scales } => {
                let $nonzeros = Nonzeros::new($block, values, Some(scales));
                $evaluated
            }
            CoefficientSlices::F8 { values, scales } => {
                let $nonzeros = Nonzeros::new($block, values, Some(scales));
                $evaluated
            }
            CoefficientSlices::F32(values) => {
                let $nonzeros = Nonzeros::new($block, values, None);
                $evaluated
            }
        }
    };
}

/// `out[t][g] = Σ_j c_j · p[i_j][g]` for the codes `t` of a block: `p` is `[MAX_ATOMS, group]`, `out`
/// `[n, group]`, the query group `group` a power of two up to [`MAX_QUERIES`](super::softmax::MAX_QUERIES).
pub(crate) fn scores(block: SparseBlock<'_>, p: &[f32], group: usize, out: &mut [f32]) {
    table::check(block.len(), group, out.len(), p.len());
    with_nonzeros!(block, nonzeros => {
        #[cfg(target_arch = "x86_64")]
        if level().has_avx512() && x86_64::takes(&nonzeros, group) {
            // SAFETY: AVX-512 is there, the kernel takes such codes, and the sizes are checked.
            return unsafe { x86_64::scores(nonzeros, p, out) };
        }
        dispatch!(scores(nonzeros, p, group, out))
    })
}

/// `u[i_j][g] += c_j · weights[t][g]` for the codes `t` of a block: `u` is `[MAX_ATOMS, group]`,
/// `weights` `[n, group]`, the query group `group` a power of two up to [`MAX_QUERIES`](super::softmax::MAX_QUERIES).
pub(crate) fn accumulate(block: SparseBlock<'_>, weights: &[f32], group: usize, u: &mut [f32]) {
    table::check(block.len(), group, weights.len(), u.len());
    with_nonzeros!(block, nonzeros => {
        #[cfg(target_arch = "x86_64")]
        if level().has_avx512() && x86_64::takes(&nonzeros, group) {
            // SAFETY: AVX-512 is there, the kernel takes such codes, and the sizes are checked.
            return unsafe { x86_64::accumulate(nonzeros, weights, u) };
        }
        dispatch!(accumulate(nonzeros, weights, group, u))
    })
}

/// `out_t = Σ_j c_j · atoms_{i_j}` for the codes `t` of a block: `atoms` is `[N, m]`, `out` `[n, m]`.
///
/// # Panics
/// Where `out` has not a row for each code, or a code names an atom that there is not.
pub(crate) fn rebuild(block: SparseBlock<'_>, atoms: Rows<'_>, m: usize, out: &mut [f32]) {
    assert!(m > 0, "vectors have numbers");
    assert_eq!(out.len(), block.len() * m, "a row a code");
    with_nonzeros!(block, nonzeros => with_numbers!(atoms, (atoms, units) => dispatch!(rebuild(nonzeros, atoms, units, m, out))));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::MAX_ATOMS;
    use crate::kernels::testing::{at_level, close, levels};

    proptest! {
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
            let mut number = || draw() as f32 / (1 << 23) as f32 - 1.0;
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
                Some(length) => Lengths::Fixed { length, count: lengths.len() },
                None => Lengths::Variable(&short),
            };
            let integers: Vec<i8> = bytes.iter().map(|&b| b as i8).collect();
            let coefficients = match kind {
                0 => CoefficientSlices::I8 { values: &integers, scales: &exponents },
                1 => CoefficientSlices::F8 { values: &bytes, scales: &exponents },
                _ => CoefficientSlices::F32(&floats),
            };
            let block = SparseBlock { indices: &indices, coefficients, lengths: lengths_of };
            let mut expected_scores = vec![0f64; lengths.len() * group];
            let mut expected_u = vec![0f64; ATOMS * group];
            let mut at = 0;
            for (t, &length) in lengths.iter().enumerate() {
                for j in at..at + length {
                    let c = match kind {
                        0 => f32::from(integers[j]),
                        1 => F8_VALUES[usize::from(bytes[j])],
                        _ => floats[j],
                    };
                    let scale = if kind < 2 { power_of_two(exponents[t]) } else { 1.0 };
                    let c = f64::from(c) * f64::from(scale);
                    for g in 0..group {
                        let (i, own) = (usize::from(indices[j]), t * group + g);
                        expected_scores[own] += c * f64::from(p[i * group + g]);
                        expected_u[i / STRIDE * group + g] += c * f64::from(weights[own]);
                    }
                }
                at += length;
            }
            let size = 2.0 * 448.0 * 32.0;
            for level in levels().map(Some).chain([None]) {
                let mut out = vec![f32::NAN; lengths.len() * group];
                let mut u = vec![0.0; MAX_ATOMS * group];
                // Rows of the table are rebuilt like any atoms.
                let mut rebuilt = vec![f32::NAN; lengths.len() * group];
                let mut run = || {
                    scores(block, &p, group, &mut out);
                    accumulate(block, &weights, group, &mut u);
                    rebuild(block, Rows::F32(&p), group, &mut rebuilt);
                };
                match level {
                    Some(level) => at_level(level, run),
                    // And what the program itself would choose.
                    None => run(),
                }
                for (&got, &want) in out.iter().chain(&rebuilt).zip(expected_scores.iter().chain(&expected_scores)) {
                    prop_assert!(close(got, want, size), "{:?}: {} for {}", level, got, want);
                }
                let rows = u.chunks_exact(group).step_by(STRIDE);
                for (&got, &want) in rows.flatten().zip(&expected_u) {
                    prop_assert!(close(got, want, size * lengths.len() as f64), "{:?}: {} for {}", level, got, want);
                }
            }
        }
    }
}
