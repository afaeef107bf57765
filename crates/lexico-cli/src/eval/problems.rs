use clap::Args;
use lexico_eval::questions::{AskOptions, Asked};
use lexico_eval::tasks::problems::Problems;

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
        let shots = self.shots;
        let items = self.comparison.items_or(ITEMS);
        self.comparison.run(items, |model| {
            let problems = Problems::new(shots)?;
            Ok(Box::new(Asked::new(
                model,
                problems,
                AskOptions::default(),
            )?))
        })
    }
}
