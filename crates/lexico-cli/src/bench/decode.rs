use std::time::Instant;

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use lexico_llm::cache::{CacheContext, CacheSpec};
use lexico_llm::decoder::{Decoder, Logits, Sequence};
use lexico_llm::shape::{self, SHAPES};
use lexico_llm::{DeviceName, Quantize};
use serde_json::json;

use super::median;
use crate::{interrupt, memory, ui};

#[derive(Args)]
pub(super) struct Decode {
    /// The model's shape
    #[arg(long, default_value = SHAPES[0], value_parser = SHAPES)]
    shape: String,
    /// Format of the model's matrices in memory: none (f16), q8_0, q6_k or q4_k
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
    /// Sequences that are decoded together, each with a cache of its own
    #[arg(short, long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Device that computes: cpu, cuda or cuda:N (builds with --features cuda), or auto, the first GPU where there is one
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: DeviceName,
    /// Steps in a run; by default as many as positions leave the recent window at once, so that each run codes once
    #[arg(short = 'n', long, default_value_t = 16, value_name = "N")]
    steps: usize,
    /// Tokens of a prompt to be read as well, into an empty cache; 0 for none
    #[arg(long, default_value_t = 0, value_name = "N")]
    prompt: usize,
    /// Runs of each cache, in turn; the median counts
    #[arg(short, long, default_value_t = 5, value_name = "N")]
    repetitions: usize,
    /// A cache method to measure; may be given several times
    #[arg(long, value_name = "NAME[:key=value,...]", default_values = ["full", "lexico"])]
    cache: Vec<CacheSpec>,
    /// Atoms of the random dictionaries
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    atoms: u32,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

/// Figures of one cache.
struct Row {
    cache: String,
    bytes: usize,
    tokens_per_second: f64,
    prefill_seconds: Option<f64>,
}

impl Row {
    /// Computes the share of prefill that goes into coding: the time that it takes longer than with `full`, whose
    /// attention is the same; `None` where the first row is another.
    fn coding_share(&self, first: &Row) -> Option<f64> {
        let seconds = self.prefill_seconds?;
        let full = first.cache == "full" && self.cache != "full";
        full.then_some(1.0 - first.prefill_seconds? / seconds)
    }
}

impl Decode {
    pub(super) fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.steps > 0 && self.repetitions > 0,
            "--steps and --repetitions must be at least 1"
        );
        let config = shape::config(&self.shape).context("an unknown shape")?;
        let positions = self
            .context
            .saturating_add(self.steps.saturating_mul(self.repetitions));
        anyhow::ensure!(
            positions.max(self.prompt) <= config.context,
            "{} positions do not fit the shape's context of {}",
            positions.max(self.prompt),
            config.context
        );
        let sparsity = (config.head_dim / 8).max(1);
        let dictionaries = shape::dictionaries(&config, self.atoms as usize, sparsity)?;
        interrupt::listen()?;
        let stages = 2 + self.cache.len() as u64 * if self.prompt > 0 { 2 } else { 1 };
        let bar = ui::progress(0, stages, "stages");
        bar.set_message("weights");
        let started = Instant::now();
        let device = self.device.open()?;
        let decoder = Decoder::random(config.clone(), self.quantize, &device)?;
        let load_seconds = started.elapsed().as_secs_f64();
        bar.inc(1);
        let context = CacheContext {
            model: &self.shape,
            config: &config,
            dictionaries: Some(&dictionaries),
            calibration: None,
            device: decoder.device(),
        };
        let mut caches = Vec::new();
        for spec in &self.cache {
            bar.set_message(format!("filling {spec}"));
            let mut own = Vec::new();
            for _ in 0..self.batch {
                let mut cache = spec.build(&context)?;
                shape::fill(cache.as_mut(), &config, self.context, &device)?;
                anyhow::ensure!(!interrupt::happened(), "interrupted");
                own.push(cache);
            }
            caches.push((own, Vec::new()));
            bar.inc(1);
        }
        bar.set_message("decoding");
        // In turn, so that whatever else the machine does falls on all of them.
        for _ in 0..self.repetitions {
            for (own, rates) in &mut caches {
                device.synchronize()?;
                let started = Instant::now();
                for _ in 0..self.steps {
                    let mut step: Vec<Sequence<'_>> = own
                        .iter_mut()
                        .map(|cache| Sequence {
                            tokens: &[1],
                            cache: cache.as_mut(),
                        })
                        .collect();
                    decoder.forward(&mut step, Logits::Last)?;
                    anyhow::ensure!(!interrupt::happened(), "interrupted");
                }
                // A GPU may still be at what it was asked for.
                device.synchronize()?;
                let tokens = self.steps as f64 * f64::from(self.batch);
                rates.push(tokens / started.elapsed().as_secs_f64());
            }
        }
        bar.inc(1);
        let mut rows: Vec<Row> = self
            .cache
            .iter()
            .zip(&mut caches)
            .map(|(spec, (own, rates))| Row {
                cache: spec.to_string(),
                bytes: own.iter().map(|cache| cache.footprint().total()).sum(),
                tokens_per_second: median(rates),
                prefill_seconds: None,
            })
            .collect();
        drop(caches);
        if self.prompt > 0 {
            self.read_prompt(&decoder, &context, &mut rows, &bar)?;
        }
        bar.finish_and_clear();
        let memory = memory::resident();
        let first = rows.first().map_or(1.0, |row| row.tokens_per_second);
        if self.json {
            let rows = rows.iter().map(|row| {
                json!({
                    "cache": row.cache,
                    "bytes": row.bytes,
                    "decode_tokens_per_second": row.tokens_per_second,
                    "ratio": row.tokens_per_second / first,
                    "prefill_seconds": row.prefill_seconds,
                    "coding_share": row.coding_share(&rows[0]),
                })
            });
            return ui::json(&json!({
                "shape": self.shape,
                "context": self.context,
                "batch": self.batch,
                "device": self.device.to_string(),
                "threads": rayon::current_num_threads(),
                "load_seconds": load_seconds,
                "prompt": self.prompt,
                "peak_bytes": memory.map(|(_, peak)| peak),
                "rows": rows.collect::<Vec<_>>(),
            }));
        }
        let cells = rows.iter().map(|row| {
            let mut cells = vec![
                row.cache.clone(),
                ui::bytes(row.bytes),
                format!("{:.2}", row.tokens_per_second),
                format!("{:.2}", row.tokens_per_second / first),
            ];
            if let Some(seconds) = row.prefill_seconds {
                cells.push(format!("{seconds:.2} s"));
                let share = row.coding_share(&rows[0]);
                cells.push(share.map_or("-".to_owned(), ui::percent));
            }
            cells
        });
        let mut header = vec!["cache", "held", "tokens/s", "over the first"];
        if self.prompt > 0 {
            header.extend(["prompt", "coding"]);
        }
        ui::line(&ui::table(header, cells.collect()))?;
        match memory {
            Some((_, peak)) => ui::line(&format!("{} at the peak", ui::bytes(peak))),
            None => Ok(()),
        }
    }

    /// Reads a prompt into an empty cache of each kind, in turn.
    fn read_prompt(
        &self,
        decoder: &Decoder,
        context: &CacheContext<'_>,
        rows: &mut [Row],
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let vocabulary = decoder.config().vocabulary;
        let tokens: Vec<u32> = (0..self.prompt)
            .map(|i| (i * 7919 % vocabulary) as u32)
            .collect();
        let mut times = vec![Vec::new(); rows.len()];
        for _ in 0..self.repetitions {
            for (spec, times) in self.cache.iter().zip(&mut times) {
                bar.set_message(format!("prompt, {spec}"));
                let mut cache = spec.build(context)?;
                let started = Instant::now();
                let mut step = [Sequence {
                    tokens: &tokens,
                    cache: cache.as_mut(),
                }];
                decoder.forward(&mut step, Logits::Last)?;
                decoder.device().synchronize()?;
                times.push(started.elapsed().as_secs_f64());
                anyhow::ensure!(!interrupt::happened(), "interrupted");
            }
        }
        for (row, times) in rows.iter_mut().zip(&mut times) {
            row.prefill_seconds = Some(median(times));
            bar.inc(1);
        }
        Ok(())
    }
}
