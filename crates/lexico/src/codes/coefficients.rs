use float8::F8E4M3;

use crate::kernels::prefetch_first;
use crate::kernels::sparse::{CoefficientSlices, F8_VALUES};
use crate::tensor_file::numbers;

/// Format of coefficients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoefficientFormat {
    /// 8-bit integers and one scale a vector, a power of two in one byte (E8M0, as in the OCP
    /// Microscaling formats, 2023), the smallest that brings the vector's largest coefficient to at most 127.
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
}

impl CoefficientFormat {
    /// The name that options and files know it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::I8 => "i8",
            Self::F8 => "f8",
            Self::F32 => "f32",
        }
    }

    /// The bytes of a coefficient.
    pub fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::F8 => 1,
            Self::F32 => size_of::<f32>(),
        }
    }

    /// Returns whether every vector has a scale, of one byte.
    pub(super) fn is_scaled(self) -> bool {
        self != Self::F32
    }
}

/// FP8 E4M3's largest number.
const F8_LARGEST: f32 = 448.0;
/// The largest integer.
const I8_LARGEST: f32 = 127.0;
/// E8M0's bias: byte `b` stands for `2^(b − 127)`.
const SCALE_BIAS: i32 = 127;

/// Coefficients of some vectors in a row, and the scale of each vector where they are scaled.
#[derive(Debug, Clone)]
pub(super) struct Coefficients {
    values: Values,
    scales: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Values {
    I8(Vec<i8>),
    F8(Vec<u8>),
    F32(Vec<f32>),
}

impl Coefficients {
    pub(super) fn new(format: CoefficientFormat) -> Self {
        let values = match format {
            CoefficientFormat::I8 => Values::I8(Vec::new()),
            CoefficientFormat::F8 => Values::F8(Vec::new()),
            CoefficientFormat::F32 => Values::F32(Vec::new()),
        };
        Self {
            values,
            scales: Vec::new(),
        }
    }

    /// Takes little-endian coefficients and scales from outside.
    ///
    /// # Errors
    /// The part that is not finite, and the reason.
    pub(super) fn read(
        format: CoefficientFormat,
        bytes: Vec<u8>,
        scales: Vec<u8>,
    ) -> Result<Self, (&'static str, &'static str)> {
        let (values, finite) = match format {
            CoefficientFormat::I8 => {
                let values = bytes.into_iter().map(|c| c as i8);
                (Values::I8(values.collect()), true)
            }
            CoefficientFormat::F8 => {
                // E4M3 has one NaN a sign.
                let finite = bytes.iter().all(|b| b & 0x7f != 0x7f);
                (Values::F8(bytes), finite)
            }
            CoefficientFormat::F32 => {
                let values = numbers(&bytes, f32::from_le_bytes);
                let finite = values.iter().all(|c| c.is_finite());
                (Values::F32(values), finite)
            }
        };
        if !finite {
            return Err(("coefficients", "it holds a NaN or an infinity"));
        }
        // E8M0 has one NaN.
        if scales.contains(&0xff) {
            return Err(("scales", "it holds a NaN"));
        }
        Ok(Self { values, scales })
    }

    pub(super) fn push_vector(&mut self, coefficients: &[f32]) {
        match &mut self.values {
            Values::F32(values) => values.extend_from_slice(coefficients),
            Values::I8(values) => {
                let scaled = scaled(coefficients, I8_LARGEST, &mut self.scales);
                values.extend(scaled.map(|c| c.round_ties_even() as i8));
            }
            Values::F8(values) => {
                let scaled = scaled(coefficients, F8_LARGEST, &mut self.scales);
                values.extend(scaled.map(|c| F8E4M3::from_f32(c as f32).to_bits()));
            }
        }
    }

    pub(super) fn reserve_exact(&mut self, vectors: usize, nonzeros: usize) {
        match &mut self.values {
            Values::F32(values) => return values.reserve_exact(nonzeros),
            Values::I8(values) => values.reserve_exact(nonzeros),
            Values::F8(values) => values.reserve_exact(nonzeros),
        }
        self.scales.reserve_exact(vectors);
    }

    pub(super) fn drop_front(&mut self, vectors: usize, nonzeros: usize) {
        match &mut self.values {
            Values::F32(values) => return drop(values.drain(..nonzeros)),
            Values::I8(values) => drop(values.drain(..nonzeros)),
            Values::F8(values) => drop(values.drain(..nonzeros)),
        }
        self.scales.drain(..vectors);
    }

    /// Number of vectors whose scale fits what is allocated.
    pub(super) fn spare_vectors(&self) -> usize {
        match &self.values {
            Values::F32(_) => usize::MAX,
            Values::I8(_) | Values::F8(_) => self.scales.capacity() - self.scales.len(),
        }
    }

    /// Number of bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        let values = match &self.values {
            Values::F32(values) => values.capacity() * size_of::<f32>(),
            Values::I8(values) => values.capacity(),
            Values::F8(values) => values.capacity(),
        };
        values + self.scales.capacity()
    }

    /// Fetches the beginning into the caches.
    pub(super) fn prefetch(&self) {
        match &self.values {
            Values::F32(values) => return prefetch_first(values),
            Values::I8(values) => prefetch_first(values),
            Values::F8(values) => prefetch_first(values),
        }
        prefetch_first(&self.scales);
    }

    pub(super) fn slices(&self) -> CoefficientSlices<'_> {
        let scales = &self.scales;
        match &self.values {
            Values::F32(values) => CoefficientSlices::F32(values),
            Values::I8(values) => CoefficientSlices::I8 { values, scales },
            Values::F8(values) => CoefficientSlices::F8 { values, scales },
        }
    }

    /// Returns coefficient `nonzero`, which is of vector `v`.
    pub(super) fn get(&self, v: usize, nonzero: usize) -> f32 {
        let number = match &self.values {
            Values::F32(values) => return values[nonzero],
            Values::I8(values) => f64::from(values[nonzero]),
            Values::F8(values) => f64::from(F8_VALUES[usize::from(values[nonzero])]),
        };
        // The largest f32 may have been rounded up past f32's range.
        let c = number * scale_value(self.scales[v]);
        c.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
    }
}

/// Appends the coefficients, little-endian, and the scales of some vectors: what [`Coefficients::read`] takes.
pub(super) fn write(from: CoefficientSlices<'_>, bytes: &mut Vec<u8>, scales: &mut Vec<u8>) {
    match from {
        CoefficientSlices::I8 {
            values,
            scales: own,
        } => {
            bytes.extend(values.iter().map(|&c| c as u8));
            scales.extend_from_slice(own);
        }
        CoefficientSlices::F8 {
            values,
            scales: own,
        } => {
            bytes.extend_from_slice(values);
            scales.extend_from_slice(own);
        }
        CoefficientSlices::F32(values) => {
            bytes.extend(values.iter().flat_map(|c| c.to_le_bytes()));
        }
    }
}

/// Brings a vector's coefficients to `largest` at most by a scale, which is appended to `scales`.
fn scaled<'a>(
    coefficients: &'a [f32],
    largest: f32,
    scales: &mut Vec<u8>,
) -> impl Iterator<Item = f64> + use<'a> {
    let scale = scale_of(coefficients, largest);
    scales.push(scale);
    let inverse = 1.0 / scale_value(scale);
    coefficients.iter().map(move |&c| f64::from(c) * inverse)
}

/// `2^(byte − 127)`, in f64 where its inverse exists too.
fn scale_value(byte: u8) -> f64 {
    2f64.powi(i32::from(byte) - SCALE_BIAS)
}

/// Returns the smallest scale under which no coefficient is larger than `max`.
fn scale_of(coefficients: &[f32], max: f32) -> u8 {
    let largest = coefficients
        .iter()
        .fold(0f32, |largest, c| largest.max(c.abs()));
    if largest == 0.0 {
        return SCALE_BIAS as u8;
    }
    let ratio = f64::from(largest) / f64::from(max);
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
            let max = [
                (CoefficientFormat::F8, [c / 16.0, small / 16.0]),
                (CoefficientFormat::I8, [c / 126.0, c / 126.0]),
            ];
            for (format, max) in max {
                let mut stored = Coefficients::new(format);
                stored.push_vector(&[c, small]);
                let back = [stored.get(0, 0), stored.get(0, 1)];
                for ((back, c), max) in back.iter().zip([c, small]).zip(max) {
                    prop_assert!((back - c).abs() <= max.abs() * 1.0001, "{} came back as {}", c, back);
                }
            }
        }
    }

    #[test]
    fn kernels_read_bytes_as_fp8() {
        for (byte, value) in (0..=u8::MAX).zip(F8_VALUES) {
            let number = F8E4M3::from_bits(byte).to_f32();
            assert!(
                number == value || number.is_nan() && value.is_nan(),
                "{byte:#x}"
            );
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
