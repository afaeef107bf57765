use std::sync::Arc;

use ::lexico::KeyValue;
use candle_core::Tensor;
use half::f16;
use nalgebra::{DMatrix, SymmetricEigen};

use super::bits::{PackedRows, grow, row_bytes};
use super::dense_parts::{DENSE_LAYERS, DenseParts, WithSinks};
use super::method::{Method, Values, option};
use super::rotation::{RotatedLayer, Rotation, hadamard};
use super::stored::{CodedHead, CodedVectors, Place, StoredCache, StoredLayer};
use super::uniform::held;
use super::{CacheContext, CacheSpec, Decoded, Step};
use crate::error::Result;

/// Keys and values of 2 bits, rotated along what queries look at.
///
/// Zhou et al.: *OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache Quantization* (2026, arXiv 2605.17757),
/// as in the authors' code (FutureMLS-Lab/OSCAR): `rotation/compute_kv_rotation.py` for the rotations, `sglang-research/
/// python/sglang/QuantKernel/oscar_rotation_clip_int2_kv.py` for the code, `rotation/eval_oscar_gpqa.sh` for the settings.
/// - Each layer has a rotation for keys, `R·H·P`: the eigenvectors of the covariance of its queries, a Walsh–Hadamard
///   transform, and a permutation of bits reversed in the order of eigenvalues. That for values is of the covariance of the
///   values, each weighted by `k·Σ·k` of its key and the queries' covariance Σ. Covariances are means over KV heads.
/// - A rotated vector is clipped at the magnitude below which 96 % of its numbers lie (92 % for values), and rounded to 2
///   bits from the smallest to the largest number of each group of 128 channels. Scale and smallest number take 16 bits
///   each, as the authors count them (2.28 bits a number); the script that they run keeps 32.
/// - The first 64 and the newest 256 positions are dense. A prompt attends at full precision.
///
/// The authors calibrate offline, on 30,000 tokens of GPQA, and their rotations belong to the model. So do those of
/// [`Model::calibrate`](crate::Model::calibrate), `--calibration FILE`, on up to 4,096 tokens, which are not among a cache's
/// bytes. Without it a layer finds its own in a cache's first step, the prompt: nearer to what will be coded than another
/// text, and of fewer tokens. They then are the cache's and counted, 8 m² bytes a layer (`rotations` in the footprint).
/// Lloyd–Max codes (`SGLANG_LLOYD_MAX`, off by default) are left out.
pub(super) static METHOD: Method = Method {
    name: "oscar",
    summary: "OSCAR: 2 bits a number, rotated by the covariance of queries",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("group", Values::Count, "128")
            .about("channels that share a scale and a least number"),
        option("k-clip", Values::Number, "0.96")
            .about("share of a key's numbers that is not clipped; 0 clips none"),
        option("v-clip", Values::Number, "0.92")
            .about("share of a value's numbers that is not clipped; 0 clips none"),
        option(
            "rotation",
            Values::OneOf(&["queries", "hadamard"]),
            "queries",
        )
        .about(
            "rotations from the covariance of queries, of the text of --calibration or else of the \
             prompt, or Hadamard alone",
        ),
        option("window", Values::Count, "256").about("newest positions, kept dense"),
        option("sinks", Values::Count, "64").about("first positions, kept dense"),
        DENSE_LAYERS,
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context)?;
        let m = context.config.head_dim;
        let head = |layer| {
            let coded = settings
                .clips
                .map(|clip| Rows::new(m, settings.group, clip));
            let head = CodedHead::new(m, settings.window, coded);
            settings.dense.around(layer, m, head)
        };
        let found = |layer| {
            let calibration = context.calibration.filter(|_| settings.calibrated);
            calibration.and_then(|found| found.rotations(layer).cloned())
        };
        let layer = |layer| Layer {
            rotated: RotatedLayer {
                heads: (0..context.config.kv_heads).map(|_| head(layer)).collect(),
                rotations: found(layer)
                    .unwrap_or_else(|| KeyValue::new(Rotation::Hadamard(m), Rotation::Hadamard(m))),
            },
            calibrates: settings.calibrates,
            own: settings.calibrates,
        };
        Ok(Box::new(StoredCache::with_layers(
            context.config,
            (),
            layer,
        )))
    },
    bytes: |spec, context, lengths| {
        let (settings, config) = (Settings::new(spec, context)?, context.config);
        let m = config.head_dim;
        let vector = row_bytes(2, m) + m.div_ceil(settings.group) * size_of::<Grid>();
        let head = |l| CodedHead::<Rows>::expected_bytes(config, l, settings.window, 2 * vector);
        let heads = settings
            .dense
            .expected_bytes::<CodedHead<Rows>>(config, lengths, head);
        let matrices = if settings.calibrates {
            2 * matrix_bytes(m)
        } else {
            0
        };
        Ok(heads + (config.layers * (size_of::<Layer>() + matrices)) as f64)
    },
    settings: |_, _, _| {
        let mut settings = Vec::new();
        for window in ["256", "128", "64", "32", "16"] {
            for sinks in ["64", "32", "16", "4"] {
                settings.push(vec![
                    ("window", window.to_owned()),
                    ("sinks", sinks.to_owned()),
                ]);
            }
        }
        settings
    },
};

/// Bytes of a rotation: its numbers, and the two counts that are kept with what is shared.
fn matrix_bytes(head_dim: usize) -> usize {
    head_dim * head_dim * size_of::<f32>() + 2 * size_of::<usize>()
}

#[derive(Clone, Copy)]
struct Settings {
    group: usize,
    clips: KeyValue<f64>,
    /// True where rotations are of some covariance.
    calibrated: bool,
    /// True where they are found in the first step.
    calibrates: bool,
    window: usize,
    dense: DenseParts,
}

impl Settings {
    fn new(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Self> {
        let m = context.config.head_dim;
        if !m.is_power_of_two() {
            let reason =
                format!("its Hadamard rotation needs a head dim that is a power of two, not {m}");
            return Err(spec.refused("rotation", reason));
        }
        let clips = KeyValue::new("k-clip", "v-clip").try_map(|name| {
            let clip: f64 = spec.number(name)?;
            if (0.0..=1.0).contains(&clip) {
                Ok(clip)
            } else {
                Err(spec.refused(name, "it is a share and must be from 0 to 1"))
            }
        })?;
        let calibrated = spec.text("rotation") == "queries";
        Ok(Self {
            group: spec.positive("group")?.min(m),
            clips,
            calibrated,
            calibrates: calibrated && context.calibration.is_none(),
            window: spec.number("window")?,
            dense: DenseParts::new(spec, context.config)?,
        })
    }
}

/// A layer whose rotations may be found in its first step.
struct Layer {
    rotated: RotatedLayer<WithSinks<CodedHead<Rows>>>,
    /// True until then, where they are to be found at all.
    calibrates: bool,
    /// True where the rotations are the cache's own.
    own: bool,
}

impl StoredLayer for Layer {
    type Shared = ();

    fn attend(&mut self, shared: &mut (), step: &Step, at: Place) -> Result<Tensor> {
        if std::mem::take(&mut self.calibrates) {
            self.rotated.rotations = rotations(step);
        }
        self.rotated.attend(shared, step, at)
    }

    fn decoded(&self, shared: &()) -> Result<Option<Decoded>> {
        self.rotated.decoded(shared)
    }

    fn bytes(&self) -> Vec<(&'static str, usize)> {
        let mut parts = self.rotated.bytes();
        let both = self.rotated.rotations.as_ref().into_iter();
        let matrices = both.map(|rotation| match rotation {
            Rotation::Matrix(numbers) if self.own => matrix_bytes(numbers.len().isqrt()),
            _ => 0,
        });
        parts.push(("rotations", matrices.sum()));
        parts.push((
            "bookkeeping",
            size_of::<Self>() - size_of_val(&self.rotated),
        ));
        parts
    }
}

/// The rotations of a layer that is given such steps; the Hadamard transform where its numbers are beyond all bounds.
pub(super) fn rotations(step: &Step) -> KeyValue<Rotation> {
    let m = step.shape.2;
    covariances(step).map(|covariance| {
        let composed = composed(covariance);
        composed.map_or(Rotation::Hadamard(m), |numbers| {
            Rotation::Matrix(Arc::from(numbers))
        })
    })
}

/// Covariance of the queries, for keys; of the values, weighted by how much queries look at their keys, for values. Each the
/// mean of the KV heads' own.
fn covariances(step: &Step) -> KeyValue<DMatrix<f64>> {
    let m = step.shape.2;
    let wide = |numbers: &[f32]| {
        let numbers: Vec<f64> = numbers.iter().map(|&x| f64::from(held(x))).collect();
        DMatrix::from_row_slice(numbers.len() / m, m, &numbers)
    };
    let zeros = || DMatrix::zeros(m, m);
    let mut sums = KeyValue::new(zeros(), zeros());
    let mut heads = 0.0;
    for (queries, vectors) in step.queries().zip(step.heads()) {
        let (queries, vectors) = (wide(queries), vectors.map(wide));
        let of_queries = queries.tr_mul(&queries) / queries.nrows() as f64;
        let looked_at = (&vectors.keys * &of_queries).component_mul(&vectors.keys);
        let weights = looked_at.column_sum();
        let total = weights.sum().max(1e-12);
        let mut weighted = vectors.values.clone();
        for (mut row, weight) in weighted.row_iter_mut().zip(&weights) {
            row *= weight / total;
        }
        sums.keys += of_queries;
        sums.values += vectors.values.tr_mul(&weighted);
        heads += 1.0;
    }
    sums.map(|sum| (&sum + sum.transpose()) / (2.0 * f64::max(heads, 1.0)))
}

/// `R·H·P` of a covariance, `[m, m]` line by line; `None` where it has no eigenvectors, as with numbers that are not finite.
fn composed(covariance: DMatrix<f64>) -> Option<Vec<f32>> {
    /// Rounds of the eigenvalues' algorithm a channel: a few are enough.
    const ROUNDS: usize = 100;
    let m = covariance.nrows();
    if covariance.iter().any(|x| !x.is_finite()) {
        return None;
    }
    let eigen = SymmetricEigen::try_new(covariance, f64::EPSILON, ROUNDS * m)?;
    let values = &eigen.eigenvalues;
    let mut rising: Vec<usize> = (0..m).collect();
    rising.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let columns = permutation(m);
    let line = |line: usize| {
        let mut numbers: Vec<f32> = rising
            .iter()
            .map(|&at| eigen.eigenvectors[(line, at)] as f32)
            .collect();
        hadamard(&mut numbers);
        columns.iter().map(|&at| numbers[at]).collect::<Vec<f32>>()
    };
    Some((0..m).flat_map(line).collect())
}

/// For each channel of the result, the one before the permutation: eigenvalues rise, and the largest go to the places with
/// the bits of 0, 1, 2, … reversed, so that neighbours in order come into different groups.
fn permutation(m: usize) -> Vec<usize> {
    let bits = m.trailing_zeros();
    let mut columns = vec![0; m];
    for order in 0..m {
        let place = if bits == 0 {
            0
        } else {
            order.reverse_bits() >> (usize::BITS - bits)
        };
        columns[place] = m - 1 - order;
    }
    columns
}

/// The numbers that codes of a group stand for: `min + code·scale`.
#[derive(Debug, Clone, Copy)]
struct Grid {
    scale: f16,
    min: f16,
}

/// A growing list of clipped vectors of 2 bits a number.
struct Rows {
    codes: PackedRows,
    /// Of each vector one a group.
    grids: Vec<Grid>,
    group: usize,
    /// Share of a vector's numbers that is not clipped.
    clip: f64,
}

impl Rows {
    fn new(head_dim: usize, group: usize, clip: f64) -> Self {
        Self {
            codes: PackedRows::new(2, head_dim),
            grids: Vec::new(),
            group,
            clip,
        }
    }

    /// Grids of a vector.
    fn groups(&self) -> usize {
        self.codes.width.div_ceil(self.group)
    }

    /// Magnitude at which a vector is clipped: the one at the place of `clip` in their order.
    fn limit(&self, vector: &[f32]) -> f32 {
        if self.clip == 0.0 {
            return f32::MAX;
        }
        let mut sizes: Vec<f32> = vector.iter().map(|x| x.abs()).collect();
        sizes.sort_unstable_by(f32::total_cmp);
        let place = (self.clip * sizes.len() as f64) as usize;
        sizes[place.min(sizes.len() - 1)]
    }
}

impl CodedVectors for Rows {
    fn empty(&self) -> Self {
        Self::new(self.codes.width, self.group, self.clip)
    }

    fn len(&self) -> usize {
        self.codes.len()
    }

    fn extend(&mut self, vectors: &[f32]) {
        let (m, groups) = (self.codes.width, self.groups());
        grow(&mut self.grids, vectors.len() / m * groups, groups);
        let mut codes = Vec::with_capacity(vectors.len());
        for vector in vectors.chunks_exact(m) {
            let limit = self.limit(vector);
            for numbers in vector.chunks(self.group) {
                let clipped = numbers.iter().map(|x| x.clamp(-limit, limit));
                let min = clipped.clone().fold(f32::INFINITY, f32::min);
                let max = clipped.clone().fold(f32::NEG_INFINITY, f32::max);
                let scale = (max - min).max(1e-8) / 3.0;
                codes.extend(clipped.map(|x| ((x - min) / scale + 0.5).min(3.0) as u8));
                self.grids.push(Grid {
                    scale: f16::from_f32(held(scale)),
                    min: f16::from_f32(held(min)),
                });
            }
        }
        self.codes.extend(&codes);
    }

    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let groups = self.groups();
        let mut codes = vec![0; self.codes.width];
        for row in first..first + count {
            self.codes.read(row, &mut codes);
            let grids = &self.grids[row * groups..][..groups];
            for (codes, grid) in codes.chunks(self.group).zip(grids) {
                let (scale, min) = (grid.scale.to_f32(), grid.min.to_f32());
                out.extend(codes.iter().map(|&code| min + f32::from(code) * scale));
            }
        }
    }

    fn drop_front(&mut self, count: usize) {
        self.codes.drop_front(count);
        let groups = self.groups();
        self.grids.drain(..count * groups);
    }

    fn bytes(&self) -> usize {
        self.codes.bytes() + self.grids.capacity() * size_of::<Grid>()
    }
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::{config, refusal};
    use super::super::fixture::{M, assert_close, numbers, of, read, vectors};
    use super::*;

    /// The script's layer: two KV heads of 20 positions, with two query heads each.
    fn step() -> Step {
        Step {
            queries: vectors(1000, 80),
            keys: vectors(2000, 40),
            values: vectors(3000, 40),
            shape: (4, 20, M),
        }
    }

    /// Eigenvalues of `compute_qqt` and `compute_sst`; the rotation makes the covariance that of the authors' basis: its
    /// eigenvalues, spread evenly over the diagonal by the Hadamard transform.
    #[test]
    fn rotations_are_of_the_authors_covariances() {
        let fixture = of("oscar");
        for (at, covariance) in covariances(&step()).into_iter().enumerate() {
            let expected = numbers(&fixture["eigenvalues"][at]);
            let mut own: Vec<f64> = SymmetricEigen::new(covariance.clone())
                .eigenvalues
                .iter()
                .copied()
                .collect();
            own.sort_by(f64::total_cmp);
            for (own, expected) in own.iter().zip(&expected) {
                assert!((own - expected).abs() < 1e-9, "{own} for {expected}");
            }
            let rotation: Vec<f64> = composed(covariance.clone())
                .unwrap()
                .iter()
                .map(|&x| f64::from(x))
                .collect();
            let rotation = DMatrix::from_row_slice(M, M, &rotation);
            let unit = rotation.tr_mul(&rotation);
            assert!((&unit - DMatrix::identity(M, M)).abs().max() < 1e-5);
            let turned = rotation.tr_mul(&(covariance * &rotation));
            let mean = expected.iter().sum::<f64>() / M as f64;
            for i in 0..M {
                assert!(
                    (turned[(i, i)] - mean).abs() < 1e-4 * mean,
                    "{}",
                    turned[(i, i)]
                );
            }
        }
    }

    #[test]
    fn numbers_beyond_all_bounds_are_rotated_by_hadamard() {
        let mut step = step();
        step.queries[5] = f32::NAN;
        let KeyValue { keys, values } = rotations(&step);
        assert_eq!(
            (keys, values),
            (Rotation::Hadamard(M), Rotation::Hadamard(M))
        );
    }

    #[test]
    fn channels_are_permuted_as_by_the_authors() {
        let expected = numbers(&of("oscar")["permutation"]);
        let own: Vec<f64> = permutation(M).into_iter().map(|at| at as f64).collect();
        assert_eq!(own, expected);
        assert_eq!(permutation(1), [0]);
    }

    #[test]
    fn vectors_are_clipped_and_rounded_as_by_the_kernels() {
        let fixture = of("oscar");
        for (at, clip) in [0.96, 0.92].into_iter().enumerate() {
            let mut rows = Rows::new(M, M, clip);
            rows.extend(&vectors(7 + at, 1));
            // Scale and least number are rounded to f16 here.
            assert_close(&read(&rows), &numbers(&fixture["int2"][at]), 4e-3);
        }
        let mut rows = Rows::new(4, 2, 0.0);
        rows.extend(&[0.0, 3.0, -8.0, 4.0, 1.0, 1.0, 2.0, 2.0]);
        assert_eq!(read(&rows), [0.0, 3.0, -8.0, 4.0, 1.0, 1.0, 2.0, 2.0]);
    }

    #[test]
    fn impossible_settings_are_refused() {
        assert!(refusal("oscar", &config(1, 1, 1, 24)).contains("power of two"));
        assert!(refusal("oscar:k-clip=2", &config(1, 1, 1, 8)).contains("from 0 to 1"));
        assert!(refusal("oscar:v-clip=NaN", &config(1, 1, 1, 8)).contains("from 0 to 1"));
        assert!(refusal("oscar:group=0", &config(1, 1, 1, 8)).contains("1 or more"));
    }
}
