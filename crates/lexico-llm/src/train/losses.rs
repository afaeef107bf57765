//! The loss that coding the keys or the values of one KV head costs the model's predictions.
//!
//! Predictions with one head coded differ from those without by so little that rounding drowns it, and cost a pass of
//! the model each. What coding a head does to what its layer adds up is seen at once.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use ::lexico::attention::{DenseRows, NumberType, Source};
use ::lexico::cache::{Coder, Coding};
use ::lexico::dictionary::{CodeFamily, CodingLosses, HeadMaps, LayerLosses};
use ::lexico::threads::for_each;
use ::lexico::{DictionarySet, Fit, KeyValue};
use candle_core::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::reading::JUDGED_WINDOWS;
use super::state::State;
use super::{OnProgress, PARTS, TrainProgress, go_on};
use crate::cache::{CacheContext, CacheSpec, Footprint, FullCache, KvCache, SINKS, Step};
use crate::config::Config;
use crate::corpus::Corpus;
use crate::decoder::{Decoder, Logits};
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
const JUDGED: usize = WINDOWS;
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
    dictionaries: &DictionarySet,
    family: CodeFamily,
    windows: &[Vec<u32>],
    state: Option<&State>,
    progress: &mut OnProgress<'_>,
) -> Result<Option<CodingLosses>> {
    let config = model.decoder.config();
    let layers = &dictionaries.layers;
    let mut joint = dictionaries.joint();
    if family == CodeFamily::Sparse {
        // Sparse codes are of one head each.
        joint.heads = 1;
    }
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
    let (m, places) = (config.head_dim, config.layers * 2 * config.kv_heads);
    let saved = state.map(|state| state.load_json(file(family)));
    let mut measured: Measured = saved.transpose()?.flatten().unwrap_or_default();
    measured.changes.resize(places * probes.len(), 0.0);
    measured.errors.resize(places * sparsities.len(), 0.0);
    let save =
        |measured: &Measured| state.map_or(Ok(()), |state| state.save_json(file(family), measured));
    let mut last_saved = Instant::now();
    let done = (measured.windows, measured.layers);
    visit_layers(model, &windows, done, |window, mut visit| {
        let (number, own) = joint.place(visit.layer);
        let all = joint.heads_of(number);
        for part in 0..PARTS.len() {
            let KeyValue { keys, values } = &coders[number];
            let coder = [keys, values][part];
            let first = (number * PARTS.len() + part) * all.len();
            let vectors = visit.vectors(&all, part);
            if visit.layer == number * joint.layers {
                let errors = &mut measured.errors[first * sparsities.len()..];
                add_errors(coder, m, &vectors, &sparsities, errors)?;
            }
            for (probe, &sparsity) in probes.iter().enumerate() {
                let mut coded = coded_rows(coder, m, &vectors, sparsity)?;
                let empty = || DenseRows::new(m, NumberType::F32);
                let rows = own
                    .iter()
                    .map(|&place| std::mem::replace(&mut coded[place], empty()));
                let moved = visit.moved(part, rows.collect())?;
                for (place, moved) in own.iter().zip(moved) {
                    measured.changes[(first + place) * probes.len() + probe] += moved;
                }
            }
        }
        measured.layers += 1;
        let flow = progress(TrainProgress::Measuring {
            done: window * config.layers + measured.layers,
            total: windows.len() * config.layers,
        });
        let ends = measured.layers == config.layers;
        if ends {
            measured.windows += 1;
            measured.layers = 0;
            measured.predictions += visit.predicted.len();
        }
        let due = state.is_some_and(|state| last_saved.elapsed() >= state.every);
        if ends || due || flow == ControlFlow::Break(()) {
            save(&measured)?;
            last_saved = Instant::now();
        }
        go_on(flow)
    })?;
    let predictions = measured.predictions.max(1) as f64;
    let together = joint.layers * joint.heads;
    share(&mut measured.changes, probes.len(), together);
    share(&mut measured.errors, sparsities.len(), together);
    let probed = measured.changes.chunks_exact(probes.len());
    let errors = measured.errors.chunks_exact(sparsities.len());
    let mut heads = probed.zip(errors).map(|(probed, errors)| {
        let probed: Vec<f64> = probed.iter().map(|sum| sum / predictions).collect();
        through(&sparsities, errors, &probes, &probed)
    });
    let mut take = || {
        heads
            .by_ref()
            .take(joint.layers * config.kv_heads)
            .collect()
    };
    let layers = layers.iter().map(|_| LayerLosses {
        keys: take(),
        values: take(),
    });
    Ok(Some(CodingLosses {
        layers: layers.collect(),
        sparsities,
    }))
}

/// Does `each` at every layer of every window but those that were done, the window's number with it: contexts of all
/// lengths, as heads matter more in some than in others.
fn visit_layers(
    model: &Model,
    windows: &[&Vec<u32>],
    done: (usize, usize),
    mut each: impl FnMut(usize, Visit<'_>) -> Result<()>,
) -> Result<()> {
    let decoder = &model.decoder;
    let layers = decoder.config().layers;
    let mut first = done.1;
    for (number, window) in windows.iter().enumerate().skip(done.0) {
        let length = window.len() * (number + 1) / windows.len();
        let (before, predicted) = split(&window[..length.max(SHORTEST)]);
        let mut past = Past::new(decoder.config());
        decoder.forward_one(before, &mut past, Logits::Last)?;
        past.reading = false;
        let mut inputs = Vec::with_capacity(layers);
        decoder.forward_from(None, predicted, &mut past, &mut |x| inputs.push(x.clone()))?;
        for (layer, input) in inputs.iter().enumerate().skip(first) {
            let attended = decoder.attended(layer, input, predicted, &mut past)?;
            let visit = Visit {
                decoder,
                layer,
                input,
                attended,
                predicted,
                past: &mut past,
            };
            each(number, visit)?;
        }
        first = 0;
    }
    Ok(())
}

/// A layer at the tokens that are predicted.
struct Visit<'a> {
    decoder: &'a Decoder,
    layer: usize,
    input: &'a Tensor,
    attended: Tensor,
    predicted: &'a [u32],
    past: &'a mut Past,
}

impl Visit<'_> {
    /// The keys, or the values, of these heads of these layers.
    fn vectors(&self, heads: &[(usize, usize)], part: usize) -> Vec<Vec<f32>> {
        let heads = heads.iter();
        heads
            .map(|&(layer, head)| self.past.rows(layer, head, part).to_f32())
            .collect()
    }

    /// How far the layer's output moves for each head when these are its keys, or its values; see [`Decoder::changes`].
    fn moved(&mut self, part: usize, rows: Vec<DenseRows>) -> Result<Vec<f64>> {
        let Self {
            decoder,
            layer,
            input,
            predicted,
            ..
        } = *self;
        self.past.changed = Some((layer, part, rows));
        let changed = decoder.attended(layer, input, predicted, self.past)?;
        self.past.changed = None;
        let moved = decoder.changes(layer, input, &self.attended, &changed)?;
        if !moved.iter().all(|own| own.is_finite()) {
            let part = PARTS[part];
            let reason = format!("with the {part} of layer {layer} coded it gives no numbers");
            return Err(Error::Measure(reason));
        }
        Ok(moved)
    }
}

/// Length of the noise that stands for what codes leave out, over that of the vectors.
const NOISE: f32 = 0.3;

/// Measures on a few windows how much an error of each head's mapped vectors counts, by noise of the same strength in all
/// directions in place of the error: how far it moves what the layer gives, over its squared length. `[layers][2][kv_heads]`; all
/// ones where the windows are too short.
pub(super) fn head_weights(
    model: &Model,
    maps: &[KeyValue<HeadMaps>],
    windows: &[Vec<u32>],
    progress: &mut OnProgress<'_>,
) -> Result<Vec<[Vec<f64>; 2]>> {
    let config = model.decoder.config();
    let (m, heads) = (config.head_dim, config.kv_heads);
    let windows = windows.iter().filter(|w| w.len() >= SHORTEST);
    let windows: Vec<&Vec<u32>> = windows.take(WINDOWS).collect();
    let mut sums = vec![[vec![0.0; heads], vec![0.0; heads]]; config.layers];
    let mut done = 0;
    visit_layers(model, &windows, (0, 0), |window, mut visit| {
        let layer = visit.layer;
        let KeyValue { keys, values } = &maps[layer];
        for (part, maps) in [keys, values].into_iter().enumerate() {
            let mut rng = ChaCha8Rng::seed_from_u64((window * 2 + part) as u64);
            let mut squares = Vec::with_capacity(heads);
            let own: Vec<_> = (0..heads).map(|head| (layer, head)).collect();
            let rows = visit.vectors(&own, part).into_iter().enumerate();
            let rows = rows.map(|(head, vectors)| {
                let mut mapped = maps.apply(head, &vectors);
                let coded = maps.to_coded(head, 0.., &vectors);
                let square = coded.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                let each = NOISE * (square / coded.len().max(1) as f64).sqrt() as f32;
                // Of variance 1.
                let most = 3f32.sqrt();
                for x in &mut mapped {
                    *x += each * rng.random_range(-most..most);
                }
                squares.push(f64::from(each).powi(2));
                let mut noisy = maps.invert(head, &mapped);
                keep_dense(&vectors, m, &mut noisy);
                let mut rows = DenseRows::new(m, NumberType::F32);
                rows.extend(&noisy);
                rows
            });
            let rows = rows.collect();
            let moved = visit.moved(part, rows)?.into_iter().zip(squares);
            for (sum, (moved, square)) in sums[layer][part].iter_mut().zip(moved) {
                *sum += moved / square.max(f64::MIN_POSITIVE);
            }
        }
        done += 1;
        go_on(progress(TrainProgress::Weighing {
            done,
            total: windows.len() * config.layers,
        }))
    })?;
    if windows.is_empty() {
        let all = sums.as_flattened_mut().iter_mut();
        all.for_each(|own| own.fill(1.0));
    }
    Ok(sums)
}

/// Gives each of `together` heads the mean of theirs, `[heads, numbers]`: parts that they are coded in are alike, and each
/// is in every head.
fn share(all: &mut [f64], numbers: usize, together: usize) {
    for group in all.chunks_exact_mut(together * numbers) {
        for number in 0..numbers {
            let sum: f64 = group.iter().skip(number).step_by(numbers).sum();
            let places = group.iter_mut().skip(number).step_by(numbers);
            places.for_each(|x| *x = sum / together as f64);
        }
    }
}

/// Cuts a window into what is coded and what is predicted from it.
fn split(window: &[u32]) -> (&[u32], &[u32]) {
    window.split_at(window.len() - (window.len() / 4).min(PREDICTED))
}

/// The vectors of every head, all but those that caches keep dense as their codes of this sparsity say.
fn coded_rows(
    coder: &Coder,
    m: usize,
    vectors: &[Vec<f32>],
    sparsity: usize,
) -> Result<Vec<DenseRows>> {
    let all = vectors.concat();
    let sparsities = vec![sparsity; vectors.len()];
    let coded = coder.reconstruct(0.., &all, &sparsities, Fit::default(), &ModelThreads)?;
    let each = (all.len() / vectors.len()).max(1);
    let heads = vectors.iter().zip(coded.chunks_exact(each));
    let heads = heads.map(|(vectors, coded)| {
        let mut coded = coded.to_vec();
        keep_dense(vectors, m, &mut coded);
        let mut rows = DenseRows::new(m, NumberType::F32);
        rows.extend(&coded);
        rows
    });
    Ok(heads.collect())
}

/// Adds the squared errors of some vectors of every head, or of every part of heads that are coded together, at each
/// sparsity to `errors` `[heads, sparsities]`.
fn add_errors(
    coder: &Coder,
    m: usize,
    vectors: &[Vec<f32>],
    sparsities: &[usize],
    errors: &mut [f64],
) -> Result<()> {
    let positions = vectors.first().map_or(0, |own| own.len() / m);
    let stride = positions.div_ceil(VECTORS).max(1);
    let rows = vectors
        .iter()
        .flat_map(|own| own.chunks_exact(m).step_by(stride));
    let mut rows: Vec<f32> = rows.flatten().copied().collect();
    if let Some(maps) = coder.maps() {
        rows = maps.all_to_coded((0..).step_by(stride), &rows);
    }
    let heads = rows.chunks_exact((rows.len() / vectors.len()).max(1));
    for (rows, errors) in heads.zip(errors.chunks_exact_mut(sparsities.len())) {
        for (error, &sparsity) in errors.iter_mut().zip(sparsities) {
            *error += squared_error(coder, rows, sparsity)?;
        }
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
        let losses = coding_losses(model, dictionaries, family, windows, state, progress)?;
        let Some(mut losses) = losses else {
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

/// The squared error of codes of these vectors, which are mapped already.
fn squared_error(coder: &Coder, vectors: &[f32], sparsity: usize) -> Result<f64> {
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
