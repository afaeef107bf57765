use std::path::PathBuf;

use clap::Args;
use lexico_llm::Quantize;
use lexico_llm::import::import_reference;

use crate::{model, ui};

#[derive(Args)]
pub(crate) struct Import {
    /// The .pt file: one tensor [2·layers, m, N], keys and values interleaved
    file: PathBuf,
    /// The model it was learned for: "tiny", a folder or GGUF file, or a name on the hub
    #[arg(short, long, value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    /// The dictionary file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

impl Import {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        ui::check_dictionary_out(&self.out, &[&self.file])?;
        let model = model::load_model(&self.model, Quantize::None)?;
        let set = import_reference(&self.file, model.identity())?;
        set.save(&self.out)?;
        let first = set.layers.first().and_then(|layer| layer.sparse.as_ref());
        let atoms = first.map_or(0, |both| both.keys.len());
        let layers = set.layers.len();
        ui::note(&format!(
            "{}: {layers} layers of {atoms} atoms",
            self.out.display()
        ));
        Ok(())
    }
}
