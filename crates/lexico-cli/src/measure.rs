use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lexico_llm::Quantize;
use lexico_llm::train::{TrainOptions, measure_losses};

use crate::corpus::CorpusArguments;
use crate::train::Progress;
use crate::{interrupt, model, ui};

#[derive(Args)]
pub(crate) struct Measure {
    /// The dictionaries: a file of an earlier `lexico train` or of `lexico import`, a .pt of the reference implementation,
    /// or published ones, as for `lexico run`
    file: PathBuf,
    /// The model: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    #[command(flatten)]
    corpus: CorpusArguments,
    /// The dictionary file to write: the same dictionaries, with the losses
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Max number of tokens that the model sees at once
    #[arg(long, visible_alias = "ctx-size", default_value_t = TrainOptions::default().context, value_name = "N")]
    context: usize,
}

impl Measure {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        ui::check_out(&self.out, &[&self.file])?;
        let corpus = self.corpus.open_for(&self.out)?;
        let model = model::load_model(&self.model, Quantize::None)?;
        let config = model.decoder.config();
        let context = self.context.min(config.context);
        anyhow::ensure!(
            context >= 2,
            "--context {context}: at least 2 tokens are needed"
        );
        let mut dictionaries = model::read_dictionaries(&model, &self.file)?;
        interrupt::listen()?;
        let mut progress = Progress::new(config.layers);
        let measured = measure_losses(&model, &corpus, &mut dictionaries, context, &mut |step| {
            progress.show(step);
            interrupt::flow()
        });
        progress.bars.finish();
        measured.with_context(|| format!("nothing was written to {}", self.out.display()))?;
        dictionaries.save(&self.out)?;
        // Whatever came while the file was written came too late.
        interrupt::forget();
        ui::note(&format!(
            "{}: the dictionaries of {} and what coding each head costs; `lexico inspect` shows which get how many atoms",
            self.out.display(),
            self.file.display()
        ));
        Ok(())
    }
}
