//! Functions of the methods that keep some positions as they are and evict all others.

use ::lexico::KeyValue;

use super::CacheSpec;
use super::method::{CacheContext, Setting};
use super::stored::DenseHead;
use crate::config::Config;
use crate::error::Result;
use crate::threads::ModelThreads;

// Keys are rotated already, so that neither their place among the rows nor what is gone between them matters to
// attention.
impl DenseHead {
    /// Keeps the positions at `kept`, which ascend, of those held and then the new ones.
    pub(super) fn keep(&mut self, new: KeyValue<&[f32]>, kept: &[usize]) {
        let held = self.len();
        let (old, kept) = kept.split_at(kept.partition_point(|&i| i < held));
        for (rows, vectors) in self.rows.as_mut().zip(new) {
            let m = rows.head_dim();
            rows.keep(old);
            let new = kept.iter().flat_map(|i| &vectors[(i - held) * m..][..m]);
            rows.extend(&new.copied().collect::<Vec<f32>>());
        }
    }

    /// Bytes that a head is expected to allocate which takes `first` positions at once and `more` one by one.
    pub(super) fn expected_bytes(config: &Config, first: usize, more: usize) -> usize {
        // As rows grow: by a sixteenth, at least by four.
        let mut rows = first.max(4);
        while rows < first.saturating_add(more) {
            rows += 4.max(rows / 16);
        }
        rows * 2 * config.head_dim * 2
    }
}

/// Attention that the positions held and then the new ones of a KV head accumulate from the `newest` last of the step's
/// positions, summed over the queries of the group; `queries` `[G, t, m]`, `keys` `[t, m]`.
pub(super) fn accumulated_attention(
    held: &DenseHead,
    queries: &[f32],
    keys: &[f32],
    newest: usize,
) -> Vec<f32> {
    let m = held.rows.keys.head_dim();
    let t = keys.len() / m;
    let keys = [&held.rows.keys.to_f32(), keys].concat();
    ::lexico::attention::accumulated_attention(queries, m, t, newest.min(t), &keys, &ModelThreads)
}

/// Places of the `count` largest scores, ascending; of equal ones the first.
pub(super) fn largest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    if count < places.len() {
        let order = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
        places.select_nth_unstable_by(count, order);
        places.truncate(count);
        places.sort_unstable();
    }
    places
}

/// Refuses a model with a sliding window: what it hides follows from positions, which are not kept, and differs from
/// one new position to the next.
pub(super) fn refuse_sliding_window(
    spec: &CacheSpec,
    context: &CacheContext<'_>,
    option: &'static str,
) -> Result<()> {
    let Some(window) = context.config.window else {
        return Ok(());
    };
    let reason = format!(
        "the model {} sees {window} positions through a sliding window of its own, which this method does not know; \
         full, lexico and streaming-llm do",
        context.model
    );
    Err(spec.refused(option, reason))
}

/// Settings of an option that counts positions, for a budget of `max` positions to choose from, none below `min`: close
/// enough that little of it is left, few enough to try.
pub(super) fn descending(option: &'static str, max: usize, min: usize) -> Vec<Setting> {
    let counts = (min..=max.max(min)).rev().step_by((max / 256).max(1));
    counts
        .map(|count| vec![(option, count.to_string())])
        .collect()
}

#[cfg(test)]
pub(super) mod testing {
    use candle_core::{Device, Tensor};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::cache::KvCache;
    use crate::config::{Rotary, RotaryScaling};
    use crate::error::Error;

    pub(crate) fn config(layers: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Config {
        let mut config = crate::shape::config("mistral-7b").unwrap();
        config.layers = layers;
        config.heads = heads;
        config.kv_heads = kv_heads;
        config.head_dim = head_dim;
        config.window = None;
        config.rotary = Rotary {
            theta: 10_000.0,
            scaling: RotaryScaling::None,
        };
        config
    }

    pub(crate) fn context(config: &Config) -> CacheContext<'_> {
        CacheContext {
            model: "drawn",
            config,
            dictionaries: None,
            calibration: None,
            device: &candle_core::Device::Cpu,
        }
    }

    pub(crate) fn build(text: &str, config: &Config) -> Box<dyn KvCache> {
        let spec: CacheSpec = text.parse().unwrap();
        spec.build(&context(config)).unwrap()
    }

    /// Reason for which a spec is refused.
    pub(crate) fn refusal(text: &str, config: &Config) -> String {
        let built = text.parse::<CacheSpec>().unwrap().build(&context(config));
        let Err(error) = built else {
            panic!("{text} is not refused");
        };
        assert!(matches!(error, Error::OptionValue { .. }), "{error}");
        error.to_string()
    }

    pub(crate) fn tensor(numbers: Vec<f32>, heads: usize, t: usize) -> Tensor {
        let m = numbers.len() / heads / t;
        Tensor::from_vec(numbers, (heads, t, m), &Device::Cpu).unwrap()
    }

    /// Queries, keys and values of `t` positions from `first` on: drawn, but for the first number of each value,
    /// which is its position.
    pub(crate) fn drawn(config: &Config, first: usize, t: usize) -> [Tensor; 3] {
        let mut rng = ChaCha8Rng::seed_from_u64(first as u64);
        let m = config.head_dim;
        let mut draw = |heads: usize| -> Vec<f32> {
            let count = heads * t * m;
            (0..count).map(|_| rng.random_range(-2f32..2.0)).collect()
        };
        let (q, k, mut v) = (
            draw(config.heads),
            draw(config.kv_heads),
            draw(config.kv_heads),
        );
        for (row, value) in v.chunks_exact_mut(m).enumerate() {
            value[0] = (first + row % t) as f32;
        }
        [
            tensor(q, config.heads, t),
            tensor(k, config.kv_heads, t),
            tensor(v, config.kv_heads, t),
        ]
    }

    /// Feeds a step to every layer; the outputs.
    pub(crate) fn feed(cache: &mut dyn KvCache, config: &Config, t: usize) -> Vec<f32> {
        let [q, k, v] = drawn(config, cache.len(), t);
        let mut out = Vec::new();
        for layer in 0..config.layers {
            let attended = cache.attend(layer, &q, &k, &v).unwrap();
            out.extend(attended.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        out
    }

    impl DenseHead {
        /// The positions held, as [`drawn`] numbers them.
        pub(crate) fn positions(&self) -> Vec<usize> {
            let values = self.rows.values.to_f32();
            let firsts = values.chunks_exact(self.rows.values.head_dim());
            firsts.map(|value| value[0] as usize).collect()
        }
    }

    /// Steps of a session: a prompt, some tokens, and again.
    pub(crate) fn sessions() -> Vec<Vec<usize>> {
        let tokens = |prompt: usize, count: usize| {
            let mut steps = vec![prompt];
            steps.extend(vec![1; count]);
            steps
        };
        vec![
            tokens(1, 60),
            tokens(40, 30),
            tokens(90, 40),
            [tokens(50, 7), tokens(3, 9), tokens(60, 20)].concat(),
        ]
    }

    /// A cache with room for all is `full`, to the bit.
    pub(crate) fn assert_like_full(text: &str, config: &Config) {
        for steps in sessions() {
            let (mut cache, mut full) = (build(text, config), build("full", config));
            for t in steps {
                let out = feed(cache.as_mut(), config, t);
                assert_eq!(out, feed(full.as_mut(), config, t), "{text}");
            }
            assert_eq!(cache.len(), full.len());
        }
    }

    /// Asserts that a cache holds the bytes that it is expected to hold.
    pub(crate) fn assert_expected(text: &str, config: &Config) {
        let spec: CacheSpec = text.parse().unwrap();
        for (prompt, more) in [(1, 0), (30, 3), (90, 0), (90, 40), (300, 1), (20, 400)] {
            let mut cache = build(text, config);
            feed(cache.as_mut(), config, prompt);
            for _ in 0..more {
                feed(cache.as_mut(), config, 1);
            }
            let lengths = crate::cache::Lengths {
                prompt,
                end: prompt + more,
            };
            let expected = spec.expected_bytes(&context(config), lengths).unwrap();
            let held = cache.footprint().total() as f64;
            // Lists of pages count in caches as small as these.
            let lists = (2 * config.layers * config.kv_heads * 2 * size_of::<Vec<u8>>()) as f64;
            assert!(
                (expected - held).abs() <= 0.05 * held + lists,
                "{text}: {expected} for {held} after {lengths:?}"
            );
        }
    }

    /// A budget's setting is within it, and uses most of it.
    pub(crate) fn assert_within(text: &str, config: &Config) {
        let lengths = crate::cache::Lengths {
            prompt: 450,
            end: 500,
        };
        let spec: CacheSpec = text.parse().unwrap();
        for share in [0.2, 0.3, 0.5] {
            let bytes = share * config.fp16_cache_bytes(lengths.end) as f64;
            let budget = crate::cache::CacheBudget::Bytes(bytes);
            let spec = spec.within(budget, &[lengths], &context(config)).unwrap();
            let mut cache = spec.build(&context(config)).unwrap();
            feed(cache.as_mut(), config, lengths.prompt);
            (lengths.prompt..lengths.end).for_each(|_| drop(feed(cache.as_mut(), config, 1)));
            let used = cache.footprint().total() as f64 / bytes;
            assert!((0.85..1.02).contains(&used), "{spec}: {used} of {share}");
        }
    }

    /// A NaN or an infinity is an error that says where it is.
    pub(crate) fn assert_refuses_nan(text: &str, config: &Config) {
        for (part, t) in [(1, 5), (2, 5), (1, 1), (2, 1)] {
            let mut cache = build(text, config);
            feed(cache.as_mut(), config, 3);
            let mut step = drawn(config, 3, t);
            let mut numbers: Vec<f32> = step[part].flatten_all().unwrap().to_vec1().unwrap();
            numbers[1] = if t == 1 { f32::NAN } else { f32::INFINITY };
            step[part] = tensor(numbers, config.kv_heads, t);
            let [q, k, v] = &step;
            let error = cache.attend(0, q, k, v).unwrap_err();
            let name = ["query", "key", "value"][part];
            assert!(
                matches!(error, Error::Coding { part, layer: 0, .. } if part == name),
                "{error}"
            );
        }
    }

    #[test]
    fn the_largest_are_in_order_of_place() {
        let scores = [3.0, 1.0, 4.0, 1.0, 5.0, 1.0];
        assert_eq!(largest(&scores, 3), [0, 2, 4]);
        assert_eq!(largest(&scores, 4), [0, 1, 2, 4], "of equal ones the first");
        assert_eq!(largest(&scores, 0), [] as [usize; 0]);
        assert_eq!(largest(&scores, 9), [0, 1, 2, 3, 4, 5]);
        assert_eq!(
            largest(&[f32::NAN, 1.0], 1).len(),
            1,
            "a NaN is nothing to panic at"
        );
    }
}
