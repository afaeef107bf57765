use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use lexico::DictionarySet;
use lexico::dictionary::{CodeFamily, LayerErrors, additive_sparsity};
use lexico::learn::{CodebookOptions, Effort, LearnOptions};
use lexico_llm::train::{
    Epoch, StateOptions, TrainOptions, TrainProgress, Trained, remove_state, train,
};
use lexico_llm::{Model, Quantize};
use serde_json::json;

use crate::corpus::CorpusArguments;
use crate::publish::{self, CardArguments};
use crate::{interrupt, model, ui};

/// Heading of the options that say nothing of codebooks.
const SPARSE_ALONE: &str = "Only with --atoms or --codebooks 0";

#[derive(Args)]
pub(crate) struct Train {
    /// The model: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    #[command(flatten)]
    corpus: CorpusArguments,
    /// Keep the dictionaries of this file, or published ones as for `lexico run`, with what was measured of them, and
    /// learn only the codebooks of additive codes, which replace any that are there; the result goes to --out
    #[arg(
        short,
        long,
        value_name = "FILE",
        conflicts_with_all = ["atoms", "sparsity", "epochs", "batch", "learning_rate", "patience"]
    )]
    dictionary: Option<PathBuf>,
    /// Codebooks of a dictionary for additive codes, and so the max atoms of such a code; 0: learn none
    /// [default: half the head dim]
    #[arg(long, alias = "groups", value_name = "N")]
    codebooks: Option<usize>,
    /// KV heads of a layer whose keys, and whose values, additive codes tell together: better codes of the same length,
    /// and so many times the look-ups in attention; 1: each head alone
    #[arg(long, default_value_t = TrainOptions::default().joint_heads, value_name = "H")]
    joint_heads: usize,
    /// Layers that follow each other whose keys, and whose values, additive codes tell together; as --joint-heads, which
    /// it multiplies with; 1: each layer alone
    #[arg(long, default_value_t = TrainOptions::default().joint_layers, value_name = "L")]
    joint_layers: usize,
    /// Atoms of the first codebook; every other has 256
    #[arg(long, alias = "first-group", default_value_t = CodebookOptions::default().first, value_name = "N")]
    first_codebook: usize,
    /// Atoms of a dictionary for sparse codes (N); 0: learn none [default: 0, and 4096 with --codebooks 0]
    #[arg(long, value_name = "N")]
    atoms: Option<usize>,
    /// Nonzeros of a vector during learning [default: an eighth of the head dim]
    #[arg(long, value_name = "S")]
    sparsity: Option<usize>,
    /// The dictionary file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// How much to spend: quick is for a first try, thorough for dictionaries that others will use
    #[arg(long, value_enum, default_value = "normal", value_name = "EFFORT")]
    effort: EffortArgument,
    /// Max tokens to read, in whole chunks drawn evenly from all texts (from stdin: its first) [default: 49152, 98304
    /// or 294912, by effort; 1000000 with --atoms]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens that the model sees at once; where there are enough, half of them are in chunks of eight times that
    #[arg(long, visible_alias = "ctx-size", default_value_t = TrainOptions::default().context, value_name = "N")]
    context: usize,
    /// Max vectors that each dictionary learns from [default: 49152, 131072 or 393216, by effort; 200000 with --atoms]
    #[arg(long, value_name = "N")]
    vectors: Option<usize>,
    /// Passes over the vectors
    #[arg(long, help_heading = SPARSE_ALONE, default_value_t = LearnOptions::default().epochs, value_name = "N")]
    epochs: usize,
    /// Vectors in a step
    #[arg(long, help_heading = SPARSE_ALONE, default_value_t = LearnOptions::default().batch, value_name = "N")]
    batch: usize,
    /// Step size at the start
    #[arg(long, help_heading = SPARSE_ALONE, default_value_t = LearnOptions::default().learning_rate, value_name = "X")]
    learning_rate: f32,
    /// Stop a dictionary after so many epochs in a row that did not lower its held-out error; 0: never
    #[arg(long, help_heading = SPARSE_ALONE, default_value_t = LearnOptions::default().patience, value_name = "N")]
    patience: usize,
    /// Seed of every random choice
    #[arg(short, long, default_value_t = 0)]
    seed: u64,
    /// Go on with the training that was broken off, or begin where there is none
    #[arg(long)]
    resume: bool,
    /// Folder of the state and of the sampled vectors [default: the folder of --out]
    #[arg(long, value_name = "FOLDER")]
    work_dir: Option<PathBuf>,
    /// Seconds between two savings of the state
    #[arg(long, default_value_t = StateOptions::default().every.as_secs_f64(), value_name = "X")]
    save_every: f64,
    /// A safetensors file to write the sampled vectors to, layers.0.keys and so on
    #[arg(long, value_name = "FILE")]
    keep_vectors: Option<PathBuf>,
    /// A folder to put a copy of the dictionaries in, with a model card, to be uploaded to the Hugging Face hub; as
    /// `lexico publish` makes of a dictionary file
    #[arg(long, value_name = "FOLDER")]
    publish_folder: Option<PathBuf>,
    #[command(flatten)]
    card: CardArguments,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

/// Tokens and vectors from which dictionaries for sparse codes are learned.
const SPARSE_TOKENS: usize = 1_000_000;
const SPARSE_VECTORS: usize = 200_000;

/// An [`Effort`] by its name.
#[derive(Clone, Copy)]
struct EffortArgument(Effort);

impl ValueEnum for EffortArgument {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: [EffortArgument; 3] = {
            let [quick, normal, thorough] = Effort::ALL;
            [
                EffortArgument(quick),
                EffortArgument(normal),
                EffortArgument(thorough),
            ]
        };
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()))
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
        let publication = self.publish_folder.as_deref();
        let publication = publication.map(|folder| self.card.open(folder, &model));
        let publication = publication.transpose()?;
        interrupt::listen()?;
        ui::note(&format!(
            "{}: learning dictionaries for {}",
            self.out.display(),
            model.name
        ));
        let state = self.state_folder()?;
        let options = self.options(model.decoder.config().head_dim, kept, &state)?;
        let resumed = self.resume && state.exists();
        if self.resume && !resumed {
            ui::note(&format!(
                "{}: nothing to go on with, begins",
                state.display()
            ));
        }
        let layers = model.decoder.config().layers;
        let mut progress = Progress::new(layers / self.joint_layers.max(1));
        let trained = train(&model, &corpus, &options, &mut |step| {
            progress.show(step);
            interrupt::flow()
        });
        progress.bars.finish();
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
        let seconds = started.elapsed().as_secs_f64();
        let unmeasured = trained.dictionaries.training.additive_losses.is_none();
        if unmeasured && trained.dictionaries.training.losses.is_none() {
            ui::note(
                "all heads have as many atoms: what each costs drowned in the rounding of the model's quantised matrices, or the \
                 text is too short to measure it",
            );
        }
        self.report(&trained, seconds)?;
        if let (Some(publication), Some(folder)) = (publication, &self.publish_folder) {
            // What was learned before it was broken off took its time too.
            let seconds = (!resumed).then_some(seconds);
            publish::add(publication, folder, &self.out, seconds).with_context(|| {
                let out = self.out.display();
                format!("the dictionaries are in {out}, and `lexico publish {out}` takes them, but not yet published")
            })?;
        }
        Ok(())
    }

    /// Returns the state's folder: in --work-dir or beside the dictionary file, under its name.
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

    /// Loads the dictionaries that are kept.
    fn kept(&self, model: &Model) -> anyhow::Result<Option<DictionarySet>> {
        let Some(path) = &self.dictionary else {
            return Ok(None);
        };
        ui::check_out(&self.out, &[path])?;
        anyhow::ensure!(
            self.codebooks != Some(0),
            "--dictionary learns only codebooks, and --codebooks 0 none; leave one of them out"
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
        let every = Duration::try_from_secs_f64(self.save_every);
        let sparsity = self.sparsity.unwrap_or((head_dim / 8).max(1));
        let trained = kept.as_ref().map_or(sparsity, |k| k.training.sparsity);
        let EffortArgument(effort) = self.effort;
        let by_effort = TrainOptions::of(effort, head_dim);
        let usual = by_effort.codebooks.clone().unwrap_or_default();
        let codebooks = self.codebooks.unwrap_or(usual.codebooks);
        anyhow::ensure!(
            codebooks > 0 || self.joint_heads * self.joint_layers == 1,
            "--joint-heads and --joint-layers: sparse codes are of one head each; leave them out, or learn codebooks"
        );
        let codebooks = (codebooks > 0).then_some(CodebookOptions {
            first: self.first_codebook,
            codebooks,
            sparsity: additive_sparsity(trained, codebooks),
            seed: self.seed,
            ..usual
        });
        let atoms = self.atoms.unwrap_or(match codebooks {
            Some(_) => 0,
            None => LearnOptions::default().atoms,
        });
        Ok(TrainOptions {
            sparse: atoms > 0,
            tokens: self.tokens.unwrap_or(match atoms {
                0 => by_effort.tokens,
                _ => SPARSE_TOKENS,
            }),
            context: self.context,
            vectors: self.vectors.unwrap_or(match atoms {
                0 => by_effort.vectors,
                _ => SPARSE_VECTORS,
            }),
            learn: LearnOptions {
                atoms: if atoms > 0 {
                    atoms
                } else {
                    LearnOptions::default().atoms
                },
                sparsity,
                epochs: self.epochs,
                batch: self.batch,
                learning_rate: self.learning_rate,
                patience: self.patience,
                seed: self.seed,
                ..LearnOptions::default()
            },
            // Sparse dictionaries have settings of their own.
            effort: (atoms == 0).then_some(effort),
            codebooks,
            joint_heads: self.joint_heads,
            joint_layers: self.joint_layers,
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
        let first = dictionaries
            .layers
            .first()
            .and_then(|layer| layer.sparse.as_ref());
        let atoms = first.map_or(0, |both| both.keys.len());
        let codebooks = dictionaries.max_sparsity(CodeFamily::Additive);
        // Dictionaries that were imported came without errors.
        let error = |l: usize| training.relative_error.get(l);
        let joint = dictionaries.joint();
        let additive_error = |l: usize| {
            let errors = training.additive_relative_error.as_ref()?;
            errors.get(joint.place(l).0)
        };
        let layers = trained.attention.iter().enumerate();
        if self.json {
            let part = |errors: [Option<f32>; 2], (name, lost): (&str, f64), epochs: &[Epoch]| {
                let epochs = epochs.iter();
                let epochs = epochs
                    .map(|e| json!({"seconds": e.seconds, "relative_error": e.held_out_error}));
                json!({
                    "relative_error": errors[0], "packed_relative_error": errors[1],
                    (name): lost, "epochs": epochs.collect::<Vec<_>>(),
                })
            };
            let layers = layers.map(|(l, attention)| {
                let [keys, values] = trained.courses.get(l).cloned().unwrap_or_default();
                let errors = [error(l), additive_error(l)];
                let (score, output) = (attention.score, attention.output);
                json!({
                    "layer": l,
                    "keys": part(errors.map(|e| Some(e?.keys)), ("score_error", score), &keys),
                    "values": part(errors.map(|e| Some(e?.values)), ("output_error", output), &values),
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
                "groups": codebooks,
                "packed_sparsity": (codebooks > 0).then(|| additive_sparsity(training.sparsity, codebooks)),
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
            "additive keys",
            "additive values",
        ];
        ui::line(
            "Held-out mean relative error; change of a score by coded keys (root mean square) and of the output by coded \
             values (relative); held-out error of additive codes:",
        )?;
        ui::line(&ui::table(header, rows.collect()))?;
        let additive = match codebooks {
            0 => String::new(),
            codebooks => format!(
                "; {codebooks} codebooks, additive codes of {} atoms",
                additive_sparsity(training.sparsity, codebooks)
            ),
        };
        ui::line(&format!(
            "{}: {atoms} atoms, sparsity {}{additive}, from {} tokens ({} vectors a dictionary) in {seconds:.0} s",
            self.out.display(),
            training.sparsity,
            training.tokens,
            trained.vectors
        ))
    }
}

/// Progress of training: reading, dictionaries, codebooks, and each kind of losses in turn.
#[derive(Default)]
pub(crate) struct Progress {
    dictionaries: usize,
    /// Steps done of each dictionary at work.
    steps: BTreeMap<(usize, &'static str), usize>,
    learned: usize,
    learned_codebooks: usize,
    pub(crate) bars: ui::Bars,
}

impl Progress {
    pub(crate) fn new(layers: usize) -> Self {
        Self {
            dictionaries: 2 * layers,
            ..Self::default()
        }
    }

    pub(crate) fn show(&mut self, step: TrainProgress) {
        let all = self.dictionaries;
        let (message, done, total, unit) = match step {
            TrainProgress::Reading { tokens, total } => {
                ("reading".to_owned(), tokens, total, "tokens")
            }
            TrainProgress::Learning {
                layer,
                part,
                progress,
            } => {
                self.steps.insert((layer, part), progress.step);
                // One that stopped early, or before this run, counts as whole.
                let done = self.learned * progress.steps + self.steps.values().sum::<usize>();
                let message = format!("learned {}/{all}", self.learned);
                (message, done, all * progress.steps, "steps")
            }
            TrainProgress::LearningCodebooks { progress, .. } => {
                let done = self.learned_codebooks * progress.steps + progress.step;
                let message = format!("codebooks {}/{all}", self.learned_codebooks);
                (message, done, all * progress.steps, "steps")
            }
            TrainProgress::Learned { layer, part, .. } => {
                self.steps.remove(&(layer, part));
                self.learned += 1;
                if self.learned == all {
                    self.bars.finish();
                }
                return;
            }
            TrainProgress::LearnedCodebooks { .. } => {
                self.learned_codebooks += 1;
                if self.learned_codebooks == all {
                    self.bars.finish();
                }
                return;
            }
            TrainProgress::Weighing { done, total } => {
                ("weighing heads".to_owned(), done, total, "layers")
            }
            TrainProgress::Measuring { done, total } => {
                ("measuring heads".to_owned(), done, total, "layers")
            }
        };
        self.bars.show(message, done, total, unit);
    }
}
