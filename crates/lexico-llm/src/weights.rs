//! A model's weights: one safetensors file, or shards with an index.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::{DType, Device, Tensor};
use half::f16;
use lexico::tensor_file::{Dtype, TensorFile};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use crate::error::{Error, Result, io};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const NEEDED: &str = "config.json, tokenizer.json, and model.safetensors or its shards with \
                      model.safetensors.index.json";

/// How a model's matrices are held. They are quantised one by one as they are read; embeddings
/// keep the number type of the file, norms and biases are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantize {
    /// In f32.
    #[default]
    None,
    /// 8.5 bits a number.
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
        let found = QUANTIZE_NAMES
            .iter()
            .find(|(name, _)| text.eq_ignore_ascii_case(name));
        found.map(|&(_, quantize)| quantize).ok_or_else(|| {
            let names = QUANTIZE_NAMES.map(|(name, _)| name);
            format!("{text:?} is none of {}", names.join(", "))
        })
    }
}

/// Named weights: of files, or drawn.
pub(crate) enum Weights {
    Files(Files),
    Random,
}

/// The files of a model's weights.
pub(crate) struct Files {
    files: Vec<TensorFile>,
    /// Which file holds a weight.
    file_of: HashMap<String, usize>,
    /// What messages name where no file holds a weight.
    path: PathBuf,
}

impl Weights {
    /// Opens the weights of a model folder.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        if single.is_file() {
            return Ok(Self::single(TensorFile::open(single)?));
        }
        let index = folder.join(INDEX);
        if !index.is_file() {
            return Err(Error::MissingFile {
                folder: folder.to_owned(),
                file: SINGLE.to_owned(),
                needed: NEEDED,
            });
        }
        Self::sharded(folder, index)
    }

    pub(crate) fn single(file: TensorFile) -> Self {
        let path = file.path().to_owned();
        let file_of = file.names().into_iter().map(|name| (name, 0)).collect();
        Self::Files(Files {
            files: vec![file],
            file_of,
            path,
        })
    }

    fn sharded(folder: &Path, index: PathBuf) -> Result<Self> {
        let parsed = read_index(&index)?;
        let mut files = Vec::new();
        let mut numbers: HashMap<String, usize> = HashMap::new();
        let mut file_of = HashMap::new();
        for (weight, shard) in parsed {
            let number = match numbers.get(&shard) {
                Some(&number) => number,
                None => {
                    let path = folder.join(&shard);
                    if !path.is_file() {
                        return Err(Error::MissingFile {
                            folder: folder.to_owned(),
                            file: shard,
                            needed: "every shard that its index names",
                        });
                    }
                    files.push(TensorFile::open(path)?);
                    numbers.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            file_of.insert(weight, number);
        }
        Ok(Self::Files(Files {
            files,
            file_of,
            path: index,
        }))
    }

    /// Weights of any name and shape, each drawn by its name: norms are 1, the rest small.
    pub(crate) fn random() -> Self {
        Self::Random
    }

    /// Reads one weight, which must have `shape`, and converts it to f32: products of bf16 weights
    /// are many times slower on a CPU.
    pub(crate) fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(self.get_as_stored(name, shape)?.to_dtype(DType::F32)?)
    }

    /// Reads one weight, which must have `shape`, in its own number type.
    pub(crate) fn get_as_stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self {
            Self::Files(files) => files.get(name, shape),
            Self::Random => drawn(name, shape),
        }
    }
}

/// Numbers whose products keep activations of the size that trained weights do.
fn drawn(name: &str, shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product();
    let numbers: Vec<f16> = if name.ends_with("norm.weight") {
        vec![f16::ONE; count]
    } else {
        let seed = name
            .bytes()
            .fold(0u64, |seed, b| seed.wrapping_mul(31) + u64::from(b));
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let draw = |_| f16::from_f32(rng.random_range(-0.03f32..0.03));
        (0..count).map(draw).collect()
    };
    Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?)
}

impl Files {
    /// Reads one weight as it is stored.
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let error = |path: &Path, reason: String| Error::Weight {
            path: path.to_owned(),
            name: name.to_owned(),
            reason,
        };
        let Some(&number) = self.file_of.get(name) else {
            return Err(error(&self.path, "it is missing".to_owned()));
        };
        let file = &self.files[number];
        let (dtype, found) = file.info(name)?;
        if found != shape {
            let reason = format!("its shape is {found:?}, the config asks for {shape:?}");
            return Err(error(file.path(), reason));
        }
        let dtype = match dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let reason = format!("its numbers are {other:?}; F32, F16 or BF16 are needed");
                return Err(error(file.path(), reason));
            }
        };
        let bytes = file.bytes(name)?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)?)
    }
}

/// Which shard holds each weight. Shards are plain file names: one with folders in it could reach
/// outside the model.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let error = |reason: String| Error::Config {
        path: index.to_owned(),
        reason,
    };
    let text = std::fs::read_to_string(index).map_err(io(index))?;
    let parsed: Index =
        serde_json::from_str(&text).map_err(|e| error(format!("not an index of shards: {e}")))?;
    for (weight, shard) in &parsed.weight_map {
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            let reason = format!("the shard {shard:?} of weight {weight:?} is not a file name");
            return Err(error(reason));
        }
    }
    Ok(parsed.weight_map)
}

/// The shards that an index names, each once.
pub(crate) fn shard_names(index: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = read_index(index)?.into_values().collect();
    names.sort_unstable();
    names.dedup();
    Ok(names)
}
