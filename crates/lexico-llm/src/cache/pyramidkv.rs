use super::method::{Method, Values, option};
use super::snapkv::{POOLING, SnapKvSettings, settings_within};
use super::{CacheContext, CacheSpec, snapkv};
use crate::error::Result;

// The window, the kernel and its pooling are those of the authors' experiments on LongBench.
pub(super) static METHOD: Method = Method {
    name: "pyramidkv",
    summary: "as snapkv, the first layers keeping more of the prompt than the last",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("capacity", Values::Count, "2048")
            .about("positions kept of the prompt, the window's among them; mean over the layers"),
        option("window", Values::Count, "8")
            .about("last positions of the prompt, whose attention decides"),
        option("kernel", Values::Count, "7")
            .about("neighbouring positions that are scored together"),
        option("pooling", POOLING, "max").about("how neighbours are scored"),
        option("beta", Values::Count, "20")
            .about("the mean over what the last layer keeps beside the window"),
    ],
    build: |spec, context| {
        let settings = settings(spec, context)?;
        Ok(Box::new(snapkv::cache(context.config, settings)))
    },
    bytes: |spec, context, lengths| Ok(settings(spec, context)?.bytes(context.config, lengths)),
    // The window as of SnapKV: with the authors' 8 of 2,048 positions there is too little to decide by.
    settings: |_, context, budget| settings_within(context, budget),
};

fn settings(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<SnapKvSettings> {
    let beta = spec.number("beta")?;
    if beta == 0 {
        let reason =
            "it divides the mean; 1 lets all layers keep the same, more makes the pyramid steeper";
        return Err(spec.refused("beta", reason));
    }
    snapkv::settings(spec, context, Some(beta))
}

/// Number of positions that a layer keeps, beside those of the observation window, of a prompt longer than `capacity`.
///
/// This is what the authors' `PyramidKVCluster` computes: with `c = capacity − window`, the last layer keeps `⌊c/β⌋`, the first
/// `2c − ⌊c/β⌋` or the whole prompt if that is shorter, those between fall in even, whole steps; a prompt shorter than
/// `2c` is kept alike by all layers.
pub(super) fn chosen(own: &SnapKvSettings, beta: usize, layer: usize, positions: usize) -> usize {
    let mean = own.capacity - own.window;
    if positions < 2 * mean || own.layers < 2 {
        return mean;
    }
    let last = mean / beta;
    let first = (2 * mean - last).min(positions - own.window);
    let step = (2 * first - 2 * mean) / (own.layers - 1);
    first - layer * step
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::*;
    use super::*;
    use crate::cache::KvCache;

    fn chosen(
        layer: usize,
        layers: usize,
        capacity: usize,
        window: usize,
        beta: usize,
        positions: usize,
    ) -> usize {
        let settings = SnapKvSettings {
            capacity,
            window,
            kernel: 1,
            average: false,
            beta: Some(beta),
            layers,
        };
        super::chosen(&settings, beta, layer, positions)
    }

    /// `max_capacity_prompts=128`, `window_sizes=8`, β = 20 for the 32 layers of Llama 3 8B, as their script runs it:
    /// `min_num = 120 // 20 = 6`, `max_num = 240 − 6 = 234`, `steps = 228 // 31 = 7`.
    #[test]
    fn budgets_are_the_authors() {
        let budgets = |capacity, positions| -> Vec<usize> {
            (0..32)
                .map(|layer| chosen(layer, 32, capacity, 8, 20, positions))
                .collect()
        };
        let expected: Vec<usize> = (0..32).map(|layer| 234 - 7 * layer).collect();
        assert_eq!(expected[31], 17);
        assert_eq!(budgets(128, 7500), expected);
        assert_eq!(budgets(128, 242), expected, "the shortest that it fits");
        // 241 − 8 = 233 ≤ 234: `max_num = 233`, `min_num = 240 − 233 = 7`, `steps = 226 // 31 = 7`.
        assert_eq!(budgets(128, 241)[..2], [233, 226]);
        assert_eq!(budgets(128, 241)[31], 16);
        // Below 2 · 120 all layers are alike.
        assert_eq!(budgets(128, 239), [120; 32]);
        // 2,048: `min_num = 102`, `max_num = 3978`, `steps = 3876 // 31 = 125`.
        let expected: Vec<usize> = (0..32).map(|layer| 3978 - 125 * layer).collect();
        assert_eq!(budgets(2048, 7500), expected);
        assert_eq!(chosen(0, 1, 128, 8, 20, 7500), 120, "one layer");
    }

    /// Whatever the settings: no layer keeps more than there is, none less than the one after it, and all together about
    /// the mean.
    #[test]
    fn budgets_are_possible() {
        for (capacity, window) in [(9, 8), (40, 32), (100, 8), (101, 1)] {
            for beta in [1, 2, 20, 1000] {
                for layers in [1, 2, 4, 33] {
                    for positions in capacity + 1..4 * capacity {
                        let budgets: Vec<usize> = (0..layers)
                            .map(|layer| chosen(layer, layers, capacity, window, beta, positions))
                            .collect();
                        assert!(budgets.is_sorted_by(|a, b| a >= b), "{budgets:?}");
                        assert!(budgets[0] <= positions - window, "{budgets:?}");
                        let over = budgets.iter().sum::<usize>() - layers * (capacity - window);
                        // Whole steps leave less than one a layer and step.
                        assert!(over <= layers * layers / 2, "{over} of {budgets:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn layers_hold_their_budgets() {
        let config = config(4, 4, 2, 8);
        let settings = SnapKvSettings {
            capacity: 28,
            window: 8,
            kernel: 3,
            average: false,
            beta: Some(20),
            layers: 4,
        };
        let mut cache = snapkv::cache(&config, settings);
        feed(&mut cache, &config, 100);
        // c = 20: 1 to 39, `steps = 38 // 3 = 12`; with the window's 8.
        for (heads, expected) in cache.layers.iter().zip([47, 35, 23, 11]) {
            for held in heads {
                let held = held.0.positions();
                assert_eq!(held.len(), expected);
                assert!(held.ends_with(&(92..100).collect::<Vec<_>>()), "{held:?}");
            }
        }
        feed(&mut cache, &config, 1);
        assert_eq!(cache.layers[3][1].0.len(), 12, "what is generated is kept");
        assert_eq!(cache.len(), 101);
    }

    #[test]
    fn with_room_for_all_it_is_the_full_cache() {
        assert_like_full("pyramidkv", &config(2, 4, 2, 8));
    }

    #[test]
    fn bytes_are_as_expected() {
        let config = config(4, 4, 2, 16);
        for text in [
            "pyramidkv",
            "pyramidkv:capacity=40",
            "pyramidkv:capacity=60,window=32",
        ] {
            assert_expected(text, &config);
        }
        assert_within("pyramidkv", &config);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let mut config = config(2, 1, 1, 8);
        for (text, words) in [
            ("pyramidkv:beta=0", "steeper"),
            ("pyramidkv:capacity=8", "larger capacity"),
            ("pyramidkv:kernel=2", "odd"),
        ] {
            let refusal = refusal(text, &config);
            assert!(refusal.contains(words), "{refusal}");
        }
        config.window = Some(4096);
        assert!(refusal("pyramidkv", &config).contains("sliding window"));
    }
}
