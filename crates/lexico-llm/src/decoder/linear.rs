use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Module, Tensor};

use crate::error::Result;
use crate::weights::Quantize;

/// A matrix that rows of activations are multiplied by, and a bias where the family has one.
pub(super) struct Linear {
    matrix: Matrix,
    bias: Option<Tensor>,
}

enum Matrix {
    /// An `[in, out]` view in f32.
    Dense(Tensor),
    Quantised(QMatMul),
}

impl Linear {
    /// Takes a matrix `[out, in]` in f32.
    pub(super) fn new(matrix: &Tensor, bias: Option<Tensor>, quantize: Quantize) -> Result<Self> {
        let matrix = match number_type(quantize, matrix.dim(1)?) {
            Some(dtype) => {
                let quantised = QTensor::quantize(matrix, dtype)?;
                Matrix::Quantised(QMatMul::from_qtensor(quantised)?)
            }
            None => Matrix::Dense(matrix.t()?),
        };
        Ok(Self { matrix, bias })
    }

    /// `[rows, in]` to `[rows, out]`, in f32.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = match &self.matrix {
            Matrix::Dense(matrix) => x.matmul(matrix)?,
            Matrix::Quantised(matrix) => matrix.forward(x)?,
        };
        Ok(match &self.bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product,
        })
    }
}

/// How a matrix with rows of `width` numbers is stored: whole blocks only, so that a width that a
/// format does not divide takes the next wider one; `None` is f32.
fn number_type(quantize: Quantize, width: usize) -> Option<GgmlDType> {
    let wanted = match quantize {
        Quantize::None => return None,
        Quantize::Q8_0 => GgmlDType::Q8_0,
        Quantize::Q6K => GgmlDType::Q6K,
        Quantize::Q4K => GgmlDType::Q4K,
    };
    [wanted, GgmlDType::Q8_0]
        .into_iter()
        .find(|dtype| width.is_multiple_of(dtype.block_size()))
}
