use ::lexico::KeyValue;
use half::f16;

use super::bits::grow;
use super::dense_parts::{DENSE_LAYERS, DenseParts, SINKS, WithSinks};
use super::method::{Method, Values, option};
use super::rotation::{RotatedLayer, Rotation};
use super::stored::{CodedHead, CodedVectors, OWN, Own, StoredCache};
use super::{CacheContext, CacheSpec};
use crate::error::Result;

const TYPES: Values = Values::OneOf(&["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]);

/// llama.cpp's quantised cache: `--cache-type-k` and `--cache-type-v`.
///
/// Blocks of 32 numbers as in `quantize_row_q8_0_ref` and its like of ggml (ggml-org/llama.cpp, `ggml/src/ggml-quants.c`):
/// a scale in f16, for `_1` types the smallest number too, and a code of 4, 5 or 8 bits a number. Since pull request
/// 21038 (April 2026) queries, keys and values are rotated before, and the output back, by Walsh–Hadamard transforms
/// where the head dim is a multiple of 64: of the largest 64·2ⁿ that divides it for keys, of 64 for values
/// (`src/llama-kv-cache.cpp`: `build_input_k_rot`, `build_input_v_rot`; off with `LLAMA_ATTN_ROT_DISABLE=1`).
///
/// llama.cpp writes new positions to the cache before it attends, so that they too are attended to as quantised, those
/// of a prompt among them; so it is here without a window, unless `own=exact`. Unlike there, queries are not rounded to
/// 8 bits. Windows, sinks and dense layers are not llama.cpp's: they are for comparisons at equal ones.
pub(super) static METHOD: Method = Method {
    name: "llama-cpp",
    summary: "llama.cpp's quantised cache types, with its rotation",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("k", TYPES, "q8_0").about("type of keys, as --cache-type-k"),
        option("v", TYPES, "q8_0").about("type of values, as --cache-type-v"),
        option("rotation", Values::OneOf(&["on", "off"]), "on")
            .about("Hadamard rotation before quantisation, as by default since April 2026"),
        OWN,
        option("window", Values::Count, "0").about("newest positions, kept dense"),
        SINKS,
        DENSE_LAYERS,
    ],
    build: |spec, context| {
        let settings = Settings::new(spec, context)?;
        let m = context.config.head_dim;
        let rotations = if spec.text("rotation") == "on" {
            rotations(m)
        } else {
            KeyValue::new(Rotation::None, Rotation::None)
        };
        let head = |layer| {
            let blocks = |block_type| Blocks::new(block_type, m);
            let head = CodedHead::new(m, settings.window, settings.types.map(blocks));
            settings
                .dense
                .around(layer, m, head.attending(settings.own))
        };
        let layer = |layer| RotatedLayer {
            heads: (0..context.config.kv_heads).map(|_| head(layer)).collect(),
            rotations: rotations.clone(),
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
        let KeyValue { keys, values } = settings.types;
        let pair = config.head_dim / BLOCK * (keys.bytes() + values.bytes());
        let head = |l| CodedHead::<Blocks>::expected_bytes(config, l, settings.window, pair);
        let layers = config.layers * size_of::<RotatedLayer<WithSinks<CodedHead<Blocks>>>>();
        let heads = settings
            .dense
            .expected_bytes::<CodedHead<Blocks>>(config, lengths, head);
        Ok(heads + layers as f64)
    },
    settings: |_, _, _| {
        let pairs = [
            ("q8_0", "q8_0"),
            ("q8_0", "q5_1"),
            ("q8_0", "q4_0"),
            ("q5_1", "q5_1"),
            ("q5_0", "q5_0"),
            ("q4_1", "q4_1"),
            ("q4_0", "q4_0"),
        ];
        let setting = |(k, v): (&str, &str)| vec![("k", k.to_owned()), ("v", v.to_owned())];
        pairs.into_iter().map(setting).collect()
    },
};

/// Numbers of a block.
const BLOCK: usize = 32;

#[derive(Clone, Copy)]
struct Settings {
    types: KeyValue<BlockType>,
    own: Own,
    window: usize,
    dense: DenseParts,
}

impl Settings {
    fn new(spec: &CacheSpec, context: &CacheContext<'_>) -> Result<Self> {
        let m = context.config.head_dim;
        if !m.is_multiple_of(BLOCK) {
            let reason = format!("blocks of {BLOCK} numbers do not divide the head dim, {m}");
            return Err(spec.refused("k", reason));
        }
        Ok(Self {
            types: KeyValue::new("k", "v").map(|option| BlockType::named(spec.text(option))),
            own: Own::of(spec),
            window: spec.number("window")?,
            dense: DenseParts::new(spec, context.config)?,
        })
    }
}

/// The rotations of a head dim: none where 64 does not divide it.
fn rotations(head_dim: usize) -> KeyValue<Rotation> {
    if !head_dim.is_multiple_of(64) {
        return KeyValue::new(Rotation::None, Rotation::None);
    }
    // The largest power of two that divides it.
    let largest = 1 << head_dim.trailing_zeros();
    KeyValue::new(Rotation::Hadamard(largest), Rotation::Hadamard(64))
}

/// A type of ggml's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockType {
    Q8_0,
    Q5_1,
    Q5_0,
    Q4_1,
    Q4_0,
}

impl BlockType {
    fn named(name: &str) -> Self {
        match name {
            "q5_1" => Self::Q5_1,
            "q5_0" => Self::Q5_0,
            "q4_1" => Self::Q4_1,
            "q4_0" => Self::Q4_0,
            _ => Self::Q8_0,
        }
    }

    /// Bytes of a block.
    fn bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q5_1 => 24,
            Self::Q5_0 => 22,
            Self::Q4_1 => 20,
            Self::Q4_0 => 18,
        }
    }

    /// Appends a block of 32 numbers in ggml's layout: the scale, the smallest number, fifth bits, codes of numbers `i`
    /// and `i + 16` in a byte.
    fn encode(self, numbers: &[f32], out: &mut Vec<u8>) {
        let min = numbers.iter().copied().fold(f32::INFINITY, f32::min);
        let max = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // The first of those of largest magnitude, with its sign.
        let extreme = numbers
            .iter()
            .copied()
            .fold(0f32, |most, x| if most.abs() < x.abs() { x } else { most });
        let (scale, zero, offset, most) = match self {
            Self::Q8_0 => (extreme.abs() / 127.0, 0.0, 0.0, 255.0),
            Self::Q5_1 => ((max - min) / 31.0, min, 0.5, 31.0),
            Self::Q5_0 => (extreme / -16.0, 0.0, 16.5, 31.0),
            Self::Q4_1 => ((max - min) / 15.0, min, 0.5, 15.0),
            Self::Q4_0 => (extreme / -8.0, 0.0, 8.5, 15.0),
        };
        let limit = f16::MAX.to_f32();
        let held = |x: f32| f16::from_f32(x.clamp(-limit, limit)).to_le_bytes();
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend(held(scale));
        if self == Self::Q8_0 {
            let codes = numbers.iter().map(|&x| (x * inverse).round() as i8);
            return out.extend(codes.map(|code| code as u8));
        }
        if matches!(self, Self::Q5_1 | Self::Q4_1) {
            out.extend(held(min));
        }
        let code = |x: &f32| ((x - zero) * inverse + offset).min(most) as u8;
        let codes: Vec<u8> = numbers.iter().map(code).collect();
        if matches!(self, Self::Q5_0 | Self::Q5_1) {
            let fifth = |bits, (i, code): (usize, &u8)| bits | u32::from(code >> 4) << i;
            let fifths: u32 = codes.iter().enumerate().fold(0, fifth);
            out.extend(fifths.to_le_bytes());
        }
        let (low, high) = codes.split_at(BLOCK / 2);
        out.extend(low.iter().zip(high).map(|(a, b)| (a & 15) | (b & 15) << 4));
    }

    /// Appends the numbers that a block stands for.
    fn decode(self, block: &[u8], out: &mut Vec<f32>) {
        let half_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let scale = half_at(0);
        if self == Self::Q8_0 {
            let codes = block[2..].iter();
            return out.extend(codes.map(|&code| f32::from(code as i8) * scale));
        }
        let codes = &block[block.len() - BLOCK / 2..];
        let (zero, fifths_at, middle) = match self {
            Self::Q5_1 => (half_at(2), Some(4), 0),
            Self::Q4_1 => (half_at(2), None, 0),
            Self::Q5_0 => (0.0, Some(2), 16),
            Self::Q8_0 | Self::Q4_0 => (0.0, None, 8),
        };
        let fifths = fifths_at.map_or(0, |at: usize| {
            u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
        });
        let nibbles = codes
            .iter()
            .map(|code| code & 15)
            .chain(codes.iter().map(|code| code >> 4));
        out.extend(nibbles.enumerate().map(|(i, nibble)| {
            let code = i32::from(nibble) + ((fifths >> i & 1) << 4) as i32;
            (code - middle) as f32 * scale + zero
        }));
    }
}

/// A growing list of vectors in blocks.
struct Blocks {
    block_type: BlockType,
    bytes: Vec<u8>,
    head_dim: usize,
}

impl Blocks {
    fn new(block_type: BlockType, head_dim: usize) -> Self {
        Self {
            block_type,
            bytes: Vec::new(),
            head_dim,
        }
    }

    /// Bytes of a vector.
    fn row(&self) -> usize {
        self.head_dim / BLOCK * self.block_type.bytes()
    }
}

impl CodedVectors for Blocks {
    fn empty(&self) -> Self {
        Self::new(self.block_type, self.head_dim)
    }

    fn len(&self) -> usize {
        self.bytes.len() / self.row()
    }

    fn extend(&mut self, vectors: &[f32]) {
        let row = self.row();
        grow(&mut self.bytes, vectors.len() / self.head_dim * row, row);
        for block in vectors.chunks_exact(BLOCK) {
            self.block_type.encode(block, &mut self.bytes);
        }
    }

    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let row = self.row();
        let bytes = &self.bytes[first * row..(first + count) * row];
        for block in bytes.chunks_exact(self.block_type.bytes()) {
            self.block_type.decode(block, out);
        }
    }

    fn drop_front(&mut self, count: usize) {
        let row = self.row();
        self.bytes.drain(..count * row);
    }

    fn bytes(&self) -> usize {
        self.bytes.capacity()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::fixture::{M, assert_close, numbers, of, read, vectors};
    use super::*;

    const ALL: [(&str, BlockType); 5] = [
        ("q8_0", BlockType::Q8_0),
        ("q5_1", BlockType::Q5_1),
        ("q5_0", BlockType::Q5_0),
        ("q4_1", BlockType::Q4_1),
        ("q4_0", BlockType::Q4_0),
    ];

    /// Bytes and numbers of llama.cpp's own package.
    #[test]
    fn blocks_are_llama_cpps() {
        let fixture = of("llama_cpp");
        for (name, block_type) in ALL {
            let mut blocks = Blocks::new(block_type, M);
            blocks.extend(&vectors(0, 2));
            let hex: String = blocks.bytes.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, fixture[name]["bytes"], "{name}");
            assert_eq!(BlockType::named(name), block_type);
            let expected = numbers(&fixture[name]["decoded"]);
            assert_close(&read(&blocks)[M..], &expected, 1e-7);
        }
    }

    /// Sizes that llama.cpp names: `build_input_k_rot` and `build_input_v_rot`.
    #[test]
    fn rotations_have_llama_cpps_sizes() {
        let of = |keys, values| KeyValue::new(Rotation::Hadamard(keys), Rotation::Hadamard(values));
        for (m, expected) in [
            (64, of(64, 64)),
            (128, of(128, 64)),
            (192, of(64, 64)),
            (256, of(256, 64)),
            (96, KeyValue::new(Rotation::None, Rotation::None)),
            (32, KeyValue::new(Rotation::None, Rotation::None)),
        ] {
            assert_eq!(rotations(m), expected, "{m}");
        }
    }

    proptest! {
        /// No number is further off than the block's scale in f64 allows, but for what f16 rounds.
        #[test]
        fn errors_are_bounded(numbers in vec(-1f32..1.0, BLOCK), size in -4i32..4, kind in 0usize..5) {
            let size = 10f32.powi(size);
            let numbers: Vec<f32> = numbers.iter().map(|x| x * size).collect();
            let wide: Vec<f64> = numbers.iter().map(|&x| f64::from(x)).collect();
            let min = wide.iter().copied().fold(f64::INFINITY, f64::min);
            let max = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let most = max.max(-min);
            // The range of `_0` types ends one step earlier at one end.
            let (step, reach) = match ALL[kind].1 {
                BlockType::Q8_0 => (most / 127.0, 0.5),
                BlockType::Q5_1 => ((max - min) / 31.0, 0.5),
                BlockType::Q5_0 => (most / 16.0, 1.0),
                BlockType::Q4_1 => ((max - min) / 15.0, 0.5),
                BlockType::Q4_0 => (most / 8.0, 1.0),
            };
            let mut block = Vec::new();
            ALL[kind].1.encode(&numbers, &mut block);
            prop_assert_eq!(block.len(), ALL[kind].1.bytes());
            let mut back = Vec::new();
            ALL[kind].1.decode(&block, &mut back);
            // Scales below what f16 has as normal numbers are off by up to 2⁻²⁵, times a code of up to 127.
            let bound = step * reach + most / 512.0 + 130.0 * 2f64.powi(-25);
            for (x, back) in wide.iter().zip(&back) {
                prop_assert!((x - f64::from(*back)).abs() <= bound, "{x} became {back}");
            }
        }
    }
}
