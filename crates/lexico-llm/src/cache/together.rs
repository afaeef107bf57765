use candle_core::Tensor;

use super::{Footprint, KvCache};
use crate::error::Result;

/// Caches that read the same prompt: the model computes it once, with the first of them.
///
/// What it computes of a prompt is the same with all caches but those whose [`CacheSpec`](super::CacheSpec) says
/// otherwise: see [`exact_prompts`](super::CacheSpec::exact_prompts).
pub struct ReadTogether<'a, 'b> {
    /// The cache that the model attends with.
    pub first: &'a mut (dyn KvCache + 'b),
    /// The others, with as many positions.
    pub others: Vec<&'a mut (dyn KvCache + 'b)>,
}

impl KvCache for ReadTogether<'_, '_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        for other in &mut self.others {
            other.read(layer, q, k, v)?;
        }
        self.first.attend(layer, q, k, v)
    }

    fn len(&self) -> usize {
        self.first.len()
    }

    fn footprint(&self) -> Footprint {
        self.first.footprint()
    }
}
