//! One decoder for the Llama family, told apart by its config.

mod layer;
mod linear;
mod matrix;
mod rotary;

use std::path::Path;
use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use candle_nn::ops::rms_norm;
use rayon::prelude::*;

use crate::cache::KvCache;
pub use crate::cache::Sequence;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::gguf::GgufModel;
use crate::model::untie;
use crate::weights::{Quantize, Weights};
use layer::Layer;
use matrix::Matrix;

/// Positions of which [`Decoder::forward`] computes logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Each sequence's last token: `[sequences, vocabulary]`.
    Last,
    /// Every new token, sequence after sequence: `[tokens, vocabulary]`.
    All,
}

/// A decoder-only transformer with rotary embedding, RMS norms and gated feed-forward layers.
pub struct Decoder {
    config: Config,
    /// `[vocabulary, hidden]`
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `[vocabulary, hidden]`; the embedding's where they are tied.
    head: Option<Matrix>,
    device: Device,
    /// Frequencies of the rotary embedding, `[m / 2]`.
    frequencies: Vec<f32>,
}

impl Decoder {
    /// Loads the decoder alone of a folder in Hugging Face layout, or of a GGUF file, to compute on the processor.
    ///
    /// # Errors
    /// Those of [`Model::load`](crate::Model::load).
    pub fn open(path: &Path, quantize: Quantize) -> Result<Self> {
        if path.is_file() {
            let gguf = GgufModel::open(path)?;
            let config = gguf.config().clone();
            return Self::load(
                config,
                &Weights::Gguf(Arc::new(gguf)),
                quantize,
                &Device::Cpu,
            );
        }
        let (mut config, weights) = (Config::load(path)?, Weights::open(path)?);
        weights.check_names(&config)?;
        untie(&mut config, &weights)?;
        Self::load(config, &weights, quantize, &Device::Cpu)
    }

    pub(crate) fn load(
        config: Config,
        weights: &Weights,
        quantize: Quantize,
        device: &Device,
    ) -> Result<Self> {
        let shape = [config.vocabulary, config.hidden];
        // The largest matrices first: what reading them needs in passing, the layers take later.
        let matrix = |name: &str| Matrix::load(weights, name, shape, quantize, device);
        let embedding = matrix("model.embed_tokens.weight")?;
        let head = match config.tied_head {
            true => None,
            false => Some(matrix("lm_head.weight")?),
        };
        let layer = |l| Layer::load(&config, weights, quantize, l, device);
        let layers: Result<Vec<Layer>> = match device.is_cpu() {
            // Laying out blocks takes longer than reading them.
            true => (0..config.layers).into_par_iter().map(layer).collect(),
            false => (0..config.layers).map(layer).collect(),
        };
        Ok(Self {
            embedding,
            layers: layers?,
            norm: weights
                .vector("model.norm.weight", config.hidden)?
                .to_device(device)?,
            frequencies: config.rotary.frequencies(config.head_dim),
            head,
            device: device.clone(),
            config,
        })
    }

    /// Device that computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The number of tokens that [`Decoder::forward`] may be given together such that each one's logits are, to the last bit,
    /// what they are alone: beyond it products are computed otherwise. On a GPU nothing is promised.
    pub fn rows_alike(&self) -> usize {
        let layers = self.layers.iter().map(Layer::rows_alike);
        let head = self.head.as_ref().unwrap_or(&self.embedding).rows_alike();
        layers.fold(head, usize::min)
    }

    /// The weights of all norms, which no file of a model rounds: layer after layer, the last norm in the end.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    pub(crate) fn norms(&self) -> Result<Vec<f32>> {
        let norms = self.layers.iter().flat_map(Layer::norms);
        let mut weights = Vec::new();
        for norm in norms.chain([&self.norm]) {
            weights.extend(norm.to_vec1::<f32>()?);
        }
        Ok(weights)
    }

    /// Second moments of what a layer's output projection multiplies the values of each KV head with, summed up over
    /// its query heads, `[kv_heads, m, m]`. `O(heads·m·hidden·(heads + 1)·m)`.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    pub(crate) fn output_moments(&self, layer: usize) -> Result<Vec<f64>> {
        self.layers[layer].output_moments(&self.config)
    }

    /// The outputs of a layer's heads at new positions, `[tokens, heads·m]`, for what comes into the layer there,
    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// Those of the cache, [`Error::Tensor`].
    pub(crate) fn attended(
        &self,
        layer: usize,
        input: &Tensor,
        tokens: &[u32],
        cache: &mut dyn KvCache,
    ) -> Result<Tensor> {
        let mut sequences = [Sequence { tokens, cache }];
        let (positions, _) = self.check(&sequences)?;
        let rotation = rotary::Rotation::at(&positions, &self.frequencies, &self.device)?;
        self.layers[layer].attended(&self.config, layer, input, &rotation, &mut sequences)
    }

    /// How far a layer's output moves where the outputs of its heads change from `attended` to `changed`,
    /// `[tokens, heads·m]` both: for the query group of each KV head, the squared length of what is added over that of
    /// what the layer's attention gives with its `input` `[tokens, hidden]`, summed up over the tokens.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    pub(crate) fn changes(
        &self,
        layer: usize,
        input: &Tensor,
        attended: &Tensor,
        changed: &Tensor,
    ) -> Result<Vec<f64>> {
        self.layers[layer].changes(&self.config, input, attended, changed)
    }

    /// Runs the new tokens of one sequence through the model.
    ///
    /// # Errors
    /// Those of [`Decoder::forward`].
    pub fn forward_one(
        &self,
        tokens: &[u32],
        cache: &mut dyn KvCache,
        wanted: Logits,
    ) -> Result<Tensor> {
        self.forward(&mut [Sequence { tokens, cache }], wanted)
    }

    /// Runs the new tokens of several sequences through the model at once.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for no sequence or one without new tokens, [`Error::TokenOutside`],
    /// [`Error::ContextFull`], and what the caches return.
    pub fn forward(&self, sequences: &mut [Sequence<'_>], wanted: Logits) -> Result<Tensor> {
        let (positions, tokens) = self.check(sequences)?;
        let mut x = self.embedding.rows(&tokens)?;
        x = self.through(0, x, &positions, sequences, &mut |_| ())?;
        if wanted == Logits::Last {
            let mut end = 0;
            let last = sequences.iter().map(|sequence| {
                end += sequence.tokens.len() as u32;
                end - 1
            });
            let last: Vec<u32> = last.collect();
            x = x.index_select(&Tensor::new(last, &self.device)?, 0)?;
        }
        self.logits(&x)
    }

    /// Runs the new tokens of one sequence through the model and returns all their logits; `each` is shown what goes
    /// into every layer, `[tokens, hidden]`. With what went into a layer before, only that layer and those after it run.
    ///
    /// # Errors
    /// Those of [`Decoder::forward`].
    pub(crate) fn forward_from(
        &self,
        input: Option<(usize, &Tensor)>,
        tokens: &[u32],
        cache: &mut dyn KvCache,
        each: &mut dyn FnMut(&Tensor),
    ) -> Result<Tensor> {
        let mut sequences = [Sequence { tokens, cache }];
        let (positions, tokens) = self.check(&sequences)?;
        let (first, x) = match input {
            Some((layer, x)) => (layer, x.clone()),
            None => (0, self.embedding.rows(&tokens)?),
        };
        let x = self.through(first, x, &positions, &mut sequences, each)?;
        self.logits(&x)
    }

    /// Checks new tokens; returns the positions and the tokens of all sequences one after the other.
    fn check(&self, sequences: &[Sequence<'_>]) -> Result<(Vec<usize>, Vec<u32>)> {
        let (vocabulary, context) = (self.config.vocabulary, self.config.context);
        let empty = |sequence: &Sequence<'_>| sequence.tokens.is_empty();
        if sequences.is_empty() || sequences.iter().any(empty) {
            return Err(Error::EmptyPrompt);
        }
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for sequence in sequences.iter() {
            let past = sequence.cache.len();
            let wanted = past + sequence.tokens.len();
            if wanted > context {
                return Err(Error::ContextFull { wanted, context });
            }
            tokens.extend_from_slice(sequence.tokens);
            positions.extend(past..wanted);
        }
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocabulary) {
            return Err(Error::TokenOutside { token, vocabulary });
        }
        Ok((positions, tokens))
    }

    /// Runs `x` `[tokens, hidden]` through the layers from `first` on.
    fn through(
        &self,
        first: usize,
        mut x: Tensor,
        positions: &[usize],
        sequences: &mut [Sequence<'_>],
        each: &mut dyn FnMut(&Tensor),
    ) -> Result<Tensor> {
        let rotation = rotary::Rotation::at(positions, &self.frequencies, &self.device)?;
        for (l, layer) in self.layers.iter().enumerate().skip(first) {
            each(&x);
            x = layer.forward(&self.config, l, &x, &rotation, sequences)?;
        }
        Ok(x)
    }

    /// Returns the logits `[tokens, vocabulary]` of what the last layer gave.
    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let x = rms_norm(x, &self.norm, self.config.norm_epsilon as f32)?;
        let logits = self.head.as_ref().unwrap_or(&self.embedding).multiply(&x)?;
        debug_assert_eq!(logits.dim(D::Minus1)?, self.config.vocabulary);
        Ok(logits)
    }
}
