use ::lexico::KeyValue;
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::cache::{Decoded, Footprint, KvCache};
use crate::config::Config;
use crate::error::Result;

/// Positions that a buffer has room for at first.
const ROOM: usize = 256;
/// Scores that are held at once: a long prompt's would outgrow its cache.
const MAX_SCORES: usize = 1 << 26;

/// Causal attention of the newest `t` positions over all, by matrix products: `q` `[heads, t, m]`, unscaled, `k` and `v`
/// `[kv_heads, n, m]`, the newest last; `[heads, t, m]` in f32. A query sees `window` positions, its own among them. Products
/// are those of `k`'s numbers.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<usize>) -> Result<Tensor> {
    let (heads, t, m) = q.dims3()?;
    let (kv_heads, n, _) = k.dims3()?;
    let group = heads / kv_heads;
    let q = (q * (1.0 / (m as f64).sqrt()))?;
    let q = q.to_dtype(k.dtype())?.contiguous()?;
    let q = q.reshape((kv_heads, group, t, m))?;
    let at_once = (MAX_SCORES / (heads * n)).clamp(1, t);
    let mut outputs = Vec::with_capacity(t.div_ceil(at_once));
    for first in (0..t).step_by(at_once) {
        let rows = at_once.min(t - first);
        // What the last of these rows sees, and what the first does.
        let end = n - t + first + rows;
        let start = window.map_or(0, |w| (end - rows + 1).saturating_sub(w));
        let seen = end - start;
        let own = q.narrow(2, first, rows)?.contiguous()?;
        let own = own.reshape((kv_heads, group * rows, m))?;
        let keys = k.narrow(1, start, seen)?.transpose(1, 2)?;
        let mut scores = own.matmul(&keys)?.to_dtype(DType::F32)?;
        if rows > 1 || window.is_some() {
            let shape = (kv_heads, group, rows, seen);
            let hidden = hidden(end - rows, rows, start, seen, window, q.device())?;
            let nothing = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(shape)?;
            let masked = hidden
                .broadcast_as(shape)?
                .where_cond(&nothing, &scores.reshape(shape)?)?;
            scores = masked.reshape((kv_heads, group * rows, seen))?;
        }
        let weights = softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
        let out = weights.matmul(&v.narrow(1, start, seen)?)?;
        outputs.push(out.reshape((kv_heads, group, rows, m))?);
    }
    let out = Tensor::cat(&outputs, 2)?.to_dtype(DType::F32)?;
    Ok(out.reshape((heads, t, m))?)
}

/// Which positions, `seen` from `start` on, the query at each of `rows` positions from `first` on does not see: 1 or 0,
/// `[rows, seen]`.
fn hidden(
    first: usize,
    rows: usize,
    start: usize,
    seen: usize,
    window: Option<usize>,
    device: &Device,
) -> Result<Tensor> {
    let numbers = |first: usize, count: usize| {
        // Whole numbers that f32 has.
        Tensor::arange(first as f32, (first + count) as f32, device)
    };
    let queries = numbers(first, rows)?.unsqueeze(1)?;
    let keys = numbers(start, seen)?.unsqueeze(0)?;
    let later = keys.broadcast_gt(&queries)?;
    let Some(window) = window else {
        return Ok(later);
    };
    let keys = (keys + window as f64)?;
    let left = keys.broadcast_le(&queries)?;
    Ok(later.maximum(&left)?)
}

/// The uncompressed cache in a device's memory.
pub(crate) struct DeviceFullCache {
    layers: Vec<Option<Layer>>,
    dtype: DType,
    window: Option<usize>,
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
}

/// Keys and values `[kv_heads, room, m]`, of which the first `held` are there.
struct Layer {
    rows: KeyValue<Tensor>,
    held: usize,
}

impl DeviceFullCache {
    /// An empty cache for a model of this shape.
    pub(crate) fn new(config: &Config, dtype: DType) -> Self {
        Self {
            layers: (0..config.layers).map(|_| None).collect(),
            dtype,
            window: config.window,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            positions: 0,
        }
    }
}

impl Layer {
    /// Keys and values that are held.
    fn all(&self) -> Result<KeyValue<Tensor>> {
        let rows = self.rows.as_ref();
        Ok(rows.try_map(|rows| rows.narrow(1, 0, self.held))?)
    }

    /// Makes room for `count` positions more, giving up those that no further query sees.
    fn reserve(&mut self, count: usize, window: Option<usize>) -> Result<()> {
        let room = self.rows.keys.dim(1)?;
        if self.held + count <= room {
            return Ok(());
        }
        let kept = window.map_or(self.held, |window| self.held.min(window.saturating_sub(1)));
        let dropped = self.held - kept;
        // Copied seldom, and little of it empty.
        let room = (kept + count + kept / 8).next_multiple_of(ROOM);
        for rows in self.rows.as_mut() {
            let (heads, _, m) = rows.dims3()?;
            let new = Tensor::zeros((heads, room, m), rows.dtype(), rows.device())?;
            if kept > 0 {
                new.slice_set(&rows.narrow(1, dropped, kept)?.contiguous()?, 1, 0)?;
            }
            *rows = new;
        }
        self.held = kept;
        Ok(())
    }
}

impl KvCache for DeviceFullCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let t = k.dim(1)?;
        if layer + 1 == self.layers.len() {
            self.positions += t;
        }
        let window = self.window;
        let (heads, m, dtype) = (self.kv_heads, self.head_dim, self.dtype);
        let layer = match &mut self.layers[layer] {
            Some(layer) => layer,
            empty => {
                let rows = || Tensor::zeros((heads, ROOM, m), dtype, k.device());
                let rows = KeyValue::new(rows()?, rows()?);
                empty.insert(Layer { rows, held: 0 })
            }
        };
        layer.reserve(t, window)?;
        for (rows, new) in layer.rows.as_ref().zip(KeyValue::new(k, v)) {
            rows.slice_set(&new.to_dtype(dtype)?.contiguous()?, 1, layer.held)?;
        }
        layer.held += t;
        let KeyValue { keys, values } = layer.all()?;
        attend(q, &keys, &values, window)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let Some(layer) = &self.layers[layer] else {
            return Ok(Some(Decoded::default()));
        };
        let numbers = |rows: Tensor| rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
        let KeyValue { keys, values } = layer.all()?.try_map(numbers)?;
        Ok(Some(Decoded {
            keys,
            values,
            bytes: [&layer.rows.keys, &layer.rows.values].map(bytes),
        }))
    }

    fn footprint(&self) -> Footprint {
        let layers = self.layers.iter().flatten();
        let dense = layers
            .flat_map(|layer| layer.rows.as_ref().map(bytes))
            .sum();
        let bookkeeping = self.layers.len() * size_of::<Option<Layer>>();
        Footprint {
            parts: vec![("dense", dense), ("bookkeeping", bookkeeping)],
        }
    }
}

fn bytes(rows: &Tensor) -> usize {
    rows.elem_count() * rows.dtype().size_in_bytes()
}

#[cfg(test)]
mod tests {
    use ::lexico::attention::NumberType;
    use candle_core::D;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::cache::FullCache;

    /// Tensors on the processor serve as those of a device would.
    #[test]
    fn what_a_device_holds_is_what_the_processor_does() {
        let config = crate::Model::tiny().unwrap().decoder.config().clone();
        let config = Config {
            heads: 6,
            kv_heads: 2,
            head_dim: 16,
            layers: 2,
            ..config
        };
        for window in [None, Some(1), Some(40), Some(300)] {
            let config = Config {
                window,
                ..config.clone()
            };
            let mut on_device = DeviceFullCache::new(&config, DType::F32);
            let mut own = FullCache::new(&config, NumberType::F32);
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            for t in [5, 1, 1, 300, 1, 7, 260, 1] {
                for layer in 0..2 {
                    let mut drawn = |heads: usize| {
                        let count = heads * t * 16;
                        let numbers: Vec<f32> =
                            (0..count).map(|_| rng.random_range(-2f32..2.0)).collect();
                        Tensor::from_vec(numbers, (heads, t, 16), &Device::Cpu).unwrap()
                    };
                    let (q, k, v) = (drawn(6), drawn(2), drawn(2));
                    let found = on_device.attend(layer, &q, &k, &v).unwrap();
                    let wanted = own.attend(layer, &q, &k, &v).unwrap();
                    assert_eq!(found.dims(), wanted.dims());
                    let difference = (found - wanted).unwrap().abs().unwrap();
                    let most = difference.max(D::Minus1).unwrap();
                    let most: Vec<f32> = most.flatten_all().unwrap().to_vec1().unwrap();
                    assert!(most.iter().all(|d| *d < 1e-4), "{window:?}, {t}: {most:?}");
                }
                assert_eq!(on_device.len(), own.len());
            }
            if window.is_none() {
                let [found, wanted] =
                    [on_device.decoded(1), own.decoded(1)].map(|d| d.unwrap().unwrap());
                assert_eq!((found.keys, found.values), (wanted.keys, wanted.values));
                assert!(on_device.footprint().total() >= own.footprint().parts[0].1);
            }
        }
    }
}
