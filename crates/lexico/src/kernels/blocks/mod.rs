//! Products of rows of activations with a matrix in ggml's block types, the weights of a GGUF file.
//!
//! The activations are rounded to 8-bit integers, 32 with a scale each, as llama.cpp does, so that the inner loop
//! multiplies and adds integers. The matrix is laid out anew for that, without loss: sixteen rows side by side, four
//! neighbouring columns of each in one lane of 32 bits, so that a lane's sum is a row's and nothing is summed across
//! lanes. Scales are unpacked to bytes.

/// The product for processors that have some features.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! level {
    ($module:ident, $lanes:ty, $features:literal) => {
        pub(super) mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(in super::super) fn multiply(
                matrix: &BlockMatrix,
                groups: Range<usize>,
                x: &Panel,
                out: &mut [f32],
                stride: usize,
            ) {
                // SAFETY: the features are enabled; the family's `mod.rs` checks the sizes.
                unsafe { multiply_with::<$lanes>(matrix, groups, x, out, stride) }
            }
        }
    };
}

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod layout;
mod pack;
mod panel;
mod portable;
mod product;
mod types;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::ops::Range;

use super::dispatch;
#[cfg(target_arch = "aarch64")]
use aarch64::{dot_product, neon};
pub use layout::BlockMatrix;
pub use panel::Panel;
pub use types::BlockType;
#[cfg(target_arch = "x86_64")]
use x86_64::{avx_vnni, avx2, avx512, avx512 as amx};

/// Rows of a matrix that lie side by side.
pub const GROUP: usize = 16;
/// Columns that share a scale of the activations.
const UNIT: usize = 32;
/// Columns of a row in one lane.
const STEP: usize = 4;
/// Steps in a unit.
const STEPS: usize = UNIT / STEP;
/// Bytes of a vector of sixteen lanes.
const LINE: usize = GROUP * STEP;

impl BlockMatrix {
    /// Products of a panel's rows with some groups of [`GROUP`] rows of this matrix: row `r` of the panel by row `i`
    /// of these groups at `out[r * stride + i]`.
    ///
    /// O(rows × columns) for each of the panel's rows.
    ///
    /// # Panics
    /// Where the panel has other columns, there is no such group, or `out` is too short.
    pub fn multiply(&self, groups: Range<usize>, x: &Panel, out: &mut [f32], stride: usize) {
        assert_eq!(x.columns(), self.columns(), "as many columns");
        assert!(groups.end <= self.groups(), "groups that are there");
        let rows = self.rows_of(&groups).len();
        assert!(x.rows() == 1 || rows <= stride, "rows of the result apart");
        assert!(
            rows == 0 || (x.rows() - 1) * stride + rows <= out.len(),
            "room for the result"
        );
        dispatch!(multiply(self, groups, x, out, stride));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::{at_level, levels};

    /// Bytes of blocks whose scales are sound numbers.
    fn drawn_blocks(kind: BlockType, count: usize, seed: u32) -> Vec<u8> {
        let mut state = u64::from(seed) | 1;
        let mut draw = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut bytes: Vec<u8> = (0..count * kind.bytes()).map(|_| draw() as u8).collect();
        for block in bytes.chunks_exact_mut(kind.bytes()) {
            for &at in kind.float_places() {
                let number = half::f16::from_f32((draw() % 2001) as f32 / 1000.0 - 1.0);
                block[at..at + 2].copy_from_slice(&number.to_le_bytes());
            }
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// The plain sum in f64 of the numbers that the blocks stand for and the activations as they are rounded.
        #[test]
        fn products_agree_with_f64(
            kind in prop::sample::select(BlockType::ALL.to_vec()),
            rows in 1usize..40, blocks in 1usize..4, m in 1usize..=Panel::ROWS, seed: u32, size in 0.01f32..100.0,
        ) {
            let columns = blocks * kind.numbers();
            let bytes = drawn_blocks(kind, rows * blocks, seed);
            let matrix = BlockMatrix::from_blocks(kind, rows, columns, &bytes);
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                size * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
            };
            let x: Vec<f32> = (0..m * columns).map(|_| draw()).collect();
            for level in levels() {
                at_level(level, || {
                    let panel = Panel::new(&x, columns);
                    let mut out = vec![f32::NAN; m * rows];
                    matrix.multiply(0..matrix.groups(), &panel, &mut out, rows);
                    let mut weights = vec![0.0; columns];
                    for i in 0..rows {
                        matrix.read_row(i, &mut weights);
                        for r in 0..m {
                            let x = &x[r * columns..][..columns];
                            let (mut exact, mut largest, mut halves) = (0.0, 0.0, 0.0);
                            for (x, w) in x.chunks_exact(UNIT).zip(weights.chunks_exact(UNIT)) {
                                let peak = x.iter().fold(0f32, |peak, x| peak.max(x.abs()));
                                let scale = f64::from(peak) / 127.0;
                                for (&x, &w) in x.iter().zip(w) {
                                    let multiple = f64::from(x) / scale;
                                    exact += multiple.round_ties_even() * scale * f64::from(w);
                                    if (multiple.fract().abs() - 0.5).abs() < 1e-4 {
                                        halves += scale * f64::from(w.abs());
                                    }
                                    largest += f64::from(peak * w.abs());
                                }
                            }
                            let found = f64::from(out[r * rows + i]);
                            // A number just at a half may be rounded the other way.
                            let close = (found - exact).abs() <= 2e-4 * largest + halves + 1e-9;
                            assert!(close, "{kind:?} at {level:?}: {found} for {exact}");
                        }
                    }
                });
            }
        }

        /// Some groups alone give the same, wherever the result begins.
        #[test]
        fn groups_alone_give_the_same(rows in 17usize..90, m in 1usize..=Panel::ROWS, seed: u32) {
            let kind = BlockType::Q5_0;
            let bytes = drawn_blocks(kind, rows * 3, seed);
            let matrix = BlockMatrix::from_blocks(kind, rows, 96, &bytes);
            let x: Vec<f32> = (0..m * 96).map(|i| (i as f32 * 0.37).sin()).collect();
            let panel = Panel::new(&x, 96);
            let mut whole = vec![0.0; m * rows];
            matrix.multiply(0..matrix.groups(), &panel, &mut whole, rows);
            let groups = 1..matrix.groups();
            let part = matrix.rows_of(&groups);
            let mut out = vec![0.0; m * part.len()];
            matrix.multiply(groups, &panel, &mut out, part.len());
            for r in 0..m {
                prop_assert_eq!(&out[r * part.len()..][..part.len()], &whole[r * rows..][part.clone()]);
            }
        }
    }

    #[test]
    fn what_is_no_number_is_none_in_the_product() {
        let bytes = drawn_blocks(BlockType::Q8_0, 32, 5);
        let matrix = BlockMatrix::from_blocks(BlockType::Q8_0, 16, 64, &bytes);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5; 64];
            x[40] = bad;
            for level in levels() {
                at_level(level, || {
                    let mut out = vec![0.0; 16];
                    matrix.multiply(0..1, &Panel::new(&x, 64), &mut out, 16);
                    assert!(
                        out.iter().all(|x| x.is_nan()),
                        "{bad} at {level:?}: {out:?}"
                    );
                });
            }
        }
    }

    #[test]
    fn activations_of_any_size_are_multiplied() {
        let mut block = half::f16::from_f32(1.0).to_le_bytes().to_vec();
        block.extend([1u8; 32]);
        let matrix = BlockMatrix::from_blocks(BlockType::Q8_0, 1, 32, &block);
        for size in [0.0, 1e-30, 1.0, 1e30] {
            for level in levels() {
                at_level(level, || {
                    let mut out = [f32::NAN];
                    matrix.multiply(0..1, &Panel::new(&[size; 32], 32), &mut out, 1);
                    let close = (out[0] - 32.0 * size).abs() <= 32.0 * size * 1e-3;
                    assert!(close, "{} for {size} at {level:?}", out[0]);
                });
            }
        }
    }
}
