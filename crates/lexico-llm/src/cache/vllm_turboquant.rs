use std::sync::LazyLock;

use ::lexico::KeyValue;
use half::f16;

use super::bits::{PackedRows, grow, row_bytes};
use super::dense_parts::{DenseParts, SINKS, WithSinks};
use super::fp8::Fp8Rows;
use super::method::{Method, Values, option};
use super::rotation::{RotatedLayer, Rotation};
use super::stored::{CodedHead, CodedVectors, Own, StoredCache};
use super::{CacheContext, CacheSpec};
use crate::error::Result;

/// TurboQuant as it is in vLLM: `--kv-cache-dtype turboquant_4bit_nc` and its like.
///
/// vllm-project/vllm, `vllm/model_executor/layers/quantization/turboquant/` (`config.py`: the presets and the layers
/// skipped; `centroids.py`), `vllm/v1/attention/ops/triton_turboquant_store.py` and `vllm/v1/attention/backends/
/// turboquant_attn.py`, since April 2026. Not the paper's method:
/// - Keys of 3 or 4 bits are brought to length 1, rotated by a Walsh–Hadamard transform, and rounded to the best numbers
///   for a normal distribution of variance 1/m; their norm is kept in f16. `nc`, norm correction: what the numbers stand
///   for is brought to length 1 again before the norm is applied. Keys of 8 bits are FP8 E4M3, neither scaled nor rotated.
/// - Values are not rotated: 3 or 4 bits from the smallest to the largest of a vector, which are kept in f16.
/// - The first and the last two layers are dense, as accuracy falls by 30 points without (says `config.py`), but no more
///   than half of all; `dense-layers=0` makes it comparable to methods without, and possible on models of few layers.
///
/// A prompt attends to itself at full precision; in decode a new position is written before it is attended to, so that it
/// attends to itself as coded, unless `own=exact`. Windows and sinks are not vLLM's: they are for comparisons at equal ones.
pub(super) static METHOD: Method = Method {
    name: "vllm-turboquant",
    summary: "TurboQuant's presets of vLLM: rotated keys of one norm, uniform values",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option(
            "preset",
            Values::OneOf(&["k8v4", "4bit_nc", "k3v4_nc", "3bit_nc"]),
            "4bit_nc",
        )
        .about("vLLM's preset of this name, bits of keys and values")
        .with_aliases(&[
            ("turboquant_k8v4", "k8v4"),
            ("turboquant_4bit_nc", "4bit_nc"),
            ("turboquant_k3v4_nc", "k3v4_nc"),
            ("turboquant_3bit_nc", "3bit_nc"),
        ]),
        option("own", Values::OneOf(&["coded", "exact"]), "coded").about(
            "a new position in decode attends to itself as coded (as in vLLM), or exact (as by \
             others here)",
        ),
        option("window", Values::Count, "0").about("newest positions, kept dense"),
        SINKS,
        option("dense-layers", Values::Count, "2")
            .about("layers kept dense at each end of the model, up to half of all"),
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context)?;
        let m = context.config.head_dim;
        let head = |layer| {
            let coded = settings.codes.map(|code| code.rows(m));
            let head = CodedHead::new(m, settings.window, coded);
            settings
                .dense
                .around(layer, m, head.attending(settings.own))
        };
        let keys = match settings.codes.keys {
            Code::Fp8 => Rotation::None,
            _ => Rotation::Hadamard(m),
        };
        let layer = |layer| RotatedLayer {
            heads: (0..context.config.kv_heads).map(|_| head(layer)).collect(),
            rotations: KeyValue::new(keys.clone(), Rotation::None),
        };
        Ok(Box::new(StoredCache::with_layers(
            context.config,
            (),
            layer,
        )))
    },
    bytes: |spec, context, lengths| {
        let settings = Settings::new(spec, context)?;
        let config = context.config;
        let KeyValue { keys, values } = settings.codes.map(|code| code.bytes(config.head_dim));
        let pair = keys + values;
        let head = |l| CodedHead::<Rows>::expected_bytes(config, l, settings.window, pair);
        let layers = config.layers * size_of::<RotatedLayer<WithSinks<CodedHead<Rows>>>>();
        let heads = settings
            .dense
            .expected_bytes::<CodedHead<Rows>>(config, lengths, head);
        Ok(heads + layers as f64)
    },
    settings: |_, _, _| {
        let mut settings = Vec::new();
        for layers in ["2", "1", "0"] {
            for preset in ["k8v4", "4bit_nc", "k3v4_nc", "3bit_nc"] {
                settings.push(vec![
                    ("dense-layers", layers.to_owned()),
                    ("preset", preset.to_owned()),
                ]);
            }
        }
        settings
    },
};

#[derive(Clone, Copy)]
struct Settings {
    codes: KeyValue<Code>,
    own: Own,
    window: usize,
    dense: DenseParts,
}

impl Settings {
    fn new(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Self> {
        let (keys, values) = match spec.text("preset") {
            "k8v4" => (Code::Fp8, 4),
            "k3v4_nc" => (Code::Sphere(3), 4),
            "3bit_nc" => (Code::Sphere(3), 3),
            _ => (Code::Sphere(4), 4),
        };
        let m = context.config.head_dim;
        if keys != Code::Fp8 && !m.is_power_of_two() {
            let reason =
                format!("its Hadamard rotation needs a head dim that is a power of two, not {m}");
            return Err(spec.refused("preset", reason));
        }
        Ok(Self {
            codes: KeyValue::new(keys, Code::Uniform(values)),
            own: match spec.text("own") {
                "exact" => Own::Exact,
                _ => Own::CodedInDecode,
            },
            window: spec.number("window")?,
            dense: DenseParts::new(spec, context.config)?,
        })
    }
}

/// A code of vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    /// FP8 E4M3.
    Fp8,
    /// A norm and, of the rotated unit vector, the best numbers of so many bits.
    Sphere(u32),
    /// So many bits from the smallest to the largest number.
    Uniform(u32),
}

impl Code {
    fn rows(self, head_dim: usize) -> Rows {
        let packed = |bits| PackedRows::new(bits, head_dim);
        match self {
            Self::Fp8 => Rows::Fp8(Fp8Rows::new(head_dim)),
            Self::Sphere(bits) => Rows::Sphere {
                codes: packed(bits),
                norms: Vec::new(),
            },
            Self::Uniform(bits) => Rows::Uniform {
                codes: packed(bits),
                grids: Vec::new(),
            },
        }
    }

    /// Bytes of a vector.
    fn bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Fp8 => head_dim,
            Self::Sphere(bits) => row_bytes(bits, head_dim) + size_of::<f16>(),
            Self::Uniform(bits) => row_bytes(bits, head_dim) + size_of::<UniformGrid>(),
        }
    }
}

/// A growing list of vectors in a code.
enum Rows {
    Fp8(Fp8Rows),
    Sphere {
        codes: PackedRows,
        norms: Vec<f16>,
    },
    Uniform {
        codes: PackedRows,
        grids: Vec<UniformGrid>,
    },
}

/// The numbers that codes of a vector stand for: `zero + code·scale`.
#[derive(Debug, Clone, Copy)]
struct UniformGrid {
    scale: f16,
    zero: f16,
}

impl CodedVectors for Rows {
    fn empty(&self) -> Self {
        match self {
            Self::Fp8(rows) => Self::Fp8(rows.empty()),
            Self::Sphere { codes, .. } => Code::Sphere(codes.bits).rows(codes.width),
            Self::Uniform { codes, .. } => Code::Uniform(codes.bits).rows(codes.width),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Fp8(rows) => rows.len(),
            Self::Sphere { codes, .. } | Self::Uniform { codes, .. } => codes.len(),
        }
    }

    fn extend(&mut self, vectors: &[f32]) {
        match self {
            Self::Fp8(rows) => rows.extend(vectors),
            Self::Sphere { codes, norms } => {
                let (m, middles) = (codes.width, middles(codes.bits, codes.width));
                grow(norms, vectors.len() / m, 1);
                let mut all = Vec::with_capacity(vectors.len());
                for vector in vectors.chunks_exact(m) {
                    let norm = vector
                        .iter()
                        .map(|&x| f64::from(x).powi(2))
                        .sum::<f64>()
                        .sqrt();
                    norms.push(f16::from_f64(norm.min(f16::MAX.to_f64())));
                    let scale = (1.0 / (norm + 1e-8)) as f32;
                    all.extend(vector.iter().map(|x| {
                        let unit = x * scale;
                        middles.iter().filter(|&&middle| unit >= middle).count() as u8
                    }));
                }
                codes.extend(&all);
            }
            Self::Uniform { codes, grids } => {
                let (m, most) = (codes.width, ((1u32 << codes.bits) - 1) as f32);
                grow(grids, vectors.len() / m, 1);
                let mut all = Vec::with_capacity(vectors.len());
                for vector in vectors.chunks_exact(m) {
                    let min = vector.iter().copied().fold(f32::INFINITY, f32::min);
                    let max = vector.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let scale = ((max - min) / most).max(1e-8);
                    all.extend(
                        vector
                            .iter()
                            .map(|x| ((x - min) / scale + 0.5).min(most) as u8),
                    );
                    grids.push(UniformGrid {
                        scale: f16::from_f32(scale),
                        zero: f16::from_f32(min),
                    });
                }
                codes.extend(&all);
            }
        }
    }

    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        match self {
            Self::Fp8(rows) => rows.read(first, count, out),
            Self::Sphere { codes, norms } => {
                let centroids = centroids(codes.bits);
                let mut row = vec![0; codes.width];
                for (at, norm) in (first..first + count).zip(&norms[first..]) {
                    codes.read(at, &mut row);
                    let numbers = row.iter().map(|&code| centroids[usize::from(code)]);
                    let squares: f32 = numbers.clone().map(|x| x * x).sum();
                    let factor = norm.to_f32() / squares.sqrt();
                    out.extend(numbers.map(|x| x * factor));
                }
            }
            Self::Uniform { codes, grids } => {
                let mut row = vec![0; codes.width];
                for (at, grid) in (first..first + count).zip(&grids[first..]) {
                    codes.read(at, &mut row);
                    let (scale, zero) = (grid.scale.to_f32(), grid.zero.to_f32());
                    out.extend(row.iter().map(|&code| f32::from(code) * scale + zero));
                }
            }
        }
    }

    fn drop_front(&mut self, count: usize) {
        match self {
            Self::Fp8(rows) => rows.drop_front(count),
            Self::Sphere { codes, norms } => {
                codes.drop_front(count);
                norms.drain(..count);
            }
            Self::Uniform { codes, grids } => {
                codes.drop_front(count);
                grids.drain(..count);
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Fp8(rows) => rows.bytes(),
            Self::Sphere { codes, norms } => codes.bytes() + norms.capacity() * size_of::<f16>(),
            Self::Uniform { codes, grids } => {
                codes.bytes() + grids.capacity() * size_of::<UniformGrid>()
            }
        }
    }
}

/// Numbers that codes of 3 or 4 bits stand for, for variance 1: what brings them to length 1 leaves the variance out.
fn centroids(bits: u32) -> &'static [f32] {
    static THREE: LazyLock<Vec<f32>> = LazyLock::new(|| lloyd_max(3));
    static FOUR: LazyLock<Vec<f32>> = LazyLock::new(|| lloyd_max(4));
    if bits == 3 { &THREE } else { &FOUR }
}

/// Bounds of the codes of a unit vector's coordinates: half way between centroids.
fn middles(bits: u32, width: usize) -> Vec<f32> {
    let scale = 1.0 / (width as f32).sqrt();
    let pairs = centroids(bits).windows(2);
    pairs
        .map(|pair| (pair[0] + pair[1]) / 2.0 * scale)
        .collect()
}

/// The numbers of least squared error for a standard normal distribution, by Lloyd's and Max's algorithm with vLLM's
/// integrals (`solve_lloyd_max`): trapezoids, 200 a code, of a density cut off at 10.5.
fn lloyd_max(bits: u32) -> Vec<f32> {
    const END: f64 = 3.5;
    let count = 1usize << bits;
    let density = |x: f64| (-x * x / 2.0).exp();
    let integral = |f: &dyn Fn(f64) -> f64, a: f64, b: f64| {
        let step = (b - a) / 200.0;
        let inner: f64 = (1..200).map(|i| f(a + f64::from(i) * step)).sum();
        (inner + (f(a) + f(b)) / 2.0) * step
    };
    let start = |i: usize| -END + 2.0 * END * (i as f64 + 0.5) / count as f64;
    let mut centroids: Vec<f64> = (0..count).map(start).collect();
    for _ in 0..200 {
        let middles = centroids.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        let ends = std::iter::once(-3.0 * END)
            .chain(middles)
            .chain([3.0 * END]);
        let ends: Vec<f64> = ends.collect();
        centroids = ends
            .windows(2)
            .map(|ends| {
                let mass = integral(&density, ends[0], ends[1]);
                integral(&|x| x * density(x), ends[0], ends[1]) / mass
            })
            .collect();
    }
    centroids.into_iter().map(|x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::{build, config, feed, refusal};
    use super::super::fixture::{M, assert_close, numbers, of, read, vectors};
    use super::*;

    #[test]
    fn centroids_are_vllms() {
        let fixture = of("vllm_turboquant");
        for bits in [3, 4] {
            let expected = numbers(&fixture["centroids"][bits.to_string()]);
            assert_close(centroids(bits), &expected, 1e-6);
        }
    }

    /// Codes of a rotated key, and what they stand for once it is rotated back.
    #[test]
    fn keys_and_values_are_coded_as_in_vllm() {
        let fixture = of("vllm_turboquant");
        let rotation = Rotation::Hadamard(M);
        for bits in [3, 4] {
            let (mut key, value) = (vectors(3, 1), vectors(4, 1));
            rotation.turn(&mut key, M);
            for (part, code, vector) in [
                ("keys", Code::Sphere(bits), key),
                ("values", Code::Uniform(bits), value),
            ] {
                let mut rows = code.rows(M);
                rows.extend(&vector);
                let (Rows::Sphere { codes, .. } | Rows::Uniform { codes, .. }) = &rows else {
                    panic!("{part}");
                };
                let expected = &fixture[part][bits.to_string()];
                let mut row = vec![0; M];
                codes.read(0, &mut row);
                let row: Vec<f64> = row.into_iter().map(f64::from).collect();
                assert_eq!(row, numbers(&expected["codes"]), "{part}, {bits} bits");
                let mut back = read(&rows);
                if part == "keys" {
                    rotation.turn_back(&mut back, M);
                }
                assert_close(&back, &numbers(&expected["decoded"]), 2e-6);
            }
        }
    }

    /// The norm is kept as f16 has it, whatever the centroids make of it.
    #[test]
    fn norms_are_matched() {
        let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let mut rows = Code::Sphere(3).rows(M);
        let given = vectors(40, 30);
        rows.extend(&given);
        for (x, back) in given.chunks(M).zip(read(&rows).chunks(M)) {
            assert!((norm(back) / norm(x) - 1.0).abs() < 1e-3);
        }
    }

    /// vLLM's own figures for 32 layers of head dim 128: 2.6 and 4.9 times less than FP16 where no layer is dense.
    #[test]
    fn sizes_are_vllms() {
        for (preset, slot) in [
            ("k8v4", 196),
            ("4bit_nc", 134),
            ("k3v4_nc", 118),
            ("3bit_nc", 102),
        ] {
            let (keys, values) = match preset {
                "k8v4" => (Code::Fp8, Code::Uniform(4)),
                "4bit_nc" => (Code::Sphere(4), Code::Uniform(4)),
                "k3v4_nc" => (Code::Sphere(3), Code::Uniform(4)),
                _ => (Code::Sphere(3), Code::Uniform(3)),
            };
            assert_eq!(keys.bytes(128) + values.bytes(128), slot, "{preset}");
        }
    }

    #[test]
    fn layers_at_the_ends_are_dense() {
        const LAYER: usize = 2 * 100 * 64 * 2;
        let bytes = |text: &str, layers: usize| {
            let config = config(layers, 2, 1, 64);
            let mut cache = build(text, &config);
            feed(cache.as_mut(), &config, 100);
            let footprint = cache.footprint();
            let dense = footprint.parts.iter().find(|part| part.0 == "dense");
            // Lists of pages are beside them.
            let bytes = dense.map_or(0, |part| part.1);
            assert!(bytes % LAYER < LAYER / 100, "{bytes}");
            bytes / LAYER
        };
        assert_eq!(bytes("vllm-turboquant", 6), 4);
        assert_eq!(bytes("vllm-turboquant", 5), 4);
        assert_eq!(bytes("vllm-turboquant", 4), 4, "half of all at each end");
        assert_eq!(bytes("vllm-turboquant", 3), 2);
        assert_eq!(bytes("vllm-turboquant:dense-layers=1", 6), 2);
        assert_eq!(bytes("vllm-turboquant:dense-layers=0", 6), 0);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let config = config(1, 1, 1, 24);
        assert!(refusal("vllm-turboquant", &config).contains("power of two"));
        build("vllm-turboquant:preset=turboquant_k8v4", &config);
    }
}
