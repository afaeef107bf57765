use std::path::PathBuf;

use clap::Args;
use lexico::dictionary::CodeFamily;
use lexico_eval::report::folder::ReportFolder;
use lexico_eval::tasks::reconstruction::{Reconstruction, SameError};
use lexico_llm::cache::CacheSpec;

use crate::model::ModelArguments;
use crate::{interrupt, ui};

/// Sparsities of Lexico's formats that are compared unless caches are named, as far as the dictionaries allow.
const SPARSITIES: &[usize] = &[4, 6, 8, 12, 16, 24];
const ADDITIVE_SPARSITIES: &[usize] = &[1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48];
/// The format that the paper proposes: others are compared with it at equal error.
const REFERENCE: &str = "lexico f8";
/// Caches of other methods that are compared with them.
const RIVALS: &[&str] = &[
    "per-token:bits=2,window=0",
    "per-token:bits=3,window=0",
    "per-token:bits=4,window=0",
    "kivi:bits=2,residual=32",
    "kivi:bits=4,residual=32",
    "turboquant:bits=1",
    "turboquant:bits=2",
    "turboquant:bits=3",
    "turboquant:bits=4",
    "turboquant:norm=eden,bits=1",
    "turboquant:norm=eden,bits=2",
    "turboquant:norm=eden,bits=3",
    "turboquant:norm=eden,bits=4",
];

#[derive(Args)]
pub(crate) struct ReconstructionArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// A cache to measure; may be given several times [default: formats of lexico, per-token, kivi and turboquant at
    /// several sizes, without dense windows]
    #[arg(long, value_name = "NAME[:key=value,...]")]
    cache: Vec<CacheSpec>,
    /// A text whose keys and values are taken [default: what the model itself writes]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens to read, the text's first ones
    #[arg(long, value_name = "K", default_value_t = 1024)]
    tokens: usize,
    /// Seed of the model's own text
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Write results.json, report.html and plot.svg, with curves of every layer, to this folder
    #[arg(long, value_name = "FOLDER")]
    report: Option<PathBuf>,
    /// Print one JSON document, layer by layer, instead of a table
    #[arg(long)]
    json: bool,
}

impl ReconstructionArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let report = self.report.as_deref();
        let folder = report.map(|r| ReportFolder::open(r, false)).transpose()?;
        let named = !self.cache.is_empty();
        let mut caches = self.cache;
        if !named {
            let rivals = RIVALS.iter().map(|format| format.parse());
            caches = rivals.collect::<lexico_llm::Result<Vec<CacheSpec>>>()?;
        }
        let model = self.model.load(&caches)?;
        if !named && let Some(dictionaries) = &model.dictionaries {
            let max = |family| dictionaries.max_sparsity(family);
            let additive = (ADDITIVE_SPARSITIES, max(CodeFamily::Additive));
            let sparse = (SPARSITIES, max(CodeFamily::Sparse));
            for (format, (sparsities, max)) in
                [("f8", sparse), ("i8", sparse), ("additive", additive)]
            {
                for sparsity in sparsities.iter().filter(|s| **s <= max) {
                    let spec = format!(
                        "lexico:format={format},sparsity={sparsity},allocation=same,fit=least-squares,window=0,batch=1"
                    );
                    caches.push(spec.parse()?);
                }
            }
        }
        interrupt::listen()?;
        let max = model.decoder.config().context;
        anyhow::ensure!(
            (2..=max).contains(&self.tokens),
            "--tokens {} is impossible: from 2 to the model's context, {max}",
            self.tokens
        );
        let tokens = match &self.text {
            Some(path) => {
                let text = std::fs::read_to_string(path);
                let text = text.map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
                let mut tokens = model.tokenizer.encode_first(&text)?;
                anyhow::ensure!(
                    tokens.len() >= 2,
                    "{}: it holds less than two tokens",
                    path.display()
                );
                tokens.truncate(self.tokens);
                tokens
            }
            None => {
                let bar = ui::progress(0, self.tokens as u64, "tokens");
                bar.set_message("writing");
                let tokens = Reconstruction::own_text(&model, self.tokens, self.seed, &mut || {
                    bar.inc(1);
                    interrupt::flow()
                });
                bar.finish_and_clear();
                tokens?
            }
        };
        let mut found = Reconstruction::new(&model, tokens)?;
        let bar = ui::progress(0, caches.len() as u64, "caches");
        for spec in &caches {
            bar.set_message(spec.to_string());
            found.add(&model, spec)?;
            bar.inc(1);
            if interrupt::happened() {
                return Err(lexico_eval::Error::Interrupted.into());
            }
        }
        bar.finish_and_clear();
        found.add_gaussian_bound();
        if let Some(folder) = folder {
            folder.finish(&found)?;
        }
        let same_error = found.bits_at_error_of(REFERENCE);
        if self.json {
            let mut json = serde_json::to_value(&found)?;
            json["same_error"] = serde_json::to_value(&same_error)?;
            return ui::json(&json);
        }
        let header = [
            "mean of the layers",
            "keys: bits",
            "relative",
            "squared",
            "values: bits",
            "relative",
            "squared",
        ];
        ui::line(&ui::table(header, found.mean_rows()))?;
        if same_error.is_empty() {
            return Ok(());
        }
        ui::line(&format!(
            "\nBits for the squared error of {REFERENCE}, over its own:\n"
        ))?;
        let mut rows: Vec<Vec<String>> = Vec::new();
        for wanted in found.formats() {
            for method in found.methods() {
                let of_pair = |s: &&SameError| s.reference == wanted && s.method == method;
                let pairs: Vec<&SameError> = same_error.iter().filter(of_pair).collect();
                let bits = |f: fn(&SameError) -> f64| pairs.iter().map(|s| f(s)).sum::<f64>();
                if pairs.is_empty() {
                    continue;
                }
                let ratios = || pairs.iter().map(|s| s.ratio);
                let min = ratios().fold(f64::INFINITY, f64::min);
                let max = ratios().fold(0.0, f64::max);
                rows.push(vec![
                    wanted.to_owned(),
                    method.to_owned(),
                    format!("{:.3}", bits(|s| s.bits) / bits(|s| s.reference_bits)),
                    format!("{min:.3} to {max:.3}"),
                    pairs.len().to_string(),
                ]);
            }
        }
        let header = [
            "at the error of",
            "format",
            "all",
            "each layer and part",
            "of them",
        ];
        ui::line(&ui::table(header, rows))
    }
}
