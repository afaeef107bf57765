use ::lexico::KeyValue;
use ::lexico::attention::{DenseRows, NumberType, Positions, Source};

use super::CacheSpec;
use super::dense_parts::{DENSE_LAYERS, DenseParts, SINKS};
use super::method::{Lengths, Method, Values, option};
use super::per_token::groups;
use super::recent_window::RecentWindow;
use super::stored::{CodedVectors, NewPositions, StoredCache, StoredHead};
use super::uniform::{Block, Quantised};
use crate::config::Config;
use crate::error::Result;

pub(super) static METHOD: Method = Method {
    name: "kivi",
    summary: "KIVI: keys quantised by channel, values by token",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("bits", Values::OneOf(&["2", "4"]), "2").about("bits a number"),
        option("group", Values::Count, "32").about(
            "positions of a key channel, and channels of a value, that share a scale and a \
             zero point",
        ),
        option("residual", Values::Count, "128")
            .about("newest values, kept dense, and keys that are quantised at once"),
        SINKS,
        DENSE_LAYERS,
    ],
    build: |spec, context| {
        let settings = Settings::new(spec)?;
        let (m, dense) = (
            context.config.head_dim,
            DenseParts::new(spec, context.config)?,
        );
        let head = |layer| dense.around(layer, m, Head::new(settings, m));
        Ok(Box::new(StoredCache::with_heads(context.config, (), head)))
    },
    bytes: |spec, context, lengths| {
        let (settings, config) = (Settings::new(spec)?, context.config);
        let dense = DenseParts::new(spec, config)?;
        Ok(dense.expected_bytes::<Head>(config, lengths, |l| settings.bytes(config, l)))
    },
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
        let (group, residual) = (spec.positive("group")?, spec.positive("residual")?);
        if !residual.is_multiple_of(group) {
            let reason = format!("it must be a multiple of the group, {group}");
            return Err(spec.refused("residual", reason));
        }
        Ok(Self {
            bits: spec.number("bits")?,
            group,
            residual,
        })
    }

    /// Bytes that a head is expected to hold.
    fn bytes(self, config: &Config, lengths: Lengths) -> usize {
        let (bits, group, residual) = (self.bits, self.group, self.residual);
        let m = config.head_dim;
        let positions = lengths.end.min(config.window.unwrap_or(usize::MAX));
        let dense_keys = lengths.end % residual;
        let dense_values = positions.min(residual);
        let coded_keys = positions.saturating_sub(dense_keys);
        let coded_values = positions - dense_values;
        let coded = Quantised::bytes_of(coded_keys, bits, m, Block::Positions(group))
            + Quantised::bytes_of(coded_values, bits, m, Block::Channels(group));
        size_of::<Head>() + coded + (dense_keys + dense_values) * 2 * m
    }
}

/// Keys quantised by channel, in groups of positions, and values by token, in groups of channels; the newest dense.
///
/// Liu et al.: *KIVI* (ICML 2024). As in the authors' code, keys wait until there are as many as the residual and are
/// then quantised all at once, so that from none to all but one of a residual are dense, while values leave their window of
/// that length one by one. Scales and zero points are f16. New positions attend at full precision to each other.
struct Head {
    keys: Keys,
    values: Quantised,
    value_window: RecentWindow,
}

/// Keys in groups, and then those that wait for a whole residual.
struct Keys {
    coded: Quantised,
    waiting: DenseRows,
    settings: Settings,
}

impl Keys {
    fn len(&self) -> usize {
        self.coded.len() + self.waiting.len()
    }

    /// Appends vectors `[n, m]`.
    fn extend(&mut self, new: &[f32]) {
        let (m, residual) = (self.waiting.head_dim(), self.settings.residual);
        let positions = self.waiting.len() + new.len() / m;
        if positions < residual {
            self.waiting.extend(new);
            return;
        }
        let all = [&self.waiting.to_f32(), new].concat();
        let (full, rest) = all.split_at(positions / residual * residual * m);
        self.coded.extend(full);
        self.waiting = DenseRows::new(m, NumberType::F16);
        self.waiting.extend(rest);
    }
}

/// Appends `count` of the vectors that are coded, and then dense, from `first` on to `out`.
fn read(coded: &Quantised, dense: &DenseRows, first: usize, count: usize, out: &mut Vec<f32>) {
    let of_coded = count.min(coded.len().saturating_sub(first));
    coded.read(first, of_coded, out);
    let first = (first + of_coded).saturating_sub(coded.len());
    dense.read(first, count - of_coded, out);
}

impl Positions for Head {
    fn len(&self) -> usize {
        self.keys.len()
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        read(&self.keys.coded, &self.keys.waiting, first, count, keys);
        let window = &self.value_window.rows;
        read(&self.values, window, first, count, values);
    }
}

impl Head {
    fn new(settings: Settings, head_dim: usize) -> Self {
        let quantised = |block| Quantised::new(settings.bits, head_dim, block);
        Self {
            keys: Keys {
                coded: quantised(Block::Positions(settings.group)),
                waiting: DenseRows::new(head_dim, NumberType::F16),
                settings,
            },
            values: quantised(Block::Channels(settings.group)),
            value_window: RecentWindow::new(head_dim, settings.residual),
        }
    }
}

impl StoredHead for Head {
    type Shared = ();

    fn len(&self) -> usize {
        self.keys.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source::Decoded(self)]
    }

    fn take(&mut self, _shared: &(), new: NewPositions<'_>) {
        self.keys.extend(new.vectors.keys);
        let left = self.value_window.take(new.vectors.values);
        self.values.extend(&left);
    }

    /// Drops whole groups of keys that are coded, with their values.
    fn drop_front(&mut self, count: usize) {
        let coded = self.keys.coded.len().min(self.values.len());
        let group = self.keys.settings.group;
        let count = count.min(coded) / group * group;
        self.keys.coded.drop_front(count);
        self.values.drop_front(count);
    }

    fn vectors(&self) -> Option<KeyValue<Vec<f32>>> {
        let mut vectors = KeyValue::<Vec<f32>>::default();
        let count = self.keys.len();
        self.read(0, count, &mut vectors.keys, &mut vectors.values);
        Some(vectors)
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        let (keys, window) = (&self.keys, &self.value_window.rows);
        let keys = keys.coded.bytes() + keys.waiting.bytes();
        vec![
            ("keys", KeyValue::new(keys, 0)),
            ("values", KeyValue::new(0, self.values.bytes())),
            ("value window", KeyValue::new(0, window.bytes())),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::lexico::cache::outside_window;

    fn settings(bits: u32, group: usize, residual: usize) -> Settings {
        Settings {
            bits,
            group,
            residual,
        }
    }

    fn extend(head: &mut Head, keys: &[f32], values: &[f32]) {
        let new = NewPositions {
            layer: 0,
            queries: &[],
            vectors: KeyValue::new(keys, values),
        };
        head.take(&(), new);
    }

    fn all(head: &Head) -> (Vec<f32>, Vec<f32>) {
        let KeyValue { keys, values } = head.vectors().unwrap();
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
            extend(&mut head, keys, values);
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
        extend(&mut head, &keys.concat(), &[0.0; 8]);
        assert_eq!(all(&head).0, [0.0, 8.0, 3.0, 2.0, 1.0, 4.0, 1.0, 6.0]);
    }

    /// One prompt, or one position at a time: the same groups.
    #[test]
    fn how_positions_come_does_not_matter() {
        let numbers: Vec<f32> = (0..3 * 37).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut whole = Head::new(settings(2, 4, 8), 3);
        let mut single = Head::new(settings(2, 4, 8), 3);
        extend(&mut whole, &numbers, &numbers);
        numbers.chunks(3).for_each(|x| extend(&mut single, x, x));
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
        extend(&mut head, &numbers, &numbers);
        let before = all(&head);
        // Through a window of 90, the next query sees 89 of 300 positions; 211 could go, 208 are whole groups.
        head.drop_front(outside_window(Some(90), 300).unwrap());
        assert_eq!(head.keys.len(), 92);
        assert_eq!(
            all(&head),
            (before.0[2 * 208..].to_vec(), before.1[2 * 208..].to_vec())
        );
    }
}
