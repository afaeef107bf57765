//! The loss that coding the keys or the values of one KV head costs the model's predictions.

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

/// Fewest and most tokens of a window whose predictions are looked at; what lies before them is coded.
const PREDICTED: (usize, usize) = (16, 128);
/// Newest positions before them that stay dense, a quarter at the most: few, as where memory is short.
const RECENT: usize = 32;
/// Fewest windows to look at, where there are so many.
const WINDOWS: usize = 2;
/// Windows on which sparsities that follow the losses are held against the same for all heads.
const JUDGED: usize = 4;
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
    /// Cases of the next window that were looked at.
    cases: usize,
    /// Losses of every layer, part, head and probed sparsity in turn.
    sums: Vec<f64>,
    /// Squared errors of every layer, part, head and sparsity in turn.
    errors: Vec<f64>,
}

/// Measures on `windows`, one after another, as far as `tokens` for the model to take go, but on two of 16 predictions
/// at the least. `None` where the dictionaries are too small for several sparsities, or the windows too short.
///
/// The model predicts with each head coded at two sparsities only, from the head's layer on. The losses at the other
/// sparsities follow from the error of the head's vectors, which is cheap, by the power of it that goes through both.
fn coding_losses(
    model: &Model,
    layers: &[LayerDictionaries],
    family: CodeFamily,
    windows: &[Vec<u32>],
    tokens: usize,
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
    let windows: Vec<&Vec<u32>> = windows.iter().filter(|w| w.len() >= SHORTEST).collect();
    if sparsities.len() < 2 || windows.is_empty() {
        return Ok(None);
    }
    let coding = Coding::usual(family);
    let coders = layers.iter().map(|layer| coding.coders(layer));
    let coders: Vec<KeyValue<Coder>> = coders.collect::<::lexico::Result<_>>()?;
    let probes = probes(&sparsities);
    let places = layers.len() * 2 * config.kv_heads;
    let count = places * probes.len();
    let worth = tokens / count;
    let most = (worth / WINDOWS).clamp(PREDICTED.0, PREDICTED.1);
    let windows = &windows[..windows.len().min((worth / most).max(WINDOWS))];
    let saved = state.map(|state| state.load_json(file(family)));
    let mut measured: Measured = saved.transpose()?.flatten().unwrap_or_default();
    measured.sums.resize(count, 0.0);
    measured.errors.resize(places * sparsities.len(), 0.0);
    let save =
        |measured: &Measured| state.map_or(Ok(()), |state| state.save_json(file(family), measured));
    let mut last_saved = Instant::now();
    for (number, window) in windows.iter().enumerate().skip(measured.windows) {
        // Contexts of all lengths: heads matter more in some than in others.
        let length = window.len() * (number + 1) / windows.len();
        let window = &window[..length.max(SHORTEST)];
        let (before, predicted) = window.split_at(window.len() - (window.len() / 4).min(most));
        let mut past = Past::new(config);
        let decoder = &model.decoder;
        decoder.forward_one(before, &mut past, Logits::Last)?;
        past.reading = false;
        let mut inputs = Vec::with_capacity(layers.len());
        let logits =
            decoder.forward_from(None, predicted, &mut past, &mut |x| inputs.push(x.clone()))?;
        let reference = log_probabilities(&logits)?;
        for case in measured.cases..count {
            let (place, sparsity) = (case / probes.len(), probes[case % probes.len()]);
            let (head, part) = (place % config.kv_heads, place / config.kv_heads % 2);
            let layer = place / config.kv_heads / 2;
            let KeyValue { keys, values } = &coders[layer];
            let (coder, fit) = ([keys, values][part], Fit::default());
            let vectors = past.rows(layer, head, part).to_f32();
            if case % probes.len() == 0 {
                let stride = (vectors.len() / config.head_dim).div_ceil(VECTORS).max(1);
                let rows = vectors.chunks_exact(config.head_dim).step_by(stride);
                let rows: Vec<f32> = rows.flatten().copied().collect();
                let errors = &mut measured.errors[place * sparsities.len()..];
                for (error, &sparsity) in errors.iter_mut().zip(&sparsities) {
                    let positions = (0..).step_by(stride);
                    *error += squared_error(coder, head, positions, &rows, sparsity)?;
                }
            }
            let mut coded = coder.reconstruct(head, 0.., &vectors, sparsity, fit, &ModelThreads)?;
            keep_dense(&vectors, config.head_dim, &mut coded);
            let mut rows = DenseRows::new(config.head_dim, NumberType::F32);
            rows.extend(&coded);
            past.changed = Some((layer, head, part, rows));
            let input = Some((layer, &inputs[layer]));
            let coded = decoder.forward_from(input, predicted, &mut past, &mut |_| ())?;
            let coded = log_probabilities(&coded)?;
            past.changed = None;
            let sum = divergence(&reference, &coded);
            if !sum.is_finite() {
                let part = PARTS[part];
                let reason =
                    format!("with the {part} of layer {layer} coded the model predicts no numbers");
                return Err(Error::Measure(reason));
            }
            measured.sums[case] += sum;
            measured.cases += 1;
            let flow = progress(TrainProgress::Measuring {
                done: number * count + measured.cases,
                total: windows.len() * count,
            });
            let due = state.is_some_and(|state| last_saved.elapsed() >= state.every);
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
    let probed = measured.sums.chunks_exact(probes.len());
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

/// Measures what coding each head costs with dictionaries that were made without measuring it, on text of `corpus`,
/// and puts it into them, with additive codes too where there are codebooks. `tokens` are about as many as the model
/// takes, but at least 32 for each head's keys and values at each of two sparsities; a window has `context`.
///
/// # Errors
/// [`Error::Measure`] where there is too little text, or the model predicts no numbers,
/// [`lexico::Error::OtherModel`](::lexico::Error::OtherModel), those of [`Corpus::chunks`], and
/// [`lexico::Error::Interrupted`](::lexico::Error::Interrupted) where `progress` broke off.
pub fn measure_losses(
    model: &Model,
    corpus: &Corpus,
    dictionaries: &mut DictionarySet,
    (tokens, context): (usize, usize),
    progress: &mut OnProgress<'_>,
) -> Result<()> {
    dictionaries.check_fits(&model.identity())?;
    let windows = corpus.chunks(&model.tokenizer, context, context * JUDGED_WINDOWS, 0)?;
    let windows = windows.collect::<Result<Vec<_>>>()?;
    let there = |family: &CodeFamily| dictionaries.max_sparsity(*family) > 0;
    let families: Vec<CodeFamily> = FAMILIES.into_iter().filter(there).collect();
    measure_families(
        model,
        dictionaries,
        &families,
        &windows,
        tokens,
        None,
        progress,
    )?;
    let unmeasured = |&family: &CodeFamily| dictionaries.losses(family).is_none();
    if families.iter().all(unmeasured) {
        let reason = format!(
            "nothing was found out: dictionaries of 2 atoms or more and a text of {SHORTEST} tokens are needed, and of a model \
             with quantised matrices what one head costs may drown in their rounding; then its weights in f16 or f32 are"
        );
        return Err(Error::Measure(reason));
    }
    Ok(())
}

/// Measures what coding each head costs with codes of these families and puts it into the dictionaries; `tokens`
/// are for all together. See [`coding_losses`]. Of a model that rounds activations they are kept only if atoms that
/// follow them bring predictions nearer than as many for each head: there, what one head costs may drown.
pub(super) fn measure_families(
    model: &Model,
    dictionaries: &mut DictionarySet,
    families: &[CodeFamily],
    windows: &[Vec<u32>],
    tokens: usize,
    state: Option<&State>,
    progress: &mut OnProgress<'_>,
) -> Result<()> {
    let tokens = tokens / families.len().max(1);
    for &family in families {
        let layers = &dictionaries.layers;
        let losses = coding_losses(model, layers, family, windows, tokens, state, progress)?;
        let training = &mut dictionaries.training;
        match family {
            CodeFamily::Sparse => training.losses = losses,
            CodeFamily::Additive => training.additive_losses = losses,
        }
        if model.decoder.rounds_activations() && dictionaries.losses(family).is_some() {
            let [follow, same] = ["measured", "same"];
            let follow = joint_divergence(model, dictionaries, family, follow, windows)?;
            let same = joint_divergence(model, dictionaries, family, same, windows)?;
            if follow > same {
                let training = &mut dictionaries.training;
                match family {
                    CodeFamily::Sparse => training.losses = None,
                    CodeFamily::Additive => training.additive_losses = None,
                }
            }
        }
    }
    Ok(())
}

/// Sum over the predictions of the divergence from those without codes, all heads coded with the usual sparsity.
fn joint_divergence(
    model: &Model,
    dictionaries: &DictionarySet,
    family: CodeFamily,
    allocation: &str,
    windows: &[Vec<u32>],
) -> Result<f64> {
    let format = match family {
        CodeFamily::Sparse => "i8",
        CodeFamily::Additive => "additive",
    };
    let spec = format!("lexico:format={format},allocation={allocation},window={RECENT},batch=1");
    let spec: CacheSpec = spec.parse()?;
    let dictionaries = Arc::new(dictionaries.clone());
    let (decoder, mut sum) = (&model.decoder, 0.0);
    for window in windows.iter().filter(|w| w.len() >= SHORTEST).take(JUDGED) {
        let (before, predicted) =
            window.split_at(window.len() - (window.len() / 4).min(PREDICTED.1));
        let mut full = FullCache::new(decoder.config(), NumberType::F32);
        let mut coded = spec.build(&CacheContext {
            model: &model.name,
            config: decoder.config(),
            dictionaries: Some(&dictionaries),
            calibration: None,
            device: decoder.device(),
        })?;
        let predict = |cache: &mut dyn KvCache| -> Result<Vec<Vec<f32>>> {
            decoder.forward_one(before, cache, Logits::Last)?;
            log_probabilities(&decoder.forward_from(None, predicted, cache, &mut |_| ())?)
        };
        sum += divergence(&predict(&mut full)?, &predict(&mut *coded)?);
    }
    Ok(sum)
}

/// The two sparsities that the model predicts with: about where codes are used.
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
    /// Rows that stand for those of a layer, head and part.
    changed: Option<(usize, usize, usize, DenseRows)>,
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
                Some((l, h, p, rows)) if (*l, *h, *p) == (layer, head, part) => rows,
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
