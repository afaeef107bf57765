//! KV caches: the trait, and one file a method. A method is named `NAME[:key=value,…]`.

mod full;
mod lexico;
mod spec;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

pub use full::FullCache;
pub use lexico::{LexicoCache, LexicoSettings};
pub use spec::{CacheContext, CacheSpec, METHODS, Method, MethodOption, Values};

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

    /// Positions taken so far: the next one's number. A model with a sliding window no longer
    /// needs the oldest of them, and they may be gone.
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

/// Of `held` positions, how many the next query no longer sees through a sliding window; `None`
/// until they are enough to be worth moving the rest.
fn outside_window(window: Option<usize>, held: usize) -> Option<usize> {
    const WORTH: usize = 64;
    let outside = held.checked_sub(window?.saturating_sub(1))?;
    (outside >= WORTH).then_some(outside)
}

/// What one KV head is given in a step, in f32.
struct HeadStep<'a> {
    /// `[G, t, m]`
    queries: &'a [f32],
    /// `[t, m]`
    keys: &'a [f32],
    /// `[t, m]`
    values: &'a [f32],
    t: usize,
    /// Where its attention goes, `[G, t, m]`.
    out: &'a mut [f32],
}

/// Runs `attend` for every KV head of a layer, the heads spread over the rayon pool.
fn attend_heads<H: Send>(
    heads: &mut [H],
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attend: impl Fn(&mut H, HeadStep<'_>) -> Result<()> + Sync,
) -> Result<Tensor> {
    let (queries, keys, values) = (numbers(q)?, numbers(k)?, numbers(v)?);
    let (_, t, m) = q.dims3()?;
    let group = queries.len() / heads.len();
    let mut out = vec![0.0; queries.len()];
    (
        heads,
        queries.par_chunks_exact(group),
        keys.par_chunks_exact(t * m),
        values.par_chunks_exact(t * m),
        out.par_chunks_exact_mut(group),
    )
        .into_par_iter()
        .try_for_each(|(head, queries, keys, values, out)| {
            let step = HeadStep {
                queries,
                keys,
                values,
                t,
                out,
            };
            attend(head, step)
        })?;
    Ok(Tensor::from_vec(out, q.dims3()?, &Device::Cpu)?)
}

fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
