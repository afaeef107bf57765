//! Weights of a GGUF file, which has its own names and its own order of query and key rows.

use std::ops::Range;

use candle_core::quantized::GgmlDType;

use super::{check_shape, weight_error};
use crate::error::Result;
use crate::gguf::{GgufFile, GgufModel, TensorPlace, own_name};

pub(super) fn number_type(model: &GgufModel, name: &str, shape: &[usize]) -> Result<GgmlDType> {
    let (own, file, tensor) = find(model, name)?;
    check_shape(file.path(), &own, &tensor.shape, shape)?;
    tensor.number_type.map_err(|number| {
        let reason = format!(
            "its number type {number} is not supported; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, \
             Q8_0 and Q2_K to Q6_K are"
        );
        weight_error(file.path(), &own, reason)
    })
}

pub(super) fn read_rows(
    model: &GgufModel,
    name: &str,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    let (own, file, tensor) = find(model, name)?;
    let row_bytes = out.len() / rows.len().max(1);
    let interleaved =
        model.interleaved && (own.ends_with("attn_q.weight") || own.ends_with("attn_k.weight"));
    if !interleaved {
        return file.read_bytes(&own, tensor, rows.start * row_bytes, out);
    }
    for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
        let stored = interleaved_row(row, model.config().head_dim);
        file.read_bytes(&own, tensor, stored * row_bytes, out)?;
    }
    Ok(())
}

/// A weight's name in the file, and where it is.
fn find<'m>(model: &'m GgufModel, name: &str) -> Result<(String, &'m GgufFile, &'m TensorPlace)> {
    let own = own_name(name);
    match model.tensor(&own) {
        Some((file, tensor)) => Ok((own, file, tensor)),
        None => Err(weight_error(model.path(), &own, "it is missing".to_owned())),
    }
}

/// Place of a query or key row in files of the llama architecture: the two rows of a rotary pair
/// side by side, where the decoder and safetensors files have them half a head apart.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (within % half) + within / half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotary_pairs_are_brought_half_a_head_apart() {
        let order: Vec<usize> = (0..8).map(|row| interleaved_row(row, 4)).collect();
        assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
