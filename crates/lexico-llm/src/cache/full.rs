use ::lexico::attention::{DenseRows, NumberType, Source, attend};
use candle_core::Tensor;

use super::{Footprint, KvCache, attend_heads, outside_window};
use crate::config::Config;
use crate::error::Result;

/// The uncompressed cache: every key and value dense, in f16 unless asked otherwise.
pub struct FullCache {
    layers: Vec<Vec<Head>>,
    head_dim: usize,
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
            head_dim: config.head_dim,
            window: config.window,
            positions: 0,
        }
    }
}

impl KvCache for FullCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (m, window) = (self.head_dim, self.window);
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        attend_heads(&mut self.layers[layer], q, k, v, |head, step| {
            let sources = [
                Source::Dense {
                    keys: &head.keys,
                    values: &head.values,
                },
                Source::Causal {
                    keys: step.keys,
                    values: step.values,
                },
            ];
            attend(step.queries, m, step.t, window, &sources, step.out);
            head.keys.extend(step.keys);
            head.values.extend(step.values);
            if let Some(outside) = outside_window(window, head.keys.len()) {
                head.keys.drop_front(outside);
                head.values.drop_front(outside);
            }
            Ok(())
        })
    }

    fn len(&self) -> usize {
        self.positions
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
