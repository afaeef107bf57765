//! KV caches: the trait, and one file a method. A method is named `NAME[:key=value,…]`.
//!
//! To add a method, write its file here: a `METHOD` (name, options, how to make it, the bytes it is expected to hold) and
//! what it makes of keys and values; `StoredCache` does the rest. A code of single vectors implements `CodedVectors`, as
//! in `per_token.rs`; a method that stores or evicts by KV head `StoredHead`, as in `kivi.rs` and `h2o.rs`; one whose heads
//! depend on each other `StoredLayer`, as in `zipcache.rs`. A `mod` line here and its name
//! in [`METHODS`] in `spec.rs` then make it known to commands, help, errors and budgets, for which its `settings` are the
//! choices. Rows of a few bits a number are in `bits.rs`, layers of rotated vectors in `rotation.rs`, first positions and layers that stay
//! dense in `dense_parts.rs`. Tests in its file hold it against its authors' results (`fixture.rs`); a line in
//! `QUANTISED` of `tests/methods.rs` and one in `tests/memory.rs` have it tested with the others. README lists the methods.

mod attend;
mod bits;
mod calibration;
mod dense_parts;
mod device;
mod evict;
#[cfg(test)]
mod fixture;
mod fp8;
mod full;
mod h2o;
mod kivi;
mod kvarn;
mod lexico;
mod llama_cpp;
mod method;
mod oscar;
mod per_token;
mod pyramidkv;
mod random;
mod recent_window;
mod rotation;
mod snapkv;
mod spec;
mod stored;
mod streaming_llm;
mod together;
mod turboquant;
mod uniform;
mod vllm_turboquant;
mod zipcache;

use ::lexico::KeyValue;
use ::lexico::attention::{Head, Source, attend_heads};
use candle_core::{DType, Device, Tensor};

pub use attend::Sequence;
pub(crate) use attend::attend_all;
pub use calibration::Calibration;
pub use full::FullCache;
pub(crate) use lexico::SINKS;
pub use method::{CacheBudget, CacheContext, Lengths, Method, MethodOption, Values};
pub use spec::{CacheSpec, METHODS};
pub use together::ReadTogether;

use crate::error::{Error, Result};
use crate::threads::ModelThreads;

/// Keys and values of one sequence, in every layer, however they are stored.
pub trait KvCache: Send {
    /// Takes `t` new positions of `layer` and returns causal attention of their queries over all
    /// positions so far, `[heads, t, head_dim]`.
    ///
    /// `q` is `[heads, t, head_dim]`, rotated and unscaled; `k` and `v` are
    /// `[kv_heads, t, head_dim]`, `k` rotated. Layers are called in order, each once a step.
    ///
    /// # Errors
    /// [`crate::Error::Coding`] for a key or value that is not finite; the cache cannot be used
    /// any further then.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// Takes new positions as [`attend`](KvCache::attend) does, where nobody asks for the attention.
    ///
    /// # Errors
    /// Those of [`attend`](KvCache::attend).
    fn read(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        self.attend(layer, q, k, v).map(drop)
    }

    /// Positions taken so far: the next one's number. A model with a sliding window no longer
    /// needs the oldest of them, and they may be gone.
    fn len(&self) -> usize;

    /// Returns true where there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions that are held as the model made them, where others are not; `None` of a method that knows no such difference.
    fn dense(&self) -> Option<usize> {
        None
    }

    /// Positions that it can take at the most, where its memory is limited.
    fn capacity(&self) -> Option<usize> {
        None
    }

    /// Bytes allocated now, by part.
    fn footprint(&self) -> Footprint;

    /// Returns all keys and values of `layer` as attention takes them; `None` of a method that gives positions up.
    ///
    /// # Errors
    /// Those of turning them back into vectors.
    fn decoded(&self, _layer: usize) -> Result<Option<Decoded>> {
        Ok(None)
    }

    /// Returns a copy that goes on by itself, exactly as this cache would, and shares with it what neither changes any
    /// more; `None` of a method that has none.
    fn fork(&self) -> Option<Box<dyn KvCache>> {
        None
    }

    /// Returns all that an empty cache of the same settings needs to [go on](KvCache::resume) exactly as this one would;
    /// `None` of a method that cannot be saved.
    fn state(&self) -> Option<CacheState> {
        None
    }

    /// Itself where it lies in a GPU's memory and sequences can be attended to together.
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    #[allow(private_interfaces)] // for `attend_all` alone
    fn on_device(&mut self) -> Option<&mut device::DeviceLexicoCache> {
        None
    }

    /// Makes an empty cache one whose [`KvCache::state`] this was.
    ///
    /// # Errors
    /// Reason why the state is refused: it is of other settings or dictionaries, or contradicts itself. The cache
    /// cannot be used any further then.
    fn resume(&mut self, _state: &CacheState) -> std::result::Result<(), String> {
        Err("this method cannot be resumed".to_owned())
    }
}

/// All that a cache holds, in a form to keep.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheState {
    /// Small facts, among them the settings and dictionaries that it needs.
    pub facts: serde_json::Value,
    /// Everything else, in the order of [`KvCache::state`]: a name like `layers.0.keys.codes`, and bytes.
    pub blocks: Vec<(String, Vec<u8>)>,
}

/// Keys and values of a layer as attention takes them, and their bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decoded {
    /// `[kv_heads, positions, m]`
    pub keys: Vec<f32>,
    /// `[kv_heads, positions, m]`
    pub values: Vec<f32>,
    /// Bytes allocated for the keys, and for the values.
    pub bytes: [usize; 2],
}

impl Decoded {
    /// Adds the keys and values of a KV head.
    fn extend(&mut self, head: KeyValue<Vec<f32>>) {
        self.keys.extend(head.keys);
        self.values.extend(head.values);
    }
}

/// Bytes that a cache holds, by part. Dictionaries belong to the model and are not among them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Name of each part, and its bytes.
    pub parts: Vec<(&'static str, usize)>,
}

impl Footprint {
    /// Adds bytes of a part.
    fn add(&mut self, name: &'static str, bytes: usize) {
        match self.parts.iter_mut().find(|part| part.0 == name) {
            Some(part) => part.1 += bytes,
            None => self.parts.push((name, bytes)),
        }
    }

    /// Returns the bytes of all parts.
    pub fn total(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Queries, keys and values that a layer is given in a step, in f32.
pub(crate) struct Step {
    /// `[kv_heads, G, t, m]`
    pub(crate) queries: Vec<f32>,
    /// `[kv_heads, t, m]`
    pub(crate) keys: Vec<f32>,
    /// `[kv_heads, t, m]`
    pub(crate) values: Vec<f32>,
    shape: (usize, usize, usize),
}

impl Step {
    pub(crate) fn new(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        let numbers = |x: &Tensor| -> Result<Vec<f32>> {
            Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        };
        Ok(Self {
            queries: numbers(q)?,
            keys: numbers(k)?,
            values: numbers(v)?,
            shape: q.dims3()?,
        })
    }

    /// Returns the new keys and values of every KV head, `[t, m]`.
    pub(crate) fn heads(&self) -> impl Iterator<Item = KeyValue<&[f32]>> {
        let (_, t, m) = self.shape;
        let keys = self.keys.chunks_exact(t * m);
        let pairs = keys.zip(self.values.chunks_exact(t * m));
        pairs.map(|(keys, values)| KeyValue::new(keys, values))
    }

    /// Returns the number of new positions.
    pub(crate) fn positions(&self) -> usize {
        self.shape.1
    }

    /// Returns the queries of every KV head's group, `[G, t, m]`.
    pub(crate) fn queries(&self) -> impl Iterator<Item = &[f32]> {
        let (_, t, m) = self.shape;
        let heads = self.keys.len() / (t * m);
        self.queries.chunks_exact(self.queries.len() / heads)
    }

    /// Refuses keys and values of `layer` that are not finite; quantisation would make something else of them.
    pub(crate) fn check_finite(&self, layer: usize) -> Result<()> {
        let (_, t, m) = self.shape;
        for (part, numbers) in [("key", &self.keys), ("value", &self.values)] {
            if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
                return Err(Error::Coding {
                    layer,
                    part,
                    reason: ::lexico::Error::NotFinite { row: at / m % t },
                });
            }
        }
        Ok(())
    }

    /// Computes attention of every KV head over its `past` and the step's own positions.
    pub(crate) fn attend<'a, H>(
        &'a self,
        heads: &'a [H],
        window: Option<usize>,
        past: impl Fn(&'a H) -> Vec<Source<'a>>,
    ) -> Result<Tensor> {
        let (_, t, m) = self.shape;
        let sources = heads.iter().zip(self.heads());
        let sources = sources.map(|(head, new)| {
            let mut sources = past(head);
            sources.push(Source::Causal(new));
            sources
        });
        let sources: Vec<Vec<Source<'_>>> = sources.collect();
        let mut out = vec![0.0; self.queries.len()];
        let mut tasks = Head::split(&self.queries, &sources, &mut out);
        attend_heads(&mut tasks, m, t, window, &ModelThreads);
        Ok(Tensor::from_vec(out, self.shape, &Device::Cpu)?)
    }
}
