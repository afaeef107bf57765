use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lexico::tensor_file::{check_writable, write_atomically};
use lexico_eval::report::Report;
use lexico_eval::report::overview::Overview;

use crate::ui;

#[derive(Args)]
pub(crate) struct OverviewArguments {
    /// Folders that `lexico eval … --report` wrote; evaluations of the same task, model and settings are compared, with
    /// dictionaries of several trainings too
    #[arg(required = true, value_name = "REPORT")]
    reports: Vec<PathBuf>,
    /// Write a page with a plot for each task and model
    #[arg(short, long, value_name = "FILE.html")]
    out: Option<PathBuf>,
    /// Write the plots alone
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print one JSON document instead of tables
    #[arg(long)]
    json: bool,
}

impl OverviewArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        for (path, ending) in [(&self.out, "html"), (&self.plot, "svg")] {
            if let Some(path) = path {
                if path.extension().is_none_or(|own| own != ending) {
                    anyhow::bail!("{}: this file is written as .{ending}", path.display());
                }
                check_writable(path)?;
            }
        }
        let overview = Overview::read(&self.reports)?;
        if let Some(out) = &self.out {
            let page = overview.page().context("the page")?;
            write_atomically(out, page.as_bytes())?;
        }
        if let Some(plot) = &self.plot {
            write_atomically(plot, overview.plot().as_bytes())?;
        }
        if self.json {
            return ui::json(&serde_json::to_value(&overview)?);
        }
        for (number, comparison) in overview.comparisons.iter().enumerate() {
            let gap = if number > 0 { "\n" } else { "" };
            ui::line(&format!("{gap}{}", comparison.title()))?;
            let (header, rows) = comparison.table();
            ui::line(&ui::table(header, rows))?;
        }
        for path in self.out.iter().chain(&self.plot) {
            ui::note(&format!("wrote {}", path.display()));
        }
        Ok(())
    }
}
