//! The allocation of atoms to the heads' keys and values, for one total.

use serde::{Deserialize, Serialize};

use crate::key_value::KeyValue;

/// Losses of a model's predictions where the keys, or the values, of one KV head are coded and nothing else.
///
/// A loss is the mean KL divergence of the next token's distribution, in nats, from that of the same
/// model without codes, on text that no dictionary learned from. Heads differ by orders of magnitude in it,
/// and small losses of several heads add up as if each came alone: so [`DictionarySet::allocate`](super::DictionarySet::allocate) can give atoms
/// to where they count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CodingLosses {
    /// The sparsities that losses were measured at, rising.
    pub sparsities: Vec<usize>,
    /// Layer by layer.
    pub layers: Vec<LayerLosses>,
}

/// The losses of one layer, `[kv_heads][sparsities]`.
pub type LayerLosses = KeyValue<Vec<Vec<f32>>>;

/// The sparsities of one layer, `[kv_heads]`.
pub type LayerSparsities = KeyValue<Vec<usize>>;

impl LayerSparsities {
    /// The same sparsity for all heads' keys, and for all heads' values.
    #[must_use]
    pub fn same(kv_heads: usize, keys: usize, values: usize) -> Self {
        Self {
            keys: vec![keys; kv_heads],
            values: vec![values; kv_heads],
        }
    }
}

/// Max atoms that a head is given where the mean is below: more are slower to attend to, and other heads gain
/// more.
pub(super) const MAX_ALLOCATED: usize = 32;

/// The mean sparsity over the least that a head is given.
const LEAST: f64 = 3.0;

/// The least loss that is told apart from none.
const NEGLIGIBLE: f64 = 1e-9;

impl CodingLosses {
    /// Returns what is wrong with them for a model of this shape, if anything is.
    pub(super) fn refuse(&self, layers: usize, kv_heads: usize) -> Option<String> {
        let rising = self.sparsities.is_sorted_by(|a, b| a < b);
        if self.sparsities.len() < 2 || self.sparsities[0] == 0 || !rising {
            let found = &self.sparsities;
            return Some(format!(
                "the sparsities of its losses are {found:?}, but two or more are needed, above 0 and rising"
            ));
        }
        if self.layers.len() != layers {
            let found = self.layers.len();
            return Some(format!("it has losses of {found} layers, not {layers}"));
        }
        for (number, layer) in self.layers.iter().enumerate() {
            for (part, heads) in [("keys", &layer.keys), ("values", &layer.values)] {
                let whole = |losses: &Vec<f32>| losses.len() == self.sparsities.len();
                if heads.len() != kv_heads || !heads.iter().all(whole) {
                    let count = self.sparsities.len();
                    return Some(format!(
                        "the losses of layer {number}'s {part} are not {count} for each of {kv_heads} KV heads"
                    ));
                }
                if heads.iter().flatten().any(|l| !l.is_finite() || *l < 0.0) {
                    return Some(format!(
                        "a loss of layer {number}'s {part} is no number above or at 0"
                    ));
                }
            }
        }
        None
    }

    /// Returns the sparsities up to `max` whose mean over all heads' keys and values is at most `mean`, and whose
    /// summed loss is the least, but none below a third of the mean: losses were measured on some text, and on
    /// another a head that hardly needs atoms there may need them.
    ///
    /// Losses in between are interpolated, their logarithms linearly in the sparsity. Atoms go one
    /// after another to where the loss falls most, which is the best there is for convex losses (Fox, 1966); others are
    /// replaced by their convex hulls. `O(heads · (max² + max · log heads))`.
    pub(super) fn allocate(&self, mean: f64, max: usize) -> Vec<LayerSparsities> {
        let heads = self
            .layers
            .iter()
            .flat_map(|layer| layer.keys.iter().chain(&layer.values));
        let curves: Vec<Vec<f64>> = heads.map(|losses| self.curve(losses, max)).collect();
        let gains: Vec<Vec<f64>> = curves.iter().map(|curve| gains(curve)).collect();
        let least = ((mean / LEAST).ceil() as usize).clamp(1, max);
        let mut sparsities = vec![least; gains.len()];
        let total = (mean * gains.len() as f64 + 1e-6) as usize;
        // All gains that can be had, the largest first: a head's own fall, so that they come in order.
        let open = gains.iter().enumerate().flat_map(|(head, gains)| {
            let more = gains.iter().skip(least - 1);
            more.map(move |&gain| (gain, head))
        });
        let mut open: Vec<(f64, usize)> = open.collect();
        open.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, head) in open
            .into_iter()
            .take(total.saturating_sub(least * gains.len()))
        {
            sparsities[head] += 1;
        }
        let mut rest = sparsities.into_iter();
        let layers = self.layers.iter().map(|layer| {
            let take = |heads: &Vec<_>| rest.by_ref().take(heads.len()).collect();
            layer.as_ref().map(take)
        });
        layers.collect()
    }

    /// Returns the losses of all heads at these sparsities together; a sparsity of 0 counts as 1.
    pub(super) fn summed(&self, sparsities: &[LayerSparsities]) -> f64 {
        let layers = self.layers.iter().zip(sparsities);
        let heads = layers.flat_map(|(losses, own)| {
            let keys = losses.keys.iter().zip(&own.keys);
            keys.chain(losses.values.iter().zip(&own.values))
        });
        let at = |(losses, &s): (&Vec<f32>, &usize)| {
            self.curve(losses, s.max(1)).last().copied().unwrap_or(0.0)
        };
        heads.map(at).sum()
    }

    /// Returns the losses at 1 to `max` atoms.
    fn curve(&self, losses: &[f32], max: usize) -> Vec<f64> {
        let logarithm = |i: usize| f64::from(losses[i]).max(NEGLIGIBLE).ln();
        let at = |s: usize| {
            let above = self.sparsities.partition_point(|&measured| measured < s);
            // Beyond what was measured, as between the nearest two.
            let above = above.clamp(1, self.sparsities.len() - 1);
            let (low, high) = (self.sparsities[above - 1], self.sparsities[above]);
            let along = (s as f64 - low as f64) / (high - low) as f64;
            let (a, b) = (logarithm(above - 1), logarithm(above));
            (a + along * (b - a)).exp()
        };
        (1..=max).map(at).collect()
    }
}

/// Returns what each next atom takes off a loss `[s - 1]`, by the loss's convex hull.
fn gains(curve: &[f64]) -> Vec<f64> {
    let mut gains = Vec::with_capacity(curve.len());
    while gains.len() + 1 < curve.len() {
        let from = gains.len();
        let slope = |to: usize| (curve[from] - curve[to]) / (to - from) as f64;
        let steepest = (from + 1..curve.len()).max_by(|&a, &b| slope(a).total_cmp(&slope(b)));
        let Some(to) = steepest else { break };
        gains.resize(to, slope(to));
    }
    gains
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn losses(of_heads: Vec<Vec<f32>>) -> CodingLosses {
        let (keys, values) = of_heads.split_at(of_heads.len() / 2);
        CodingLosses {
            sparsities: vec![1, 3, 4],
            layers: vec![LayerLosses {
                keys: keys.to_vec(),
                values: values.to_vec(),
            }],
        }
    }

    fn summed(losses: &CodingLosses, sparsities: &[usize], max: usize) -> f64 {
        let layer = &losses.layers[0];
        let heads = layer.keys.iter().chain(&layer.values);
        let curves = heads.map(|l| losses.curve(l, max));
        curves.zip(sparsities).map(|(c, s)| c[s - 1]).sum()
    }

    proptest! {
        #[test]
        fn nothing_of_the_same_mean_loses_less(
            // Falling fast enough to be convex.
            first in prop::collection::vec((-8f32..0.0, 0.1f32..1.0), 4), mean in 1f64..4.0,
        ) {
            let curve = |&(log, rate): &(f32, f32)| [1., 3., 4.].map(|s: f32| (log - rate * s).exp()).to_vec();
            let losses = losses(first.iter().map(curve).collect());
            let chosen = losses.allocate(mean, 4);
            let chosen = [&chosen[0].keys[..], &chosen[0].values].concat();
            let total: usize = chosen.iter().sum();
            prop_assert_eq!(total, ((4.0 * mean + 1e-6) as usize).max(4));
            let least = if mean > 3.0 { 2 } else { 1 };
            prop_assert!(chosen.iter().all(|&s| s >= least));
            let own = summed(&losses, &chosen, 4);
            prop_assert!((losses.summed(&losses.allocate(mean, 4)) - own).abs() <= 1e-9 * own);
            for code in 0..256usize {
                let other: Vec<usize> = (0..4).map(|i| 1 + (code >> (2 * i)) % 4).collect();
                if other.iter().sum::<usize>() == total && other.iter().all(|&s| s >= least) {
                    prop_assert!(own <= summed(&losses, &other, 4) * 1.000_001, "{:?} for {:?}", chosen, other);
                }
            }
        }
    }

    #[test]
    fn losses_that_rise_take_nothing_from_others() {
        let losses = losses(vec![
            vec![0.1, 0.2, 0.0],
            vec![0.1, 0.1, 0.1],
            vec![0.0, 0.0, 0.0],
            vec![1.0, 0.01, 0.0],
        ]);
        let sparsities = losses.allocate(2.25, 4);
        assert_eq!(sparsities[0].keys, [4, 1]);
        assert_eq!(sparsities[0].values, [1, 3]);
        // More than there is room for.
        assert_eq!(losses.allocate(99.0, 4)[0], LayerSparsities::same(2, 4, 4));
        assert_eq!(losses.allocate(0.0, 4)[0], LayerSparsities::same(2, 1, 1));
    }

    #[test]
    fn impossible_losses_are_refused() {
        let right = losses(vec![vec![0.1, 0.2, 0.0]; 4]);
        assert_eq!(right.refuse(1, 2), None);
        let with = |change: fn(&mut CodingLosses)| {
            let mut wrong = right.clone();
            change(&mut wrong);
            wrong.refuse(1, 2)
        };
        for wrong in [
            right.refuse(2, 2),
            right.refuse(1, 3),
            with(|l| l.sparsities[0] = 0),
            with(|l| l.sparsities[1] = 4),
            with(|l| l.sparsities.truncate(1)),
            with(|l| l.layers[0].keys[1].truncate(1)),
            with(|l| l.layers[0].values[1][0] = f32::NAN),
            with(|l| l.layers[0].values[0][2] = -1.0),
        ] {
            assert!(wrong.is_some());
        }
    }
}
