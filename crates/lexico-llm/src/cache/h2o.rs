use ::lexico::KeyValue;
use ::lexico::attention::{NumberType, Source};

use super::evict::{accumulated_attention, descending, largest, refuse_sliding_window};
use super::method::{Method, Values, option};
use super::stored::{DenseHead, NewPositions, StoredCache, StoredHead};
use super::{CacheContext, CacheSpec};
use crate::config::Config;
use crate::error::Result;

pub(super) static METHOD: Method = Method {
    name: "h2o",
    summary: "the positions that most attention has gone to so far, and the newest ones, half and half",
    needs_dictionaries: false,
    saves: false,
    options: &[option("capacity", Values::Count, "2048").about("positions kept")],
    build: |spec, context| {
        let capacity = capacity(spec, context)?;
        Ok(Box::new(cache(context.config, capacity)))
    },
    bytes: |spec, context, lengths| {
        let capacity = capacity(spec, context)?;
        let end = lengths.end.min(capacity);
        let first = lengths.prompt.min(capacity);
        let held = DenseHead::expected_bytes(context.config, first, end.saturating_sub(first));
        let head = held + end * size_of::<f32>() + size_of::<Head>();
        Ok((context.config.layers * context.config.kv_heads * head) as f64)
    },
    settings: |_, context, budget| descending("capacity", budget.fp16_positions(context.config), 2),
};

fn capacity(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<usize> {
    let capacity = spec.number("capacity")?;
    if capacity < 2 {
        let reason =
            "half of it is for the newest positions and half for others: it must be at least 2";
        return Err(spec.refused("capacity", reason));
    }
    refuse_sliding_window(spec, context, "capacity")?;
    Ok(capacity)
}

/// The positions that have accumulated the most attention, the heavy hitters, and the newest ones; in f16.
///
/// Zhang, Sheng, Zhou, et al.: *H₂O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models*
/// (NeurIPS 2023). Every KV head sums the attention that each position it holds has accumulated from every query since it
/// came, those of the prompt included. After each step the newest half of `capacity` stays, and of the others those with
/// the largest sums; evicted positions and their sums are gone. A prompt attends in full first.
///
/// The authors hold keys and values for each query head; here they are held once a group, chosen by the sum over the
/// group's queries.
struct Head {
    held: DenseHead,
    /// Attention that each position held has accumulated.
    sums: Vec<f32>,
}

/// Positions that a KV head keeps.
struct Capacity(usize);

fn cache(config: &Config, capacity: usize) -> StoredCache<Vec<Head>> {
    StoredCache::with_heads(config, Capacity(capacity), |_| Head {
        held: DenseHead::new(config.head_dim, NumberType::F16),
        sums: Vec::new(),
    })
}

impl StoredHead for Head {
    type Shared = Capacity;

    fn len(&self) -> usize {
        self.held.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![self.held.source()]
    }

    /// Takes new positions and evicts what is then too much.
    fn take(&mut self, &Capacity(capacity): &Capacity, new: NewPositions<'_>) {
        let (queries, new) = (new.queries, new.vectors);
        let t = new.keys.len() / self.held.rows.keys.head_dim();
        let mut sums = accumulated_attention(&self.held, queries, new.keys, t);
        for (sum, before) in sums.iter_mut().zip(&self.sums) {
            *sum += before;
        }
        if sums.len() <= capacity {
            self.held.extend(new);
            self.sums = sums;
            return;
        }
        let heavy = capacity / 2;
        let recent = sums.len() - (capacity - heavy);
        let mut kept = largest(&sums[..recent], heavy);
        kept.extend(recent..sums.len());
        self.held.keep(new, &kept);
        self.sums = kept.iter().map(|&i| sums[i]).collect();
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        let sums = self.sums.capacity() * size_of::<f32>();
        vec![
            ("kept", self.held.bytes()),
            ("attention sums", KeyValue::new(sums, 0)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::super::evict::testing::*;
    use super::*;
    use crate::cache::KvCache;

    /// Feeds positions `first` and on to a head of one query head. Each query weighs what it sees in proportion to
    /// `weights`.
    fn feed_weights(cache: &mut StoredCache<Vec<Head>>, first: usize, weights: &[f32]) {
        let t = weights.len();
        let keys = weights
            .iter()
            .flat_map(|w| [std::f32::consts::SQRT_2 * w.ln(), 0.0]);
        let values = (first..first + t).flat_map(|i| [i as f32, 0.0]);
        let q = tensor([1.0, 0.0].repeat(t), 1, t);
        let (k, v) = (tensor(keys.collect(), 1, t), tensor(values.collect(), 1, t));
        cache.attend(0, &q, &k, &v).unwrap();
    }

    fn assert_state(cache: &StoredCache<Vec<Head>>, positions: &[usize], sums: &[f32]) {
        let head = &cache.layers[0][0];
        assert_eq!(head.held.positions(), positions);
        for (got, want) in head.sums.iter().zip(sums) {
            assert!((got - want).abs() < 1e-3, "{:?} for {sums:?}", head.sums);
        }
        assert_eq!(head.sums.len(), sums.len());
    }

    /// Keeps what the authors' `H2OKVCache_LayerWise(hh_size=2, recent_size=2)` keeps.
    #[test]
    fn heavy_hitters_and_the_newest_are_kept() {
        let mut cache = super::cache(&config(1, 1, 1, 2), 4);
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
        let mut cache = super::cache(&config(1, 2, 1, 2), 3);
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
                let mut cache = super::cache(&config, capacity);
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
        let (mut one, mut many) = (cache(&config, 99), cache(&config, 99));
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
