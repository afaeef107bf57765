use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use lexico::dictionary::{CODEBOOK_ATOMS, CodebookSizes, Codebooks, MAX_ATOMS, MAX_FIRST_ATOMS};
use lexico::encode::oracle;
use lexico::encode::{BEAM_WIDTH, BeamSearch};
use lexico::tensor_file::TensorFile;
use lexico::{Dictionary, Pursuit as Coder};
use lexico_llm::DeviceName;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::{gpu, median};
use crate::{interrupt, ui};

#[derive(Args)]
pub(super) struct Pursuit {
    /// Length of a vector, where vectors are drawn
    #[arg(long, default_value_t = 128, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=4096))]
    head_dim: u32,
    /// Search for packed codes, which have one atom of each of S groups
    #[arg(long, conflicts_with_all = ["atoms", "oracle"])]
    packed: bool,
    /// Sums that the search for packed codes follows
    #[arg(long, default_value_t = BEAM_WIDTH, value_name = "N", requires = "packed")]
    beam: usize,
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
    /// Where to code: cpu, cuda or cuda:N (builds with --features cuda), or auto
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: DeviceName,
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
        interrupt::listen()?;
        if self.packed {
            return self.run_packed();
        }
        let (dictionary, vectors) = match &self.file {
            Some(file) => {
                let (path, tensor) = self.named();
                let dictionary = Dictionary::load(path, tensor)?;
                let vectors = vectors(file, dictionary.head_dim())?;
                (dictionary, vectors)
            }
            None => {
                let (m, mut draw) = (self.head_dim as usize, drawn());
                let dictionary = Dictionary::normalised(draw(self.atoms as usize * m), m)?;
                (dictionary, draw(self.vectors as usize * m))
            }
        };
        let m = dictionary.head_dim();
        let coder = Coder::new(&dictionary, self.sparsity)?;
        let bar = ui::progress(self.repetitions as u64 + 1, "runs");
        bar.set_message("oracle");
        let sample = &vectors[..self.oracle.min(vectors.len() / m) * m];
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
        let count = vectors.len() / m;
        let on_gpu = gpu::pursuit(self.device, &dictionary, self.sparsity, sample, &vectors)?;
        let (ours, microseconds) = match on_gpu {
            None => {
                let ours = coder.encode(sample)?.mean_relative_error();
                (ours, self.time(count, &bar, || coder.encode(&vectors))?)
            }
            Some(gpu) => (
                gpu.relative_error,
                self.time(count, &bar, || (gpu.encode)())?,
            ),
        };
        let ours = f64::from(ours);
        let ratio = if exact > 0.0 { ours / exact } else { 1.0 };
        let threads = rayon::current_num_threads();
        if self.json {
            return ui::json(&json!({
                "head_dim": m, "atoms": dictionary.len(), "sparsity": self.sparsity,
                "vectors": vectors.len() / m, "threads": threads, "device": self.device.to_string(),
                "microseconds_per_vector": microseconds, "relative_error": ours,
                "oracle_relative_error": exact, "relative_error_ratio": ratio,
                "dictionary_bytes": dictionary.bytes(),
            }));
        }
        let place = self.place();
        ui::line(&format!(
            "{microseconds:.3} µs a vector on {place} (m = {m}, N = {}, s = {}); mean \
             relative error {ours:.4}, {ratio:.6} of the oracle's; dictionary {}",
            dictionary.len(),
            self.sparsity,
            ui::bytes(dictionary.bytes())
        ))
    }

    fn run_packed(self) -> anyhow::Result<()> {
        let (dictionary, vectors) = match &self.file {
            Some(file) => {
                let (path, tensor) = self.named();
                let dictionary = Codebooks::load(path, tensor)?;
                let vectors = vectors(file, dictionary.head_dim())?;
                (dictionary, vectors)
            }
            None => {
                let (m, mut draw) = (self.head_dim as usize, drawn());
                let groups = CodebookSizes {
                    first: MAX_FIRST_ATOMS,
                };
                let most = 1 + (MAX_ATOMS - MAX_FIRST_ATOMS) / CODEBOOK_ATOMS;
                anyhow::ensure!(
                    (1..=most).contains(&self.sparsity),
                    "--sparsity {}: packed codes have 1 to {most} atoms",
                    self.sparsity
                );
                let atoms = draw(groups.atoms(self.sparsity) * m);
                // Sums of them are as long as the vectors.
                let share = 1.0 / (self.sparsity as f32).sqrt();
                let atoms = atoms.into_iter().map(|x| x * share).collect();
                let dictionary = Codebooks::new(atoms, m, groups)?;
                (dictionary, draw(self.vectors as usize * m))
            }
        };
        let m = dictionary.head_dim();
        let coder = BeamSearch::new(&dictionary, self.sparsity)?.with_beam(self.beam);
        let bar = ui::progress(self.repetitions as u64 + 1, "runs");
        let count = vectors.len() / m;
        let on_gpu = gpu::beam_search(self.device, &dictionary, self.sparsity, &vectors)?;
        let (error, microseconds) = match on_gpu {
            None => {
                let error = coder.encode(&vectors)?.mean_relative_error();
                (error, self.time(count, &bar, || coder.encode(&vectors))?)
            }
            Some(gpu) => {
                anyhow::ensure!(
                    self.beam == BEAM_WIDTH,
                    "on a GPU the search follows {BEAM_WIDTH} sums; leave --beam out"
                );
                (
                    gpu.relative_error,
                    self.time(count, &bar, || (gpu.encode)())?,
                )
            }
        };
        let error = f64::from(error);
        let threads = rayon::current_num_threads();
        let first = dictionary.groups().first;
        if self.json {
            return ui::json(&json!({
                "head_dim": m, "first_group": first, "sparsity": self.sparsity, "beam": self.beam,
                "vectors": vectors.len() / m, "threads": threads, "device": self.device.to_string(),
                "microseconds_per_vector": microseconds, "relative_error": error,
                "dictionary_bytes": dictionary.dictionary().bytes(),
            }));
        }
        let place = self.place();
        ui::line(&format!(
            "{microseconds:.3} µs a vector on {place} (m = {m}, {} groups, the first of {first} atoms, beam {}); \
             mean relative error {error:.4}; dictionary {}",
            self.sparsity,
            self.beam,
            ui::bytes(dictionary.dictionary().bytes())
        ))
    }

    /// Microseconds a vector of a run over `count` of them, the median.
    fn time<T>(
        &self,
        count: usize,
        bar: &ProgressBar,
        encode: impl Fn() -> lexico::Result<T>,
    ) -> anyhow::Result<f64> {
        bar.inc(1);
        bar.set_message("pursuit");
        let mut times = Vec::new();
        for _ in 0..self.repetitions {
            let started = Instant::now();
            encode()?;
            times.push(started.elapsed().as_secs_f64() * 1e6 / count as f64);
            bar.inc(1);
            anyhow::ensure!(!interrupt::happened(), "interrupted");
        }
        bar.finish_and_clear();
        Ok(median(&mut times))
    }

    /// Where vectors are coded, for people.
    fn place(&self) -> String {
        match self.device {
            DeviceName::Cpu => format!("{} threads", rayon::current_num_threads()),
            device => device.to_string(),
        }
    }

    /// The dictionary's file and tensor, which go with a file of vectors.
    fn named(&self) -> (&Path, &str) {
        let path = self.dictionary.as_deref().unwrap_or(Path::new(""));
        (path, self.tensor.as_deref().unwrap_or_default())
    }
}

/// Draws numbers, always the same.
fn drawn() -> impl FnMut(usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    move |count| (0..count).map(|_| rng.random_range(-1f32..1.0)).collect()
}

/// The vectors of a file, for atoms of length `m`.
fn vectors(file: &Path, m: usize) -> anyhow::Result<Vec<f32>> {
    let (vectors, shape) = TensorFile::open(file)?.f32_tensor("vectors", 2)?;
    anyhow::ensure!(
        shape[1] == m && shape[0] > 0,
        "{}: vectors of shape {shape:?} for atoms of length {m}",
        file.display(),
    );
    Ok(vectors)
}
