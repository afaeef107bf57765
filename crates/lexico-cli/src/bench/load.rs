use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use lexico_llm::Quantize;
use lexico_llm::cache::{CacheContext, CacheSpec};
use lexico_llm::decoder::{Decoder, Logits, Sequence};
use lexico_llm::shape::{self, SHAPES};
use serde_json::json;

use crate::model::path_of;
use crate::{interrupt, memory, ui};

#[derive(Args)]
pub(super) struct Load {
    /// The model: a folder in Hugging Face layout, a .gguf file, or a name on the hub
    #[arg(short, long, value_name = "PATH|ORG/NAME")]
    model: String,
    /// Format of the model's matrices in memory: none (as they are stored), q8_0, q6_k or q4_k
    #[arg(long, default_value = "none", value_name = "FORMAT")]
    quantize: Quantize,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Load {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let path = path_of(&self.model)?;
        let unknown = "the memory of a process can be read on Linux only";
        memory::forget_peak();
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
            calibration: None,
            device: decoder.device(),
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

#[derive(Args)]
pub(super) struct RandomModel {
    /// The model's shape
    #[arg(long, default_value = SHAPES[0], value_parser = SHAPES)]
    shape: String,
    /// The folder to write, which must not be there yet
    #[arg(short, long, value_name = "FOLDER")]
    out: PathBuf,
}

impl RandomModel {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = shape::config(&self.shape).context("an unknown shape")?;
        interrupt::listen()?;
        let bar = ui::progress(0, config.layers as u64 + 1, "shards");
        let written = shape::save(&config, &self.out, &mut || {
            bar.inc(1);
            interrupt::flow()
        });
        bar.finish_and_clear();
        anyhow::ensure!(written?, "interrupted; {} is not whole", self.out.display());
        ui::line(&format!("{} written", self.out.display()))
    }
}
