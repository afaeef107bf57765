//! `lexico eval`: one file a task.

mod dictionary;
mod problems;

use clap::{Args, Subcommand};

#[derive(Args)]
pub(crate) struct Eval {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Word problems in GSM8K's format, made for the tiny model
    Problems(problems::ProblemArguments),
    /// How well dictionaries code what the model reads: texts that they were learned on, and others
    Dictionary(dictionary::DictionaryArguments),
}

impl Eval {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.task {
            Task::Problems(problems) => problems.run(),
            Task::Dictionary(dictionary) => dictionary.run(),
        }
    }
}
