use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use lexico_llm::train::{TrainOptions, measure_losses};
use lexico_llm::{Corpus, Quantize};

use crate::train::{Progress, note_skipped};
use crate::{interrupt, model, ui};

#[derive(Args)]
pub(crate) struct Measure {
    /// The dictionary file: of an earlier `lexico train`, of `lexico import`, or a .pt of the reference implementation
    file: PathBuf,
    /// The model: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    /// Texts to measure on, best such that the dictionaries have not seen: as for `lexico train`
    #[arg(long, required = true, num_args = 1.., value_name = "PATH|hf://SET|-")]
    corpus: Vec<PathBuf>,
    /// The field of an object in .jsonl and .json, or the column in .parquet, that holds the text
    /// [default: text]; where it is named, stdin is read as .jsonl
    #[arg(long, value_name = "NAME")]
    field: Option<String>,
    /// The dictionary file to write: the same dictionaries, with the losses
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens that the model may take in all, about; at least 32 for each head and sparsity
    #[arg(long, default_value_t = TrainOptions::default().tokens / 4, value_name = "N")]
    tokens: usize,
    /// Most tokens that the model sees at once
    #[arg(long, visible_alias = "ctx-size", default_value_t = TrainOptions::default().context, value_name = "N")]
    context: usize,
}

impl Measure {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let inputs: Vec<&Path> = self.corpus.iter().map(PathBuf::as_path).collect();
        model::make_own_folder(&self.out)?;
        ui::check_dictionary_out(&self.out, &inputs)?;
        ui::check_out(&self.out, &[&self.file])?;
        let corpus = Corpus::open(
            &self.corpus,
            self.field.as_deref(),
            std::io::stderr().is_terminal(),
        )?;
        ui::check_out(&self.out, &corpus.files())?;
        note_skipped(corpus.skipped());
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
        let limits = (self.tokens, context);
        let measured = measure_losses(&model, &corpus, &mut dictionaries, limits, &mut |step| {
            progress.show(step);
            interrupt::flow()
        });
        progress.finish();
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
