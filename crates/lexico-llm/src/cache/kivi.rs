use ::lexico::attention::{DenseRows, NumberType, Positions, Source};
use candle_core::Tensor;

use super::method::{Lengths, Method, Values, option};
use super::per_token::groups;
use super::uniform::{ByChannel, ByToken};
use super::window::Window;
use super::{CacheSpec, Decoded, Footprint, KvCache, Step, outside_window};
use crate::config::Config;
use crate::error::Result;

pub(super) static METHOD: Method = Method {
    name: "kivi",
    summary: "KIVI: keys quantised by channel, values by token",
    needs_dictionaries: false,
    options: &[
        option("bits", Values::OneOf(&["2", "4"]), "2", "bits a number"),
        option(
            "group",
            Values::Count,
            "32",
            "positions of a key channel, and channels of a value, that share a scale and a zero point",
        ),
        option(
            "residual",
            Values::Count,
            "128",
            "newest values, kept dense, and keys that are quantised at once",
        ),
    ],
    build: |spec, context| {
        let settings = Settings::new(spec)?;
        Ok(Box::new(KiviCache::new(context.config, settings)))
    },
    bytes: |spec, context, lengths| Ok(Settings::new(spec)?.bytes(context.config, lengths)),
    settings: |spec, context, _| {
        let mut settings = Vec::new();
        let given = |option| spec.given(option).and_then(|value| value.parse().ok());
        for bits in ["4", "2"] {
            for group in groups(context) {
                let group: usize = given("group").unwrap_or(group).max(1);
                // Whole groups, near the authors' 128 and less.
                for residual in [128, 64, 32] {
                    let residual = given("residual").unwrap_or(residual.max(group) / group * group);
                    let setting = vec![
                        ("bits", bits.to_owned()),
                        ("group", group.to_string()),
                        ("residual", residual.to_string()),
                    ];
                    if !settings.contains(&setting) {
                        settings.push(setting);
                    }
                }
            }
        }
        settings
    },
};

#[derive(Clone, Copy)]
struct Settings {
    bits: u32,
    group: usize,
    residual: usize,
}

impl Settings {
    fn new(spec: &CacheSpec) -> Result<Self> {
        let settings = Self {
            bits: spec.number("bits")?,
            group: spec.positive("group")?,
            residual: spec.positive("residual")?,
        };
        let Self {
            group, residual, ..
        } = settings;
        if !residual.is_multiple_of(group) {
            let reason = format!("it must be a multiple of the group, {group}");
            return Err(spec.refused("residual", reason));
        }
        Ok(settings)
    }

    fn bytes(self, config: &Config, lengths: Lengths) -> f64 {
        let Self {
            bits,
            group,
            residual,
        } = self;
        let m = config.head_dim;
        let positions = lengths.end.min(config.window.unwrap_or(usize::MAX));
        let dense_keys = lengths.end % residual;
        let dense_values = positions.min(residual);
        let coded_keys = positions.saturating_sub(dense_keys);
        let coded = ByChannel::bytes_of(coded_keys, bits, m, group)
            + (positions - dense_values) * ByToken::bytes_each(bits, m, group);
        let head = size_of::<Head>() + coded + (dense_keys + dense_values) * 2 * m;
        (config.layers * config.kv_heads * head) as f64
    }
}

/// Keys quantised by channel, in groups of positions, and values by token, in groups of channels; the newest dense.
///
/// Liu et al.: *KIVI* (ICML 2024). As in the authors' code, keys wait until there are as many as the residual and are
/// then quantised all at once, so that from none to all but one of a residual are dense, while values leave their window of
/// that length one by one. Scales and zero points are f16. New positions attend at full precision to each other.
struct KiviCache {
    layers: Vec<Vec<Head>>,
    group: usize,
    sliding_window: Option<usize>,
    positions: usize,
}

struct Head {
    keys: Keys,
    values: ByToken,
    value_window: Window,
}

/// Keys in groups, and then those that wait for a whole residual.
struct Keys {
    coded: ByChannel,
    waiting: DenseRows,
    head_dim: usize,
    residual: usize,
}

impl Keys {
    fn new(settings: Settings, head_dim: usize) -> Self {
        Self {
            coded: ByChannel::new(settings.bits, head_dim, settings.group),
            waiting: DenseRows::new(head_dim, NumberType::F16),
            head_dim,
            residual: settings.residual,
        }
    }

    fn len(&self) -> usize {
        self.coded.len() + self.waiting.len()
    }

    /// Appends vectors `[n, m]`.
    fn extend(&mut self, new: &[f32]) {
        let positions = self.waiting.len() + new.len() / self.head_dim;
        if positions < self.residual {
            self.waiting.extend(new);
            return;
        }
        let mut all = self.waiting.to_f32();
        all.extend_from_slice(new);
        let (full, rest) = all.split_at(positions / self.residual * self.residual * self.head_dim);
        self.coded.extend(full);
        self.waiting = DenseRows::new(self.head_dim, NumberType::F16);
        self.waiting.extend(rest);
    }

    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let coded = coded_of(self.coded.len(), first, count);
        self.coded.read(first, coded, out);
        let dense = (first + coded).saturating_sub(self.coded.len());
        self.waiting.read(dense, count - coded, out);
    }

    fn bytes(&self) -> usize {
        self.coded.bytes() + self.waiting.bytes()
    }
}

/// Of `count` positions from `first` on, how many are among the oldest `coded`.
fn coded_of(coded: usize, first: usize, count: usize) -> usize {
    count.min(coded.saturating_sub(first))
}

impl Positions for Head {
    fn len(&self) -> usize {
        self.keys.len()
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        self.keys.read(first, count, keys);
        let coded = coded_of(self.values.len(), first, count);
        self.values.read(first, coded, values);
        let dense = (first + coded).saturating_sub(self.values.len());
        let window = self.value_window.rows();
        window.read(dense, count - coded, values);
    }
}

impl Head {
    fn new(settings: Settings, head_dim: usize) -> Self {
        Self {
            keys: Keys::new(settings, head_dim),
            values: ByToken::new(settings.bits, head_dim, settings.group),
            value_window: Window::new(head_dim, settings.residual),
        }
    }

    fn extend(&mut self, keys: &[f32], values: &[f32]) {
        self.keys.extend(keys);
        self.values.extend(&self.value_window.take(values));
    }

    /// Drops what the next query no longer sees through a sliding window, in whole groups of keys.
    fn slide(&mut self, window: Option<usize>, group: usize) {
        if let Some(outside) = outside_window(window, self.keys.len()) {
            let coded = self.keys.coded.len().min(self.values.len());
            let outside = outside.min(coded) / group * group;
            self.keys.coded.drop_front(outside);
            self.values.drop_front(outside);
        }
    }
}

impl KiviCache {
    fn new(config: &Config, settings: Settings) -> Self {
        let head = |_| Head::new(settings, config.head_dim);
        let layer = |_| (0..config.kv_heads).map(head).collect();
        Self {
            layers: (0..config.layers).map(layer).collect(),
            group: settings.group,
            sliding_window: config.window,
            positions: 0,
        }
    }
}

impl KvCache for KiviCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let window = self.sliding_window;
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        let heads = &mut self.layers[layer];
        let out = step.attend(heads, window, |head| vec![Source::Decoded(head)])?;
        for (head, (keys, values)) in heads.iter_mut().zip(step.heads()) {
            head.extend(keys, values);
            head.slide(window, self.group);
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let mut decoded = Decoded::default();
        for head in &self.layers[layer] {
            head.read(
                0,
                Positions::len(head),
                &mut decoded.keys,
                &mut decoded.values,
            );
            decoded.bytes[0] += head.keys.bytes();
            decoded.bytes[1] += head.values.bytes() + head.value_window.rows().bytes();
        }
        Ok(Some(decoded))
    }

    fn footprint(&self) -> Footprint {
        let heads = || self.layers.iter().flatten();
        let window = heads().map(|head| head.value_window.rows().bytes());
        Footprint {
            parts: vec![
                ("keys", heads().map(|head| head.keys.bytes()).sum()),
                ("values", heads().map(|head| head.values.bytes()).sum()),
                ("value window", window.sum()),
                ("bookkeeping", heads().count() * size_of::<Head>()),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(bits: u32, group: usize, residual: usize) -> Settings {
        Settings {
            bits,
            group,
            residual,
        }
    }

    fn all(head: &Head) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        head.read(0, head.len(), &mut keys, &mut values);
        (keys, values)
    }

    /// Five positions of two channels; groups of two, a residual of four, two bits.
    ///
    /// Keys of the first four are quantised. Channel 0 holds 0, 3 | 5, 5: the first group's grid is 0, 1, 2, 3, the
    /// second's 5 alone. Channel 1 holds 1, 2.5 | 0, 12: grids 1, 1.5, 2, 2.5 and 0, 4, 8, 12. All are on their grids,
    /// which groups across channels or tokens would not allow. Of the values the first leaves the window: 0 and 3 of one
    /// token are the ends of one grid.
    #[test]
    fn keys_by_channel_values_by_token() {
        let keys = [[0.0, 1.0], [3.0, 2.5], [5.0, 0.0], [5.0, 12.0], [0.1, 0.7]];
        let values = [[0.0, 3.0], [0.1, 0.3], [0.4, 0.5], [0.6, 0.7], [0.8, 0.9]];
        let half = |x: f32| half::f16::from_f32(x).to_f32();
        let mut head = Head::new(settings(2, 2, 4), 2);
        for (keys, values) in keys.iter().zip(&values) {
            head.extend(keys, values);
        }
        assert_eq!(head.keys.coded.len(), 4);
        assert_eq!(head.values.len(), 1);
        assert_eq!(
            all(&head),
            (
                keys.concat().iter().map(|&x| half(x)).collect(),
                values.concat().iter().map(|&x| half(x)).collect()
            )
        );

        // The grids of the channels are 0, 1, 2, 3 and 2, 4, 6, 8.
        let mut head = Head::new(settings(2, 4, 4), 2);
        let keys = [[0.0, 8.0], [3.0, 2.0], [1.0, 4.9], [0.6, 6.0]];
        head.extend(&keys.concat(), &[0.0; 8]);
        assert_eq!(all(&head).0, [0.0, 8.0, 3.0, 2.0, 1.0, 4.0, 1.0, 6.0]);
    }

    /// One prompt, or one position at a time: the same groups.
    #[test]
    fn how_positions_come_does_not_matter() {
        let numbers: Vec<f32> = (0..3 * 37).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut whole = Head::new(settings(2, 4, 8), 3);
        let mut single = Head::new(settings(2, 4, 8), 3);
        whole.extend(&numbers, &numbers);
        numbers.chunks(3).for_each(|x| single.extend(x, x));
        // A key that has waited in the window has been rounded to f16 before.
        let (whole, single) = (all(&whole), all(&single));
        let pairs = whole
            .0
            .iter()
            .zip(&single.0)
            .chain(whole.1.iter().zip(&single.1));
        for (a, b) in pairs {
            assert!((a - b).abs() < 2e-3, "{a} and {b}");
        }
    }

    #[test]
    fn whole_groups_leave_a_sliding_window() {
        let numbers: Vec<f32> = (0..2 * 300).map(|i| (i as f32 * 0.3).cos()).collect();
        let mut head = Head::new(settings(4, 16, 32), 2);
        head.extend(&numbers, &numbers);
        let before = all(&head);
        head.slide(Some(90), 16);
        // Of 300 positions the next query sees 89; 211 could go, 208 are whole groups.
        assert_eq!(head.len(), 92);
        assert_eq!(
            all(&head),
            (before.0[2 * 208..].to_vec(), before.1[2 * 208..].to_vec())
        );
    }
}
