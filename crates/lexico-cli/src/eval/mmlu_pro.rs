use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use lexico_eval::questions::Asked;
use lexico_eval::tasks::mmlu_pro::MmluPro;

use super::comparison::{AskArguments, ComparisonArguments};

#[derive(Args)]
pub(crate) struct MmluProArguments {
    #[command(flatten)]
    comparison: ComparisonArguments,
    #[command(flatten)]
    ask: AskArguments,
    /// The questions, .parquet or .jsonl [default: TIGER-Lab/MMLU-Pro on the hub]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Subjects to take, as engineering,law [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    subject: Vec<String>,
}

impl MmluProArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let data = match self.data {
            Some(data) => data,
            None => MmluPro::fetch(std::io::stderr().is_terminal())?,
        };
        let questions = MmluPro::read(&data, &self.subject)?;
        let items = self.comparison.items_or(usize::MAX);
        let options = self.ask.options();
        self.comparison.run(items, |model| {
            Ok(Box::new(Asked::new(model, questions, options)?))
        })
    }
}
