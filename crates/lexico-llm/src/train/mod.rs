//! From text to dictionaries: the model reads, its keys and values are sampled, each layer learns.

mod codebooks;
mod estimate;
mod learning;
mod losses;
mod measure;
mod queries;
mod reading;
mod rows;
mod state;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lexico::dictionary::{CodeFamily, JointLayers, LayerDictionaries, LayerErrors, Training};
use lexico::learn::{
    CodebookOptions, CodebookProgress, Effort, LearnError, LearnOptions, LearnProgress,
};
use lexico::{DictionarySet, KeyValue};
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::corpus::{Corpus, LONG_EVERY};
use crate::error::{Error, Result, io};
use crate::model::Model;
use reading::{Reading, read};
use state::State;

pub use estimate::estimate;
pub use losses::measure_losses;
pub use measure::AttentionErrors;
pub use state::{StateError, StateOptions, remove_state};

/// Settings of [`train`].
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Max tokens to read, in chunks drawn evenly from all texts.
    pub tokens: usize,
    /// Tokens that the model sees at once, the length of a chunk. Where there are enough tokens and the model's context allows
    /// it, half of them are in chunks of eight times that: keys and values of long texts are others than those of short ones.
    pub context: usize,
    /// Max vectors that each dictionary learns from, an unbiased sample of all.
    pub vectors: usize,
    /// Learns dictionaries for sparse codes.
    pub sparse: bool,
    /// Settings of each dictionary for sparse codes; its sparsity and seed are those of the whole training.
    pub learn: LearnOptions,
    /// Settings of the codebooks for additive codes; `None` learns none. The seed is that of the first dictionary, every
    /// other has the next.
    pub codebooks: Option<CodebookOptions>,
    /// KV heads of a layer whose keys, and whose values, additive codes tell together, in as many parts; 1: each alone.
    pub joint_heads: usize,
    /// Layers that follow each other whose keys, and whose values, additive codes tell together, each head with its like; 1: each
    /// alone.
    pub joint_layers: usize,
    /// Dictionaries that are kept as they are, with what was measured of them: only codebooks are learned, and replace
    /// any that are there.
    pub kept: Option<DictionarySet>,
    /// The effort that the settings come from, for the record of how dictionaries were learned.
    pub effort: Option<Effort>,
    /// State of the training on disk, so that it can go on after whatever ended the program. Without it nothing is
    /// kept, and sampled vectors lie among the system's temporary files.
    pub state: Option<StateOptions>,
    /// A safetensors file to write the sampled vectors to, `layers.{l}.keys` and `layers.{l}.values`, `[n, m]`.
    pub keep_vectors: Option<PathBuf>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            tokens: Effort::default().tokens(),
            context: 1024,
            vectors: Effort::default().vectors(),
            sparse: false,
            learn: LearnOptions::default(),
            codebooks: Some(CodebookOptions::default()),
            joint_heads: 1,
            joint_layers: 1,
            kept: None,
            effort: None,
            state: None,
            keep_vectors: None,
        }
    }
}

impl TrainOptions {
    /// Returns the settings of an effort, for a head dim `m`.
    #[must_use]
    pub fn of(effort: Effort, head_dim: usize) -> Self {
        Self {
            tokens: effort.tokens(),
            vectors: effort.vectors(),
            effort: Some(effort),
            codebooks: Some(effort.codebooks(head_dim)),
            ..Self::default()
        }
    }

    /// Returns whether dictionaries for sparse codes are to be learned, rather than kept or left out.
    fn learns_sparse(&self) -> bool {
        self.sparse && self.kept.is_none()
    }

    /// How many times the tokens of the others the longer chunks have; 1 where there are none.
    fn long_chunks(&self, config: &Config) -> usize {
        let times = (config.context / self.context).min(LONG);
        let cycle = (LONG_EVERY - 1 + times) * self.context;
        // Fewer than three would not stand for long texts, and leave little of short ones.
        if self.tokens < 3 * cycle { 1 } else { times }
    }

    /// Which layers and heads are coded together.
    fn joint(&self, config: &Config) -> JointLayers {
        JointLayers {
            layers: self.joint_layers,
            heads: self.joint_heads,
            kv_heads: config.kv_heads,
        }
    }

    /// Checks all that can be checked before the text is read.
    ///
    /// # Errors
    /// Those of [`LearnOptions::check`] and [`CodebookOptions::check`], [`lexico::Error::Learn`] for more atoms than
    /// vectors, [`Error::NothingToLearn`], [`Error::JointHeads`], [`Error::JointLayers`], [`Error::JointSparse`], [`Error::TrainContext`] and [`Error::TrainTokens`].
    pub fn check(&self, config: &Config) -> Result<()> {
        if self.kept.is_none() {
            self.learn.check(config.head_dim)?;
        }
        if let Some(codebooks) = &self.codebooks {
            codebooks.check()?;
        }
        if !self.learns_sparse() && self.codebooks.is_none() {
            return Err(Error::NothingToLearn);
        }
        let (together, heads) = (self.joint_heads, config.kv_heads);
        if together == 0 || !heads.is_multiple_of(together) {
            return Err(Error::JointHeads { together, heads });
        }
        let (together, layers) = (self.joint_layers, config.layers);
        if together == 0 || !layers.is_multiple_of(together) {
            return Err(Error::JointLayers { together, layers });
        }
        if together > 1 && (self.sparse || self.kept.is_some()) {
            return Err(Error::JointSparse);
        }
        let (atoms, vectors) = (self.learn.atoms, self.vectors);
        if self.learns_sparse() && atoms > vectors {
            return Err(lexico::Error::Learn(LearnError::FewVectors { atoms, vectors }).into());
        }
        if u32::try_from(vectors).is_err() {
            return Err(lexico::Error::Learn(LearnError::Vectors(vectors)).into());
        }
        let (tokens, context, max) = (self.tokens, self.context, config.context);
        if context > max {
            return Err(Error::TrainContext { context, max });
        }
        if context < 2 || tokens / 2 < context {
            return Err(Error::TrainTokens { tokens, context });
        }
        Ok(())
    }
}

/// Progress of [`train`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TrainProgress {
    /// Reading of the corpus by the model.
    Reading {
        /// Tokens read.
        tokens: usize,
        /// Tokens to read in all: at first an estimate, in the end exact.
        total: usize,
    },
    /// Learning of a dictionary; several are learned at the same time.
    Learning {
        /// The layer.
        layer: usize,
        /// Part of the layer, `keys` or `values`.
        part: &'static str,
        /// Progress within the dictionary.
        progress: LearnProgress,
    },
    /// End of a dictionary's learning.
    Learned {
        /// The layer.
        layer: usize,
        /// Part of the layer, `keys` or `values`.
        part: &'static str,
        /// Held-out mean relative error.
        held_out_error: f32,
    },
    /// Measurement of how much errors of each head count, before heads are coded together.
    Weighing {
        /// Layers measured.
        done: usize,
        /// Layers in all, of all windows of text.
        total: usize,
    },
    /// Learning of codebooks, one dictionary after the other.
    LearningCodebooks {
        /// The layer, or the first of those that are coded together.
        layer: usize,
        /// Part of the layer, `keys` or `values`.
        part: &'static str,
        /// Progress within the dictionary.
        progress: CodebookProgress,
    },
    /// End of the learning of a dictionary's codebooks.
    LearnedCodebooks {
        /// The layer.
        layer: usize,
        /// Part of the layer, `keys` or `values`.
        part: &'static str,
        /// Held-out mean relative error.
        held_out_error: f32,
    },
    /// Measurement of what each head costs, layer after layer.
    Measuring {
        /// Layers measured.
        done: usize,
        /// Layers in all, of all windows of text.
        total: usize,
    },
}

/// Callback that is told of training's progress, from whichever thread is at work; it may break off.
pub type OnProgress<'a> = dyn FnMut(TrainProgress) -> ControlFlow<()> + Send + 'a;

/// Outcome of [`train`].
#[derive(Debug, Clone)]
pub struct Trained {
    /// The dictionaries, with their held-out errors.
    pub dictionaries: DictionarySet,
    /// Vectors that each dictionary learned from.
    pub vectors: usize,
    /// Errors of attention on the codes in every layer, on held-out chunks; of sparse codes where there are some.
    pub attention: Vec<AttentionErrors>,
    /// Epochs of the keys' and the values' dictionary of every layer; none of those that were kept.
    pub courses: Vec<[Vec<Epoch>; 2]>,
    /// Time that reading took in this run, without what was read before training was broken off.
    pub reading: Duration,
    /// Time that learning took in this run.
    pub learning: Duration,
}

/// A pass over the vectors of one dictionary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Epoch {
    /// Seconds spent on the dictionary up to the epoch's end.
    pub seconds: f64,
    /// Held-out mean relative error after the epoch.
    pub held_out_error: f32,
}

/// Parts of a layer that have a dictionary each.
const PARTS: [&str; 2] = ["keys", "values"];
/// How many times the tokens of the others the longer chunks have at the most.
const LONG: usize = 8;
/// File of the state that says how much was read.
const READING: &str = "reading";

/// Learns every layer's dictionaries of `model` from `corpus`: two for sparse codes, and two of codebooks for additive
/// codes.
///
/// The first are learned side by side, one a core where there are as many; the others one after the other on all cores
/// with all vectors in memory. The same settings and seed give the same ones whatever the number of threads, as far as
/// the model's own keys and values are the same, and whether or not training was broken off and resumed.
///
/// `progress` is called throughout and may break off. A state that is kept stays in its folder when all is done,
/// until [`remove_state`].
///
/// # Errors
/// Those of [`Corpus::chunks`], [`Error::Coding`] where the model gives numbers that are not finite,
/// [`lexico::Error::Learn`] where there are fewer vectors than atoms, [`lexico::Error::OtherModel`] where those that
/// are kept are of another, [`Error::State`],
/// [`lexico::Error::Interrupted`] where `progress` broke off.
pub fn train(
    model: &Model,
    corpus: &Corpus,
    options: &TrainOptions,
    progress: &mut OnProgress<'_>,
) -> Result<Trained> {
    options.check(model.decoder.config())?;
    if let Some(kept) = &options.kept {
        kept.check_fits(&model.identity())?;
    }
    let settings = settings(model, corpus, options)?;
    // Dropped, and so removed, in the end.
    let temporary;
    let state = match &options.state {
        Some(state) => State::open(state, &settings)?,
        None => {
            temporary = tempfile::tempdir().map_err(io(&std::env::temp_dir()))?;
            let state = StateOptions {
                folder: temporary.path().to_owned(),
                ..StateOptions::default()
            };
            State::open(&state, &settings)?
        }
    };
    let began = Instant::now();
    let reading = read(model, corpus, options, &state, progress).or_else(|error| {
        if !state.path(READING).exists() {
            state.remove()?;
        }
        Err(error)
    })?;
    let reading_took = began.elapsed();
    let (atoms, vectors) = (options.learn.atoms, reading.count());
    if options.learns_sparse() && atoms > vectors {
        // With these settings there is nothing to go on with.
        state.remove()?;
        return Err(lexico::Error::Learn(LearnError::FewVectors { atoms, vectors }).into());
    }
    if let Some(path) = &options.keep_vectors {
        reading.keep(path)?;
    }
    let began = Instant::now();
    let mut measured = Vec::new();
    let (mut dictionaries, courses) = match &options.kept {
        Some(kept) => {
            let courses = kept.layers.iter().map(|_| Default::default()).collect();
            (with_corpus(kept, corpus), courses)
        }
        None if options.sparse => {
            measured.push(CodeFamily::Sparse);
            learn_sparse(model, corpus, options, &reading, &state, progress)?
        }
        None => (new_set(model, corpus, options, &reading)?, Vec::new()),
    };
    if let Some(codebooks) = &options.codebooks {
        measured.push(CodeFamily::Additive);
        let joint = options.joint(model.decoder.config());
        let learned = codebooks::learn_all(model, &reading, codebooks, joint, &state, progress)?;
        let errors = learned.iter().map(|layer| LayerErrors {
            keys: layer.keys.held_out_error,
            values: layer.values.held_out_error,
        });
        dictionaries.training.additive_relative_error = Some(errors.collect());
        for (layer, learned) in dictionaries.layers.iter_mut().zip(learned) {
            layer.maps = Some(learned.as_ref().map(|own| Arc::clone(&own.maps)));
            layer.codebooks = Some(learned.map(|own| own.codebooks.into()));
        }
    }
    let learning_took = began.elapsed();
    let windows = &reading.progress.judged;
    let state = Some(&state);
    losses::measure_families(
        model,
        &mut dictionaries,
        &measured,
        windows,
        state,
        progress,
    )?;
    let attention = measure::attention_errors(model, &dictionaries, windows)?;
    Ok(Trained {
        dictionaries,
        vectors: reading.count(),
        attention,
        courses,
        reading: reading_took,
        learning: learning_took,
    })
}

/// Learns the dictionaries for sparse codes.
fn learn_sparse(
    model: &Model,
    corpus: &Corpus,
    options: &TrainOptions,
    reading: &Reading,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<(DictionarySet, Vec<[Vec<Epoch>; 2]>)> {
    let learned = learning::learn_all(reading, options, state, progress)?;
    let mut set = new_set(model, corpus, options, reading)?;
    let mut courses = Vec::with_capacity(learned.len());
    for (layer, [keys, values]) in set.layers.iter_mut().zip(learned) {
        set.training.relative_error.push(LayerErrors {
            keys: keys.held_out_error,
            values: values.held_out_error,
        });
        courses.push([keys.epochs, values.epochs]);
        layer.sparse = Some(KeyValue::new(
            keys.dictionary.into(),
            values.dictionary.into(),
        ));
    }
    Ok((set, courses))
}

/// Makes a set in which nothing was learned yet.
fn new_set(
    model: &Model,
    corpus: &Corpus,
    options: &TrainOptions,
    reading: &Reading,
) -> Result<DictionarySet> {
    Ok(DictionarySet {
        layers: vec![
            LayerDictionaries::default();
            model.decoder.config().layers / options.joint_layers
        ],
        model: model.identity(),
        training: Training {
            sparsity: options.learn.sparsity,
            corpus: corpus.names().to_vec(),
            tokens: reading.progress.tokens,
            tool: program(),
            effort: options.effort.map(|effort| effort.name().to_owned()),
            vectors: Some(reading.count()),
            seed: Some(options.learn.seed),
            tokens_crc32: Some(format!("{:08x}", reading.progress.checksum)),
            model_fingerprint: Some(model.weights_fingerprint()?),
            ..Training::default()
        },
    })
}

/// Adds the names of the texts that codebooks are learned from.
fn with_corpus(kept: &DictionarySet, corpus: &Corpus) -> DictionarySet {
    let mut dictionaries = kept.clone();
    let texts = &mut dictionaries.training.corpus;
    for name in corpus.names() {
        if !texts.contains(name) {
            texts.push(name.clone());
        }
    }
    dictionaries
}

fn program() -> String {
    format!("lexico {}", env!("CARGO_PKG_VERSION"))
}

/// Collects all settings that the outcome depends on, by names that people understand.
fn settings(model: &Model, corpus: &Corpus, options: &TrainOptions) -> Result<Map<String, Value>> {
    let learn = &options.learn;
    let files = corpus.files().into_iter();
    // A list of JSON is read as it is opened, and may be gone.
    let bytes: u64 = files.flat_map(std::fs::metadata).map(|m| m.len()).sum();
    let identity = model.identity();
    let rotary = format!(
        "{} theta {} {:?}",
        identity.rotary.kind, identity.rotary.theta, identity.rotary.parameters
    );
    let none = || "none".to_owned();
    let codebooks = options.codebooks.as_ref().map(|options| {
        format!(
            "{}, the first of {} atoms, judged at sparsity {}, {} rounds of {} vectors, beam {}, seed {}",
            options.codebooks,
            options.first,
            options.sparsity,
            options.rounds,
            options.vectors,
            options.beam,
            options.seed
        )
    });
    let kept = options.kept.as_ref().map(|kept| {
        let layers = kept.layers.iter();
        let checksums = layers
            .flat_map(|l| l.sparse.iter().flat_map(KeyValue::as_ref))
            .map(|own| format!("{:08x}", own.checksum()));
        checksums.collect::<Vec<_>>().join(" ")
    });
    let mut settings = json!({
        "model": identity.name,
        "architecture": identity.architecture,
        "layers": identity.layers,
        "KV heads": identity.kv_heads,
        "head dim": identity.head_dim,
        "rotary embedding": rotary,
        "the model's output": model.fingerprint()?,
        "corpus": corpus.names(),
        "bytes of the corpus": bytes,
        "tokens": options.tokens,
        "context": options.context,
        "vectors": options.vectors,
        // Earlier versions had others too; a state of theirs is refused.
        "learner": "Adam",
        "keys": "without their means before the rotary embedding",
        "cost of heads": "in their layers",
        "sparse": options.sparse,
        "atoms": learn.atoms,
        "sparsity": learn.sparsity,
        "epochs": learn.epochs,
        "batch": learn.batch.min(options.vectors),
        "learning rate": learn.learning_rate,
        "initial atoms": format!("{:?}", learn.initial),
        "re-seeding": learn.reseed,
        "patience": learn.patience,
        "seed": learn.seed,
        // States of earlier versions call codebooks so.
        "groups": codebooks.unwrap_or_else(none),
        "dictionaries kept": kept.unwrap_or_else(none),
        "program": program(),
    });
    // Not told where each is alone: states of earlier versions go on.
    if options.joint_heads > 1 {
        settings["heads together"] = options.joint_heads.into();
    }
    let times = options.long_chunks(model.decoder.config());
    if times > 1 {
        settings["longer chunks"] = (times * options.context).into();
    }
    if options.joint_layers > 1 {
        settings["layers together"] = options.joint_layers.into();
    }
    match settings {
        Value::Object(settings) => Ok(settings),
        _ => Ok(Map::new()),
    }
}

fn go_on(flow: ControlFlow<()>) -> Result<()> {
    match flow {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(lexico::Error::Interrupted.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_enough_tokens_is_in_longer_chunks() {
        let model = Model::tiny().unwrap();
        let config = model.decoder.config();
        let times = |tokens, context| {
            let options = TrainOptions {
                tokens,
                context,
                ..TrainOptions::default()
            };
            options.long_chunks(config)
        };
        let most = config.context;
        assert_eq!(times(48 * 64, 64), LONG.min(most / 64));
        assert_eq!(times(48 * 64 - 1, 64), 1);
        // As far as the model's context goes.
        assert_eq!(times(1 << 20, most / 2), 2);
        assert_eq!(times(1 << 20, most / 2 + 1), 1);
        assert_eq!(times(1 << 20, most), 1);
        let quick = TrainOptions::of(Effort::Quick, 64);
        assert!(quick.tokens >= 3 * (LONG_EVERY - 1 + LONG) * quick.context);
    }
}
