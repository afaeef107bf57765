use ::lexico::attention::{NumberType, Positions, Source};
use candle_core::Tensor;

use super::evict::descending;
use super::method::{Method, Values, option};
use super::stored::{DenseHead, Place, StoredCache, StoredLayer};
use super::{CacheContext, CacheSpec, Step};
use crate::config::Config;
use crate::error::Result;

pub(super) static METHOD: Method = Method {
    name: "streaming-llm",
    summary: "the first positions and the newest ones, numbered as they lie in the cache",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("sinks", Values::Count, "4").about("first positions, always kept"),
        option("window", Values::Count, "2000").about("newest positions kept"),
    ],
    build: |spec, context| {
        let settings = settings(spec, context)?;
        Ok(Box::new(cache(context.config, settings)))
    },
    bytes: |spec, context, lengths| {
        let capacity = settings(spec, context)?.capacity();
        let first = lengths.prompt.min(capacity);
        let more = lengths.end.min(capacity).saturating_sub(first);
        let held = DenseHead::expected_bytes(context.config, first, more);
        let head = held + size_of::<DenseHead>();
        Ok((context.config.layers * context.config.kv_heads * head) as f64)
    },
    settings: |_, context, budget| descending("window", budget.fp16_positions(context.config), 1),
};

fn settings(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Settings> {
    let settings = Settings {
        sinks: spec.number("sinks")?,
        window: spec.number("window")?,
    };
    if settings.window == 0 {
        let reason = "at least the newest position is kept";
        return Err(spec.refused("window", reason));
    }
    if let Some(model_window) = context.config.window
        && settings.capacity() >= model_window
    {
        let reason = format!(
            "the model {} sees {model_window} positions through a sliding window of its own: sinks and window \
             together must be fewer",
            context.model
        );
        return Err(spec.refused("window", reason));
    }
    Ok(settings)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Settings {
    /// First positions, which are always kept.
    sinks: usize,
    /// Newest positions.
    window: usize,
}

impl Settings {
    fn capacity(self) -> usize {
        self.sinks.saturating_add(self.window)
    }
}

/// The first positions, which attention falls back on, and the newest ones; in f16.
///
/// Xiao, Tian, Chen, Han, Lewis: *Efficient Streaming Language Models with Attention Sinks* (ICLR 2024). Positions
/// are counted within the cache: a query sees the newest positions at their distance, and the sinks as if they lay
/// right before those. The keys come rotated, so that those of the sinks are rotated on by the number of evicted
/// positions as they are read; rotations add up, so that this is what the authors compute. A step's own positions see
/// each other and all that is held; what is too much is evicted after it.
struct Layer {
    heads: Vec<DenseHead>,
    /// Positions that are gone, between the sinks and the newest.
    evicted: usize,
}

/// Settings and frequencies, which all layers use.
struct Shared {
    settings: Settings,
    /// Frequencies of the rotary embedding, `[m / 2]`.
    frequencies: Vec<f32>,
}

/// Positions held of a KV head, the sinks moved forward.
struct Shifted<'a> {
    held: &'a DenseHead,
    sinks: usize,
    /// Cosine and sine of how far each pair of numbers turns; empty where nothing is evicted yet.
    turns: &'a [(f32, f32)],
}

impl Positions for Shifted<'_> {
    fn len(&self) -> usize {
        self.held.len()
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let start = keys.len();
        self.held.rows.keys.read(first, count, keys);
        self.held.rows.values.read(first, count, values);
        let half = self.turns.len();
        let sinks = self.sinks.saturating_sub(first).min(count);
        for key in keys[start..].chunks_exact_mut(2 * half).take(sinks) {
            let (left, right) = key.split_at_mut(half);
            for ((x, y), (cos, sin)) in left.iter_mut().zip(right).zip(self.turns) {
                (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
            }
        }
    }
}

impl<'a> Shifted<'a> {
    fn source(&'a self) -> Source<'a> {
        if self.turns.is_empty() {
            self.held.source()
        } else {
            Source::Decoded(self)
        }
    }
}

fn cache(config: &Config, settings: Settings) -> StoredCache<Layer> {
    let shared = Shared {
        settings,
        frequencies: config.rotary.frequencies(config.head_dim),
    };
    let head = |_| DenseHead::new(config.head_dim, NumberType::F16);
    StoredCache::with_layers(config, shared, |_| Layer {
        heads: (0..config.kv_heads).map(head).collect(),
        evicted: 0,
    })
}

impl Shared {
    /// Returns the cosine and sine of how far a shift by so many positions turns each pair of numbers.
    fn turns(&self, positions: usize) -> Vec<(f32, f32)> {
        if positions == 0 || self.settings.sinks == 0 {
            return Vec::new();
        }
        let turn = |&frequency: &f32| {
            let angle = positions as f64 * f64::from(frequency);
            (angle.cos() as f32, angle.sin() as f32)
        };
        self.frequencies.iter().map(turn).collect()
    }
}

impl StoredLayer for Layer {
    type Shared = Shared;

    fn attend(&mut self, shared: &mut Shared, step: &Step, at: Place) -> Result<Tensor> {
        let Settings { sinks, window } = shared.settings;
        let turns = shared.turns(self.evicted);
        let shifted = |held| Shifted {
            held,
            sinks,
            turns: &turns,
        };
        let shifted: Vec<Shifted<'_>> = self.heads.iter().map(shifted).collect();
        let out = step.attend(&shifted, at.sliding_window, |head| vec![head.source()])?;
        let (_, t, _) = step.shape;
        let all = self.heads.first().map_or(0, DenseHead::len) + t;
        let capacity = shared.settings.capacity();
        let kept: Option<Vec<usize>> =
            (all > capacity).then(|| (0..sinks).chain(all - window..all).collect());
        for (held, new) in self.heads.iter_mut().zip(step.heads()) {
            match &kept {
                Some(kept) => held.keep(new, kept),
                None => held.extend(new),
            }
        }
        self.evicted += all.saturating_sub(capacity);
        Ok(out)
    }

    fn bytes(&self) -> Vec<(&'static str, usize)> {
        let kept = self.heads.iter().flat_map(DenseHead::bytes);
        let bookkeeping = self.heads.len() * size_of::<DenseHead>();
        vec![("kept", kept.sum()), ("bookkeeping", bookkeeping)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::*;
    use super::*;
    use crate::cache::KvCache;

    fn cache(config: &Config, sinks: usize, window: usize) -> StoredCache<Layer> {
        super::cache(config, Settings { sinks, window })
    }

    /// Keeps what the authors' `StartRecentKVCache(2, 3)` keeps: of 6 positions 0, 1 and 3, 4, 5; then one newer each step.
    #[test]
    fn the_sinks_and_the_newest_are_kept() {
        let config = config(2, 4, 2, 8);
        let mut cache = cache(&config, 2, 3);
        for (t, expected) in [
            (4, vec![0, 1, 2, 3]),
            (2, vec![0, 1, 3, 4, 5]),
            (1, vec![0, 1, 4, 5, 6]),
            (1, vec![0, 1, 5, 6, 7]),
            (9, vec![0, 1, 14, 15, 16]),
        ] {
            feed(&mut cache, &config, t);
            for held in cache.layers.iter().flat_map(|layer| &layer.heads) {
                assert_eq!(held.positions(), expected);
            }
        }
        assert_eq!(cache.len(), 17);
    }

    #[test]
    fn sinks_and_window_are_always_there() {
        let config = config(1, 2, 1, 8);
        for (sinks, window) in [(0, 1), (0, 20), (4, 1), (5, 30), (70, 10)] {
            for steps in sessions() {
                let mut cache = cache(&config, sinks, window);
                for t in steps {
                    feed(&mut cache, &config, t);
                    let (held, all) = (cache.layers[0].heads[0].positions(), cache.len());
                    let recent = all.saturating_sub(window)..all;
                    let expected: Vec<usize> = (0..all)
                        .filter(|i| *i < sinks || recent.contains(i))
                        .collect();
                    assert_eq!(held, expected, "{sinks} sinks, window {window}");
                }
            }
        }
    }

    /// Rotates a vector to a position, halves paired.
    fn rotated(x: &[f32], position: usize, frequencies: &[f32]) -> Vec<f64> {
        let half = frequencies.len();
        let number = |i: usize| {
            let (sin, cos) = (position as f64 * f64::from(frequencies[i % half])).sin_cos();
            let (a, b) = (f64::from(x[i % half]), f64::from(x[i % half + half]));
            if i < half {
                a * cos - b * sin
            } else {
                a * sin + b * cos
            }
        };
        (0..2 * half).map(number).collect()
    }

    /// The authors rotate unrotated keys at their places in the cache, and the queries at the places that follow.
    #[test]
    fn sinks_lie_right_before_the_newest() {
        let (m, sinks, window) = (16, 3, 5);
        let config = config(1, 1, 1, m);
        let frequencies = config.rotary.frequencies(m);
        let mut cache = cache(&config, sinks, window);
        let mut plain_keys: Vec<Vec<f32>> = Vec::new();
        let mut plain_values: Vec<Vec<f32>> = Vec::new();
        for t in [6, 1, 1, 40, 1, 4, 1, 1] {
            let first = cache.len();
            let drawn = drawn(&config, first, t);
            let rows = |x: &Tensor| x.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
            let [plain_queries, keys, values] = [rows(&drawn[0]), rows(&drawn[1]), rows(&drawn[2])];
            let at_true_positions = |rows: &[Vec<f32>]| {
                let rows = rows.iter().enumerate();
                let rotated = rows.flat_map(|(i, x)| rotated(x, first + i, &frequencies));
                tensor(rotated.map(|x| x as f32).collect(), 1, t)
            };
            let out = cache
                .attend(
                    0,
                    &at_true_positions(&plain_queries),
                    &at_true_positions(&keys),
                    &drawn[2],
                )
                .unwrap();
            let held = plain_keys.len();
            plain_keys.extend(keys);
            plain_values.extend(values);
            for (i, (out, query)) in rows(&out).iter().zip(&plain_queries).enumerate() {
                let query = rotated(query, held + i, &frequencies);
                let weights: Vec<f64> = (0..=held + i)
                    .map(|place| {
                        let key = rotated(&plain_keys[place], place, &frequencies);
                        let dot: f64 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                        (dot / (m as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for j in 1..m {
                    let values = plain_values.iter().map(|value| f64::from(value[j]));
                    let want: f64 = weights.iter().zip(values).map(|(w, v)| w * v).sum();
                    let want = want / sum;
                    // Held vectors are in f16.
                    assert!(
                        (f64::from(out[j]) - want).abs() < 5e-3,
                        "{} for {want}, {held} held",
                        out[j]
                    );
                }
            }
            let all = plain_keys.len();
            if all > sinks + window {
                for rows in [&mut plain_keys, &mut plain_values] {
                    rows.drain(sinks..all - window);
                }
            }
        }
    }

    #[test]
    fn with_room_for_all_it_is_the_full_cache() {
        assert_like_full("streaming-llm", &config(2, 4, 2, 8));
        let mut config = config(2, 4, 2, 8);
        config.window = Some(2500);
        assert_like_full("streaming-llm", &config);
    }

    #[test]
    fn bytes_are_as_expected() {
        let config = config(3, 4, 2, 16);
        for text in [
            "streaming-llm:window=30",
            "streaming-llm:sinks=0,window=200",
        ] {
            assert_expected(text, &config);
        }
        assert_within("streaming-llm", &config);
        assert_within("streaming-llm:sinks=9", &config);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let mut config = config(1, 1, 1, 8);
        assert!(refusal("streaming-llm:window=0", &config).contains("at least"));
        config.window = Some(64);
        assert!(refusal("streaming-llm:window=60", &config).contains("64 positions"));
        let huge = format!("streaming-llm:window={0},sinks={0}", usize::MAX);
        assert!(refusal(&huge, &config).contains("64 positions"));
        build("streaming-llm:window=59", &config);
        assert_refuses_nan("streaming-llm:window=40", &config);
    }
}
