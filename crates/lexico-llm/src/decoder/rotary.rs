use candle_core::{Device, Tensor};
use candle_nn::rotary_emb::rope;

use crate::error::Result;

/// The rotary embedding (Su et al. 2021) at some positions, halves paired as Llama does.
pub(super) struct Rotation {
    /// `[positions, m / 2]`
    cos: Tensor,
    /// `[positions, m / 2]`
    sin: Tensor,
}

impl Rotation {
    pub(super) fn at(positions: &[usize], frequencies: &[f32], device: &Device) -> Result<Self> {
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let shape = (positions.len(), frequencies.len());
        let tensor = |f: fn(f32) -> f32| {
            let numbers: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
            Tensor::from_vec(numbers, shape, device)
        };
        Ok(Self {
            cos: tensor(f32::cos)?,
            sin: tensor(f32::sin)?,
        })
    }

    /// Rotates `[heads, positions, m]`.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rope(&x.unsqueeze(0)?, &self.cos, &self.sin)?.squeeze(0)?)
    }
}
