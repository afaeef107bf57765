use std::path::PathBuf;

use clap::Args;
use lexico_eval::tasks::needle::{NeedleOptions, needle, read_haystack};

use super::comparison::{QuestionArguments, count_tokens};

#[derive(Args)]
pub(crate) struct NeedleArguments {
    #[command(flatten)]
    questions: QuestionArguments,
    /// Tokens of the prompts
    #[arg(
        long,
        value_name = "K,...",
        value_delimiter = ',',
        default_value = "1024,2048"
    )]
    length: Vec<usize>,
    /// Depths of the fact in the text: 0 is its beginning and 1 its end
    #[arg(
        long,
        value_name = "SHARE,...",
        value_delimiter = ',',
        default_value = "0,0.25,0.5,0.75,1"
    )]
    depth: Vec<f64>,
    /// Facts for each length and depth
    #[arg(long, value_name = "K", default_value_t = 4)]
    repeats: usize,
    /// A text to hide the fact in [default: simple sentences]
    #[arg(long, value_name = "FILE")]
    haystack: Option<PathBuf>,
    /// Seed of the facts
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    draw: u64,
}

impl NeedleArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let haystack = self.haystack.as_deref().map(read_haystack).transpose()?;
        let options = NeedleOptions {
            lengths: self.length,
            depths: self.depth,
            repeats: self.repeats,
            haystack,
            seed: self.draw,
        };
        self.questions
            .run(|model| Ok(needle(&options, &|text| count_tokens(model, text))?))
    }
}
