use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use lexico_eval::questions::Asked;
use lexico_eval::tasks::longbench::{DATASETS, Dataset, LongBench, LongBenchOptions, Prompts};

use super::comparison::{AskArguments, ComparisonArguments};

#[derive(Args)]
pub(crate) struct LongBenchArguments {
    #[command(flatten)]
    comparison: ComparisonArguments,
    #[command(flatten)]
    ask: AskArguments,
    /// A folder with NAME.jsonl of each data set, or the benchmark's data.zip [default: THUDM/LongBench on the hub]
    #[arg(long, value_name = "FOLDER|ZIP")]
    data: Option<PathBuf>,
    /// A folder with the benchmark's dataset2prompt.json and dataset2maxlen.json
    #[arg(long, value_name = "FOLDER")]
    prompts: PathBuf,
    /// Data sets to take, as qasper,trec; --items counts in each of them [default: the 16 English ones]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    dataset: Vec<String>,
}

impl LongBenchArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let datasets = match self.dataset.as_slice() {
            [] => DATASETS.to_vec(),
            names => names
                .iter()
                .map(|name| Dataset::named(name))
                .collect::<Result<_, _>>()?,
        };
        let prompts = Prompts::read(&self.prompts)?;
        let data = match self.data {
            Some(data) => data,
            None => LongBench::fetch(std::io::stderr().is_terminal())?,
        };
        let items = self.comparison.items_or(usize::MAX);
        let ask = self.ask.options();
        self.comparison.run(usize::MAX, |model| {
            let context = model.decoder.config().context;
            let options = LongBenchOptions {
                datasets,
                items,
                context,
            };
            let set = LongBench::read(&data, &prompts, &model.tokenizer, &options)?;
            Ok(Box::new(Asked::new(model, set, ask)?))
        })
    }
}
