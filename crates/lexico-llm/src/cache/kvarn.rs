use ::lexico::KeyValue;
use ::lexico::attention::{DenseRows, NumberType, Positions, Source};
use half::f16;

use super::bits::{PackedRows, row_bytes};
use super::dense_parts::{DENSE_LAYERS, DenseParts, WithSinks};
use super::method::{Lengths, Method, Values, option};
use super::rotation::{RotatedLayer, Rotation};
use super::stored::{DenseHead, NewPositions, StoredCache, StoredHead};
use super::{CacheContext, CacheSpec};
use crate::config::Config;
use crate::error::Result;

const BITS: Values = Values::OneOf(&["2", "4"]);

/// Tiles of rotated keys and values whose variances are made equal before they are quantised.
///
/// Müller, Bich, Boretti et al.: *KVarN: Variance-Normalized KV-Cache Quantization Mitigates Error Accumulation in Reasoning
/// Tasks* (2026, arXiv 2606.03458), as in the authors' fork of vLLM (huawei-csl/KVarN, `vllm/model_executor/layers/
/// quantization/kvarn/`: `config.py`, `store.py`; a reference of the tile's code in `ascend_kernel/kvarn_store_tile_k/
/// api_test.py`), whose preset is `kvarn_k4v2_g128`: keys of 4 bits, values of 2, tiles of 128 positions. Keys and values are
/// rotated by a Walsh–Hadamard transform. In a tile, scales of positions and of channels are found in turns until all
/// standard deviations are alike (8 rounds; the most even ones are kept). Then keys are rounded by channel and values by
/// position, from the smallest to the largest number; scale and smallest number take up the scale of their own axis, and
/// the other axis' scales are kept beside, all in f16.
///
/// The first 128 positions are never quantised, and the newest wait, dense, for a whole tile, from none to all but one of it.
/// A prompt attends at full precision. A window beyond the tile is not the authors': it is for comparisons at equal ones. The
/// authors' kernels are for head dims of 128, 256 and 512; any power of two is taken here.
pub(super) static METHOD: Method = Method {
    name: "kvarn",
    summary: "KVarN: tiles of rotated vectors of even variance, keys by channel, values by token",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("k", BITS, "4").about("bits a number of keys"),
        option("v", BITS, "2").about("bits a number of values"),
        option("group", Values::Count, "128").about("positions of a tile"),
        option("window", Values::Count, "0")
            .about("newest positions, kept dense, beside those that wait for a whole tile"),
        option("sinks", Values::Count, "128").about("first positions, kept dense"),
        DENSE_LAYERS,
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context)?;
        let m = context.config.head_dim;
        let head = |layer| settings.dense.around(layer, m, Head::new(settings, m));
        let layer = |layer| RotatedLayer {
            heads: (0..context.config.kv_heads).map(|_| head(layer)).collect(),
            rotations: KeyValue::new(Rotation::Hadamard(m), Rotation::Hadamard(m)),
        };
        Ok(Box::new(StoredCache::with_layers(
            context.config,
            (),
            layer,
        )))
    },
    bytes: |spec, context, lengths| {
        let (settings, config) = (Settings::new(spec, context)?, context.config);
        let layers = config.layers * size_of::<RotatedLayer<WithSinks<Head>>>();
        let head = |l| settings.bytes(config, l);
        let heads = settings.dense.expected_bytes::<Head>(config, lengths, head);
        Ok(heads + layers as f64)
    },
    settings: |_, _, _| {
        let mut settings = Vec::new();
        for (k, v) in [("4", "4"), ("4", "2"), ("2", "2")] {
            for group in ["128", "64", "32"] {
                for sinks in ["128", "64", "32", "16", "0"] {
                    settings.push(vec![
                        ("k", k.to_owned()),
                        ("v", v.to_owned()),
                        ("group", group.to_owned()),
                        ("sinks", sinks.to_owned()),
                    ]);
                }
            }
        }
        settings
    },
};

/// Rounds in which scales are found: as many as in the authors' configuration.
const ROUNDS: usize = 8;

#[derive(Clone, Copy)]
struct Settings {
    bits: KeyValue<u32>,
    group: usize,
    window: usize,
    dense: DenseParts,
}

impl Settings {
    fn new(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Self> {
        let m = context.config.head_dim;
        if !m.is_power_of_two() || m < 2 {
            let reason =
                format!("its Hadamard rotation needs a head dim that is a power of two, not {m}");
            return Err(spec.refused("k", reason));
        }
        let group = spec.positive("group")?;
        if group < 2 {
            return Err(spec.refused("group", "a tile of one position has no variance"));
        }
        Ok(Self {
            bits: KeyValue::new(spec.number("k")?, spec.number("v")?),
            group,
            window: spec.number("window")?,
            dense: DenseParts::new(spec, context.config)?,
        })
    }

    /// Positions in whole tiles when there have been `end`.
    fn in_tiles(self, end: usize) -> usize {
        end.saturating_sub(self.window) / self.group * self.group
    }

    /// Bytes that a head is expected to hold.
    fn bytes(self, config: &Config, lengths: Lengths) -> usize {
        let m = config.head_dim;
        let dense = lengths.end - self.in_tiles(lengths.end);
        let seen = lengths.end.min(config.window.unwrap_or(usize::MAX));
        let coded = seen.saturating_sub(dense);
        let codes = row_bytes(self.bits.keys, m) + row_bytes(self.bits.values, m);
        // Of a tile: three numbers a channel and three a position.
        let scales = coded / self.group * 3 * m * size_of::<f16>() + coded * 3 * size_of::<f16>();
        size_of::<Head>() + coded * codes + scales + dense * 4 * m
    }
}

/// The keys, or the values, of a head in tiles.
struct Tiles {
    /// Positions of a tile.
    group: usize,
    /// True for keys, which are rounded by channel.
    by_channel: bool,
    codes: PackedRows,
    /// Scale and smallest number of each channel of a tile, of keys; of each position, of values.
    grids: Vec<(f16, f16)>,
    /// Scales of the other axis: positions for keys, channels for values.
    scales: Vec<f16>,
}

impl Tiles {
    fn new(bits: u32, head_dim: usize, group: usize, by_channel: bool) -> Self {
        Self {
            group,
            by_channel,
            codes: PackedRows::new(bits, head_dim),
            grids: Vec::new(),
            scales: Vec::new(),
        }
    }

    /// Lines of a tile that have a grid each, and numbers of such a line.
    fn shape(&self) -> (usize, usize) {
        let (m, group) = (self.codes.width, self.group);
        if self.by_channel {
            (m, group)
        } else {
            (group, m)
        }
    }

    fn len(&self) -> usize {
        self.codes.len()
    }

    /// Appends whole tiles, `[n, m]`.
    fn extend(&mut self, vectors: &[f32]) {
        let (m, (lines, width)) = (self.codes.width, self.shape());
        let most = ((1u32 << self.codes.bits) - 1) as f32;
        let tiles = vectors.len() / (self.group * m);
        self.grids.reserve_exact(tiles * lines);
        self.scales.reserve_exact(tiles * width);
        for vectors in vectors.chunks_exact(self.group * m) {
            let tile = if self.by_channel {
                transposed(vectors, m)
            } else {
                vectors.to_vec()
            };
            let KeyValue {
                keys: own,
                values: other,
            } = even_scales(&tile, width);
            let mut codes = Vec::with_capacity(tile.len());
            for (line, own) in tile.chunks_exact(width).zip(&own) {
                let even: Vec<f32> = line.iter().zip(&other).map(|(x, o)| x / o / own).collect();
                let min = even.iter().copied().fold(f32::INFINITY, f32::min);
                let max = even.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let scale = ((max - min) / most).max(1e-10);
                let code = |x: &f32| ((x - min) / scale).round_ties_even().clamp(0.0, most) as u8;
                codes.extend(even.iter().map(code));
                self.grids.push((to_f16(own * scale), to_f16(own * min)));
            }
            self.scales.extend(other.iter().map(|&scale| to_f16(scale)));
            if self.by_channel {
                codes = transposed(&codes, self.group);
            }
            self.codes.extend(&codes);
        }
    }

    /// Appends `count` vectors from `first` on to `out`.
    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let mut codes = vec![0; self.codes.width];
        let (lines, width) = self.shape();
        for position in first..first + count {
            self.codes.read(position, &mut codes);
            let (tile, row) = (position / self.group, position % self.group);
            let grids = &self.grids[tile * lines..][..lines];
            let scales = &self.scales[tile * width..][..width];
            let number = |code: u8, (scale, zero): (f16, f16), other: f16| {
                (f32::from(code) * scale.to_f32() + zero.to_f32()) * other.to_f32()
            };
            if self.by_channel {
                let pairs = codes.iter().zip(grids);
                out.extend(pairs.map(|(&code, &grid)| number(code, grid, scales[row])));
            } else {
                let pairs = codes.iter().zip(scales);
                out.extend(pairs.map(|(&code, &other)| number(code, grids[row], other)));
            }
        }
    }

    /// Drops the oldest positions, whole tiles of them.
    fn drop_front(&mut self, count: usize) {
        let (tiles, (lines, width)) = (count / self.group, self.shape());
        self.codes.drop_front(count);
        self.grids.drain(..tiles * lines);
        self.scales.drain(..tiles * width);
    }

    fn bytes(&self) -> usize {
        let grids = self.grids.capacity() * size_of::<(f16, f16)>();
        self.codes.bytes() + grids + self.scales.capacity() * size_of::<f16>()
    }
}

/// `x` in f16, within what it holds.
fn to_f16(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// The transpose of a matrix of lines of `width`.
fn transposed<T: Copy>(numbers: &[T], width: usize) -> Vec<T> {
    let column = |at| numbers.iter().skip(at).step_by(width).copied();
    (0..width).flat_map(column).collect()
}

/// Scales of the lines of a tile (first) and of its columns (second), divided by which all of them have about the same
/// standard deviation: the most even of those that `ROUNDS` rounds find.
fn even_scales(tile: &[f32], width: usize) -> KeyValue<Vec<f32>> {
    let lines = tile.len() / width;
    let (mut log_lines, mut log_columns) = (vec![0f32; lines], vec![0f32; width]);
    let mut best = KeyValue::new(vec![1f32; lines], vec![1f32; width]);
    let mut even = tile.to_vec();
    let mut least = imbalance(&even, width);
    for _ in 0..ROUNDS {
        let step = |log: &mut f32, deviation: &f32| {
            *log = (*log + deviation.clamp(1e-3, 1e3).ln()).clamp(-0.3, 10.0);
        };
        let of_columns = deviations(&transposed(&even, width), lines);
        log_columns
            .iter_mut()
            .zip(&of_columns)
            .for_each(|(l, d)| step(l, d));
        even = divided(tile, &log_lines, &log_columns);
        let of_lines = deviations(&even, width);
        log_lines
            .iter_mut()
            .zip(&of_lines)
            .for_each(|(l, d)| step(l, d));
        even = divided(tile, &log_lines, &log_columns);
        let own = imbalance(&even, width);
        if own <= least {
            least = own;
            let linear = |logs: &[f32]| logs.iter().map(|log| log.exp()).collect();
            best = KeyValue::new(linear(&log_lines), linear(&log_columns));
        }
    }
    best
}

/// The tile divided by scales of its lines and of its columns, given by their logarithms.
fn divided(tile: &[f32], log_lines: &[f32], log_columns: &[f32]) -> Vec<f32> {
    let columns: Vec<f32> = log_columns.iter().map(|log| log.exp()).collect();
    let lines = tile.chunks_exact(columns.len()).zip(log_lines);
    let divide = |(line, log): (&[f32], &f32)| {
        let own = log.exp();
        let numbers = line.iter().zip(&columns);
        numbers
            .map(move |(x, column)| x / column / own)
            .collect::<Vec<f32>>()
    };
    lines.flat_map(divide).collect()
}

/// Standard deviation of each line of `width` numbers, of a sample.
fn deviations(tile: &[f32], width: usize) -> Vec<f32> {
    let deviation = |line: &[f32]| {
        let mean = line.iter().sum::<f32>() / width as f32;
        let squares: f32 = line.iter().map(|x| (x - mean) * (x - mean)).sum();
        (squares / (width as f32 - 1.0)).sqrt()
    };
    tile.chunks_exact(width).map(deviation).collect()
}

/// How uneven a tile is: the largest deviation over the smallest, of columns and of lines.
fn imbalance(tile: &[f32], width: usize) -> f32 {
    let ratio = |deviations: Vec<f32>| {
        let max = deviations.iter().copied().fold(0f32, f32::max);
        let min = deviations.iter().copied().fold(f32::INFINITY, f32::min);
        max / min.max(1e-8)
    };
    let columns = deviations(&transposed(tile, width), tile.len() / width);
    ratio(columns) + ratio(deviations(tile, width))
}

/// Rotated keys and values of a KV head: tiles, and then the newest, which wait for a whole one.
struct Head {
    tiles: KeyValue<Tiles>,
    tail: DenseHead,
    settings: Settings,
}

impl Head {
    fn new(settings: Settings, head_dim: usize) -> Self {
        let tiles = |bits, by_channel| Tiles::new(bits, head_dim, settings.group, by_channel);
        let KeyValue { keys, values } = settings.bits;
        Self {
            tiles: KeyValue::new(tiles(keys, true), tiles(values, false)),
            tail: DenseHead::new(head_dim, NumberType::F16),
            settings,
        }
    }
}

impl Positions for Head {
    fn len(&self) -> usize {
        self.tiles.keys.len()
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        self.tiles.keys.read(first, count, keys);
        self.tiles.values.read(first, count, values);
    }
}

impl StoredHead for Head {
    type Shared = ();

    fn len(&self) -> usize {
        self.tiles.keys.len() + self.tail.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source::Decoded(self), self.tail.source()]
    }

    fn take(&mut self, _shared: &(), new: NewPositions<'_>) {
        let m = self.tail.rows.keys.head_dim();
        let held = self.tail.len();
        let full = self.settings.in_tiles(held + new.vectors.keys.len() / m);
        if full == 0 {
            return self.tail.extend(new.vectors);
        }
        let vectors = self.tail.rows.as_mut().zip(new.vectors);
        for (tiles, (rows, new)) in self.tiles.as_mut().zip(vectors) {
            let all = [&rows.to_f32(), new].concat();
            let (full, rest) = all.split_at(full * m);
            tiles.extend(full);
            *rows = DenseRows::new(m, NumberType::F16);
            rows.extend(rest);
        }
    }

    /// Drops whole tiles.
    fn drop_front(&mut self, count: usize) {
        let count = count.min(self.tiles.keys.len()) / self.settings.group * self.settings.group;
        self.tiles.keys.drop_front(count);
        self.tiles.values.drop_front(count);
    }

    fn vectors(&self) -> Option<KeyValue<Vec<f32>>> {
        let both = self.tiles.as_ref().zip(self.tail.rows.as_ref());
        Some(both.map(|(tiles, rows)| {
            let mut vectors = Vec::new();
            tiles.read(0, tiles.len(), &mut vectors);
            vectors.extend(rows.to_f32());
            vectors
        }))
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        vec![
            ("tiles", self.tiles.as_ref().map(Tiles::bytes)),
            ("tail", self.tail.bytes()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::{config, refusal};
    use super::super::fixture::{M, assert_close, numbers, of, vectors};
    use super::*;

    /// Keys of 4 bits and values of 2, coded rotated and rotated back: two positions, and the error of all.
    #[test]
    fn tiles_are_the_authors() {
        let fixture = of("kvarn");
        let rotation = Rotation::Hadamard(M);
        for (part, bits, by_channel, given, error) in [
            ("keys", 4, true, vectors(0, 128), 0),
            ("values", 2, false, vectors(500, 128), 1),
        ] {
            let mut rotated = given.clone();
            rotation.turn(&mut rotated, M);
            let mut tiles = Tiles::new(bits, M, 128, by_channel);
            tiles.extend(&rotated);
            let mut back = Vec::new();
            tiles.read(0, 128, &mut back);
            rotation.turn_back(&mut back, M);
            for (at, position) in [0, 77].into_iter().enumerate() {
                let own = &back[position * M..][..M];
                assert_close(own, &numbers(&fixture[part][at]), 5e-3);
            }
            let squares = given.iter().zip(&back);
            let sum: f64 = squares.map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let (own, expected) = (sum / given.len() as f64, numbers(&fixture["errors"])[error]);
            assert!(
                (own / expected - 1.0).abs() < 1e-3,
                "{part}: {own} for {expected}"
            );
        }
    }

    /// A matrix whose lines and columns differ in spread becomes as even as the authors' formula makes it in 8 rounds (numpy: 41.31 and
    /// 6.0598); where every scale may be as small as it needs, all deviations would become alike.
    #[test]
    fn deviations_become_even() {
        let width = 16;
        let tile: Vec<f32> = vectors(9, 8)
            .iter()
            .enumerate()
            .map(|(at, x)| {
                x * 10.0 * (1.0 + (at / width) as f32) * (1.0 + (at % width) as f32 / 4.0)
            })
            .collect();
        let KeyValue { keys, values } = even_scales(&tile, width);
        let lines = tile.chunks(width).zip(&keys);
        let even: Vec<f32> = lines
            .flat_map(|(line, own)| {
                line.iter()
                    .zip(&values)
                    .map(move |(x, other)| x / other / own)
            })
            .collect();
        let (before, after) = (imbalance(&tile, width), imbalance(&even, width));
        assert!((before - 41.314).abs() < 1e-2, "{before}");
        assert!((after - 6.0598).abs() < 1e-3, "{after}");
    }

    /// The authors' figure of `get_kv_cache_shape`: 17,920 bytes a tile of head dim 128 with 4 bits for both.
    #[test]
    fn a_tile_has_the_authors_bytes() {
        let mut both = 0;
        for by_channel in [true, false] {
            let mut tiles = Tiles::new(4, 128, 128, by_channel);
            tiles.extend(&vectors(0, 256));
            both += tiles.bytes();
        }
        assert_eq!(both, 17_920);
    }

    #[test]
    fn positions_wait_for_a_whole_tile() {
        let held = |head: &Head| StoredHead::len(head);
        let settings = |window| Settings {
            bits: KeyValue::new(4, 2),
            group: 8,
            window,
            dense: DenseParts::new(&"kvarn".parse().unwrap(), &config(1, 1, 1, M)).unwrap(),
        };
        for window in [0, 5] {
            let mut head = Head::new(settings(window), M);
            for t in [3, 1, 1, 1, 1, 1, 1, 30, 1, 1] {
                let numbers = vectors(0, t);
                let new = NewPositions {
                    layer: 0,
                    queries: &[],
                    vectors: KeyValue::new(&numbers, &numbers),
                };
                head.take(&(), new);
                let tail = head.tail.len();
                assert!(
                    tail >= window.min(held(&head)) && tail < window + 8,
                    "{tail}"
                );
                assert_eq!(head.tiles.keys.len() % 8, 0);
            }
            assert_eq!(held(&head), 41);
            head.drop_front(19);
            assert_eq!(held(&head), 25);
        }
    }

    #[test]
    fn impossible_settings_are_refused() {
        assert!(refusal("kvarn", &config(1, 1, 1, 24)).contains("power of two"));
        assert!(refusal("kvarn:group=1", &config(1, 1, 1, 8)).contains("no variance"));
        assert!(refusal("kvarn:group=0", &config(1, 1, 1, 8)).contains("1 or more"));
    }
}
