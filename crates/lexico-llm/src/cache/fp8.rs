use std::sync::LazyLock;

use ::lexico::KeyValue;
use candle_core::Tensor;
use float8::F8E4M3;

use super::bits::grow;
use super::dense_parts::{DENSE_LAYERS, DenseParts, SINKS, WithSinks};
use super::method::{Method, Values, option};
use super::stored::{CodedHead, CodedVectors, OWN, Own, Place, StoredCache, StoredLayer};
use super::{CacheContext, CacheSpec, Decoded, Step};
use crate::error::Result;

/// vLLM's FP8 cache: `--kv-cache-dtype fp8`, which is `fp8_e4m3`.
///
/// Each number, divided by its layer's scale for keys or for values, becomes the nearest FP8 E4M3 number, those beyond
/// ±448 the largest (vllm-project/vllm, `csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh`: `__NV_SATFINITE`). Scales
/// are 1 by default, or `calculate_kv_scales`: the largest magnitude in the first batch over 200 for keys and over 100 for
/// values (`vllm/attention/layer.py`: `calc_kv_scales`; `K_SCALE_CONSTANT`, `V_SCALE_CONSTANT` of `vllm/envs.py`). There
/// that batch is the warm-up's; here it is the prompt. Scales per head, from llm-compressor's calibration, are left out.
///
/// vLLM writes new positions to the cache before it attends, so that they too are attended to as quantised; so it is
/// here without a window, unless `own=exact`. Unlike with its FlashAttention 3 backend, queries are not quantised.
/// Windows and sinks are not vLLM's: they are for comparisons at equal ones. Dense layers are its
/// `--kv-cache-dtype-skip-layers`.
pub(super) static METHOD: Method = Method {
    name: "fp8",
    summary: "vLLM's FP8 cache: each number as FP8 E4M3",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("scales", Values::OneOf(&["one", "prompt"]), "one").about(
            "scales of keys and of values: 1, or from the largest of a layer's first step, as \
             vLLM's calculate_kv_scales",
        ),
        OWN,
        option("window", Values::Count, "0").about("newest positions, kept dense"),
        SINKS,
        DENSE_LAYERS,
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context)?;
        let m = context.config.head_dim;
        let head = |layer| {
            let head = CodedHead::new(
                m,
                settings.window,
                KeyValue::new(Fp8Rows::new(m), Fp8Rows::new(m)),
            );
            settings
                .dense
                .around(layer, m, head.attending(settings.own))
        };
        let layer = |layer| Layer {
            heads: (0..context.config.kv_heads).map(|_| head(layer)).collect(),
            calibrates: settings.calibrates,
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
        let pair = 2 * config.head_dim;
        let head = |l| CodedHead::<Fp8Rows>::expected_bytes(config, l, settings.window, pair);
        let heads = settings
            .dense
            .expected_bytes::<CodedHead<Fp8Rows>>(config, lengths, head);
        Ok(heads + (config.layers * size_of::<Layer>()) as f64)
    },
    // One size: whether it fits is all that a budget can tell.
    settings: |spec, _, _| vec![vec![("scales", spec.text("scales").to_owned())]],
};

#[derive(Clone, Copy)]
struct Settings {
    calibrates: bool,
    own: Own,
    window: usize,
    dense: DenseParts,
}

impl Settings {
    fn new(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Self> {
        Ok(Self {
            calibrates: spec.text("scales") == "prompt",
            own: Own::of(spec),
            window: spec.number("window")?,
            dense: DenseParts::new(spec, context.config)?,
        })
    }
}

/// Range that vLLM brings the largest key, and the largest value, of the first batch to.
const RANGES: KeyValue<f32> = KeyValue {
    keys: 200.0,
    values: 100.0,
};

/// A layer whose heads share their scales.
struct Layer {
    heads: Vec<WithSinks<CodedHead<Fp8Rows>>>,
    /// True until scales are found in the first step, where they are to be.
    calibrates: bool,
}

impl StoredLayer for Layer {
    type Shared = ();

    fn attend(&mut self, _shared: &mut (), step: &Step, at: Place) -> Result<Tensor> {
        if std::mem::take(&mut self.calibrates) {
            let largest = |numbers: &[f32]| numbers.iter().fold(0f32, |most, x| most.max(x.abs()));
            let scales = KeyValue::new(&step.keys, &step.values)
                .zip(RANGES)
                .map(|(numbers, range)| largest(numbers) / range);
            for head in &mut self.heads {
                for (rows, scale) in head.rest.coded.as_mut().zip(scales) {
                    // Numbers so small that their scale vanishes are zeros at any.
                    rows.scale = if scale > 0.0 { scale } else { 1.0 };
                }
            }
        }
        self.heads.attend(&mut (), step, at)
    }

    fn decoded(&self, _shared: &()) -> Result<Option<Decoded>> {
        self.heads.decoded(&())
    }

    fn bytes(&self) -> Vec<(&'static str, usize)> {
        let mut parts = self.heads.bytes();
        let own = size_of::<Self>() - size_of::<Vec<()>>();
        parts.push(("bookkeeping", own));
        parts
    }
}

/// A growing list of vectors of FP8 E4M3 numbers.
pub(super) struct Fp8Rows {
    scale: f32,
    bytes: Vec<u8>,
    head_dim: usize,
}

impl Fp8Rows {
    pub(super) fn new(head_dim: usize) -> Self {
        Self {
            scale: 1.0,
            bytes: Vec::new(),
            head_dim,
        }
    }
}

/// Numbers that the codes stand for.
static NUMBERS: LazyLock<[f32; 256]> =
    LazyLock::new(|| std::array::from_fn(|bits| F8E4M3::from_bits(bits as u8).to_f32()));

impl CodedVectors for Fp8Rows {
    fn empty(&self) -> Self {
        Self {
            scale: self.scale,
            ..Self::new(self.head_dim)
        }
    }

    fn len(&self) -> usize {
        self.bytes.len() / self.head_dim
    }

    fn extend(&mut self, vectors: &[f32]) {
        grow(&mut self.bytes, vectors.len(), self.head_dim);
        let scale = self.scale;
        let codes = vectors.iter().map(|&x| F8E4M3::from_f32(x / scale));
        self.bytes.extend(codes.map(|code| code.to_bits()));
    }

    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let numbers = &*NUMBERS;
        let bytes = &self.bytes[first * self.head_dim..(first + count) * self.head_dim];
        out.extend(
            bytes
                .iter()
                .map(|&code| numbers[usize::from(code)] * self.scale),
        );
    }

    fn drop_front(&mut self, count: usize) {
        self.bytes.drain(..count * self.head_dim);
    }

    fn bytes(&self) -> usize {
        self.bytes.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::super::evict::testing::{build, config, tensor};
    use super::super::fixture::{M, numbers, of, read, vectors};
    use super::*;

    /// Codes by the table of the format, ties to even; what is beyond it is its largest number.
    #[test]
    fn codes_are_the_nearest_numbers() {
        let fixture = of("fp8");
        let odd: Vec<f32> = numbers(&fixture["numbers"])
            .iter()
            .map(|&x| x as f32)
            .collect();
        for (given, expected) in [(odd, &fixture["codes"]), (vectors(0, 1), &fixture["row"])] {
            let mut rows = Fp8Rows::new(given.len());
            rows.extend(&given);
            let codes: Vec<f64> = rows.bytes.iter().map(|&code| f64::from(code)).collect();
            assert_eq!(codes, numbers(expected), "{given:?}");
        }
    }

    /// Three bits of mantissa: a sixteenth of a number at most, and half the least number below.
    #[test]
    fn errors_are_bounded() {
        let given = vectors(20, 50);
        for scale in [1.0, 0.02, 3.0] {
            let mut rows = Fp8Rows {
                scale,
                ..Fp8Rows::new(M)
            };
            rows.extend(&given);
            for (x, back) in given.iter().zip(read(&rows)) {
                let (x, back) = (f64::from(*x), f64::from(back));
                let least = 2f64.powi(-10) * f64::from(scale);
                assert!((x - back).abs() <= (x.abs() / 16.0).max(least) * 1.000_001);
            }
        }
    }

    /// `calc_kv_scales`: the largest over 200 for keys, over 100 for values, of all heads of a layer, once.
    #[test]
    fn scales_are_those_of_the_first_step() {
        let config = config(1, 2, 2, 4);
        let step = |size: f32| {
            let numbers = |x: f32| tensor((0..16).map(|i| x * i as f32).collect(), 2, 2);
            (numbers(1.0), numbers(size), numbers(-2.0 * size))
        };
        let mut cache = build("fp8:scales=prompt", &config);
        for size in [0.1, 40.0] {
            let (q, k, v) = step(size);
            cache.attend(0, &q, &k, &v).unwrap();
        }
        let decoded = cache.decoded(0).unwrap().unwrap();
        // 1.5 of keys is 200 in the code's numbers, and 448 of those is the most that is held.
        let most = decoded.keys.iter().copied().fold(0f32, f32::max);
        assert!((most - 1.5 / 200.0 * 448.0).abs() < 1e-5, "{most}");
        let least = decoded.values.iter().copied().fold(0f32, f32::min);
        assert!((least + 3.0 / 100.0 * 448.0).abs() < 1e-4, "{least}");
    }
}
