//! One safetensors file, or shards with an index.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use lexico::tensor_file::{Dtype, TensorFile};
use serde::Deserialize;

use super::{check_shape, weight_error};
use crate::error::{Error, Result, io};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const NEEDED: &str = "config.json, tokenizer.json, and model.safetensors or its shards with \
                      model.safetensors.index.json";

/// The files of a model's weights.
pub(crate) struct Shards {
    files: Vec<TensorFile>,
    /// Which file holds a weight.
    file_of: HashMap<String, usize>,
    /// What messages name where no file holds a weight.
    path: PathBuf,
}

impl Shards {
    pub(super) fn open(folder: &Path) -> Result<Self> {
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
        let mut files = Vec::new();
        let mut numbers: HashMap<String, usize> = HashMap::new();
        let mut file_of = HashMap::new();
        for (weight, shard) in read_index(&index)? {
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

    pub(super) fn single(file: TensorFile) -> Self {
        let path = file.path().to_owned();
        let file_of = file.names().into_iter().map(|name| (name, 0)).collect();
        Self {
            files: vec![file],
            file_of,
            path,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self, name: &str) -> Result<&TensorFile> {
        match self.file_of.get(name) {
            Some(&number) => Ok(&self.files[number]),
            None => Err(weight_error(&self.path, name, "it is missing".to_owned())),
        }
    }

    pub(super) fn number_type(&self, name: &str, shape: &[usize]) -> Result<GgmlDType> {
        let file = self.file(name)?;
        let (dtype, found) = file.info(name)?;
        check_shape(file.path(), name, found, shape)?;
        match dtype {
            Dtype::F32 => Ok(GgmlDType::F32),
            Dtype::F16 => Ok(GgmlDType::F16),
            Dtype::BF16 => Ok(GgmlDType::BF16),
            other => {
                let reason = format!("its numbers are {other:?}; F32, F16 or BF16 are needed");
                Err(weight_error(file.path(), name, reason))
            }
        }
    }

    pub(super) fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
        let row_bytes = out.len() / rows.len().max(1);
        let file = self.file(name)?;
        Ok(file.read_bytes(name, rows.start * row_bytes, out)?)
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
