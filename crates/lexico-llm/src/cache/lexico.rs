mod saved;

use std::sync::Arc;

use ::lexico::cache::{CacheOptions, LayerCache, LayerFootprint, LayerSettings};
use ::lexico::dictionary::JointLayers;
use ::lexico::{DictionarySet, KeyValue};
use candle_core::{Device, Tensor};

#[cfg(feature = "cuda")]
use super::device::DeviceLexicoCache;
use super::method::{CacheContext, Method, NUMBER_TYPES, Values, option};
use super::{CacheSpec, CacheState, Decoded, Footprint, KvCache, Step};
use crate::error::{Error, Result};
use crate::threads::{ModelThreads, cores_to_spare};

pub(super) static METHOD: Method = Method {
    name: "lexico",
    summary: "codes over the model's dictionaries, the newest positions dense",
    needs_dictionaries: true,
    saves: true,
    options: &[
        option("sparsity", Values::Number, "as trained")
            .about("atoms of keys and values, on average; of additive codes half as many again as trained"),
        option("key-sparsity", Values::Count, "sparsity").about("atoms of a key"),
        option("value-sparsity", Values::Count, "sparsity").about("atoms of a value"),
        option(
            "allocation",
            Values::OneOf(&["measured", "same"]),
            "measured, where it was",
        )
        .about("which heads get the atoms"),
        option("tolerance", Values::Number, "0")
            .about("relative error that needs no more atoms; not with additive codes"),
        option(
            "fit",
            Values::OneOf(&["unbiased", "least-squares"]),
            "unbiased",
        )
        .about("unbiased keeps attention scores right on average, least-squares is nearest to the vectors"),
        option("sinks", Values::Count, "4").about("first positions, kept dense"),
        option("window", Values::Count, "128").about("newest positions, kept dense"),
        option("memory", Values::Size, "none").about(
            "bytes of a sequence: its newest positions stay dense while they fit, in place of a window",
        ),
        option("batch", Values::Count, "16").about("positions that leave the window at once"),
        option(
            "format",
            Values::OneOf(&["additive", "i8", "f8", "f32"]),
            "additive, where there are codebooks",
        )
        .about("additive: one byte per atom; the others: two bytes per atom and a coefficient")
        .with_aliases(&[("packed", "additive")]),
        option("beam", Values::Count, "8").about("sums that the search for additive codes follows"),
        option("dense", NUMBER_TYPES, "f16").about("numbers of the window"),
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
        Ok(Box::new(LexicoCache::new(dictionaries, settings)?))
    },
    bytes: |spec, context, lengths| {
        let dictionaries = needed(context)?;
        let settings = settings(spec, context, dictionaries)?;
        let m = context.config.head_dim;
        let layers = settings.iter();
        Ok(layers
            .map(|layer| layer.expected_bytes(m, lengths.end))
            .sum())
    },
    settings: |spec, context, budget| {
        // What cannot be is refused when the cache is made.
        let (Some(dictionaries), Ok(options)) = (context.dictionaries, options(spec)) else {
            return Vec::new();
        };
        let window = budget.window(context.config);
        let by_part = ["key-sparsity", "value-sparsity"].map(|part| spec.given(part).is_some());
        let family = options.family(dictionaries);
        let measured = dictionaries.losses(family).is_some() && by_part == [false, false];
        let steps = if measured && spec.text("allocation") != "same" {
            4
        } else {
            1
        };
        let max = dictionaries.max_sparsity(family) * steps;
        let sparsities = (steps..=max).rev().map(|step| step as f64 / steps as f64);
        let own = |name, value: usize| (name, value.to_string());
        let mut dense = vec![own("window", window), own("batch", window / 16)];
        if spec.given("window").is_none() {
            // Where the window is small the first positions must not take its place.
            dense.push(own("sinks", if window < 8 * SINKS { 0 } else { SINKS }));
        }
        if by_part == [true, true] {
            return vec![dense];
        }
        sparsities
            .map(|sparsity| {
                let mut setting = dense.clone();
                setting.push(("sparsity", sparsity.to_string()));
                setting
            })
            .collect()
    },
};

/// First positions that are kept dense by default.
pub(crate) const SINKS: usize = 4;

fn needed<'a>(context: &CacheContext<'a>) -> Result<&'a Arc<DictionarySet>> {
    context.dictionaries.ok_or_else(|| Error::NoDictionary {
        method: "lexico",
        model: context.model.to_owned(),
    })
}

/// What the spec gives, as the codec knows it.
fn options(spec: &CacheSpec) -> Result<CacheOptions> {
    let mut options = CacheOptions::default();
    for option in METHOD.options {
        if let Some(value) = spec.given(option.name) {
            options.set(option.name, value).map_err(explained)?;
        }
    }
    Ok(options)
}

/// The settings of every layer that the options ask for.
fn settings(
    spec: &CacheSpec,
    context: &CacheContext<'_>,
    dictionaries: &DictionarySet,
) -> Result<Vec<LayerSettings>> {
    dictionaries.check_fits(&context.config.identity("at hand"))?;
    let mut settings = options(spec)?.layers(dictionaries).map_err(explained)?;
    for layer in &mut settings {
        layer.sliding_window = context.config.window;
        layer.background = cores_to_spare();
    }
    Ok(settings)
}

/// An error of the codec, as people who gave options know it.
fn explained(error: ::lexico::Error) -> Error {
    match error {
        ::lexico::Error::Setting {
            setting: option,
            value,
            reason,
        } => Error::OptionValue {
            method: METHOD.name,
            option,
            value,
            reason,
        },
        other => other.into(),
    }
}

/// The error of layer `number`.
pub(super) fn explained_of_layer(number: usize, error: ::lexico::Error) -> Error {
    match error {
        ::lexico::Error::Coding { part, source } => Error::Coding {
            layer: number,
            part,
            reason: *source,
        },
        other => explained(other),
    }
}

/// Keys and values as codes over the model's dictionaries, the newest ones dense: a [`LayerCache`] a layer.
///
/// Kim, Park, Cho, Papailiopoulos: *Lexico* (ICML 2025, [arXiv 2412.08890](https://arxiv.org/abs/2412.08890)). What the
/// recent window cannot hold of a prompt is coded right after, so that at most one layer of a prompt is ever dense. In
/// decode each layer codes at its own steps, so that no token pays for all layers. Layers that are coded together have one
/// cache, which takes the positions of all of them at the last one's turn.
struct LexicoCache {
    layers: Box<[LayerCache]>,
    joint: JointLayers,
    /// New keys and values of the layers that are coded together, `[kv_heads of all, t, m]`, as far as they are there.
    new: KeyValue<Vec<f32>>,
    positions: usize,
}

impl LexicoCache {
    fn new(dictionaries: &DictionarySet, settings: Vec<LayerSettings>) -> Result<Self> {
        let layers = dictionaries.layers.iter().zip(settings).enumerate();
        let layers = layers.map(|(number, (own, settings))| {
            LayerCache::new(own, settings).map_err(|error| explained_of_layer(number, error))
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            joint: dictionaries.joint(),
            new: KeyValue::default(),
            positions: 0,
        })
    }

    fn append(&mut self, layer: usize, step: &Step) -> Result<()> {
        let mut new = KeyValue::new(&step.keys[..], &step.values[..]);
        let (number, places) = self.joint.place(layer);
        let last = layer % self.joint.layers + 1 == self.joint.layers;
        if self.joint.layers > 1 {
            let each = new.keys.len() / places.len();
            for (all, new) in self.new.as_mut().zip(new) {
                all.resize(new.len() * self.joint.layers, 0.0);
                for (own, &place) in new.chunks_exact(each).zip(&places) {
                    all[place * each..][..each].copy_from_slice(own);
                }
            }
            if !last {
                return Ok(());
            }
            new = self.new.as_ref().map(|x| &x[..]);
        }
        let appended = self.layers[number].append(new, &ModelThreads);
        self.new = KeyValue::default();
        appended.map_err(|error| explained_of_layer(layer, error))?;
        if number + 1 == self.layers.len() {
            self.positions += step.positions();
        }
        Ok(())
    }
}

impl KvCache for LexicoCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let step = Step::new(q, k, v)?;
        let new = KeyValue::new(&step.keys[..], &step.values[..]);
        let mut out = vec![0.0; step.queries.len()];
        let (number, places) = self.joint.place(layer);
        let cache = &self.layers[number];
        cache.attend_some(&places, &step.queries, Some(new), &mut out, &ModelThreads);
        self.append(layer, &step)?;
        Ok(Tensor::from_vec(out, step.shape, &Device::Cpu)?)
    }

    fn read(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        self.append(layer, &Step::new(q, k, v)?)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn dense(&self) -> Option<usize> {
        let layers = self.layers.iter();
        layers.map(|layer| layer.sinks() + layer.dense()).min()
    }

    fn capacity(&self) -> Option<usize> {
        let limit = self.layers.first()?.settings().memory?;
        Some(limit.capacity())
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let (number, places) = self.joint.place(layer);
        let layer = &self.layers[number];
        let own = layer.decode()?.map(|all| {
            let each = all.len() / (places.len() * self.joint.layers);
            let heads = places.iter().map(|place| &all[place * each..][..each]);
            heads.collect::<Vec<_>>().concat()
        });
        Ok(Some(Decoded {
            keys: own.keys,
            values: own.values,
            bytes: bytes_by_part(&layer.footprint()).map(|bytes| bytes / self.joint.layers),
        }))
    }

    fn fork(&self) -> Option<Box<dyn KvCache>> {
        let layers = self.layers.iter().map(LayerCache::fork);
        Some(Box::new(Self {
            layers: layers.collect(),
            joint: self.joint,
            new: KeyValue::default(),
            positions: self.positions,
        }))
    }

    fn state(&self) -> Option<CacheState> {
        Some(saved::state(self))
    }

    fn resume(&mut self, state: &CacheState) -> std::result::Result<(), String> {
        saved::resume(self, state)
    }

    fn footprint(&self) -> Footprint {
        footprint(self.layers.iter().map(LayerCache::footprint))
    }
}

/// The bytes of a layer's keys, and of its values.
pub(super) fn bytes_by_part(layer: &LayerFootprint) -> [usize; 2] {
    [layer.codes.keys, layer.codes.values]
        .map(|codes| codes + (layer.sinks + layer.recent_window) / 2)
}

/// The bytes of all layers.
pub(super) fn footprint(layers: impl Iterator<Item = LayerFootprint>) -> Footprint {
    let mut parts = vec![
        ("codes", 0),
        ("sinks", 0),
        ("window", 0),
        ("leaving", 0),
        ("bookkeeping", 0),
    ];
    for layer in layers {
        let codes = layer.codes.keys + layer.codes.values;
        let own = [
            codes,
            layer.sinks,
            layer.recent_window,
            layer.leaving,
            layer.bookkeeping,
        ];
        parts
            .iter_mut()
            .zip(own)
            .for_each(|(part, own)| part.1 += own);
    }
    Footprint { parts }
}

#[cfg(test)]
mod tests {
    use ::lexico::CoefficientFormat;
    use ::lexico::cache::Coding;
    use ::lexico::dictionary::{CodingLosses, LayerLosses, LayerSparsities};

    use super::*;
    use crate::decoder::{Logits, Sequence};
    use crate::model::Model;

    /// Reads a prompt and then token after token; the logits of every step, and positions in the window.
    fn logits(
        model: &Model,
        batch: usize,
        coding: Coding,
        background: bool,
    ) -> Result<Vec<(Vec<f32>, usize)>> {
        let sparsities = LayerSparsities {
            keys: vec![6, 3],
            values: vec![2, 4],
        };
        let layers = 0..4;
        let settings = layers.map(|layer| LayerSettings {
            coding,
            recent_window: 5,
            batch,
            delay: batch / 4 + layer * (batch / 2) / 4,
            background,
            ..LayerSettings::new(sparsities.clone())
        });
        let dictionaries = model.dictionaries.as_ref().expect("the embedded model's");
        let mut cache = LexicoCache::new(dictionaries, settings.collect())?;
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
            all.push((logits.squeeze(0)?.to_vec1()?, cache.layers[0].dense()));
        }
        Ok(all)
    }

    #[test]
    fn coding_in_the_background_changes_nothing() -> Result<()> {
        let model = Model::tiny()?;
        let sparse = |tolerance| Coding::Sparse {
            coefficients: CoefficientFormat::I8,
            tolerance,
        };
        for batch in [1, 2, 5, 16] {
            for coding in [Coding::default(), sparse(0.0), sparse(0.2)] {
                let background = logits(&model, batch, coding, true)?;
                let between = logits(&model, batch, coding, false)?;
                assert_eq!(background, between, "batches of {batch}, {coding:?}");
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
            calibration: None,
            device: &candle_core::Device::Cpu,
        };
        let spec: CacheSpec = text.parse().unwrap();
        spec.build(&context).map_err(|e| e.to_string())?;
        let layers = settings(&spec, &context, &dictionaries).unwrap();
        let layers = layers.iter().map(|layer| &layer.sparsities);
        let heads = layers.flat_map(|l| l.keys.iter().chain(&l.values));
        let count = 2 * config.layers * config.kv_heads;
        Ok(heads.sum::<usize>() as f64 / count as f64)
    }

    /// Help shows defaults and words that are the codec's.
    #[test]
    fn defaults_and_words_are_those_of_the_codec() {
        let model = Model::tiny().unwrap();
        let context = CacheContext {
            model: "tiny",
            config: model.decoder.config(),
            dictionaries: model.dictionaries.as_ref(),
            calibration: None,
            device: &Device::Cpu,
        };
        let dictionaries = model.dictionaries.as_ref().unwrap();
        let of = |text: &str| settings(&text.parse().unwrap(), &context, dictionaries).unwrap();
        let mut compared = 0;
        for option in METHOD.options {
            if let Values::OneOf(words) = option.values {
                let set = |word: &&str| CacheOptions::default().set(option.name, word).is_ok();
                assert!(words.iter().all(set), "{option:?}");
            }
            if option.values.refuse(option.default).is_none() {
                // Additive codes have no tolerance.
                let format = if option.name == "tolerance" {
                    "i8"
                } else {
                    "additive"
                };
                let given = format!("lexico:format={format},{}={}", option.name, option.default);
                assert_eq!(
                    of(&given),
                    of(&format!("lexico:format={format}")),
                    "{given}"
                );
                compared += 1;
            }
        }
        assert_eq!(compared, 7);
    }

    #[test]
    fn options_are_those_of_the_codec() {
        let names: Vec<&str> = METHOD.options.iter().map(|option| option.name).collect();
        assert_eq!(names, CacheOptions::NAMES);
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
