use candle_core::Tensor;

use super::matrix::Matrix;
use crate::error::Result;

/// Matrix that rows of activations are multiplied by, and a bias where the family has one.
pub(super) struct Linear {
    /// `[out, in]`
    pub(super) matrix: Matrix,
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    /// Turns `[rows, in]` into `[rows, out]`, in f32.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = self.matrix.multiply(x)?;
        Ok(match &self.bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product,
        })
    }
}
