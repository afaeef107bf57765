use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use lexico::pursuit::oracle;
use lexico::tensor_file::TensorFile;
use lexico::{Dictionary, Pursuit as Coder};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::median;
use crate::{interrupt, ui};

#[derive(Args)]
pub(super) struct Pursuit {
    /// Length of a vector, where vectors are drawn
    #[arg(long, default_value_t = 128, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=4096))]
    head_dim: u32,
    /// Atoms of the dictionary, where it is drawn
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    atoms: u32,
    /// Nonzeros of a code
    #[arg(short, long, default_value_t = 16, value_name = "S")]
    sparsity: usize,
    /// Vectors of a run, where they are drawn
    #[arg(long, default_value_t = 2048, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    vectors: u32,
    /// A safetensors file whose tensor `vectors` [n, m] is coded instead of drawn ones
    #[arg(long, value_name = "FILE", requires = "dictionary")]
    file: Option<PathBuf>,
    /// The dictionary file for them
    #[arg(short, long, value_name = "FILE", requires_all = ["file", "tensor"])]
    dictionary: Option<PathBuf>,
    /// The dictionary's tensor, as layers.0.keys
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// Vectors that the oracle codes too; it is slow
    #[arg(long, default_value_t = 128, value_name = "N")]
    oracle: usize,
    /// Runs; the median counts
    #[arg(short, long, default_value_t = 5, value_name = "N")]
    repetitions: usize,
    /// Print one JSON document instead of a line
    #[arg(long)]
    json: bool,
}

impl Pursuit {
    pub(super) fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.repetitions > 0 && self.oracle > 0,
            "--repetitions and --oracle must be at least 1"
        );
        let (dictionary, vectors) = self.numbers()?;
        let m = dictionary.head_dim();
        let count = vectors.len() / m;
        let coder = Coder::new(&dictionary, self.sparsity)?;
        interrupt::listen()?;
        let bar = ui::progress(self.repetitions as u64 + 1, "runs");
        bar.set_message("oracle");
        let sample = &vectors[..self.oracle.min(count) * m];
        let relative = |x: &[f32]| {
            let whole = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            let found = oracle::encode(&dictionary, x, self.sparsity, 0.0);
            if whole > 0.0 {
                found.residual_norm / whole
            } else {
                0.0
            }
        };
        let exact: f64 = sample.chunks(m).map(relative).sum();
        let exact = exact / (sample.len() / m) as f64;
        let ours = f64::from(coder.encode(sample)?.mean_relative_error());
        bar.inc(1);
        bar.set_message("pursuit");
        let mut times = Vec::new();
        for _ in 0..self.repetitions {
            let started = Instant::now();
            coder.encode(&vectors)?;
            times.push(started.elapsed().as_secs_f64() * 1e6 / count as f64);
            bar.inc(1);
            anyhow::ensure!(!interrupt::happened(), "interrupted");
        }
        bar.finish_and_clear();
        let microseconds = median(&mut times);
        let ratio = if exact > 0.0 { ours / exact } else { 1.0 };
        let threads = rayon::current_num_threads();
        if self.json {
            return ui::json(&json!({
                "head_dim": m, "atoms": dictionary.len(), "sparsity": self.sparsity,
                "vectors": count, "threads": threads,
                "microseconds_per_vector": microseconds, "relative_error": ours,
                "oracle_relative_error": exact, "relative_error_ratio": ratio,
                "dictionary_bytes": dictionary.bytes(),
            }));
        }
        ui::line(&format!(
            "{microseconds:.1} µs a vector on {threads} threads (m = {m}, N = {}, s = {}); mean \
             relative error {ours:.4}, {ratio:.6} of the oracle's; dictionary {}",
            dictionary.len(),
            self.sparsity,
            ui::bytes(dictionary.bytes())
        ))
    }

    fn numbers(&self) -> anyhow::Result<(Dictionary, Vec<f32>)> {
        if let (Some(file), Some(dictionary), Some(tensor)) =
            (&self.file, &self.dictionary, &self.tensor)
        {
            let dictionary = Dictionary::load(dictionary, tensor)?;
            let (vectors, shape) = TensorFile::open(file)?.f32_tensor("vectors", 2)?;
            anyhow::ensure!(
                shape[1] == dictionary.head_dim() && shape[0] > 0,
                "{}: vectors of shape {shape:?} for atoms of length {}",
                file.display(),
                dictionary.head_dim()
            );
            return Ok((dictionary, vectors));
        }
        let m = self.head_dim as usize;
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut draw = |rows: u32| -> Vec<f32> {
            let numbers = 0..rows as usize * m;
            numbers.map(|_| rng.random_range(-1f32..1.0)).collect()
        };
        let dictionary = Dictionary::normalised(draw(self.atoms), m)?;
        Ok((dictionary, draw(self.vectors)))
    }
}
