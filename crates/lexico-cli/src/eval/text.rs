use clap::Args;
use lexico_eval::tasks::text::{TextMeasure, TextOptions, TextTask};

use super::comparison::ComparisonArguments;
use crate::corpus::CorpusArguments;

/// Number of chunks unless the user says how many.
const CHUNKS: usize = 16;
/// Tokens of a chunk, where the model's context holds as many.
const CONTEXT: usize = 1024;

#[derive(Args)]
pub(crate) struct TextArguments {
    #[command(flatten)]
    comparison: ComparisonArguments,
    #[command(flatten)]
    corpus: CorpusArguments,
    /// Tokens of a chunk, which is an item [default: 1024, or the model's context]
    #[arg(long, value_name = "K")]
    context: Option<usize>,
    /// Tokens of a chunk that are read at once; the rest is read and predicted from what the cache holds [default: seven eighths of the
    /// chunk]
    #[arg(long, value_name = "K")]
    prompt: Option<usize>,
    /// Tokens read at a time behind the prompt; more than one are faster, and see each other uncompressed in any cache
    #[arg(long, value_name = "K", default_value_t = 1)]
    step: usize,
    /// Take only the prompts from the text, and read on in what the model itself writes with the full cache
    #[arg(long)]
    own_text: bool,
}

impl TextArguments {
    pub(crate) fn run(self, measure: TextMeasure) -> anyhow::Result<()> {
        let corpus = self.corpus.open()?;
        let chunks = self.comparison.items.unwrap_or(CHUNKS);
        let seed = self.comparison.seed.unwrap_or(0);
        self.comparison.run(chunks, |model| {
            let max = model.decoder.config().context;
            let context = self.context.unwrap_or(CONTEXT.min(max));
            let options = TextOptions {
                context,
                prompt: self.prompt.unwrap_or(context - context / 8),
                step: self.step,
                chunks,
                seed,
                own_text: self.own_text,
            };
            Ok(Box::new(TextTask::new(model, &corpus, measure, options)?))
        })
    }
}
