//! Asymmetric uniform quantisation: the codes of a group of numbers are equally far apart from its smallest to its
//! largest.

use half::f16;

use super::bits::{PackedRows, grow, row_bytes};

/// The numbers that the codes of a group stand for: `zero + code·scale`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    zero: f16,
    scale: f16,
}

impl Grid {
    /// Of `bits` bits from `least` to `most`, of which both are within what f16 holds.
    fn between((least, most): (f32, f32), bits: u32) -> Self {
        let zero = f16::from_f32(least);
        let scale = (most - zero.to_f32()).max(0.0) / max_code(bits);
        Self {
            zero,
            scale: f16::from_f32(scale.min(f16::MAX.to_f32())),
        }
    }

    /// Of the smallest and largest of a group's numbers.
    pub(super) fn of(numbers: impl Iterator<Item = f32>, bits: u32) -> Self {
        let ends = numbers.fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), x| {
            (least.min(x), most.max(x))
        });
        Self::between(ends, bits)
    }

    /// The code nearest to `x`.
    pub(super) fn code(self, x: f32, bits: u32) -> u8 {
        let scale = self.scale.to_f32();
        if scale == 0.0 {
            return 0;
        }
        let steps = (x - self.zero.to_f32()) / scale;
        steps.round_ties_even().clamp(0.0, max_code(bits)) as u8
    }

    /// What a code stands for.
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

/// A growing list of vectors, each in groups of neighbouring channels.
#[derive(Debug)]
pub(super) struct ByToken {
    codes: PackedRows,
    /// `[n, groups]`
    grids: Vec<Grid>,
    /// Channels in a group; the last one may have fewer.
    group: usize,
}

impl ByToken {
    pub(super) fn new(bits: u32, head_dim: usize, group: usize) -> Self {
        Self {
            codes: PackedRows::new(bits, head_dim),
            grids: Vec::new(),
            group,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.codes.len()
    }

    /// Appends vectors `[n, m]`.
    pub(super) fn extend(&mut self, vectors: &[f32]) {
        let (bits, m) = (self.codes.bits(), self.codes.width());
        let groups = m.div_ceil(self.group);
        grow(&mut self.grids, vectors.len() / m * groups, groups);
        let mut codes = Vec::with_capacity(vectors.len());
        for vector in vectors.chunks_exact(m) {
            for group in vector.chunks(self.group) {
                let grid = Grid::of(group.iter().map(|&x| held(x)), bits);
                codes.extend(group.iter().map(|&x| grid.code(held(x), bits)));
                self.grids.push(grid);
            }
        }
        self.codes.extend(&codes);
    }

    /// Appends `count` vectors from `first` on to `out`.
    pub(super) fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let m = self.codes.width();
        let groups = m.div_ceil(self.group);
        let mut codes = vec![0; m];
        for row in first..first + count {
            self.codes.read(row, &mut codes);
            let grids = &self.grids[row * groups..(row + 1) * groups];
            for (codes, grid) in codes.chunks(self.group).zip(grids) {
                out.extend(codes.iter().map(|&code| grid.number(code)));
            }
        }
    }

    /// Drops the `count` oldest vectors.
    pub(super) fn drop_front(&mut self, count: usize) {
        let groups = self.codes.width().div_ceil(self.group);
        self.codes.drop_front(count);
        self.grids.drain(..count * groups);
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        self.codes.bytes() + self.grids.capacity() * size_of::<Grid>()
    }

    /// Bytes of a vector.
    pub(super) fn bytes_each(bits: u32, head_dim: usize, group: usize) -> usize {
        row_bytes(bits, head_dim) + head_dim.div_ceil(group) * size_of::<Grid>()
    }
}

/// A growing list of vectors, each channel in groups of neighbouring positions.
#[derive(Debug)]
pub(super) struct ByChannel {
    codes: PackedRows,
    /// `[groups, m]`
    grids: Vec<Grid>,
    /// Positions in a group.
    group: usize,
}

impl ByChannel {
    pub(super) fn new(bits: u32, head_dim: usize, group: usize) -> Self {
        Self {
            codes: PackedRows::new(bits, head_dim),
            grids: Vec::new(),
            group,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.codes.len()
    }

    /// Appends whole groups of vectors, `[n, m]`.
    pub(super) fn extend(&mut self, vectors: &[f32]) {
        let (bits, m) = (self.codes.bits(), self.codes.width());
        grow(&mut self.grids, vectors.len() / self.group, 0);
        let mut codes = Vec::with_capacity(vectors.len());
        for group in vectors.chunks_exact(self.group * m) {
            let first = self.grids.len();
            self.grids.extend((0..m).map(|channel| {
                let numbers = group.iter().skip(channel).step_by(m);
                Grid::of(numbers.map(|&x| held(x)), bits)
            }));
            for vector in group.chunks_exact(m) {
                let numbers = vector.iter().zip(&self.grids[first..]);
                codes.extend(numbers.map(|(&x, grid)| grid.code(held(x), bits)));
            }
        }
        self.codes.extend(&codes);
    }

    /// Appends `count` vectors from `first` on to `out`.
    pub(super) fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let m = self.codes.width();
        let mut codes = vec![0; m];
        for row in first..first + count {
            self.codes.read(row, &mut codes);
            let grids = &self.grids[row / self.group * m..][..m];
            out.extend(codes.iter().zip(grids).map(|(&c, grid)| grid.number(c)));
        }
    }

    /// Drops the `count` oldest vectors, whole groups of them.
    pub(super) fn drop_front(&mut self, count: usize) {
        self.codes.drop_front(count);
        self.grids.drain(..count / self.group * self.codes.width());
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        self.codes.bytes() + self.grids.capacity() * size_of::<Grid>()
    }

    /// Bytes of so many vectors, in whole groups.
    pub(super) fn bytes_of(positions: usize, bits: u32, head_dim: usize, group: usize) -> usize {
        positions * row_bytes(bits, head_dim) + positions / group * head_dim * size_of::<Grid>()
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
            let mut rows = ByToken::new(bits, m, group);
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
            let mut rows = ByChannel::new(bits, m, group);
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
            let (mut by_token, mut by_channel) = (ByToken::new(bits, m, group), ByChannel::new(bits, m, group));
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
            let mut rows = ByToken::new(2, 5, 3);
            rows.extend(&[x; 5]);
            let mut back = Vec::new();
            rows.read(0, 1, &mut back);
            assert_eq!(back, [f16::from_f32(x).to_f32(); 5], "{x}");
        }
        let mut rows = ByToken::new(8, 2, 2);
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
            let mut rows = ByToken::new(bits, 64, 32);
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
