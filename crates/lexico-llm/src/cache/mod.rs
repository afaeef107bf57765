//! KV caches: the trait, and one file a method. A method is named `NAME[:key=value,…]`.

mod full;
mod lexico;
mod spec;

use candle_core::{DType, Device, Tensor};

pub use full::FullCache;
pub use lexico::{LexicoCache, LexicoSettings};
pub use spec::{CacheContext, CacheSpec, METHODS, Method, MethodOption};

use crate::error::Result;

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

    /// Positions held.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes allocated now, by part.
    fn footprint(&self) -> Footprint;
}

/// Bytes that a cache holds, by part. Dictionaries belong to the model and are not among them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Name of each part, and its bytes.
    pub parts: Vec<(&'static str, usize)>,
}

impl Footprint {
    /// Bytes of all parts.
    pub fn total(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// The numbers of a `[heads, t, m]` tensor, and `t`.
fn numbers(x: &Tensor) -> Result<(Vec<f32>, usize)> {
    let (_, t, _) = x.dims3()?;
    let flat = x.to_dtype(DType::F32)?.flatten_all()?;
    Ok((flat.to_vec1()?, t))
}

fn tensor(numbers: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(numbers, like.dims3()?, &Device::Cpu)?)
}
