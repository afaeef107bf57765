use clap::Args;
use lexico_eval::tasks::problems::{ProblemOptions, Problems, kept};
use lexico_llm::cache::CacheSpec;
use serde_json::json;

use crate::model::ModelArguments;
use crate::{interrupt, ui};

#[derive(Args)]
pub(crate) struct ProblemArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// A cache method to measure; may be given several times (`full` always runs first)
    #[arg(long, value_name = "NAME[:key=value,...]", default_value = "lexico")]
    cache: Vec<CacheSpec>,
    /// Problems to solve, from the first on
    #[arg(long, default_value_t = ProblemOptions::default().items, value_name = "K")]
    items: usize,
    /// Worked examples before each problem
    #[arg(long, default_value_t = ProblemOptions::default().shots, value_name = "K")]
    shots: usize,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

impl ProblemArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut caches: Vec<CacheSpec> = vec!["full".parse()?];
        caches.extend(
            self.cache
                .into_iter()
                .filter(|spec| spec.to_string() != "full"),
        );
        let model = self.model.load(&caches)?;
        let problems = Problems::tiny()?;
        interrupt::listen()?;
        let options = ProblemOptions {
            items: self.items,
            shots: self.shots,
            ..ProblemOptions::default()
        };
        let total = self.items.min(problems.len()) * caches.len();
        let bar = ui::progress(total as u64, "problems");
        let mut runs = Vec::new();
        for (number, spec) in caches.iter().enumerate() {
            bar.set_message(spec.to_string());
            let run = problems.run(&model, spec, &options, &mut |done| {
                bar.set_position((number * self.items + done) as u64);
                interrupt::flow()
            });
            runs.push(run?);
        }
        bar.finish_and_clear();
        let baseline = runs[0].clone();
        if self.json {
            let runs: Vec<_> = runs
                .iter()
                .map(|run| {
                    let (of, kept) = kept(run, &baseline);
                    let mut document = serde_json::to_value(run)?;
                    document["kept"] = json!({"of": of, "right": kept});
                    Ok(document)
                })
                .collect::<Result<_, serde_json::Error>>()?;
            return ui::json(&json!({
                "task": "problems",
                "model": model.name,
                "shots": self.shots,
                "runs": runs,
            }));
        }
        let rows = runs.iter().map(|run| {
            let (of, kept) = kept(run, &baseline);
            [
                run.cache.clone(),
                ui::percent(run.share),
                ui::percent(run.score),
                format!("{kept} of {of}"),
                ui::percent(kept as f64 / of.max(1) as f64),
            ]
        });
        let header = ["cache", "of FP16", "right", "of full's right", "kept"];
        ui::line(&ui::table(header, rows.collect()))
    }
}
