use std::sync::{Arc, Mutex, PoisonError, Weak};

use ::lexico::attention::NumberType;
use ::lexico::cuda::{
    DEVICE_BEAM, DeviceDictionaries, DeviceLayer, DeviceLayerSettings, DeviceSequence, Gpu,
};
use ::lexico::{CoefficientFormat, DictionarySet};
use candle_core::{DType, Device, Tensor};

use super::dense;
use super::gpu::{address, in_a_row, refused, room, streams};
use crate::cache::lexico::{Format, LexicoSettings};
use crate::cache::{Decoded, Footprint, KvCache};
use crate::config::Config;
use crate::decoder::Sequence;
use crate::error::{Error, Result};

/// [`LexicoCache`](crate::cache::LexicoCache) in a GPU's memory: codes, window and dictionaries, attended to by kernels of our own.
///
/// What leaves the window is coded on a second stream, while the next tokens are decoded.
pub(crate) struct DeviceLexicoCache {
    shared: Arc<Shared>,
    layers: Vec<DeviceSequence<Gpu>>,
    sliding: Option<usize>,
}

/// What all sequences of one model with the same settings share.
struct Shared {
    dictionaries: Arc<DictionarySet>,
    settings: LexicoSettings,
    device: Device,
    layers: Vec<DeviceLayer<Gpu>>,
}

/// Those that some sequence uses.
static SHARED: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

fn impossible(option: &'static str, value: String, reason: &str) -> Error {
    Error::OptionValue {
        method: "lexico",
        option,
        value,
        reason: reason.to_owned(),
    }
}

impl Shared {
    fn of(
        config: &Config,
        dictionaries: &Arc<DictionarySet>,
        settings: LexicoSettings,
        device: &Device,
    ) -> Result<Arc<Self>> {
        let mut all = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|shared| shared.strong_count() > 0);
        let same = |shared: &Arc<Self>| {
            Arc::ptr_eq(&shared.dictionaries, dictionaries)
                && shared.settings == settings
                && shared.device.same_device(device)
        };
        if let Some(shared) = all.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(shared);
        }
        let shared = Arc::new(Self::new(config, dictionaries, settings, device)?);
        all.push(Arc::downgrade(&shared));
        Ok(shared)
    }

    fn new(
        config: &Config,
        dictionaries: &Arc<DictionarySet>,
        settings: LexicoSettings,
        device: &Device,
    ) -> Result<Self> {
        dictionaries.check_fits(&config.identity("at hand"))?;
        if settings.adaptive > 0 {
            let reason = "sessions add no atoms on a GPU; leave it out, or use --device cpu";
            return Err(impossible(
                "adaptive",
                settings.adaptive.to_string(),
                reason,
            ));
        }
        if let Format::Additive { beam } = settings.format
            && beam != DEVICE_BEAM
        {
            let reason = "on a GPU the search follows 8 sums; leave it out, or use --device cpu";
            return Err(impossible("beam", beam.to_string(), reason));
        }
        let streams = streams(device)?;
        let mut layers = Vec::with_capacity(config.layers);
        for (number, (own, sparsities)) in dictionaries
            .layers
            .iter()
            .zip(&settings.sparsities)
            .enumerate()
        {
            let over = match (settings.format, &own.codebooks) {
                (Format::Additive { .. }, Some(codebooks)) => DeviceDictionaries::Additive {
                    keys: &codebooks.keys,
                    values: &codebooks.values,
                },
                (Format::Additive { .. }, None) => {
                    let reason = "these dictionaries have no groups";
                    return Err(impossible("format", "packed".to_owned(), reason));
                }
                (Format::Sparse(CoefficientFormat::F32), _) => {
                    let reason = "on a GPU coefficients take a byte; choose i8 or f8";
                    return Err(impossible("format", "f32".to_owned(), reason));
                }
                (Format::Sparse(coefficients), _) => DeviceDictionaries::Sparse {
                    keys: &own.keys,
                    values: &own.values,
                    coefficients,
                },
            };
            let settings = DeviceLayerSettings {
                sparsities: sparsities.clone(),
                unbiased: settings.unbiased,
                group: config.heads / config.kv_heads,
                window: settings.window,
                batch: settings.batch,
                due: settings.due(number),
            };
            let layer = DeviceLayer::new(Arc::clone(&streams), over, settings);
            layers.push(layer.map_err(|reason| refused(device, &reason))?);
        }
        Ok(Self {
            dictionaries: Arc::clone(dictionaries),
            settings,
            device: device.clone(),
            layers,
        })
    }
}

impl DeviceLexicoCache {
    /// An empty cache for a model of this shape.
    ///
    /// # Errors
    /// As [`LexicoCache::new`](crate::cache::LexicoCache::new), and for what GPUs do not take.
    pub(crate) fn new(
        config: &Config,
        dictionaries: &Arc<DictionarySet>,
        settings: LexicoSettings,
        device: &Device,
    ) -> Result<Self> {
        if settings.tolerance > 0.0 {
            let reason = "on a GPU all codes have as many atoms; leave it out, or use --device cpu";
            return Err(impossible(
                "tolerance",
                settings.tolerance.to_string(),
                reason,
            ));
        }
        if settings.dense != NumberType::F16 {
            let reason = "on a GPU the window is in f16; leave it out, or use --device cpu";
            return Err(impossible("dense", "f32".to_owned(), reason));
        }
        let shared = Shared::of(config, dictionaries, settings, device)?;
        let sequences = shared.layers.iter().map(DeviceLayer::sequence);
        let layers = sequences.collect::<::lexico::Result<_>>();
        Ok(Self {
            layers: layers.map_err(|reason| refused(device, &reason))?,
            shared,
            sliding: config.window,
        })
    }

    /// Keys and values of what the next query sees, `[kv_heads, positions, m]` each; `None` where there is nothing.
    fn past(&self, layer: usize) -> Result<Option<[Tensor; 2]>> {
        let (own, sequence) = (&self.shared.layers[layer], &self.layers[layer]);
        let seen = sequence.seen(self.sliding);
        if seen == 0 {
            return Ok(None);
        }
        let m = self.shared.dictionaries.layers[layer].keys.head_dim();
        let device = &self.shared.device;
        let rows = || room((own.heads(), seen, m), device);
        let past = [rows()?, rows()?];
        let addresses = [address(&past[0])?, address(&past[1])?];
        // SAFETY: there is room for all positions that are seen, and what is asked of candle's stream finds it there.
        unsafe { own.read_back(sequence, addresses, self.sliding) }
            .map_err(|reason| refused(device, &reason))?;
        Ok(Some(past))
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
    let shared = &first.shared;
    if caches
        .iter()
        .any(|cache| !Arc::ptr_eq(&cache.shared, shared))
    {
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
    let (shared, sliding) = (Arc::clone(&caches[0].shared), caches[0].sliding);
    let (heads, count, m) = q.dims3()?;
    let own = &shared.layers[layer];
    if heads != own.heads() * own.group() {
        let reason = format!("{heads} query heads of {} KV heads", own.heads());
        return Err(refused(&shared.device, &::lexico::Error::Device(reason)));
    }
    let by_sequence = |x: &Tensor| in_a_row(&x.transpose(0, 1)?);
    let scaled = (by_sequence(q)? * (1.0 / (m as f64).sqrt()))?;
    let (k, v) = (by_sequence(k)?, by_sequence(v)?);
    let out = room((count, heads, m), &shared.device)?;
    let mut held: Vec<&mut DeviceSequence<Gpu>> = caches
        .iter_mut()
        .map(|cache| &mut cache.layers[layer])
        .collect();
    // SAFETY: the tensors are of the shapes that are asked for, and what is asked of candle's stream finds them there.
    unsafe {
        own.decode(
            &mut held,
            [address(&k)?, address(&v)?],
            address(&scaled)?,
            address(&out)?,
            sliding,
        )
    }
    .map_err(|reason| refused(&shared.device, &reason))?;
    Ok(out)
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
            Some([keys, values]) => {
                let keys = Tensor::cat(&[&halves(&keys)?, &halves(&k)?], 1)?;
                let values = Tensor::cat(&[&halves(&values)?, &halves(&v)?], 1)?;
                dense::attend(q, &keys, &values, self.sliding)?
            }
            None => dense::attend(q, &halves(&k)?, &halves(&v)?, self.sliding)?,
        };
        let (own, sequence) = (&self.shared.layers[layer], &mut self.layers[layer]);
        // SAFETY: the tensors are of the shapes that are asked for, and what is asked of candle's stream finds them there.
        unsafe { own.take(sequence, [address(&k)?, address(&v)?], t, self.sliding) }
            .map_err(|reason| refused(&self.shared.device, &reason))?;
        Ok(out)
    }

    fn on_device(&mut self) -> Option<&mut DeviceLexicoCache> {
        Some(self)
    }

    fn len(&self) -> usize {
        self.layers.last().map_or(0, DeviceSequence::positions)
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let bytes = self.shared.layers[layer].bytes(&self.layers[layer]);
        let each = (bytes.window + bytes.leaving) / 2;
        let mut decoded = Decoded {
            bytes: bytes.codes.map(|codes| codes + each),
            ..Decoded::default()
        };
        if let Some([keys, values]) = self.past(layer)? {
            decoded.keys = keys.flatten_all()?.to_vec1()?;
            decoded.values = values.flatten_all()?.to_vec1()?;
        }
        Ok(Some(decoded))
    }

    fn footprint(&self) -> Footprint {
        let layers = || self.shared.layers.iter().zip(&self.layers);
        let bytes = || layers().map(|(layer, sequence)| layer.bytes(sequence));
        Footprint {
            parts: vec![
                ("codes", bytes().flat_map(|bytes| bytes.codes).sum()),
                ("window", bytes().map(|bytes| bytes.window).sum()),
                ("leaving", bytes().map(|bytes| bytes.leaving).sum()),
                (
                    "bookkeeping",
                    self.layers.len() * size_of::<DeviceSequence<Gpu>>(),
                ),
            ],
        }
    }
}
