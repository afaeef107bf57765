use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, silu};

use super::linear::Linear;
use super::matrix::Matrix;
use super::rotary::Rotation;
use crate::cache::{Sequence, attend_all};
use crate::config::{Config, LayerWeights, Weight};
use crate::error::{Error, Result};
use crate::weights::{Quantize, Weights};

/// Tokens whose feed-forward numbers, the widest of a layer, are held at once: a long prompt's would outgrow its cache.
const AT_ONCE: usize = 512;

/// Decoder layer.
pub(super) struct Layer {
    attention_norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Norms of every query head, and of every key head, where the family has them.
    head_norms: Option<[Tensor; 2]>,
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
        let vector = |(name, shape): Weight| weights.vector(&name, shape[0]);
        let both = |[query, key]: [Weight; 2]| Ok::<_, Error>([vector(query)?, vector(key)?]);
        let linear = |((name, shape), bias): (Weight, Option<Weight>)| -> Result<Linear> {
            Ok(Linear {
                matrix: Matrix::load(weights, &name, [shape[0], shape[1]], quantize)?,
                bias: bias.map(vector).transpose()?,
            })
        };
        Ok(Self {
            head_norms: head_norms.map(both).transpose()?,
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

    /// Moves the layer to another device.
    pub(super) fn on(self, device: &Device) -> Result<Self> {
        let linear = |linear: Linear| -> Result<Linear> {
            let bias = linear.bias.map(|bias| bias.to_device(device));
            Ok(Linear {
                matrix: linear.matrix.on(device)?,
                bias: bias.transpose()?,
            })
        };
        let moved = |norms: [Tensor; 2]| {
            let [query, key] = norms.map(|norm| norm.to_device(device));
            Ok::<_, Error>([query?, key?])
        };
        Ok(Self {
            attention_norm: self.attention_norm.to_device(device)?,
            query: linear(self.query)?,
            key: linear(self.key)?,
            value: linear(self.value)?,
            head_norms: self.head_norms.map(moved).transpose()?,
            output: linear(self.output)?,
            feed_forward_norm: self.feed_forward_norm.to_device(device)?,
            gate: linear(self.gate)?,
            up: linear(self.up)?,
            down: linear(self.down)?,
        })
    }

    /// Runs `x` `[tokens, hidden]`, the tokens of all sequences one after the other, through the layer.
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
        if let Some([query_norm, key_norm]) = &self.head_norms {
            q = rms_norm(&q, query_norm, config.norm_epsilon as f32)?;
            k = rms_norm(&k, key_norm, config.norm_epsilon as f32)?;
        }
        let (q, k) = (rotation.apply(&q)?, rotation.apply(&k)?);
        attend_all(layer, &q, &k, &v, sequences)
    }
}
