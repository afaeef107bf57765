use std::sync::LazyLock;

use float8::F8E4M3;

use super::{Block, Blocks, Lengths};
use crate::dictionary::CodebookSizes;

/// How coefficients are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoefficientFormat {
    /// 8-bit integers and one scale a vector, a power of two in one byte (E8M0, as in the OCP
    /// Microscaling formats, 2023), the smallest that brings the vector's largest coefficient to 127 at the most.
    /// All coefficients of a vector are rounded to steps of one size, below 1/63 of the largest.
    #[default]
    I8,
    /// FP8 E4M3 and one scale a vector as above. The scale brings the vector's largest coefficient under 448,
    /// FP8's largest number, so that no coefficient overflows; being a power of two it rounds
    /// nothing itself. Coefficients below 2⁻¹⁸ of the largest become zero. Takes as many bytes as integers, and keeps
    /// small coefficients better but large ones, which matter more, worse.
    F8,
    /// f32, for tests and comparison.
    F32,
    /// Not at all: codes have one atom of each group of a [`Codebooks`](crate::dictionary::Codebooks),
    /// whose atoms have lengths of their own, and one scale from 1 to 2 for their sum in steps of 2 %. The scale and the
    /// index in the first group take two bytes, every other index one.
    InAtoms(CodebookSizes),
}

/// FP8 E4M3's largest number.
const F8_LARGEST: f32 = 448.0;
/// The largest integer.
const I8_LARGEST: f32 = 127.0;
/// E8M0's bias: byte `b` stands for `2^(b − 127)`.
const SCALE_BIAS: i32 = 127;

#[derive(Debug, Clone)]
pub(super) enum Coefficients {
    I8 { values: Vec<i8>, scales: Vec<u8> },
    F8 { values: Vec<u8>, scales: Vec<u8> },
    F32(Vec<f32>),
}

impl Coefficients {
    pub(super) fn new(format: CoefficientFormat) -> Self {
        match format {
            CoefficientFormat::I8 => Self::I8 {
                values: Vec::new(),
                scales: Vec::new(),
            },
            CoefficientFormat::F8 => Self::F8 {
                values: Vec::new(),
                scales: Vec::new(),
            },
            // Codes without coefficients have pages of their own.
            CoefficientFormat::F32 | CoefficientFormat::InAtoms(_) => Self::F32(Vec::new()),
        }
    }

    pub(super) fn push_vector(&mut self, coefficients: &[f32]) {
        match self {
            Self::F32(values) => values.extend_from_slice(coefficients),
            Self::I8 { values, scales } => {
                let scale = scale_of(coefficients, I8_LARGEST);
                let inverse = 1.0 / scale_value(scale);
                let scaled = coefficients.iter().map(|&c| f64::from(c) * inverse);
                values.extend(scaled.map(|c| c.round_ties_even() as i8));
                scales.push(scale);
            }
            Self::F8 { values, scales } => {
                let scale = scale_of(coefficients, F8_LARGEST);
                let inverse = 1.0 / scale_value(scale);
                let scaled = coefficients
                    .iter()
                    .map(|&c| (f64::from(c) * inverse) as f32);
                values.extend(scaled.map(|c| F8E4M3::from_f32(c).to_bits()));
                scales.push(scale);
            }
        }
    }

    pub(super) fn reserve_exact(&mut self, vectors: usize, nonzeros: usize) {
        match self {
            Self::F32(values) => values.reserve_exact(nonzeros),
            Self::I8 { values, scales } => {
                values.reserve_exact(nonzeros);
                scales.reserve_exact(vectors);
            }
            Self::F8 { values, scales } => {
                values.reserve_exact(nonzeros);
                scales.reserve_exact(vectors);
            }
        }
    }

    pub(super) fn drop_front(&mut self, vectors: usize, nonzeros: usize) {
        match self {
            Self::F32(values) => drop(values.drain(..nonzeros)),
            Self::I8 { values, scales } => {
                values.drain(..nonzeros);
                scales.drain(..vectors);
            }
            Self::F8 { values, scales } => {
                values.drain(..nonzeros);
                scales.drain(..vectors);
            }
        }
    }

    /// What is not finite, and why, where anything is: of numbers from outside.
    pub(super) fn not_finite(&self) -> Option<(&'static str, &'static str)> {
        let (finite, scales): (bool, &[u8]) = match self {
            Self::F32(values) => (values.iter().all(|c| c.is_finite()), &[]),
            Self::I8 { scales, .. } => (true, scales),
            // E4M3 has one NaN a sign.
            Self::F8 { values, scales } => (values.iter().all(|b| b & 0x7f != 0x7f), scales),
        };
        if !finite {
            return Some(("coefficients", "it holds a NaN or an infinity"));
        }
        // E8M0 has one NaN.
        scales
            .contains(&0xff)
            .then_some(("scales", "it holds a NaN"))
    }

    /// Vectors whose scale fits what is allocated.
    pub(super) fn spare_vectors(&self) -> usize {
        match self {
            Self::F32(_) => usize::MAX,
            Self::I8 { scales, .. } | Self::F8 { scales, .. } => scales.capacity() - scales.len(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => values.capacity() * size_of::<f32>(),
            Self::I8 { values, scales } => values.capacity() + scales.capacity(),
            Self::F8 { values, scales } => values.capacity() + scales.capacity(),
        }
    }

    pub(super) fn bytes_used(&self) -> usize {
        match self {
            Self::F32(values) => values.len() * size_of::<f32>(),
            Self::I8 { values, scales } => values.len() + scales.len(),
            Self::F8 { values, scales } => values.len() + scales.len(),
        }
    }

    /// Fetches the beginning into the caches.
    pub(super) fn prefetch(&self) {
        match self {
            Self::F32(values) => crate::kernels::prefetch_first(values),
            Self::I8 { values, scales } => {
                crate::kernels::prefetch_first(values);
                crate::kernels::prefetch_first(scales);
            }
            Self::F8 { values, scales } => {
                crate::kernels::prefetch_first(values);
                crate::kernels::prefetch_first(scales);
            }
        }
    }

    /// The codes with these coefficients.
    pub(super) fn blocks<'a>(&'a self, indices: &'a [u16], lengths: Lengths<'a>) -> Blocks<'a> {
        match self {
            Self::F32(coefficients) => Blocks::F32(Block {
                indices,
                coefficients,
                scales: Scales::One,
                lengths,
                values: &F8_VALUES,
            }),
            Self::I8 { values, scales } => Blocks::I8(Block {
                indices,
                coefficients: values,
                scales: Scales::Powers(scales),
                lengths,
                values: &I8_VALUES,
            }),
            Self::F8 { values, scales } => Blocks::F8(Block {
                indices,
                coefficients: values,
                scales: Scales::Powers(scales),
                lengths,
                values: &F8_VALUES,
            }),
        }
    }

    /// Coefficient `nonzero`, of vector `v`.
    pub(super) fn get(&self, v: usize, nonzero: usize) -> f32 {
        let (number, scale) = match self {
            Self::F32(values) => return values[nonzero],
            Self::I8 { values, scales } => (f64::from(values[nonzero]), scales[v]),
            Self::F8 { values, scales } => {
                let number = F8_VALUES[usize::from(values[nonzero])];
                (f64::from(number), scales[v])
            }
        };
        // The largest f32 may have been rounded up past f32's range.
        let c = number * scale_value(scale);
        c.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
    }
}

/// What vectors' coefficients are multiplied by.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    /// Nothing.
    One,
    /// Powers of two, by their exponents.
    Powers(&'a [u8]),
}

impl Scales<'_> {
    #[inline(always)]
    pub(crate) fn get(self, v: usize) -> f32 {
        match self {
            Scales::One => 1.0,
            Scales::Powers(exponents) => Self::power(exponents[v]),
        }
    }

    /// The power of two of an exponent's byte.
    #[inline(always)]
    pub(crate) fn power(exponent: u8) -> f32 {
        // The byte is an f32's exponent field, but for the smallest power, a subnormal number.
        f32::from_bits(match exponent {
            0 => 1 << 22,
            exponent => u32::from(exponent) << 23,
        })
    }
}

/// The number that each FP8 byte stands for.
static F8_VALUES: LazyLock<[f32; 256]> =
    LazyLock::new(|| std::array::from_fn(|b| F8E4M3::from_bits(b as u8).to_f32()));

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

#[cfg(test)]
pub(crate) fn i8_values() -> &'static [f32; 256] {
    &I8_VALUES
}

#[cfg(test)]
pub(crate) fn f8_values() -> &'static [f32; 256] {
    &F8_VALUES
}

/// `2^(byte − 127)`, in f64 where its inverse exists too.
fn scale_value(byte: u8) -> f64 {
    2f64.powi(i32::from(byte) - SCALE_BIAS)
}

/// The smallest scale under which no coefficient is larger than `most`.
fn scale_of(coefficients: &[f32], most: f32) -> u8 {
    let largest = coefficients
        .iter()
        .fold(0f32, |largest, c| largest.max(c.abs()));
    if largest == 0.0 {
        return SCALE_BIAS as u8;
    }
    let ratio = f64::from(largest) / f64::from(most);
    // The exponent field of an f64 is the floor of its logarithm; round up unless it is exact.
    let floor = ((ratio.to_bits() >> 52) as i32) - 1023;
    let exact = ratio.to_bits() & ((1 << 52) - 1) == 0;
    let exponent = if exact { floor } else { floor + 1 };
    // 0xff is E8M0's NaN; f32's range ends before it, and below it only subnormals are lost.
    (exponent + SCALE_BIAS).clamp(0, 254) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn coefficients_keep_their_bits_at_any_size(mantissa in 1f32..2.0, exponent in -110i32..127, sign: bool) {
            let c = mantissa * 2f32.powi(exponent) * if sign { 1.0 } else { -1.0 };
            let small = c / 8.0;
            let most = [
                (CoefficientFormat::F8, [c / 16.0, small / 16.0]),
                (CoefficientFormat::I8, [c / 126.0, c / 126.0]),
            ];
            for (format, most) in most {
                let mut stored = Coefficients::new(format);
                stored.push_vector(&[c, small]);
                let back = [stored.get(0, 0), stored.get(0, 1)];
                for ((back, c), most) in back.iter().zip([c, small]).zip(most) {
                    prop_assert!((back - c).abs() <= most.abs() * 1.0001, "{} came back as {}", c, back);
                }
            }
        }
    }

    #[test]
    fn zeros_and_nothing_are_stored() {
        for format in [CoefficientFormat::F8, CoefficientFormat::I8] {
            let mut stored = Coefficients::new(format);
            stored.push_vector(&[0.0, -0.0]);
            stored.push_vector(&[]);
            assert_eq!([stored.get(0, 0), stored.get(0, 1)], [0.0, 0.0]);
        }
    }

    #[test]
    fn finite_extremes_come_back_finite() {
        for format in [CoefficientFormat::F8, CoefficientFormat::I8] {
            for c in [f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45] {
                let mut stored = Coefficients::new(format);
                stored.push_vector(&[c]);
                let back = stored.get(0, 0);
                assert!(back.is_finite(), "{c} came back as {back}");
            }
        }
    }
}
