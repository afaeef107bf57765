use candle_core::Tensor;

use super::KvCache;
use crate::error::Result;

/// Some new tokens of one sequence, and the cache that holds what came before them.
pub struct Sequence<'a> {
    /// The new tokens; at least one.
    pub tokens: &'a [u32],
    /// The keys and values so far; the new ones are added.
    pub cache: &'a mut dyn KvCache,
}

/// Gives the caches of several sequences their new positions of `layer` and returns causal attention of all their
/// queries, `[tokens, heads * head_dim]` on the device of `q`.
///
/// `q` is `[heads, tokens, head_dim]`, rotated and unscaled; `k` and `v` are `[kv_heads, tokens, head_dim]`, `k`
/// rotated; the tokens of all sequences stand one after the other. Caches that a GPU can attend to together take one
/// launch for all.
///
/// # Errors
/// Those of [`KvCache::attend`].
pub(crate) fn attend_all(
    layer: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &mut [Sequence<'_>],
) -> Result<Tensor> {
    let (heads, tokens, m) = q.dims3()?;
    #[cfg(feature = "cuda")]
    if let Some(out) = super::device::decode_together(layer, q, k, v, sequences)? {
        return Ok(out.reshape((tokens, heads * m))?);
    }
    let mut start = 0;
    let mut outputs = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let t = sequence.tokens.len();
        let own = |x: &Tensor| x.narrow(1, start, t);
        let out = sequence.cache.attend(layer, &own(q)?, &own(k)?, &own(v)?)?;
        // Most caches lie in the processor's memory.
        let out = out.to_device(q.device())?;
        outputs.push(out.transpose(0, 1)?.reshape((t, heads * m))?);
        start += t;
    }
    debug_assert_eq!(start, tokens);
    Ok(Tensor::cat(&outputs, 0)?)
}
