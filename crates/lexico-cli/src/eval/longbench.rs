use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lexico_eval::tasks::longbench::{DATASETS, Dataset, LongBenchOptions, Prompts, fetch, read};

use super::comparison::QuestionArguments;

#[derive(Args)]
pub(crate) struct LongBenchArguments {
    #[command(flatten)]
    questions: QuestionArguments,
    /// A folder with NAME.jsonl of each data set, or the benchmark's data.zip [default: THUDM/LongBench on the hub]
    #[arg(long, value_name = "FOLDER|ZIP")]
    data: Option<PathBuf>,
    /// A folder with the benchmark's dataset2prompt.json and dataset2maxlen.json [default: downloaded once, as
    /// published]
    #[arg(long, value_name = "FOLDER")]
    prompts: Option<PathBuf>,
    /// Max number of tokens of a prompt, the chat template's not counted; of longer ones the middle is left out
    /// [default: the context less 596, as published for a context of 4,096]
    #[arg(long, value_name = "K")]
    max_length: Option<usize>,
    /// Data sets to take, as qasper,trec; --items counts in each of them [default: the 16 English ones]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    dataset: Vec<String>,
}

impl LongBenchArguments {
    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        let datasets = match self.dataset.as_slice() {
            [] => DATASETS.to_vec(),
            names => names
                .iter()
                .map(|name| Dataset::named(name))
                .collect::<Result<_, _>>()?,
        };
        let prompts = match &self.prompts {
            Some(folder) => Prompts::read(folder)?,
            None => {
                let data =
                    dirs::data_dir().context("there is no folder for data; name --prompts")?;
                Prompts::fetch(Prompts::PUBLISHED, &data.join("lexico").join("longbench"))?
            }
        };
        let data = match self.data {
            Some(data) => data,
            None => fetch(std::io::stderr().is_terminal())?,
        };
        let seed = self.questions.comparison.seed;
        // They count in each data set, not in all.
        let items = self.questions.comparison.items.take().unwrap_or(usize::MAX);
        self.questions.run(|model| {
            let context = model.decoder.config().context;
            // Room for the answer and a chat template; of 4,096 tokens it leaves the 3,500 of the published runs.
            let context = self.max_length.unwrap_or(context.saturating_sub(596));
            let options = LongBenchOptions {
                datasets,
                items,
                seed,
                context,
            };
            Ok(read(&data, &prompts, &model.tokenizer, &options)?)
        })
    }
}
