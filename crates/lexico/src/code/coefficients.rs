use std::sync::LazyLock;

use float8::F8E4M3;

use super::{Block, Blocks, Lengths};

/// How coefficients are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoefficientFormat {
    /// FP8 E4M3 and one scale a vector, a power of two in one byte (E8M0, as in the OCP
    /// Microscaling formats, 2023). The scale brings the vector's largest coefficient under 448,
    /// FP8's largest number, so that no coefficient overflows; being a power of two it rounds
    /// nothing itself. Coefficients below 2⁻¹⁸ of the largest become zero.
    #[default]
    F8,
    /// f32, for tests and comparison.
    F32,
}

/// FP8 E4M3's largest number.
const F8_LARGEST: f32 = 448.0;
/// E8M0's bias: byte `b` stands for `2^(b − 127)`.
const SCALE_BIAS: i32 = 127;

#[derive(Debug, Clone)]
pub(super) enum Coefficients {
    F8 { values: Vec<u8>, scales: Vec<u8> },
    F32(Vec<f32>),
}

impl Coefficients {
    pub(super) fn new(format: CoefficientFormat) -> Self {
        match format {
            CoefficientFormat::F8 => Self::F8 {
                values: Vec::new(),
                scales: Vec::new(),
            },
            CoefficientFormat::F32 => Self::F32(Vec::new()),
        }
    }

    pub(super) fn push_vector(&mut self, coefficients: &[f32]) {
        match self {
            Self::F32(values) => values.extend_from_slice(coefficients),
            Self::F8 { values, scales } => {
                let scale = scale_of(coefficients);
                let inverse = 1.0 / scale_value(scale);
                let scaled = coefficients
                    .iter()
                    .map(|&c| (f64::from(c) * inverse) as f32);
                values.extend(scaled.map(|c| F8E4M3::from_f32(c).to_bits()));
                scales.push(scale);
            }
        }
    }

    pub(super) fn push_zeros(&mut self, count: usize) {
        match self {
            Self::F32(values) => values.extend(std::iter::repeat_n(0.0, count)),
            Self::F8 { values, .. } => values.extend(std::iter::repeat_n(0, count)),
        }
    }

    pub(super) fn reserve_exact(&mut self, vectors: usize, nonzeros: usize) {
        match self {
            Self::F32(values) => values.reserve_exact(nonzeros),
            Self::F8 { values, scales } => {
                values.reserve_exact(nonzeros);
                scales.reserve_exact(vectors);
            }
        }
    }

    pub(super) fn drop_front(&mut self, vectors: usize, nonzeros: usize) {
        match self {
            Self::F32(values) => drop(values.drain(..nonzeros)),
            Self::F8 { values, scales } => {
                values.drain(..nonzeros);
                scales.drain(..vectors);
            }
        }
    }

    /// Vectors whose scale fits what is allocated.
    pub(super) fn spare_vectors(&self) -> usize {
        match self {
            Self::F32(_) => usize::MAX,
            Self::F8 { scales, .. } => scales.capacity() - scales.len(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => values.capacity() * size_of::<f32>(),
            Self::F8 { values, scales } => values.capacity() + scales.capacity(),
        }
    }

    pub(super) fn bytes_used(&self) -> usize {
        match self {
            Self::F32(values) => values.len() * size_of::<f32>(),
            Self::F8 { values, scales } => values.len() + scales.len(),
        }
    }

    /// Fetches the beginning into the caches.
    pub(super) fn prefetch(&self) {
        match self {
            Self::F32(values) => crate::arch::prefetch_first(values),
            Self::F8 { values, scales } => {
                crate::arch::prefetch_first(values);
                crate::arch::prefetch_first(scales);
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
        match self {
            Self::F32(values) => values[nonzero],
            Self::F8 { values, scales } => {
                // FP8 may round the largest f32 up past f32's range.
                let c = f64::from(F8_VALUES[usize::from(values[nonzero])]) * scale_value(scales[v]);
                c.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
            }
        }
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

#[cfg(test)]
pub(crate) fn f8_values() -> &'static [f32; 256] {
    &F8_VALUES
}

/// `2^(byte − 127)`, in f64 where its inverse exists too.
fn scale_value(byte: u8) -> f64 {
    2f64.powi(i32::from(byte) - SCALE_BIAS)
}

/// The smallest scale under which the largest coefficient is at most 448.
fn scale_of(coefficients: &[f32]) -> u8 {
    let largest = coefficients
        .iter()
        .fold(0f32, |largest, c| largest.max(c.abs()));
    if largest == 0.0 {
        return SCALE_BIAS as u8;
    }
    let ratio = f64::from(largest) / f64::from(F8_LARGEST);
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
        fn the_largest_coefficient_keeps_three_bits_at_any_size(mantissa in 1f32..2.0, exponent in -110i32..127, sign: bool) {
            let c = mantissa * 2f32.powi(exponent) * if sign { 1.0 } else { -1.0 };
            let mut stored = Coefficients::new(CoefficientFormat::F8);
            stored.push_vector(&[c, c / 8.0]);
            let back = [stored.get(0, 0), stored.get(0, 1)];
            for (back, c) in back.iter().zip([c, c / 8.0]) {
                prop_assert!((back - c).abs() <= c.abs() / 16.0, "{} came back as {}", c, back);
            }
        }
    }

    #[test]
    fn zeros_and_nothing_are_stored() {
        let mut stored = Coefficients::new(CoefficientFormat::F8);
        stored.push_vector(&[0.0, -0.0]);
        stored.push_vector(&[]);
        assert_eq!([stored.get(0, 0), stored.get(0, 1)], [0.0, 0.0]);
    }

    #[test]
    fn finite_extremes_come_back_finite() {
        for c in [f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45] {
            let mut stored = Coefficients::new(CoefficientFormat::F8);
            stored.push_vector(&[c]);
            let back = stored.get(0, 0);
            assert!(back.is_finite(), "{c} came back as {back}");
        }
    }
}
