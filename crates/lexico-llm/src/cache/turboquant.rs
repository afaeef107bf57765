use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use ::lexico::KeyValue;
use candle_core::{Device, Tensor};
use half::f16;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bits::{PackedRows, grow, row_bytes};
use super::dense_parts::{DENSE_LAYERS, DenseParts, SINKS, WithSinks};
use super::method::{Lengths, Method, Values, option};
use super::stored::{CodedHead, CodedVectors, Place, StoredCache, StoredLayer};
use super::uniform::held;
use super::{CacheContext, CacheSpec, Decoded, Step};
use crate::config::Config;
use crate::error::Result;

pub(super) static METHOD: Method = Method {
    name: "turboquant",
    summary: "TurboQuant: vectors rotated at random, each coordinate on the best few numbers",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("bits", Values::Number, "2.5").about(
            "bits a number, 1 to 4; a fraction is the share of channels, the largest, that get \
             one more",
        ),
        option("norm", Values::OneOf(&["kept", "eden"]), "kept")
            .about(
                "norm stored: the vector's (as published), or EDEN's, which keeps its product with \
                 the vector",
            )
            .with_aliases(&[("corrected", "eden")]),
        option("window", Values::Count, "0").about("newest positions, kept dense"),
        SINKS,
        DENSE_LAYERS,
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context)?;
        Ok(Box::new(cache(context.config, settings)?))
    },
    bytes: |spec, context, lengths| Ok(Settings::new(spec, context)?.bytes(context.config, lengths)),
    settings: |_, context, budget| {
        let mut settings = Vec::new();
        for bits in ["4", "3.5", "3", "2.5", "2", "1.5", "1"] {
            for window in budget.windows(context.config).chain([0]) {
                settings.push(vec![
                    ("bits", bits.to_owned()),
                    ("window", window.to_string()),
                ]);
            }
        }
        settings
    },
};

#[derive(Debug, Clone, Copy)]
struct Settings {
    /// Bits of all channels but the outliers.
    bits: u32,
    /// Channels that have one bit more.
    outliers: usize,
    /// True for EDEN's norms, which keep the product with the vector.
    eden: bool,
    window: usize,
    dense: DenseParts,
}

impl Settings {
    fn new(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Self> {
        let bits: f64 = spec.number("bits")?;
        if !(1.0..=4.0).contains(&bits) {
            return Err(spec.refused("bits", "it must be from 1 to 4"));
        }
        let m = context.config.head_dim;
        let outliers = (bits.fract() * m as f64).round() as usize;
        // A coordinate of a rotated vector of one number is a sign, to which no codebook fits.
        if m < 2 || (bits.fract() > 0.0 && !(2..=m.saturating_sub(2)).contains(&outliers)) {
            let reason = format!(
                "of the {m} channels {outliers} would have one bit more; neither they nor the rest may be less than 2"
            );
            return Err(spec.refused("bits", reason));
        }
        Ok(Self {
            bits: bits as u32,
            outliers,
            eden: spec.text("norm") == "eden",
            window: spec.number("window")?,
            dense: DenseParts::new(spec, context.config)?,
        })
    }

    /// Bits and channels of the outliers, where there are any, and of the rest.
    fn parts(self, head_dim: usize) -> impl Iterator<Item = (u32, usize)> {
        let outliers = (self.outliers > 0).then_some((self.bits + 1, self.outliers));
        let rest = (self.bits, head_dim - self.outliers);
        outliers.into_iter().chain([rest])
    }

    fn bytes(self, config: &Config, lengths: Lengths) -> f64 {
        let m = config.head_dim;
        let vector = |(bits, width)| row_bytes(bits, width) + size_of::<f16>();
        let vector: usize = self.parts(m).map(vector).sum();
        let channels = if self.outliers > 0 { m } else { 0 };
        let parts = self.parts(m).count() * size_of::<Coded>();
        let more = config.layers * config.kv_heads * 2 * (channels + parts);
        let head = |l| CodedHead::<Rotated>::expected_bytes(config, l, self.window, 2 * vector);
        let heads = self
            .dense
            .expected_bytes::<CodedHead<Rotated>>(config, lengths, head);
        heads + more as f64
    }
}

/// A layer whose vectors are rotated at random, its coordinates rounded to a codebook made for them, and its norm.
///
/// Zandieh et al.: *TurboQuant* (2025), the variant of least squared error (Algorithm 1) for keys and values. The paper does
/// not say which of its two variants its KV caches use; of the other one (Algorithm 2), which spends a bit on signs of
/// projections so that products are unbiased, independent implementations report that it is far worse in caches, as its
/// variance goes through the exponential of the softmax. No position is dense unless asked: those of a step attend at
/// full precision to each other, and are quantised right after.
///
/// With a fraction of a bit some channels have one bit more: those of each head that are largest in the first positions
/// read, as in QJL (Zandieh et al. 2024), to which the paper refers. They and the rest are two vectors with a rotation
/// and a norm each. The paper counts 32 of 128 channels with 3 bits, the others with 2, as 2.5 bits: that is 2.25 here, and
/// 2.5 with the two norms of 16 bits.
///
/// Rounding to the means of cells shrinks vectors: `⟨x, x̂⟩ < ‖x‖²`, and with it all scores. `norm=eden` scales `x̂` so that
/// they are equal; it takes no bytes. The scale is that of EDEN (Vargaftik et al.: *EDEN: Communication-Efficient and Robust
/// Distributed Mean Estimation for Federated Learning*, ICML 2022), which codes rotated vectors in the same way;
/// TurboQuant without it is EDEN with another scale (arXiv 2604.18555).
///
/// A layer's attention works on rotated queries, keys and values, so that nothing is rotated back but its output.
/// Rotations depend on nothing but the head dim: all caches share them, and like dictionaries they are not among a cache's
/// bytes.
struct Layer {
    heads: Vec<Head>,
}

/// The rotated keys and values of a KV head.
type Head = WithSinks<CodedHead<Rotated>>;

/// Settings, rotations and codebooks, which all layers use.
struct Shared {
    settings: Settings,
    /// Rotation of the outliers, where there are any, and of the rest.
    rotations: Vec<Rotation>,
    codebooks: Vec<Arc<Codebook>>,
    head_dim: usize,
}

/// The keys, or the values, of a KV head, rotated.
struct Rotated {
    /// True for channels that are outliers, where any are to be, from the first step on.
    outliers: Vec<bool>,
    /// Channels of the outliers, where there are any, and the rest.
    coded: Vec<Coded>,
}

/// Some channels of rotated vectors.
struct Coded {
    codebook: Arc<Codebook>,
    codes: PackedRows,
    /// Factors of the centroids, which have the scale of a vector of norm `√width`.
    norms: Vec<f16>,
}

impl Coded {
    /// Appends rotated vectors.
    fn extend<'v>(&mut self, vectors: impl ExactSizeIterator<Item = &'v [f32]>) {
        let width = self.codes.width;
        grow(&mut self.norms, vectors.len(), 1);
        let mut codes = Vec::with_capacity(vectors.len() * width);
        for vector in vectors {
            self.norms.push(self.codebook.encode(vector, &mut codes));
        }
        self.codes.extend(&codes);
    }

    /// Appends a rotated vector to `out`.
    fn read(&self, row: usize, codes: &mut [u8], out: &mut Vec<f32>) {
        let norm = self.norms[row].to_f32();
        self.codes.read(row, codes);
        let centroids = &self.codebook.centroids;
        let numbers = codes.iter().map(|&code| centroids[usize::from(code)]);
        out.extend(numbers.map(|x| x * norm));
    }
}

impl Rotated {
    fn new(settings: Settings, codebooks: &[Arc<Codebook>], head_dim: usize) -> Self {
        let coded = settings.parts(head_dim).zip(codebooks);
        let coded = coded.map(|((bits, width), codebook)| Coded {
            codebook: Arc::clone(codebook),
            codes: PackedRows::new(bits, width),
            norms: Vec::new(),
        });
        Self {
            outliers: Vec::new(),
            coded: coded.collect(),
        }
    }

    /// The channels as they are in rotated vectors: the outliers before the rest.
    fn order(&self, head_dim: usize) -> Vec<usize> {
        let mut channels: Vec<usize> = (0..head_dim).collect();
        channels.sort_by_key(|&channel| self.outliers.get(channel) != Some(&true));
        channels
    }
}

impl CodedVectors for Rotated {
    fn empty(&self) -> Self {
        let coded = self.coded.iter().map(|coded| Coded {
            codebook: Arc::clone(&coded.codebook),
            codes: PackedRows::new(coded.codes.bits, coded.codes.width),
            norms: Vec::new(),
        });
        Self {
            outliers: self.outliers.clone(),
            coded: coded.collect(),
        }
    }

    fn len(&self) -> usize {
        self.coded.first().map_or(0, |coded| coded.codes.len())
    }

    fn extend(&mut self, vectors: &[f32]) {
        let m = self.coded.iter().map(|coded| coded.codes.width).sum();
        let mut first = 0;
        for coded in &mut self.coded {
            let own = first..first + coded.codes.width;
            first = own.end;
            coded.extend(vectors.chunks_exact(m).map(|v| &v[own.clone()]));
        }
    }

    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let codes = |coded: &Coded| vec![0; coded.codes.width];
        let mut codes: Vec<_> = self.coded.iter().map(codes).collect();
        for row in first..first + count {
            for (coded, codes) in self.coded.iter().zip(&mut codes) {
                coded.read(row, codes, out);
            }
        }
    }

    fn drop_front(&mut self, count: usize) {
        for coded in &mut self.coded {
            coded.codes.drop_front(count);
            coded.norms.drain(..count);
        }
    }

    fn bytes(&self) -> usize {
        let bytes = |c: &Coded| c.codes.bytes() + c.norms.capacity() * size_of::<f16>();
        self.coded.iter().map(bytes).sum()
    }
}

/// The `count` channels of vectors `[n, m]` whose squares sum up to most.
fn largest_channels(vectors: &[f32], head_dim: usize, count: usize) -> Vec<bool> {
    let mut sums = vec![0f64; head_dim];
    for vector in vectors.chunks_exact(head_dim) {
        let squares = vector.iter().map(|&x| f64::from(x).powi(2));
        sums.iter_mut().zip(squares).for_each(|(sum, x)| *sum += x);
    }
    let mut channels: Vec<usize> = (0..head_dim).collect();
    channels.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]));
    let mut largest = vec![false; head_dim];
    channels.iter().take(count).for_each(|&c| largest[c] = true);
    largest
}

/// The best few numbers for a coordinate of a vector that is uniform on the sphere of norm `√width`, close to the
/// standard normal distribution for many coordinates.
#[derive(Debug)]
struct Codebook {
    /// Numbers that codes stand for, rising.
    centroids: Vec<f32>,
    /// Bounds of the codes, half way between each centroid and the next.
    bounds: Vec<f32>,
    /// True for EDEN's norms.
    eden: bool,
}

impl Codebook {
    /// The algorithm of Lloyd (1957, published 1982) and Max (1960) on the distribution itself: coordinates are
    /// `√width·sin θ` with a density of `θ` proportional to `cos^(width − 2) θ`, for a `width` of 2 or more.
    fn new(bits: u32, width: usize, eden: bool) -> Self {
        const CELLS: usize = 1 << 14;
        const ROUNDS: usize = 2000;
        let size = (width as f64).sqrt();
        // Beyond 12 standard deviations there is nothing. Both halves are alike: only the positive one is looked at.
        let end = (12.0 / size).min(std::f64::consts::FRAC_PI_2);
        let cell = end / CELLS as f64;
        // Up to each cell: how much lies there, and the sum of it.
        let mut below = vec![(0.0, 0.0)];
        for i in 0..CELLS {
            let angle = (i as f64 + 0.5) * cell;
            let mass = angle.cos().powf(width as f64 - 2.0);
            let (all, sum) = below[i];
            below.push((all + mass, sum + mass * size * angle.sin()));
        }
        let up_to = |x: f64| {
            let at = ((x / size).min(1.0).asin() / cell).min(CELLS as f64);
            let i = (at as usize).min(CELLS - 1);
            let part = at - i as f64;
            let ((all, sum), (next_all, next_sum)) = (below[i], below[i + 1]);
            (all + part * (next_all - all), sum + part * (next_sum - sum))
        };
        let count = 1 << (bits - 1);
        let mut centroids: Vec<f64> = (0..count)
            .map(|i| {
                let share = (i as f64 + 0.5) / count as f64 * below[CELLS].0;
                let angle = below.partition_point(|&(all, _)| all < share) as f64 * cell;
                size * angle.sin()
            })
            .collect();
        for _ in 0..ROUNDS {
            let mut from = (0.0, 0.0);
            for i in 0..count {
                let to = match centroids.get(i + 1) {
                    Some(next) => up_to((centroids[i] + next) / 2.0),
                    None => below[CELLS],
                };
                centroids[i] = (to.1 - from.1) / (to.0 - from.0);
                from = to;
            }
        }
        let negative = centroids.iter().rev().map(|&x| -x as f32);
        let positive = centroids.iter().map(|&x| x as f32);
        let centroids: Vec<f32> = negative.chain(positive).collect();
        let bounds = centroids.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        Self {
            bounds: bounds.collect(),
            centroids,
            eden,
        }
    }

    /// Appends the codes of a vector; returns what its centroids are to be multiplied by.
    fn encode(&self, vector: &[f32], codes: &mut Vec<u8>) -> f16 {
        let squares: f64 = vector.iter().map(|&x| f64::from(x).powi(2)).sum();
        let norm = (squares / vector.len() as f64).sqrt();
        let scale = if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 };
        let mut product = 0.0;
        codes.extend(vector.iter().map(|&x| {
            let unit = x * scale;
            let code = self.bounds.iter().filter(|&&bound| unit > bound).count();
            product += f64::from(x) * f64::from(self.centroids[code]);
            code as u8
        }));
        let eden = self.eden && product > 0.0;
        let norm = if eden { squares / product } else { norm };
        f16::from_f64(norm.min(f16::MAX.to_f64()))
    }
}

/// A rotation drawn at random, the same for all vectors of a width.
#[derive(Clone)]
struct Rotation {
    width: usize,
    /// `[width, width]`, orthogonal
    matrix: Tensor,
}

impl Rotation {
    fn of(width: usize) -> Result<Self> {
        static DRAWN: Mutex<BTreeMap<usize, Rotation>> = Mutex::new(BTreeMap::new());
        let mut drawn = DRAWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rotation) = drawn.get(&width) {
            return Ok(rotation.clone());
        }
        let rows = orthogonal(width, &mut ChaCha8Rng::seed_from_u64(width as u64));
        let numbers: Vec<f32> = rows.iter().flatten().map(|&x| x as f32).collect();
        let rotation = Self {
            width,
            matrix: Tensor::from_vec(numbers, (width, width), &Device::Cpu)?,
        };
        drawn.insert(width, rotation.clone());
        Ok(rotation)
    }

    /// Rotates vectors `[n, width]`, or rotates them back.
    fn turn(&self, vectors: Vec<f32>, back: bool) -> Result<Vec<f32>> {
        let shape = (vectors.len() / self.width, self.width);
        let vectors = Tensor::from_vec(vectors, shape, &Device::Cpu)?;
        let matrix = if back {
            self.matrix.t()?
        } else {
            self.matrix.clone()
        };
        Ok(vectors.matmul(&matrix)?.flatten_all()?.to_vec1()?)
    }
}

/// Rows that are orthogonal and of length 1: those of a Gaussian matrix, by Gram and Schmidt (a QR decomposition).
fn orthogonal(width: usize, rng: &mut impl Rng) -> Vec<Vec<f64>> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(width);
    while rows.len() < width {
        let mut row: Vec<f64> = (0..width).map(|_| gaussian(rng)).collect();
        // Twice: once leaves what rounding leaves.
        for other in rows.iter().chain(&rows) {
            let along = dot(&row, other);
            row.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
        }
        let norm = dot(&row, &row).sqrt();
        // As good as never: a row within the span of the others is drawn anew.
        if norm > 1e-6 {
            row.iter_mut().for_each(|x| *x /= norm);
            rows.push(row);
        }
    }
    rows
}

/// A number of the standard normal distribution (Box and Muller 1958).
pub(super) fn gaussian(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

fn cache(config: &Config, settings: Settings) -> Result<StoredCache<Layer>> {
    let m = config.head_dim;
    let codebook = |(bits, width)| Arc::new(Codebook::new(bits, width, settings.eden));
    let codebooks: Vec<_> = settings.parts(m).map(codebook).collect();
    let rotation = |(_, width)| Rotation::of(width);
    let shared = Shared {
        settings,
        rotations: settings.parts(m).map(rotation).collect::<Result<_>>()?,
        codebooks: codebooks.clone(),
        head_dim: m,
    };
    let rotated = || Rotated::new(settings, &codebooks, m);
    let head = |layer| {
        let coded = KeyValue::new(rotated(), rotated());
        settings
            .dense
            .around(layer, m, CodedHead::new(m, settings.window, coded))
    };
    let layer = |layer| Layer {
        heads: (0..config.kv_heads).map(|_| head(layer)).collect(),
    };
    Ok(StoredCache::with_layers(config, shared, layer))
}

impl Shared {
    /// Vectors `[n, m]` rotated as those of `as_in` are, or back.
    fn turn(&self, as_in: &Rotated, vectors: &[f32], back: bool) -> Result<Vec<f32>> {
        let m = self.head_dim;
        let order = as_in.order(m);
        let mut out = vec![0.0; vectors.len()];
        let mut first = 0;
        for rotation in &self.rotations {
            let turned: Vec<usize> = (first..first + rotation.width).collect();
            let plain = &order[first..first + rotation.width];
            let mut channels = [plain, &turned];
            if back {
                channels.reverse();
            }
            let [from, to] = channels;
            let vectors = vectors.chunks_exact(m);
            let taken = vectors.flat_map(|vector| from.iter().map(|&channel| vector[channel]));
            let rows = rotation.turn(taken.collect(), back)?;
            let rows = rows.chunks_exact(rotation.width);
            for (out, row) in out.chunks_exact_mut(m).zip(rows) {
                for (&channel, &x) in to.iter().zip(row) {
                    out[channel] = x;
                }
            }
            first += rotation.width;
        }
        Ok(out)
    }
}

impl StoredLayer for Layer {
    type Shared = Shared;

    fn attend(&mut self, shared: &mut Shared, step: &Step, at: Place) -> Result<Tensor> {
        let Shared {
            settings, head_dim, ..
        } = *shared;
        // What f16 does not hold is no norm either.
        let held = |x: &[f32]| x.iter().map(|&x| held(x)).collect::<Vec<f32>>();
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let new = step.queries().zip(step.heads());
        for (head, (head_queries, vectors)) in self.heads.iter_mut().zip(new) {
            let vectors = vectors.map(held);
            for (rotated, vectors) in head.rest.coded.as_mut().zip(vectors.as_ref()) {
                if settings.outliers > 0 && rotated.outliers.is_empty() {
                    rotated.outliers = largest_channels(vectors, head_dim, settings.outliers);
                }
            }
            queries.extend(shared.turn(&head.rest.coded.keys, head_queries, false)?);
            keys.extend(shared.turn(&head.rest.coded.keys, &vectors.keys, false)?);
            values.extend(shared.turn(&head.rest.coded.values, &vectors.values, false)?);
        }
        let rotated = Step {
            queries,
            keys,
            values,
            shape: step.shape,
        };
        let out = self.heads.attend(&mut (), &rotated, at)?;
        let out = self.turned_back(shared, &out.flatten_all()?.to_vec1()?, |head| &head.values)?;
        Ok(Tensor::from_vec(out, step.shape, &Device::Cpu)?)
    }

    fn decoded(&self, shared: &Shared) -> Result<Option<Decoded>> {
        let Some(rotated) = self.heads.decoded(&())? else {
            return Ok(None);
        };
        Ok(Some(Decoded {
            keys: self.turned_back(shared, &rotated.keys, |head| &head.keys)?,
            values: self.turned_back(shared, &rotated.values, |head| &head.values)?,
            bytes: rotated.bytes,
        }))
    }

    fn bytes(&self) -> Vec<(&'static str, usize)> {
        let mut parts = self.heads.bytes();
        let rotated = self.heads.iter().flat_map(|head| head.rest.coded.as_ref());
        let more = rotated.map(|r| r.outliers.capacity() + r.coded.capacity() * size_of::<Coded>());
        parts.push(("bookkeeping", more.sum()));
        parts
    }

    fn shared_bytes(shared: &Shared) -> Vec<(&'static str, usize)> {
        let codebooks = shared.codebooks.iter();
        let numbers = codebooks.map(|c| c.centroids.capacity() + c.bounds.capacity());
        vec![("codebooks", numbers.sum::<usize>() * size_of::<f32>())]
    }
}

impl Layer {
    /// Numbers of all heads, `[kv_heads, …]`, rotated back as each head's vectors of `part` are.
    fn turned_back(
        &self,
        shared: &Shared,
        rotated: &[f32],
        part: impl Fn(&KeyValue<Rotated>) -> &Rotated,
    ) -> Result<Vec<f32>> {
        let mut out = Vec::with_capacity(rotated.len());
        let own = rotated.chunks_exact((rotated.len() / self.heads.len()).max(1));
        for (head, rotated) in self.heads.iter().zip(own) {
            out.extend(shared.turn(part(&head.rest.coded), rotated, true)?);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_are_orthogonal() -> Result<()> {
        for width in [2, 3, 64, 96] {
            let rotation = Rotation::of(width)?;
            let mut unit = vec![0f32; width * width];
            (0..width).for_each(|i| unit[i * width + i] = 1.0);
            let back = rotation.turn(rotation.turn(unit.clone(), false)?, true)?;
            for (a, b) in back.iter().zip(&unit) {
                assert!((a - b).abs() < 1e-5, "{width}: {a} and {b}");
            }
        }
        Ok(())
    }

    /// Max, *Quantizing for Minimum Distortion* (1960), table I.
    #[test]
    fn codebooks_are_those_of_the_normal_distribution() {
        for (bits, expected) in [
            (1, &[0.7980][..]),
            (2, &[0.4528, 1.510]),
            (3, &[0.2451, 0.7560, 1.344, 2.152]),
            (
                4,
                &[0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
            ),
        ] {
            let centroids = Codebook::new(bits, 1 << 20, false).centroids;
            let (negative, positive) = centroids.split_at(expected.len());
            for ((positive, negative), expected) in
                positive.iter().zip(negative.iter().rev()).zip(expected)
            {
                assert_eq!(*positive, -negative);
                assert!(
                    (positive - expected).abs() < 1e-3,
                    "{bits} bits: {centroids:?}"
                );
            }
        }
    }

    /// Two coordinates are the cosine and sine of a uniform angle: one bit is the mean of half a circle, `√2·2/π`.
    #[test]
    fn codebook_of_two_coordinates() {
        let centroids = Codebook::new(1, 2, false).centroids;
        assert!((f64::from(centroids[1]) - 2.0 * 2f64.sqrt() / std::f64::consts::PI).abs() < 1e-4);
    }

    /// Vectors of a width, drawn from the normal distribution, and what their codes stand for.
    fn coded(bits: u32, width: usize, eden: bool) -> (Vec<f32>, Vec<f32>) {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let vectors: Vec<f32> = (0..2000 * width)
            .map(|_| gaussian(&mut rng) as f32)
            .collect();
        let mut coded = Coded {
            codebook: Arc::new(Codebook::new(bits, width, eden)),
            codes: PackedRows::new(bits, width),
            norms: Vec::new(),
        };
        coded.extend(vectors.chunks_exact(width));
        let (mut codes, mut back) = (vec![0; width], Vec::new());
        (0..2000).for_each(|row| coded.read(row, &mut codes, &mut back));
        (vectors, back)
    }

    /// The paper gives 0.36, 0.117, 0.03 and 0.009 for unit vectors of many dimensions; the digits are Max's (1960).
    #[test]
    fn errors_are_those_of_the_paper() {
        for (bits, expected) in [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)] {
            let (vectors, back) = coded(bits, 512, false);
            let rows = vectors.chunks_exact(512).zip(back.chunks_exact(512));
            let errors = rows.map(|(x, y)| {
                let off: f64 = x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum();
                off / x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>()
            });
            let mean = errors.sum::<f64>() / 2000.0;
            assert!((mean / expected - 1.0).abs() < 0.015, "{bits} bits: {mean}");
        }
    }

    #[test]
    fn norms_of_eden_keep_the_product_with_the_vector() {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let kept = |eden| {
            let (vectors, back) = coded(2, 64, eden);
            let rows = vectors.chunks_exact(64).zip(back.chunks_exact(64));
            rows.map(|(x, y)| dot(x, y) / dot(x, x))
                .collect::<Vec<f32>>()
        };
        // By as much as f16 rounds the norm.
        assert!(kept(true).iter().all(|kept| (kept - 1.0).abs() < 1e-3));
        // Published, a mean of 1 − 0.1175 is kept: centroids are means of their cells.
        let mean = kept(false).iter().sum::<f32>() / 2000.0;
        assert!((mean - 0.8825).abs() < 0.005, "{mean}");
    }

    #[test]
    fn the_largest_channels_are_outliers() {
        let vectors = [1.0, -5.0, 0.5, 2.0, 0.0, 1.0, -3.0, 2.0];
        assert_eq!(largest_channels(&vectors, 4, 2), [false, true, true, false]);
        assert_eq!(largest_channels(&vectors, 4, 3), [false, true, true, true]);
    }
}
