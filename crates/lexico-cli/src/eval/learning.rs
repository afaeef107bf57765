use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lexico::tensor_file::write_atomically;
use lexico_eval::learning::{Comparison, Course};

use super::{Named, check_plot};
use crate::ui;

#[derive(Args)]
pub(crate) struct LearningArguments {
    /// Documents that `lexico train --json` printed, of trainings on the same vectors: the same model, corpus,
    /// --tokens, --vectors and --seed [default names: the files']
    #[arg(required = true, value_name = "[NAME=]FILE.json")]
    reports: Vec<Named>,
    /// Write plots of the error against time
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

impl LearningArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        if let Some(plot) = &self.plot {
            check_plot(plot)?;
        }
        let mut courses = Vec::with_capacity(self.reports.len());
        for report in &self.reports {
            let path = || report.path.display().to_string();
            let document = std::fs::read_to_string(&report.path).with_context(path)?;
            courses.push(Course::read(&report.name_or_stem(), &document).with_context(path)?);
        }
        let compared = Comparison::new(courses)?;
        if let Some(plot) = &self.plot {
            write_atomically(plot, compared.plot().as_bytes())?;
        }
        let outcomes = compared.outcomes();
        if self.json {
            return ui::json(&serde_json::to_value(outcomes).context("the result as JSON")?);
        }
        ui::line(
            "Held-out mean relative error, means over the layers: in the end, and when the fastest training of each \
             dictionary was done.",
        )?;
        let error = |error: Option<f64>| error.map_or("-".to_owned(), |e| format!("{e:.4}"));
        let rows = outcomes.into_iter().map(|outcome| {
            [
                outcome.name,
                format!("{:.1}", outcome.seconds),
                error(Some(outcome.keys)),
                error(Some(outcome.values)),
                error(outcome.keys_in_same_time),
                error(outcome.values_in_same_time),
            ]
        });
        let header = [
            "training",
            "seconds a dictionary",
            "keys",
            "values",
            "keys, same time",
            "values, same time",
        ];
        ui::line(&ui::table(header, rows.collect()))
    }
}
