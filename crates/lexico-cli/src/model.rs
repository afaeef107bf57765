//! The arguments by which several commands name a model.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use lexico::DictionarySet;
use lexico_llm::cache::CacheSpec;
use lexico_llm::import::import_reference;
use lexico_llm::{DICTIONARY_FILE, Model, Quantize};

#[derive(Args)]
pub(crate) struct ModelArguments {
    /// The model: "tiny" (embedded) or a folder in Hugging Face layout
    #[arg(short, long, default_value = "tiny", value_name = "tiny|FOLDER")]
    pub(crate) model: String,
    /// How the model's matrices are held: none (f32), q8_0, q6_k or q4_k
    #[arg(long, default_value = "none", value_name = "FORMAT")]
    quantize: Quantize,
    /// The model's dictionaries, a file of `lexico train` or a .pt of the reference implementation
    /// [default: the model's own]
    #[arg(short, long, value_name = "FILE")]
    dictionary: Option<PathBuf>,
}

impl ModelArguments {
    /// The model, with its dictionaries where one of the caches needs them.
    pub(crate) fn load(&self, caches: &[CacheSpec]) -> anyhow::Result<Model> {
        let mut model = load_model(&self.model, self.quantize)?;
        let needed = caches.iter().any(|spec| spec.method().needs_dictionaries);
        let beside = Path::new(&self.model).join(DICTIONARY_FILE);
        if let Some(path) = &self.dictionary {
            self.read(&mut model, path)?;
        } else if needed && model.dictionaries.is_none() {
            if !beside.is_file() {
                anyhow::bail!(
                    "the model {name} has no dictionaries: there is no {beside}. Train them with \
                     `lexico train --model {name} --corpus TEXT --out {beside}`, name another file \
                     with --dictionary, or use --cache full",
                    name = self.model,
                    beside = beside.display(),
                );
            }
            self.read(&mut model, &beside)?;
        }
        Ok(model)
    }

    fn read(&self, model: &mut Model, path: &Path) -> anyhow::Result<()> {
        let file = || path.display().to_string();
        if path.extension().is_some_and(|e| e == "pt") {
            let dictionaries = import_reference(path, model.identity())?;
            model.set_dictionaries(dictionaries).with_context(file)
        } else {
            model
                .set_dictionaries(DictionarySet::load(path)?)
                .with_context(file)
        }
    }
}

pub(crate) fn load_model(name: &str, quantize: Quantize) -> anyhow::Result<Model> {
    Ok(match name {
        "tiny" => Model::tiny_quantised(quantize)?,
        folder => Model::load(Path::new(folder), quantize)?,
    })
}
