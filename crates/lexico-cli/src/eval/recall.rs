use clap::Args;
use lexico_eval::tasks::recall::{RecallOptions, recall};

use super::comparison::{QuestionArguments, count_tokens};

#[derive(Args)]
pub(crate) struct RecallArguments {
    #[command(flatten)]
    questions: QuestionArguments,
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
    /// Seed of keys, values and questions
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
        self.questions
            .run(|model| Ok(recall(&options, &|text| count_tokens(model, text))?))
    }
}
