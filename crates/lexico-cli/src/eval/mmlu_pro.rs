use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use lexico_eval::tasks::mmlu_pro::{fetch, read};

use super::comparison::QuestionArguments;

#[derive(Args)]
pub(crate) struct MmluProArguments {
    #[command(flatten)]
    questions: QuestionArguments,
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
            None => fetch(std::io::stderr().is_terminal())?,
        };
        let questions = read(&data, &self.subject)?;
        self.questions.run(|_| Ok(questions))
    }
}
