use ::lexico::KeyValue;
use ::lexico::attention::{NumberType, Source};

use super::evict::{descending, refuse_sliding_window};
use super::method::{Lengths, Method, Values, option};
use super::stored::{DenseHead, NewPositions, StoredCache, StoredHead};
use super::{CacheContext, CacheSpec};
use crate::config::Config;
use crate::error::Result;

/// Random positions, beside the first and the newest: what any method that chooses which positions to evict must beat.
///
/// As the control of *Random Attention: Rethinking KV Cache Eviction for Efficient Reasoning* (Wang et al. 2026, arXiv
/// 2609.03430; SalesforceAIResearch/Random-Attention, `scripts/vllm_rp_bench/selector_random.py`): whenever there are
/// more positions than the capacity, every KV head draws a uniform number for each, those protected an infinite one, and
/// keeps the largest. The authors protect the newest positions within the capacity, and the whole prompt (`prompt=pinned`),
/// which their results rest on; sinks, and the sizes that are defaults here, are not theirs. They evict every so many steps;
/// here each step does, which leaves a position about the same chance to survive and needs no room beyond the capacity. A
/// prompt attends in full first. Draws depend on the seed, the layer, the head and the eviction, and on nothing in the text.
pub(super) static METHOD: Method = Method {
    name: "random",
    summary: "random positions beside the first and the newest, the null hypothesis of eviction",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("capacity", Values::Count, "2048")
            .about("positions kept, sinks, window and pinned prompt among them"),
        option("sinks", Values::Count, "4").about("first positions, always kept"),
        option("window", Values::Count, "32").about("newest positions, always kept"),
        option("prompt", Values::OneOf(&["open", "pinned"]), "open").about(
            "the prompt's positions are evicted as others are, or all kept, whatever the capacity",
        ),
        option("seed", Values::Count, "0").about("seed of the draws"),
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context)?;
        Ok(Box::new(cache(context.config, settings)))
    },
    bytes: |spec, context, lengths| Ok(Settings::new(spec, context)?.bytes(context.config, lengths)),
    settings: |spec, context, budget| {
        let given = |option| spec.number::<usize>(option).unwrap_or(0);
        let min = given("sinks").saturating_add(given("window")).max(1);
        let max = budget.fp16_positions(context.config);
        if spec.given("sinks").is_some() || spec.given("window").is_some() || max > 4 * min {
            return descending("capacity", max, min);
        }
        // A budget of few positions leaves half of them to chance.
        let window = (max / 4).max(1);
        let mut settings = descending("capacity", max, window + 4);
        for setting in &mut settings {
            setting.push(("window", window.to_string()));
        }
        settings
    },
};

#[derive(Debug, Clone, Copy)]
struct Settings {
    capacity: usize,
    sinks: usize,
    window: usize,
    pinned: bool,
    seed: u64,
}

impl Settings {
    fn new(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Self> {
        let settings = Self {
            capacity: spec.positive("capacity")?,
            sinks: spec.number("sinks")?,
            window: spec.number("window")?,
            pinned: spec.text("prompt") == "pinned",
            seed: spec.number("seed")?,
        };
        let protected = settings.sinks.saturating_add(settings.window);
        if settings.capacity < protected {
            let reason = format!("sinks and window together are {protected} of these");
            return Err(spec.refused("capacity", reason));
        }
        refuse_sliding_window(spec, context, "capacity")?;
        Ok(settings)
    }

    /// Positions kept beside a pinned prompt of `pinned` positions.
    fn kept(self, pinned: usize) -> usize {
        self.capacity.max(pinned.saturating_add(self.window))
    }

    fn bytes(self, config: &Config, lengths: Lengths) -> f64 {
        let pinned = if self.pinned { lengths.prompt } else { 0 };
        let kept = self.kept(pinned);
        let first = lengths.prompt.min(kept);
        let more = lengths.end.min(kept).saturating_sub(first);
        let head = DenseHead::expected_bytes(config, first, more) + size_of::<Head>();
        (config.layers * config.kv_heads * head) as f64
    }
}

/// The positions that a KV head keeps, in f16.
struct Head {
    held: DenseHead,
    /// Positions of the first step, where the prompt is pinned.
    pinned: usize,
    /// State of the draws.
    state: u64,
}

fn cache(config: &Config, settings: Settings) -> StoredCache<Vec<Head>> {
    let layer = |layer| {
        let head = |head| Head {
            held: DenseHead::new(config.head_dim, NumberType::F16),
            pinned: 0,
            // Heads' sequences do not overlap: each begins where a draw of its number leads.
            state: draw(&mut (settings.seed ^ ((layer as u64) << 40 | (head as u64) << 20))),
        };
        (0..config.kv_heads).map(head).collect()
    };
    StoredCache::with_layers(config, settings, layer)
}

/// The next number of SplitMix64 (Steele, Lea, Flood 2014), whose state is eight bytes.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl StoredHead for Head {
    type Shared = Settings;

    fn len(&self) -> usize {
        self.held.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![self.held.source()]
    }

    fn take(&mut self, settings: &Settings, new: NewPositions<'_>) {
        let vectors = new.vectors;
        let t = vectors.keys.len() / self.held.rows.keys.head_dim();
        if settings.pinned && self.held.len() == 0 {
            self.pinned = t;
        }
        let all = self.held.len() + t;
        let kept = settings.kept(self.pinned);
        if all <= kept {
            self.held.extend(vectors);
            return;
        }
        let first = settings.sinks.max(self.pinned);
        let recent = all - settings.window;
        let mut open: Vec<(u64, usize)> = (first..recent)
            .map(|at| (draw(&mut self.state), at))
            .collect();
        // The smallest draws go.
        open.sort_unstable();
        let mut places: Vec<usize> = open[all - kept..].iter().map(|&(_, at)| at).collect();
        places.extend((0..first).chain(recent..all));
        places.sort_unstable();
        self.held.keep(vectors, &places);
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        vec![("kept", self.held.bytes())]
    }
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::*;
    use super::*;
    use crate::cache::KvCache;

    fn settings(capacity: usize, sinks: usize, window: usize, pinned: bool) -> Settings {
        Settings {
            capacity,
            sinks,
            window,
            pinned,
            seed: 3,
        }
    }

    #[test]
    fn sinks_window_and_pinned_prompt_are_kept() {
        let config = config(2, 4, 2, 8);
        for (capacity, sinks, window, pinned) in [
            (9, 2, 3, false),
            (40, 0, 8, false),
            (20, 4, 6, true),
            (50, 0, 10, true),
        ] {
            for steps in sessions() {
                let own = settings(capacity, sinks, window, pinned);
                let mut cache = cache(&config, own);
                let prompt = if pinned { steps[0] } else { 0 };
                for t in steps {
                    feed(&mut cache, &config, t);
                    let all = cache.len();
                    for head in cache.layers.iter().flatten() {
                        let held = head.held.positions();
                        assert_eq!(held.len(), all.min(capacity.max(prompt + window)));
                        assert!(held.is_sorted_by(|a, b| a < b), "{held:?}");
                        let first = sinks.max(prompt).min(all);
                        assert!(
                            held.starts_with(&(0..first).collect::<Vec<_>>()),
                            "{held:?}"
                        );
                        let newest: Vec<usize> = (all.saturating_sub(window)..all).collect();
                        assert!(held.ends_with(&newest), "{held:?}");
                    }
                }
            }
        }
    }

    /// Each position outside the protected ones stays with the same chance, and heads draw for themselves. By hand: 36 of
    /// 400 positions are open to chance, so that each stays in 9 % of the heads.
    #[test]
    fn draws_are_uniform_and_independent() {
        let config = config(50, 4, 4, 4);
        let mut cache = cache(&config, settings(40, 2, 2, false));
        feed(&mut cache, &config, 404);
        let mut kept = vec![0usize; 404];
        let heads: Vec<Vec<usize>> = cache
            .layers
            .iter()
            .flatten()
            .map(|h| h.held.positions())
            .collect();
        for at in heads.iter().flatten() {
            kept[*at] += 1;
        }
        assert_eq!(heads.len(), 200);
        assert!(heads.windows(2).all(|pair| pair[0] != pair[1]));
        // 400 binomial counts of 200 draws of 0.09: mean 18, variance 16.38; their chi-square has 399 degrees of freedom.
        let chi: f64 = kept[2..402]
            .iter()
            .map(|&n| (n as f64 - 18.0).powi(2) / 16.38)
            .sum();
        assert!((chi / 399.0 - 1.0).abs() < 0.3, "{chi}");
    }

    /// In decode a position that came `n` evictions ago is still there with a chance of (1 − 1/open)ⁿ.
    #[test]
    fn survival_is_geometric() {
        let config = config(100, 4, 4, 2);
        let mut cache = cache(&config, settings(20, 0, 4, false));
        for _ in 0..60 {
            feed(&mut cache, &config, 1);
        }
        let mut ages = vec![0usize; 60];
        for at in cache
            .layers
            .iter()
            .flatten()
            .flat_map(|h| h.held.positions())
        {
            ages[59 - at] += 1;
        }
        // A position of age a has left the window a − 3 evictions ago, in each of which one of 17 went.
        for age in [4usize, 10, 20, 30] {
            let expected = 400.0 * (16f64 / 17.0).powi(age as i32 - 3);
            let own = ages[age] as f64;
            assert!(
                (own - expected).abs() < 4.5 * expected.sqrt(),
                "{age}: {own} for {expected}"
            );
        }
    }

    #[test]
    fn the_seed_decides() {
        let config = config(1, 1, 1, 4);
        let kept = |seed: u64| {
            let mut cache = cache(
                &config,
                Settings {
                    seed,
                    ..settings(10, 0, 0, false)
                },
            );
            feed(&mut cache, &config, 50);
            cache.layers[0][0].held.positions()
        };
        assert_eq!(kept(1), kept(1));
        assert_ne!(kept(1), kept(2));
    }

    /// The first numbers of the generator's reference in C, seeded with 1234567 (Vigna, `splitmix64.c`).
    #[test]
    fn draws_are_those_of_splitmix64() {
        let mut state = 1_234_567;
        let drawn: Vec<u64> = (0..3).map(|_| draw(&mut state)).collect();
        assert_eq!(
            drawn,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn with_room_for_all_it_is_the_full_cache() {
        assert_like_full("random", &config(2, 4, 2, 8));
    }

    #[test]
    fn bytes_are_as_expected() {
        let config = config(3, 4, 2, 16);
        assert_expected("random", &config);
        assert_expected("random:capacity=60", &config);
        assert_expected("random:capacity=60,prompt=pinned", &config);
        assert_within("random", &config);
        assert_within("random:window=16,sinks=0", &config);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let mut config = config(1, 1, 1, 8);
        assert!(refusal("random:capacity=20", &config).contains("36 of these"));
        assert!(refusal("random:capacity=0", &config).contains("1 or more"));
        build(
            &format!("random:capacity={0},window={0},sinks=0", usize::MAX),
            &config,
        );
        assert_refuses_nan("random:capacity=40", &config);
        config.window = Some(4096);
        assert!(refusal("random", &config).contains("sliding window"));
    }
}
