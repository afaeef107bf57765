use std::sync::Arc;

use candle_core::Tensor;
use candle_nn::ops::{rms_norm, silu};

use super::Sequence;
use super::linear::Linear;
use super::matrix::Matrix;
use super::rotary::Rotation;
use crate::config::Config;
use crate::error::Result;
use crate::weights::{Quantize, Weights};

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
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let queries = config.heads * config.head_dim;
        let keys = config.kv_heads * config.head_dim;
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let norm = |part: &str| weights.vector(&name(part), hidden);
        let linear = |part: &str, from: usize, to: usize, biased: bool| -> Result<Linear> {
            let bias = format!("model.layers.{layer}.{part}.bias");
            Ok(Linear {
                matrix: Arc::new(Matrix::load(weights, &name(part), [to, from], quantize)?),
                bias: biased.then(|| weights.vector(&bias, to)).transpose()?,
            })
        };
        let projection = |part: &str, to: usize| linear(part, hidden, to, config.biases);
        let head_norm = |part: &str| weights.vector(&name(part), config.head_dim);
        let head_norms = if config.head_norms {
            Some((
                head_norm("self_attn.q_norm")?,
                head_norm("self_attn.k_norm")?,
            ))
        } else {
            None
        };
        Ok(Self {
            head_norms,
            attention_norm: norm("input_layernorm")?,
            query: projection("self_attn.q_proj", queries)?,
            key: projection("self_attn.k_proj", keys)?,
            value: projection("self_attn.v_proj", keys)?,
            output: linear("self_attn.o_proj", queries, hidden, false)?,
            feed_forward_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj", hidden, intermediate, false)?,
            up: linear("mlp.up_proj", hidden, intermediate, false)?,
            down: linear("mlp.down_proj", intermediate, hidden, false)?,
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
        let normed = rms_norm(&x, &self.feed_forward_norm, epsilon)?;
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
        let mut start = 0;
        let mut outputs = Vec::with_capacity(sequences.len());
        for sequence in sequences.iter_mut() {
            let t = sequence.tokens.len();
            let own = |x: &Tensor| x.narrow(1, start, t);
            let out = sequence
                .cache
                .attend(layer, &own(&q)?, &own(&k)?, &own(&v)?)?;
            outputs.push(
                out.transpose(0, 1)?
                    .reshape((t, config.heads * config.head_dim))?,
            );
            start += t;
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }
}
