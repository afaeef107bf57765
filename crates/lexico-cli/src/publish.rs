use std::path::{Path, PathBuf};

use clap::Args;
use lexico_llm::published::{CARD, INDEX, Publication, UNKNOWN_LICENSE, repository_name};
use lexico_llm::{Model, Quantize};

use crate::{model, ui};

#[derive(Args)]
pub(crate) struct Publish {
    /// The dictionary file of `lexico train`, `lexico measure` or `lexico import`
    file: PathBuf,
    /// The model it was learned for: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    /// The folder: made where it is not there, else the file is added to those published in it
    #[arg(
        id = "publish_folder",
        short = 'o',
        long = "out",
        value_name = "FOLDER"
    )]
    out: PathBuf,
    #[command(flatten)]
    card: CardArguments,
}

/// What a model card says and the program cannot know.
#[derive(Args)]
pub(crate) struct CardArguments {
    /// License of the dictionaries in the model card, as the hub names it: apache-2.0, say [default: that of the folder,
    /// else unknown]
    #[arg(long, requires = "publish_folder", value_name = "NAME")]
    license: Option<String>,
    /// The model on the hub, in the model card [default: the name of --model, where it is one on the hub]
    #[arg(long, requires = "publish_folder", value_name = "ORG/NAME")]
    base_model: Option<String>,
}

impl CardArguments {
    /// Opens the folder, so that what is wrong with it is found before dictionaries are learned.
    pub(crate) fn open(&self, folder: &Path, model: &Model) -> anyhow::Result<Publication> {
        let (license, base_model) = (self.license.as_deref(), self.base_model.as_deref());
        Ok(Publication::open(folder, model, license, base_model)?)
    }
}

impl Publish {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let model = model::load_model(&self.model, Quantize::None)?;
        let publication = self.card.open(&self.out, &model)?;
        add(publication, &self.out, &self.file, None)
    }
}

/// Adds a dictionary file to the folder, and says what comes next.
pub(crate) fn add(
    publication: Publication,
    folder: &Path,
    file: &Path,
    seconds: Option<f64>,
) -> anyhow::Result<()> {
    let unknown = publication.license() == UNKNOWN_LICENSE;
    let own = publication.add(file, seconds)?;
    let name = repository_name(own.base_model.as_deref().unwrap_or(&own.model.name));
    let folder = folder.display();
    ui::note(&format!(
        "{folder}: {}, {INDEX} and {CARD}. To upload it: hf upload OWNER/{name} {folder}",
        own.file
    ));
    if unknown {
        ui::note(&format!(
            "{CARD} has license: {UNKNOWN_LICENSE}; --license names another"
        ));
    }
    Ok(())
}
