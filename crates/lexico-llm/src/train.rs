//! From text to dictionaries: the model reads, its keys and values are sampled, each layer learns.

use std::ops::ControlFlow;

use candle_core::Tensor;
use lexico::attention::NumberType;
use lexico::dictionary::{LayerDictionaries, LayerErrors, Training};
use lexico::learn::{LearnOptions, LearnProgress, learn};
use lexico::{Dictionary, DictionarySet};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cache::{Footprint, FullCache, KvCache};
use crate::config::Config;
use crate::corpus::Corpus;
use crate::decoder::{Logits, Sequence};
use crate::error::Result;
use crate::model::Model;

/// One window in so many is kept apart to judge the dictionaries on.
const HELD_OUT: usize = 20;
/// Vectors that a dictionary is judged on at the most.
const HELD_OUT_VECTORS: usize = 4096;

/// Settings of [`train`].
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Most tokens to read, in windows drawn evenly from all texts.
    pub tokens: usize,
    /// Tokens that the model sees at once.
    pub context: usize,
    /// Vectors that each dictionary learns from at the most, an unbiased sample of all.
    pub vectors: usize,
    /// How each dictionary is learned.
    pub learn: LearnOptions,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            tokens: 1_000_000,
            context: 1024,
            vectors: 200_000,
            learn: LearnOptions::default(),
        }
    }
}

impl TrainOptions {
    /// Checks all that can be checked before the text is read.
    ///
    /// # Errors
    /// Those of [`LearnOptions::check`], and [`lexico::Error::Learn`] where the settings
    /// contradict each other.
    pub fn check(&self, config: &Config) -> Result<()> {
        self.learn.check(config.head_dim)?;
        let most_context = config.context;
        let refuse = |reason: String| Err(lexico::Error::Learn(reason).into());
        if self.learn.atoms > self.vectors {
            let (atoms, vectors) = (self.learn.atoms, self.vectors);
            return refuse(format!(
                "{atoms} atoms cannot be learned from {vectors} vectors"
            ));
        }
        if self.context > most_context {
            let context = self.context;
            return refuse(format!(
                "the model's context is {most_context}, not {context} tokens"
            ));
        }
        if self.context < 2 || self.tokens / 2 < self.context {
            let (tokens, context) = (self.tokens, self.context);
            return refuse(format!(
                "{tokens} tokens in windows of {context} are too few: one window is to learn \
                 from, one to judge by, and a window has at least 2 tokens"
            ));
        }
        Ok(())
    }
}

/// How far training has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TrainProgress {
    /// The model is reading.
    Reading {
        /// Tokens read.
        tokens: usize,
        /// Tokens to read in all: at first an estimate, in the end exact.
        total: usize,
    },
    /// A dictionary is being learned.
    Learning {
        /// The layer.
        layer: usize,
        /// `keys` or `values`.
        part: &'static str,
        /// How far it has come.
        progress: LearnProgress,
    },
    /// A dictionary is learned.
    Learned {
        /// The layer.
        layer: usize,
        /// `keys` or `values`.
        part: &'static str,
        /// Held-out mean relative error.
        held_out_error: f32,
    },
}

/// Dictionaries and what they came of.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The dictionaries, with their held-out errors.
    pub dictionaries: DictionarySet,
    /// Vectors that each dictionary learned from.
    pub vectors: usize,
}

/// Learns every layer's two dictionaries of `model` from `corpus`.
///
/// `progress` is called throughout and may break off.
///
/// # Errors
/// Those of [`Corpus::windows`], [`lexico::Error::Learn`] where it yields fewer
/// vectors than atoms, [`lexico::Error::Interrupted`] where `progress` broke off.
pub fn train(
    model: &Model,
    corpus: &Corpus,
    options: &TrainOptions,
    progress: &mut dyn FnMut(TrainProgress) -> ControlFlow<()>,
) -> Result<Trained> {
    let config = model.decoder.config();
    options.check(config)?;
    let seed = options.learn.seed;
    let mut windows = corpus.windows(&model.tokenizer, options.context, options.tokens, seed)?;
    let mut collector = Collector::new(model, options);
    let mut tokens = 0;
    // Where there are fewer windows than a period has, the last one is held out.
    let first: Vec<Vec<u32>> = windows.by_ref().take(HELD_OUT).collect::<Result<_>>()?;
    let period = first.len();
    let mut first = first.into_iter();
    let mut number = 0;
    while let Some(window) = first.next().map(Ok).or_else(|| windows.next()) {
        let window = window?;
        collector.held_out = number % period == period - 1;
        collector.cache = FullCache::new(config, NumberType::F32);
        let mut sequences = [Sequence {
            tokens: &window,
            cache: &mut collector,
        }];
        model.decoder.forward(&mut sequences, Logits::Last)?;
        number += 1;
        tokens += window.len();
        let total = windows.total();
        check(progress(TrainProgress::Reading { tokens, total }))?;
    }

    let mut layers = Vec::with_capacity(config.layers);
    let mut errors = Vec::with_capacity(config.layers);
    let vectors = collector
        .samples
        .first()
        .map_or(0, |s| s.keys.train.count());
    for (layer, samples) in collector.samples.into_iter().enumerate() {
        let mut one = |part: &'static str, sample: Sample| -> Result<(Dictionary, f32)> {
            let mut learn_options = options.learn.clone();
            let number = 2 * layer as u64 + u64::from(part == "values");
            learn_options.seed = learn_options.seed.wrapping_add(number);
            let learned = learn(
                &sample.train.vectors,
                &sample.held_out.vectors,
                config.head_dim,
                &learn_options,
                &mut |step| {
                    progress(TrainProgress::Learning {
                        layer,
                        part,
                        progress: step,
                    })
                },
            )?;
            // A corpus has two windows at the least, of which one is held out.
            let held_out_error = learned.held_out_error.unwrap_or(f32::NAN);
            check(progress(TrainProgress::Learned {
                layer,
                part,
                held_out_error,
            }))?;
            Ok((learned.dictionary, held_out_error))
        };
        let (keys, key_error) = one("keys", samples.keys)?;
        let (values, value_error) = one("values", samples.values)?;
        layers.push(LayerDictionaries { keys, values });
        errors.push(LayerErrors {
            keys: key_error,
            values: value_error,
        });
    }
    let dictionaries = DictionarySet {
        layers,
        model: model.identity(),
        training: Training {
            sparsity: options.learn.sparsity,
            corpus: corpus.names().to_vec(),
            tokens,
            relative_error: errors,
            tool: format!("lexico {}", env!("CARGO_PKG_VERSION")),
        },
    };
    Ok(Trained {
        dictionaries,
        vectors,
    })
}

fn check(flow: ControlFlow<()>) -> Result<()> {
    match flow {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(lexico::Error::Interrupted.into()),
    }
}

/// A cache for one window at a time that samples the keys and values it is given.
struct Collector {
    cache: FullCache,
    head_dim: usize,
    /// Whether this window is kept apart.
    held_out: bool,
    samples: Vec<LayerSamples>,
    rng: ChaCha8Rng,
}

struct LayerSamples {
    keys: Sample,
    values: Sample,
}

struct Sample {
    train: Reservoir,
    held_out: Reservoir,
}

impl Collector {
    fn new(model: &Model, options: &TrainOptions) -> Self {
        let config = model.decoder.config();
        let reservoir = |most| Reservoir {
            vectors: Vec::new(),
            head_dim: config.head_dim,
            most,
            seen: 0,
        };
        let sample = || Sample {
            train: reservoir(options.vectors),
            held_out: reservoir(HELD_OUT_VECTORS),
        };
        let layer = |_| LayerSamples {
            keys: sample(),
            values: sample(),
        };
        Self {
            cache: FullCache::new(config, NumberType::F32),
            head_dim: config.head_dim,
            held_out: false,
            samples: (0..config.layers).map(layer).collect(),
            rng: ChaCha8Rng::seed_from_u64(options.learn.seed),
        }
    }
}

impl KvCache for Collector {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let samples = &mut self.samples[layer];
        for (sample, x) in [(&mut samples.keys, k), (&mut samples.values, v)] {
            let reservoir = if self.held_out {
                &mut sample.held_out
            } else {
                &mut sample.train
            };
            for vector in x
                .flatten_all()?
                .to_vec1::<f32>()?
                .chunks_exact(self.head_dim)
            {
                reservoir.offer(vector, &mut self.rng);
            }
        }
        self.cache.attend(layer, q, k, v)
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }
}

/// An unbiased sample of a stream of vectors (Vitter's algorithm R, 1985).
struct Reservoir {
    vectors: Vec<f32>,
    head_dim: usize,
    most: usize,
    seen: usize,
}

impl Reservoir {
    fn offer(&mut self, vector: &[f32], rng: &mut ChaCha8Rng) {
        self.seen += 1;
        if self.count() < self.most {
            self.vectors.extend_from_slice(vector);
            return;
        }
        let place = rng.random_range(0..self.seen);
        if place < self.most {
            let start = place * self.head_dim;
            self.vectors[start..start + self.head_dim].copy_from_slice(vector);
        }
    }

    fn count(&self) -> usize {
        self.vectors.len() / self.head_dim
    }
}
