//! The loss that coding the keys or the values of one KV head costs the model's predictions.
//!
//! Predictions with one head coded differ from those without by so little that rounding drowns it, and cost a pass of
//! the model each. What coding a head does to what its layer adds up is seen at once.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use ::lexico::attention::{DenseRows, NumberType, Source};
use ::lexico::cache::{Coder, Coding};
use ::lexico::dictionary::{CodeFamily, CodingLosses, LayerDictionaries, LayerLosses};
use ::lexico::threads::for_each;
use ::lexico::{DictionarySet, Fit, KeyValue};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::reading::JUDGED_WINDOWS;
use super::state::State;
use super::{OnProgress, PARTS, TrainProgress, go_on};
use crate::cache::{CacheContext, CacheSpec, Footprint, FullCache, KvCache, SINKS, Step};
use crate::config::Config;
use crate::corpus::Corpus;
use crate::decoder::Logits;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::threads::ModelThreads;

/// Most tokens of a window whose predictions are looked at, a quarter at the most; what lies before them is coded.
const PREDICTED: usize = 128;
/// Newest positions before them that stay dense, a quarter at the most: few, as where memory is short.
const RECENT: usize = 32;
/// Windows on which heads are coded one by one.
const WINDOWS: usize = 4;
/// Windows on which sparsities that follow the losses are held against the same for all heads.
const JUDGED: usize = 2;
/// Shorter windows say nothing.
const SHORTEST: usize = 8;

/// The families of codes whose losses are measured.
pub(super) const FAMILIES: [CodeFamily; 2] = [CodeFamily::Sparse, CodeFamily::Additive];

/// Sparsities that losses are told at, as far as the dictionaries allow: those in between are interpolated. Sparse
/// codes never have more than 16.
const SPARSITIES: [usize; 9] = [1, 2, 4, 8, 12, 16, 24, 32, 48];

/// Max vectors of a head and window whose error is looked at.
const VECTORS: usize = 256;

/// Powers of a head's error that its loss may grow with: small errors' losses grow in proportion, large ones' by less.
const POWERS: (f64, f64) = (0.5, 1.5);

/// The state's file of what was measured.
pub(super) fn file(family: CodeFamily) -> &'static str {
    match family {
        CodeFamily::Sparse => "losses",
        CodeFamily::Additive => "packed-losses",
    }
}

/// Sums over the windows that were looked at so far.
#[derive(Default, Serialize, Deserialize)]
struct Measured {
    windows: usize,
    predictions: usize,
    /// Layers of the next window that were looked at.
    layers: usize,
    /// Changes by every layer, part, head and probed sparsity in turn.
    changes: Vec<f64>,
    /// Squared errors of every layer, part, head and sparsity in turn.
    errors: Vec<f64>,
}

/// Measures on a few windows how far coding each head moves what its layer gives, at two sparsities. How far at others
/// follows from the error of the head's vectors, which is cheap, by the power of it that goes through both. `None` where
/// the dictionaries are too small for several sparsities, or the windows too short.
fn coding_losses(
    model: &Model,
    layers: &[LayerDictionaries],
    family: CodeFamily,
    windows: &[Vec<u32>],
    state: Option<&State>,
    progress: &mut OnProgress<'_>,
) -> Result<Option<CodingLosses>> {
    let config = model.decoder.config();
    let possible = |s: &&usize| layers.iter().all(|layer| layer.max_sparsity(family) >= **s);
    let measured = match family {
        CodeFamily::Sparse => &SPARSITIES[..6],
        CodeFamily::Additive => &SPARSITIES,
    };
    let sparsities: Vec<usize> = measured.iter().filter(possible).copied().collect();
    let windows = windows.iter().filter(|w| w.len() >= SHORTEST);
    let windows: Vec<&Vec<u32>> = windows.take(WINDOWS).collect();
    if sparsities.len() < 2 || windows.is_empty() {
        return Ok(None);
    }
    let coding = Coding::usual(family);
    let coders = layers.iter().map(|layer| coding.coders(layer));
    let coders: Vec<KeyValue<Coder>> = coders.collect::<::lexico::Result<_>>()?;
    let probes = probes(&sparsities);
    let (m, places) = (config.head_dim, layers.len() * 2 * config.kv_heads);
    let saved = state.map(|state| state.load_json(file(family)));
    let mut measured: Measured = saved.transpose()?.flatten().unwrap_or_default();
    measured.changes.resize(places * probes.len(), 0.0);
    measured.errors.resize(places * sparsities.len(), 0.0);
    let save =
        |measured: &Measured| state.map_or(Ok(()), |state| state.save_json(file(family), measured));
    let mut last_saved = Instant::now();
    for (number, window) in windows.iter().enumerate().skip(measured.windows) {
        // Contexts of all lengths: heads matter more in some than in others.
        let length = window.len() * (number + 1) / windows.len();
        let (before, predicted) = split(&window[..length.max(SHORTEST)]);
        let mut past = Past::new(config);
        let decoder = &model.decoder;
        decoder.forward_one(before, &mut past, Logits::Last)?;
        past.reading = false;
        let mut inputs = Vec::with_capacity(layers.len());
        decoder.forward_from(None, predicted, &mut past, &mut |x| inputs.push(x.clone()))?;
        for layer in measured.layers..layers.len() {
            let attended = decoder.attended(layer, &inputs[layer], predicted, &mut past)?;
            for part in 0..PARTS.len() {
                let KeyValue { keys, values } = &coders[layer];
                let coder = [keys, values][part];
                let first = (layer * PARTS.len() + part) * config.kv_heads;
                let vectors: Vec<Vec<f32>> = (0..config.kv_heads)
                    .map(|head| past.rows(layer, head, part).to_f32())
                    .collect();
                for (head, vectors) in vectors.iter().enumerate() {
                    let errors = &mut measured.errors[(first + head) * sparsities.len()..];
                    add_errors(coder, m, head, vectors, &sparsities, errors)?;
                }
                for (probe, &sparsity) in probes.iter().enumerate() {
                    let coded = vectors.iter().enumerate();
                    let coded = coded.map(|(head, own)| coded_rows(coder, m, head, own, sparsity));
                    past.changed = Some((layer, part, coded.collect::<Result<_>>()?));
                    let changed = decoder.attended(layer, &inputs[layer], predicted, &mut past)?;
                    past.changed = None;
                    let moved = decoder.changes(layer, &inputs[layer], &attended, &changed)?;
                    if !moved.iter().all(|own| own.is_finite()) {
                        let part = PARTS[part];
                        let reason =
                            format!("with the {part} of layer {layer} coded it gives no numbers");
                        return Err(Error::Measure(reason));
                    }
                    for (head, moved) in moved.into_iter().enumerate() {
                        measured.changes[(first + head) * probes.len() + probe] += moved;
                    }
                }
            }
            measured.layers += 1;
            let flow = progress(TrainProgress::Measuring {
                done: number * layers.len() + measured.layers,
                total: windows.len() * layers.len(),
            });
            let due = state.is_some_and(|state| last_saved.elapsed() >= state.every);
            if due || flow == ControlFlow::Break(()) {
                save(&measured)?;
                last_saved = Instant::now();
            }
            go_on(flow)?;
        }
        measured.windows += 1;
        measured.layers = 0;
        measured.predictions += predicted.len();
        save(&measured)?;
    }
    let predictions = measured.predictions.max(1) as f64;
    let probed = measured.changes.chunks_exact(probes.len());
    let errors = measured.errors.chunks_exact(sparsities.len());
    let mut heads = probed.zip(errors).map(|(probed, errors)| {
        let probed: Vec<f64> = probed.iter().map(|sum| sum / predictions).collect();
        through(&sparsities, errors, &probes, &probed)
    });
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

/// Cuts a window into what is coded and what is predicted from it.
fn split(window: &[u32]) -> (&[u32], &[u32]) {
    window.split_at(window.len() - (window.len() / 4).min(PREDICTED))
}

/// The vectors of a head, all but those that caches keep dense as their codes of this sparsity say.
fn coded_rows(
    coder: &Coder,
    m: usize,
    head: usize,
    vectors: &[f32],
    sparsity: usize,
) -> Result<DenseRows> {
    let mut coded =
        coder.reconstruct(head, 0.., vectors, sparsity, Fit::default(), &ModelThreads)?;
    keep_dense(vectors, m, &mut coded);
    let mut rows = DenseRows::new(m, NumberType::F32);
    rows.extend(&coded);
    Ok(rows)
}

/// Adds the squared errors of some of a head's vectors at each sparsity.
fn add_errors(
    coder: &Coder,
    m: usize,
    head: usize,
    vectors: &[f32],
    sparsities: &[usize],
    errors: &mut [f64],
) -> Result<()> {
    let stride = (vectors.len() / m).div_ceil(VECTORS).max(1);
    let rows = vectors.chunks_exact(m).step_by(stride);
    let rows: Vec<f32> = rows.flatten().copied().collect();
    for (error, &sparsity) in errors.iter_mut().zip(sparsities) {
        *error += squared_error(coder, head, (0..).step_by(stride), &rows, sparsity)?;
    }
    Ok(())
}

/// Measures what coding each head costs with dictionaries that were made without measuring it, on text of `corpus`
/// in windows of `context` tokens, and puts it into them, with additive codes too where there are codebooks.
///
/// # Errors
/// [`Error::Measure`] where there is too little text, or the model predicts no numbers,
/// [`lexico::Error::OtherModel`](::lexico::Error::OtherModel), those of [`Corpus::chunks`], and
/// [`lexico::Error::Interrupted`](::lexico::Error::Interrupted) where `progress` broke off.
pub fn measure_losses(
    model: &Model,
    corpus: &Corpus,
    dictionaries: &mut DictionarySet,
    context: usize,
    progress: &mut OnProgress<'_>,
) -> Result<()> {
    dictionaries.check_fits(&model.identity())?;
    let windows = corpus.chunks(&model.tokenizer, context, context * JUDGED_WINDOWS, 0)?;
    let windows = windows.collect::<Result<Vec<_>>>()?;
    let there = |family: &CodeFamily| dictionaries.max_sparsity(*family) > 0;
    let families: Vec<CodeFamily> = FAMILIES.into_iter().filter(there).collect();
    measure_families(model, dictionaries, &families, &windows, None, progress)?;
    let unmeasured = |&family: &CodeFamily| dictionaries.losses(family).is_none();
    if families.iter().all(unmeasured) {
        let reason = format!(
            "nothing was found out: dictionaries of 2 atoms or more and a text of {SHORTEST} tokens are needed, and atoms that \
             follow what each head costs must do better than as many for each head"
        );
        return Err(Error::Measure(reason));
    }
    Ok(())
}

/// Measures what coding each head costs with codes of these families and puts it into the dictionaries.
///
/// How far a head moves what its layer gives says which heads matter. How much all of that costs the predictions, the
/// model says with all heads coded together, with as many atoms for each: their losses are shares of it. They are kept
/// only if atoms that follow them bring the predictions nearer.
pub(super) fn measure_families(
    model: &Model,
    dictionaries: &mut DictionarySet,
    families: &[CodeFamily],
    windows: &[Vec<u32>],
    state: Option<&State>,
    progress: &mut OnProgress<'_>,
) -> Result<()> {
    for &family in families {
        let layers = &dictionaries.layers;
        let Some(mut losses) = coding_losses(model, layers, family, windows, state, progress)?
        else {
            continue;
        };
        let probe = (losses.sparsities.len() / 2).saturating_sub(1);
        let sparsity = losses.sparsities[probe];
        let heads = |losses: &CodingLosses| {
            let layers = losses.layers.iter();
            let heads = layers.flat_map(|layer| layer.keys.iter().chain(&layer.values));
            heads.map(|own| f64::from(own[probe])).sum::<f64>()
        };
        let moved = heads(&losses);
        keep(dictionaries, family, Some(losses.clone()));
        let both = joint_divergences(model, dictionaries, family, sparsity, windows)?;
        let (follow, same) = (both[0], both[1]);
        if follow > same {
            keep(dictionaries, family, None);
            continue;
        }
        let share = (same / moved.max(f64::MIN_POSITIVE)) as f32;
        let layers = losses.layers.iter_mut();
        let each = layers.flat_map(|layer| layer.keys.iter_mut().chain(&mut layer.values));
        for loss in each.flatten() {
            *loss = (*loss * share).min(f32::MAX);
        }
        keep(dictionaries, family, Some(losses));
    }
    Ok(())
}

/// Puts the losses of codes of a family into the dictionaries.
fn keep(dictionaries: &mut DictionarySet, family: CodeFamily, losses: Option<CodingLosses>) {
    let training = &mut dictionaries.training;
    match family {
        CodeFamily::Sparse => training.losses = losses,
        CodeFamily::Additive => training.additive_losses = losses,
    }
}

/// Means over the predictions of the divergence from those without codes, in nats, all heads coded: with atoms that
/// follow the losses, and with as many for each head.
fn joint_divergences(
    model: &Model,
    dictionaries: &DictionarySet,
    family: CodeFamily,
    sparsity: usize,
    windows: &[Vec<u32>],
) -> Result<[f64; 2]> {
    let format = match family {
        CodeFamily::Sparse => "i8",
        CodeFamily::Additive => "additive",
    };
    let spec = |allocation: &str| -> Result<CacheSpec> {
        let window = format!("window={RECENT},batch=1");
        format!("lexico:format={format},sparsity={sparsity},allocation={allocation},{window}")
            .parse()
    };
    let specs = [spec("measured")?, spec("same")?];
    let dictionaries = Arc::new(dictionaries.clone());
    let decoder = &model.decoder;
    let (mut sums, mut predictions) = ([0.0; 2], 0usize);
    for window in windows.iter().filter(|w| w.len() >= SHORTEST).take(JUDGED) {
        let (before, predicted) = split(window);
        let predict = |cache: &mut dyn KvCache| -> Result<Vec<Vec<f32>>> {
            decoder.forward_one(before, cache, Logits::Last)?;
            log_probabilities(&decoder.forward_from(None, predicted, cache, &mut |_| ())?)
        };
        let full = predict(&mut FullCache::new(decoder.config(), NumberType::F32))?;
        for (sum, spec) in sums.iter_mut().zip(&specs) {
            let mut coded = spec.build(&CacheContext {
                model: &model.name,
                config: decoder.config(),
                dictionaries: Some(&dictionaries),
                calibration: None,
                device: decoder.device(),
            })?;
            *sum += divergence(&full, &predict(&mut *coded)?);
        }
        predictions += predicted.len();
    }
    Ok(sums.map(|sum| sum / predictions.max(1) as f64))
}

/// The two sparsities that heads are coded with: about where codes are used.
fn probes(sparsities: &[usize]) -> Vec<usize> {
    let middle = sparsities.len() / 2;
    let mut probes = vec![sparsities[middle.saturating_sub(1)], sparsities[middle]];
    probes.dedup();
    probes
}

/// Puts the first positions and the newest ones back as they were: caches keep them dense, and predictions see no others
/// as much.
fn keep_dense(vectors: &[f32], m: usize, coded: &mut [f32]) {
    let positions = vectors.len() / m;
    let sinks = SINKS.min(positions) * m;
    let recent = ((positions - RECENT.min(positions / 4)) * m).max(sinks);
    coded[..sinks].copy_from_slice(&vectors[..sinks]);
    coded[recent..].copy_from_slice(&vectors[recent..]);
}

/// The squared error of codes of these vectors of a head, behind the maps if there are any.
fn squared_error(
    coder: &Coder,
    head: usize,
    positions: impl Iterator<Item = usize>,
    vectors: &[f32],
    sparsity: usize,
) -> Result<f64> {
    let mapped = coder.maps();
    let mapped = mapped.map(|maps| maps.to_coded(head, positions, vectors));
    let vectors = mapped.as_deref().unwrap_or(vectors);
    let encoder = coder.encoder(sparsity, Fit::LeastSquares)?;
    let codes = encoder.encode_on(vectors, &ModelThreads)?;
    let m = encoder.head_dim();
    let rows = vectors.chunks_exact(m).zip(&codes.relative_errors);
    let squares = rows.map(|(x, &error)| {
        let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        square * f64::from(error).powi(2)
    });
    Ok(squares.sum())
}

/// Returns the losses at all sparsities: a power of the errors that goes through those that were probed.
fn through(sparsities: &[usize], errors: &[f64], probes: &[usize], probed: &[f64]) -> Vec<f32> {
    let error = |sparsity: usize| {
        let place = sparsities.iter().position(|&s| s == sparsity);
        place
            .map_or(0.0, |place| errors[place])
            .max(f64::MIN_POSITIVE)
    };
    let ends = |values: &[f64]| {
        (
            values[0].max(NEGLIGIBLE),
            values[values.len() - 1].max(NEGLIGIBLE),
        )
    };
    let (few, many) = ends(probed);
    let (first, last) = (error(probes[0]), error(probes[probes.len() - 1]));
    let power = (few / many).ln() / (first / last).ln();
    let power = if power.is_finite() {
        power.clamp(POWERS.0, POWERS.1)
    } else {
        1.0
    };
    // In the middle of both, whatever power is allowed.
    let (loss, middle) = ((few * many).sqrt(), (first * last).sqrt());
    let losses = sparsities
        .iter()
        .map(|&s| loss * (error(s) / middle).powf(power));
    losses
        .map(|loss| loss.min(f64::from(f32::MAX)) as f32)
        .collect()
}

/// Losses below this are not told apart from none.
const NEGLIGIBLE: f64 = 1e-9;

/// Returns the logarithms of the predictions' probabilities, `[tokens][vocabulary]`.
fn log_probabilities(logits: &Tensor) -> Result<Vec<Vec<f32>>> {
    let logits = candle_nn::ops::log_softmax(logits, candle_core::D::Minus1)?;
    let vocabulary = logits.dim(candle_core::D::Minus1)?;
    Ok(logits.reshape(((), vocabulary))?.to_vec2()?)
}

/// Sum over the predictions of the KL divergence from `reference` to `coded`, in nats.
fn divergence(reference: &[Vec<f32>], coded: &[Vec<f32>]) -> f64 {
    let mut each = vec![0.0; reference.len()];
    let rows = each.iter_mut().zip(reference.iter().zip(coded));
    for_each(&ModelThreads, rows, |(sum, (p, q))| {
        let terms = p.iter().zip(q).map(|(&p, &q)| {
            let (p, q) = (f64::from(p), f64::from(q));
            p.exp() * (p - q)
        });
        *sum = terms.sum::<f64>();
    });
    // Rounding may bring it below zero; what is no number stays none.
    let sum: f64 = each.iter().sum();
    if sum < 0.0 { 0.0 } else { sum }
}

/// Keys and values of a window's beginning, which what follows attends to again and again.
struct Past {
    cache: FullCache,
    sliding: Option<usize>,
    /// True while new positions are kept.
    reading: bool,
    /// Rows that stand for those of all heads of a layer and part.
    changed: Option<(usize, usize, Vec<DenseRows>)>,
}

impl Past {
    fn new(config: &Config) -> Self {
        Self {
            cache: FullCache::new(config, NumberType::F32),
            sliding: config.window,
            reading: true,
            changed: None,
        }
    }

    fn rows(&self, layer: usize, head: usize, part: usize) -> &DenseRows {
        let KeyValue { keys, values } = self.cache.rows(layer, head);
        [keys, values][part]
    }
}

impl KvCache for Past {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if self.reading {
            return self.cache.attend(layer, q, k, v);
        }
        let heads: Vec<usize> = (0..k.dim(0)?).collect();
        Step::new(q, k, v)?.attend(&heads, self.sliding, |&head| {
            let rows = |part: usize| match &self.changed {
                Some((l, p, rows)) if (*l, *p) == (layer, part) => &rows[head],
                _ => self.rows(layer, head, part),
            };
            vec![Source::Dense(KeyValue::new(rows(0), rows(1)))]
        })
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }
}
