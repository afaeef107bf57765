//! What coding the keys or the values of one KV head costs the model's predictions.

use std::ops::ControlFlow;
use std::time::Instant;

use ::lexico::attention::{DenseRows, NumberType, Source};
use ::lexico::dictionary::{Atoms, CodingLosses, LayerCodebooks, LayerDictionaries, LayerLosses};
use ::lexico::encode::BeamSearch;
use ::lexico::{CodeFormat, Codes, CoefficientFormat, DictionarySet, EncodedBatch, Pursuit};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::reading::JUDGED_WINDOWS;
use super::state::State;
use super::{OnProgress, PARTS, TrainProgress, go_on};
use crate::cache::{Footprint, KvCache, Step};
use crate::config::Config;
use crate::corpus::Corpus;
use crate::decoder::{Logits, Sequence};
use crate::error::Result;
use crate::model::Model;
use crate::threads::CandleThreads;

/// Fewest and most tokens of a window whose predictions are looked at; all before them is coded.
const PREDICTED: (usize, usize) = (16, 128);
/// Fewest windows to look at, where there are so many.
const WINDOWS: usize = 2;
/// Shorter windows say nothing.
const SHORTEST: usize = 8;

/// Codes whose losses are measured.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// Any atoms, with coefficients.
    Sparse,
    /// One atom a group.
    Additive,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Sparse, Self::Additive];

    /// Sparsities that losses are measured at, as far as the dictionaries allow: those in between are interpolated.
    fn sparsities(self) -> &'static [usize] {
        match self {
            Self::Sparse => &[1, 2, 4, 8, 12, 16],
            Self::Additive => &[1, 2, 4, 8, 12, 16, 24, 32, 48],
        }
    }

    /// The state's file of what was measured.
    pub(super) fn file(self) -> &'static str {
        match self {
            Self::Sparse => "losses",
            Self::Additive => "packed-losses",
        }
    }

    /// The largest sparsity that a layer's dictionaries allow.
    fn most(self, layer: &LayerDictionaries) -> usize {
        match self {
            Self::Sparse => layer.max_nonzeros(),
            Self::Additive => layer
                .codebooks
                .as_ref()
                .map_or(0, LayerCodebooks::max_atoms),
        }
    }

    /// Vectors of a layer's keys (part 0) or values as their codes have them, with the cache's usual settings.
    fn coded(
        self,
        layer: &LayerDictionaries,
        part: usize,
        sparsity: usize,
        vectors: &[f32],
    ) -> Result<Vec<f32>> {
        match (self, &layer.codebooks) {
            (Self::Additive, Some(codebooks)) => {
                let dictionary = [&codebooks.keys, &codebooks.values][part];
                let pursuit = BeamSearch::new(dictionary, sparsity)?.unbiased(true);
                let batch = pursuit.encode_on(vectors, &CandleThreads)?;
                let format = CoefficientFormat::InAtoms(dictionary.groups());
                decoded(&batch, format, dictionary.atoms(sparsity))
            }
            (Self::Sparse | Self::Additive, _) => {
                let dictionary = [&layer.keys, &layer.values][part];
                let pursuit = Pursuit::new(dictionary, sparsity)?;
                let mut batch = pursuit.encode_on(vectors, &CandleThreads)?;
                batch.unbias();
                decoded(&batch, CoefficientFormat::default(), dictionary.into())
            }
        }
    }
}

/// What codes stand for once they are stored.
fn decoded(
    batch: &EncodedBatch,
    coefficients: CoefficientFormat,
    atoms: Atoms<'_>,
) -> Result<Vec<f32>> {
    let mut codes = Codes::new(CodeFormat {
        sparsity: batch.sparsity,
        variable: false,
        coefficients,
    })?;
    codes.extend(batch);
    Ok(codes.decode(atoms)?)
}

/// Sums over the windows that were looked at so far.
#[derive(Default, Serialize, Deserialize)]
struct Measured {
    windows: usize,
    predictions: usize,
    /// Cases of the next window that were looked at.
    cases: usize,
    /// Of every layer, part, head and sparsity in turn.
    sums: Vec<f64>,
}

/// Measures on `windows`, one after another, as far as `tokens` for the model to take go, but on two of 16 predictions
/// at the least. `None` where the dictionaries are too small for several sparsities, or the windows too short.
fn coding_losses(
    model: &Model,
    layers: &[LayerDictionaries],
    kind: Kind,
    windows: &[Vec<u32>],
    tokens: usize,
    state: Option<&State>,
    progress: &mut OnProgress<'_>,
) -> Result<Option<CodingLosses>> {
    let config = model.decoder.config();
    let possible = |s: &&usize| layers.iter().all(|layer| kind.most(layer) >= **s);
    let sparsities = kind.sparsities().iter().filter(possible);
    let sparsities: Vec<usize> = sparsities.copied().collect();
    let windows: Vec<&Vec<u32>> = windows.iter().filter(|w| w.len() >= SHORTEST).collect();
    if sparsities.len() < 2 || windows.is_empty() {
        return Ok(None);
    }
    let count = layers.len() * 2 * config.kv_heads * sparsities.len();
    let worth = tokens / count;
    let most = (worth / WINDOWS).clamp(PREDICTED.0, PREDICTED.1);
    let windows = &windows[..windows.len().min((worth / most).max(WINDOWS))];
    let saved = state
        .map(|state| state.load_json(kind.file()))
        .transpose()?;
    let mut measured: Measured = saved.flatten().unwrap_or_default();
    measured.sums.resize(count, 0.0);
    let save =
        |measured: &Measured| state.map_or(Ok(()), |state| state.save_json(kind.file(), measured));
    let mut last_saved = Instant::now();
    for (number, window) in windows.iter().enumerate().skip(measured.windows) {
        // Contexts of all lengths: heads matter more in some than in others.
        let length = window.len() * (number + 1) / windows.len();
        let window = &window[..length.max(SHORTEST)];
        let (before, predicted) = window.split_at(window.len() - (window.len() / 4).min(most));
        let mut past = Past::new(config);
        let mut sequences = [Sequence {
            tokens: before,
            cache: &mut past,
        }];
        model.decoder.forward(&mut sequences, Logits::Last)?;
        past.reading = false;
        let reference = log_probabilities(model, &mut past, predicted)?;
        for case in measured.cases..count {
            let (place, sparsity) = (case / sparsities.len(), sparsities[case % sparsities.len()]);
            let (head, part) = (place % config.kv_heads, place / config.kv_heads % 2);
            let layer = place / config.kv_heads / 2;
            let vectors = past.vectors(layer, head, part);
            let coded = kind.coded(&layers[layer], part, sparsity, &vectors)?;
            let mut rows = DenseRows::new(config.head_dim, NumberType::F32);
            rows.extend(&coded);
            past.changed = Some((layer, head, part, rows));
            let coded = log_probabilities(model, &mut past, predicted)?;
            past.changed = None;
            let sum = divergence(&reference, &coded);
            if !sum.is_finite() {
                let part = PARTS[part];
                let reason =
                    format!("with the {part} of layer {layer} coded the model predicts no numbers");
                return Err(::lexico::Error::Learn(reason).into());
            }
            measured.sums[case] += sum;
            measured.cases += 1;
            let flow = progress(TrainProgress::Measuring {
                done: number * count + measured.cases,
                total: windows.len() * count,
            });
            let due = state.is_some_and(|state| last_saved.elapsed() >= state.every());
            if due || flow == ControlFlow::Break(()) {
                save(&measured)?;
                last_saved = Instant::now();
            }
            go_on(flow)?;
        }
        measured.windows += 1;
        measured.cases = 0;
        measured.predictions += predicted.len();
        save(&measured)?;
    }
    let predictions = measured.predictions.max(1) as f64;
    let losses = measured.sums.iter().map(|s| (s / predictions) as f32);
    let losses: Vec<f32> = losses.collect();
    let mut heads = losses.chunks_exact(sparsities.len()).map(<[f32]>::to_vec);
    let mut take = || heads.by_ref().take(config.kv_heads).collect();
    let layers = layers.iter().map(|_| LayerLosses {
        keys: take(),
        values: take(),
    });
    Ok(Some(CodingLosses {
        layers: layers.collect(),
        sparsities,
    }))
}

/// Measures what coding each head costs with dictionaries that were made without measuring it, on text of `corpus`,
/// and puts it into them, with codes of one atom a group too where there are groups. `tokens` are about as many as the
/// model takes, but at least 32 for each head's keys and values at each of up to six sparsities, or nine of codes of one
/// atom a group; a window has `context`.
///
/// # Errors
/// [`lexico::Error::Learn`](::lexico::Error::Learn) where there is too little text, or the model predicts no numbers,
/// [`lexico::Error::OtherModel`](::lexico::Error::OtherModel), those of [`Corpus::windows`], and
/// [`lexico::Error::Interrupted`](::lexico::Error::Interrupted) where `progress` broke off.
pub fn measure_losses(
    model: &Model,
    corpus: &Corpus,
    dictionaries: &mut DictionarySet,
    (tokens, context): (usize, usize),
    progress: &mut OnProgress<'_>,
) -> Result<()> {
    dictionaries.check_fits(&model.identity())?;
    let windows = corpus.windows(&model.tokenizer, context, context * JUDGED_WINDOWS, 0)?;
    let windows = windows.collect::<Result<Vec<_>>>()?;
    let kinds = match dictionaries.max_codebooks() {
        0 => &[Kind::Sparse][..],
        _ => &Kind::ALL,
    };
    measure_kinds(model, dictionaries, kinds, &windows, tokens, None, progress)?;
    if dictionaries.training.losses.is_none() {
        let reason = format!(
            "there is nothing to measure: dictionaries of 2 atoms or more and a text of {SHORTEST} tokens are needed"
        );
        return Err(::lexico::Error::Learn(reason).into());
    }
    Ok(())
}

/// Measures what coding each head costs with codes of these kinds and puts it into the dictionaries; `tokens` are
/// for all kinds together. See [`coding_losses`].
pub(super) fn measure_kinds(
    model: &Model,
    dictionaries: &mut DictionarySet,
    kinds: &[Kind],
    windows: &[Vec<u32>],
    tokens: usize,
    state: Option<&State>,
    progress: &mut OnProgress<'_>,
) -> Result<()> {
    let tokens = tokens / kinds.len().max(1);
    for &kind in kinds {
        let layers = &dictionaries.layers;
        let losses = coding_losses(model, layers, kind, windows, tokens, state, progress)?;
        let training = &mut dictionaries.training;
        match kind {
            Kind::Sparse => training.losses = losses,
            Kind::Additive => training.additive_losses = losses,
        }
    }
    Ok(())
}

/// What the model says after each of `tokens`, `[tokens][vocabulary]`.
fn log_probabilities(model: &Model, past: &mut Past, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let mut sequences = [Sequence {
        tokens,
        cache: past,
    }];
    let logits = model.decoder.forward(&mut sequences, Logits::All)?;
    let logits = candle_nn::ops::log_softmax(&logits, candle_core::D::Minus1)?;
    let vocabulary = logits.dim(candle_core::D::Minus1)?;
    Ok(logits.reshape(((), vocabulary))?.to_vec2()?)
}

/// Sum over the predictions of the KL divergence from `reference` to `coded`, in nats.
fn divergence(reference: &[Vec<f32>], coded: &[Vec<f32>]) -> f64 {
    let of_one = |(p, q): (&Vec<f32>, &Vec<f32>)| {
        let terms = p.iter().zip(q).map(|(&p, &q)| {
            let (p, q) = (f64::from(p), f64::from(q));
            p.exp() * (p - q)
        });
        terms.sum::<f64>()
    };
    // Rounding may bring it below zero; what is no number stays none.
    let sum: f64 = reference.iter().zip(coded).map(of_one).sum();
    if sum < 0.0 { 0.0 } else { sum }
}

/// Keys and values of a window's beginning, which what follows attends to again and again.
struct Past {
    /// `[layers][kv_heads]`, keys and values.
    layers: Vec<Vec<[DenseRows; 2]>>,
    sliding: Option<usize>,
    head_dim: usize,
    positions: usize,
    /// Whether new positions are kept.
    reading: bool,
    /// Rows that stand for those of a layer, head and part.
    changed: Option<(usize, usize, usize, DenseRows)>,
}

impl Past {
    fn new(config: &Config) -> Self {
        let rows = || DenseRows::new(config.head_dim, NumberType::F32);
        let head = |_| [rows(), rows()];
        Self {
            layers: (0..config.layers)
                .map(|_| (0..config.kv_heads).map(head).collect())
                .collect(),
            sliding: config.window,
            head_dim: config.head_dim,
            positions: 0,
            reading: true,
            changed: None,
        }
    }

    fn vectors(&self, layer: usize, head: usize, part: usize) -> Vec<f32> {
        let rows = &self.layers[layer][head][part];
        let mut vectors = Vec::with_capacity(rows.len() * self.head_dim);
        rows.read(0, rows.len(), &mut vectors);
        vectors
    }
}

impl KvCache for Past {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let step = Step::new(q, k, v)?;
        let numbered: Vec<(usize, &[DenseRows; 2])> =
            self.layers[layer].iter().enumerate().collect();
        let changed = self.changed.as_ref();
        let out = step.attend(&numbered, self.sliding, |(head, own)| {
            let rows = |part: usize| match changed {
                Some((l, h, p, rows)) if (*l, *h, *p) == (layer, *head, part) => rows,
                _ => &own[part],
            };
            vec![Source::Dense {
                keys: rows(0),
                values: rows(1),
            }]
        })?;
        if self.reading {
            for (own, (keys, values)) in self.layers[layer].iter_mut().zip(step.heads()) {
                own[0].extend(keys);
                own[1].extend(values);
            }
            if layer + 1 == self.layers.len() {
                self.positions += k.dim(1)?;
            }
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn footprint(&self) -> Footprint {
        let rows = self.layers.iter().flatten().flatten();
        Footprint {
            parts: vec![("dense", rows.map(DenseRows::bytes).sum())],
        }
    }
}
