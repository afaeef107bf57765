use candle_core::Tensor;

use super::evict::{Held, accumulated_attention, descending, largest, refuse_sliding_window};
use super::method::{Method, Values, option};
use super::{CacheContext, CacheSpec, Footprint, KvCache, Step};
use crate::config::Config;
use crate::error::Result;
use crate::threads::CandleThreads;

pub(super) static METHOD: Method = Method {
    name: "h2o",
    summary: "the positions that most attention has gone to so far, and the newest ones, half and half",
    needs_dictionaries: false,
    options: &[option("capacity", Values::Count, "2048", "positions kept")],
    build: |spec, context| {
        let capacity = capacity(spec, context)?;
        Ok(Box::new(H2oCache::new(context.config, capacity)))
    },
    bytes: |spec, context, lengths| {
        let capacity = capacity(spec, context)?;
        let end = lengths.end.min(capacity);
        let first = lengths.prompt.min(capacity);
        let held = Held::expected_bytes(context.config, first, end.saturating_sub(first));
        let head = held + end * size_of::<f32>() + size_of::<Head>();
        Ok((context.config.layers * context.config.kv_heads * head) as f64)
    },
    settings: |_, context, budget| {
        let most = budget.fp16_positions(context.config);
        let capacities = descending(most.max(2), 2);
        capacities
            .map(|capacity| vec![("capacity", capacity.to_string())])
            .collect()
    },
};

fn capacity(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<usize> {
    let capacity = spec.number("capacity")?;
    if capacity < 2 {
        let reason =
            "half of it is for the newest positions and half for others: it must be at least 2";
        return Err(spec.refused("capacity", reason.to_owned()));
    }
    refuse_sliding_window(spec, context, "capacity")?;
    Ok(capacity)
}

/// The positions that the most attention has gone to, the heavy hitters, and the newest ones; in f16.
///
/// Zhang, Sheng, Zhou, et al.: *H₂O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models*
/// (NeurIPS 2023). Every KV head sums the attention that each position it holds has accumulated_attention from every query since it
/// came, those of the prompt included. After each step the newest half of `capacity` stays, and of the others those with
/// the largest sums; evicted positions and their sums are gone. A prompt attends in full first.
///
/// The authors hold keys and values for each query head; here they are held once a group, chosen by the sum over the
/// group's queries.
struct H2oCache {
    capacity: usize,
    layers: Vec<Vec<Head>>,
    positions: usize,
}

struct Head {
    held: Held,
    /// Attention that each position held has accumulated_attention.
    sums: Vec<f32>,
}

impl H2oCache {
    fn new(config: &Config, capacity: usize) -> Self {
        let head = |held| Head {
            held,
            sums: Vec::new(),
        };
        let layers = Held::layers(config).into_iter();
        Self {
            capacity,
            layers: layers
                .map(|heads| heads.into_iter().map(head).collect())
                .collect(),
            positions: 0,
        }
    }
}

impl Head {
    /// Takes new positions, `[t, m]` each, which the queries `[G, t, m]` are at, and evicts what is then too much.
    fn take(&mut self, queries: &[f32], new: (&[f32], &[f32]), t: usize, capacity: usize) {
        let mut sums = accumulated_attention(&self.held, queries, new.0, t, &CandleThreads);
        for (sum, before) in sums.iter_mut().zip(&self.sums) {
            *sum += before;
        }
        if sums.len() <= capacity {
            self.held.take(new);
            self.sums = sums;
            return;
        }
        let heavy = capacity / 2;
        let recent = sums.len() - (capacity - heavy);
        let mut kept = largest(&sums[..recent], heavy);
        kept.extend(recent..sums.len());
        self.held.take_kept(new, &kept);
        self.sums = kept.iter().map(|&i| sums[i]).collect();
    }
}

impl KvCache for H2oCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        let heads = &mut self.layers[layer];
        let out = step.attend(heads, None, |head| vec![head.held.source()])?;
        let (_, t, _) = step.shape;
        for ((head, new), queries) in heads.iter_mut().zip(step.heads()).zip(step.queries()) {
            head.take(queries, new, t, self.capacity);
        }
        if layer + 1 == self.layers.len() {
            self.positions += t;
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn footprint(&self) -> Footprint {
        let heads = || self.layers.iter().flatten();
        let sums = heads().map(|head| head.sums.capacity() * size_of::<f32>());
        Footprint {
            parts: vec![
                ("kept", heads().map(|head| head.held.bytes()).sum()),
                ("attention sums", sums.sum()),
                ("bookkeeping", heads().count() * size_of::<Head>()),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::*;
    use super::*;

    /// Feeds positions `first` and on to a head of one query head. Each query weighs what it sees in proportion to
    /// `weights`.
    fn feed_weights(cache: &mut H2oCache, first: usize, weights: &[f32]) {
        let t = weights.len();
        let keys = weights
            .iter()
            .flat_map(|w| [std::f32::consts::SQRT_2 * w.ln(), 0.0]);
        let values = (first..first + t).flat_map(|i| [i as f32, 0.0]);
        let q = tensor([1.0, 0.0].repeat(t), 1, t);
        let (k, v) = (tensor(keys.collect(), 1, t), tensor(values.collect(), 1, t));
        cache.attend(0, &q, &k, &v).unwrap();
    }

    fn assert_state(cache: &H2oCache, positions: &[usize], sums: &[f32]) {
        let head = &cache.layers[0][0];
        assert_eq!(head.held.positions(), positions);
        for (got, want) in head.sums.iter().zip(sums) {
            assert!((got - want).abs() < 1e-3, "{:?} for {sums:?}", head.sums);
        }
        assert_eq!(head.sums.len(), sums.len());
    }

    /// As the authors' `H2OKVCache_LayerWise(hh_size=2, recent_size=2)` keeps them.
    #[test]
    fn heavy_hitters_and_the_newest_are_kept() {
        let mut cache = H2oCache::new(&config(1, 1, 1, 2), 4);
        // Weights of the five queries: 1 | 1 1 over 2 | 1 1 4 over 6 | 1 1 4 1 over 7 | 1 1 4 1 1 over 8. Sums: 1.935,
        // 0.935, 1.738, 0.268, 0.125. Of positions 0 to 2 the heaviest are 0 and 2.
        feed_weights(&mut cache, 0, &[1.0, 1.0, 4.0, 1.0, 1.0]);
        assert_state(&cache, &[0, 2, 3, 4], &[1.9345, 1.7381, 0.2679, 0.125]);
        // 1 4 1 1 8 over 15. Of 0, 2 and 3, the last leaves.
        feed_weights(&mut cache, 5, &[8.0]);
        assert_state(&cache, &[0, 2, 4, 5], &[2.0012, 2.0048, 0.1917, 0.5333]);
        // 1 4 1 8 1 over 15, then 1 4 8 1 1: position 5 gets half of it, and leaves with less than 0 has by now.
        feed_weights(&mut cache, 6, &[1.0]);
        assert_state(&cache, &[0, 2, 5, 6], &[2.0679, 2.2714, 1.0667, 0.0667]);
        feed_weights(&mut cache, 7, &[1.0]);
        assert_state(&cache, &[0, 2, 6, 7], &[2.1345, 2.5381, 0.1333, 0.0667]);
        assert_eq!(cache.len(), 8);
    }

    /// Sums of the queries of a group, on an odd capacity: the newest get the odd one.
    #[test]
    fn groups_add_up() {
        let mut cache = H2oCache::new(&config(1, 2, 1, 2), 3);
        let ln = |w: f32| std::f32::consts::SQRT_2 * w.ln();
        // The first query head weighs 1 6 1 1 1, the second 9 1 1 1 1.
        let keys = vec![0.0, ln(9.0), ln(6.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let queries = [[1.0, 0.0].repeat(5), [0.0, 1.0].repeat(5)].concat();
        let values = (0..5).flat_map(|i| [i as f32, 0.0]).collect();
        let (q, k, v) = (
            tensor(queries, 2, 5),
            tensor(keys, 1, 5),
            tensor(values, 1, 5),
        );
        cache.attend(0, &q, &k, &v).unwrap();
        // Position 0: 1 + 1/7 + 1/8 + 1/9 + 1/10 and 1 + 9/10 + 9/11 + 9/12 + 9/13.
        let head = &cache.layers[0][0];
        assert_eq!(head.held.positions(), [0, 3, 4]);
        assert!((head.sums[0] - 5.6395).abs() < 1e-3, "{:?}", head.sums);
    }

    #[test]
    fn capacity_and_the_newest_are_kept_to() {
        let config = config(2, 4, 2, 8);
        for capacity in [2, 7, 48] {
            for steps in sessions() {
                let mut cache = H2oCache::new(&config, capacity);
                for t in steps {
                    feed(&mut cache, &config, t);
                    let all = cache.len();
                    for head in cache.layers.iter().flatten() {
                        let held = head.held.positions();
                        assert_eq!(held.len(), all.min(capacity));
                        assert_eq!(head.sums.len(), held.len());
                        assert!(held.is_sorted_by(|a, b| a < b), "{held:?}");
                        let recent = capacity.div_ceil(2).min(all);
                        assert!(
                            held.ends_with(&(all - recent..all).collect::<Vec<_>>()),
                            "{held:?}"
                        );
                    }
                }
            }
        }
    }

    /// A position's attention in parts of the text is what it is in one.
    #[test]
    fn sums_do_not_depend_on_the_steps() {
        let config = config(1, 4, 2, 8);
        let (mut one, mut many) = (H2oCache::new(&config, 99), H2oCache::new(&config, 99));
        let [q, k, v] = drawn(&config, 0, 40);
        one.attend(0, &q, &k, &v).unwrap();
        let mut first = 0;
        for t in [1, 20, 1, 1, 17] {
            let part = |x: &Tensor| x.narrow(1, first, t).unwrap();
            many.attend(0, &part(&q), &part(&k), &part(&v)).unwrap();
            first += t;
        }
        for (one, many) in one.layers[0].iter().zip(&many.layers[0]) {
            let queries = (one.sums.iter().sum::<f32>(), many.sums.iter().sum::<f32>());
            assert!((queries.0 - 80.0).abs() < 1e-3 && (queries.1 - 80.0).abs() < 1e-3);
            for (one, many) in one.sums.iter().zip(&many.sums) {
                // Held keys are in f16.
                assert!((one - many).abs() < 1e-2, "{one} and {many}");
            }
        }
    }

    #[test]
    fn with_room_for_all_it_is_the_full_cache() {
        assert_like_full("h2o", &config(2, 4, 2, 8));
    }

    #[test]
    fn bytes_are_as_expected() {
        let config = config(3, 4, 2, 16);
        assert_expected("h2o", &config);
        assert_expected("h2o:capacity=50", &config);
        assert_within("h2o", &config);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let mut config = config(1, 1, 1, 8);
        assert!(refusal("h2o:capacity=1", &config).contains("at least 2"));
        build(&format!("h2o:capacity={}", usize::MAX), &config);
        assert_refuses_nan("h2o:capacity=4", &config);
        config.window = Some(4096);
        assert!(refusal("h2o", &config).contains("sliding window"));
    }
}
