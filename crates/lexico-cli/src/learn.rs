//! Dictionaries for a model that has none, before it is run.

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use indicatif::HumanDuration;
use lexico::DictionarySet;
use lexico::learn::Effort;
use lexico_llm::train::{StateOptions, TrainOptions, estimate, remove_state, train};
use lexico_llm::{Corpus, Model};

use crate::train::Progress;
use crate::{interrupt, model, ui};

/// The text that dictionaries are learned from where no other is given.
const USUAL_TEXT: &str =
    "hf://datasets/Salesforce/wikitext/wikitext-103-raw-v1/validation-*.parquet";

#[derive(Args)]
pub(crate) struct LearnArguments {
    /// Learn dictionaries first where the model has none, from this text [default: WikiText-103's validation set on the
    /// hub], and keep them in the user's data folder
    #[arg(long, num_args = 0..=1, value_name = "PATH|hf://SET")]
    learn: Option<Option<PathBuf>>,
}

impl LearnArguments {
    /// Learns dictionaries where the user asks for it or, in a terminal, agrees to it, and writes them to `out`.
    pub(crate) fn learn(&self, model: &Model, out: &Path) -> anyhow::Result<Option<DictionarySet>> {
        let mut options = TrainOptions::of(Effort::Quick, model.decoder.config().head_dim);
        let takes = || -> anyhow::Result<String> {
            let time = estimate(model, &options)?;
            Ok(HumanDuration(time.max(Duration::from_secs(1))).to_string())
        };
        let text = match &self.learn {
            Some(text) => {
                let what = format!("{}: {} has no dictionaries yet", out.display(), model.name);
                ui::note(&format!("{what}; learning them takes about {}", takes()?));
                text.clone()
            }
            None if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() => {
                ui::note(&format!(
                    "{} has no dictionaries yet, which the cache needs. Learning them from WikiText-103 takes about {} \
                     here, once. Learn them now? [Y/n] (--learn TEXT takes another text, --dictionary hf://OWNER/NAME ready-made ones, --cache full \
                     needs none)",
                    model.name,
                    takes()?
                ));
                let mut answer = String::new();
                std::io::stdin()
                    .lock()
                    .read_line(&mut answer)
                    .context("stdin")?;
                if !["", "y", "yes"].contains(&answer.trim().to_lowercase().as_str()) {
                    return Ok(None);
                }
                None
            }
            None => return Ok(None),
        };
        let text = text.unwrap_or_else(|| PathBuf::from(USUAL_TEXT));
        let corpus = Corpus::open(&[text], None, std::io::stderr().is_terminal())?;
        model::make_own_folder(out)?;
        ui::check_out(out, &corpus.files())?;
        let mut state = out.as_os_str().to_owned();
        state.push(".state");
        let state = PathBuf::from(state);
        options.state = Some(StateOptions {
            folder: state.clone(),
            // What was broken off goes on.
            resume: true,
            ..StateOptions::default()
        });
        interrupt::listen()?;
        let mut progress = Progress::new(model.decoder.config().layers);
        let trained = train(model, &corpus, &options, &mut |step| {
            progress.show(step);
            interrupt::flow()
        });
        progress.bars.finish();
        let trained = trained.context("no dictionaries were learned; the same command goes on")?;
        trained.dictionaries.save(out)?;
        remove_state(&state)?;
        ui::note(&format!(
            "{}: learned, for this and all later runs",
            out.display()
        ));
        Ok(Some(trained.dictionaries))
    }
}
