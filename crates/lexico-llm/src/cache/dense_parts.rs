//! First positions, and first and last layers, that a method keeps dense beside what it does with all others.

use ::lexico::KeyValue;
use ::lexico::attention::{NumberType, Source};

use super::CacheSpec;
use super::method::{Lengths, MethodOption, Values, option};
use super::stored::{DenseHead, NewPositions, StoredHead};
use crate::config::Config;
use crate::error::Result;

/// Option of the positions at the beginning that are kept dense.
pub(super) const SINKS: MethodOption =
    option("sinks", Values::Count, "0").about("first positions, kept dense");

/// Option of the layers that are kept dense.
pub(super) const DENSE_LAYERS: MethodOption = option("dense-layers", Values::Count, "0")
    .about("layers kept dense at each end of the model, up to half of all");

/// The dense parts that a spec asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct DenseParts {
    sinks: usize,
    /// Layers at each end, as vLLM skips them: no more than half of all.
    layers: usize,
    of_layers: usize,
}

impl DenseParts {
    pub(super) fn new(spec: &CacheSpec, config: &Config) -> Result<Self> {
        let layers: usize = spec.number("dense-layers")?;
        Ok(Self {
            sinks: spec.number("sinks")?,
            layers: layers.min(config.layers / 2),
            of_layers: config.layers,
        })
    }

    /// Wraps an empty head of a layer.
    pub(super) fn around<H: StoredHead>(
        self,
        layer: usize,
        head_dim: usize,
        rest: H,
    ) -> WithSinks<H> {
        let dense = layer < self.layers || layer >= self.of_layers - self.layers;
        WithSinks {
            sinks: DenseHead::new(head_dim, NumberType::F16),
            // All positions of a dense layer are kept as the first ones of others are.
            room: if dense { usize::MAX } else { self.sinks },
            rest,
        }
    }

    /// Bytes that a cache is expected to hold; `rest` has those of the head that is wrapped, for its part of the lengths.
    pub(super) fn expected_bytes<H>(
        self,
        config: &Config,
        lengths: Lengths,
        rest: impl Fn(Lengths) -> usize,
    ) -> f64 {
        let gone = lengths
            .end
            .saturating_sub(config.window.unwrap_or(usize::MAX));
        let head = |sinks: usize| {
            let dense = sinks.min(lengths.end).saturating_sub(gone);
            let others = Lengths {
                prompt: lengths.prompt.saturating_sub(sinks),
                end: lengths.end.saturating_sub(sinks),
            };
            let wrapper = size_of::<WithSinks<H>>() - size_of::<H>();
            wrapper + dense * 4 * config.head_dim + rest(others)
        };
        let dense = 2 * self.layers;
        let layers = dense * head(usize::MAX) + (self.of_layers - dense) * head(self.sinks);
        (config.kv_heads * layers) as f64
    }
}

/// A KV head whose first positions stay dense in f16, as attention falls back on them (StreamingLLM, Xiao et al. 2024);
/// all others are held by `rest`, which is given no queries.
pub(super) struct WithSinks<H> {
    sinks: DenseHead,
    /// Positions for which there is room among the first.
    room: usize,
    pub(super) rest: H,
}

impl<H> WithSinks<H> {
    /// New positions that are kept among the first, of those with these `keys` `[t, m]`.
    fn first(&self, keys: &[f32]) -> usize {
        self.room.min(keys.len() / self.sinks.rows.keys.head_dim())
    }
}

impl<H: StoredHead> StoredHead for WithSinks<H> {
    type Shared = H::Shared;

    const FINITE_ONLY: bool = H::FINITE_ONLY;

    fn len(&self) -> usize {
        self.sinks.len() + self.rest.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let sinks = (self.sinks.len() > 0).then(|| self.sinks.source());
        sinks.into_iter().chain(self.rest.sources()).collect()
    }

    fn as_attended(&self, new: KeyValue<&[f32]>) -> Option<KeyValue<Vec<f32>>> {
        let first = self.first(new.keys) * self.sinks.rows.keys.head_dim();
        if first == new.keys.len() {
            return None;
        }
        let rest = self
            .rest
            .as_attended(new.map(|vectors| &vectors[first..]))?;
        let all = new.zip(rest);
        Some(all.map(|(new, rest)| [&new[..first], &rest].concat()))
    }

    fn take(&mut self, shared: &H::Shared, new: NewPositions<'_>) {
        let first = self.first(new.vectors.keys);
        let m = self.sinks.rows.keys.head_dim();
        self.room -= first;
        self.sinks
            .extend(new.vectors.map(|vectors| &vectors[..first * m]));
        let vectors = new.vectors.map(|vectors| &vectors[first * m..]);
        if !vectors.keys.is_empty() {
            let rest = NewPositions {
                layer: new.layer,
                queries: &[],
                vectors,
            };
            self.rest.take(shared, rest);
        }
    }

    fn drop_front(&mut self, count: usize) {
        let sinks = count.min(self.sinks.len());
        for rows in self.sinks.rows.as_mut() {
            rows.drop_front(sinks);
        }
        self.rest.drop_front(count - sinks);
    }

    fn vectors(&self) -> Option<KeyValue<Vec<f32>>> {
        let both = self.sinks.rows.as_ref().zip(self.rest.vectors()?);
        Some(both.map(|(sinks, rest)| [sinks.to_f32(), rest].concat()))
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        let mut parts = self.rest.bytes();
        if self.sinks.len() > 0 {
            parts.push(("dense", self.sinks.bytes()));
        }
        parts
    }
}
