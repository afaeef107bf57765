use ::lexico::KeyValue;
use ::lexico::attention::{DenseRows, NumberType, Source};
use candle_core::DType;

use super::device::DeviceFullCache;
use super::method::{Method, NUMBER_TYPES, option};
use super::stored::{DenseHead, NewPositions, StoredCache, StoredHead};
use crate::config::Config;

pub(super) static METHOD: Method = Method {
    name: "full",
    summary: "every key and value dense",
    needs_dictionaries: false,
    saves: false,
    options: &[option("dense", NUMBER_TYPES, "f16").about("numbers")],
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
pub type FullCache = StoredCache<Vec<DenseHead>>;

impl FullCache {
    /// Makes an empty cache for a model of this shape.
    pub fn new(config: &Config, number_type: NumberType) -> Self {
        Self::with_heads(config, (), |_| DenseHead::new(config.head_dim, number_type))
    }

    /// Keys and values held of a layer's KV head.
    pub(crate) fn rows(&self, layer: usize, head: usize) -> KeyValue<&DenseRows> {
        self.layers[layer][head].rows.as_ref()
    }
}

impl StoredHead for DenseHead {
    type Shared = ();

    const FINITE_ONLY: bool = false;

    fn len(&self) -> usize {
        self.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![self.source()]
    }

    fn take(&mut self, _shared: &(), new: NewPositions<'_>) {
        self.extend(new.vectors);
    }

    fn drop_front(&mut self, count: usize) {
        for rows in self.rows.as_mut() {
            rows.drop_front(count);
        }
    }

    fn vectors(&self) -> Option<KeyValue<Vec<f32>>> {
        Some(self.rows.as_ref().map(DenseRows::to_f32))
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        vec![("dense", self.bytes())]
    }
}
