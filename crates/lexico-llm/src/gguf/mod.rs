//! Models in GGUF files (ggml's format, version 2 and 3), with all they say of themselves.
//!
//! The container is read by a reader of our own: candle's (0.11) panics on an alignment of 0 and
//! keeps every number of an array in an enum. Blocks and their products are candle's.

mod config;
mod file;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::error::{Error, Result};
use file::{GgufFile, TensorPlace};
pub(crate) use tokenizer::TokenizerTexts;

/// A model in one GGUF file, or in several parts; its weights stay in the file.
pub struct GgufModel {
    /// The first holds the metadata.
    files: Vec<GgufFile>,
    /// Whether rows of queries and keys lie as the llama architecture has them.
    interleaved: bool,
    head_dim: usize,
    config: Config,
}

impl GgufModel {
    /// Opens a file; where it is one of several parts, all of them.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gguf`], and [`Error::Config`] for a model that cannot run.
    pub fn open(path: &Path) -> Result<Self> {
        let mut files = vec![GgufFile::open(path)?];
        let parts = files[0].metadata.unsigned("split.count").unwrap_or(1);
        if parts > 1 {
            let names = part_paths(path).filter(|names| names.len() as u64 == parts);
            let Some(names) = names else {
                let reason = format!(
                    "it is one of {parts} parts, but is not named NAME-00001-of-{parts:05}.gguf"
                );
                return Err(files[0].error(reason));
            };
            files = names
                .iter()
                .map(|name| GgufFile::open(name))
                .collect::<Result<_>>()?;
        }
        let first = &files[0];
        let has_head = files
            .iter()
            .any(|f| f.tensors.contains_key("output.weight"));
        let factors = config::rotary_factors(&files)?;
        let config = config::read(first, !has_head, factors)?;
        Ok(Self {
            interleaved: config::architecture(first)? == "llama",
            head_dim: config.head_dim,
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

    /// What the file calls the model.
    pub fn name(&self) -> String {
        let stem = || {
            self.path()
                .file_stem()
                .map(|s| s.to_string_lossy().into_owned())
        };
        let own = self.files[0].metadata.text("general.name");
        let own = own.filter(|name| !name.is_empty()).map(str::to_owned);
        own.or_else(stem).unwrap_or_else(|| "model".to_owned())
    }

    /// How many tensors there are of every number type, by its name, `Q8_0` say.
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

    /// The tokenizer, as the texts of the files that folders have.
    pub(crate) fn tokenizer(&self) -> Result<TokenizerTexts> {
        tokenizer::read(&self.files[0], self.config.vocabulary)
    }

    pub(crate) fn interleaves_rotary_pairs(&self) -> bool {
        self.interleaved
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// A tensor and the file it is in.
    pub(crate) fn tensor(&self, name: &str) -> Option<(&GgufFile, &TensorPlace)> {
        let mut files = self.files.iter();
        files.find_map(|file| Some((file, file.tensors.get(name)?)))
    }
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
    fn error(&self, reason: String) -> Error {
        Error::Gguf {
            path: self.path().to_owned(),
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
