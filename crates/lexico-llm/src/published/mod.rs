//! Published dictionaries: a folder of them, on disk or as a repository of the hub.
//!
//! The folder holds dictionary files, an index, `dictionaries.json`, which says of each of them for which model it is, its
//! size and its SHA-256, and a model card. [`Publication`] writes such a folder, [`Source`] reads from one: the index
//! first, then the one file that is for the model, and it checks both.

mod card;
mod folder;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use lexico::DictionarySet;
use lexico::dictionary::{LayerErrors, ModelIdentity};
use lexico::shown::{shown, shown_path};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result, from_json, io, listed, refused, some_of};
use crate::hub::{HubName, RepositoryName, plain};
use crate::import::import_reference;
use crate::model::Model;

pub use folder::{Publication, is_license};

/// The index of a folder of published dictionaries.
pub const INDEX: &str = "dictionaries.json";
/// The model card of such a folder.
pub const CARD: &str = "README.md";
/// The license of a card whose publisher names none, as the hub writes it.
pub const UNKNOWN_LICENSE: &str = "unknown";
/// Format of an index, as it names it.
const FORMAT: &str = "lexico-published/1";
/// Max bytes of an index: of some hundred dictionaries.
const MAX_INDEX: u64 = 1 << 20;
const EXTENSION: &str = ".safetensors";

/// The index: all that is to be known before a dictionary file is downloaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// Format of the index.
    pub format: String,
    /// License of the dictionaries, as the hub names it.
    pub license: String,
    /// The dictionaries, by file name.
    pub dictionaries: Vec<Published>,
}

/// A published dictionary file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// Name of the file, which lies beside the index.
    pub file: String,
    /// Its bytes.
    pub size: u64,
    /// Its SHA-256, in lower case.
    pub sha256: String,
    /// [`Model::weights_fingerprint`] of the model.
    pub fingerprint: String,
    /// The model's name and shape.
    pub model: ModelIdentity,
    /// The model on the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Codebooks for additive codes; 0 where there are none.
    pub codebooks: usize,
    /// Atoms of the first codebook; 0 where there are none.
    pub first_atoms: usize,
    /// Whether additive codes are found behind maps of the heads.
    pub maps: bool,
    /// Atoms for sparse codes; 0 where there are none.
    pub sparse_atoms: usize,
    /// Bytes that the dictionaries take in memory.
    pub memory: u64,
    /// How they were learned.
    pub learned: Learned,
    /// What they keep, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// How dictionaries were learned, as far as it is known.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Learned {
    /// Names of the texts.
    pub corpus: Vec<String>,
    /// Tokens that the model read.
    pub tokens: usize,
    /// CRC-32 of these tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_crc32: Option<String>,
    /// Vectors of each dictionary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vectors: Option<usize>,
    /// `quick`, `normal` or `thorough`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effort: Option<String>,
    /// Seed of every random choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Time that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The program and version.
    pub tool: String,
}

/// What codes over the dictionaries keep of held-out text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Atoms of a code at which the error was measured.
    pub sparsity: usize,
    /// Mean relative error over all layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<LayerErrors>,
    /// Atoms a code on average, and the loss of the model's predictions in nats: the sum of what coding each head alone
    /// costs.
    pub losses: Vec<(usize, f64)>,
}

impl Index {
    /// Reads an index; else says what is wrong with it.
    fn parse(json: &[u8]) -> std::result::Result<Self, String> {
        // serde takes a list for a struct too.
        if !json.trim_ascii_start().starts_with(b"{") {
            return Err("it is no JSON object".to_owned());
        }
        #[derive(Deserialize)]
        struct Format {
            format: String,
        }
        let Format { format } = from_json(json)?;
        if format != FORMAT {
            return Err(format!(
                "its format is \"{}\", and this version of lexico reads {FORMAT}",
                shown(format)
            ));
        }
        let index: Self = from_json(json)?;
        if !is_license(&index.license) {
            let license = shown(&index.license);
            return Err(format!("license: \"{license}\" is no name of a license"));
        }
        for (number, own) in index.dictionaries.iter().enumerate() {
            let fault =
                |key: &str, reason: &str| Err(format!("dictionaries[{number}].{key}: {reason}"));
            if !is_file_name(&own.file) {
                let reason = format!(
                    "\"{}\" is no name of a {EXTENSION} file beside it, of letters, digits, \"-\", \"_\" and \".\"",
                    shown(&own.file)
                );
                return fault("file", &reason);
            }
            if !is_hex(&own.sha256, 64) {
                return fault("sha256", "it is not 64 digits of 0-9 and a-f");
            }
            if !is_hex(&own.fingerprint, 16) {
                return fault("fingerprint", "it is not 16 digits of 0-9 and a-f");
            }
            if own
                .base_model
                .as_ref()
                .is_some_and(|name| model_on_hub(name).is_none())
            {
                return fault(
                    "base_model",
                    "it is no name of a model on the hub, ORG/NAME",
                );
            }
        }
        Ok(index)
    }

    /// Chooses the dictionaries for a model, of the file of that name where one is named; of several those that suit
    /// additive codes, then those learned from the most tokens. Else says why there are none.
    fn choose(
        &self,
        file: Option<&str>,
        model: &ModelIdentity,
        fingerprint: &str,
    ) -> std::result::Result<&Published, String> {
        let all = self.dictionaries.iter();
        let named: Vec<&Published> = all
            .filter(|own| file.is_none_or(|file| own.file == file))
            .collect();
        if let (Some(file), true) = (file, named.is_empty()) {
            let names: Vec<String> = self.dictionaries.iter().map(|d| d.file.clone()).collect();
            return Err(format!("it names no {}{}", shown(file), listed(&names)));
        }
        let own = named.iter().filter(|own| own.fingerprint == fingerprint);
        let Some(own) = own.max_by_key(|own| (own.codebooks > 0, own.learned.tokens)) else {
            let others = named.iter();
            let others: Vec<String> = others
                .map(|own| format!("{} with fingerprint {}", own.model.name, own.fingerprint))
                .collect();
            let others = match others.is_empty() {
                true => "it names none".to_owned(),
                false => format!("they are for {}", some_of(&others)),
            };
            return Err(format!(
                "no dictionaries for the model {} with fingerprint {fingerprint}: {others}. Learn its own with `lexico \
                 train`; those of a model that it was tuned from can be used as a file, --dictionary FILE, of which the \
                 shape alone is checked",
                shown(&model.name)
            ));
        };
        let fits = own.model.check_fits(model);
        fits.map_err(|e| format!("{}: {e}", own.file))?;
        Ok(own)
    }
}

/// Place of published dictionaries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder on this machine.
    Folder(PathBuf),
    /// A repository of the hub.
    Hub(RepositoryName),
}

/// Reads dictionaries from a file of `lexico train`, whichever model they are for; from a .pt file of the reference
/// implementation, which does not say for which model it is; or those of the model from where they are published. With
/// `progress`, bars of downloads are drawn on stderr.
///
/// # Errors
/// Those of [`Source::load`], [`import_reference`] and [`DictionarySet::load`].
pub fn read_dictionaries(model: &Model, path: &Path, progress: bool) -> Result<DictionarySet> {
    if let Some(source) = Source::of(path)? {
        return source.load(model, progress);
    }
    Ok(if path.extension().is_some_and(|e| e == "pt") {
        import_reference(path, model.identity())?
    } else {
        DictionarySet::load(path)?
    })
}

impl Source {
    /// Takes a folder, or `hf://OWNER/NAME[@REVISION][/PATH]`, where the path is of a folder of the repository or of one
    /// dictionary file; `None` for what is neither, as a file is.
    ///
    /// # Errors
    /// [`Error::File`] where it begins as a name on the hub and is none.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        if path.is_dir() {
            return Ok(Some(Self::Folder(path.to_owned())));
        }
        match path.to_str().filter(|text| text.starts_with("hf:")) {
            Some(text) if !path.exists() => {
                let name = text.parse().map(|name| Some(Self::Hub(name)));
                name.map_err(|()| {
                    let reason =
                        "dictionaries on the hub are named hf://OWNER/NAME[@REVISION][/PATH]";
                    refused(path, reason)
                })
            }
            _ => Ok(None),
        }
    }

    /// Loads the dictionaries of a model, downloaded where the hub's cache lacks them. With `progress`, bars are drawn on
    /// stderr.
    ///
    /// # Errors
    /// [`Error::File`], or [`Error::Hub`], for an index that is not there or lies, one without dictionaries of this model,
    /// and a file that is not of the size or the SHA-256 that the index gives; those of [`DictionarySet::load`].
    pub fn load(&self, model: &Model, progress: bool) -> Result<DictionarySet> {
        let (identity, fingerprint) = (model.identity(), model.weights_fingerprint()?);
        let (folder, file) = self.parts();
        let index = self.get(&inside(folder, INDEX), 0, MAX_INDEX, progress)?;
        let index = Index::parse(&read_bounded(&index, MAX_INDEX)?);
        let index = index.map_err(|reason| self.refused(INDEX, reason))?;
        let own = index.choose(file, &identity, &fingerprint);
        let own = own.map_err(|reason| self.refused(INDEX, reason))?;
        let path = self.get(&inside(folder, &own.file), own.size, own.size, progress)?;
        self.check(&path, own)?;
        let set = DictionarySet::load(&path)?;
        set.check_fits(&identity)?;
        match &set.training.model_fingerprint {
            Some(other) if *other != fingerprint => {
                let reason = format!(
                    "{INDEX} says that it is for the model with fingerprint {fingerprint}, and the file itself that it was \
                     learned for {other}; whoever published it must publish it again"
                );
                Err(self.refused(&own.file, reason))
            }
            _ => Ok(set),
        }
    }

    /// The folder in the repository, and the file that is named there.
    fn parts(&self) -> (Option<&str>, Option<&str>) {
        let Self::Hub(RepositoryName {
            path: Some(path), ..
        }) = self
        else {
            return (None, None);
        };
        match path.rsplit_once('/') {
            _ if !path.ends_with(EXTENSION) => (Some(path), None),
            Some((folder, file)) => (Some(folder), Some(file)),
            None => (None, Some(path)),
        }
    }

    /// Returns the place on this machine of a file whose size lies within bounds.
    fn get(&self, file: &str, least: u64, max: u64, progress: bool) -> Result<PathBuf> {
        match self {
            Self::Hub(name) => name.fetch(file, least..=max, progress),
            Self::Folder(folder) => {
                let path = folder.join(file);
                if path.is_file() {
                    return Ok(path);
                }
                let reason = match file {
                    INDEX => format!(
                        "it has no {INDEX}, so it is no folder of published dictionaries: `lexico publish` makes one; or \
                         name a dictionary file"
                    ),
                    _ => format!("it has no {file}, which {INDEX} names"),
                };
                Err(refused(folder, reason))
            }
        }
    }

    /// Checks that a file is the one that the index means.
    fn check(&self, path: &Path, own: &Published) -> Result<()> {
        let size = std::fs::metadata(path).map_err(io(path))?.len();
        let found = if size != own.size {
            format!("it has {size} bytes, and {INDEX} says {}", own.size)
        } else {
            let sha256 = digest(path)?;
            if sha256 == own.sha256 {
                return Ok(());
            }
            format!("its SHA-256 is {sha256}, and {INDEX} says {}", own.sha256)
        };
        let cure = match self {
            Self::Folder(_) => {
                "it is damaged, or one of the two is older: publish it again".to_owned()
            }
            // The cache's name of a file is a link to it.
            Self::Hub(_) => format!(
                "remove {} to download it anew; where that does not help, whoever published it must publish it again",
                shown_path(&path.canonicalize().unwrap_or_else(|_| path.to_owned()))
            ),
        };
        Err(self.refused(&own.file, format!("{found}; {cure}")))
    }

    fn refused(&self, file: &str, reason: String) -> Error {
        match self {
            Self::Folder(folder) => refused(&folder.join(file), reason),
            Self::Hub(name) => Error::Hub {
                name: name.to_string(),
                reason: format!("{file}: {reason}"),
            },
        }
    }
}

/// Returns the name of the repository in which the dictionaries of a model are looked for: its own name, without the owner
/// and without the hub's ending of GGUF files, and `-lexico`.
#[must_use]
pub fn repository_name(model: &str) -> String {
    format!("{}-lexico", plain_name(model))
}

/// A model's name as that of a file or a repository: the part behind the owner, of letters, digits, `-`, `_` and `.`.
fn plain_name(model: &str) -> String {
    let name = model
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or(model);
    let name = match name.len().checked_sub("-gguf".len()) {
        Some(at) if name.is_char_boundary(at) && name[at..].eq_ignore_ascii_case("-gguf") => {
            &name[..at]
        }
        _ => name,
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let name: String = name
        .chars()
        .map(|c| if allowed(c) { c } else { '-' })
        .take(96)
        .collect();
    match name.trim_matches(['-', '.']) {
        "" => "model".to_owned(),
        name => name.to_owned(),
    }
}

/// A model's name where it is one on the hub, `org/name`.
fn model_on_hub(name: &str) -> Option<String> {
    let name: HubName = name.parse().ok()?;
    (name.file.is_none() && name.revision == "main").then_some(name.repository)
}

fn is_file_name(name: &str) -> bool {
    plain(name) && name.len() <= 128 && name.ends_with(EXTENSION)
}

fn is_hex(text: &str, digits: usize) -> bool {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.len() == digits && text.bytes().all(digit)
}

fn inside(folder: Option<&str>, file: &str) -> String {
    folder.map_or_else(|| file.to_owned(), |folder| format!("{folder}/{file}"))
}

/// Reads a file of at most so many bytes.
fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io(path))?;
    file.take(max + 1)
        .read_to_end(&mut bytes)
        .map_err(io(path))?;
    if bytes.len() as u64 > max {
        return Err(refused(
            path,
            format!("it has more than {max} bytes, too many for an index"),
        ));
    }
    Ok(bytes)
}

/// The SHA-256 of a file.
fn digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(io(path))?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).map_err(io(path))?;
    Ok(hex(hasher))
}

fn hex(hasher: Sha256) -> String {
    let digest = hasher.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_named_after_models() {
        for (model, name) in [
            (
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "SmolLM2-135M-Instruct-lexico",
            ),
            (
                "org/SmolLM2-135M-Instruct-GGUF",
                "SmolLM2-135M-Instruct-lexico",
            ),
            ("tiny", "tiny-lexico"),
            ("Qwen2.5 Coder 0.5B", "Qwen2.5-Coder-0.5B-lexico"),
            ("..", "model-lexico"),
            ("é-gguf", "model-lexico"),
            ("", "model-lexico"),
        ] {
            assert_eq!(repository_name(model), name, "{model}");
        }
    }
}
