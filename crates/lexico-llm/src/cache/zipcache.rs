use ::lexico::KeyValue;
use ::lexico::attention::{NumberType, Positions, Source};
use candle_core::{Device, Tensor};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bits::{PackedRows, grow, row_bytes};
use super::method::{Lengths, Method, Values, option};
use super::stored::{CodedVectors, DenseHead, Place, StoredCache, StoredLayer};
use super::uniform::{Block, Grid, Quantised, held};
use super::{CacheSpec, Decoded, Step};
use crate::config::Config;
use crate::error::Result;

const BITS: Values = Values::OneOf(&["2", "4", "8"]);

pub(super) static METHOD: Method = Method {
    name: "zipcache",
    summary: "ZipCache: more bits for positions that get more attention",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("salient", Values::Number, "0.6").about("share of positions that get more bits"),
        option("bits", BITS, "4").about("bits a number of salient positions"),
        option("other-bits", BITS, "2").about("bits a number of the others"),
        option("gap", Values::Count, "100")
            .about("new positions, dense until then, after which all are quantised anew"),
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context.config)?;
        let shared = Shared {
            settings,
            rng: ChaCha8Rng::seed_from_u64(0),
        };
        let head = |_| Head::new(settings);
        let layer = |_| Layer {
            heads: (0..context.config.kv_heads).map(head).collect(),
            ..Layer::default()
        };
        let cache = StoredCache::with_layers(context.config, shared, layer);
        Ok(Box::new(cache))
    },
    bytes: |spec, context, lengths| {
        Ok(Settings::new(spec, context.config)?.bytes(context.config, lengths))
    },
    settings: |_, _, _| {
        let mut settings = Vec::new();
        for (bits, others) in [("8", "4"), ("4", "2")] {
            for tenths in (0..=10).rev() {
                for gap in ["100", "50", "25"] {
                    settings.push(vec![
                        ("salient", (f64::from(tenths) / 10.0).to_string()),
                        ("bits", bits.to_owned()),
                        ("other-bits", others.to_owned()),
                        ("gap", gap.to_owned()),
                    ]);
                }
            }
        }
        settings
    },
};

#[derive(Clone, Copy)]
struct Settings {
    salient: f64,
    /// Bits of the salient positions, and of the others.
    bits: [u32; 2],
    gap: usize,
    head_dim: usize,
}

impl Settings {
    fn new(spec: &CacheSpec, config: &Config) -> Result<Self> {
        let salient = spec.number("salient")?;
        if !(0.0..=1.0).contains(&salient) {
            return Err(spec.refused("salient", "it is a share and must be from 0 to 1"));
        }
        Ok(Self {
            salient,
            bits: [spec.number("bits")?, spec.number("other-bits")?],
            gap: spec.positive("gap")?,
            head_dim: config.head_dim,
        })
    }

    /// Number of salient positions among `count` new ones: the others are rounded down, as in the authors' code.
    fn salient_of(self, count: usize) -> usize {
        // A share in decimals is a little off in binary.
        count - ((1.0 - self.salient) * count as f64 + 1e-9) as usize
    }

    fn bytes(self, config: &Config, lengths: Lengths) -> f64 {
        let (m, heads) = (self.head_dim, config.kv_heads);
        let new = lengths.end - lengths.prompt.min(lengths.end);
        let recent = new % self.gap;
        let seen = lengths.end.min(config.window.unwrap_or(usize::MAX));
        let coded = seen.saturating_sub(recent);
        let salient = self.salient_of(coded);
        let classes = [salient, coded - salient].into_iter().zip(self.bits);
        let grid = size_of::<Grid>();
        let mut layer = size_of::<Layer>() + heads * size_of::<Head>();
        for (count, bits) in classes.filter(|&(count, _)| count > 0) {
            let head = 2 * count * row_bytes(bits, m) + m * grid;
            layer += heads * head + count * grid;
        }
        let dense = recent * (4 * m + size_of::<f32>());
        let head = coded.div_ceil(8) + m * size_of::<f16>() + dense;
        layer += heads * head + recent * size_of::<u32>();
        (config.layers * layer) as f64
    }
}

/// Positions that get much attention with more bits than the others; keys quantised by channel, values by token after
/// their channels are brought to one scale.
///
/// He et al.: *ZipCache* (NeurIPS 2024), with the settings of the authors' demonstration on GSM8K. How salient a position
/// is: the mean of the attention that it gets from those of the probing queries that see it, summed over the query
/// heads of a KV head. Of a prompt 5 % of the queries probe as the newest and 5 % at random; in decode the last 5 of 100
/// steps and each other step by a chance of 5 %. A prompt is quantised right after it is read. New positions then are dense
/// until there are `gap` of them; how salient they are is decided among them, and everything is quantised anew, on grids
/// from the smallest to the largest number: of a key channel over all salient positions, and over all others, of a
/// value over all heads.
///
/// The paper is followed where the authors' code differs: that divides by how many queries follow rather than by how many
/// of the probing ones, and probes with the last of 100 steps alone.
#[derive(Default)]
struct Layer {
    heads: Vec<Head>,
    /// Grids of the values of the salient positions and of the others, in order: rows are shared by the heads.
    value_grids: [Vec<Grid>; 2],
    /// Probing steps since positions were last quantised.
    probes: u32,
    /// Probing steps before each recent position.
    probes_before: Vec<u32>,
}

/// Settings and random numbers, which all layers use.
struct Shared {
    settings: Settings,
    rng: ChaCha8Rng,
}

struct Head {
    /// True for quantised positions that are salient.
    salient: Bits,
    /// Keys of the salient positions, and of the others.
    keys: [Option<Quantised>; 2],
    values: [PackedRows; 2],
    /// Divisors of the values, `[m]`.
    value_scales: Vec<f16>,
    /// Positions that are not quantised yet.
    recent: DenseHead,
    /// Attention that each recent position has accumulated from probing steps.
    attention: Vec<f32>,
}

/// A bit a position.
#[derive(Default)]
struct Bits {
    words: Vec<u64>,
    len: usize,
}

impl Bits {
    fn new(bits: &[bool]) -> Self {
        let len = bits.len();
        let mut words = vec![0; len.div_ceil(64)];
        for (at, &bit) in bits.iter().enumerate() {
            words[at / 64] |= u64::from(bit) << (at % 64);
        }
        Self { words, len }
    }

    fn get(&self, at: usize) -> bool {
        self.words[at / 64] >> (at % 64) & 1 == 1
    }

    /// Counts those that are set before `at`.
    fn set_before(&self, at: usize) -> usize {
        let whole: u32 = self.words[..at / 64].iter().map(|w| w.count_ones()).sum();
        let below = (1 << (at % 64)) - 1;
        let part = self.words.get(at / 64).map_or(0, |word| word & below);
        (whole + part.count_ones()) as usize
    }
}

/// A head's quantised positions.
struct Past<'a> {
    head: &'a Head,
    value_grids: &'a [Vec<Grid>; 2],
}

impl Positions for Past<'_> {
    fn len(&self) -> usize {
        self.head.salient.len
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let salient = self.head.salient.set_before(first);
        // The next row of the salient positions, and of the others.
        let mut rows = [salient, first - salient];
        let mut codes = vec![0; self.head.value_scales.len()];
        for position in first..first + count {
            let class = usize::from(!self.head.salient.get(position));
            let row = rows[class];
            rows[class] += 1;
            if let Some(coded) = &self.head.keys[class] {
                coded.read(row, 1, keys);
            }
            self.head.values[class].read(row, &mut codes);
            let grid = self.value_grids[class][row];
            let numbers = codes.iter().zip(&self.head.value_scales);
            values.extend(numbers.map(|(&code, scale)| grid.number(code) * scale.to_f32()));
        }
    }
}

impl Head {
    fn new(settings: Settings) -> Self {
        let m = settings.head_dim;
        Self {
            salient: Bits::default(),
            keys: [None, None],
            values: settings.bits.map(|bits| PackedRows::new(bits, m)),
            value_scales: Vec::new(),
            recent: DenseHead::new(m, NumberType::F16),
            attention: Vec::new(),
        }
    }

    /// The quantised positions that are salient (class 0), or the others (class 1).
    fn of_class(&self, class: usize) -> impl Iterator<Item = usize> {
        (0..self.salient.len).filter(move |&at| self.salient.get(at) == (class == 0))
    }

    /// Quantises the keys of all positions, and brings their values to one scale.
    fn quantise_keys(&mut self, vectors: &mut KeyValue<Vec<f32>>, settings: Settings) {
        let (KeyValue { keys, values }, m) = (vectors, settings.head_dim);
        for (class, bits) in settings.bits.into_iter().enumerate() {
            let own = self.of_class(class).flat_map(|at| &keys[at * m..][..m]);
            let own: Vec<f32> = own.copied().collect();
            self.keys[class] = (!own.is_empty()).then(|| {
                let mut coded = Quantised::new(bits, m, Block::Positions(own.len() / m));
                coded.extend(&own);
                coded
            });
        }
        let scale = |channel: usize| {
            let numbers = values.iter().skip(channel).step_by(m);
            let max = numbers.fold(0f32, |max, &x| max.max(held(x).abs()));
            let scale = f16::from_f32(max.sqrt());
            if scale > f16::ZERO { scale } else { f16::ONE }
        };
        self.value_scales = (0..m).map(scale).collect();
        for value in values.chunks_exact_mut(m) {
            let scaled = value.iter_mut().zip(&self.value_scales);
            scaled.for_each(|(x, scale)| *x = held(*x) / scale.to_f32());
        }
    }

    /// Bytes of the codes.
    fn bytes(&self) -> KeyValue<usize> {
        let keys = self.keys.iter().flatten().map(Quantised::bytes);
        let values = self.values.iter().map(PackedRows::bytes);
        KeyValue::new(keys.sum(), values.sum())
    }
}

/// Chooses the salient ones of some new positions: the `count` that have accumulated most attention for each of the probing queries that saw
/// them; of equal ones, the newer.
fn most_salient(attention: &[f32], probes: &[u32], count: usize) -> Vec<bool> {
    let mean = |at: usize| f64::from(attention[at]) / f64::from(probes[at].max(1));
    let mut order: Vec<usize> = (0..attention.len()).collect();
    order.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)).then(b.cmp(&a)));
    let mut salient = vec![false; attention.len()];
    order[..count].iter().for_each(|&at| salient[at] = true);
    salient
}

/// Number of queries that are scored at a time.
const ROWS: usize = 64;

/// Adds up the attention that the positions from `from` on, of those with these `keys` `[n, m]`, accumulate from queries
/// `[probes, m]`. Each query is at a position of those and sees it and what is before, through a sliding window where there is one.
fn add_attention(
    queries: &[f32],
    at: &[usize],
    keys: &[f32],
    window: Option<usize>,
    from: usize,
    attention: &mut [f32],
    m: usize,
) -> Result<()> {
    let n = keys.len() / m;
    let keys = Tensor::from_slice(keys, (n, m), &Device::Cpu)?.t()?;
    for (queries, at) in queries.chunks(ROWS * m).zip(at.chunks(ROWS)) {
        let queries = Tensor::from_slice(queries, (at.len(), m), &Device::Cpu)?;
        let scores: Vec<f32> = queries.matmul(&keys)?.flatten_all()?.to_vec1()?;
        for (scores, &at) in scores.chunks_exact(n).zip(at) {
            let first = window.map_or(0, |window| (at + 1).saturating_sub(window));
            let seen = &scores[first..=at];
            let max = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let scale = 1.0 / (m as f32).sqrt();
            let weight = |score: f32| ((score - max) * scale).exp();
            let sum: f32 = seen.iter().map(|&score| weight(score)).sum();
            for position in first.max(from)..=at {
                attention[position - from] += weight(scores[position]) / sum;
            }
        }
    }
    Ok(())
}

impl Past<'_> {
    /// All keys and values, those not quantised yet among them.
    fn vectors(&self) -> KeyValue<Vec<f32>> {
        let mut vectors = KeyValue::<Vec<f32>>::default();
        self.read(0, self.len(), &mut vectors.keys, &mut vectors.values);
        let recent = self.head.recent.rows.as_ref();
        for (vectors, rows) in vectors.as_mut().zip(recent) {
            rows.read(0, rows.len(), vectors);
        }
        vectors
    }
}

impl Shared {
    /// Draws which of `t` new queries probe, in order.
    fn draw_probes(&mut self, t: usize, recent: usize) -> Vec<usize> {
        if t == 1 {
            let gap = self.settings.gap;
            let probes = recent + 1 > gap - gap / 20 || self.rng.random_bool(0.05);
            return if probes { vec![0] } else { Vec::new() };
        }
        let older = t * 19 / 20;
        let mut probes: Vec<usize> = (older..t).collect();
        let all = probes.len() + t / 20;
        while probes.len() < all.min(t) {
            let probe = self.rng.random_range(0..older);
            if !probes.contains(&probe) {
                probes.push(probe);
            }
        }
        probes.sort_unstable();
        probes
    }
}

impl Layer {
    fn grid_bytes(&self) -> usize {
        let grids = self.value_grids.iter().map(Vec::capacity);
        grids.sum::<usize>() * size_of::<Grid>()
    }

    fn past(&self) -> Vec<Past<'_>> {
        let past = |head| Past {
            head,
            value_grids: &self.value_grids,
        };
        self.heads.iter().map(past).collect()
    }

    /// Quantises all positions, of which `[n, m]` keys and values are given for each head.
    fn quantise(&mut self, vectors: &mut [KeyValue<Vec<f32>>], settings: Settings) {
        let (heads, m) = (&mut self.heads, settings.head_dim);
        for (head, vectors) in heads.iter_mut().zip(&mut *vectors) {
            head.quantise_keys(vectors, settings);
        }
        for (class, bits) in settings.bits.into_iter().enumerate() {
            // The positions of this class, head by head: as many in each but where some have left a sliding window.
            let rows = heads.iter().map(|head| head.of_class(class).collect());
            let rows: Vec<Vec<usize>> = rows.collect();
            let count = rows.iter().map(Vec::len).max().unwrap_or(0);
            let value = |head: usize, at: usize| &vectors[head].values[at * m..(at + 1) * m];
            self.value_grids[class] = (0..count)
                .map(|row| {
                    let positions = rows.iter().map(|rows| rows.get(row)).enumerate();
                    let values = positions.filter_map(|(head, at)| Some(value(head, *at?)));
                    Grid::of(values.flatten().copied(), bits)
                })
                .collect();
            for (number, (head, rows)) in heads.iter_mut().zip(&rows).enumerate() {
                let coded = rows.iter().zip(&self.value_grids[class]);
                let codes: Vec<u8> = coded
                    .flat_map(|(&at, grid)| value(number, at).iter().map(|&x| grid.code(x, bits)))
                    .collect();
                head.values[class] = PackedRows::new(bits, m);
                head.values[class].extend(&codes);
            }
        }
    }

    /// Takes a step's positions: adds up what attention its probing queries pay, and quantises where it is time to.
    fn take(
        &mut self,
        shared: &mut Shared,
        step: &Step,
        sliding_window: Option<usize>,
    ) -> Result<()> {
        let settings = shared.settings;
        let m = settings.head_dim;
        let (_, t, _) = step.shape;
        let recent = self.probes_before.len();
        let probes = shared.draw_probes(t, recent);
        let full = t > 1 || recent + 1 >= settings.gap;
        grow(&mut self.probes_before, t, 1);
        for i in 0..t {
            self.probes_before.push(self.probes);
            self.probes += u32::from(probes.binary_search(&i).is_ok());
        }
        let mut vectors = Vec::new();
        if full || !probes.is_empty() {
            for (past, new) in self.past().into_iter().zip(step.heads()) {
                let mut all = past.vectors();
                all.keys.extend_from_slice(new.keys);
                all.values.extend_from_slice(new.values);
                vectors.push(all);
            }
        }
        for (number, (head, queries)) in self.heads.iter_mut().zip(step.queries()).enumerate() {
            grow(&mut head.attention, t, 1);
            head.attention.resize(recent + t, 0.0);
            let Some(KeyValue { keys, .. }) = vectors.get(number) else {
                continue;
            };
            let from = head.salient.len;
            let before = keys.len() / m - t;
            let at: Vec<usize> = probes.iter().map(|probe| before + probe).collect();
            for queries in queries.chunks_exact(t * m) {
                let probing = probes.iter().flat_map(|probe| &queries[probe * m..][..m]);
                let probing: Vec<f32> = probing.copied().collect();
                let window = sliding_window;
                add_attention(&probing, &at, keys, window, from, &mut head.attention, m)?;
            }
        }
        if !full {
            for (head, new) in self.heads.iter_mut().zip(step.heads()) {
                head.recent.extend(new);
            }
            return Ok(());
        }
        // What the next query no longer sees is not quantised anew.
        let held = vectors.first().map_or(0, |all| all.keys.len() / m);
        let unseen = sliding_window.map_or(0, |w| held.saturating_sub(w.saturating_sub(1)));
        for numbers in vectors.iter_mut().flat_map(KeyValue::as_mut) {
            numbers.drain(..unseen * m);
        }
        let since = |&before: &u32| self.probes - before;
        let seen_by: Vec<u32> = self.probes_before.iter().map(since).collect();
        for head in &mut self.heads {
            let old = head.salient.len;
            let kept_old = (unseen.min(old)..old).map(|at| head.salient.get(at));
            let new = unseen.saturating_sub(old)..;
            let count = settings.salient_of(seen_by[new.clone()].len());
            let kept_new = most_salient(&head.attention[new.clone()], &seen_by[new], count);
            let all: Vec<bool> = kept_old.chain(kept_new).collect();
            *head = Head {
                salient: Bits::new(&all),
                ..Head::new(settings)
            };
        }
        self.quantise(&mut vectors, settings);
        self.probes = 0;
        self.probes_before = Vec::new();
        Ok(())
    }
}

impl StoredLayer for Layer {
    type Shared = Shared;

    fn attend(&mut self, shared: &mut Shared, step: &Step, at: Place) -> Result<Tensor> {
        let past = self.past();
        let out = step.attend(&past, at.sliding_window, |past| {
            vec![Source::Decoded(past), past.head.recent.source()]
        })?;
        self.take(shared, step, at.sliding_window)?;
        Ok(out)
    }

    fn decoded(&self, _shared: &Shared) -> Result<Option<Decoded>> {
        let mut decoded = Decoded::default();
        for past in self.past() {
            decoded.extend(past.vectors());
            let (codes, recent) = (past.head.bytes(), past.head.recent.bytes());
            decoded.bytes[0] += codes.keys + recent.keys;
            decoded.bytes[1] += codes.values + recent.values;
        }
        decoded.bytes[1] += self.grid_bytes();
        Ok(Some(decoded))
    }

    fn bytes(&self) -> Vec<(&'static str, usize)> {
        let heads = || self.heads.iter();
        let recent = heads().flat_map(|head| head.recent.bytes());
        let attention = heads().map(|head| head.attention.capacity() * size_of::<f32>());
        let probes = self.probes_before.capacity() * size_of::<u32>();
        let codes = heads().flat_map(Head::bytes).sum::<usize>() + self.grid_bytes();
        let tables = heads().map(|head| {
            head.salient.words.capacity() * size_of::<u64>()
                + head.value_scales.capacity() * size_of::<f16>()
        });
        let bookkeeping = size_of::<Layer>() + heads().count() * size_of::<Head>();
        vec![
            ("codes", codes + tables.sum::<usize>()),
            ("recent", recent.sum()),
            ("attention", attention.sum::<usize>() + probes),
            ("bookkeeping", bookkeeping),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// One channel, queries of 1 at positions 2 and 3, keys whose exponentials are 3, 2, 1 and 4.
    ///
    /// Query 2 pays 3/6, 2/6 and 1/6, query 3 pays 3/10, 2/10, 1/10 and 4/10. Position 1 gets 0.53 in all and position 3
    /// gets 0.4, but from one query rather than two: the means are 0.4, 0.27, 0.13 and 0.4.
    #[test]
    fn salient_positions_by_hand() -> Result<()> {
        let keys = [3f32, 2.0, 1.0, 4.0].map(f32::ln);
        let near = |got: &[f32], expected: &[f32]| {
            let pairs = got.iter().zip(expected);
            assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-6), "{got:?}");
        };
        let mut attention = [0.0; 4];
        add_attention(&[1.0, 1.0], &[2, 3], &keys, None, 0, &mut attention, 1)?;
        near(&attention, &[0.8, 8.0 / 15.0, 4.0 / 15.0, 0.4]);
        let salient = most_salient(&attention, &[2, 2, 2, 1], 2);
        assert_eq!(salient, [true, false, false, true]);
        assert_eq!(
            most_salient(&attention, &[2, 2, 2, 1], 3),
            [true, true, false, true]
        );

        // Through a sliding window of 3 query 3 does not see position 0; position 0 is quantised already.
        let mut attention = [0.0; 3];
        add_attention(&[1.0], &[3], &keys, Some(3), 1, &mut attention, 1)?;
        near(&attention, &[2.0 / 7.0, 1.0 / 7.0, 4.0 / 7.0]);
        Ok(())
    }

    #[test]
    fn shares_are_rounded_as_the_authors_do() {
        let settings = |salient| Settings {
            salient,
            bits: [4, 2],
            gap: 100,
            head_dim: 8,
        };
        for (salient, count, expected) in [
            (0.6, 100, 60),
            (0.6, 7, 5),
            (0.9, 10, 9),
            (1.0, 9, 9),
            (0.0, 9, 0),
        ] {
            assert_eq!(
                settings(salient).salient_of(count),
                expected,
                "{salient} of {count}"
            );
        }
    }

    proptest! {
        #[test]
        fn bits_count(bits in vec(any::<bool>(), 1..200)) {
            let packed = Bits::new(&bits);
            for at in 0..bits.len() {
                prop_assert_eq!(packed.get(at), bits[at]);
                prop_assert_eq!(packed.set_before(at), bits[..at].iter().filter(|&&b| b).count());
            }
            prop_assert_eq!(packed.set_before(bits.len()), bits.iter().filter(|&&b| b).count());
        }

        /// Salient positions come back by 8 bits, the others by 4, in their order, whatever their numbers in each head.
        #[test]
        fn positions_come_back(
            (m, salient, numbers) in (1usize..9, 1usize..40).prop_flat_map(|(m, n)| {
                (Just(m), vec(vec(any::<bool>(), n), 2), vec(vec(-1f32..1.0, n * m), 4))
            }),
        ) {
            let settings = Settings { salient: 0.5, bits: [8, 4], gap: 100, head_dim: m };
            let head = |salient: &Vec<bool>| Head { salient: Bits::new(salient), ..Head::new(settings) };
            let mut layer = Layer { heads: salient.iter().map(head).collect(), ..Layer::default() };
            let (keys, values) = numbers.split_at(2);
            let pairs = keys.iter().cloned().zip(values.iter().cloned());
            let mut vectors: Vec<_> = pairs.map(|(keys, values)| KeyValue::new(keys, values)).collect();
            layer.quantise(&mut vectors, settings);
            for (past, (salient, (keys, values))) in layer.past().iter().zip(salient.iter().zip(keys.iter().zip(values))) {
                let n = salient.len();
                let (mut all_keys, mut all_values) = (Vec::new(), Vec::new());
                past.read(0, n / 2, &mut all_keys, &mut all_values);
                past.read(n / 2, n - n / 2, &mut all_keys, &mut all_values);
                prop_assert_eq!(past.len(), n);
                for i in 0..n * m {
                    // Half a step of a grid of all numbers: of keys from −1 to 1, of values divided by up to 1, of which
                    // the square root of the largest is at most 1.
                    let levels = if salient[i / m] { 255.0 } else { 15.0 };
                    let bound = 1.0 / levels * 1.01 + 2e-3;
                    prop_assert!((all_keys[i] - keys[i]).abs() < bound);
                    prop_assert!((all_values[i] - values[i]).abs() < bound);
                }
            }
        }
    }
}
