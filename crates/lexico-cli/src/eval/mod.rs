//! `lexico eval`: one file a task.

mod comparison;
mod dictionary;
mod gsm8k;
mod longbench;
mod mmlu_pro;
mod needle;
mod overview;
mod problems;
mod recall;
mod reconstruction;
mod ruler;
mod text;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand};
use lexico_eval::tasks::text::TextMeasure;

#[derive(Args)]
pub(crate) struct Eval {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Word problems in GSM8K's format, made for the tiny model
    Problems(problems::ProblemArguments),
    /// GSM8K: grade-school mathematics, 5-shot, prompts and answers as in EleutherAI's harness
    Gsm8k(gsm8k::Gsm8kArguments),
    /// LongBench: the 16 English data sets, prompted and scored as published
    #[command(name = "longbench")]
    LongBench(longbench::LongBenchArguments),
    /// MMLU-Pro: ten-way questions, zero-shot, with reasoning
    MmluPro(mmlu_pro::MmluProArguments),
    /// A fact at some depth of a long text
    Needle(needle::NeedleArguments),
    /// Many keys with their values, and a question for one
    Recall(recall::RecallArguments),
    /// RULER's synthetic tasks: needles, variables, common and frequent words, prompted and scored as published
    Ruler(ruler::RulerArguments),
    /// Perplexity: how well the model predicts a text
    Perplexity(text::TextArguments),
    /// Divergence of the model's predictions of a text from those with the full cache: the sensitive measure
    Divergence(text::TextArguments),
    /// Error of the keys and values that caches hold, against their bytes
    Reconstruction(reconstruction::ReconstructionArguments),
    /// Error of dictionaries on texts that they were learned on, and on others
    Dictionary(dictionary::DictionaryArguments),
    /// Reports of several evaluations on one page: quality against bytes, and the spread over trainings of dictionaries
    Overview(overview::OverviewArguments),
}

impl Eval {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.task {
            Task::Problems(problems) => problems.run(),
            Task::Gsm8k(gsm8k) => gsm8k.run(),
            Task::LongBench(longbench) => longbench.run(),
            Task::MmluPro(mmlu_pro) => mmlu_pro.run(),
            Task::Needle(needle) => needle.run(),
            Task::Recall(recall) => recall.run(),
            Task::Ruler(ruler) => ruler.run(),
            Task::Perplexity(text) => text.run(TextMeasure::Perplexity),
            Task::Divergence(text) => text.run(TextMeasure::Divergence),
            Task::Reconstruction(reconstruction) => reconstruction.run(),
            Task::Dictionary(dictionary) => dictionary.run(),
            Task::Overview(overview) => overview.run(),
        }
    }
}

/// Path, and its name in the output.
#[derive(Clone)]
struct Named {
    name: Option<String>,
    path: PathBuf,
}

impl Named {
    fn name_or_stem(&self) -> String {
        let stem = || Some(self.path.file_stem()?.to_string_lossy().into_owned());
        self.name.clone().or_else(stem).unwrap_or_default()
    }
}

impl FromStr for Named {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let split = text.split_once('=').filter(|(name, path)| {
            // A path may have the sign in it.
            !name.is_empty() && !path.is_empty() && !Path::new(text).exists()
        });
        let (name, path) = split.map_or((None, text), |(name, path)| (Some(name.into()), path));
        Ok(Self {
            name,
            path: path.into(),
        })
    }
}
