//! The arguments by which several commands name a model.

use std::path::{Path, PathBuf};

use clap::Args;
use lexico::DictionarySet;
use lexico_llm::Model;
use lexico_llm::import::import_reference;

#[derive(Args)]
pub(crate) struct ModelArguments {
    /// The model: "tiny" (embedded) or a folder in Hugging Face layout
    #[arg(short, long, default_value = "tiny", value_name = "tiny|FOLDER")]
    pub(crate) model: String,
    /// The model's dictionaries, a file of `lexico train` or a .pt of the reference implementation
    /// [default: the model's own]
    #[arg(short, long, value_name = "FILE")]
    dictionary: Option<PathBuf>,
}

impl ModelArguments {
    pub(crate) fn load(&self) -> anyhow::Result<Model> {
        let mut model = load_model(&self.model)?;
        if let Some(path) = &self.dictionary {
            let dictionaries = if path.extension().is_some_and(|e| e == "pt") {
                import_reference(path, model.identity())?
            } else {
                DictionarySet::load(path)?
            };
            model.set_dictionaries(dictionaries)?;
        }
        Ok(model)
    }
}

pub(crate) fn load_model(name: &str) -> anyhow::Result<Model> {
    Ok(match name {
        "tiny" => Model::tiny()?,
        folder => Model::load(Path::new(folder))?,
    })
}
