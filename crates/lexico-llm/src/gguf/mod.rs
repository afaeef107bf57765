//! Models in GGUF files (ggml's format, version 2 and 3), with all they say of themselves.
//!
//! The container is read by a reader of our own: candle's (0.11) panics on an alignment of 0 and
//! keeps every number of an array in an enum. Blocks and their products are candle's.

mod config;
mod file;
mod folder;
mod tokenizer;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::error::{Error, Result, refused};
pub(crate) use file::{GgufFile, TensorPlace};
pub(crate) use tokenizer::GgufTokenizer;

/// A model in one GGUF file, or in several parts; its weights stay in the file.
pub struct GgufModel {
    /// The first holds the metadata.
    files: Vec<GgufFile>,
    /// Name that the file gives the model; perhaps none.
    name: String,
    /// True where rows of queries and keys lie as the llama architecture has them.
    pub(crate) interleaved: bool,
    config: Config,
}

impl GgufModel {
    /// Opens a file; where it is one of several parts, all of them.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::File`], for a model that cannot run too.
    pub fn open(path: &Path) -> Result<Self> {
        let mut files = vec![GgufFile::open(path)?];
        let parts = files[0].unsigned("split.count")?.unwrap_or(1);
        if parts > 1 {
            let names = part_paths(path).filter(|names| names.len() as u64 == parts);
            let Some(names) = names else {
                let reason = format!(
                    "it is one of {parts} parts, but is not named NAME-00001-of-{parts:05}.gguf"
                );
                return Err(files[0].error(reason));
            };
            let parts = names.iter().map(|name| GgufFile::open(name));
            files = parts.collect::<Result<_>>()?;
            check_parts(&files)?;
        }
        let architecture = config::architecture(&files[0])?;
        let config = config::read(&files)?;
        check_tensors(&files, &config, architecture)?;
        Ok(Self {
            name: files[0]
                .text("general.name")?
                .unwrap_or_default()
                // A name from outside must not steer the terminal that it is shown on.
                .replace(char::is_control, ""),
            interleaved: architecture == "llama",
            config,
            files,
        })
    }

    /// The decoder's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn path(&self) -> &Path {
        self.files[0].path()
    }

    /// Name that the file gives the model.
    pub fn name(&self) -> String {
        if !self.name.is_empty() {
            return self.name.clone();
        }
        let stem = self.path().file_stem();
        stem.map_or("model".into(), |stem| stem.to_string_lossy().into_owned())
    }

    /// Counts the tensors of every number type, by its name, `Q8_0` say.
    pub fn number_types(&self) -> BTreeMap<String, usize> {
        let mut types = BTreeMap::new();
        for tensor in self.files.iter().flat_map(|file| file.tensors.values()) {
            let name = match tensor.number_type {
                Ok(known) => format!("{known:?}"),
                Err(number) => format!("type {number}"),
            };
            *types.entry(name).or_default() += 1;
        }
        types
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<GgufTokenizer> {
        tokenizer::read(&self.files[0], self.config.vocabulary)
    }

    /// A tensor and the file it is in.
    pub(crate) fn tensor(&self, name: &str) -> Option<(&GgufFile, &TensorPlace)> {
        let mut files = self.files.iter();
        files.find_map(|file| Some((file, file.tensors.get(name)?)))
    }
}

/// Checks that parts belong together: each has its number, and no tensor is in two.
fn check_parts(files: &[GgufFile]) -> Result<()> {
    let mut tensors = HashSet::new();
    for (number, file) in files.iter().enumerate() {
        let (own, count) = (file.unsigned("split.no")?, file.unsigned("split.count")?);
        if own != Some(number as u64) || count != Some(files.len() as u64) {
            let reason = format!("it is not part {} of {}", number + 1, files.len());
            return Err(file.error(reason));
        }
        if let Some(name) = file.tensors.keys().find(|name| !tensors.insert(*name)) {
            return Err(file.error(format!("its tensor {name:?} is in another part too")));
        }
    }
    let held = tensors.len() as u64;
    match files[0].unsigned("split.tensors.count")? {
        Some(promised) if promised != held => {
            let reason = format!("its parts hold {held} tensors, {promised} are promised");
            Err(files[0].error(reason))
        }
        _ => Ok(()),
    }
}

/// Refuses tensors that the decoder would not use: the model is another than it seems.
fn check_tensors(files: &[GgufFile], config: &Config, architecture: &str) -> Result<()> {
    let parts = (0..config.layers).map(Some).chain([None]);
    let weights = parts.flat_map(|layer| config.weights(layer));
    let known: HashSet<String> = weights.map(|(name, _)| own_name(&name)).collect();
    for file in files {
        let mut names = file.tensors.keys();
        if let Some(name) = names.find(|name| !known.contains(*name) && *name != config::FACTORS) {
            let (model, layers) = (format!("architecture {architecture:?}"), config.layers);
            let reason = format!("a model of {model} and {layers} layers has no tensor {name:?}");
            return Err(file.error(reason));
        }
    }
    Ok(())
}

/// Parts of a layer, by their names in safetensors files and in GGUF files.
const PARTS: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The name in GGUF files of a weight that safetensors files call `name`.
pub(crate) fn own_name(name: &str) -> String {
    let own = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight".to_owned()),
        "model.norm.weight" => Some("output_norm.weight".to_owned()),
        "lm_head.weight" => Some("output.weight".to_owned()),
        _ => of_layer(name),
    };
    own.unwrap_or_else(|| name.to_owned())
}

fn of_layer(name: &str) -> Option<String> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (_, own) = PARTS.iter().find(|(known, _)| *known == part)?;
    Some(format!("blk.{layer}.{own}.{kind}"))
}

/// The parts of a file that is named as one of several, `NAME-00001-of-00003.gguf`; `None` for any
/// other name.
pub(crate) fn part_paths(path: &Path) -> Option<Vec<PathBuf>> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(number) || !digits(count) {
        return None;
    }
    let count: u32 = count.parse().ok()?;
    let part = |i: u32| path.with_file_name(format!("{name}-{i:05}-of-{count:05}.gguf"));
    Some((1..=count).map(part).collect())
}

impl GgufFile {
    fn error(&self, reason: impl Into<String>) -> Error {
        refused(self.path(), reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_llama_cpp() {
        assert_eq!(
            own_name("model.layers.12.self_attn.q_proj.bias"),
            "blk.12.attn_q.bias"
        );
        assert_eq!(
            own_name("model.layers.0.post_attention_layernorm.weight"),
            "blk.0.ffn_norm.weight"
        );
        assert_eq!(own_name("lm_head.weight"), "output.weight");
    }

    #[test]
    fn parts_are_named_by_their_number() {
        let parts = part_paths(Path::new("m/a-b-00002-of-00003.gguf")).unwrap();
        let names: Vec<_> = parts.iter().map(|p| p.display().to_string()).collect();
        assert_eq!(names[0], "m/a-b-00001-of-00003.gguf");
        assert_eq!(names.len(), 3);
        for other in [
            "a.gguf",
            "a-1-of-2.gguf",
            "a-00001-of-00002.bin",
            "of-.gguf",
        ] {
            assert_eq!(part_paths(Path::new(other)), None, "{other}");
        }
    }
}
