use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use lexico::dictionary::LayerErrors;
use lexico::learn::LearnOptions;
use lexico_llm::train::{TrainOptions, TrainProgress, train};
use lexico_llm::{Corpus, Quantize};
use serde_json::json;

use crate::{interrupt, model, ui};

#[derive(Args)]
pub(crate) struct Train {
    /// The model: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    /// Texts to learn from: plain text, .jsonl, .json or .parquet, a folder of such files,
    /// hf://datasets/ORG/NAME[@REVISION][/PATH] on the hub, or - for stdin; `*` in PATH stands for
    /// any characters, as in train-*.parquet
    #[arg(long, required = true, num_args = 1.., value_name = "PATH|hf://SET|-")]
    corpus: Vec<PathBuf>,
    /// The field of an object in .jsonl and .json, or the column in .parquet, that holds the text
    /// [default: text]; where it is named, stdin is read as .jsonl
    #[arg(long, value_name = "NAME")]
    field: Option<String>,
    /// Atoms of a dictionary (N)
    #[arg(long, default_value_t = LearnOptions::default().atoms, value_name = "N")]
    atoms: usize,
    /// Nonzeros of a vector during learning [default: an eighth of the head dim]
    #[arg(long, value_name = "S")]
    sparsity: Option<usize>,
    /// The dictionary file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Most tokens to read, in whole windows drawn evenly from all texts (from stdin: its first)
    #[arg(long, default_value_t = TrainOptions::default().tokens, value_name = "N")]
    tokens: usize,
    /// Tokens that the model sees at once
    #[arg(long, visible_alias = "ctx-size", default_value_t = TrainOptions::default().context, value_name = "N")]
    context: usize,
    /// Vectors that each dictionary learns from at the most
    #[arg(long, default_value_t = TrainOptions::default().vectors, value_name = "N")]
    vectors: usize,
    /// Passes over the vectors
    #[arg(long, default_value_t = LearnOptions::default().epochs, value_name = "N")]
    epochs: usize,
    /// Vectors in a step
    #[arg(long, default_value_t = LearnOptions::default().batch, value_name = "N")]
    batch: usize,
    /// Adam's step size at the start
    #[arg(long, default_value_t = LearnOptions::default().learning_rate, value_name = "X")]
    learning_rate: f32,
    /// Seed of every random choice
    #[arg(short, long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

impl Train {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let inputs: Vec<&Path> = self.corpus.iter().map(PathBuf::as_path).collect();
        model::make_own_folder(&self.out)?;
        ui::check_dictionary_out(&self.out, &inputs)?;
        let corpus = Corpus::open(
            &self.corpus,
            self.field.as_deref(),
            std::io::stderr().is_terminal(),
        )?;
        ui::check_out(&self.out, &corpus.files())?;
        note_skipped(corpus.skipped());
        let started = Instant::now();
        let model = model::load_model(&self.model, Quantize::None)?;
        interrupt::listen()?;
        ui::note(&format!(
            "{}: learning dictionaries for {}",
            self.out.display(),
            model.name
        ));
        let head_dim = model.decoder.config().head_dim;
        let options = TrainOptions {
            tokens: self.tokens,
            context: self.context,
            vectors: self.vectors,
            learn: LearnOptions {
                atoms: self.atoms,
                sparsity: self.sparsity.unwrap_or((head_dim / 8).max(1)),
                epochs: self.epochs,
                batch: self.batch,
                learning_rate: self.learning_rate,
                seed: self.seed,
            },
        };
        let mut progress = Progress {
            layers: model.decoder.config().layers,
            bar: None,
        };
        let trained = train(&model, &corpus, &options, &mut |step| {
            progress.show(step);
            interrupt::flow()
        });
        progress.finish();
        let trained =
            trained.with_context(|| format!("nothing was written to {}", self.out.display()))?;
        trained.dictionaries.save(&self.out)?;
        // Whatever came while the file was written came too late.
        interrupt::forget();
        let seconds = started.elapsed().as_secs_f64();
        let training = &trained.dictionaries.training;
        let errors = training.relative_error.iter().enumerate();
        if self.json {
            let layer = |(layer, e): (usize, &LayerErrors)| {
                json!({
                    "layer": layer,
                    "keys": {"relative_error": e.keys},
                    "values": {"relative_error": e.values},
                })
            };
            return ui::json(&json!({
                "out": self.out.display().to_string(),
                "seconds": seconds,
                "tokens": training.tokens,
                "vectors": trained.vectors,
                "atoms": self.atoms,
                "sparsity": training.sparsity,
                "layers": errors.map(layer).collect::<Vec<_>>(),
            }));
        }
        let row = |(layer, e): (usize, &LayerErrors)| {
            [
                layer.to_string(),
                format!("{:.4}", e.keys),
                format!("{:.4}", e.values),
            ]
        };
        let header = ["layer", "keys", "values"];
        ui::line("Held-out mean relative error:")?;
        ui::line(&ui::table(header, errors.map(row).collect()))?;
        ui::line(&format!(
            "{}: {} atoms, sparsity {}, from {} tokens ({} vectors a dictionary) in {seconds:.0} s",
            self.out.display(),
            self.atoms,
            training.sparsity,
            training.tokens,
            trained.vectors
        ))
    }
}

/// Says which files of folders and data sets are not read.
fn note_skipped(files: &[String]) {
    const MOST: usize = 8;
    if files.is_empty() {
        return;
    }
    let named = files[..files.len().min(MOST)].join(", ");
    let more = if files.len() > MOST { " and more" } else { "" };
    ui::note(&format!(
        "skipped, as their names are of no text ({}): {named}{more}",
        files.len()
    ));
}

/// One bar for the reading, one for each dictionary.
struct Progress {
    layers: usize,
    bar: Option<indicatif::ProgressBar>,
}

impl Progress {
    fn show(&mut self, step: TrainProgress) {
        match step {
            TrainProgress::Reading { tokens, total } => {
                let bar = self.bar.get_or_insert_with(|| {
                    let bar = ui::progress(total as u64, "tokens");
                    bar.set_message("reading");
                    bar
                });
                bar.set_length(total as u64);
                bar.set_position(tokens as u64);
                if tokens == total {
                    self.finish();
                }
            }
            TrainProgress::Learning {
                layer,
                part,
                progress,
            } => {
                let bar = self.bar.get_or_insert_with(|| {
                    let bar = ui::progress(progress.steps as u64, "steps");
                    bar.set_message(format!("layer {}/{} {part}", layer + 1, self.layers));
                    bar
                });
                bar.set_position(progress.step as u64);
            }
            TrainProgress::Learned { .. } => self.finish(),
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }
}
