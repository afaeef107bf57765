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
        self.add_bias(self.matrix.multiply(x)?)
    }

    /// Turns `[rows, in]` into `[rows, out]` by each of several matrices, in f32.
    pub(super) fn forward_all<const N: usize>(
        linears: [&Self; N],
        x: &Tensor,
    ) -> Result<Vec<Tensor>> {
        let products = Matrix::multiply_all(&linears.map(|linear| &linear.matrix), x)?;
        let products = linears.into_iter().zip(products);
        products
            .map(|(linear, product)| linear.add_bias(product))
            .collect()
    }

    fn add_bias(&self, product: Tensor) -> Result<Tensor> {
        Ok(match &self.bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product,
        })
    }
}
