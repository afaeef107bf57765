use std::sync::{Arc, Mutex, PoisonError, Weak};

use ::lexico::cache::{Coder, LayerSettings};
use ::lexico::cuda::{DeviceLayer, DeviceSequence, Gpu};
use ::lexico::{DictionarySet, KeyValue};
use candle_core::{DType, Device, Tensor};

use super::dense;
use super::gpu::{address, in_a_row, refused, room, streams};
use super::maps::DeviceMaps;
use crate::cache::lexico::{bytes_by_part, explained_of_layer, footprint};
use crate::cache::{Decoded, Footprint, KvCache};
use crate::config::Config;
use crate::decoder::Sequence;
use crate::error::{Error, Result};

/// [`LexicoCache`](crate::cache::lexico) in a GPU's memory: codes, window and dictionaries, attended to by kernels of
/// our own.
///
/// What leaves the window is coded on a second stream, while the next tokens are decoded.
pub(crate) struct DeviceLexicoCache {
    model: Arc<ModelOnDevice>,
    layers: Vec<DeviceSequence<Gpu>>,
    /// The model's sliding window.
    sliding_window: Option<usize>,
}

/// The part that all sequences of one model with the same settings share.
struct ModelOnDevice {
    dictionaries: Arc<DictionarySet>,
    settings: Vec<LayerSettings>,
    device: Device,
    layers: Vec<DeviceLayer<Gpu>>,
    /// The maps of every layer, where codes are found behind some: the layer's kernels know nothing of them.
    maps: Vec<KeyValue<Option<DeviceMaps>>>,
}

/// Those that some sequence uses.
static MODELS: Mutex<Vec<Weak<ModelOnDevice>>> = Mutex::new(Vec::new());

impl ModelOnDevice {
    /// The one that other sequences use, or a new one.
    fn find_or_make(
        config: &Config,
        dictionaries: &Arc<DictionarySet>,
        settings: Vec<LayerSettings>,
        device: &Device,
    ) -> Result<Arc<Self>> {
        let mut all = MODELS.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|model| model.strong_count() > 0);
        let same = |model: &Arc<Self>| {
            Arc::ptr_eq(&model.dictionaries, dictionaries)
                && model.settings == settings
                && model.device.same_device(device)
        };
        if let Some(model) = all.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(model);
        }
        let streams = streams(device)?;
        let layers = dictionaries.layers.iter().zip(&settings);
        let maps = layers.clone().map(|(own, settings)| {
            // What cannot be coded at all is said below.
            let coders = settings.coding.coders(own).ok();
            let maps = |coder: &Coder| {
                let maps = coder.maps().map(|maps| DeviceMaps::new(maps, device));
                maps.transpose()
            };
            match coders {
                Some(coders) => coders.as_ref().try_map(maps),
                None => Ok(KeyValue::default()),
            }
        });
        let maps = maps.collect::<Result<_>>()?;
        let layers = layers.enumerate();
        let query_group = config.heads / config.kv_heads;
        let layers = layers.map(|(number, (own, settings))| {
            let layer = DeviceLayer::new(streams.clone(), own, settings.clone(), query_group);
            layer.map_err(|error| match error {
                ::lexico::Error::Device(_) => refused(device, &error),
                _ => on_cpu(explained_of_layer(number, error)),
            })
        });
        let model = Arc::new(Self {
            layers: layers.collect::<Result<_>>()?,
            dictionaries: Arc::clone(dictionaries),
            settings,
            device: device.clone(),
            maps,
        });
        all.push(Arc::downgrade(&model));
        Ok(model)
    }
}

/// Adds the cure to what a GPU does not take.
fn on_cpu(error: Error) -> Error {
    match error {
        Error::OptionValue {
            method,
            option,
            value,
            reason,
        } => Error::OptionValue {
            method,
            option,
            value,
            reason: format!("{reason}; leave it out, or use --device cpu"),
        },
        other => other,
    }
}

impl DeviceLexicoCache {
    /// An empty cache for a model of this shape.
    ///
    /// # Errors
    /// Those of [`DeviceLayer::new`].
    pub(crate) fn new(
        config: &Config,
        dictionaries: &Arc<DictionarySet>,
        settings: Vec<LayerSettings>,
        device: &Device,
    ) -> Result<Self> {
        let model = ModelOnDevice::find_or_make(config, dictionaries, settings, device)?;
        let sequences = model.layers.iter().map(DeviceLayer::sequence);
        let layers = sequences.collect::<::lexico::Result<_>>();
        Ok(Self {
            layers: layers.map_err(|reason| refused(device, &reason))?,
            model,
            sliding_window: config.window,
        })
    }

    /// Keys and values of what the next query sees, as the model made them, `[kv_heads, positions, m]` each; `None` where there is
    /// nothing.
    fn past(&self, layer: usize) -> Result<Option<KeyValue<Tensor>>> {
        let (own, sequence) = (&self.model.layers[layer], &self.layers[layer]);
        let seen = sequence.seen();
        if seen == 0 {
            return Ok(None);
        }
        let m = self.model.dictionaries.layers[layer].head_dim();
        let device = &self.model.device;
        let rows = || room((own.heads(), seen, m), device);
        let past = KeyValue::new(rows()?, rows()?);
        let addresses = past.as_ref().try_map(address)?;
        // SAFETY: there is room for all positions that are seen, and what is asked of candle's stream finds it there.
        unsafe { own.read_back(sequence, addresses) }.map_err(|reason| refused(device, &reason))?;
        let parts = past.zip(self.model.maps[layer].as_ref());
        let past = parts.try_map(|(rows, maps)| match maps {
            Some(maps) => maps.invert(&rows),
            None => Ok(rows),
        });
        past.map(Some)
    }
}

/// Takes one new position of each sequence where all of them are in one GPU's memory with the same settings, and attends for all at
/// once: `q` `[heads, sequences, m]`, `k` and `v` `[kv_heads, sequences, m]`; `[sequences, heads, m]`. `None` where they are not.
pub(crate) fn decode_together(
    layer: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &mut [Sequence<'_>],
) -> Result<Option<Tensor>> {
    if sequences.iter().any(|sequence| sequence.tokens.len() != 1) {
        return Ok(None);
    }
    let mut caches = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let Some(cache) = sequence.cache.on_device() else {
            return Ok(None);
        };
        caches.push(cache);
    }
    let Some(first) = caches.first() else {
        return Ok(None);
    };
    let model = &first.model;
    if caches.iter().any(|cache| !Arc::ptr_eq(&cache.model, model)) {
        return Ok(None);
    }
    attend_to_one_more(layer, q, k, v, &mut caches).map(Some)
}

/// Takes one new position of each of these sequences, which share all that can be shared, and attends, as [`decode_together`].
fn attend_to_one_more(
    layer: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    caches: &mut [&mut DeviceLexicoCache],
) -> Result<Tensor> {
    let model = Arc::clone(&caches[0].model);
    let (heads, count, m) = q.dims3()?;
    let own = &model.layers[layer];
    if heads != own.heads() * own.query_group() {
        let reason = format!("{heads} query heads of {} KV heads", own.heads());
        return Err(refused(&model.device, &::lexico::Error::Device(reason)));
    }
    let maps = model.maps[layer].as_ref().map(Option::as_ref);
    let by_sequence = |x: &Tensor| in_a_row(&x.transpose(0, 1)?);
    let q = match maps.keys {
        Some(maps) => maps.queries(&in_a_row(q)?)?,
        None => q.clone(),
    };
    let scaled = (by_sequence(&q)? * (1.0 / (m as f64).sqrt()))?;
    let new = mapped(maps, KeyValue::new(k, v))?;
    let KeyValue { keys: k, values: v } = new.as_ref().try_map(by_sequence)?;
    let out = room((count, heads, m), &model.device)?;
    let mut held: Vec<&mut DeviceSequence<Gpu>> = caches
        .iter_mut()
        .map(|cache| &mut cache.layers[layer])
        .collect();
    // SAFETY: the tensors are of the shapes that are asked for, and what is asked of candle's stream finds them there.
    unsafe {
        own.decode(
            &mut held,
            KeyValue::new(address(&k)?, address(&v)?),
            address(&scaled)?,
            address(&out)?,
        )
    }
    .map_err(|reason| refused(&model.device, &reason))?;
    match maps.values {
        Some(maps) => {
            let out = maps.outputs(&out.transpose(0, 1)?)?;
            in_a_row(&out.transpose(0, 1)?)
        }
        None => Ok(out),
    }
}

/// New keys and values `[kv_heads, n, m]` behind a layer's maps, f32.
fn mapped(maps: KeyValue<Option<&DeviceMaps>>, new: KeyValue<&Tensor>) -> Result<KeyValue<Tensor>> {
    maps.zip(new).try_map(|(maps, new)| match maps {
        Some(maps) => in_a_row(&maps.apply(&in_a_row(new)?)?),
        None => in_a_row(new),
    })
}

impl KvCache for DeviceLexicoCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let t = k.dim(1)?;
        if t == 1 {
            let out = attend_to_one_more(layer, q, k, v, &mut [self])?;
            return Ok(out.transpose(0, 1)?);
        }
        let (k, v) = (in_a_row(k)?, in_a_row(v)?);
        // As the uncompressed cache attends.
        let halves = |x: &Tensor| x.to_dtype(DType::F16);
        let out = match self.past(layer)? {
            Some(KeyValue { keys, values }) => {
                let keys = Tensor::cat(&[&halves(&keys)?, &halves(&k)?], 1)?;
                let values = Tensor::cat(&[&halves(&values)?, &halves(&v)?], 1)?;
                dense::attend(q, &keys, &values, self.sliding_window)?
            }
            None => dense::attend(q, &halves(&k)?, &halves(&v)?, self.sliding_window)?,
        };
        let maps = self.model.maps[layer].as_ref().map(Option::as_ref);
        let new = mapped(maps, KeyValue::new(&k, &v))?;
        let addresses = new.as_ref().try_map(address)?;
        let (own, sequence) = (&self.model.layers[layer], &mut self.layers[layer]);
        // SAFETY: the tensors are of the shapes that are asked for, and what is asked of candle's stream finds them there.
        unsafe { own.take(sequence, addresses, t) }
            .map_err(|reason| refused(&self.model.device, &reason))?;
        Ok(out)
    }

    fn on_device(&mut self) -> Option<&mut DeviceLexicoCache> {
        Some(self)
    }

    fn len(&self) -> usize {
        self.layers.last().map_or(0, DeviceSequence::positions)
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let footprint = self.model.layers[layer].footprint(&self.layers[layer]);
        let mut decoded = Decoded {
            bytes: bytes_by_part(&footprint),
            ..Decoded::default()
        };
        if let Some(KeyValue { keys, values }) = self.past(layer)? {
            decoded.keys = keys.flatten_all()?.to_vec1()?;
            decoded.values = values.flatten_all()?.to_vec1()?;
        }
        Ok(Some(decoded))
    }

    fn footprint(&self) -> Footprint {
        let layers = self.model.layers.iter().zip(&self.layers);
        footprint(layers.map(|(layer, sequence)| layer.footprint(sequence)))
    }
}
