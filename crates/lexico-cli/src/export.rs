use std::path::PathBuf;

use clap::Args;
use lexico::DictionarySet;
use lexico::dictionary::CodeFamily;
use lexico_llm::export::export_reference;

use crate::ui;

#[derive(Args)]
pub(crate) struct Export {
    /// The dictionary file of `lexico train` or `lexico import`
    file: PathBuf,
    /// The .pt file to write: one f32 tensor [2·layers, m, N], keys and values interleaved
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

impl Export {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        if self.out.extension().is_none_or(|e| e != "pt") {
            anyhow::bail!(
                "{}: the reference implementation's files end in .pt, and by that `lexico run` knows them",
                self.out.display()
            );
        }
        ui::check_out(&self.out, &[&self.file])?;
        let set = DictionarySet::load(&self.file)?;
        export_reference(&set, &self.out)?;
        let first = set.layers.first().and_then(|layer| layer.sparse.as_ref());
        let atoms = first.map_or(0, |both| both.keys.len());
        let left_out = if set.usual_family() == CodeFamily::Additive {
            "; the codebooks of additive codes are left out: such files have no place for them"
        } else {
            ""
        };
        ui::note(&format!(
            "{}: a tensor [{}, {}, {atoms}]{left_out}",
            self.out.display(),
            2 * set.layers.len(),
            set.model.head_dim
        ));
        Ok(())
    }
}
