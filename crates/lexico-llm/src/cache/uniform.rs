//! Asymmetric uniform quantisation: the codes of a group of numbers are equally far apart from its smallest to its
//! largest.

use half::f16;

use super::bits::{PackedRows, grow, row_bytes};
use super::stored::CodedVectors;

/// The numbers that the codes of a group stand for: `zero + code·scale`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    zero: f16,
    scale: f16,
}

impl Grid {
    /// Grid of `bits` bits from `min` to `max`, both within what f16 holds.
    fn between((min, max): (f32, f32), bits: u32) -> Self {
        let zero = f16::from_f32(min);
        let scale = (max - zero.to_f32()).max(0.0) / max_code(bits);
        Self {
            zero,
            scale: f16::from_f32(scale.min(f16::MAX.to_f32())),
        }
    }

    /// Grid from the smallest to the largest of a group's numbers.
    pub(super) fn of(numbers: impl Iterator<Item = f32>, bits: u32) -> Self {
        let ends = numbers.fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), x| {
            (min.min(x), max.max(x))
        });
        Self::between(ends, bits)
    }

    /// Returns the code nearest to `x`.
    pub(super) fn code(self, x: f32, bits: u32) -> u8 {
        let scale = self.scale.to_f32();
        if scale == 0.0 {
            return 0;
        }
        let steps = (x - self.zero.to_f32()) / scale;
        steps.round_ties_even().clamp(0.0, max_code(bits)) as u8
    }

    /// Returns the number that a code stands for.
    pub(super) fn number(self, code: u8) -> f32 {
        self.zero.to_f32() + f32::from(code) * self.scale.to_f32()
    }
}

fn max_code(bits: u32) -> f32 {
    ((1u32 << bits) - 1) as f32
}

/// `x` within what f16 holds, as dense positions are held.
pub(super) fn held(x: f32) -> f32 {
    x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())
}

/// Neighbouring numbers that share a grid.
#[derive(Debug, Clone, Copy)]
pub(super) enum Block {
    /// Channels of one vector; the last block may have fewer.
    Channels(usize),
    /// One channel of so many positions.
    Positions(usize),
}

impl Block {
    /// Number of positions, and of channels.
    fn shape(self) -> (usize, usize) {
        match self {
            Self::Channels(count) => (1, count),
            Self::Positions(count) => (count, 1),
        }
    }
}

/// A growing list of vectors, quantised block by block.
#[derive(Debug)]
pub(super) struct Quantised {
    codes: PackedRows,
    /// `[n / positions, m / channels]` of a block.
    grids: Vec<Grid>,
    block: Block,
}

impl Quantised {
    pub(super) fn new(bits: u32, head_dim: usize, block: Block) -> Self {
        Self {
            codes: PackedRows::new(bits, head_dim),
            grids: Vec::new(),
            block,
        }
    }

    /// Bytes of `count` vectors, in whole blocks.
    pub(super) fn bytes_of(count: usize, bits: u32, head_dim: usize, block: Block) -> usize {
        let (positions, channels) = block.shape();
        let grids = count / positions * head_dim.div_ceil(channels);
        count * row_bytes(bits, head_dim) + grids * size_of::<Grid>()
    }

    /// Number of grids of a vector.
    fn row_grids(&self) -> usize {
        self.codes.width.div_ceil(self.block.shape().1)
    }
}

impl CodedVectors for Quantised {
    fn empty(&self) -> Self {
        Self::new(self.codes.bits, self.codes.width, self.block)
    }

    fn len(&self) -> usize {
        self.codes.len()
    }

    /// Appends vectors, `[n, m]`, in whole blocks.
    fn extend(&mut self, vectors: &[f32]) {
        let (bits, m) = (self.codes.bits, self.codes.width);
        let ((positions, channels), each) = (self.block.shape(), self.row_grids());
        let room = if positions == 1 { each } else { 0 };
        grow(&mut self.grids, vectors.len() / m / positions * each, room);
        let mut codes = Vec::with_capacity(vectors.len());
        for vectors in vectors.chunks_exact(positions * m) {
            let first = self.grids.len();
            self.grids.extend((0..m).step_by(channels).map(|channel| {
                let own = channel..m.min(channel + channels);
                let numbers = vectors.chunks_exact(m).flat_map(|x| &x[own.clone()]);
                Grid::of(numbers.map(|&x| held(x)), bits)
            }));
            for vector in vectors.chunks_exact(m) {
                for (numbers, grid) in vector.chunks(channels).zip(&self.grids[first..]) {
                    codes.extend(numbers.iter().map(|&x| grid.code(held(x), bits)));
                }
            }
        }
        self.codes.extend(&codes);
    }

    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let ((positions, channels), each) = (self.block.shape(), self.row_grids());
        let mut codes = vec![0; self.codes.width];
        for row in first..first + count {
            self.codes.read(row, &mut codes);
            let grids = &self.grids[row / positions * each..][..each];
            if channels == 1 {
                out.extend(codes.iter().zip(grids).map(|(&c, grid)| grid.number(c)));
                continue;
            }
            for (codes, grid) in codes.chunks(channels).zip(grids) {
                out.extend(codes.iter().map(|&code| grid.number(code)));
            }
        }
    }

    /// Drops the `count` oldest vectors, whole blocks of them.
    fn drop_front(&mut self, count: usize) {
        self.codes.drop_front(count);
        let grids = count / self.block.shape().0 * self.row_grids();
        self.grids.drain(..grids);
    }

    fn bytes(&self) -> usize {
        self.codes.bytes() + self.grids.capacity() * size_of::<Grid>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::super::turboquant::gaussian;
    use super::*;

    /// No number is further off than half a step, but for what f16 rounds of the smallest number and the scale.
    fn check(numbers: &[f32], back: &[f32], bits: u32) -> Result<(), TestCaseError> {
        let least = numbers.iter().copied().fold(f32::INFINITY, f32::min);
        let most = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let levels = max_code(bits);
        let rounded = (least.abs() + (most - least)) / 2048.0 + levels * 2f32.powi(-24);
        let bound = ((most - least) / levels / 2.0 + rounded) * 1.001;
        for (x, back) in numbers.iter().zip(back) {
            prop_assert!(
                (x - back).abs() <= bound,
                "{x} became {back}, bound {bound}"
            );
        }
        Ok(())
    }

    fn vectors() -> impl Strategy<Value = (u32, usize, usize, Vec<f32>)> {
        let bits = prop::sample::select(vec![2u32, 3, 4, 8]);
        (bits, 1usize..70, 1usize..40, 1usize..4, -6i32..5).prop_flat_map(
            |(bits, m, group, groups, size)| {
                let size = 10f32.powi(size);
                let number = prop_oneof![4 => -size..size, 1 => Just(0.0), 1 => Just(size)];
                let numbers = vec(number, m * group * groups);
                (Just(bits), Just(m), Just(group), numbers)
            },
        )
    }

    proptest! {
        #[test]
        fn by_token_errs_by_half_a_step((bits, m, group, numbers) in vectors()) {
            let mut rows = Quantised::new(bits, m, Block::Channels(group));
            rows.extend(&numbers);
            let mut back = Vec::new();
            rows.read(0, numbers.len() / m, &mut back);
            for (numbers, back) in numbers.chunks(m).zip(back.chunks(m)) {
                for (numbers, back) in numbers.chunks(group).zip(back.chunks(group)) {
                    check(numbers, back, bits)?;
                }
            }
        }

        #[test]
        fn by_channel_errs_by_half_a_step((bits, m, group, numbers) in vectors()) {
            let mut rows = Quantised::new(bits, m, Block::Positions(group));
            rows.extend(&numbers);
            let mut back = Vec::new();
            rows.read(0, numbers.len() / m, &mut back);
            for (numbers, back) in numbers.chunks(m * group).zip(back.chunks(m * group)) {
                for channel in 0..m {
                    let own = |x: &[f32]| x.iter().skip(channel).step_by(m).copied().collect::<Vec<_>>();
                    check(&own(numbers), &own(back), bits)?;
                }
            }
        }

        #[test]
        fn dropping_leaves_the_rest((bits, m, group, numbers) in vectors(), dropped in 0usize..4) {
            let positions = numbers.len() / m;
            let (mut by_token, mut by_channel) = (Quantised::new(bits, m, Block::Channels(group)), Quantised::new(bits, m, Block::Positions(group)));
            by_token.extend(&numbers);
            by_channel.extend(&numbers);
            let dropped = (dropped * group).min(positions);
            let (mut before, mut after) = (Vec::new(), Vec::new());
            by_token.read(dropped, positions - dropped, &mut before);
            by_channel.read(dropped, positions - dropped, &mut before);
            by_token.drop_front(dropped);
            by_channel.drop_front(dropped);
            prop_assert_eq!((by_token.len(), by_channel.len()), (positions - dropped, positions - dropped));
            by_token.read(0, positions - dropped, &mut after);
            by_channel.read(0, positions - dropped, &mut after);
            prop_assert_eq!(before, after);
        }
    }

    #[test]
    fn constants_and_numbers_beyond_f16() {
        for x in [0.0, 0.3, -7.25, 1e-9, 65504.0] {
            let mut rows = Quantised::new(2, 5, Block::Channels(3));
            rows.extend(&[x; 5]);
            let mut back = Vec::new();
            rows.read(0, 1, &mut back);
            assert_eq!(back, [f16::from_f32(x).to_f32(); 5], "{x}");
        }
        let mut rows = Quantised::new(8, 2, Block::Channels(2));
        rows.extend(&[-3e38, 3e38]);
        let mut back = Vec::new();
        rows.read(0, 1, &mut back);
        assert!((back[0] + 65504.0).abs() < 1.0 && (back[1] / 65504.0 - 1.0).abs() < 1e-3);
    }

    /// Mean squared error on Gaussian numbers in groups of 32, in f64 throughout:
    ///
    /// ```python
    /// import numpy as np
    /// rng = np.random.default_rng(0)
    /// x = rng.standard_normal((1_000_000, 32))
    /// least = x.min(1, keepdims=True)
    /// for bits in (2, 3, 4, 8):
    ///     scale = (x.max(1, keepdims=True) - least) / (2**bits - 1)
    ///     print(bits, np.mean((least + np.round((x - least) / scale) * scale - x) ** 2))
    /// ```
    #[test]
    fn errors_on_gaussian_numbers() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let numbers: Vec<f32> = (0..20_000 * 32)
            .map(|_| gaussian(&mut rng) as f32)
            .collect();
        for (bits, expected) in NUMPY {
            let mut rows = Quantised::new(bits, 64, Block::Channels(32));
            rows.extend(&numbers);
            let mut back = Vec::new();
            rows.read(0, numbers.len() / 64, &mut back);
            let squares = numbers.iter().zip(&back);
            let sum: f64 = squares.map(|(x, y)| f64::from(x - y).powi(2)).sum();
            let error = sum / numbers.len() as f64;
            assert!(
                (error / expected - 1.0).abs() < 0.01,
                "{bits} bits: {error}"
            );
        }
    }

    const NUMPY: [(u32, f64); 4] = [
        (2, 0.1544111),
        (3, 0.02813438),
        (4, 0.006117024),
        (8, 2.117095e-5),
    ];
}
