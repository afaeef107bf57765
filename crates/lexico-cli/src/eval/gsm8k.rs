use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use lexico_eval::questions::Asked;
use lexico_eval::tasks::gsm8k::{Extraction, Gsm8k};

use super::comparison::{AskArguments, ComparisonArguments};

#[derive(Args)]
pub(crate) struct Gsm8kArguments {
    #[command(flatten)]
    comparison: ComparisonArguments,
    #[command(flatten)]
    ask: AskArguments,
    /// The problems, .jsonl or .parquet [default: openai/gsm8k on the hub, as --examples]
    #[arg(long, value_name = "FILE", requires = "examples")]
    data: Option<PathBuf>,
    /// The problems that the worked examples are drawn from
    #[arg(long, value_name = "FILE", requires = "data")]
    examples: Option<PathBuf>,
    /// Worked examples before each problem
    #[arg(long, default_value_t = 5, value_name = "K")]
    shots: usize,
    /// How the answer is found: strict, the number after ####, or flexible, the last number
    #[arg(long, default_value = "strict", value_name = "strict|flexible")]
    extraction: Extraction,
}

impl Gsm8kArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let (data, examples) = match (self.data, self.examples) {
            (Some(data), Some(examples)) => (data, examples),
            _ => Gsm8k::fetch(std::io::stderr().is_terminal())?,
        };
        let problems = Gsm8k::read(&data, &examples, self.shots, self.extraction)?;
        let items = self.comparison.items_or(usize::MAX);
        let options = self.ask.options();
        self.comparison.run(items, |model| {
            Ok(Box::new(Asked::new(model, problems, options)?))
        })
    }
}
