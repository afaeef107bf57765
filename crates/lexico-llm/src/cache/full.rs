use ::lexico::attention::{DenseRows, NumberType, Source};
use candle_core::{DType, Tensor};

use super::device::DeviceFullCache;
use super::method::{Method, NUMBER_TYPES, option};
use super::{Decoded, Footprint, KvCache, Step, outside_window};
use crate::config::Config;
use crate::error::Result;

pub(super) static METHOD: Method = Method {
    name: "full",
    summary: "every key and value dense",
    needs_dictionaries: false,
    options: &[option("dense", NUMBER_TYPES, "f16", "numbers")],
    build: |spec, context| {
        let number_type = spec.number_type("dense");
        if !context.device.is_cpu() {
            let dtype = match number_type {
                NumberType::F16 => DType::F16,
                NumberType::F32 => DType::F32,
            };
            return Ok(Box::new(DeviceFullCache::new(context.config, dtype)));
        }
        Ok(Box::new(FullCache::new(context.config, number_type)))
    },
    bytes: |spec, context, lengths| {
        let bytes = context.config.fp16_cache_bytes(lengths.end) as f64;
        Ok(match spec.number_type("dense") {
            NumberType::F16 => bytes,
            NumberType::F32 => 2.0 * bytes,
        })
    },
    // What all others are compared with.
    settings: |_, _, _| Vec::new(),
};

/// The uncompressed cache: every key and value dense, in f16 unless asked otherwise.
pub struct FullCache {
    layers: Vec<Vec<Head>>,
    window: Option<usize>,
    positions: usize,
}

struct Head {
    keys: DenseRows,
    values: DenseRows,
}

impl FullCache {
    /// An empty cache for a model of this shape.
    pub fn new(config: &Config, number_type: NumberType) -> Self {
        let rows = || DenseRows::new(config.head_dim, number_type);
        let head = || Head {
            keys: rows(),
            values: rows(),
        };
        let layer = || (0..config.kv_heads).map(|_| head()).collect();
        Self {
            layers: (0..config.layers).map(|_| layer()).collect(),
            window: config.window,
            positions: 0,
        }
    }
}

impl KvCache for FullCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let window = self.window;
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        let step = Step::new(q, k, v)?;
        let heads = &mut self.layers[layer];
        let out = step.attend(heads, window, |head| {
            vec![Source::Dense {
                keys: &head.keys,
                values: &head.values,
            }]
        })?;
        for (head, (keys, values)) in heads.iter_mut().zip(step.heads()) {
            head.keys.extend(keys);
            head.values.extend(values);
            if let Some(outside) = outside_window(window, head.keys.len()) {
                head.keys.drop_front(outside);
                head.values.drop_front(outside);
            }
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let mut decoded = Decoded::default();
        for head in &self.layers[layer] {
            decoded.keys.extend(head.keys.to_f32());
            decoded.values.extend(head.values.to_f32());
            decoded.bytes[0] += head.keys.bytes();
            decoded.bytes[1] += head.values.bytes();
        }
        Ok(Some(decoded))
    }

    fn footprint(&self) -> Footprint {
        let heads = || self.layers.iter().flatten();
        let dense = heads()
            .map(|head| head.keys.bytes() + head.values.bytes())
            .sum();
        Footprint {
            parts: vec![
                ("dense", dense),
                ("bookkeeping", heads().count() * size_of::<Head>()),
            ],
        }
    }
}
