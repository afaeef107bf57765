//! Writing of a folder of published dictionaries.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use lexico::dictionary::{CodeFamily, LayerErrors, ModelIdentity};
use lexico::shown::shown;
use lexico::tensor_file::{check_writable, write_atomically, write_atomically_with};
use lexico::{DictionarySet, KeyValue};
use sha2::{Digest, Sha256};

use super::{
    CARD, EXTENSION, FORMAT, INDEX, Index, Learned, MAX_INDEX, Measured, Published,
    UNKNOWN_LICENSE, hex, model_on_hub, plain_name, read_bounded,
};
use crate::error::{Error, Result, io, refused};
use crate::model::Model;

/// Atoms a code at which a card says what is lost.
const SPARSITIES: [usize; 4] = [8, 12, 16, 24];

/// A folder that dictionaries of a model are published in, opened before they are there.
pub struct Publication {
    folder: PathBuf,
    index: Index,
    model: ModelIdentity,
    fingerprint: String,
    base_model: Option<String>,
}

/// Returns whether this is a name as the hub has them for licenses.
#[must_use]
pub fn is_license(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    (1..=64).contains(&name.len()) && name.bytes().all(allowed)
}

impl Publication {
    /// Opens a folder, made where it is not there, for dictionaries of a model, which may be published in it already.
    /// `base_model` names it on the hub, where its own name does not; without a `license` the folder keeps the one that
    /// it has.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be written; [`Error::File`] where it holds other things than published
    /// dictionaries, or a name is none.
    pub fn open(
        folder: &Path,
        model: &Model,
        license: Option<&str>,
        base_model: Option<&str>,
    ) -> Result<Self> {
        let base_model = match base_model {
            None => model_on_hub(&model.name),
            Some(name) => {
                let reason = || {
                    refused(
                        Path::new(name),
                        "it is no name of a model on the hub, ORG/NAME",
                    )
                };
                Some(model_on_hub(name).ok_or_else(reason)?)
            }
        };
        if let Some(license) = license.filter(|license| !is_license(license)) {
            let reason = "it is no name of a license as the hub has them, apache-2.0 say";
            return Err(refused(Path::new(license), reason));
        }
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        let (path, card) = (folder.join(INDEX), folder.join(CARD));
        let mut index = if path.exists() {
            let index = Index::parse(&read_bounded(&path, MAX_INDEX)?);
            index.map_err(|reason| refused(&path, reason))?
        } else if card.exists() {
            // A model's own card, for one.
            let reason = format!(
                "it has a {CARD} and no {INDEX}, so it is of something else; name another folder"
            );
            return Err(refused(folder, reason));
        } else {
            Index {
                format: FORMAT.to_owned(),
                license: UNKNOWN_LICENSE.to_owned(),
                dictionaries: Vec::new(),
            }
        };
        check_writable(&path)?;
        check_writable(&card)?;
        if let Some(license) = license {
            index.license = license.to_owned();
        }
        Ok(Self {
            folder: folder.to_owned(),
            index,
            model: model.identity(),
            fingerprint: model.weights_fingerprint()?,
            base_model,
        })
    }

    /// License that the card names.
    #[must_use]
    pub fn license(&self) -> &str {
        &self.index.license
    }

    /// Copies a dictionary file into the folder, under the name of its model and effort, and writes the index and the card
    /// anew. `seconds` is the time that learning took, where that is known. Returns what the index says of the file.
    ///
    /// # Errors
    /// Those of [`DictionarySet::load`]; [`lexico::Error::OtherModel`], or [`Error::File`], where it was learned for
    /// another model or the folder has another file of that name; [`Error::Io`].
    pub fn add(mut self, dictionary: &Path, seconds: Option<f64>) -> Result<Published> {
        let set = DictionarySet::load(dictionary)?;
        set.check_fits(&self.model)?;
        if let Some(other) = &set.training.model_fingerprint
            && *other != self.fingerprint
        {
            let reason = format!(
                "it was learned for {} with fingerprint {}, and the model {} has fingerprint {}; name its own model with \
                 --model",
                shown(&set.model.name),
                shown(other),
                shown(&self.model.name),
                self.fingerprint
            );
            return Err(refused(dictionary, reason));
        }
        let mut own = self.describe(&set, seconds);
        let path = self.folder.join(&own.file);
        self.check_free(dictionary, &path, &own.file)?;
        (own.size, own.sha256) = copy(dictionary, &path)?;
        let others = &mut self.index.dictionaries;
        others.retain(|other| other.file != own.file);
        others.push(own.clone());
        others.sort_by(|a, b| a.file.cmp(&b.file));
        let index = self.folder.join(INDEX);
        let json = serde_json::to_string_pretty(&self.index);
        let json = json.map_err(|e| refused(&index, e.to_string()))?;
        write_atomically(&index, format!("{json}\n").as_bytes())?;
        write_atomically(&self.folder.join(CARD), self.index.card().as_bytes())?;
        Ok(own)
    }

    /// Fails where the file would replace one that is not of this model's dictionaries.
    fn check_free(&self, dictionary: &Path, path: &Path, file: &str) -> Result<()> {
        let there = self.index.dictionaries.iter().find(|own| own.file == file);
        let reason = match there {
            Some(other) if other.fingerprint != self.fingerprint => format!(
                "it is there for another model, {} with fingerprint {}; name another folder",
                shown(&other.model.name),
                other.fingerprint
            ),
            Some(_) => return Ok(()),
            None if !path.exists() => return Ok(()),
            None => {
                let same = [dictionary, path].map(|path| path.canonicalize().ok());
                if same[0] == same[1] {
                    return Ok(());
                }
                format!(
                    "it is there and {INDEX} does not name it; remove it, or name another folder"
                )
            }
        };
        Err(refused(path, reason))
    }

    /// Says all of a dictionary file but its bytes.
    fn describe(&self, set: &DictionarySet, seconds: Option<f64>) -> Published {
        let training = &set.training;
        let name = plain_name(self.base_model.as_ref().unwrap_or(&self.model.name));
        let first = set.layers.first();
        let codebooks = first.and_then(|layer| layer.codebooks.as_ref());
        let sparse = first.and_then(|layer| layer.sparse.as_ref());
        // A file may say anything.
        let effort = training
            .effort
            .clone()
            .filter(|effort| super::plain(effort) && effort.len() <= 16);
        let ending = effort.iter().map(|effort| format!("-{effort}"));
        Published {
            file: format!("{name}{}{EXTENSION}", ending.collect::<String>()),
            size: 0,
            sha256: String::new(),
            fingerprint: self.fingerprint.clone(),
            model: self.model.clone(),
            base_model: self.base_model.clone(),
            codebooks: set.max_sparsity(CodeFamily::Additive),
            first_atoms: codebooks.map_or(0, |own| own.keys.sizes().first),
            maps: first.is_some_and(|layer| layer.maps.is_some()),
            sparse_atoms: sparse.map_or(0, |own| own.keys.len()),
            memory: set.bytes() as u64,
            learned: Learned {
                corpus: training.corpus.clone(),
                tokens: training.tokens,
                tokens_crc32: training.tokens_crc32.clone(),
                vectors: training.vectors,
                effort,
                seed: training.seed,
                seconds: seconds.filter(|seconds| seconds.is_finite()),
                tool: training.tool.clone(),
            },
            measured: measured(set),
        }
    }
}

/// What the best codes over the dictionaries keep; `None` where nothing was measured.
fn measured(set: &DictionarySet) -> Option<Measured> {
    let family = set.usual_family();
    let errors = match family {
        CodeFamily::Additive => set.training.additive_relative_error.as_deref(),
        CodeFamily::Sparse => Some(&set.training.relative_error[..]),
    };
    let errors = errors.filter(|errors| !errors.is_empty());
    let relative_error = errors.map(|errors| {
        let mean = |part: fn(&LayerErrors) -> f32| {
            errors.iter().map(part).sum::<f32>() / errors.len() as f32
        };
        KeyValue::new(mean(|e| e.keys), mean(|e| e.values))
    });
    // JSON has no infinities.
    let relative_error = relative_error.filter(|e| e.keys.is_finite() && e.values.is_finite());
    let sparsities = SPARSITIES
        .into_iter()
        .filter(|&s| s <= set.max_sparsity(family));
    let losses = sparsities.filter_map(|s| {
        let loss = set.summed_loss(family, &set.allocate(family, s as f64)?)?;
        Some((s, loss))
    });
    let losses: Vec<(usize, f64)> = losses.filter(|(_, loss)| loss.is_finite()).collect();
    (relative_error.is_some() || !losses.is_empty()).then_some(Measured {
        sparsity: set.usual_sparsity(family),
        relative_error,
        losses,
    })
}

/// Copies a file; returns its size and SHA-256.
fn copy(from: &Path, to: &Path) -> Result<(u64, String)> {
    let mut source = File::open(from).map_err(io(from))?;
    let (mut size, mut hasher) = (0, Sha256::new());
    write_atomically_with(to, |out| {
        let mut buffer = vec![0; 1 << 18];
        loop {
            let read = source.read(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            size += read as u64;
            hasher.update(&buffer[..read]);
            out.write_all(&buffer[..read])?;
        }
    })
    .map_err(Error::from)?;
    Ok((size, hex(hasher)))
}
