use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, silu};

use super::Sequence;
use super::linear::Linear;
use super::matrix::Matrix;
use super::rotary::Rotation;
use crate::config::{Config, LayerWeights, LinearWeights};
use crate::error::Result;
use crate::weights::{Quantize, Weights};

/// Tokens whose feed-forward numbers, the widest of a layer, are held at once: a long prompt's would outgrow its cache.
const AT_ONCE: usize = 512;

/// One decoder layer.
pub(super) struct Layer {
    attention_norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Of every query head, and of every key head, where the family has them.
    head_norms: Option<(Tensor, Tensor)>,
    output: Linear,
    feed_forward_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    pub(super) fn load(
        config: &Config,
        weights: &Weights,
        quantize: Quantize,
        layer: usize,
    ) -> Result<Self> {
        let LayerWeights {
            norms: [attention_norm, feed_forward_norm],
            head_norms,
            linears: [query, key, value, output, gate, up, down],
        } = config.layer_weights(layer);
        let vector = |(name, length): (String, usize)| weights.vector(&name, length);
        let head_norms = match head_norms {
            Some([query, key]) => Some((vector(query)?, vector(key)?)),
            None => None,
        };
        let linear = |LinearWeights { matrix, bias }| -> Result<Linear> {
            let (name, shape) = matrix;
            Ok(Linear {
                matrix: Matrix::load(weights, &name, shape, quantize)?,
                bias: bias.map(vector).transpose()?,
            })
        };
        Ok(Self {
            head_norms,
            attention_norm: vector(attention_norm)?,
            query: linear(query)?,
            key: linear(key)?,
            value: linear(value)?,
            output: linear(output)?,
            feed_forward_norm: vector(feed_forward_norm)?,
            gate: linear(gate)?,
            up: linear(up)?,
            down: linear(down)?,
        })
    }

    /// The same layer on another device.
    pub(super) fn on(self, device: &Device) -> Result<Self> {
        let linear = |linear: Linear| -> Result<Linear> {
            let bias = linear.bias.map(|bias| bias.to_device(device));
            Ok(Linear {
                matrix: linear.matrix.on(device)?,
                bias: bias.transpose()?,
            })
        };
        let head_norms = match self.head_norms {
            Some((query, key)) => Some((query.to_device(device)?, key.to_device(device)?)),
            None => None,
        };
        Ok(Self {
            attention_norm: self.attention_norm.to_device(device)?,
            query: linear(self.query)?,
            key: linear(self.key)?,
            value: linear(self.value)?,
            head_norms,
            output: linear(self.output)?,
            feed_forward_norm: self.feed_forward_norm.to_device(device)?,
            gate: linear(self.gate)?,
            up: linear(self.up)?,
            down: linear(self.down)?,
        })
    }

    /// `x` `[tokens, hidden]`, the tokens of all sequences one after the other.
    pub(super) fn forward(
        &self,
        config: &Config,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        sequences: &mut [Sequence<'_>],
    ) -> Result<Tensor> {
        let epsilon = config.norm_epsilon as f32;
        let normed = rms_norm(x, &self.attention_norm, epsilon)?;
        let attended = self.attend(config, layer, &normed, rotation, sequences)?;
        let x = (x + self.output.forward(&attended)?)?;
        let tokens = x.dim(0)?;
        if tokens <= AT_ONCE {
            return self.feed_forward(&x, epsilon);
        }
        let mut parts = Vec::with_capacity(tokens.div_ceil(AT_ONCE));
        for first in (0..tokens).step_by(AT_ONCE) {
            let part = x.narrow(0, first, AT_ONCE.min(tokens - first))?;
            parts.push(self.feed_forward(&part, epsilon)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn feed_forward(&self, x: &Tensor, epsilon: f32) -> Result<Tensor> {
        let normed = rms_norm(x, &self.feed_forward_norm, epsilon)?;
        let gated = (silu(&self.gate.forward(&normed)?)? * self.up.forward(&normed)?)?;
        Ok((x + self.down.forward(&gated)?)?)
    }

    fn attend(
        &self,
        config: &Config,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        sequences: &mut [Sequence<'_>],
    ) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let heads = |x: Tensor, heads: usize| -> Result<Tensor> {
            let split = x.reshape((tokens, heads, config.head_dim))?;
            Ok(split.transpose(0, 1)?.contiguous()?)
        };
        let mut q = heads(self.query.forward(x)?, config.heads)?;
        let mut k = heads(self.key.forward(x)?, config.kv_heads)?;
        let v = heads(self.value.forward(x)?, config.kv_heads)?;
        if let Some((query_norm, key_norm)) = &self.head_norms {
            q = rms_norm(&q, query_norm, config.norm_epsilon as f32)?;
            k = rms_norm(&k, key_norm, config.norm_epsilon as f32)?;
        }
        let (q, k) = (rotation.apply(&q)?, rotation.apply(&k)?);
        #[cfg(feature = "cuda")]
        if let Some(out) = crate::cache::decode_together(layer, &q, &k, &v, sequences)? {
            return Ok(out.reshape((tokens, config.heads * config.head_dim))?);
        }
        let mut start = 0;
        let mut outputs = Vec::with_capacity(sequences.len());
        for sequence in sequences.iter_mut() {
            let t = sequence.tokens.len();
            let own = |x: &Tensor| x.narrow(1, start, t);
            let out = sequence
                .cache
                .attend(layer, &own(&q)?, &own(&k)?, &own(&v)?)?;
            // Most caches lie in the processor's memory.
            let out = out.to_device(x.device())?;
            outputs.push(
                out.transpose(0, 1)?
                    .reshape((t, config.heads * config.head_dim))?,
            );
            start += t;
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }
}
