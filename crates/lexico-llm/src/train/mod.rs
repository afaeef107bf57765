//! From text to dictionaries: the model reads, its keys and values are sampled, each layer learns.

mod codebooks;
mod learning;
mod losses;
mod measure;
mod reading;
mod rows;
mod state;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lexico::DictionarySet;
use lexico::dictionary::{LayerCodebooks, LayerDictionaries, LayerErrors, Training};
use lexico::learn::{CodebookOptions, CodebookProgress, LearnOptions, LearnProgress};
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::corpus::Corpus;
use crate::error::{Error, Result, io};
use crate::model::Model;
use losses::Kind;
use reading::{Reading, read};
use state::State;

pub use losses::measure_losses;
pub use measure::AttentionErrors;
pub use state::{StateOptions, remove_state};

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
    /// How each dictionary for codes of one atom a group is learned beside; `None` where none is. The seed is that of
    /// the first, every other has the next.
    pub groups: Option<CodebookOptions>,
    /// Dictionaries that are kept as they are, with what was measured of them: only those of `groups` are learned, and
    /// replace any that are there.
    pub kept: Option<DictionarySet>,
    /// Where what was done is kept, so that training can go on after whatever ended the program. Without it
    /// nothing is kept, and sampled vectors lie among the system's temporary files.
    pub state: Option<StateOptions>,
    /// A safetensors file to write the sampled vectors to, `layers.{l}.keys` and `layers.{l}.values`, `[n, m]`.
    pub keep_vectors: Option<PathBuf>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            tokens: 1_000_000,
            context: 1024,
            vectors: 200_000,
            learn: LearnOptions::default(),
            groups: Some(CodebookOptions::default()),
            kept: None,
            state: None,
            keep_vectors: None,
        }
    }
}

impl TrainOptions {
    /// Checks all that can be checked before the text is read.
    ///
    /// # Errors
    /// Those of [`LearnOptions::check`] and [`CodebookOptions::check`], and [`lexico::Error::Learn`] where the settings
    /// contradict each other.
    pub fn check(&self, config: &Config) -> Result<()> {
        if self.kept.is_none() {
            self.learn.check(config.head_dim)?;
        }
        if let Some(groups) = &self.groups {
            groups.check()?;
        }
        let max_context = config.context;
        let refuse = |reason: String| Err(lexico::Error::Learn(reason).into());
        if self.kept.is_some() && self.groups.is_none() {
            let reason = "dictionaries that are kept and no groups leave nothing to learn";
            return refuse(reason.to_owned());
        }
        if self.kept.is_none() && self.learn.atoms > self.vectors {
            let (atoms, vectors) = (self.learn.atoms, self.vectors);
            return refuse(format!(
                "{atoms} atoms cannot be learned from {vectors} vectors"
            ));
        }
        if u32::try_from(self.vectors).is_err() {
            let vectors = self.vectors;
            return refuse(format!(
                "{vectors} vectors a dictionary: at most {} are possible",
                u32::MAX
            ));
        }
        if self.context > max_context {
            let context = self.context;
            return refuse(format!(
                "the model's context is {max_context}, not {context} tokens"
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
    /// A dictionary is being learned; several are at the same time.
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
    /// A dictionary for codes of one atom a group is being learned, one after the other.
    LearningCodebooks {
        /// The layer.
        layer: usize,
        /// `keys` or `values`.
        part: &'static str,
        /// How far it has come.
        progress: CodebookProgress,
    },
    /// A dictionary for codes of one atom a group is learned.
    LearnedCodebooks {
        /// The layer.
        layer: usize,
        /// `keys` or `values`.
        part: &'static str,
        /// Held-out mean relative error.
        held_out_error: f32,
    },
    /// The model predicts with the keys or the values of one head coded, and of another.
    Measuring {
        /// Cases measured.
        done: usize,
        /// Cases in all.
        total: usize,
    },
}

/// What is told of training's progress, from whichever thread is at work; it may break off.
pub type OnProgress<'a> = dyn FnMut(TrainProgress) -> ControlFlow<()> + Send + 'a;

/// Dictionaries and what they came of.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The dictionaries, with their held-out errors.
    pub dictionaries: DictionarySet,
    /// Vectors that each dictionary learned from.
    pub vectors: usize,
    /// What the codes do to attention in every layer, on held-out windows.
    pub attention: Vec<AttentionErrors>,
    /// How the keys' and the values' dictionary of every layer came about; nothing of those that were kept.
    pub courses: Vec<[Vec<Epoch>; 2]>,
    /// Time that reading took in this run; what was read before training was broken off does not count.
    pub reading: Duration,
    /// Time that learning took in this run.
    pub learning: Duration,
}

/// A pass over the vectors of one dictionary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Epoch {
    /// Seconds spent on the dictionary up to its end.
    pub seconds: f64,
    /// Held-out mean relative error after it.
    pub held_out_error: f32,
}

/// Names of what each layer has a dictionary of.
const PARTS: [&str; 2] = ["keys", "values"];
/// The state's file of what was read.
const READING: &str = "reading";

/// Learns every layer's dictionaries of `model` from `corpus`: two for codes of any atoms, and two for codes of one atom
/// a group.
///
/// The first are learned side by side, one a core where there are as many, the others one after the other on all cores
/// with all vectors in memory; the same settings and seed
/// give the same ones whatever the number of threads, as far as the model's own keys and values are the same, and
/// whether or not training was broken off and resumed.
///
/// `progress` is called throughout and may break off. A state that is kept stays in its folder when all is done,
/// until [`remove_state`].
///
/// # Errors
/// Those of [`Corpus::windows`], [`Error::Coding`] where the model gives what is no number,
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
        state.remove_if_nothing_saved()?;
        Err(error)
    })?;
    let reading_took = began.elapsed();
    let (atoms, vectors) = (options.learn.atoms, reading.count(options.vectors));
    if options.kept.is_none() && atoms > vectors {
        // With these settings there is nothing to go on with.
        state.remove()?;
        let reason = format!(
            "{atoms} atoms need at least as many vectors, and the text gave {vectors}; give more text or fewer atoms"
        );
        return Err(lexico::Error::Learn(reason).into());
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
        None => {
            measured.push(Kind::Sparse);
            learn_ordinary(model, corpus, options, &reading, &state, progress)?
        }
    };
    if let Some(groups) = &options.groups {
        measured.push(Kind::Additive);
        let learned = codebooks::learn_all(&reading, options.vectors, groups, &state, progress)?;
        let errors = learned.iter().map(|[keys, values]| LayerErrors {
            keys: keys.held_out_error,
            values: values.held_out_error,
        });
        dictionaries.training.additive_relative_error = Some(errors.collect());
        for (layer, [keys, values]) in dictionaries.layers.iter_mut().zip(learned) {
            layer.codebooks = Some(LayerCodebooks {
                keys: keys.dictionary,
                values: values.dictionary,
            });
        }
    }
    let learning_took = began.elapsed();
    // Measuring may take the model as many tokens as this share of those that it read.
    let tokens = reading.tokens() / 4;
    let windows = reading.judged();
    let state = Some(&state);
    losses::measure_kinds(
        model,
        &mut dictionaries,
        &measured,
        windows,
        tokens,
        state,
        progress,
    )?;
    let sparsity = dictionaries.training.sparsity;
    let attention = measure::attention_errors(model, &dictionaries.layers, sparsity, windows)?;
    Ok(Trained {
        dictionaries,
        vectors: reading.count(options.vectors),
        attention,
        courses,
        reading: reading_took,
        learning: learning_took,
    })
}

/// Learns the dictionaries for codes of any atoms.
fn learn_ordinary(
    model: &Model,
    corpus: &Corpus,
    options: &TrainOptions,
    reading: &Reading,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<(DictionarySet, Vec<[Vec<Epoch>; 2]>)> {
    let learned = learning::learn_all(reading, options, state, progress)?;
    let mut layers = Vec::with_capacity(learned.len());
    let mut errors = Vec::with_capacity(learned.len());
    let mut courses = Vec::with_capacity(learned.len());
    for [keys, values] in learned {
        errors.push(LayerErrors {
            keys: keys.held_out_error,
            values: values.held_out_error,
        });
        courses.push([keys.course, values.course]);
        layers.push(LayerDictionaries {
            keys: keys.dictionary,
            values: values.dictionary,
            codebooks: None,
        });
    }
    let dictionaries = DictionarySet {
        layers,
        model: model.identity(),
        training: Training {
            sparsity: options.learn.sparsity,
            corpus: corpus.names().to_vec(),
            tokens: reading.tokens(),
            relative_error: errors,
            tool: program(),
            ..Training::default()
        },
    };
    Ok((dictionaries, courses))
}

/// The dictionaries, with the names of the texts that their groups are learned from.
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

/// All that a training's outcome depends on, by names that people understand.
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
    let groups = options.groups.as_ref().map(|groups| {
        format!(
            "{}, the first of {} atoms, judged at sparsity {}, {} rounds, beam {}, seed {}",
            groups.groups, groups.first, groups.sparsity, groups.rounds, groups.beam, groups.seed
        )
    });
    let kept = options.kept.as_ref().map(|kept| {
        let layers = kept.layers.iter();
        let checksums =
            layers.map(|l| format!("{:08x} {:08x}", l.keys.checksum(), l.values.checksum()));
        checksums.collect::<Vec<_>>().join(" ")
    });
    let settings = json!({
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
        "learner": format!("{:?}", learn.method),
        "atoms": learn.atoms,
        "sparsity": learn.sparsity,
        "epochs": learn.epochs,
        "batch": learn.batch.min(options.vectors),
        "learning rate": learn.learning_rate,
        "initial atoms": format!("{:?}", learn.initial),
        "re-seeding": learn.reseed,
        "patience": learn.patience,
        "seed": learn.seed,
        "groups": groups.unwrap_or_else(none),
        "dictionaries kept": kept.unwrap_or_else(none),
        "program": program(),
    });
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

/// Refuses numbers of a layer that are none.
fn check_finite(layer: usize, part: &'static str, numbers: &[f32], head_dim: usize) -> Result<()> {
    match numbers.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::Coding {
            layer,
            part,
            reason: lexico::Error::NotFinite { row: at / head_dim },
        }),
    }
}
