use ::lexico::attention::{DenseRows, NumberType, Positions, Source};
use candle_core::{Device, Tensor};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bits::{PackedRows, grow, row_bytes};
use super::method::{Lengths, Method, Values, option};
use super::uniform::{ByChannel, Grid, held};
use super::{CacheSpec, Decoded, Footprint, KvCache, Step};
use crate::config::Config;
use crate::error::Result;

const BITS: Values = Values::OneOf(&["2", "4", "8"]);

pub(super) static METHOD: Method = Method {
    name: "zipcache",
    summary: "ZipCache: more bits for positions that get more attention",
    needs_dictionaries: false,
    options: &[
        option(
            "salient",
            Values::Number,
            "0.6",
            "share of positions that get more bits",
        ),
        option("bits", BITS, "4", "bits a number of salient positions"),
        option("other-bits", BITS, "2", "bits a number of the others"),
        option(
            "gap",
            Values::Count,
            "100",
            "new positions, dense until then, after which all are quantised anew",
        ),
    ],
    build: |spec, context| {
        let settings = Settings::new(spec)?;
        Ok(Box::new(ZipCache::new(context.config, settings)))
    },
    bytes: |spec, context, lengths| Ok(Settings::new(spec)?.bytes(context.config, lengths)),
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
}

impl Settings {
    fn new(spec: &CacheSpec) -> Result<Self> {
        let salient = spec.number("salient")?;
        if !(0.0..=1.0).contains(&salient) {
            return Err(spec.refused("salient", "it is a share and must be from 0 to 1"));
        }
        Ok(Self {
            salient,
            bits: [spec.number("bits")?, spec.number("other-bits")?],
            gap: spec.positive("gap")?,
        })
    }

    /// Of `count` new positions, how many are salient: the others are rounded down, as in the authors' code.
    fn salient_of(self, count: usize) -> usize {
        // A share in decimals is a little off in binary.
        count - ((1.0 - self.salient) * count as f64 + 1e-9) as usize
    }

    fn bytes(self, config: &Config, lengths: Lengths) -> f64 {
        let (m, heads) = (config.head_dim, config.kv_heads);
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
struct ZipCache {
    layers: Vec<Layer>,
    settings: Settings,
    head_dim: usize,
    sliding_window: Option<usize>,
    positions: usize,
    rng: ChaCha8Rng,
}

struct Layer {
    heads: Vec<Head>,
    /// Of the values of the salient positions and of the others, in order: rows are shared by the heads.
    value_grids: [Vec<Grid>; 2],
    /// Probing steps since positions were last quantised.
    probes: u32,
    /// Probing steps before each recent position.
    probes_before: Vec<u32>,
}

struct Head {
    /// Which of the quantised positions are salient.
    salient: Bits,
    /// Of the salient positions, and of the others.
    keys: [Option<ByChannel>; 2],
    values: [PackedRows; 2],
    /// What values were divided by, `[m]`.
    value_scales: Vec<f16>,
    /// Positions that are not quantised yet.
    recent_keys: DenseRows,
    recent_values: DenseRows,
    /// Attention that each recent position has got from probing steps.
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
        let word = |bits: &[bool]| {
            let bits = bits.iter().enumerate();
            bits.fold(0, |word, (i, &bit)| word | u64::from(bit) << i)
        };
        Self {
            words: bits.chunks(64).map(word).collect(),
            len: bits.len(),
        }
    }

    fn get(&self, at: usize) -> bool {
        self.words[at / 64] >> (at % 64) & 1 == 1
    }

    /// How many are set before `at`.
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
    head_dim: usize,
}

impl Positions for Past<'_> {
    fn len(&self) -> usize {
        self.head.salient.len
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let salient = self.head.salient.set_before(first);
        // The next row of the salient positions, and of the others.
        let mut rows = [salient, first - salient];
        let mut codes = vec![0; self.head_dim];
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
    fn new(settings: Settings, head_dim: usize) -> Self {
        let rows = || DenseRows::new(head_dim, NumberType::F16);
        Self {
            salient: Bits::default(),
            keys: [None, None],
            values: settings.bits.map(|bits| PackedRows::new(bits, head_dim)),
            value_scales: Vec::new(),
            recent_keys: rows(),
            recent_values: rows(),
            attention: Vec::new(),
        }
    }

    /// Quantises the keys of all positions, and brings their values to one scale.
    fn quantise_keys(&mut self, keys: &[f32], values: &mut [f32], settings: Settings, m: usize) {
        for (class, bits) in settings.bits.into_iter().enumerate() {
            let positions = keys.chunks_exact(m).enumerate();
            let own = positions.filter(|&(at, _)| self.salient.get(at) == (class == 0));
            let own: Vec<f32> = own.flat_map(|(_, key)| key).copied().collect();
            self.keys[class] = (!own.is_empty()).then(|| {
                let mut coded = ByChannel::new(bits, m, own.len() / m);
                coded.extend(&own);
                coded
            });
        }
        let scale = |channel: usize| {
            let numbers = values.iter().skip(channel).step_by(m);
            let most = numbers.fold(0f32, |most, &x| most.max(held(x).abs()));
            let scale = f16::from_f32(most.sqrt());
            if scale > f16::ZERO { scale } else { f16::ONE }
        };
        self.value_scales = (0..m).map(scale).collect();
        for value in values.chunks_exact_mut(m) {
            let scaled = value.iter_mut().zip(&self.value_scales);
            scaled.for_each(|(x, scale)| *x = held(*x) / scale.to_f32());
        }
    }

    fn bytes(&self) -> usize {
        let keys = self.keys.iter().flatten().map(ByChannel::bytes);
        let values = self.values.iter().map(PackedRows::bytes);
        self.salient.words.capacity() * size_of::<u64>()
            + self.value_scales.capacity() * size_of::<f16>()
            + keys.sum::<usize>()
            + values.sum::<usize>()
    }
}

/// Which of some new positions are salient: the `count` that got most attention for each of the probing queries that saw
/// them; of those that got the same, the newer.
fn most_salient(attention: &[f32], probes: &[u32], count: usize) -> Vec<bool> {
    let mean = |at: usize| f64::from(attention[at]) / f64::from(probes[at].max(1));
    let mut order: Vec<usize> = (0..attention.len()).collect();
    order.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)).then(b.cmp(&a)));
    let mut salient = vec![false; attention.len()];
    order[..count].iter().for_each(|&at| salient[at] = true);
    salient
}

/// Queries that are scored at a time.
const ROWS: usize = 64;

/// Adds up the attention that the positions from `from` on, of those with these `keys` `[n, m]`, get from queries
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
            let most = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let scale = 1.0 / (m as f32).sqrt();
            let weight = |score: f32| ((score - most) * scale).exp();
            let sum: f32 = seen.iter().map(|&score| weight(score)).sum();
            for position in first.max(from)..=at {
                attention[position - from] += weight(scores[position]) / sum;
            }
        }
    }
    Ok(())
}

impl Layer {
    fn past(&self, head_dim: usize) -> Vec<Past<'_>> {
        let past = |head| Past {
            head,
            value_grids: &self.value_grids,
            head_dim,
        };
        self.heads.iter().map(past).collect()
    }

    /// Quantises all positions, of which `[n, m]` keys and values are given for each head.
    fn quantise(
        &mut self,
        keys: &[Vec<f32>],
        values: &mut [Vec<f32>],
        settings: Settings,
        m: usize,
    ) {
        let heads = self
            .heads
            .iter_mut()
            .zip(keys.iter().zip(values.iter_mut()));
        for (head, (keys, values)) in heads {
            head.quantise_keys(keys, values, settings, m);
        }
        let heads = &mut self.heads;
        for (class, bits) in settings.bits.into_iter().enumerate() {
            // The positions of this class, head by head: as many in each but where some have left a sliding window.
            let rows: Vec<Vec<usize>> = heads
                .iter()
                .map(|head| {
                    let positions = 0..head.salient.len;
                    let own = positions.filter(|&at| head.salient.get(at) == (class == 0));
                    own.collect()
                })
                .collect();
            let count = rows.iter().map(Vec::len).max().unwrap_or(0);
            let value = |head: usize, at: usize| &values[head][at * m..(at + 1) * m];
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
}

impl ZipCache {
    fn new(config: &Config, settings: Settings) -> Self {
        let layer = |_| Layer {
            heads: (0..config.kv_heads)
                .map(|_| Head::new(settings, config.head_dim))
                .collect(),
            value_grids: [Vec::new(), Vec::new()],
            probes: 0,
            probes_before: Vec::new(),
        };
        Self {
            layers: (0..config.layers).map(layer).collect(),
            settings,
            head_dim: config.head_dim,
            sliding_window: config.window,
            positions: 0,
            rng: ChaCha8Rng::seed_from_u64(0),
        }
    }

    /// Which of `t` new queries probe, in order.
    fn draw_probes(&mut self, t: usize, recent: usize) -> Vec<usize> {
        if t == 1 {
            let gap = self.settings.gap;
            let last = recent + 1 > gap - gap / 20;
            return if last || self.rng.random_bool(0.05) {
                vec![0]
            } else {
                Vec::new()
            };
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

    /// Takes a step's positions: adds up what attention its probing queries pay, and quantises where it is time to.
    fn take(&mut self, layer: usize, step: &Step) -> Result<()> {
        let m = self.head_dim;
        let settings = self.settings;
        let (heads, t, _) = step.shape;
        let group = heads / self.layers[layer].heads.len();
        let recent = self.layers[layer].probes_before.len();
        let probes = self.draw_probes(t, recent);
        let full = t > 1 || recent + 1 >= settings.gap;
        let layer = &mut self.layers[layer];
        let mut passed = probes.iter().peekable();
        grow(&mut layer.probes_before, t, 1);
        for i in 0..t {
            layer.probes_before.push(layer.probes);
            if passed.next_if_eq(&&i).is_some() {
                layer.probes += 1;
            }
        }
        let (mut all_keys, mut all_values) = (Vec::new(), Vec::new());
        if full || !probes.is_empty() {
            for (past, (new_keys, new_values)) in layer.past(m).into_iter().zip(step.heads()) {
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                past.read(0, past.len(), &mut keys, &mut values);
                past.head.recent_keys.read(0, recent, &mut keys);
                past.head.recent_values.read(0, recent, &mut values);
                keys.extend_from_slice(new_keys);
                values.extend_from_slice(new_values);
                all_keys.push(keys);
                all_values.push(values);
            }
        }
        let queries = step.queries.chunks_exact(group * t * m);
        for (number, (head, queries)) in layer.heads.iter_mut().zip(queries).enumerate() {
            grow(&mut head.attention, t, 1);
            head.attention.resize(recent + t, 0.0);
            let Some(keys) = all_keys.get(number) else {
                continue;
            };
            let from = head.salient.len;
            let before = keys.len() / m - t;
            let at: Vec<usize> = probes.iter().map(|probe| before + probe).collect();
            for queries in queries.chunks_exact(t * m) {
                let probing = probes.iter().flat_map(|probe| &queries[probe * m..][..m]);
                let probing: Vec<f32> = probing.copied().collect();
                let window = self.sliding_window;
                add_attention(&probing, &at, keys, window, from, &mut head.attention, m)?;
            }
        }
        if !full {
            for (head, (keys, values)) in layer.heads.iter_mut().zip(step.heads()) {
                head.recent_keys.extend(keys);
                head.recent_values.extend(values);
            }
            return Ok(());
        }
        // What the next query no longer sees is not quantised anew.
        let held = all_keys.first().map_or(0, Vec::len) / m;
        let unseen = self
            .sliding_window
            .map_or(0, |w| held.saturating_sub(w.saturating_sub(1)));
        for numbers in all_keys.iter_mut().chain(&mut all_values) {
            numbers.drain(..unseen * m);
        }
        let since = |&before: &u32| layer.probes - before;
        let seen_by: Vec<u32> = layer.probes_before.iter().map(since).collect();
        for head in &mut layer.heads {
            let old = head.salient.len;
            let kept_old = (unseen.min(old)..old).map(|at| head.salient.get(at));
            let new = unseen.saturating_sub(old)..;
            let count = settings.salient_of(seen_by[new.clone()].len());
            let kept_new = most_salient(&head.attention[new.clone()], &seen_by[new], count);
            let all: Vec<bool> = kept_old.chain(kept_new).collect();
            *head = Head {
                salient: Bits::new(&all),
                ..Head::new(settings, m)
            };
        }
        layer.quantise(&all_keys, &mut all_values, settings, m);
        layer.probes = 0;
        layer.probes_before = Vec::new();
        Ok(())
    }
}

impl KvCache for ZipCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        let past = self.layers[layer].past(self.head_dim);
        let out = step.attend(&past, self.sliding_window, |past| {
            vec![
                Source::Decoded(past),
                Source::Dense {
                    keys: &past.head.recent_keys,
                    values: &past.head.recent_values,
                },
            ]
        })?;
        self.take(layer, &step)?;
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let mut decoded = Decoded::default();
        let own = &self.layers[layer];
        for past in own.past(self.head_dim) {
            past.read(0, past.len(), &mut decoded.keys, &mut decoded.values);
            let head = past.head;
            decoded.keys.extend(head.recent_keys.to_f32());
            decoded.values.extend(head.recent_values.to_f32());
            let keys = head.keys.iter().flatten().map(ByChannel::bytes);
            decoded.bytes[0] += keys.sum::<usize>() + head.recent_keys.bytes();
            let values = head.values.iter().map(PackedRows::bytes);
            decoded.bytes[1] += values.sum::<usize>() + head.recent_values.bytes();
        }
        let grids = own.value_grids.iter().map(Vec::capacity);
        decoded.bytes[1] += grids.sum::<usize>() * size_of::<Grid>();
        Ok(Some(decoded))
    }

    fn footprint(&self) -> Footprint {
        let heads = || self.layers.iter().flat_map(|layer| &layer.heads);
        let grids = self.layers.iter().flat_map(|layer| &layer.value_grids);
        let grids = grids.map(|grids| grids.capacity() * size_of::<Grid>());
        let recent = heads().map(|head| head.recent_keys.bytes() + head.recent_values.bytes());
        let attention = heads().map(|head| head.attention.capacity() * size_of::<f32>());
        let probes = self
            .layers
            .iter()
            .map(|layer| layer.probes_before.capacity());
        Footprint {
            parts: vec![
                (
                    "codes",
                    heads().map(Head::bytes).sum::<usize>() + grids.sum::<usize>(),
                ),
                ("recent", recent.sum()),
                (
                    "attention",
                    attention.sum::<usize>() + probes.sum::<usize>() * size_of::<u32>(),
                ),
                (
                    "bookkeeping",
                    self.layers.len() * size_of::<Layer>() + heads().count() * size_of::<Head>(),
                ),
            ],
        }
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
            let settings = Settings { salient: 0.5, bits: [8, 4], gap: 100 };
            let head = |salient: &Vec<bool>| Head { salient: Bits::new(salient), ..Head::new(settings, m) };
            let mut layer = Layer {
                heads: salient.iter().map(head).collect(),
                value_grids: [Vec::new(), Vec::new()],
                probes: 0,
                probes_before: Vec::new(),
            };
            let (keys, values) = numbers.split_at(2);
            layer.quantise(keys, &mut values.to_vec(), settings, m);
            for (past, (salient, (keys, values))) in layer.past(m).iter().zip(salient.iter().zip(keys.iter().zip(values))) {
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
