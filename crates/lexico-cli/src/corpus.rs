//! The arguments by which several commands name texts.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use lexico_llm::Corpus;

use crate::{model, ui};

#[derive(Args)]
pub(crate) struct CorpusArguments {
    /// Texts to read: plain text, .jsonl, .json or .parquet, a folder of such files,
    /// hf://datasets/ORG/NAME[@REVISION][/PATH] on the hub, or - for stdin; `*` in PATH stands for
    /// any characters, as in train-*.parquet
    #[arg(long, required = true, num_args = 1.., value_name = "PATH|hf://SET|-")]
    corpus: Vec<PathBuf>,
    /// The field of an object in .jsonl and .json, or the column in .parquet, that holds the text
    /// [default: text]; where it is named, stdin is read as .jsonl
    #[arg(long, value_name = "NAME")]
    field: Option<String>,
}

impl CorpusArguments {
    /// Opens the texts for a dictionary that is to be written to `out`, and says which files are not read.
    pub(crate) fn open_for(&self, out: &Path) -> anyhow::Result<Corpus> {
        let inputs: Vec<&Path> = self.corpus.iter().map(PathBuf::as_path).collect();
        model::make_own_folder(out)?;
        ui::check_dictionary_out(out, &inputs)?;
        let corpus = self.open()?;
        ui::check_out(out, &corpus.files())?;
        Ok(corpus)
    }

    /// Opens the texts, and says which files are not read.
    pub(crate) fn open(&self) -> anyhow::Result<Corpus> {
        let terminal = std::io::stderr().is_terminal();
        let corpus = Corpus::open(&self.corpus, self.field.as_deref(), terminal)?;
        note_skipped(corpus.skipped());
        Ok(corpus)
    }
}

/// Says which files of folders and data sets are not read.
fn note_skipped(files: &[String]) {
    const MAX: usize = 8;
    if files.is_empty() {
        return;
    }
    let named = files[..files.len().min(MAX)].join(", ");
    let more = if files.len() > MAX { " and more" } else { "" };
    ui::note(&format!(
        "skipped, as their names are of no text ({}): {named}{more}",
        files.len()
    ));
}
