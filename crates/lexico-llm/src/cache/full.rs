use ::lexico::attention::{DenseRows, NumberType, Source, attend};
use candle_core::Tensor;
use rayon::prelude::*;

use super::{Footprint, KvCache, numbers, tensor};
use crate::config::Config;
use crate::error::Result;

/// The uncompressed cache: every key and value dense, in f16 unless asked otherwise.
pub struct FullCache {
    layers: Vec<Vec<Head>>,
    head_dim: usize,
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
        }
    }
}

impl KvCache for FullCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (queries, t) = numbers(q)?;
        let (keys, _) = numbers(k)?;
        let (values, _) = numbers(v)?;
        let heads = &mut self.layers[layer];
        let m = self.head_dim;
        let mut out = vec![0.0; queries.len()];
        let group = queries.len() / heads.len();
        (
            &mut *heads,
            queries.par_chunks_exact(group),
            keys.par_chunks_exact(t * m),
            values.par_chunks_exact(t * m),
            out.par_chunks_exact_mut(group),
        )
            .into_par_iter()
            .for_each(|(head, queries, new_keys, new_values, out)| {
                let sources = [
                    Source::Dense {
                        keys: &head.keys,
                        values: &head.values,
                    },
                    Source::Causal {
                        keys: new_keys,
                        values: new_values,
                    },
                ];
                attend(queries, m, t, &sources, out);
                head.keys.extend(new_keys);
                head.values.extend(new_values);
            });
        tensor(out, q)
    }

    fn len(&self) -> usize {
        // The last layer is the last to grow: a step counts once all layers have it.
        let head = self.layers.last().and_then(|heads| heads.first());
        head.map_or(0, |head| head.keys.len())
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
