use ::lexico::KeyValue;
use ::lexico::attention::{NumberType, Source};

use super::evict::{accumulated_attention, descending, largest, refuse_sliding_window};
use super::method::{Budget, Method, Setting, Values, option};
use super::stored::{DenseHead, NewPositions, StoredCache, StoredHead};
use super::{CacheContext, CacheSpec, Lengths, pyramidkv};
use crate::config::Config;
use crate::error::Result;

// The defaults are those of the authors' experiments on LongBench.
pub(super) static METHOD: Method = Method {
    name: "snapkv",
    summary: "the prompt's positions that its end attends to most, and all that is generated",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("capacity", Values::Count, "1024")
            .about("positions kept of the prompt, the window's among them"),
        option("window", Values::Count, "32")
            .about("observation window: last positions of the prompt, whose attention decides"),
        option("kernel", Values::Count, "7")
            .about("neighbouring positions that are scored together"),
        option("pooling", POOLING, "max").about("how neighbours are scored"),
    ],
    build: |spec, context| {
        let settings = settings(spec, context, None)?;
        Ok(Box::new(cache(context.config, settings)))
    },
    bytes: |spec, context, lengths| {
        Ok(settings(spec, context, None)?.bytes(context.config, lengths))
    },
    settings: |_, context, budget| settings_within(context, budget),
};

/// The largest kernel: pooling takes as many steps a position.
const MAX_KERNEL: usize = 255;

pub(super) const POOLING: Values = Values::OneOf(&["max", "average"]);

pub(super) fn settings(
    spec: &CacheSpec,
    context: &CacheContext<'_>,
    beta: Option<usize>,
) -> Result<SnapKvSettings> {
    let settings = SnapKvSettings {
        capacity: spec.number("capacity")?,
        window: spec.number("window")?,
        kernel: spec.number("kernel")?,
        average: spec.text("pooling") == "average",
        beta,
        layers: context.config.layers,
    };
    if settings.window == 0 {
        let reason = "the attention of at least the prompt's last position is needed";
        return Err(spec.refused("window", reason));
    }
    if settings.capacity <= settings.window {
        let reason = format!(
            "the window's {} positions are among these; a larger capacity or a smaller window leaves room for others",
            settings.window
        );
        return Err(spec.refused("capacity", reason));
    }
    if settings.kernel.is_multiple_of(2) || settings.kernel > MAX_KERNEL {
        let reason = format!(
            "it must be odd, so that a position is in the middle, and at most {MAX_KERNEL}"
        );
        return Err(spec.refused("kernel", reason));
    }
    refuse_sliding_window(spec, context, "capacity")?;
    Ok(settings)
}

/// Capacities that a budget may choose, with an observation window of 32 or, where that is smaller, a quarter of the budget.
pub(super) fn settings_within(context: &CacheContext<'_>, budget: Budget) -> Vec<Setting> {
    let max = budget.fp16_positions(context.config);
    let window = (max / 4).clamp(8, 32);
    let mut settings = descending("capacity", max, window + 1);
    for setting in &mut settings {
        setting.push(("window", window.to_string()));
    }
    settings
}

/// Settings of SnapKV and of PyramidKV.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SnapKvSettings {
    /// Positions kept of a prompt in a layer, on average.
    pub(super) capacity: usize,
    /// Positions of the observation window, the last ones, kept: their queries decide about the others.
    pub(super) window: usize,
    /// Neighbouring scores that are pooled; odd.
    pub(super) kernel: usize,
    /// True where the mean of neighbours is taken, rather than the largest.
    pub(super) average: bool,
    /// PyramidKV's β, by which the last layer keeps less than the mean; all layers keep the same where there is none.
    pub(super) beta: Option<usize>,
    /// Layers of the model.
    pub(super) layers: usize,
}

impl SnapKvSettings {
    /// Number of `positions` that a layer keeps when a prompt is read.
    fn kept(&self, layer: usize, positions: usize) -> usize {
        if positions <= self.capacity {
            return positions;
        }
        let chosen = match self.beta {
            None => self.capacity - self.window,
            Some(beta) => pyramidkv::chosen(self, beta, layer, positions),
        };
        self.window + chosen
    }

    pub(super) fn bytes(&self, config: &Config, lengths: Lengths) -> f64 {
        let generated = lengths.end.saturating_sub(lengths.prompt);
        let layers = (0..config.layers).map(|layer| {
            let kept = self.kept(layer, lengths.prompt);
            DenseHead::expected_bytes(config, kept, generated) + size_of::<Head>()
        });
        (layers.sum::<usize>() * config.kv_heads) as f64
    }

    /// The positions that are kept of those held and the new ones, by the attention that they have accumulated from the newest.
    fn choose(&self, accumulated_attention: &[f32], count: usize) -> Vec<usize> {
        let (past, _) = accumulated_attention.split_at(accumulated_attention.len() - self.window);
        let mut kept = largest(&self.pooled(past), count - self.window);
        kept.extend(past.len()..accumulated_attention.len());
        kept
    }

    /// Each score pooled with its neighbours; beyond the ends lie zeros.
    fn pooled(&self, scores: &[f32]) -> Vec<f32> {
        let half = self.kernel / 2;
        let pool = |i: usize| {
            let end = scores.len().min(i + half + 1);
            let scores = &scores[i.saturating_sub(half)..end];
            if self.average {
                scores.iter().sum::<f32>() / self.kernel as f32
            } else {
                scores.iter().copied().fold(0.0, f32::max)
            }
        };
        (0..scores.len()).map(pool).collect()
    }
}

/// The positions of a prompt that its last ones attend to most, the last ones themselves, and all that follow; in f16.
///
/// Li, Huang, Yang, et al.: *SnapKV: LLM Knows What You are Looking for Before Generation* (NeurIPS 2024); with a
/// pyramid of capacities Cai, Zhang, Gao, et al.: *PyramidKV* (2024). A prompt attends in full; then every KV head
/// sums the attention that each position accumulates from the queries of this observation window, pools it with its neighbours', and
/// keeps the positions with most of it. Generated positions are all kept.
///
/// Two things the authors leave open. They hold keys and values for each query head; here they are held once a group,
/// chosen by the mean over the group's queries. And a further prompt, several positions at once on a cache that holds
/// some, is treated as a prompt of all that is held and all that is new; its observation window holds no more queries than it has.
pub(super) struct Head(pub(super) DenseHead);

pub(super) fn cache(config: &Config, settings: SnapKvSettings) -> StoredCache<Vec<Head>> {
    let head = |_| Head(DenseHead::new(config.head_dim, NumberType::F16));
    StoredCache::with_heads(config, settings, head)
}

impl StoredHead for Head {
    type Shared = SnapKvSettings;

    fn len(&self) -> usize {
        self.0.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![self.0.source()]
    }

    fn take(&mut self, settings: &SnapKvSettings, new: NewPositions<'_>) {
        let (held, vectors) = (&mut self.0, new.vectors);
        let t = vectors.keys.len() / held.rows.keys.head_dim();
        let all = held.len() + t;
        let count = settings.kept(new.layer, all);
        if t == 1 || count == all {
            held.extend(vectors);
            return;
        }
        let (keys, window) = (vectors.keys, settings.window);
        let attention = accumulated_attention(held, new.queries, keys, window);
        held.keep(vectors, &settings.choose(&attention, count));
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        vec![("kept", self.0.bytes())]
    }
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::*;
    use super::*;
    use crate::cache::KvCache;

    fn settings(capacity: usize, window: usize, kernel: usize, average: bool) -> SnapKvSettings {
        SnapKvSettings {
            capacity,
            window,
            kernel,
            average,
            beta: None,
            layers: 2,
        }
    }

    /// Positions kept of a prompt of 10 by one KV head with a group of two, window 2: the first query head attends in
    /// proportion to `first`, the second to `second`.
    fn kept(settings: SnapKvSettings, first: [f32; 10], second: [f32; 10]) -> Vec<usize> {
        let config = config(1, 2, 1, 2);
        let mut cache = super::cache(&config, settings);
        let unit = std::f32::consts::SQRT_2;
        let keys = first
            .iter()
            .zip(&second)
            .flat_map(|(a, b)| [unit * a.ln(), unit * b.ln()]);
        let queries = [[1.0, 0.0].repeat(10), [0.0, 1.0].repeat(10)].concat();
        let values = (0..10).flat_map(|i| [i as f32, 0.0]);
        let q = tensor(queries, 2, 10);
        let (k, v) = (
            tensor(keys.collect(), 1, 10),
            tensor(values.collect(), 1, 10),
        );
        cache.attend(0, &q, &k, &v).unwrap();
        cache.layers[0][0].0.positions()
    }

    /// Keeps what the authors' `update_kv` keeps. Both queries of the observation window, positions 8 and 9, weigh positions 0 to 7 in
    /// proportion to the numbers given, and those before the window that score highest are kept beside it.
    #[test]
    fn what_the_window_attends_to_is_kept() {
        let flat = [1.0; 10];
        let one = [1.0, 1.0, 8.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 1.0];
        // Without pooling: 8, 4, and the first of many alike.
        assert_eq!(kept(settings(5, 2, 1, false), one, one), [0, 2, 5, 8, 9]);
        // The largest of three: 1 8 8 8 4 4 4 1.
        assert_eq!(kept(settings(5, 2, 3, false), one, one), [1, 2, 3, 8, 9]);
        assert_eq!(
            kept(settings(7, 2, 3, false), one, one),
            [1, 2, 3, 4, 5, 8, 9]
        );
        // The mean of three, zeros beyond the ends: 2 10 10 10 6 6 6 2, over 3.
        assert_eq!(kept(settings(5, 2, 3, true), one, one), [1, 2, 3, 8, 9]);
        // The ends lose by those zeros: 5 6 3 3 3 3 6 5 for 4 1 … 1 4; of the largest 4 4 1 1 1 1 4 4.
        let ends = [4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 1.0, 1.0];
        assert_eq!(kept(settings(4, 2, 3, true), ends, ends), [1, 6, 8, 9]);
        assert_eq!(kept(settings(4, 2, 3, false), ends, ends), [0, 1, 8, 9]);
        // A position that only one query head of the group wants; one that both want somewhat.
        let other = [1.0, 1.0, 1.0, 1.0, 5.0, 4.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(kept(settings(4, 2, 1, false), one, flat), [2, 5, 8, 9]);
        assert_eq!(kept(settings(3, 2, 1, false), one, flat), [2, 8, 9]);
        assert_eq!(kept(settings(4, 2, 1, false), one, other), [2, 5, 8, 9]);
    }

    /// The attention that older queries pay does not count.
    #[test]
    fn only_the_window_decides() {
        let config = config(1, 1, 1, 2);
        let mut cache = super::cache(&config, settings(3, 1, 1, false));
        // Queries 0 to 4 look for position 0, the last one for positions 2 and 3.
        let queries = [[9.0, 0.0].repeat(5), vec![0.0, 9.0]].concat();
        let keys = vec![1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        let values: Vec<f32> = (0..6).flat_map(|i| [i as f32, 0.0]).collect();
        let (q, k, v) = (
            tensor(queries, 1, 6),
            tensor(keys, 1, 6),
            tensor(values, 1, 6),
        );
        cache.attend(0, &q, &k, &v).unwrap();
        assert_eq!(cache.layers[0][0].0.positions(), [2, 3, 5]);
    }

    #[test]
    fn capacity_and_window_are_kept_to() {
        let config = config(2, 4, 2, 8);
        for (capacity, window) in [(2, 1), (9, 8), (33, 7), (64, 20)] {
            for steps in sessions() {
                let mut cache = super::cache(&config, settings(capacity, window, 1, false));
                let mut expected = 0;
                for t in steps {
                    feed(&mut cache, &config, t);
                    expected += t;
                    if t > 1 {
                        expected = expected.min(capacity);
                    }
                    let all = cache.len();
                    for held in cache.layers.iter().flatten() {
                        let held = held.0.positions();
                        assert_eq!(held.len(), expected);
                        assert!(held.is_sorted_by(|a, b| a < b), "{held:?}");
                        let newest: Vec<usize> = (all.saturating_sub(window)..all).collect();
                        assert!(held.ends_with(&newest), "{held:?} of {all}");
                    }
                    // Memory is given back: a later prompt leaves no more than the first.
                    let most = 4 * DenseHead::expected_bytes(
                        &config,
                        expected + expected.div_ceil(16) + 4,
                        0,
                    );
                    let bytes = cache.footprint().total();
                    assert!(t == 1 || bytes <= most + 4 * size_of::<Head>(), "{bytes}");
                }
            }
        }
    }

    #[test]
    fn with_room_for_all_it_is_the_full_cache() {
        assert_like_full("snapkv", &config(2, 4, 2, 8));
        assert_like_full("snapkv:capacity=129,window=128", &config(1, 2, 2, 8));
    }

    #[test]
    fn bytes_are_as_expected() {
        let config = config(3, 4, 2, 16);
        assert_expected("snapkv", &config);
        assert_expected("snapkv:capacity=50,window=8", &config);
        assert_within("snapkv", &config);
        assert_within("snapkv:window=40,kernel=5", &config);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let mut config = config(1, 1, 1, 8);
        for (text, words) in [
            ("snapkv:window=0", "last position"),
            ("snapkv:capacity=32", "larger capacity"),
            ("snapkv:capacity=0", "larger capacity"),
            ("snapkv:kernel=0", "odd"),
            ("snapkv:kernel=6", "odd"),
            ("snapkv:kernel=99999999999", "at most"),
        ] {
            let refusal = refusal(text, &config);
            assert!(refusal.contains(words), "{refusal}");
        }
        build(&format!("snapkv:capacity={}", usize::MAX), &config);
        assert_refuses_nan("snapkv:capacity=4,window=2,kernel=1", &config);
        config.window = Some(4096);
        assert!(refusal("snapkv", &config).contains("sliding window"));
    }
}
