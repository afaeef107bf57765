use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lexico::DictionarySet;
use lexico::tensor_file::{check_writable, write_atomically};
use lexico_eval::tasks::dictionary::{CellError, Part, Universality, UniversalityOptions};
use lexico_llm::{Corpus, Quantize};

use super::Named;
use crate::{interrupt, model, ui};

#[derive(Args)]
pub(crate) struct DictionaryArguments {
    /// The model that reads: "tiny" (embedded), a folder in Hugging Face layout, a .gguf file, or
    /// org/name[@revision][/file.gguf] on the hub
    #[arg(short, long, default_value = "tiny", value_name = "tiny|PATH|ORG/NAME")]
    model: String,
    /// Format in which the model's matrices are held: none (as they are stored), q8_0, q6_k or q4_k
    #[arg(long, default_value = "none", value_name = "FORMAT")]
    quantize: Quantize,
    /// The dictionaries, files of `lexico train`, .pt files of the reference implementation or published ones; one with the name
    /// of a text was learned on it [default names: the files']
    #[arg(short, long, required = true, num_args = 1.., value_name = "[NAME=]FILE")]
    dictionary: Vec<Named>,
    /// The texts, each as in `lexico train --corpus`
    #[arg(long, required = true, num_args = 1.., value_name = "[NAME=]PATH|hf://SET|-")]
    text: Vec<Named>,
    /// The field of an object in .jsonl and .json, or the column in .parquet, that holds the text
    /// [default: text]; where it is named, stdin is read as .jsonl
    #[arg(long, value_name = "NAME")]
    field: Option<String>,
    /// Nonzeros of a vector
    #[arg(short, long, value_delimiter = ',', default_values_t = UniversalityOptions::default().sparsities, value_name = "S,...")]
    sparsity: Vec<usize>,
    /// Max number of tokens of each text, in whole chunks drawn evenly from all of it
    #[arg(long, default_value_t = UniversalityOptions::default().tokens, value_name = "N")]
    tokens: usize,
    /// Tokens that the model sees at once
    #[arg(long, visible_alias = "ctx-size", default_value_t = UniversalityOptions::default().context, value_name = "N")]
    context: usize,
    /// Vectors of each layer that are coded
    #[arg(long, default_value_t = UniversalityOptions::default().vectors, value_name = "N")]
    vectors: usize,
    /// Take dictionaries that were learned for another model, where layers and head dim agree
    #[arg(long)]
    any_model: bool,
    /// Show every layer too
    #[arg(long)]
    per_layer: bool,
    /// Write plots of the error against sparsity, and against N where dictionaries learned on the same text
    /// differ in it
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Seed of the samples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON document instead of tables
    #[arg(long)]
    json: bool,
}

impl DictionaryArguments {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        if let Some(plot) = &self.plot {
            if plot.extension().is_none_or(|e| e != "svg") {
                anyhow::bail!("{}: plots are written as .svg", plot.display());
            }
            check_writable(plot)?;
        }
        let mut texts = Vec::with_capacity(self.text.len());
        for text in &self.text {
            let terminal = std::io::stderr().is_terminal();
            let corpus = Corpus::open(&[&text.path], self.field.as_deref(), terminal)?;
            let name = text.name.clone();
            texts.push((name.unwrap_or_else(|| corpus.names().join(", ")), corpus));
        }
        let model = model::load_model(&self.model, self.quantize)?;
        let mut dictionaries: Vec<(String, DictionarySet)> = Vec::new();
        for dictionary in &self.dictionary {
            let set = model::read_dictionaries(&model, &dictionary.path)?;
            dictionaries.push((dictionary.name_or_stem(), set));
        }
        interrupt::listen()?;
        let options = UniversalityOptions {
            sparsities: self.sparsity.clone(),
            tokens: self.tokens,
            context: self.context,
            vectors: self.vectors,
            seed: self.seed,
            any_model: self.any_model,
        };
        let mut bars = ui::Bars::cleared();
        let measured =
            Universality::measure(&model, &dictionaries, &texts, &options, &mut |step| {
                bars.show(step.text.to_owned(), step.done, step.total, step.unit);
                interrupt::flow()
            });
        bars.finish();
        let measured = measured?;
        if let Some(plot) = &self.plot {
            write_atomically(plot, measured.plot().as_bytes())?;
        }
        if self.json {
            return ui::json(&serde_json::to_value(&measured).context("the result as JSON")?);
        }
        self.print(&measured)
    }

    fn print(&self, measured: &Universality) -> anyhow::Result<()> {
        ui::line(&format!(
            "Mean relative error of keys and values that {} has of each text, f32 coefficients.",
            measured.model
        ))?;
        if measured.cells.iter().any(|cell| cell.own) {
            ui::line(
                "In brackets: times the least error of a dictionary learned on that text (*).",
            )?;
        }
        for text in &measured.texts {
            ui::line(&format!(
                "{}: {} tokens, {} vectors a layer",
                text.name, text.tokens, text.vectors
            ))?;
        }
        for dictionary in &measured.dictionaries {
            if let Some(other) = &dictionary.other_model {
                ui::line(&format!(
                    "{}: learned for another model, {other}",
                    dictionary.name
                ))?;
            }
        }
        for &sparsity in &measured.sparsities {
            let parts: [(&str, Part); 2] = [("keys", |e| e.keys), ("values", |e| e.values)];
            for (part, error) in parts {
                let layers = measured.cells.first().map_or(0, |cell| cell.layers.len());
                let of_layers = if self.per_layer { layers } else { 0 };
                let mut rows = Vec::new();
                for dictionary in &measured.dictionaries {
                    for layer in std::iter::once(None).chain((0..of_layers).map(Some)) {
                        let name = layer.map_or(dictionary.name.clone(), |l| {
                            format!("{}, layer {l}", dictionary.name)
                        });
                        let mut row = vec![name, dictionary.atoms.to_string()];
                        row.extend(measured.texts.iter().map(|text| {
                            let cell = measured.cell(&dictionary.name, &text.name, sparsity);
                            cell.map_or_else(String::new, |c| shown(error(c.errors(layer)), c.own))
                        }));
                        rows.push(row);
                    }
                }
                let mut header = vec![format!("{part}, s = {sparsity}"), "N".to_owned()];
                header.extend(measured.texts.iter().map(|text| text.name.clone()));
                ui::line("")?;
                ui::line(&ui::table(header, rows))?;
            }
        }
        Ok(())
    }
}

fn shown(error: CellError, own: bool) -> String {
    let over_own = error.over_own.map(|ratio| format!(" ({ratio:.2})"));
    let mark = if own { "*" } else { "" };
    format!(
        "{:.4}{}{mark}",
        error.relative_error,
        over_own.unwrap_or_default()
    )
}
