use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use lexico::DictionarySet;
use lexico::dictionary::{LayerErrors, additive_sparsity};
use lexico::learn::{CodebookOptions, LearnMethod, LearnOptions};
use lexico_llm::train::{
    Epoch, StateOptions, TrainOptions, TrainProgress, Trained, remove_state, train,
};
use lexico_llm::{Model, Quantize};
use serde_json::json;

use crate::corpus::CorpusArguments;
use crate::{interrupt, model, ui};

#[derive(Args)]
pub(crate) struct Train {
    /// The model: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    #[command(flatten)]
    corpus: CorpusArguments,
    /// Keep the dictionaries of this file, with what was measured of them, and learn only those of packed codes,
    /// which replace any that are in the file; the result goes to --out
    #[arg(
        short,
        long,
        value_name = "FILE",
        conflicts_with_all = ["atoms", "sparsity", "recipe", "learner", "epochs", "batch", "learning_rate", "patience"]
    )]
    dictionary: Option<PathBuf>,
    /// CodebookSizes of the dictionaries of packed codes, and so the most atoms of such a code; 0: learn none
    /// [default: half the head dim]
    #[arg(long, value_name = "N")]
    groups: Option<usize>,
    /// Atoms of the first group; every other has 256
    #[arg(long, default_value_t = CodebookOptions::default().first, value_name = "N")]
    first_group: usize,
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
    /// Where the settings below come from where they are not given: lexico's own, or the reference
    /// implementation's (20 epochs, batch 64, rate 1e-4, random initial atoms, no re-seeding, no early stop)
    #[arg(long, default_value = "lexico", value_name = "lexico|paper")]
    recipe: Recipe,
    /// What moves the atoms: adam, a minibatch at a time, or ksvd or mod (the method of optimal directions),
    /// all vectors at a time and in memory
    #[arg(
        long,
        default_value = "adam",
        conflicts_with = "recipe",
        value_name = "adam|ksvd|mod"
    )]
    learner: Method,
    /// Passes over the vectors
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,
    /// Vectors in a step [default: 512 for adam, else all]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Adam's step size at the start
    #[arg(long, value_name = "X")]
    learning_rate: Option<f32>,
    /// Stop a dictionary after so many epochs in a row that did not lower its held-out error; 0: never
    #[arg(long, value_name = "N")]
    patience: Option<usize>,
    /// Seed of every random choice
    #[arg(short, long, default_value_t = 0)]
    seed: u64,
    /// Go on with the training that was broken off, or begin where there is none
    #[arg(long)]
    resume: bool,
    /// The folder for what was done so far and for the sampled vectors [default: the folder of --out]
    #[arg(long, value_name = "FOLDER")]
    work_dir: Option<PathBuf>,
    /// Seconds between two savings of what was done so far
    #[arg(long, default_value_t = StateOptions::default().every.as_secs_f64(), value_name = "X")]
    save_every: f64,
    /// A safetensors file to write the sampled vectors to, layers.0.keys and so on
    #[arg(long, value_name = "FILE")]
    keep_vectors: Option<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Recipe {
    Lexico,
    Paper,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Method {
    Adam,
    Ksvd,
    Mod,
}

impl From<Method> for LearnMethod {
    fn from(method: Method) -> Self {
        match method {
            Method::Adam => Self::Adam,
            Method::Ksvd => Self::Ksvd,
            Method::Mod => Self::OptimalDirections,
        }
    }
}

impl Train {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let corpus = self.corpus.open_for(&self.out)?;
        if let Some(vectors) = &self.keep_vectors {
            ui::check_vectors_out(vectors, &self.out, &corpus.files())?;
        }
        let started = Instant::now();
        let model = model::load_model(&self.model, Quantize::None)?;
        let kept = self.kept(&model)?;
        interrupt::listen()?;
        ui::note(&format!(
            "{}: learning dictionaries for {}",
            self.out.display(),
            model.name
        ));
        let state = self.state_folder()?;
        let options = self.options(model.decoder.config().head_dim, kept, &state)?;
        if self.resume && !state.exists() {
            ui::note(&format!(
                "{}: nothing to go on with, begins",
                state.display()
            ));
        }
        let mut progress = Progress::new(model.decoder.config().layers);
        let trained = train(&model, &corpus, &options, &mut |step| {
            progress.show(step);
            interrupt::flow()
        });
        progress.finish();
        let trained = trained.with_context(|| {
            let kept = if interrupt::happened() && state.exists() {
                format!(", --resume goes on from {}", state.display())
            } else {
                String::new()
            };
            format!("nothing was written to {}{kept}", self.out.display())
        })?;
        trained.dictionaries.save(&self.out)?;
        remove_state(&state)?;
        // Whatever came while the file was written came too late.
        interrupt::forget();
        self.report(&trained, started.elapsed().as_secs_f64())
    }

    /// Where the state is kept: beside the dictionary file or in the folder for such things, under its name.
    fn state_folder(&self) -> anyhow::Result<PathBuf> {
        let name = self.out.file_name().context("--out names no file")?;
        let mut name = name.to_owned();
        name.push(".state");
        match &self.work_dir {
            Some(folder) => {
                std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
                Ok(folder.join(name))
            }
            None => Ok(self.out.with_file_name(name)),
        }
    }

    /// The dictionaries that are not learned again.
    fn kept(&self, model: &Model) -> anyhow::Result<Option<DictionarySet>> {
        let Some(path) = &self.dictionary else {
            return Ok(None);
        };
        ui::check_out(&self.out, &[path])?;
        anyhow::ensure!(
            self.groups != Some(0),
            "--dictionary learns only groups, and --groups 0 none; leave one of them out"
        );
        let kept = model::read_dictionaries(model, path)?;
        let fits = kept.check_fits(&model.identity());
        fits.with_context(|| path.display().to_string())?;
        Ok(Some(kept))
    }

    fn options(
        &self,
        head_dim: usize,
        kept: Option<DictionarySet>,
        state: &Path,
    ) -> anyhow::Result<TrainOptions> {
        let recipe = match self.recipe {
            Recipe::Lexico => LearnOptions::of(self.learner.into()),
            Recipe::Paper => LearnOptions::paper(),
        };
        let every = Duration::try_from_secs_f64(self.save_every);
        let sparsity = self.sparsity.unwrap_or((head_dim / 8).max(1));
        let trained = kept.as_ref().map_or(sparsity, |k| k.training.sparsity);
        let usual = CodebookOptions::of(head_dim);
        let groups = self.groups.unwrap_or(usual.groups);
        let groups = (groups > 0).then_some(CodebookOptions {
            first: self.first_group,
            groups,
            sparsity: additive_sparsity(trained, groups),
            seed: self.seed,
            ..usual
        });
        Ok(TrainOptions {
            tokens: self.tokens,
            context: self.context,
            vectors: self.vectors,
            learn: LearnOptions {
                atoms: self.atoms,
                sparsity,
                epochs: self.epochs.unwrap_or(recipe.epochs),
                batch: self.batch.unwrap_or(recipe.batch),
                learning_rate: self.learning_rate.unwrap_or(recipe.learning_rate),
                patience: self.patience.unwrap_or(recipe.patience),
                seed: self.seed,
                ..recipe
            },
            groups,
            kept,
            state: Some(StateOptions {
                folder: state.to_owned(),
                resume: self.resume,
                every: every.with_context(|| format!("--save-every {}", self.save_every))?,
            }),
            keep_vectors: self.keep_vectors.clone(),
        })
    }

    fn report(&self, trained: &Trained, seconds: f64) -> anyhow::Result<()> {
        let dictionaries = &trained.dictionaries;
        let training = &dictionaries.training;
        let atoms = dictionaries.layers.first().map_or(0, |l| l.keys.len());
        let groups = dictionaries.max_codebooks();
        // Dictionaries that were imported came without errors.
        let error = |l: usize| training.relative_error.get(l);
        let additive_error = |l: usize| training.additive_relative_error.as_ref()?.get(l);
        let layers = trained.attention.iter().enumerate();
        if self.json {
            let course = |epochs: &[Epoch]| {
                let epochs = epochs.iter();
                epochs
                    .map(|e| json!({"seconds": e.seconds, "relative_error": e.held_out_error}))
                    .collect::<Vec<_>>()
            };
            let layers = layers.zip(&trained.courses);
            let layers = layers.map(|((l, attention), [keys, values])| {
                json!({
                    "layer": l,
                    "keys": {
                        "relative_error": error(l).map(|e| e.keys),
                        "additive_relative_error": additive_error(l).map(|e| e.keys),
                        "score_error": attention.score,
                        "epochs": course(keys),
                    },
                    "values": {
                        "relative_error": error(l).map(|e| e.values),
                        "additive_relative_error": additive_error(l).map(|e| e.values),
                        "output_error": attention.output,
                        "epochs": course(values),
                    },
                })
            });
            return ui::json(&json!({
                "out": self.out.display().to_string(),
                "seconds": seconds,
                "reading_seconds": trained.reading.as_secs_f64(),
                "learning_seconds": trained.learning.as_secs_f64(),
                "tokens": training.tokens,
                "vectors": trained.vectors,
                "atoms": atoms,
                "sparsity": training.sparsity,
                "groups": groups,
                "additive_sparsity": (groups > 0).then(|| additive_sparsity(training.sparsity, groups)),
                "layers": layers.collect::<Vec<_>>(),
            }));
        }
        let number = |error: Option<&LayerErrors>, part: fn(&LayerErrors) -> f32| {
            error.map_or("-".to_owned(), |e| format!("{:.4}", part(e)))
        };
        let rows = layers.map(|(l, attention)| {
            [
                l.to_string(),
                number(error(l), |e| e.keys),
                number(error(l), |e| e.values),
                format!("{:.4}", attention.score),
                format!("{:.4}", attention.output),
                number(additive_error(l), |e| e.keys),
                number(additive_error(l), |e| e.values),
            ]
        });
        let header = [
            "layer",
            "keys",
            "values",
            "scores",
            "output",
            "packed keys",
            "packed values",
        ];
        ui::line(
            "Held-out mean relative error; what coded keys change a score by (root mean square), coded values the \
             output (relative); held-out error of packed codes:",
        )?;
        ui::line(&ui::table(header, rows.collect()))?;
        let packed = match groups {
            0 => String::new(),
            groups => format!(
                "; {groups} groups, packed codes of {} atoms",
                additive_sparsity(training.sparsity, groups)
            ),
        };
        ui::line(&format!(
            "{}: {atoms} atoms, sparsity {}{packed}, from {} tokens ({} vectors a dictionary) in {seconds:.0} s",
            self.out.display(),
            training.sparsity,
            training.tokens,
            trained.vectors
        ))
    }
}

/// One bar for the reading, one for all dictionaries, one for those of packed codes, and one for each kind of losses.
pub(crate) struct Progress {
    dictionaries: usize,
    /// Steps done of each dictionary at work.
    steps: BTreeMap<(usize, &'static str), usize>,
    learned: usize,
    learned_groups: usize,
    bar: Option<indicatif::ProgressBar>,
}

impl Progress {
    pub(crate) fn new(layers: usize) -> Self {
        Self {
            dictionaries: 2 * layers,
            steps: BTreeMap::new(),
            learned: 0,
            learned_groups: 0,
            bar: None,
        }
    }

    pub(crate) fn show(&mut self, step: TrainProgress) {
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
                self.steps.insert((layer, part), progress.step);
                // One that stopped early, or before this run, counts as whole.
                let done = self.learned * progress.steps + self.steps.values().sum::<usize>();
                let dictionaries = self.dictionaries;
                let bar = self.bar.get_or_insert_with(|| {
                    let bar = ui::progress((dictionaries * progress.steps) as u64, "steps");
                    bar.reset_eta();
                    bar
                });
                bar.set_message(format!("learned {}/{dictionaries}", self.learned));
                bar.set_position(done as u64);
            }
            TrainProgress::Learned { layer, part, .. } => {
                self.steps.remove(&(layer, part));
                self.learned += 1;
                if self.learned == self.dictionaries {
                    self.finish();
                }
            }
            TrainProgress::LearningCodebooks { progress, .. } => {
                let (learned, dictionaries) = (self.learned_groups, self.dictionaries);
                let bar = self.bar.get_or_insert_with(|| {
                    let bar = ui::progress((dictionaries * progress.steps) as u64, "steps");
                    bar.reset_eta();
                    bar
                });
                bar.set_message(format!("groups of {learned}/{dictionaries}"));
                bar.set_position((learned * progress.steps + progress.step) as u64);
            }
            TrainProgress::LearnedCodebooks { .. } => {
                self.learned_groups += 1;
                if self.learned_groups == self.dictionaries {
                    self.finish();
                }
            }
            TrainProgress::Measuring { done, total } => {
                let bar = self.bar.get_or_insert_with(|| {
                    let bar = ui::progress(total as u64, "cases");
                    bar.set_message("measuring losses");
                    bar
                });
                bar.set_position(done as u64);
                if done == total {
                    self.finish();
                }
            }
        }
    }

    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }
}
