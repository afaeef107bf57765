//! Universality of dictionaries: the error at which each codes the keys and values of a model that reads texts, those that it was learned on and others.

use std::collections::HashSet;
use std::ops::ControlFlow;

use candle_core::Tensor;
use lexico::attention::NumberType;
use lexico::dictionary::ModelIdentity;
use lexico::{DictionarySet, Encoder, Fit, KeyValue, Pursuit};
use lexico_llm::cache::{Footprint, FullCache, KvCache};
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::{Corpus, Model};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::plot::{Axis, Layout, Line, Panel, Scale, svg};
use crate::task::unique;

/// Settings of [`Universality::measure`].
#[derive(Debug, Clone, PartialEq)]
pub struct UniversalityOptions {
    /// Nonzeros of a vector; each is measured.
    pub sparsities: Vec<usize>,
    /// Max tokens of each text, in chunks drawn evenly from all of it.
    pub tokens: usize,
    /// Tokens that the model sees at once.
    pub context: usize,
    /// Vectors of each layer that are coded, an unbiased sample of all positions and heads.
    pub vectors: usize,
    /// Seed of the samples.
    pub seed: u64,
    /// True where dictionaries that were learned for another model are taken, where layers and head dim agree.
    pub any_model: bool,
}

impl Default for UniversalityOptions {
    fn default() -> Self {
        Self {
            sparsities: vec![4, 8, 16],
            tokens: 100_000,
            context: 1024,
            vectors: 4096,
            seed: 0,
            any_model: false,
        }
    }
}

/// Progress of [`Universality::measure`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UniversalityProgress<'a> {
    /// The text that the model reads, or whose vectors are coded.
    pub text: &'a str,
    /// Tokens while the model reads, layers while their vectors are coded.
    pub unit: &'static str,
    /// Number of those done; of layers, with every dictionary and sparsity.
    pub done: usize,
    /// Number of all: of tokens an estimate at first, in the end exact.
    pub total: usize,
}

/// Errors of dictionaries on texts: a matrix.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Universality {
    /// The model that read.
    pub model: String,
    /// The rows.
    pub dictionaries: Vec<MeasuredDictionary>,
    /// The columns.
    pub texts: Vec<MeasuredText>,
    /// A cell for each text, dictionary and sparsity, in this order.
    pub cells: Vec<Cell>,
    /// The sparsities measured, rising.
    #[serde(skip)]
    pub sparsities: Vec<usize>,
}

/// A set of dictionaries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeasuredDictionary {
    /// Name.
    pub name: String,
    /// `N`.
    pub atoms: usize,
    /// The texts that it was learned on.
    pub corpus: Vec<String>,
    /// The model that it was learned for, where that is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other_model: Option<String>,
}

/// A text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeasuredText {
    /// Name.
    pub name: String,
    /// Tokens that were read.
    pub tokens: usize,
    /// Vectors of each layer that were coded.
    pub vectors: usize,
}

/// Errors of one set of dictionaries on one text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// Name of the dictionary.
    pub dictionary: String,
    /// Name of the text.
    pub text: String,
    /// Nonzeros of a vector.
    pub sparsity: usize,
    /// True where the dictionary was learned on this text: it has the text's name, or says so itself.
    pub own: bool,
    /// Errors of the keys and of the values, means over the layers.
    #[serde(flatten)]
    pub errors: KeyValue<CellError>,
    /// Layer by layer.
    pub layers: Vec<LayerCell>,
}

impl Cell {
    /// Errors in a layer, or their means over all.
    ///
    /// # Panics
    /// Where there is no such layer.
    pub fn errors(&self, layer: Option<usize>) -> KeyValue<CellError> {
        layer.map_or(self.errors, |layer| self.layers[layer].errors)
    }
}

/// One layer of a [`Cell`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerCell {
    /// The layer, from 0.
    pub layer: usize,
    /// Errors of its keys and of its values.
    #[serde(flatten)]
    pub errors: KeyValue<CellError>,
}

/// An error, and how it compares.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CellError {
    /// Mean of `‖x − x̂‖ / ‖x‖`, f32 coefficients.
    pub relative_error: f32,
    /// Error over the least one of the dictionaries that were learned on the text; `None` where none was,
    /// or where it codes without error.
    pub over_own: Option<f32>,
}

impl CellError {
    fn new(relative_error: f32) -> Self {
        Self {
            relative_error,
            over_own: None,
        }
    }
}

impl Universality {
    /// Codes keys and values of `model` as it reads `texts` over `dictionaries`; both come with names.
    ///
    /// A text that a dictionary was learned on is no fair judge of it: give a part that was not seen, under
    /// the name of the dictionary that was learned on the rest. `progress` is called throughout and may break
    /// off.
    ///
    /// # Errors
    /// [`Error::Options`] where names repeat, a setting is impossible or a dictionary does not fit the model;
    /// [`lexico::Error::Sparsity`]; [`Error::Interrupted`]; those of [`Corpus::chunks`] and of the model.
    pub fn measure(
        model: &Model,
        dictionaries: &[(String, DictionarySet)],
        texts: &[(String, Corpus)],
        options: &UniversalityOptions,
        progress: &mut dyn FnMut(UniversalityProgress<'_>) -> ControlFlow<()>,
    ) -> Result<Self> {
        let identity = model.identity();
        let mut options = options.clone();
        options.sparsities.sort_unstable();
        options.sparsities.dedup();
        check_options(model, &options)?;
        check_names("dictionaries", dictionaries.iter().map(|(name, _)| name))?;
        check_names("texts", texts.iter().map(|(name, _)| name))?;
        let mut measured = Self {
            model: model.name.clone(),
            dictionaries: Vec::new(),
            texts: Vec::new(),
            cells: Vec::new(),
            sparsities: options.sparsities.clone(),
        };
        for (name, set) in dictionaries {
            let other_model = check_fits(name, set, &identity, options.any_model)?;
            let sparse: Option<Vec<_>> = set.layers.iter().map(|l| l.sparse.as_ref()).collect();
            let sparse = sparse.ok_or_else(|| Error::NoSparse(name.clone()))?;
            for both in &sparse {
                for &sparsity in &options.sparsities {
                    both.keys.check_sparsity(sparsity)?;
                    both.values.check_sparsity(sparsity)?;
                }
            }
            measured.dictionaries.push(MeasuredDictionary {
                name: name.clone(),
                atoms: sparse.first().map_or(0, |both| both.keys.len()),
                corpus: set.training.corpus.clone(),
                other_model,
            });
        }
        for (text, corpus) in texts {
            let mut show = |unit, done, total| {
                check(progress(UniversalityProgress {
                    text,
                    unit,
                    done,
                    total,
                }))
            };
            let (tokens, sampled) = sample(model, corpus, &options, &mut |tokens, total| {
                show("tokens", tokens, total)
            })?;
            let numbers = sampled.first().map_or(0, |layer| layer.sample.keys.len());
            measured.texts.push(MeasuredText {
                name: text.clone(),
                tokens,
                vectors: numbers / identity.head_dim,
            });
            let total = dictionaries.len() * options.sparsities.len() * sampled.len();
            let mut done = 0;
            let first = measured.cells.len();
            for (dictionary, set) in dictionaries {
                for &sparsity in &options.sparsities {
                    let mut layers = Vec::with_capacity(set.layers.len());
                    let sparse = set.layers.iter().flat_map(|layer| &layer.sparse);
                    for (layer, own) in sparse.enumerate() {
                        let vectors = &sampled[layer].sample;
                        let parts = KeyValue::new(
                            (&own.keys, &vectors.keys, "key"),
                            (&own.values, &vectors.values, "value"),
                        );
                        let errors = parts.try_map(|(dictionary, vectors, part)| {
                            let batch = Pursuit::new(dictionary, sparsity)
                                .and_then(|p| p.with_fit(Fit::LeastSquares).encode(vectors))
                                .map_err(|reason| lexico_llm::Error::Coding {
                                    layer,
                                    part,
                                    reason,
                                })?;
                            Ok::<_, Error>(CellError::new(batch.mean_relative_error()))
                        })?;
                        layers.push(LayerCell { layer, errors });
                        done += 1;
                        show("layers", done, total)?;
                    }
                    let errors: KeyValue<Vec<CellError>> =
                        layers.iter().map(|layer| layer.errors).collect();
                    let errors = errors.map(|errors| {
                        let sum: f64 = errors.iter().map(|e| f64::from(e.relative_error)).sum();
                        CellError::new((sum / errors.len() as f64) as f32)
                    });
                    measured.cells.push(Cell {
                        dictionary: dictionary.clone(),
                        text: text.clone(),
                        sparsity,
                        own: dictionary == text || set.training.corpus == corpus.names(),
                        errors,
                        layers,
                    });
                }
            }
            for &sparsity in &options.sparsities {
                let cells = measured.cells[first..].iter_mut();
                compare_with_own(&mut cells.filter(|c| c.sparsity == sparsity).collect::<Vec<_>>());
            }
        }
        Ok(measured)
    }

    /// The cell of a dictionary, a text and a sparsity.
    pub fn cell(&self, dictionary: &str, text: &str, sparsity: usize) -> Option<&Cell> {
        let of_these = |cell: &&Cell| cell.dictionary == dictionary && cell.text == text;
        let mut cells = self.cells.iter().filter(of_these);
        cells.find(|cell| cell.sparsity == sparsity)
    }

    /// Plots as SVG, keys beside values, a line for each layer: error against sparsity for every dictionary
    /// and text; error against `N` for every text and sparsity, where several dictionaries were learned on
    /// the same texts with different `N`.
    pub fn plot(&self) -> String {
        let mut rows = Vec::new();
        let s = Axis::new("sparsity s", Scale::Places);
        let n = Axis::new("atoms N", Scale::LogarithmicPlaces);
        for text in &self.texts {
            for dictionary in &self.dictionaries {
                let name = &dictionary.name;
                let points = self.sparsities.iter().filter_map(|&sparsity| {
                    Some((sparsity as f64, self.cell(name, &text.name, sparsity)?))
                });
                let title = format!("{name} on {}, N = {}", text.name, dictionary.atoms);
                rows.push(keys_and_values(&title, &s, points.collect()));
            }
        }
        for family in self.families() {
            let corpus = family[0].corpus.join(", ");
            for text in &self.texts {
                for &sparsity in &self.sparsities {
                    let points = family.iter().filter_map(|own| {
                        let cell = self.cell(&own.name, &text.name, sparsity)?;
                        Some((own.atoms as f64, cell))
                    });
                    let title = format!("learned on {corpus}, on {}, s = {sparsity}", text.name);
                    rows.push(keys_and_values(&title, &n, points.collect()));
                }
            }
        }
        svg(&rows, Layout::default())
    }

    /// Dictionaries that were learned on the same texts and differ in `N`, by `N`.
    fn families(&self) -> Vec<Vec<&MeasuredDictionary>> {
        let corpora = unique(self.dictionaries.iter().map(|own| &own.corpus)).into_iter();
        let families = corpora.map(|corpus| {
            let family = self.dictionaries.iter().filter(|own| own.corpus == *corpus);
            let mut family: Vec<_> = family.collect();
            family.sort_by_key(|dictionary| dictionary.atoms);
            family.dedup_by_key(|dictionary| dictionary.atoms);
            family
        });
        families.filter(|family| family.len() > 1).collect()
    }
}

/// Takes the keys' error, or the values'.
pub type Part = fn(KeyValue<CellError>) -> CellError;

fn keys_and_values(title: &str, x: &Axis, points: Vec<(f64, &Cell)>) -> Vec<Panel> {
    let panel = |name: &str, part: Part| {
        let layers = points.first().map_or(0, |(_, cell)| cell.layers.len());
        let line = |layer: usize| Line {
            name: format!("layer {layer}"),
            points: points
                .iter()
                .map(|(x, cell)| (*x, part(cell.errors(Some(layer))).relative_error.into()))
                .collect(),
            bars: Vec::new(),
        };
        Panel {
            title: format!("{name}: {title}"),
            x: x.clone(),
            y: Axis::new("mean relative error", Scale::FromZero),
            level: None,
            lines: (0..layers).map(line).collect(),
        }
    };
    vec![panel("keys", |e| e.keys), panel("values", |e| e.values)]
}

/// Sets `over_own` in the cells of one text and sparsity.
fn compare_with_own(cells: &mut [&mut Cell]) {
    let layers = cells.first().map_or(0, |cell| cell.layers.len());
    for layer in std::iter::once(None).chain((0..layers).map(Some)) {
        let own = cells.iter().filter(|cell| cell.own);
        let own: KeyValue<Vec<CellError>> = own.map(|cell| cell.errors(layer)).collect();
        let least = own.map(|errors| {
            let errors = errors.iter().map(|error| error.relative_error);
            errors.min_by(f32::total_cmp).filter(|&least| least > 0.0)
        });
        for cell in cells.iter_mut() {
            let errors = match layer {
                None => &mut cell.errors,
                Some(layer) => &mut cell.layers[layer].errors,
            };
            for (error, least) in errors.as_mut().zip(least) {
                error.over_own = least.map(|least| error.relative_error / least);
            }
        }
    }
}

fn check(flow: ControlFlow<()>) -> Result<()> {
    match flow {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted),
    }
}

fn check_options(model: &Model, options: &UniversalityOptions) -> Result<()> {
    let refuse = |reason: String| Err(Error::Options(reason));
    if options.sparsities.is_empty() {
        return refuse("no sparsity is given".to_owned());
    }
    if options.vectors == 0 {
        return refuse("at least one vector must be coded".to_owned());
    }
    let (context, max) = (options.context, model.decoder.config().context);
    if context < 2 || context > max {
        return refuse(format!(
            "a context of {context} tokens is impossible: between 2 and {max}, the model's"
        ));
    }
    if options.tokens < context {
        let tokens = options.tokens;
        return refuse(format!(
            "{tokens} tokens do not fill one chunk of {context}"
        ));
    }
    Ok(())
}

fn check_names<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<()> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            let reason = format!("two {what} are called {name}; give names of their own");
            return Err(Error::Options(reason));
        }
    }
    if seen.is_empty() {
        return Err(Error::Options(format!("there are no {what}")));
    }
    Ok(())
}

/// Checks that a set can code the vectors of a model; returns the name of the model that it was learned for
/// where that is another.
fn check_fits(
    name: &str,
    set: &DictionarySet,
    model: &ModelIdentity,
    any_model: bool,
) -> Result<Option<String>> {
    let Err(other) = set.check_fits(model) else {
        return Ok(None);
    };
    let refuse = |reason: String| Err(Error::Options(format!("dictionary {name}: {reason}")));
    if !any_model {
        return refuse(format!(
            "{other}; --any-model takes it all the same where layers and head dim agree"
        ));
    }
    let (layers, head_dim) = (set.layers.len(), set.model.head_dim);
    if (layers, head_dim) != (model.layers, model.head_dim) {
        return refuse(format!(
            "it has {layers} layers and head dim {head_dim}, the model {} {} and {}",
            model.name, model.layers, model.head_dim
        ));
    }
    Ok(Some(set.model.name.clone()))
}

/// A layer's keys and values: a sample of them, `[n, m]` each, those of one position and head in the same row.
#[derive(Default)]
struct LayerVectors {
    sample: KeyValue<Vec<f32>>,
    /// Number of vectors that were offered.
    seen: usize,
}

/// Has the model read chunks of a corpus; returns how many tokens it read, and the layers' samples.
fn sample(
    model: &Model,
    corpus: &Corpus,
    options: &UniversalityOptions,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<(usize, Vec<LayerVectors>)> {
    let config = model.decoder.config();
    let (context, seed) = (options.context, options.seed);
    let mut chunks = corpus.chunks(&model.tokenizer, context, options.tokens, seed)?;
    let layers = (0..config.layers).map(|_| LayerVectors::default());
    let mut collector = Collector {
        cache: FullCache::new(config, NumberType::F32),
        head_dim: config.head_dim,
        max: options.vectors,
        layers: layers.collect(),
        rng: ChaCha8Rng::seed_from_u64(seed),
    };
    let mut tokens = 0;
    while let Some(chunk) = chunks.next() {
        let chunk = chunk?;
        collector.cache = FullCache::new(config, NumberType::F32);
        let mut sequences = [Sequence {
            tokens: &chunk,
            cache: &mut collector,
        }];
        model.decoder.forward(&mut sequences, Logits::Last)?;
        tokens += chunk.len();
        progress(tokens, chunks.total())?;
    }
    Ok((tokens, collector.layers))
}

/// A dense cache for one chunk at a time that samples the keys and values it is given.
struct Collector {
    cache: FullCache,
    head_dim: usize,
    /// Max vectors of a layer's sample.
    max: usize,
    layers: Vec<LayerVectors>,
    rng: ChaCha8Rng,
}

impl KvCache for Collector {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> lexico_llm::Result<Tensor> {
        let m = self.head_dim;
        let numbers = |x: &Tensor| -> lexico_llm::Result<Vec<f32>> {
            let x = x.to_dtype(candle_core::DType::F32)?;
            Ok(x.flatten_all()?.to_vec1()?)
        };
        let (keys, values) = (numbers(k)?, numbers(v)?);
        let own = &mut self.layers[layer];
        // An unbiased sample of a stream (Vitter's algorithm R, 1985).
        for (key, value) in keys.chunks_exact(m).zip(values.chunks_exact(m)) {
            own.seen += 1;
            let place = if own.seen <= self.max {
                for sample in own.sample.as_mut() {
                    sample.resize(own.seen * m, 0.0);
                }
                own.seen - 1
            } else {
                self.rng.random_range(0..own.seen)
            };
            if place < self.max {
                for (sample, vector) in own.sample.as_mut().zip(KeyValue::new(key, value)) {
                    sample[place * m..][..m].copy_from_slice(vector);
                }
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
