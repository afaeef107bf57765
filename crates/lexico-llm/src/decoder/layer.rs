use candle_core::{DType, Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use lexico::kernels::gate;
use lexico::threads::for_each;

use super::linear::Linear;
use super::matrix::Matrix;
use super::rotary::Rotation;
use crate::cache::{Sequence, attend_all};
use crate::config::{Config, LayerWeights, Weight};
use crate::error::{Error, Result};
use crate::threads::ModelThreads;
use crate::weights::{Quantize, Weights};

/// Tokens whose feed-forward numbers, the widest of a layer, are held at once: a long prompt's would outgrow its cache.
const AT_ONCE: usize = 512;

/// Numbers that one task gates.
const GATED_AT_ONCE: usize = 1 << 14;

/// `silu(gate) · up`
fn gated(gates: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !gates.device().is_cpu() {
        return Ok((silu(gates)? * up)?);
    }
    let mut numbers = gates.flatten_all()?.to_vec1::<f32>()?;
    let up = up.flatten_all()?.to_vec1::<f32>()?;
    let parts = numbers.chunks_mut(GATED_AT_ONCE);
    let parts = parts.zip(up.chunks(GATED_AT_ONCE));
    for_each(&ModelThreads, parts, |(gates, up)| gate(gates, up));
    Ok(Tensor::from_vec(numbers, gates.shape(), &Device::Cpu)?)
}

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
        device: &Device,
    ) -> Result<Self> {
        let LayerWeights {
            norms: [attention_norm, feed_forward_norm],
            head_norms,
            linears: [query, key, value, output, gate, up, down],
        } = config.layer_weights(layer);
        let vector = |(name, shape): Weight| -> Result<Tensor> {
            Ok(weights.vector(&name, shape[0])?.to_device(device)?)
        };
        let both = |[query, key]: [Weight; 2]| Ok::<_, Error>([vector(query)?, vector(key)?]);
        let linear = |((name, shape), bias): (Weight, Option<Weight>)| -> Result<Linear> {
            Ok(Linear {
                matrix: Matrix::load(weights, &name, [shape[0], shape[1]], quantize, device)?,
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
        let products = Linear::forward_all([&self.gate, &self.up], &normed)?;
        let gated = gated(&products[0], &products[1])?;
        Ok((x + self.down.forward(&gated)?)?)
    }

    /// The weights of all its norms.
    pub(super) fn norms(&self) -> impl Iterator<Item = &Tensor> {
        let heads = self.head_norms.iter().flatten();
        [&self.attention_norm, &self.feed_forward_norm]
            .into_iter()
            .chain(heads)
    }

    /// See [`Decoder::rows_alike`](super::Decoder::rows_alike).
    pub(super) fn rows_alike(&self) -> usize {
        let all = self.linears().map(|linear| linear.matrix.rows_alike());
        all.fold(usize::MAX, usize::min)
    }

    /// See [`Decoder::rounds_activations`](super::Decoder::rounds_activations).
    pub(super) fn rounds_activations(&self) -> bool {
        self.linears()
            .any(|linear| linear.matrix.rounds_activations())
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let attention = [&self.query, &self.key, &self.value, &self.output];
        attention
            .into_iter()
            .chain([&self.gate, &self.up, &self.down])
    }

    /// See [`Decoder::output_moments`](super::Decoder::output_moments).
    pub(super) fn output_moments(&self, config: &Config) -> Result<Vec<f64>> {
        let m = config.head_dim;
        let group = config.heads / config.kv_heads;
        let mut moments = vec![0f64; config.kv_heads * m * m];
        for head in 0..config.heads {
            // Rows that pick the columns of the matrix that this head's outputs meet.
            let picks = Tensor::eye(m, DType::F32, &Device::Cpu)?;
            let picks = picks.pad_with_zeros(1, head * m, (config.heads - head - 1) * m)?;
            let picks = picks.to_device(self.attention_norm.device())?;
            let columns = self.output.matrix.multiply(&picks)?.to_dtype(DType::F32)?;
            let products: Vec<f32> = columns.matmul(&columns.t()?)?.flatten_all()?.to_vec1()?;
            let own = &mut moments[head / group * m * m..][..m * m];
            for (sum, x) in own.iter_mut().zip(products) {
                *sum += f64::from(x);
            }
        }
        Ok(moments)
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
        let products = Linear::forward_all([&self.query, &self.key, &self.value], x)?;
        let heads = |x: &Tensor, heads: usize| -> Result<Tensor> {
            let split = x.reshape((tokens, heads, config.head_dim))?;
            Ok(split.transpose(0, 1)?.contiguous()?)
        };
        let mut q = heads(&products[0], config.heads)?;
        let mut k = heads(&products[1], config.kv_heads)?;
        let v = heads(&products[2], config.kv_heads)?;
        if let Some([query_norm, key_norm]) = &self.head_norms {
            q = rms_norm(&q, query_norm, config.norm_epsilon as f32)?;
            k = rms_norm(&k, key_norm, config.norm_epsilon as f32)?;
        }
        let (q, k) = (rotation.apply(&q)?, rotation.apply(&k)?);
        attend_all(layer, &q, &k, &v, sequences)
    }
}
