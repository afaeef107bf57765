//! Arguments, tables and reports of all tasks that compare caches.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use clap::Args;
use lexico_eval::evaluation::{EvaluateOptions, Evaluation, evaluate};
use lexico_eval::questions::{AskOptions, Asked, Questions};
use lexico_eval::report::folder::{PAGE, RESULTS, ReportFolder};
use lexico_eval::task::Task;
use lexico_llm::Model;
use lexico_llm::cache::{CacheBudget, CacheSpec};

use crate::model::ModelArguments;
use crate::{interrupt, ui};

#[derive(Args)]
pub(super) struct ComparisonArguments {
    #[command(flatten)]
    pub(super) model: ModelArguments,
    /// A cache method to measure, or "all" of them; may be given several times (`full` always runs first). `lexico
    /// eval --help` lists methods and their options
    #[arg(
        long,
        value_name = "NAME[:key=value,...]|all",
        default_value = "lexico"
    )]
    cache: Vec<Caches>,
    /// Run each cache at this size, a share of FP16 (20%) or bytes (64MiB), choosing the best values that fit for
    /// options that --cache does not give; may be given several times
    #[arg(long, value_name = "SHARE|SIZE")]
    budget: Vec<CacheBudget>,
    /// Items to run, from the first on
    #[arg(long, value_name = "K")]
    pub(super) items: Option<usize>,
    /// Put the items in a random order first
    #[arg(long, value_name = "SEED")]
    pub(super) seed: Option<u64>,
    /// Items to run together; what is done is saved after each batch
    #[arg(long, value_name = "K", default_value_t = EvaluateOptions::default().batch)]
    batch_size: usize,
    /// Write results.json, report.html and plot.svg to this folder; what is done is saved there on the way
    #[arg(long, value_name = "FOLDER")]
    report: Option<PathBuf>,
    /// Go on with an interrupted run in the folder of --report
    #[arg(long, requires = "report")]
    resume: bool,
    /// Print one JSON document instead of tables
    #[arg(long)]
    json: bool,
}

/// A cache to compare, or all there are.
#[derive(Clone)]
struct Caches(Vec<CacheSpec>);

impl FromStr for Caches {
    type Err = lexico_llm::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all = text == "all";
        Ok(Self(if all {
            CacheSpec::all()
        } else {
            vec![text.parse()?]
        }))
    }
}

impl ComparisonArguments {
    /// Runs the task that `make` prepares for the model: as many items as the user wants, else `items`.
    pub(super) fn run(
        self,
        items: usize,
        make: impl FnOnce(&Model) -> anyhow::Result<Box<dyn Task>>,
    ) -> anyhow::Result<()> {
        let caches: Vec<CacheSpec> = self.cache.into_iter().flat_map(|own| own.0).collect();
        // Before anything is loaded: a folder that cannot be used is soon found.
        let report = self.report.as_deref();
        let mut folder = report
            .map(|r| ReportFolder::open(r, self.resume))
            .transpose()?;
        if let Some(folder) = &folder
            && self.resume
            && !folder.has_progress()
        {
            ui::note("there is no interrupted run to resume; this one begins anew");
        }
        let model = self.model.load(&caches)?;
        let task = make(&model)?;
        interrupt::listen()?;
        let options = EvaluateOptions {
            items: self.items.unwrap_or(items),
            seed: self.seed,
            batch: self.batch_size,
            budgets: self.budget,
        };
        let mut bars = ui::Bars::default();
        let evaluated = evaluate(
            task.as_ref(),
            &model,
            &caches,
            &options,
            folder.as_mut(),
            &mut |progress| {
                bars.show(
                    progress.cache.to_owned(),
                    progress.done,
                    progress.of,
                    "steps",
                );
                interrupt::flow()
            },
        );
        bars.finish();
        let evaluation = match (evaluated, report) {
            (Err(lexico_eval::Error::Interrupted), Some(report)) => anyhow::bail!(
                "interrupted; the same command with --resume goes on from what is in {}",
                report.display()
            ),
            (evaluated, _) => evaluated?,
        };
        if let Some(folder) = folder {
            folder.finish(&evaluation)?;
        }
        if self.json {
            ui::json(&serde_json::to_value(&evaluation)?)?;
        } else {
            print(&evaluation)?;
        }
        if let Some(report) = report {
            let (page, results) = (report.join(PAGE), report.join(RESULTS));
            ui::note(&format!(
                "wrote {} and {}",
                page.display(),
                results.display()
            ));
        }
        Ok(())
    }
}

/// Arguments of a task that puts questions to the model.
#[derive(Args)]
pub(super) struct QuestionArguments {
    #[command(flatten)]
    pub(super) comparison: ComparisonArguments,
    /// Put each prompt as a message in the model's chat template, not as a text to go on from
    #[arg(long)]
    pub(super) chat: bool,
    /// Drop the oldest tokens of prompts that do not fit the context with their answers, instead of refusing them
    #[arg(long)]
    truncate: bool,
}

impl QuestionArguments {
    /// Asks the questions that `make` prepares for the model.
    pub(super) fn run(
        self,
        make: impl FnOnce(&Model) -> anyhow::Result<Questions>,
    ) -> anyhow::Result<()> {
        let options = AskOptions {
            chat: self.chat,
            truncate: self.truncate,
        };
        self.comparison.run(usize::MAX, |model| {
            Ok(Box::new(Asked::new(model, make(model)?, options)?))
        })
    }
}

/// Counts the tokens of a text at whose beginning the model's first token stands.
pub(super) fn count_tokens(model: &Model, text: &str) -> lexico_eval::Result<usize> {
    Ok(model.tokenizer.encode_first(text)?.len())
}

fn print(evaluation: &Evaluation) -> anyhow::Result<()> {
    let measure = evaluation.measure;
    let mut header = vec!["cache", "of FP16", measure.name(), "95 % interval"];
    let first = evaluation.runs.first().context("no run")?;
    let compared = evaluation.runs.iter().any(|run| run.beside_full.is_some());
    if compared {
        header.extend(["beside full", "95 % interval"]);
    }
    if first.kept.is_some() {
        header.extend(["of full's right", "kept"]);
    }
    if first.distributions.is_some() {
        header.extend(["99th percentile", "99.9th", "same token"]);
    }
    let interval = |low: Option<f64>, high: Option<f64>| match (low, high) {
        (Some(low), Some(high)) => format!("{} to {}", measure.print(low), measure.print(high)),
        _ => "-".to_owned(),
    };
    let rows = evaluation.runs.iter().map(|run| {
        let mut row = vec![
            run.cache.clone(),
            ui::percent(run.share),
            measure.print(run.score),
            interval(run.low, run.high),
        ];
        if compared {
            let difference = run.beside_full.as_ref();
            row.push(difference.map_or("-".to_owned(), |d| measure.print_beside(d.value)));
            row.push(match difference.map(|d| (d.low, d.high)) {
                Some((Some(low), Some(high))) => {
                    format!(
                        "{} to {}",
                        measure.print_beside(low),
                        measure.print_beside(high)
                    )
                }
                _ => "-".to_owned(),
            });
        }
        if let Some(kept) = run.kept {
            row.push(format!("{} of {}", kept.right, kept.of));
            row.push(match kept.of {
                0 => "-".to_owned(),
                of => ui::percent(kept.right as f64 / of as f64),
            });
        }
        if let Some(distributions) = run.distributions {
            for percentile in [distributions.percentile_99, distributions.percentile_99_9] {
                row.push(measure.print(f64::from(percentile)));
            }
            row.push(ui::percent(distributions.agreement));
        }
        row
    });
    ui::line(&ui::table(header, rows.collect()))?;
    for skipped in &evaluation.skipped {
        ui::note(&format!(
            "left out at {}: {}",
            skipped.budget, skipped.reason
        ));
    }
    if let Some((header, rows)) = evaluation.by_position() {
        ui::line("\nBy position:")?;
        ui::line(&ui::table(header, rows))?;
    }
    match evaluation.by_group() {
        Some((header, rows)) => ui::line(&format!("\n{}", ui::table(header, rows))),
        None => Ok(()),
    }
}
