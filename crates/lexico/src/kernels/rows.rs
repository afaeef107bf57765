//! Rows of numbers in one of three precisions, and what is done with them in f32.

use half::f16;

use super::vector::{add_scaled, dot, subtract_scaled, widen};

/// A number of a row.
pub(crate) trait Number: Copy {
    /// The number in f32, of those that are finite.
    fn widen(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Number for f16 {
    /// Exact, and by whole registers at every level: `half` asks for instructions number by number.
    #[inline(always)]
    fn widen(self) -> f32 {
        /// `2¹¹²`: what the exponents' biases differ by.
        const BIAS: f32 = f32::from_bits((112 + 127) << 23);
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * BIAS;
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }
}

impl Number for i8 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
}

/// Rows of numbers, `[n, m]`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    /// Multiples of a unit of each row's own, of which f32 holds every one exactly.
    I8 {
        numbers: &'a [i8],
        units: &'a [f32],
    },
}

/// Does `$use` with the numbers of rows of any kind, and the rows' units, of which there are none where all are 1; see [`unit`].
macro_rules! with_numbers {
    ($rows:expr, ($numbers:ident, $units:ident) => $use:expr) => {
        match $rows {
            $crate::kernels::rows::Rows::F32($numbers) => {
                let $units: &[f32] = &[];
                $use
            }
            $crate::kernels::rows::Rows::F16($numbers) => {
                let $units: &[f32] = &[];
                $use
            }
            $crate::kernels::rows::Rows::I8 {
                numbers: $numbers,
                units: $units,
            } => $use,
        }
    };
}

/// The unit of row `i`.
#[inline(always)]
pub(crate) fn unit(units: &[f32], i: usize) -> f32 {
    units.get(i).copied().unwrap_or(1.0)
}
pub(crate) use with_numbers;

impl<'a> Rows<'a> {
    /// How many numbers.
    pub(crate) fn len(self) -> usize {
        with_numbers!(self, (numbers, _units) => numbers.len())
    }

    /// `count` rows of length `m` from row `first` on.
    pub(crate) fn part(self, first: usize, count: usize, m: usize) -> Self {
        let range = first * m..(first + count) * m;
        match self {
            Self::F32(numbers) => Self::F32(&numbers[range]),
            Self::F16(numbers) => Self::F16(&numbers[range]),
            Self::I8 { numbers, units } => Self::I8 {
                numbers: &numbers[range],
                units: &units[first..first + count],
            },
        }
    }

    /// Row `i` of those of length `m`.
    pub(crate) fn row(self, i: usize, m: usize) -> Self {
        self.part(i, 1, m)
    }

    /// `⟨row, x⟩`, of one row.
    pub(crate) fn dot(self, x: &[f32]) -> f32 {
        with_numbers!(self, (row, units) => unit(units, 0) * dot(row, x))
    }

    /// `x += scale · row`, of one row.
    pub(crate) fn add_scaled_to(self, scale: f32, x: &mut [f32]) {
        with_numbers!(self, (row, units) => add_scaled(x, scale * unit(units, 0), row));
    }

    /// `x -= scale · row` in f64, of one row.
    pub(crate) fn subtract_scaled_from(self, scale: f32, x: &mut [f64]) {
        with_numbers!(self, (row, units) => {
            subtract_scaled(x, f64::from(scale) * f64::from(unit(units, 0)), row);
        });
    }

    /// The numbers of rows of length `m` in f32, written to `out`.
    ///
    /// # Panics
    /// Where `out` has another length.
    pub(crate) fn widen_to(self, m: usize, out: &mut [f32]) {
        assert_eq!(self.len(), out.len(), "a place for each number");
        match self {
            Self::F32(numbers) => out.copy_from_slice(numbers),
            Self::F16(numbers) => widen(numbers, 1.0, out),
            Self::I8 { numbers, units } => {
                let rows = numbers.chunks_exact(m).zip(out.chunks_exact_mut(m));
                for ((row, out), &unit) in rows.zip(units) {
                    widen(row, unit, out);
                }
            }
        }
    }

    /// The numbers of rows of length `m` in f32: where they lie, or widened in `room`.
    pub(crate) fn widened(self, m: usize, room: &'a mut Vec<f32>) -> &'a [f32] {
        if let Self::F32(numbers) = self {
            return numbers;
        }
        room.resize(self.len(), 0.0);
        self.widen_to(m, room);
        room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_number_is_widened_exactly() {
        let finite = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite());
        for x in finite {
            let (wide, want) = (x.widen(), x.to_f32());
            assert_eq!(wide.to_bits(), want.to_bits(), "{x:?}");
        }
    }
}
