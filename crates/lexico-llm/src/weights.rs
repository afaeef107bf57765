//! A model's weights: one safetensors file, or shards with an index.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lexico::tensor_file::{Dtype, TensorFile};
use serde::Deserialize;

use crate::error::{Error, Result, io};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const NEEDED: &str = "config.json, tokenizer.json, and model.safetensors or its shards with \
                      model.safetensors.index.json";

/// Named weights, converted to f32 as they are read.
pub(crate) struct Weights {
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
        Self {
            files: vec![file],
            file_of,
            path,
        }
    }

    fn sharded(folder: &Path, index: PathBuf) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(&index).map_err(io(&index))?;
        let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::Config {
            path: index.clone(),
            reason: format!("not an index of shards: {e}"),
        })?;
        let mut files = Vec::new();
        let mut numbers: HashMap<String, usize> = HashMap::new();
        let mut file_of = HashMap::new();
        for (weight, shard) in parsed.weight_map {
            // A name with folders in it could reach outside the model.
            if Path::new(&shard).file_name() != Some(shard.as_ref()) {
                return Err(Error::Config {
                    path: index,
                    reason: format!("the shard {shard:?} of weight {weight:?} is not a file name"),
                });
            }
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
        Ok(Self {
            files,
            file_of,
            path: index,
        })
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// Reads one weight, which must have `shape`.
    pub(crate) fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
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
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)?;
        // Products of bf16 weights are many times slower than of f32 on a CPU.
        Ok(tensor.to_dtype(DType::F32)?)
    }
}
