//! The arguments by which several commands name a model.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use lexico::DictionarySet;
use lexico_llm::cache::CacheSpec;
use lexico_llm::hub::HubName;
use lexico_llm::published::{self, repository_name};
use lexico_llm::{DICTIONARY_FILE, Device, DeviceName, Model, Quantize};

use crate::ui;

#[derive(Args)]
pub(crate) struct ModelArguments {
    /// The model: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    pub(crate) model: String,
    /// Format in which the model's matrices are held: none (as they are stored), q8_0, q6_k or q4_k
    #[arg(long, default_value = "none", value_name = "FORMAT")]
    quantize: Quantize,
    /// The model's dictionaries: a file of `lexico train`, a .pt of the reference implementation, a folder of
    /// `lexico publish`, or such a folder on the hub, hf://OWNER/NAME[@REVISION][/PATH]
    /// [default: the model's own, else those of the place that LEXICO_DICTIONARIES names]
    #[arg(short, long, value_name = "FILE|FOLDER|hf://NAME")]
    dictionary: Option<PathBuf>,
    /// A text, of which the first 4,096 tokens calibrate the cache methods that need it (oscar)
    /// [default: each cache's own prompt]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Device on which the model computes: cpu, cuda or cuda:N (builds with --features cuda), or auto, the
    /// first GPU where there is one
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: DeviceName,
}

impl ModelArguments {
    /// Loads the model, with its dictionaries where one of the caches needs them.
    pub(crate) fn load(&self, caches: &[CacheSpec]) -> anyhow::Result<Model> {
        self.load_or(caches, &mut |_, _| Ok(None))
    }

    /// Loads the model as [`load`](Self::load) does; where it has none of the dictionaries that are needed, `learn` may
    /// make some, given the place to keep them.
    pub(crate) fn load_or(
        &self,
        caches: &[CacheSpec],
        learn: &mut dyn FnMut(&Model, &Path) -> anyhow::Result<Option<DictionarySet>>,
    ) -> anyhow::Result<Model> {
        // What is not there is found before the model is read.
        let device = self.device.open()?;
        let path = (self.model != "tiny")
            .then(|| path_of(&self.model))
            .transpose()?;
        let mut model = load_from(&self.model, path.as_deref(), self.quantize, &device)?;
        let needed = caches.iter().any(|spec| spec.method().needs_dictionaries);
        if let Some(path) = &self.dictionary {
            self.read(&mut model, path)?;
        } else if needed && model.dictionaries.is_none() {
            let mut places: Vec<PathBuf> = path.iter().map(|path| beside(path)).collect();
            let file = format!("{}.safetensors", model.name.replace('/', "--"));
            places.extend(own_folder().map(|own| own.join(file)));
            if let Some(path) = places.iter().find(|place| place.is_file()) {
                self.read(&mut model, path)?;
            } else if !self.read_ready_made(&mut model)? {
                // The user's own folder is there for it, whoever owns the model's.
                let learned = places.last().map(|place| learn(&model, place));
                match learned.transpose()?.flatten() {
                    Some(dictionaries) => model.set_dictionaries(dictionaries)?,
                    None => return Err(no_dictionaries(&self.model, &model.name, &places)),
                }
            }
        }
        if let Some(path) = &self.calibration {
            let of_file = || path.display().to_string();
            let text = std::fs::read_to_string(path).with_context(of_file)?;
            anyhow::ensure!(!text.trim().is_empty(), "{} has no text", of_file());
            let tokens = model.tokenizer.encode_first(&text)?;
            model.calibrate(&tokens).with_context(of_file)?;
        }
        Ok(model)
    }

    /// Reads ready-made dictionaries from the place that the environment names; `false` where it names none, or there are
    /// none of this model, which is said.
    fn read_ready_made(&self, model: &mut Model) -> anyhow::Result<bool> {
        let Some(place) = ready_made(&model.name) else {
            return Ok(false);
        };
        match self.read(model, &place) {
            Ok(()) => {
                ui::note(&format!(
                    "{}: dictionaries of {}, by {READY_MADE}",
                    place.display(),
                    model.name
                ));
                Ok(true)
            }
            Err(error) => {
                ui::note(&format!("no ready-made dictionaries: {error:#}"));
                Ok(false)
            }
        }
    }

    fn read(&self, model: &mut Model, path: &Path) -> anyhow::Result<()> {
        let dictionaries = read_dictionaries(model, path)?;
        let set = model.set_dictionaries(dictionaries);
        set.with_context(|| path.display().to_string())
    }
}

/// Variable that names the place where dictionaries of any model are looked for.
const READY_MADE: &str = "LEXICO_DICTIONARIES";

/// Returns where the environment has ready-made dictionaries of a model: of `hf://OWNER` the repository that is named after
/// the model, else the place itself.
fn ready_made(model: &str) -> Option<PathBuf> {
    let place = std::env::var_os(READY_MADE).filter(|place| !place.is_empty())?;
    let owner = place.to_str().and_then(|place| place.strip_prefix("hf://"));
    let owner = owner.map(|owner| owner.trim_end_matches('/'));
    Some(match owner.filter(|owner| !owner.contains('/')) {
        Some(owner) => format!("hf://{owner}/{}", repository_name(model)).into(),
        None => place.into(),
    })
}

/// Reads dictionaries as [`published::read_dictionaries`] does, with bars on a terminal.
pub(crate) fn read_dictionaries(model: &Model, path: &Path) -> anyhow::Result<DictionarySet> {
    let progress = std::io::stderr().is_terminal();
    Ok(published::read_dictionaries(model, path, progress)?)
}

pub(crate) fn load_model(name: &str, quantize: Quantize) -> anyhow::Result<Model> {
    let path = (name != "tiny").then(|| path_of(name)).transpose()?;
    load_from(name, path.as_deref(), quantize, &Device::Cpu)
}

/// Loads the model of this name from its folder or file; without one it is the embedded model.
fn load_from(
    name: &str,
    path: Option<&Path>,
    quantize: Quantize,
    device: &Device,
) -> anyhow::Result<Model> {
    let Some(path) = path else {
        return Ok(Model::tiny_on(quantize, device)?);
    };
    let mut model = Model::load_on(path, quantize, device)?;
    model.notes.iter().for_each(|note| ui::note(note));
    if let Some(hub) = hub_name(name) {
        // The folder in the hub's cache is named by commit, and many GGUF files by nobody.
        model.name = hub.repository;
    }
    Ok(model)
}

/// Returns the place of the dictionaries beside a model's folder or GGUF file.
pub(crate) fn beside(model: &Path) -> PathBuf {
    if model.is_file() {
        model.with_file_name(DICTIONARY_FILE)
    } else {
        model.join(DICTIONARY_FILE)
    }
}

/// Returns the folder or file of a model that is not embedded: a path, else a name on the hub.
pub(crate) fn path_of(name: &str) -> anyhow::Result<PathBuf> {
    match hub_name(name) {
        Some(hub) => {
            let fetched = hub
                .fetch(std::io::stderr().is_terminal())
                .with_context(|| {
                    format!("there is no {name} on this machine, nor could it be had")
                })?;
            fetched.notes.iter().for_each(|note| ui::note(note));
            Ok(fetched.path)
        }
        None => Ok(PathBuf::from(name)),
    }
}

fn hub_name(name: &str) -> Option<HubName> {
    name.parse().ok().filter(|_| !Path::new(name).exists())
}

/// Returns the user's folder of dictionaries: the place of those of models whose folder is not the user's.
fn own_folder() -> Option<PathBuf> {
    Some(dirs::data_dir()?.join("lexico").join("dictionaries"))
}

/// Makes the user's folder of dictionaries where `out` is to lie in it: it is ours to make.
pub(crate) fn make_own_folder(out: &Path) -> anyhow::Result<()> {
    match own_folder() {
        Some(own) if out.parent() == Some(&own) => {
            std::fs::create_dir_all(&own).with_context(|| own.display().to_string())
        }
        _ => Ok(()),
    }
}

fn no_dictionaries(model: &str, name: &str, places: &[PathBuf]) -> anyhow::Error {
    let listed: Vec<String> = places
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    // A model from the hub lies in a cache, which is no place to keep things.
    let best = if hub_name(model).is_some() {
        listed.last()
    } else {
        listed.first()
    };
    let best = best.map_or(DICTIONARY_FILE, String::as_str);
    let repository = repository_name(name);
    anyhow::anyhow!(
        "the model {model} has no dictionaries: there is no {}. Train them with \
         `lexico train --model {model} --corpus TEXT --out {best}`, or let `lexico run --learn` do it. \
         Ready-made ones are taken by --dictionary hf://OWNER/NAME, or looked for in OWNER/{repository} where {READY_MADE} is hf://OWNER; \
         --dictionary takes another file too, and --cache full needs none",
        listed.join(" and no ")
    )
}
