//! One decoder for the Llama family, told apart by its config.

mod layer;
mod linear;
mod matrix;
mod rotary;

use std::path::Path;

use candle_core::{D, Device, Tensor};
use candle_nn::ops::rms_norm;

use crate::cache::KvCache;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::gguf::GgufModel;
use crate::weights::{Quantize, Weights};
use layer::Layer;
use matrix::Matrix;

/// Some new tokens of one sequence, and the cache that holds what came before them.
pub struct Sequence<'a> {
    /// The new tokens; at least one.
    pub tokens: &'a [u32],
    /// The keys and values so far; the new ones are added.
    pub cache: &'a mut dyn KvCache,
}

/// Of which positions [`Decoder::forward`] computes logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Of each sequence's last token: `[sequences, vocabulary]`.
    Last,
    /// Of every new token, sequence after sequence: `[tokens, vocabulary]`.
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
    /// Of the rotary embedding, `[m / 2]`.
    frequencies: Vec<f32>,
}

impl Decoder {
    /// Loads the decoder alone of a folder in Hugging Face layout, or of a GGUF file.
    ///
    /// # Errors
    /// As [`Model::load`](crate::Model::load).
    pub fn open(path: &Path, quantize: Quantize) -> Result<Self> {
        if path.is_file() {
            let gguf = GgufModel::open(path)?;
            return Self::load(gguf.config().clone(), &Weights::Gguf(gguf), quantize);
        }
        Self::load(Config::load(path)?, &Weights::open(path)?, quantize)
    }

    pub(crate) fn load(config: Config, weights: &Weights, quantize: Quantize) -> Result<Self> {
        let shape = [config.vocabulary, config.hidden];
        // The largest matrices first: what reading them needs in passing, the layers take later.
        let matrix = |name: &str| Matrix::load(weights, name, shape, quantize);
        let embedding = matrix("model.embed_tokens.weight")?;
        let head = match config.tied_head {
            true => None,
            false => Some(matrix("lm_head.weight")?),
        };
        let layers = (0..config.layers)
            .map(|l| Layer::load(&config, weights, quantize, l))
            .collect::<Result<_>>()?;
        Ok(Self {
            embedding,
            layers,
            norm: weights.vector("model.norm.weight", config.hidden)?,
            frequencies: config.rotary.frequencies(config.head_dim),
            head,
            device: Device::Cpu,
            config,
        })
    }

    /// The same decoder on another device.
    ///
    /// # Errors
    /// Where its memory does not suffice.
    pub fn on(self, device: &Device) -> Result<Self> {
        let layers = self.layers.into_iter().map(|layer| layer.on(device));
        Ok(Self {
            embedding: self.embedding.on(device)?,
            layers: layers.collect::<Result<_>>()?,
            norm: self.norm.to_device(device)?,
            head: self.head.map(|head| head.on(device)).transpose()?,
            device: device.clone(),
            ..self
        })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Runs the new tokens of several sequences through the model at once.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for no sequence or one without new tokens, [`Error::TokenOutside`],
    /// [`Error::ContextFull`], and what the caches return.
    pub fn forward(&self, sequences: &mut [Sequence<'_>], wanted: Logits) -> Result<Tensor> {
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        for sequence in sequences.iter() {
            let past = sequence.cache.len();
            let end = past + sequence.tokens.len();
            if sequence.tokens.is_empty() {
                return Err(Error::EmptyPrompt);
            }
            if end > self.config.context {
                return Err(Error::ContextFull {
                    wanted: end,
                    context: self.config.context,
                });
            }
            tokens.extend_from_slice(sequence.tokens);
            positions.extend(past..end);
        }
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let vocabulary = self.config.vocabulary;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocabulary) {
            return Err(Error::TokenOutside { token, vocabulary });
        }
        let rotation = rotary::Rotation::at(&positions, &self.frequencies, &self.device)?;
        let mut x = self.embedding.rows(&tokens)?;
        for (l, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&self.config, l, &x, &rotation, sequences)?;
        }
        if wanted == Logits::Last {
            let mut end = 0;
            let last: Vec<u32> = sequences
                .iter()
                .map(|sequence| {
                    end += sequence.tokens.len() as u32;
                    end - 1
                })
                .collect();
            x = x.index_select(&Tensor::new(last, &self.device)?, 0)?;
        }
        let x = rms_norm(&x, &self.norm, self.config.norm_epsilon as f32)?;
        let logits = self.head.as_ref().unwrap_or(&self.embedding).multiply(&x)?;
        debug_assert_eq!(logits.dim(D::Minus1)?, vocabulary);
        Ok(logits)
    }
}
