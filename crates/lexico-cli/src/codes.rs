use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use lexico::code::CodeFile;
use lexico::tensor_file::{self, NewTensor, TensorFile};
use lexico::{CodeFormat, Codes, CoefficientFormat, Dictionary, Pursuit};
use serde_json::json;

use crate::ui;

#[derive(Args)]
pub(crate) struct Encode {
    /// A safetensors file whose tensor `vectors` [n, m] is to be coded
    file: PathBuf,
    /// The dictionary file
    #[arg(short, long, value_name = "FILE")]
    dictionary: PathBuf,
    /// The dictionary's tensor, as layers.0.keys
    #[arg(long, value_name = "NAME")]
    tensor: String,
    /// Most nonzeros of a vector
    #[arg(short, long, value_name = "S")]
    sparsity: usize,
    /// Relative error at which a vector needs no more nonzeros; lengths then vary
    #[arg(long, value_name = "D", default_value_t = 0.0)]
    tolerance: f32,
    /// How coefficients are stored
    #[arg(long, value_enum, default_value_t = Coefficients::I8)]
    coefficients: Coefficients,
    /// The code file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Coefficients {
    I8,
    F8,
    F32,
}

impl Encode {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        ui::check_out(&self.out, &[&self.file, &self.dictionary])?;
        let dictionary = Dictionary::load(&self.dictionary, &self.tensor)?;
        let input = TensorFile::open(&self.file)?;
        let (vectors, shape) = input.f32_tensor("vectors", 2)?;
        if shape[1] != dictionary.head_dim() {
            anyhow::bail!(
                "{}: its vectors have length {}, the atoms of {} {}",
                self.file.display(),
                shape[1],
                self.tensor,
                dictionary.head_dim()
            );
        }
        let mut codes = Codes::new(CodeFormat {
            sparsity: self.sparsity,
            variable: self.tolerance > 0.0,
            coefficients: match self.coefficients {
                Coefficients::I8 => CoefficientFormat::I8,
                Coefficients::F8 => CoefficientFormat::F8,
                Coefficients::F32 => CoefficientFormat::F32,
            },
        })?;
        let pursuit = Pursuit::new(&dictionary, self.sparsity)?.with_tolerance(self.tolerance)?;
        let started = Instant::now();
        codes.extend(&pursuit.encode(&vectors)?);
        let seconds = started.elapsed().as_secs_f64();
        let error = lexico::mean_relative_error(&vectors, &codes.decode(&dictionary)?, shape[1]);
        let bytes = codes.bytes_used();
        CodeFile::new(codes, &self.tensor, &dictionary).save(&self.out)?;
        if self.json {
            return ui::json(&json!({
                "vectors": shape[0],
                "sparsity": self.sparsity,
                "bytes": bytes,
                "mean_relative_error": error,
                "seconds": seconds,
            }));
        }
        let dense = 2 * vectors.len();
        ui::line(&format!(
            "{}: {} vectors, {} in memory ({} of FP16), mean relative error {error:.4}, {seconds:.2} s",
            self.out.display(),
            shape[0],
            ui::bytes(bytes),
            ui::percent(bytes as f64 / dense.max(1) as f64)
        ))
    }
}

#[derive(Args)]
pub(crate) struct Decode {
    /// The code file
    file: PathBuf,
    /// The dictionary file
    #[arg(short, long, value_name = "FILE")]
    dictionary: PathBuf,
    /// The dictionary's tensor [default: the one that the codes name]
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// The safetensors file to write: `vectors` [n, m] in f32
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Decode {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        ui::check_out(&self.out, &[&self.file, &self.dictionary])?;
        let codes = CodeFile::load(&self.file)?;
        let tensor = &codes.tensor;
        if let Some(given) = self.tensor.filter(|given| given != tensor) {
            anyhow::bail!("the codes need the dictionary's tensor {tensor}, not {given}");
        }
        let dictionary = Dictionary::load(&self.dictionary, tensor)?;
        let started = Instant::now();
        let vectors = codes.decode(&dictionary)?;
        let seconds = started.elapsed().as_secs_f64();
        let shape = [codes.codes.len(), dictionary.head_dim()];
        let tensors = [NewTensor::f32("vectors", &shape, &vectors)];
        tensor_file::write(&self.out, &tensors, HashMap::new())?;
        if self.json {
            return ui::json(&json!({
                "vectors": shape[0],
                "head_dim": shape[1],
                "seconds": seconds,
            }));
        }
        let out = self.out.display();
        ui::line(&format!(
            "{out}: {} vectors of length {}",
            shape[0], shape[1]
        ))
    }
}
