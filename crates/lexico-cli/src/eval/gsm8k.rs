use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use lexico_eval::tasks::gsm8k::{Extraction, fetch, read};

use super::comparison::QuestionArguments;

#[derive(Args)]
pub(crate) struct Gsm8kArguments {
    #[command(flatten)]
    questions: QuestionArguments,
    /// The problems, .jsonl or .parquet [default: openai/gsm8k on the hub, as --examples]
    #[arg(long, value_name = "FILE", requires = "examples")]
    data: Option<PathBuf>,
    /// The problems that the worked examples are drawn from
    #[arg(long, value_name = "FILE", requires = "data")]
    examples: Option<PathBuf>,
    /// Worked examples before each problem
    #[arg(long, default_value_t = 5, value_name = "K")]
    shots: usize,
    /// Number that counts as the answer: strict, the one after ####, or flexible, the last one
    #[arg(long, default_value = "strict", value_name = "strict|flexible")]
    extraction: Extraction,
}

impl Gsm8kArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let (data, examples) = match (self.data, self.examples) {
            (Some(data), Some(examples)) => (data, examples),
            _ => fetch(std::io::stderr().is_terminal())?,
        };
        let problems = read(&data, &examples, self.shots, self.extraction)?;
        self.questions.run(|_| Ok(problems))
    }
}
