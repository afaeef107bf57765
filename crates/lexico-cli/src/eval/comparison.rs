//! What all tasks that compare caches have in common: their arguments, tables and reports.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use clap::Args;
use lexico_eval::evaluation::{EvaluateOptions, Evaluation, Run, evaluate};
use lexico_eval::questions::{AskOptions, Truncate};
use lexico_eval::report::folder::{PAGE, RESULTS, ReportFolder};
use lexico_eval::task::{Measure, Task, groups};
use lexico_llm::Model;
use lexico_llm::cache::{CacheBudget, CacheSpec, METHODS};

use crate::model::ModelArguments;
use crate::{interrupt, ui};

/// How questions are put to the model.
#[derive(Args)]
pub(super) struct AskArguments {
    /// Put each prompt as a message in the model's chat template, not as a text to go on from
    #[arg(long)]
    chat: bool,
    /// Drop the oldest tokens of prompts that do not fit the context with their answers, instead of refusing them
    #[arg(long)]
    truncate: bool,
}

impl AskArguments {
    pub(super) fn options(&self) -> AskOptions {
        AskOptions {
            chat: self.chat,
            truncate: if self.truncate {
                Truncate::Left
            } else {
                Truncate::Never
            },
        }
    }
}

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
    cache: Vec<CacheArgument>,
    /// Run each cache at this size, a share of FP16 (20%) or bytes (64MiB), with the best settings that fit of those
    /// that --cache leaves open; may be given several times
    #[arg(long, value_name = "SHARE|SIZE")]
    budget: Vec<CacheBudget>,
    /// Items to run, from the first on
    #[arg(long, value_name = "K")]
    items: Option<usize>,
    /// Put the items in a random order first
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
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

/// A cache, or all there are.
#[derive(Clone)]
enum CacheArgument {
    All,
    One(CacheSpec),
}

impl FromStr for CacheArgument {
    type Err = lexico_llm::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "all" {
            return Ok(Self::All);
        }
        text.parse().map(Self::One)
    }
}

impl ComparisonArguments {
    /// What items are put in order with.
    pub(super) fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// Items that the user wants, else this many.
    pub(super) fn items_or(&self, items: usize) -> usize {
        self.items.unwrap_or(items)
    }

    /// Runs `items` of the task that `make` prepares for the model.
    pub(super) fn run(
        self,
        items: usize,
        make: impl FnOnce(&Model) -> anyhow::Result<Box<dyn Task>>,
    ) -> anyhow::Result<()> {
        let mut caches = Vec::new();
        for cache in self.cache {
            match cache {
                CacheArgument::One(spec) => caches.push(spec),
                CacheArgument::All => {
                    for method in METHODS {
                        caches.push(method.name.parse()?);
                    }
                }
            }
        }
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
            items,
            seed: self.seed,
            batch: self.batch_size,
            budgets: self.budget,
        };
        let bar = ui::progress(0, "items");
        let evaluated = evaluate(
            task.as_ref(),
            &model,
            &caches,
            &options,
            folder.as_mut(),
            &mut |progress| {
                if bar.length() != Some(progress.of as u64) {
                    bar.set_length(progress.of as u64);
                }
                if bar.message() != progress.cache {
                    bar.set_message(progress.cache.to_owned());
                }
                bar.set_position(progress.done as u64);
                interrupt::flow()
            },
        );
        bar.finish_and_clear();
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

fn print(evaluation: &Evaluation) -> anyhow::Result<()> {
    let measure = evaluation.measure;
    let mut header = vec!["cache", "of FP16", measure.name(), "95 % interval"];
    let first = evaluation.runs.first().context("no run")?;
    if first.kept.is_some() {
        header.extend(["of full's right", "kept"]);
    }
    if first.distributions.is_some() {
        header.extend(["99th percentile", "same token"]);
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
        if let Some(kept) = run.kept {
            row.push(format!("{} of {}", kept.right, kept.of));
            row.push(match kept.of {
                0 => "-".to_owned(),
                of => ui::percent(kept.right as f64 / of as f64),
            });
        }
        if let Some(distributions) = run.distributions {
            row.push(measure.print(f64::from(distributions.percentile_99)));
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
    by_group(measure, &evaluation.runs)
}

/// A table of each group's scores, where there are groups.
fn by_group(measure: Measure, runs: &[Run]) -> anyhow::Result<()> {
    let Some(first) = runs.first() else {
        return Ok(());
    };
    let names: Vec<&str> = groups(&first.items)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let header = ["cache"].into_iter().chain(names.iter().copied());
    let rows = runs.iter().map(|run| {
        let groups = groups(&run.items).into_iter();
        let scores = groups.map(|(_, items)| measure.print(measure.of(items).value));
        [run.cache.clone()]
            .into_iter()
            .chain(scores)
            .collect::<Vec<_>>()
    });
    ui::line(&format!("\n{}", ui::table(header, rows.collect())))
}
