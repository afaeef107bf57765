mod saved;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use ::lexico::attention::{DenseRows, NumberType, Source};
use ::lexico::dictionary::{
    Atoms, Codebooks, CodingLosses, Dictionary, Extension, LayerDictionaries, LayerSparsities,
    additive_sparsity,
};
use ::lexico::encode::{AdaptivePursuit, BEAM_WIDTH, BeamSearch, EncodedBatch};
use ::lexico::threads::{Alone, Threads};
use ::lexico::{CodeFormat, Codes, CoefficientFormat, DictionarySet, Pursuit};
use candle_core::Tensor;

#[cfg(feature = "cuda")]
use super::device::DeviceLexicoCache;
use super::method::{CacheContext, Method, NUMBER_TYPES, Values, option};
use super::{CacheSpec, CacheState, Decoded, Footprint, KvCache, Step, outside_window};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::threads::{CandleThreads, cores_to_spare};

pub(super) static METHOD: Method = Method {
    name: "lexico",
    summary: "sparse codes over the model's dictionaries, the newest positions dense",
    needs_dictionaries: true,
    options: &[
        option(
            "sparsity",
            Values::Number,
            "as trained",
            "atoms of keys and values, on average",
        ),
        option("key-sparsity", Values::Count, "sparsity", "atoms of a key"),
        option(
            "value-sparsity",
            Values::Count,
            "sparsity",
            "atoms of a value",
        ),
        option(
            "allocation",
            Values::OneOf(&["measured", "same"]),
            "measured, where it was",
            "which heads get the atoms",
        ),
        option(
            "tolerance",
            Values::Number,
            "0",
            "relative error that needs no more atoms; not with packed codes",
        ),
        option(
            "fit",
            Values::OneOf(&["unbiased", "least-squares"]),
            "unbiased",
            "coefficients that keep scores, or vectors, nearest",
        ),
        option(
            "adaptive",
            Values::Count,
            "0",
            "atoms that a session may add to each dictionary for vectors that miss the tolerance",
        ),
        option(
            "window",
            Values::Count,
            "128",
            "newest positions, kept dense",
        ),
        option(
            "batch",
            Values::Count,
            "16",
            "positions that leave the window at once",
        ),
        option(
            "format",
            Values::OneOf(&["packed", "i8", "f8", "f32"]),
            "packed, where it was learned",
            "codes of a byte an atom, or of 2 and a coefficient",
        ),
        option(
            "beam",
            Values::Count,
            "8",
            "sums that the search for packed codes follows",
        ),
        option("dense", NUMBER_TYPES, "f16", "numbers of the window"),
    ],
    build: |spec, context| {
        let dictionaries = needed(context)?;
        let settings = settings(spec, context, dictionaries)?;
        #[cfg(feature = "cuda")]
        if context.device.is_cuda() {
            let cache =
                DeviceLexicoCache::new(context.config, dictionaries, settings, context.device)?;
            return Ok(Box::new(cache));
        }
        let cache = LexicoCache::new(context.config, dictionaries.clone(), settings)?;
        Ok(Box::new(cache))
    },
    bytes: |spec, context, lengths| {
        let dictionaries = needed(context)?;
        let settings = settings(spec, context, dictionaries)?;
        Ok(settings.bytes(context.config, lengths.end))
    },
    settings: |spec, context, budget| {
        let Some(dictionaries) = context.dictionaries else {
            return Vec::new();
        };
        let window = budget.window(context.config);
        let by_part = ["key-sparsity", "value-sparsity"].map(|part| spec.given(part).is_some());
        let format = format(spec, dictionaries);
        let measured = format.losses(dictionaries).is_some() && by_part == [false, false];
        let steps = if measured && spec.text("allocation") != "same" {
            4
        } else {
            1
        };
        let most = format.most(dictionaries) * steps;
        let sparsities = (steps..=most).rev().map(|step| step as f64 / steps as f64);
        let window = vec![
            ("window", window.to_string()),
            ("batch", (window / 16).to_string()),
        ];
        if by_part == [true, true] {
            return vec![window];
        }
        sparsities
            .map(|sparsity| {
                let mut setting = window.clone();
                setting.push(("sparsity", sparsity.to_string()));
                setting
            })
            .collect()
    },
};

fn needed<'a>(context: &CacheContext<'a>) -> Result<&'a Arc<DictionarySet>> {
    context.dictionaries.ok_or_else(|| Error::NoDictionary {
        method: "lexico",
        model: context.model.to_owned(),
    })
}

fn settings(
    spec: &CacheSpec,
    context: &CacheContext<'_>,
    dictionaries: &DictionarySet,
) -> Result<LexicoSettings> {
    let format = format(spec, dictionaries);
    let settings = LexicoSettings {
        sparsities: sparsities(spec, context, dictionaries, format)?,
        format,
        tolerance: spec.number("tolerance")?,
        unbiased: spec.text("fit") == "unbiased",
        adaptive: spec.number("adaptive")?,
        window: spec.number("window")?,
        batch: spec.number("batch")?,
        dense: spec.number_type("dense"),
    };
    let foreign = match format {
        Format::Additive { .. } => ["tolerance", "adaptive"].as_slice(),
        Format::Sparse(_) => &["beam"],
    };
    match foreign.iter().find(|option| spec.given(option).is_some()) {
        Some(option) => Err(Error::OptionValue {
            method: "lexico",
            option,
            value: spec.text(option).to_owned(),
            reason: match format {
                Format::Additive { .. } => {
                    "packed codes all have as many atoms, of the dictionary alone; give format=i8 too"
                }
                Format::Sparse(_) => "only the search for packed codes has a beam",
            }
            .to_owned(),
        }),
        None => Ok(settings),
    }
}

/// The codes that the options ask for.
fn format(spec: &CacheSpec, dictionaries: &DictionarySet) -> Format {
    let packed = || Format::Additive {
        beam: spec.number("beam").unwrap_or(BEAM_WIDTH),
    };
    match spec.given("format") {
        Some("packed") => packed(),
        Some("f32") => Format::Sparse(CoefficientFormat::F32),
        Some("f8") => Format::Sparse(CoefficientFormat::F8),
        Some(_) => Format::Sparse(CoefficientFormat::I8),
        None if dictionaries.max_codebooks() > 0 => packed(),
        None => Format::Sparse(CoefficientFormat::I8),
    }
}

impl Format {
    /// The largest sparsity that it can have.
    fn most(self, dictionaries: &DictionarySet) -> usize {
        match self {
            Self::Additive { .. } => dictionaries.max_codebooks(),
            Self::Sparse(_) => dictionaries.max_nonzeros(),
        }
    }

    /// What coding each head so costs, where it was measured.
    fn losses(self, dictionaries: &DictionarySet) -> Option<&CodingLosses> {
        match self {
            Self::Additive { .. } => dictionaries.training.additive_losses.as_ref(),
            Self::Sparse(_) => dictionaries.training.losses.as_ref(),
        }
    }

    /// The mean sparsity where none is given.
    fn usual_sparsity(self, dictionaries: &DictionarySet) -> f64 {
        let trained = dictionaries.training.sparsity;
        match self {
            Self::Additive { .. } => additive_sparsity(trained, self.most(dictionaries)) as f64,
            Self::Sparse(_) => trained as f64,
        }
    }

    fn allocate(self, dictionaries: &DictionarySet, mean: f64) -> Option<Vec<LayerSparsities>> {
        match self {
            Self::Additive { .. } => dictionaries.allocate_additive(mean),
            Self::Sparse(_) => dictionaries.allocate(mean),
        }
    }
}

/// The sparsities of every layer and head that the options ask for.
fn sparsities(
    spec: &CacheSpec,
    context: &CacheContext<'_>,
    dictionaries: &DictionarySet,
    format: Format,
) -> Result<Vec<LayerSparsities>> {
    let refused = |option: &'static str, reason: &str| Error::OptionValue {
        method: "lexico",
        option,
        value: spec.text(option).to_owned(),
        reason: reason.to_owned(),
    };
    let mean: f64 = match spec.given("sparsity") {
        Some(_) => spec.number("sparsity")?,
        None => format.usual_sparsity(dictionaries),
    };
    let most = format.most(dictionaries);
    if most == 0 {
        let reason = "these dictionaries have no groups; `lexico train` makes some that do, or use format=i8";
        return Err(refused("format", reason));
    }
    if !(1.0..=most as f64).contains(&mean) {
        let reason = match format {
            Format::Additive { .. } => {
                format!("it must be from 1 to {most}, the groups of a dictionary")
            }
            Format::Sparse(_) => {
                format!("it must be from 1 to {most}, the head dim or the atoms of a dictionary")
            }
        };
        return Err(refused("sparsity", &reason));
    }
    let part = |option| match spec.given(option) {
        Some(_) => spec.number(option).map(Some),
        None => Ok(None),
    };
    let (keys, values) = (part("key-sparsity")?, part("value-sparsity")?);
    if keys.is_some() && values.is_some() && spec.given("sparsity").is_some() {
        let reason = "with key-sparsity and value-sparsity it says nothing; leave it out";
        return Err(refused("sparsity", reason));
    }
    let by_part = keys.is_some() || values.is_some();
    let losses = format.losses(dictionaries);
    let allocated = match spec.given("allocation") {
        Some("measured") if by_part => {
            let reason =
                "the measured losses decide between keys and values too; give sparsity alone";
            return Err(refused("allocation", reason));
        }
        Some("measured") if losses.is_none() => {
            let reason =
                "these dictionaries were made without measuring losses; `lexico measure` adds them";
            return Err(refused("allocation", reason));
        }
        Some("same") => None,
        _ if by_part => None,
        _ => format.allocate(dictionaries, mean),
    };
    if let Some(allocated) = allocated {
        return Ok(allocated);
    }
    if mean.fract() != 0.0 {
        let reason = "sparsities that are the same for all heads are whole numbers";
        return Err(refused("sparsity", reason));
    }
    let mean = mean as usize;
    let (keys, values) = (keys.unwrap_or(mean), values.unwrap_or(mean));
    let each = LayerSparsities::same(context.config.kv_heads, keys, values);
    Ok(vec![each; context.config.layers])
}

/// How codes are stored, and so how they are found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Format {
    /// One atom a group, `s + 1` bytes a vector; the search follows so many sums.
    Additive {
        /// See [`BeamSearch::with_beam`].
        beam: usize,
    },
    /// Any atoms, with coefficients: orthogonal matching pursuit.
    Sparse(CoefficientFormat),
}

/// Settings of [`LexicoCache`].
#[derive(Debug, Clone, PartialEq)]
pub struct LexicoSettings {
    /// Most nonzeros of each head's keys and values, layer by layer.
    pub sparsities: Vec<LayerSparsities>,
    /// `δ`: relative error at which the pursuit stops early; 0 never does.
    pub tolerance: f32,
    /// Whether coefficients are [scaled up](EncodedBatch::unbias) so that no score is shrunk, instead of
    /// those of least squares.
    pub unbiased: bool,
    /// Most atoms that the session adds to each dictionary, from vectors that miss the tolerance.
    pub adaptive: usize,
    /// `n_b`: the newest positions, kept dense.
    pub window: usize,
    /// `n_a`: how many positions leave the window at once.
    pub batch: usize,
    /// How codes are stored.
    pub format: Format,
    /// How the window is stored.
    pub dense: NumberType,
}

/// Keys and values as sparse codes over the model's dictionaries, the newest ones dense.
///
/// Kim, Park, Cho, Papailiopoulos: *Lexico* (ICML 2025). New positions attend at full precision
/// to each other and to the window, and on the codes to all that came before. What the window
/// cannot hold of a prompt is coded right after, so that at most one layer of a prompt is ever dense.
///
/// In decode positions leave the window in batches, each layer at its own steps, so that no token pays for all
/// layers. A batch is coded while the next tokens are decoded where there are cores that decoding does not use,
/// and in between where there are none; until a step that only the layer decides it is attended to as dense. Results
/// depend neither on timing nor, but for the order of sums over long contexts, on the number of threads.
///
/// With `adaptive` atoms the session adds vectors that miss the tolerance to its own extension of each
/// dictionary, shared by a layer's heads, until that is full; see [`AdaptivePursuit`] for the order. What a
/// prompt adds so depends on the parts that it is coded in, 1,024 positions each, and in decode on `batch`. The
/// extension lives and ends with the cache, like its codes: a session that reads its text anew adds atoms anew.
pub struct LexicoCache {
    dictionaries: Arc<DictionarySet>,
    settings: Arc<LexicoSettings>,
    layers: Vec<Layer>,
    /// The model's sliding window.
    sliding_window: Option<usize>,
    positions: usize,
    /// Whether batches are coded beside the decoding.
    background: bool,
}

struct Layer {
    heads: Vec<Head>,
    added: Added,
    leaving: Option<Leaving>,
}

/// A batch of positions, the window's oldest, on its way to the codes.
struct Leaving {
    /// Steps since it began.
    age: usize,
    /// Whence its codes come, where they are made beside the decoding.
    codes: Option<Receiver<Result<Batch>>>,
}

/// Atoms that the session has added to a layer's dictionaries.
#[derive(Clone)]
struct Added {
    keys: Extension,
    values: Extension,
}

/// Codes of some positions, head by head, and all that is added by then.
struct Batch {
    keys: Vec<EncodedBatch>,
    values: Vec<EncodedBatch>,
    added: Added,
}

struct Head {
    keys: Part,
    values: Part,
}

/// The keys, or the values, of one KV head: the past as codes, then the window.
struct Part {
    codes: Codes,
    window: DenseRows,
}

/// Most positions of a prompt that are coded at once: enough to read a dictionary seldom.
const AT_ONCE: usize = 1024;

impl LexicoCache {
    /// An empty cache for a model of this shape.
    ///
    /// # Errors
    /// [`lexico::Error::OtherModel`](::lexico::Error::OtherModel) where the dictionaries are of
    /// another shape; where a sparsity or the tolerance is impossible.
    pub fn new(
        config: &Config,
        dictionaries: Arc<DictionarySet>,
        settings: LexicoSettings,
    ) -> Result<Self> {
        dictionaries.check_fits(&config.identity("at hand"))?;
        if settings.batch == 0 {
            return Err(Error::OptionValue {
                method: "lexico",
                option: "batch",
                value: "0".to_owned(),
                reason: "at least one position leaves the window at once".to_owned(),
            });
        }
        let of_shape = |layer: &LayerSparsities| {
            layer.keys.len() == config.kv_heads && layer.values.len() == config.kv_heads
        };
        let sparsities = &settings.sparsities;
        if sparsities.len() != config.layers || !sparsities.iter().all(of_shape) {
            return Err(Error::OptionValue {
                method: "lexico",
                option: "sparsity",
                value: format!("{sparsities:?}"),
                reason: "one for every head of every layer is needed".to_owned(),
            });
        }
        let part = |sparsity: usize, dictionary: Coding<'_>| -> Result<Part> {
            // Refuses impossible settings now rather than at the first full window.
            dictionary.check(&settings, sparsity)?;
            Ok(Part {
                codes: Codes::new(CodeFormat {
                    sparsity,
                    variable: settings.tolerance > 0.0,
                    coefficients: dictionary.coefficients(),
                })?,
                window: DenseRows::new(config.head_dim, settings.dense),
            })
        };
        let mut layers = Vec::with_capacity(config.layers);
        for (layer, sparsities) in dictionaries.layers.iter().zip(&settings.sparsities) {
            let mut heads = Vec::with_capacity(config.kv_heads);
            let [own_keys, own_values] = settings.codings(layer)?;
            for (&key, &value) in sparsities.keys.iter().zip(&sparsities.values) {
                heads.push(Head {
                    keys: part(key, own_keys)?,
                    values: part(value, own_values)?,
                });
            }
            layers.push(Layer {
                heads,
                added: Added {
                    keys: Extension::new(config.head_dim),
                    values: Extension::new(config.head_dim),
                },
                leaving: None,
            });
        }
        Ok(Self {
            dictionaries,
            settings: Arc::new(settings),
            layers,
            sliding_window: config.window,
            positions: 0,
            background: cores_to_spare(),
        })
    }
}

impl Part {
    /// Appends the positions from `first` on, of those in the window and then those that are `new`.
    fn read(&self, first: usize, count: usize, new: &[f32], head_dim: usize, out: &mut Vec<f32>) {
        let held = self.window.len();
        let dense = count.min(held.saturating_sub(first));
        self.window.read(first.min(held), dense, out);
        let passing = first.max(held) - held;
        out.extend_from_slice(&new[passing * head_dim..][..(count - dense) * head_dim]);
    }

    fn len(&self) -> usize {
        self.codes.len() + self.window.len()
    }
}

impl LexicoSettings {
    /// Bytes of a cache of `positions`, about: sessions that add atoms are counted as if they added none.
    fn bytes(&self, config: &Config, positions: usize) -> f64 {
        // Batches leave whole, each layer's at its own step, and the window keeps the room that it needed for them.
        let leaving = self.batch.saturating_mul(3) / 2;
        let dense = positions.min(self.window.saturating_add(leaving)) as f64;
        let coded = positions as f64 - dense;
        let bytes = |s: usize| match self.format {
            Format::Additive { .. } => s + 1,
            Format::Sparse(CoefficientFormat::F32) => 6 * s,
            Format::Sparse(_) => 3 * s + 1,
        };
        let heads = self
            .sparsities
            .iter()
            .flat_map(|l| l.keys.iter().chain(&l.values));
        let code: usize = heads.map(|&s| bytes(s)).sum();
        let number = match self.dense {
            NumberType::F16 => 2,
            NumberType::F32 => 4,
        };
        let row = 2 * config.layers * config.kv_heads * config.head_dim * number;
        // Codes grow by a 64th, at least by four vectors; half of that is empty.
        // A batch that is coded beside the decoding is held in f32 too, half of the time.
        let background = if cores_to_spare() && self.batch > 1 {
            self.batch
        } else {
            0
        };
        let leaving = background.min(positions) as f64 * (row as f64 / number as f64) * 2.0;
        let grown = coded + (coded / 128.0).max(2.0).min(coded);
        let heads = config.layers * config.kv_heads;
        let bookkeeping = bookkeeping(config.layers, heads) as f64;
        grown * code as f64 + dense * row as f64 + leaving + bookkeeping
    }

    /// After how many steps the batch that leaves the window of a layer takes its place among the codes. Each
    /// layer at its own: a token then waits for few.
    pub(super) fn due(&self, layer: usize) -> usize {
        self.batch / 4 + layer.saturating_mul(self.batch / 2) / self.sparsities.len()
    }

    /// What a layer's keys and values are coded over.
    fn codings<'d>(&self, layer: &'d LayerDictionaries) -> Result<[Coding<'d>; 2]> {
        match (self.format, &layer.codebooks) {
            (Format::Sparse(coefficients), _) => {
                Ok([&layer.keys, &layer.values].map(|own| Coding::Sparse(own, coefficients)))
            }
            (Format::Additive { beam }, Some(codebooks)) => {
                Ok([&codebooks.keys, &codebooks.values].map(|own| Coding::Additive(own, beam)))
            }
            (Format::Additive { .. }, None) => Err(Error::OptionValue {
                method: "lexico",
                option: "format",
                value: "packed".to_owned(),
                reason: "these dictionaries have no groups".to_owned(),
            }),
        }
    }
}

/// What vectors are coded over, and how.
#[derive(Clone, Copy)]
enum Coding<'d> {
    Sparse(&'d Dictionary, CoefficientFormat),
    /// With the width of the search's beam.
    Additive(&'d Codebooks, usize),
}

impl<'d> Coding<'d> {
    fn coefficients(self) -> CoefficientFormat {
        match self {
            Self::Sparse(_, coefficients) => coefficients,
            Self::Additive(dictionary, _) => CoefficientFormat::InAtoms(dictionary.groups()),
        }
    }

    /// What codes of the sparsities of a layer's heads are over.
    fn atoms<'a>(self, added: &'a Extension, sparsities: &[usize]) -> Atoms<'a>
    where
        'd: 'a,
    {
        match self {
            Self::Sparse(dictionary, _) => Atoms::extended(dictionary, added),
            Self::Additive(dictionary, _) => dictionary.atoms(most(sparsities)),
        }
    }

    fn checksum(self) -> u32 {
        match self {
            Self::Sparse(dictionary, _) => dictionary.checksum(),
            Self::Additive(dictionary, _) => dictionary.checksum(),
        }
    }

    fn check(self, settings: &LexicoSettings, sparsity: usize) -> ::lexico::Result<()> {
        match self {
            Self::Sparse(dictionary, _) => settings.pursuit(dictionary, sparsity).map(drop),
            Self::Additive(dictionary, _) => dictionary.check_sparsity(sparsity),
        }
    }

    /// Codes `vectors` `[kv_heads, positions, m]` and gives a batch a head. All heads at once: every reading of a
    /// dictionary serves as many vectors as there are.
    fn encode(
        self,
        settings: &LexicoSettings,
        added: &mut Extension,
        sparsities: &[usize],
        vectors: &[f32],
        threads: &dyn Threads,
    ) -> ::lexico::Result<Vec<EncodedBatch>> {
        match self {
            Self::Sparse(dictionary, _) => {
                let pursuit = settings.pursuit(dictionary, most(sparsities))?;
                let mut heads = pursuit.encode_heads_on(added, vectors, sparsities, threads)?;
                if settings.unbiased {
                    heads.iter_mut().for_each(EncodedBatch::unbias);
                }
                Ok(heads)
            }
            Self::Additive(dictionary, beam) => {
                let pursuit = BeamSearch::new(dictionary, most(sparsities))?;
                pursuit
                    .with_beam(beam)
                    .unbiased(settings.unbiased)
                    .encode_heads_on(vectors, sparsities, threads)
            }
        }
    }
}

/// The largest sparsity of a layer's heads.
fn most(sparsities: &[usize]) -> usize {
    sparsities.iter().copied().max().unwrap_or(1)
}

impl LexicoSettings {
    fn pursuit<'d>(
        &self,
        dictionary: &'d Dictionary,
        sparsity: usize,
    ) -> ::lexico::Result<AdaptivePursuit<'d>> {
        let pursuit = Pursuit::new(dictionary, sparsity)?.with_tolerance(self.tolerance)?;
        AdaptivePursuit::new(pursuit, self.adaptive)
    }
}

/// Codes keys and values `[kv_heads, positions, m]` over the dictionaries and what is `added` to them.
fn code(
    dictionaries: &LayerDictionaries,
    mut added: Added,
    settings: &LexicoSettings,
    layer: usize,
    keys: &[f32],
    values: &[f32],
    threads: &dyn Threads,
) -> Result<Batch> {
    let own = &settings.sparsities[layer];
    let [key_coding, value_coding] = settings.codings(dictionaries)?;
    let refused = |part| {
        move |reason| Error::Coding {
            layer,
            part,
            reason,
        }
    };
    Ok(Batch {
        keys: key_coding
            .encode(settings, &mut added.keys, &own.keys, keys, threads)
            .map_err(refused("key"))?,
        values: value_coding
            .encode(settings, &mut added.values, &own.values, values, threads)
            .map_err(refused("value"))?,
        added,
    })
}

impl Layer {
    /// Positions in the window.
    fn window(&self) -> usize {
        self.heads.first().map_or(0, |head| head.keys.window.len())
    }

    /// Keys and values of `count` positions of all heads, from `first` on, of the window's and then `step`'s.
    fn read(
        &self,
        first: usize,
        count: usize,
        step: Option<&Step>,
        m: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut new = step.map(Step::heads);
        for head in &self.heads {
            let (new_keys, new_values) = new.as_mut().and_then(Iterator::next).unwrap_or_default();
            head.keys.read(first, count, new_keys, m, &mut keys);
            head.values.read(first, count, new_values, m, &mut values);
        }
        (keys, values)
    }

    /// Appends codes.
    fn extend(&mut self, batch: Batch) {
        self.added = batch.added;
        let codes = batch.keys.iter().zip(&batch.values);
        for (head, (keys, values)) in self.heads.iter_mut().zip(codes) {
            head.keys.codes.extend(keys);
            head.values.codes.extend(values);
        }
    }

    fn drop_from_window(&mut self, count: usize) {
        for head in &mut self.heads {
            head.keys.window.drop_front(count);
            head.values.window.drop_front(count);
        }
    }
}

/// Bytes that some layers and heads take beside what they hold.
fn bookkeeping(layers: usize, heads: usize) -> usize {
    // Extensions count their owners beside their atoms.
    let layer = size_of::<Layer>() + size_of::<LayerSparsities>() + 2 * 2 * size_of::<usize>();
    let head = size_of::<Head>() + 2 * size_of::<usize>();
    layers * layer + heads * head
}

impl LexicoCache {
    /// What a layer's keys and values are coded over, with all that was added.
    fn atoms(&self, layer: usize) -> Result<[Atoms<'_>; 2]> {
        let [keys, values] = self.settings.codings(&self.dictionaries.layers[layer])?;
        let added = &self.layers[layer].added;
        let sparsities = &self.settings.sparsities[layer];
        Ok([
            keys.atoms(&added.keys, &sparsities.keys),
            values.atoms(&added.values, &sparsities.values),
        ])
    }

    /// Hands the window's oldest positions over to be coded.
    fn begin(&mut self, layer: usize) {
        let batch = self.settings.batch;
        let codes = self.background.then(|| {
            let dictionaries = Arc::clone(&self.dictionaries);
            let settings = Arc::clone(&self.settings);
            let m = dictionaries.layers[layer].keys.head_dim();
            let (keys, values) = self.layers[layer].read(0, batch, None, m);
            let added = self.layers[layer].added.clone();
            let (sender, receiver) = channel();
            rayon::spawn(move || {
                let own = &dictionaries.layers[layer];
                // Where the cache is gone nobody waits for them.
                let _ = sender.send(code(own, added, &settings, layer, &keys, &values, &Alone));
            });
            receiver
        });
        self.layers[layer].leaving = Some(Leaving { age: 0, codes });
    }

    /// Puts the batch that is leaving the window among the codes.
    fn finish(&mut self, layer: usize) -> Result<()> {
        let Some(leaving) = self.layers[layer].leaving.take() else {
            return Ok(());
        };
        let count = self.settings.batch;
        // A worker that is gone without an answer has panicked; what it had to code is still there.
        let made = leaving.codes.and_then(|codes| codes.recv().ok());
        let batch = match made {
            Some(batch) => batch?,
            None => self.code_oldest(layer, 0, count, None)?,
        };
        self.layers[layer].extend(batch);
        self.layers[layer].drop_from_window(count);
        Ok(())
    }

    fn code_oldest(
        &self,
        layer: usize,
        first: usize,
        count: usize,
        step: Option<&Step>,
    ) -> Result<Batch> {
        let dictionaries = &self.dictionaries.layers[layer];
        let m = dictionaries.keys.head_dim();
        let (keys, values) = self.layers[layer].read(first, count, step, m);
        code(
            dictionaries,
            self.layers[layer].added.clone(),
            &self.settings,
            layer,
            &keys,
            &values,
            &CandleThreads,
        )
    }

    /// Takes the new position of a step of decode.
    fn take_one(&mut self, layer: usize, step: &Step) -> Result<()> {
        for (head, (keys, values)) in self.layers[layer].heads.iter_mut().zip(step.heads()) {
            head.keys.window.extend(keys);
            head.values.window.extend(values);
        }
        let full = self.settings.window.saturating_add(self.settings.batch);
        if self.layers[layer].leaving.is_none() && self.layers[layer].window() >= full {
            self.begin(layer);
        }
        let due = self.settings.due(layer);
        match &mut self.layers[layer].leaving {
            Some(leaving) if leaving.age < due => leaving.age += 1,
            Some(_) => self.finish(layer)?,
            None => {}
        }
        Ok(())
    }

    /// Takes new positions and codes at once what the window cannot hold: those of a prompt, and where batches are
    /// too small to wait.
    fn take_many(&mut self, layer: usize, step: &Step) -> Result<()> {
        self.finish(layer)?;
        let held = self.layers[layer].window();
        let (_, t, m) = step.shape;
        let mut surplus = (held + t).saturating_sub(self.settings.window);
        if surplus < self.settings.batch {
            surplus = 0;
        }
        for first in (0..surplus).step_by(AT_ONCE) {
            let count = AT_ONCE.min(surplus - first);
            let batch = self.code_oldest(layer, first, count, Some(step))?;
            self.layers[layer].extend(batch);
        }
        let layer = &mut self.layers[layer];
        layer.drop_from_window(surplus.min(held));
        let passing = surplus.saturating_sub(held) * m;
        for (head, (keys, values)) in layer.heads.iter_mut().zip(step.heads()) {
            head.keys.window.extend(&keys[passing..]);
            head.values.window.extend(&values[passing..]);
        }
        Ok(())
    }
}

impl KvCache for LexicoCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let sliding = self.sliding_window;
        let positions = k.dim(1)?;
        if layer + 1 == self.layers.len() {
            self.positions += positions;
        }
        let step = Step::new(q, k, v)?;
        let [key_atoms, value_atoms] = self.atoms(layer)?;
        let out = step.attend(&self.layers[layer].heads, sliding, |head| {
            vec![
                Source::Codes {
                    keys: &head.keys.codes,
                    values: &head.values.codes,
                    key_atoms,
                    value_atoms,
                },
                Source::Dense {
                    keys: &head.keys.window,
                    values: &head.values.window,
                },
            ]
        })?;
        if positions == 1 && self.settings.due(layer) > 0 {
            self.take_one(layer, &step)?;
        } else {
            self.take_many(layer, &step)?;
        }
        for head in &mut self.layers[layer].heads {
            if let Some(outside) = outside_window(sliding, head.keys.len()) {
                let outside = outside.min(head.keys.codes.len());
                head.keys.codes.drop_front(outside);
                head.values.codes.drop_front(outside);
            }
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let Layer { heads, added, .. } = &self.layers[layer];
        let [key_atoms, value_atoms] = self.atoms(layer)?;
        let mut decoded = Decoded {
            bytes: [added.keys.bytes(), added.values.bytes()],
            ..Decoded::default()
        };
        for head in heads {
            decoded.keys.extend(head.keys.codes.decode(key_atoms)?);
            decoded.keys.extend(head.keys.window.to_f32());
            decoded
                .values
                .extend(head.values.codes.decode(value_atoms)?);
            decoded.values.extend(head.values.window.to_f32());
            for (bytes, part) in decoded.bytes.iter_mut().zip([&head.keys, &head.values]) {
                *bytes += part.codes.bytes() + part.window.bytes();
            }
        }
        Ok(Some(decoded))
    }

    fn state(&self) -> Option<CacheState> {
        Some(saved::state(self))
    }

    fn resume(&mut self, state: &CacheState) -> std::result::Result<(), String> {
        saved::resume(self, state)
    }

    fn footprint(&self) -> Footprint {
        let heads = || self.layers.iter().flat_map(|layer| &layer.heads);
        let parts = || heads().flat_map(|head| [&head.keys, &head.values]);
        // What a worker is coding, in f32.
        let copied = |layer: &&Layer| layer.leaving.as_ref().is_some_and(|l| l.codes.is_some());
        let heads_leaving: usize = self
            .layers
            .iter()
            .filter(copied)
            .map(|l| l.heads.len())
            .sum();
        let head_dim = self.dictionaries.layers[0].keys.head_dim();
        let added = self
            .layers
            .iter()
            .map(|layer| layer.added.keys.bytes() + layer.added.values.bytes());
        let leaving = 2 * heads_leaving * self.settings.batch * head_dim * size_of::<f32>();
        Footprint {
            parts: vec![
                ("codes", parts().map(|part| part.codes.bytes()).sum()),
                ("adaptive atoms", added.sum()),
                ("window", parts().map(|part| part.window.bytes()).sum()),
                ("leaving", leaving),
                (
                    "bookkeeping",
                    bookkeeping(self.layers.len(), heads().count()),
                ),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use ::lexico::dictionary::LayerLosses;

    use super::*;
    use crate::decoder::{Logits, Sequence};
    use crate::model::Model;

    /// Reads a prompt and then token after token; the logits of every step, and positions in the window.
    fn logits(
        model: &Model,
        batch: usize,
        adaptive: usize,
        background: bool,
    ) -> Result<Vec<(Vec<f32>, usize)>> {
        let settings = LexicoSettings {
            sparsities: vec![
                LayerSparsities {
                    keys: vec![6, 3],
                    values: vec![2, 4],
                };
                4
            ],
            tolerance: if adaptive > 0 { 0.2 } else { 0.0 },
            unbiased: true,
            adaptive,
            window: 5,
            batch,
            format: Format::Sparse(CoefficientFormat::I8),
            dense: NumberType::F16,
        };
        let dictionaries = model.dictionaries.clone().expect("the embedded model's");
        let mut cache = LexicoCache::new(model.decoder.config(), dictionaries, settings)?;
        cache.background = background;
        let text = "Question: Ana has 12 coins at home. Ben gives Ana 7 more.".repeat(3);
        let tokens = model.tokenizer.encode_first(&text)?;
        let (prompt, rest) = tokens.split_at(30);
        let chunks = [prompt, &prompt[..7]].into_iter().chain(rest.chunks(1));
        let mut all = Vec::new();
        for tokens in chunks {
            let mut sequences = [Sequence {
                tokens,
                cache: &mut cache,
            }];
            let logits = model.decoder.forward(&mut sequences, Logits::Last)?;
            all.push((logits.squeeze(0)?.to_vec1()?, cache.layers[0].window()));
        }
        Ok(all)
    }

    #[test]
    fn coding_beside_the_decoding_changes_nothing() -> Result<()> {
        let model = Model::tiny()?;
        for batch in [1, 2, 5, 16] {
            for adaptive in [0, 20] {
                let background = logits(&model, batch, adaptive, true)?;
                let between = logits(&model, batch, adaptive, false)?;
                assert_eq!(background, between, "batches of {batch}, {adaptive} added");
                let window = background.iter().map(|(_, window)| *window).max();
                assert!(
                    window < Some(5 + 2 * batch),
                    "{window:?} positions for batches of {batch}"
                );
            }
        }
        Ok(())
    }

    /// The mean sparsity of all heads that a spec asks for, or what it is refused with.
    fn mean(text: &str, losses: Option<&CodingLosses>) -> std::result::Result<f64, String> {
        let model = crate::Model::tiny().unwrap();
        let config = model.decoder.config();
        let mut dictionaries = (**model.dictionaries.as_ref().unwrap()).clone();
        dictionaries.training.losses = losses.cloned();
        dictionaries.training.additive_losses = losses.cloned();
        dictionaries.training.sparsity = 6;
        let dictionaries = Arc::new(dictionaries);
        let context = CacheContext {
            model: "tiny",
            config,
            dictionaries: Some(&dictionaries),
            device: &candle_core::Device::Cpu,
        };
        let spec: CacheSpec = text.parse().unwrap();
        spec.build(&context).map_err(|e| e.to_string())?;
        let layers =
            sparsities(&spec, &context, &dictionaries, format(&spec, &dictionaries)).unwrap();
        let heads = layers.iter().flat_map(|l| l.keys.iter().chain(&l.values));
        let count = 2 * config.layers * config.kv_heads;
        Ok(heads.sum::<usize>() as f64 / count as f64)
    }

    #[test]
    fn sparsities_follow_the_losses_where_there_are_any() {
        let layer = LayerLosses {
            keys: vec![vec![1.0, 0.1], vec![0.1, 0.01]],
            values: vec![vec![0.1, 0.001], vec![0.001, 0.0001]],
        };
        let losses = CodingLosses {
            sparsities: vec![2, 8],
            layers: vec![layer; 4],
        };
        let some = Some(&losses);
        for (text, losses, expected) in [
            // Additive codes take half as many atoms again.
            ("lexico", None, 9.0),
            ("lexico", some, 9.0),
            ("lexico:sparsity=23.5", some, 23.5),
            ("lexico:value-sparsity=4", some, 6.5),
            ("lexico:format=i8", None, 6.0),
            ("lexico:format=i8", some, 6.0),
            ("lexico:format=i8,sparsity=7.25", some, 7.25),
            ("lexico:sparsity=7,allocation=measured", some, 7.0),
            ("lexico:sparsity=7,allocation=same", some, 7.0),
            ("lexico:key-sparsity=9,value-sparsity=4", some, 6.5),
            ("lexico:format=i8,value-sparsity=4", some, 5.0),
            ("lexico:format=i8,sparsity=40.5", some, 40.5),
            ("lexico:format=i8,sparsity=64", some, 64.0),
        ] {
            assert_eq!(mean(text, losses), Ok(expected), "{text}");
        }
        for (text, losses, words) in [
            ("lexico:sparsity=7.25", None, "whole"),
            ("lexico:sparsity=7.25,allocation=same", some, "whole"),
            ("lexico:allocation=measured", None, "lexico measure"),
            ("lexico:allocation=measured,key-sparsity=3", some, "alone"),
            ("lexico:sparsity=0.5", some, "from 1"),
            ("lexico:sparsity=NaN", some, "from 1"),
            ("lexico:sparsity=65", some, "from 1 to 32"),
            ("lexico:sparsity=65,format=i8", some, "64"),
            ("lexico:key-sparsity=0", some, "sparsity"),
        ] {
            let refused = mean(text, losses).unwrap_err();
            assert!(refused.contains(words), "{text}: {refused}");
        }
    }

    #[test]
    fn what_is_unknown_is_named_with_what_there_is() {
        let refused = |text: &str| text.parse::<CacheSpec>().unwrap_err().to_string();
        for (text, words) in [
            ("kivvy", vec!["kivvy", "lexico", "full"]),
            ("", vec!["\"\"", "lexico"]),
            ("lexico:sparsty=3", vec!["sparsty", "sparsity", "window"]),
            ("full:dense", vec!["key=value"]),
            ("full:dense=f16,dense=f32", vec!["twice"]),
            ("full:dense=f64", vec!["dense=f64", "f16, f32"]),
            ("lexico:sparsity=many", vec!["sparsity=many", "number"]),
            ("lexico:window=-1", vec!["window=-1", "whole number"]),
            ("lexico:tolerance=x", vec!["tolerance=x", "number"]),
        ] {
            let message = refused(text);
            assert!(
                words.iter().all(|w| message.contains(w)),
                "{text}: {message}"
            );
        }
    }
}
