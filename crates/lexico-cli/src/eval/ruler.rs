use std::path::PathBuf;

use clap::Args;
use lexico_eval::questions::template_tokens;
use lexico_eval::tasks::needle::read_haystack;
use lexico_eval::tasks::ruler::{RulerOptions, RulerTask, TASKS, ruler};

use super::comparison::QuestionArguments;
use crate::ui;

#[derive(Args)]
pub(crate) struct RulerArguments {
    #[command(flatten)]
    questions: QuestionArguments,
    /// Tasks: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt (variable tracking), cwe
    /// (common words), fwe (frequent words) [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    task: Vec<String>,
    /// Tokens of the prompts, together with those of their answers
    #[arg(
        long,
        value_name = "K,...",
        value_delimiter = ',',
        default_value = "1024"
    )]
    length: Vec<usize>,
    /// Prompts of each task and length; published results have 500
    #[arg(long, value_name = "K", default_value_t = 20)]
    repeats: usize,
    /// A text in place of Paul Graham's essays, for the tasks that hide needles in them [default: the noise sentences of
    /// niah_single_1]
    #[arg(long, value_name = "FILE")]
    haystack: Option<PathBuf>,
    /// The generator's seed
    #[arg(long, value_name = "SEED", default_value_t = 42)]
    draw: u32,
}

impl RulerArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let tasks = match self.task.as_slice() {
            [] => TASKS.to_vec(),
            names => names
                .iter()
                .map(|name| RulerTask::named(name))
                .collect::<Result<_, _>>()?,
        };
        let haystack = self.haystack.as_deref().map(read_haystack).transpose()?;
        let essays: Vec<&str> = tasks
            .iter()
            .filter(|task| task.wants_essays())
            .map(|task| task.name)
            .collect();
        if haystack.is_none() && !essays.is_empty() {
            ui::note(&format!(
                "{}: noise sentences stand in for Paul Graham's essays; --haystack takes a text in their place",
                essays.join(", ")
            ));
        }
        let chat = self.questions.chat;
        self.questions.run(|model| {
            let options = RulerOptions {
                tasks,
                lengths: self.length,
                samples: self.repeats,
                haystack,
                template_tokens: if chat { template_tokens(model)? } else { 0 },
                seed: self.draw,
            };
            Ok(ruler(&options, &|text| {
                Ok(model.tokenizer.encode_more(text)?.len())
            })?)
        })
    }
}
