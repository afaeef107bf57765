//! A model's weights by name: of safetensors files, of a GGUF file, or drawn.
//!
//! Weights are read some rows at a time, so that quantising or widening a matrix takes little memory
//! beside it; one that a GGUF file holds in blocks is copied once as a whole.

mod gguf;
mod random;
mod safetensors;

use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use lexico::kernels::blocks::{BlockMatrix, BlockType};
use lexico::tensor_file::TensorFile;

use crate::config::Config;
use crate::error::{Error, Result, refused};
use crate::gguf::{GgufModel, own_name};
pub(crate) use safetensors::{INDEX, SINGLE, shard_names};

/// Format in which a model's matrices are held, the embedding among them. They are quantised some rows at a
/// time as they are read; those that take less as they are stored stay so. Norms and biases are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantize {
    /// Format in which they are stored.
    #[default]
    None,
    /// 8.5 bits a number; as stored where rows are no multiple of 32.
    Q8_0,
    /// 6.6 bits a number; [`Quantize::Q8_0`] where rows are no multiple of 256.
    Q6K,
    /// 4.5 bits a number; [`Quantize::Q8_0`] where rows are no multiple of 256.
    Q4K,
}

/// Names of [`Quantize`], as llama.cpp has them.
const QUANTIZE_NAMES: [(&str, Quantize); 4] = [
    ("none", Quantize::None),
    ("q8_0", Quantize::Q8_0),
    ("q6_k", Quantize::Q6K),
    ("q4_k", Quantize::Q4K),
];

impl FromStr for Quantize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut known = QUANTIZE_NAMES.iter();
        let found = known.find(|(name, _)| text.eq_ignore_ascii_case(name));
        found.map(|&(_, quantize)| quantize).ok_or_else(|| {
            let names = QUANTIZE_NAMES.map(|(name, _)| name);
            format!("{text:?} is none of {}", names.join(", "))
        })
    }
}

/// Named weights.
pub(crate) enum Weights {
    /// Weights of one safetensors file or several.
    Safetensors(safetensors::Shards),
    /// Weights of a GGUF file, or one in parts.
    Gguf(GgufModel),
    /// Drawn, each by its name.
    Random,
}

impl Weights {
    /// Opens the weights of a model folder.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        Ok(Self::Safetensors(safetensors::Shards::open(folder)?))
    }

    pub(crate) fn single(file: TensorFile) -> Self {
        Self::Safetensors(safetensors::Shards::single(file))
    }

    /// Returns true where there is a weight of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Self::Safetensors(shards) => shards.has(name),
            Self::Gguf(model) => model.tensor(&own_name(name)).is_some(),
            Self::Random => true,
        }
    }

    /// Refuses quantised weights of a model folder; returns what has to be said of weights that no model of this config uses.
    /// GGUF files were checked when they were opened.
    pub(crate) fn check_names(&self, config: &Config) -> Result<Option<String>> {
        match self {
            Self::Safetensors(shards) => shards.check_names(config),
            Self::Gguf(_) | Self::Random => Ok(None),
        }
    }

    /// Number type of a weight, which must have this shape.
    pub(crate) fn number_type(&self, name: &str, shape: &[usize]) -> Result<GgmlDType> {
        match self {
            Self::Safetensors(shards) => shards.number_type(name, shape),
            Self::Gguf(model) => gguf::number_type(model, name, shape),
            Self::Random => Ok(random::number_type(name)),
        }
    }

    /// Fills `out` with rows of a weight as they are stored; a vector is one row.
    pub(crate) fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Safetensors(shards) => shards.read_rows(name, rows, out),
            Self::Gguf(model) => gguf::read_rows(model, name, rows, out),
            Self::Random => {
                random::read_rows(name, rows, out);
                Ok(())
            }
        }
    }

    /// Rows of a weight, in f32.
    pub(crate) fn f32_rows(
        &self,
        name: &str,
        stored: GgmlDType,
        columns: usize,
        rows: Range<usize>,
    ) -> Result<Vec<f32>> {
        let count = rows.len();
        let blocks = count * columns / stored.block_size();
        let mut bytes = vec![0; blocks * stored.type_size()];
        self.read_rows(name, rows, &mut bytes)?;
        let Some(kind) = block_type(stored) else {
            return Ok(numbers(stored, &bytes));
        };
        let blocks = BlockMatrix::from_blocks(kind, count, columns, &bytes);
        let mut numbers = vec![0.0; count * columns];
        for (row, numbers) in numbers.chunks_exact_mut(columns).enumerate() {
            blocks.read_row(row, numbers);
        }
        Ok(numbers)
    }

    /// A vector, a norm's or bias's, in f32.
    pub(crate) fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        let stored = self.number_type(name, &[length])?;
        let floats = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16];
        if !floats.contains(&stored) {
            let reason = format!("its numbers are {stored:?}, floating point is needed");
            return Err(self.error(name, reason));
        }
        let numbers = self.f32_rows(name, stored, length, 0..1)?;
        Ok(Tensor::from_vec(numbers, length, &Device::Cpu)?)
    }

    pub(crate) fn error(&self, name: &str, reason: String) -> Error {
        match self {
            Self::Safetensors(shards) => weight_error(shards.path(), name, reason),
            Self::Gguf(model) => weight_error(model.path(), &own_name(name), reason),
            Self::Random => weight_error(Path::new("random"), name, reason),
        }
    }
}

/// The block type of quantised numbers; `None` for floating point and what no matrix is stored in.
pub(crate) fn block_type(stored: GgmlDType) -> Option<BlockType> {
    Some(match stored {
        GgmlDType::Q4_0 => BlockType::Q4_0,
        GgmlDType::Q4_1 => BlockType::Q4_1,
        GgmlDType::Q5_0 => BlockType::Q5_0,
        GgmlDType::Q5_1 => BlockType::Q5_1,
        GgmlDType::Q8_0 => BlockType::Q8_0,
        GgmlDType::Q2K => BlockType::Q2K,
        GgmlDType::Q3K => BlockType::Q3K,
        GgmlDType::Q4K => BlockType::Q4K,
        GgmlDType::Q5K => BlockType::Q5K,
        GgmlDType::Q6K => BlockType::Q6K,
        _ => return None,
    })
}

/// Numbers of little-endian bytes in f16, bf16 or else f32.
pub(crate) fn numbers(stored: GgmlDType, bytes: &[u8]) -> Vec<f32> {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    let fours = || bytes.as_chunks::<4>().0.iter();
    match stored {
        GgmlDType::F16 => pairs().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        GgmlDType::BF16 => pairs().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => fours().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}

fn weight_error(path: &Path, name: &str, reason: String) -> Error {
    refused(path, format!("weight {name:?}: {reason}"))
}

/// The complaint about a weight whose shape is not what the config asks for.
fn check_shape(path: &Path, name: &str, found: &[usize], wanted: &[usize]) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    let reason = format!("its shape is {found:?}, the config asks for {wanted:?}");
    Err(weight_error(path, name, reason))
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use candle_core::quantized::{QStorage, QTensor};

    use super::*;

    /// Every block type stands for the numbers that candle's own reader makes of the same bytes.
    #[test]
    fn blocks_are_read_as_candle_reads_them() {
        let types = [
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ];
        let (rows, columns) = (37, 512);
        for stored in types {
            let kind = block_type(stored).unwrap();
            let mut state = 7u64;
            let mut bytes = vec![0u8; rows * columns / kind.numbers() * kind.bytes()];
            for byte in &mut bytes {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (state >> 33) as u8;
            }
            let ours = BlockMatrix::from_blocks(kind, rows, columns, &bytes);
            let theirs = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, stored).unwrap();
            let theirs = QTensor::new(theirs, (rows, columns)).unwrap();
            let theirs = theirs.dequantize(&Device::Cpu).unwrap();
            let theirs = theirs.to_vec2::<f32>().unwrap();
            let (mut row, mut finite) = (vec![0.0; columns], 0);
            for (r, theirs) in theirs.iter().enumerate() {
                ours.read_row(r, &mut row);
                for (at, (&ours, &theirs)) in row.iter().zip(theirs).enumerate() {
                    // Scales drawn at random are no numbers now and then.
                    if theirs.is_finite() {
                        finite += 1;
                        assert_eq!(ours, theirs, "{stored:?}, row {r}, column {at}");
                    }
                }
            }
            assert!(finite > rows * columns / 2, "{stored:?}: {finite} numbers");
        }
    }
}
