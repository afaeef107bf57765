use clap::Args;
use lexico_eval::questions::{AskOptions, Asked};
use lexico_eval::tasks::problems::problems;

use super::comparison::ComparisonArguments;

/// Items unless the user says how many.
const ITEMS: usize = 100;

#[derive(Args)]
pub(crate) struct ProblemArguments {
    #[command(flatten)]
    comparison: ComparisonArguments,
    /// Worked examples before each problem
    #[arg(long, default_value_t = 5, value_name = "K")]
    shots: usize,
}

impl ProblemArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let problems = problems(self.shots)?;
        self.comparison.run(ITEMS, |model| {
            let options = AskOptions::default();
            Ok(Box::new(Asked::new(model, problems, options)?))
        })
    }
}
