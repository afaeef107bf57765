//! Layers that hold rotated keys and values: outliers are spread over all channels before they are quantised.

use std::sync::Arc;

use ::lexico::KeyValue;
use candle_core::{Device, Tensor};

use super::stored::{Place, StoredHead, StoredLayer};
use super::uniform::held;
use super::{Decoded, Step};
use crate::error::Result;

/// An orthogonal map of vectors.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rotation {
    /// All vectors as they are.
    None,
    /// The Walsh–Hadamard transform of each block of so many neighbours, a power of two that divides the head dim, scaled
    /// to be orthonormal. It is its own inverse.
    Hadamard(usize),
    /// A matrix `[m, m]` by which vectors are multiplied from the left.
    Matrix(Arc<[f32]>),
}

impl Rotation {
    /// Rotates vectors of `m` numbers in place.
    pub(super) fn turn(&self, vectors: &mut [f32], m: usize) {
        match self {
            Self::None => {}
            Self::Hadamard(size) => vectors.chunks_exact_mut(*size).for_each(hadamard),
            Self::Matrix(matrix) => {
                let mut out = vec![0.0; m];
                for vector in vectors.chunks_exact_mut(m) {
                    out.fill(0.0);
                    for (x, row) in vector.iter().zip(matrix.chunks_exact(m)) {
                        out.iter_mut().zip(row).for_each(|(out, r)| *out += x * r);
                    }
                    vector.copy_from_slice(&out);
                }
            }
        }
    }

    /// Rotates vectors of `m` numbers back, in place.
    pub(super) fn turn_back(&self, vectors: &mut [f32], m: usize) {
        let Self::Matrix(matrix) = self else {
            return self.turn(vectors, m);
        };
        for vector in vectors.chunks_exact_mut(m) {
            let dot = |row: &[f32]| row.iter().zip(&*vector).map(|(r, x)| r * x).sum();
            let out: Vec<f32> = matrix.chunks_exact(m).map(dot).collect();
            vector.copy_from_slice(&out);
        }
    }
}

/// The orthonormal Walsh–Hadamard transform in Sylvester's order, in place; for a power of two of numbers.
pub(super) fn hadamard(numbers: &mut [f32]) {
    let mut half = 1;
    while half < numbers.len() {
        for pair in numbers.chunks_exact_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (x, y) in left.iter_mut().zip(right) {
                (*x, *y) = (*x + *y, *x - *y);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (numbers.len() as f32).sqrt();
    numbers.iter_mut().for_each(|x| *x *= scale);
}

/// A layer whose heads hold rotated keys and values. Queries are rotated as keys are, which leaves their products as they
/// were, and the output is rotated back as values are, so that no vector held needs to be.
pub(super) struct RotatedLayer<H> {
    pub(super) heads: Vec<H>,
    pub(super) rotations: KeyValue<Rotation>,
}

impl<H: StoredHead<Shared = ()>> StoredLayer for RotatedLayer<H> {
    type Shared = ();

    fn attend(&mut self, _shared: &mut (), step: &Step, at: Place) -> Result<Tensor> {
        let m = step.shape.2;
        let turned = |rotation: &Rotation, mut vectors: Vec<f32>| {
            rotation.turn(&mut vectors, m);
            vectors
        };
        let KeyValue { keys, values } = &self.rotations;
        // What f16 does not hold would overflow scales.
        let within_f16 = |x: &[f32]| x.iter().map(|&x| held(x)).collect();
        let rotated = Step {
            queries: turned(keys, step.queries.clone()),
            keys: turned(keys, within_f16(&step.keys)),
            values: turned(values, within_f16(&step.values)),
            shape: step.shape,
        };
        let out = self.heads.attend(&mut (), &rotated, at)?;
        let mut out: Vec<f32> = out.flatten_all()?.to_vec1()?;
        self.rotations.values.turn_back(&mut out, m);
        Ok(Tensor::from_vec(out, step.shape, &Device::Cpu)?)
    }

    fn decoded(&self, _shared: &()) -> Result<Option<Decoded>> {
        let Some(mut decoded) = self.heads.decoded(&())? else {
            return Ok(None);
        };
        // Blocks of a Hadamard transform end with the vectors that they are of, and matrices know their size.
        let m = |rotation: &Rotation| match rotation {
            Rotation::Matrix(matrix) => matrix.len().isqrt(),
            _ => 1,
        };
        let KeyValue { keys, values } = &self.rotations;
        keys.turn_back(&mut decoded.keys, m(keys));
        values.turn_back(&mut decoded.values, m(values));
        Ok(Some(decoded))
    }

    fn bytes(&self) -> Vec<(&'static str, usize)> {
        let mut parts = self.heads.bytes();
        parts.push(("bookkeeping", size_of::<Self>() - size_of::<Vec<H>>()));
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix of llama.cpp and vLLM, by Sylvester's doubling.
    fn sylvester(n: usize) -> Vec<f64> {
        let entry = |i: usize, j: usize| {
            let sign = if (i & j).count_ones().is_multiple_of(2) {
                1.0
            } else {
                -1.0
            };
            sign / (n as f64).sqrt()
        };
        (0..n * n).map(|at| entry(at / n, at % n)).collect()
    }

    #[test]
    fn hadamard_is_sylvesters_matrix() {
        for n in [1usize, 2, 64, 128] {
            let matrix = sylvester(n);
            for i in 0..n {
                let mut unit = vec![0f32; n];
                unit[i] = 1.0;
                hadamard(&mut unit);
                for (x, expected) in unit.iter().zip(&matrix[i * n..]) {
                    assert!((f64::from(*x) - expected).abs() < 1e-7, "{n}: {x}");
                }
            }
        }
    }

    #[test]
    fn rotations_are_turned_back() {
        let m = 8;
        let matrix: Vec<f32> = sylvester(m).iter().map(|&x| x as f32).collect();
        // Sylvester's matrix is symmetric: with its rows moved on by one it is orthogonal and not its own inverse.
        let moved: Arc<[f32]> = [&matrix[m..], &matrix[..m]].concat().into();
        let vectors: Vec<f32> = (0..3 * m).map(|i| (i as f32).sin()).collect();
        for rotation in [
            Rotation::None,
            Rotation::Hadamard(4),
            Rotation::Hadamard(8),
            Rotation::Matrix(moved.clone()),
        ] {
            let mut turned = vectors.clone();
            rotation.turn(&mut turned, m);
            assert_eq!(turned == vectors, rotation == Rotation::None);
            rotation.turn_back(&mut turned, m);
            for (x, back) in vectors.iter().zip(&turned) {
                assert!((x - back).abs() < 1e-6, "{rotation:?}: {x} and {back}");
            }
        }
        let mut unit = vec![0.0; m];
        unit[2] = 1.0;
        Rotation::Matrix(moved.clone()).turn(&mut unit, m);
        assert_eq!(unit, moved[2 * m..3 * m], "y = x R");
    }
}
