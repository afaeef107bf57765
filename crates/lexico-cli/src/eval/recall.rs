use clap::Args;
use lexico_eval::questions::Asked;
use lexico_eval::tasks::recall::{Recall, RecallOptions};

use super::comparison::{AskArguments, ComparisonArguments};

#[derive(Args)]
pub(crate) struct RecallArguments {
    #[command(flatten)]
    comparison: ComparisonArguments,
    #[command(flatten)]
    ask: AskArguments,
    /// Tokens of the prompts
    #[arg(
        long,
        value_name = "K,...",
        value_delimiter = ',',
        default_value = "128,256"
    )]
    length: Vec<usize>,
    /// Prompts of each length
    #[arg(long, value_name = "K", default_value_t = 20)]
    repeats: usize,
    /// What keys, values and questions are drawn with
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    draw: u64,
}

impl RecallArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let options = RecallOptions {
            lengths: self.length,
            repeats: self.repeats,
            seed: self.draw,
        };
        let items = self.comparison.items_or(usize::MAX);
        let ask = self.ask.options();
        self.comparison.run(items, |model| {
            let count = |text: &str| Ok(model.tokenizer.encode_first(text)?.len());
            Ok(Box::new(Asked::new(
                model,
                Recall::new(&options, &count)?,
                ask,
            )?))
        })
    }
}
