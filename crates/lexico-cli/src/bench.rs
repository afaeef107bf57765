use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Subcommand};
use lexico_llm::Quantize;
use lexico_llm::cache::{CacheContext, CacheSpec};
use lexico_llm::decoder::{Decoder, Logits, Sequence};
use lexico_llm::shape::{self, SHAPES};
use serde_json::json;

use crate::model::path_of;
use crate::{interrupt, memory, ui};

#[derive(Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Tokens a second of whole decoding steps, random weights of a known shape
    Decode(Decode),
    /// Time and peak memory of loading a model, and its memory once it has run
    Load(Load),
    /// Write a model of random weights of a known shape, to load where no other is to be had
    Model(RandomModel),
}

#[derive(Args)]
struct Load {
    /// The model: a folder in Hugging Face layout, a .gguf file, or a name on the hub
    #[arg(short, long, value_name = "PATH|ORG/NAME")]
    model: String,
    /// How the model's matrices are held: none (as they are stored), q8_0, q6_k or q4_k
    #[arg(long, default_value = "none", value_name = "FORMAT")]
    quantize: Quantize,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RandomModel {
    /// The model's shape
    #[arg(long, default_value = SHAPES[0], value_parser = SHAPES)]
    shape: String,
    /// The folder to write, which must not be there yet
    #[arg(short, long, value_name = "FOLDER")]
    out: PathBuf,
}

#[derive(Args)]
struct Decode {
    /// The model's shape
    #[arg(long, default_value = SHAPES[0], value_parser = SHAPES)]
    shape: String,
    /// How the model's matrices are held: none (f16), q8_0, q6_k or q4_k
    #[arg(long, default_value = "q8_0", value_name = "FORMAT")]
    quantize: Quantize,
    /// Positions in the cache before the first step
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        default_value_t = 512,
        value_name = "N"
    )]
    context: usize,
    /// Steps in a run
    #[arg(short = 'n', long, default_value_t = 8, value_name = "N")]
    steps: usize,
    /// Runs of each cache, in turn; the median counts
    #[arg(short, long, default_value_t = 5, value_name = "N")]
    repetitions: usize,
    /// A cache method to measure; may be given several times
    #[arg(long, value_name = "NAME[:key=value,...]", default_values = ["full", "lexico"])]
    cache: Vec<CacheSpec>,
    /// Atoms of the random dictionaries
    #[arg(long, default_value_t = 4096, value_name = "N")]
    atoms: usize,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

impl Bench {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.what {
            What::Decode(decode) => decode.run(),
            What::Load(load) => load.run(),
            What::Model(model) => model.run(),
        }
    }
}

impl Load {
    fn run(self) -> anyhow::Result<()> {
        let path = path_of(&self.model)?;
        let unknown = "the memory of a process can be read on Linux only";
        let (before, _) = memory::resident().context(unknown)?;
        let started = Instant::now();
        let decoder = Decoder::open(&path, self.quantize)?;
        let seconds = started.elapsed().as_secs_f64();
        let (after, peak) = memory::resident().context(unknown)?;
        // Products of quantised matrices make their own copies when they first run.
        let context = CacheContext {
            model: &self.model,
            config: decoder.config(),
            dictionaries: None,
        };
        let mut cache = "full".parse::<CacheSpec>()?.build(&context)?;
        for tokens in [&[0; 16][..], &[0]] {
            let cache = cache.as_mut();
            decoder.forward(&mut [Sequence { tokens, cache }], Logits::Last)?;
        }
        let (used, _) = memory::resident().context(unknown)?;
        let used = used.saturating_sub(before);
        let (stays, peak) = (after.saturating_sub(before), peak.saturating_sub(before));
        let ratio = peak as f64 / stays.max(1) as f64;
        if self.json {
            return ui::json(&json!({
                "model": self.model, "seconds": seconds, "stays_bytes": stays, "peak_bytes": peak,
                "peak_over_stays": ratio, "after_first_tokens_bytes": used,
            }));
        }
        ui::line(&format!(
            "loaded in {seconds:.1} s; {} stay, {} at the peak ({ratio:.2} x), {} after the first tokens",
            ui::bytes(stays),
            ui::bytes(peak),
            ui::bytes(used)
        ))
    }
}

impl RandomModel {
    fn run(self) -> anyhow::Result<()> {
        let config = shape::config(&self.shape).context("an unknown shape")?;
        interrupt::listen()?;
        let bar = ui::progress(config.layers as u64 + 1, "shards");
        let written = shape::save(&config, &self.out, &mut || {
            bar.inc(1);
            interrupt::flow()
        });
        bar.finish_and_clear();
        anyhow::ensure!(written?, "interrupted; {} is not whole", self.out.display());
        ui::line(&format!("{} written", self.out.display()))
    }
}

/// One cache's figures.
struct Row {
    cache: String,
    bytes: usize,
    tokens_per_second: f64,
}

impl Decode {
    fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.steps > 0 && self.repetitions > 0,
            "--steps and --repetitions must be at least 1"
        );
        let config = shape::config(&self.shape).context("an unknown shape")?;
        let positions = self
            .context
            .saturating_add(self.steps.saturating_mul(self.repetitions));
        anyhow::ensure!(
            positions <= config.context,
            "{} positions do not fit the shape's context of {}",
            positions,
            config.context
        );
        let sparsity = (config.head_dim / 8).max(1);
        let dictionaries = shape::dictionaries(&config, self.atoms, sparsity)?;
        interrupt::listen()?;
        let bar = ui::progress(1 + self.cache.len() as u64 * 2, "stages");
        bar.set_message("weights");
        let started = Instant::now();
        let decoder = Decoder::random(config.clone(), self.quantize)?;
        let load_seconds = started.elapsed().as_secs_f64();
        bar.inc(1);
        let context = CacheContext {
            model: &self.shape,
            config: &config,
            dictionaries: Some(&dictionaries),
        };
        let mut caches = Vec::new();
        for spec in &self.cache {
            bar.set_message(format!("filling {spec}"));
            let mut cache = spec.build(&context)?;
            shape::fill(cache.as_mut(), &config, self.context)?;
            caches.push((cache, Vec::new()));
            bar.inc(1);
        }
        bar.set_message("decoding");
        // In turn, so that whatever else the machine does falls on all of them.
        for _ in 0..self.repetitions {
            for (cache, rates) in &mut caches {
                let started = Instant::now();
                for _ in 0..self.steps {
                    let mut step = [Sequence {
                        tokens: &[1],
                        cache: cache.as_mut(),
                    }];
                    decoder.forward(&mut step, Logits::Last)?;
                    anyhow::ensure!(!interrupt::happened(), "interrupted");
                }
                rates.push(self.steps as f64 / started.elapsed().as_secs_f64());
            }
        }
        bar.finish_and_clear();
        let rows: Vec<Row> = self
            .cache
            .iter()
            .zip(&mut caches)
            .map(|(spec, (cache, rates))| Row {
                cache: spec.to_string(),
                bytes: cache.footprint().total(),
                tokens_per_second: median(rates),
            })
            .collect();
        let first = rows.first().map_or(1.0, |row| row.tokens_per_second);
        if self.json {
            let rows = rows.iter().map(|row| {
                json!({
                    "cache": row.cache,
                    "bytes": row.bytes,
                    "decode_tokens_per_second": row.tokens_per_second,
                    "ratio": row.tokens_per_second / first,
                })
            });
            return ui::json(&json!({
                "shape": self.shape,
                "context": self.context,
                "threads": rayon::current_num_threads(),
                "load_seconds": load_seconds,
                "rows": rows.collect::<Vec<_>>(),
            }));
        }
        let rows = rows.iter().map(|row| {
            [
                row.cache.clone(),
                ui::bytes(row.bytes),
                format!("{:.2}", row.tokens_per_second),
                format!("{:.2}", row.tokens_per_second / first),
            ]
        });
        let header = ["cache", "held", "tokens/s", "over the first"];
        ui::line(&ui::table(header, rows.collect()))
    }
}

fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
