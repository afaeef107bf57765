//! What methods find out about a model on some text, once for all of its caches.

use std::sync::Arc;

use ::lexico::KeyValue;
use ::lexico::attention::NumberType;
use candle_core::Tensor;

use super::rotation::Rotation;
use super::{Footprint, FullCache, KvCache, Step, oscar};
use crate::decoder::{Decoder, Logits};
use crate::error::Result;

/// Rotations of a model's keys and values, found on a text. Like dictionaries they belong to the model and are not among a
/// cache's bytes.
#[derive(Debug, Clone)]
pub struct Calibration {
    layers: Arc<[KeyValue<Rotation>]>,
}

impl Calibration {
    /// Reads a text of at least one token, at full precision and at once.
    ///
    /// # Errors
    /// Those of [`Decoder::forward`], also for a text longer than the model's context.
    pub(crate) fn on(decoder: &Decoder, tokens: &[u32]) -> Result<Self> {
        let mut recorder = Recorder {
            full: FullCache::new(decoder.config(), NumberType::F16),
            layers: Vec::new(),
        };
        decoder.forward_one(tokens, &mut recorder, Logits::Last)?;
        Ok(Self {
            layers: recorder.layers.into(),
        })
    }

    /// The rotations of a layer.
    pub(super) fn rotations(&self, layer: usize) -> Option<&KeyValue<Rotation>> {
        self.layers.get(layer)
    }
}

/// The uncompressed cache, which has rotations found for each layer.
struct Recorder {
    full: FullCache,
    layers: Vec<KeyValue<Rotation>>,
}

impl KvCache for Recorder {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        self.layers.push(oscar::rotations(&step));
        self.full.attend(layer, q, k, v)
    }

    fn len(&self) -> usize {
        self.full.len()
    }

    fn footprint(&self) -> Footprint {
        self.full.footprint()
    }
}
