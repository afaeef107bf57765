use candle_core::Tensor;
use candle_nn::ops::{rms_norm, silu};

use super::Sequence;
use super::rotary::Rotation;
use crate::config::Config;
use crate::error::Result;
use crate::weights::Weights;

/// A matrix as an `[in, out]` view, and a bias where the family has one.
struct Projection {
    matrix: Tensor,
    bias: Option<Tensor>,
}

impl Projection {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = x.matmul(&self.matrix)?;
        Ok(match &self.bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product,
        })
    }
}

/// One decoder layer. Projections are kept as `[in, out]` views.
pub(super) struct Layer {
    attention_norm: Tensor,
    query: Projection,
    key: Projection,
    value: Projection,
    /// Of every query head, and of every key head, where the family has them.
    head_norms: Option<(Tensor, Tensor)>,
    output: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Layer {
    pub(super) fn load(config: &Config, weights: &Weights, layer: usize) -> Result<Self> {
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let queries = config.heads * config.head_dim;
        let keys = config.kv_heads * config.head_dim;
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let norm = |part: &str| weights.get(&name(part), &[hidden]);
        let linear = |part: &str, from: usize, to: usize| -> Result<Tensor> {
            Ok(weights.get(&name(part), &[to, from])?.t()?)
        };
        let projection = |part: &str, to: usize| -> Result<Projection> {
            let bias = format!("model.layers.{layer}.{part}.bias");
            Ok(Projection {
                matrix: linear(part, hidden, to)?,
                bias: config
                    .biases
                    .then(|| weights.get(&bias, &[to]))
                    .transpose()?,
            })
        };
        let head_norm = |part: &str| weights.get(&name(part), &[config.head_dim]);
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
            output: linear("self_attn.o_proj", queries, hidden)?,
            feed_forward_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj", hidden, intermediate)?,
            up: linear("mlp.up_proj", hidden, intermediate)?,
            down: linear("mlp.down_proj", intermediate, hidden)?,
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
        let x = (x + attended.matmul(&self.output)?)?;
        let normed = rms_norm(&x, &self.feed_forward_norm, epsilon)?;
        let gated = (silu(&normed.matmul(&self.gate)?)? * normed.matmul(&self.up)?)?;
        Ok((x + gated.matmul(&self.down)?)?)
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
