//! Time of coding a vector, sparse or additive, and the error of the codes.
//!
//! ```sh
//! cargo bench -p lexico --bench pursuit -- --head-dim 64 --sparsity 8
//! cargo bench -p lexico --bench pursuit -- --additive --json
//! ```

#[allow(dead_code)] // tests use more of it
#[path = "../tests/common/oracle.rs"]
mod oracle;
mod speed;

use std::path::{Path, PathBuf};

use clap::Parser;
use lexico::dictionary::{CODEBOOK_ATOMS, CodebookSizes, Codebooks, MAX_ATOMS, MAX_FIRST_ATOMS};
use lexico::encode::{BEAM_WIDTH, BeamSearch};
use lexico::tensor_file::TensorFile;
use lexico::{Dictionary, Encoder, Fit, Pursuit as Coder};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use speed::{Common, drawn, gpu, microseconds, print_json};

/// Measures the microseconds that coding a vector takes, and the error of the codes beside the f64 oracle's
#[derive(Parser)]
#[command(name = "pursuit")]
struct Pursuit {
    /// Length of a vector, where vectors are drawn
    #[arg(long, default_value_t = 128, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=4096))]
    head_dim: u32,
    /// Search for additive codes, which have one atom of each of S codebooks
    #[arg(long, alias = "packed", conflicts_with_all = ["atoms", "oracle"])]
    additive: bool,
    /// Beam width of the search for additive codes
    #[arg(long, default_value_t = BEAM_WIDTH, value_name = "N", requires = "additive")]
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
    /// Runs; the median counts
    #[arg(short, long, default_value_t = 5, value_name = "N")]
    repetitions: usize,
    #[command(flatten)]
    common: Common,
}

fn main() -> anyhow::Result<()> {
    Pursuit::parse().run()
}

impl Pursuit {
    fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.repetitions > 0 && self.oracle > 0,
            "--repetitions and --oracle must be at least 1"
        );
        self.common.set_threads()?;
        if self.additive {
            return self.run_additive();
        }
        let (dictionary, vectors) = match &self.file {
            Some(file) => {
                let (path, tensor) = self.named();
                let dictionary = Dictionary::load(path, tensor)?;
                let vectors = vectors(file, dictionary.head_dim())?;
                (dictionary, vectors)
            }
            None => {
                let (m, mut rng) = (self.head_dim as usize, ChaCha8Rng::seed_from_u64(1));
                let dictionary =
                    Dictionary::normalised(drawn(&mut rng, self.atoms as usize * m), m)?;
                (dictionary, drawn(&mut rng, self.vectors as usize * m))
            }
        };
        let m = dictionary.head_dim();
        let coder = Coder::new(&dictionary, self.sparsity)?.with_fit(Fit::LeastSquares);
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
        let on_gpu = gpu::pursuit(
            self.common.device,
            &dictionary,
            self.sparsity,
            sample,
            &vectors,
        )?;
        let (ours, microseconds) = match on_gpu {
            None => {
                let ours = coder.encode(sample)?.mean_relative_error();
                (ours, self.time(count, || coder.encode(&vectors))?)
            }
            Some(gpu) => (gpu.relative_error, self.time(count, || (gpu.encode)())?),
        };
        let ours = f64::from(ours);
        let ratio = if exact > 0.0 { ours / exact } else { 1.0 };
        let threads = rayon::current_num_threads();
        if self.common.json {
            return print_json(&json!({
                "head_dim": m, "atoms": dictionary.len(), "sparsity": self.sparsity,
                "vectors": vectors.len() / m, "threads": threads, "device": self.common.device.to_string(),
                "microseconds_per_vector": microseconds, "relative_error": ours,
                "oracle_relative_error": exact, "relative_error_ratio": ratio,
                "dictionary_bytes": dictionary.bytes(),
            }));
        }
        println!(
            "{microseconds:.3} µs a vector on {} (m = {m}, N = {}, s = {}); mean relative error {ours:.4}, {ratio:.6} \
             of the oracle's; dictionary {:.1} MiB",
            self.common.place(),
            dictionary.len(),
            self.sparsity,
            mebibytes(dictionary.bytes())
        );
        Ok(())
    }

    fn run_additive(self) -> anyhow::Result<()> {
        let (dictionary, vectors) = match &self.file {
            Some(file) => {
                let (path, tensor) = self.named();
                let dictionary = Codebooks::load(path, tensor)?;
                let vectors = vectors(file, dictionary.head_dim())?;
                (dictionary, vectors)
            }
            None => {
                let (m, mut rng) = (self.head_dim as usize, ChaCha8Rng::seed_from_u64(1));
                let sizes = CodebookSizes {
                    first: MAX_FIRST_ATOMS,
                };
                let max = 1 + (MAX_ATOMS - MAX_FIRST_ATOMS) / CODEBOOK_ATOMS;
                anyhow::ensure!(
                    (1..=max).contains(&self.sparsity),
                    "--sparsity {}: additive codes have 1 to {max} atoms",
                    self.sparsity
                );
                let atoms = drawn(&mut rng, sizes.atoms(self.sparsity) * m);
                // Sums of them are as long as the vectors.
                let share = 1.0 / (self.sparsity as f32).sqrt();
                let atoms = atoms.into_iter().map(|x| x * share).collect();
                let dictionary = Codebooks::new(atoms, m, sizes)?.in_eight_bits()?;
                (dictionary, drawn(&mut rng, self.vectors as usize * m))
            }
        };
        let m = dictionary.head_dim();
        let coder = BeamSearch::new(&dictionary, self.sparsity)?
            .with_beam_width(self.beam)
            .with_fit(Fit::LeastSquares);
        let count = vectors.len() / m;
        let on_gpu = gpu::beam_search(self.common.device, &dictionary, self.sparsity, &vectors)?;
        let (error, microseconds) = match on_gpu {
            None => {
                let error = coder.encode(&vectors)?.mean_relative_error();
                (error, self.time(count, || coder.encode(&vectors))?)
            }
            Some(gpu) => {
                anyhow::ensure!(
                    self.beam == BEAM_WIDTH,
                    "on a GPU the beam width is {BEAM_WIDTH}; leave --beam out"
                );
                (gpu.relative_error, self.time(count, || (gpu.encode)())?)
            }
        };
        let error = f64::from(error);
        let threads = rayon::current_num_threads();
        let first = dictionary.sizes().first;
        if self.common.json {
            return print_json(&json!({
                "head_dim": m, "first_group": first, "sparsity": self.sparsity, "beam": self.beam,
                "vectors": vectors.len() / m, "threads": threads, "device": self.common.device.to_string(),
                "microseconds_per_vector": microseconds, "relative_error": error,
                "dictionary_bytes": dictionary.bytes(),
            }));
        }
        println!(
            "{microseconds:.3} µs a vector on {} (m = {m}, {} codebooks, the first of {first} atoms, beam {}); mean \
             relative error {error:.4}; dictionary {:.1} MiB",
            self.common.place(),
            self.sparsity,
            self.beam,
            mebibytes(dictionary.bytes())
        );
        Ok(())
    }

    /// Returns the median microseconds a vector of a run over `count` of them.
    fn time<T>(&self, count: usize, encode: impl Fn() -> lexico::Result<T>) -> anyhow::Result<f64> {
        Ok(microseconds(self.repetitions, encode)? / count as f64)
    }

    /// Returns the dictionary's file and tensor, which go with a file of vectors.
    fn named(&self) -> (&Path, &str) {
        let path = self.dictionary.as_deref().unwrap_or(Path::new(""));
        (path, self.tensor.as_deref().unwrap_or_default())
    }
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Reads the vectors of a file, for atoms of length `m`.
fn vectors(file: &Path, m: usize) -> anyhow::Result<Vec<f32>> {
    let (vectors, shape) = TensorFile::open(file)?.f32_tensor("vectors", 2)?;
    anyhow::ensure!(
        shape[1] == m && shape[0] > 0,
        "{}: vectors of shape {shape:?} for atoms of length {m}",
        file.display(),
    );
    Ok(vectors)
}
