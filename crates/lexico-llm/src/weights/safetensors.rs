//! One safetensors file, or shards with an index.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use lexico::shown::shown;
use lexico::tensor_file::{Dtype, TensorFile};
use serde::Deserialize;

use super::{check_shape, weight_error};
use crate::config::{Config, missing, quantised};
use crate::error::{Result, from_json, io, refused, some_of};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const NEEDED: &str = "config.json, tokenizer.json, and model.safetensors or its shards with \
                      model.safetensors.index.json";

/// Ends of tensors' names by which formats of quantised weights are told.
const QUANTISED: [(&str, &str); 16] = [
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".weight_scale_inv", "FP8"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "FP8 or compressed-tensors"),
    (".input_scale", "FP8"),
    (".SCB", "bitsandbytes"),
    (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"),
    (".quant_state.bitsandbytes__nf4", "bitsandbytes"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes"),
    ("_proj_blocks", "MXFP4"),
    ("_proj.weight_blocks", "MXFP4"),
    (".q_weight", "EXL2"),
    (".W_q", "HQQ"),
];
/// Ends of names of tensors that older programs wrote and that nothing reads.
const LEFTOVERS: [&str; 2] = [".rotary_emb.inv_freq", ".attn.masked_bias"];

/// The files of a model's weights.
pub(crate) struct Shards {
    /// Files by their names.
    files: BTreeMap<String, TensorFile>,
    /// Name of the file that holds each weight.
    shard_of: BTreeMap<String, String>,
    /// Name in messages where no file holds a weight.
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
            return Err(missing(folder, SINGLE, NEEDED));
        }
        let shard_of = read_index(&index)?;
        let mut files = BTreeMap::new();
        for shard in shard_of.values() {
            if files.contains_key(shard) {
                continue;
            }
            let path = folder.join(shard);
            if !path.is_file() {
                return Err(missing(folder, shard, "every shard that its index names"));
            }
            files.insert(shard.clone(), TensorFile::open(path)?);
        }
        Ok(Self {
            files,
            shard_of,
            path: index,
        })
    }

    pub(super) fn single(file: TensorFile) -> Self {
        let path = file.path().to_owned();
        let names = file.names().into_iter();
        Self {
            shard_of: names.map(|name| (name, SINGLE.to_owned())).collect(),
            files: BTreeMap::from([(SINGLE.to_owned(), file)]),
            path,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }

    pub(super) fn check_names(&self, config: &Config) -> Result<Option<String>> {
        let format = |name: &String| QUANTISED.iter().find(|(end, _)| name.ends_with(end));
        if let Some((_, format)) = self.shard_of.keys().find_map(format) {
            return Err(refused(&self.path, quantised(format)));
        }
        let parts = (0..config.layers).map(Some).chain([None]);
        let known = parts.flat_map(|layer| config.weights(layer));
        let known: HashSet<String> = known.map(|(name, _)| name).collect();
        let leftover = |name: &&String| LEFTOVERS.iter().any(|end| name.ends_with(end));
        let unused = self.shard_of.keys().filter(|name| !known.contains(*name));
        let unused = unused.filter(|name| !leftover(name) && *name != "lm_head.weight");
        let unused: Vec<String> = unused.cloned().collect();
        Ok((!unused.is_empty()).then(|| {
            let (model, layers) = (&config.architecture, config.layers);
            let names = some_of(&unused);
            format!("weights that {model} of {layers} layers does not use are passed over, as in transformers: {names}")
        }))
    }

    fn file(&self, name: &str) -> Result<&TensorFile> {
        let shard = self.shard_of.get(name);
        let file = shard.and_then(|shard| self.files.get(shard));
        file.ok_or_else(|| weight_error(&self.path, name, "it is missing".to_owned()))
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

/// Reads which shard holds each weight. Shards are plain file names: one with folders in it could reach
/// outside the model.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(io(index))?;
    let parsed: Index = from_json(text.as_bytes())
        .map_err(|e| refused(index, format!("not an index of shards: {e}")))?;
    for (weight, shard) in &parsed.weight_map {
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            let (shard, weight) = (shown(shard), shown(weight));
            let reason = format!("the shard \"{shard}\" of weight \"{weight}\" is not a file name");
            return Err(refused(index, reason));
        }
    }
    Ok(parsed.weight_map)
}

/// The shards that an index names, each once.
pub(crate) fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    Ok(read_index(index)?.into_values().collect())
}
