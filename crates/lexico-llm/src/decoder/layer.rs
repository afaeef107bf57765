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
        let attended = self.attended(config, layer, x, rotation, sequences)?;
        let x = (x + self.project(&attended)?)?;
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

    /// The outputs of all heads, `[tokens, heads·m]`, for `x` `[tokens, hidden]` as it comes into the layer.
    pub(super) fn attended(
        &self,
        config: &Config,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        sequences: &mut [Sequence<'_>],
    ) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attention_norm, config.norm_epsilon as f32)?;
        self.attend(config, layer, &normed, rotation, sequences)
    }

    /// What the heads' outputs `[tokens, heads·m]` add to the layer's input, `[tokens, hidden]`.
    fn project(&self, attended: &Tensor) -> Result<Tensor> {
        self.output.forward(attended)
    }

    /// See [`Decoder::changes`](super::Decoder::changes).
    pub(super) fn changes(
        &self,
        config: &Config,
        x: &Tensor,
        attended: &Tensor,
        changed: &Tensor,
    ) -> Result<Vec<f64>> {
        let squares = |rows: &Tensor| -> Result<Vec<f32>> { Ok(rows.sqr()?.sum(1)?.to_vec1()?) };
        let whole = squares(&(x + self.project(attended)?)?)?;
        let difference = (changed - attended)?;
        let width = config.heads / config.kv_heads * config.head_dim;
        let of_head = |head: usize| {
            let own = difference.narrow(1, head * width, width)?;
            let rest = (config.kv_heads - head - 1) * width;
            let own = own.pad_with_zeros(1, head * width, rest)?;
            let moved = squares(&self.output.matrix.multiply(&own.contiguous()?)?)?;
            let shares = moved.iter().zip(&whole);
            Ok(shares
                .map(|(&own, &all)| f64::from(own) / f64::from(all))
                .sum())
        };
        (0..config.kv_heads).map(of_head).collect()
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
        let attention = [&self.query, &self.key, &self.value, &self.output];
        let all = attention
            .into_iter()
            .chain([&self.gate, &self.up, &self.down]);
        let alike = all.map(|linear| linear.matrix.rows_alike());
        alike.fold(usize::MAX, usize::min)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

    use candle_core::{Device, Tensor};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use crate::Model;

    #[test]
    fn changes_are_those_of_each_group_by_the_definition() {
        let model = Model::tiny().unwrap();
        let (decoder, config) = (&model.decoder, model.decoder.config());
        let (tokens, width) = (5, config.heads * config.head_dim);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut draw = |columns: usize| {
            let numbers: Vec<f32> = (0..tokens * columns)
                .map(|_| rng.random_range(-1.0..1.0))
                .collect();
            Tensor::from_vec(numbers, (tokens, columns), &Device::Cpu).unwrap()
        };
        let (input, attended, moved) = (draw(config.hidden), draw(width), draw(width));
        let rows = |x: &Tensor| x.to_vec2::<f32>().unwrap();
        let squared = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
        let layer = &decoder.layers[1];
        let before = rows(&layer.project(&attended).unwrap());
        let group = config.heads / config.kv_heads * config.head_dim;
        let mut all = rows(&attended);
        let mut alone = Vec::new();
        for head in 0..config.kv_heads {
            // Only this head's outputs are others.
            let mut changed = rows(&attended);
            for ((own, all), moved) in changed.iter_mut().zip(&mut all).zip(rows(&moved)) {
                let part = head * group..(head + 1) * group;
                own[part.clone()].copy_from_slice(&moved[part.clone()]);
                all[part.clone()].copy_from_slice(&moved[part]);
            }
            let changed = Tensor::new(changed, &Device::Cpu).unwrap();
            let after = rows(&layer.project(&changed).unwrap());
            let mut expected = 0.0;
            for ((input, before), after) in rows(&input).iter().zip(&before).zip(&after) {
                let sum = input
                    .iter()
                    .zip(before)
                    .map(|(a, b)| f64::from(*a) + f64::from(*b));
                let difference = after
                    .iter()
                    .zip(before)
                    .map(|(a, b)| f64::from(*a) - f64::from(*b));
                let (sum, difference): (Vec<f64>, Vec<f64>) = (sum.collect(), difference.collect());
                expected += squared(&difference) / squared(&sum);
            }
            let found = decoder.changes(1, &input, &attended, &changed).unwrap();
            for (other, &found) in found.iter().enumerate() {
                let expected = if other == head { expected } else { 0.0 };
                assert!(
                    (found - expected).abs() <= 1e-3 * expected,
                    "{head}, {other}: {found}, {expected}"
                );
            }
            alone.push(expected);
        }
        // All at once: each head's change is what it is alone.
        let all = Tensor::new(all, &Device::Cpu).unwrap();
        let all = decoder.changes(1, &input, &attended, &all).unwrap();
        assert_eq!(all.len(), alone.len());
        for (found, expected) in all.iter().zip(alone) {
            assert!(
                expected > 0.0 && (found - expected).abs() <= 1e-3 * expected,
                "{found}, {expected}"
            );
        }
        let none = decoder.changes(1, &input, &attended, &attended).unwrap();
        assert!(none.iter().all(|change| *change == 0.0));
    }
}
