use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use lexico::codes::CodeFile;
use lexico::dictionary::Codebooks;
use lexico::encode::BeamSearch;
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
    /// Most atoms of a vector
    #[arg(short, long, value_name = "S")]
    sparsity: usize,
    /// Relative error at which a vector needs no more atoms; lengths then vary. Not with packed codes
    #[arg(long, value_name = "D", default_value_t = 0.0)]
    tolerance: f32,
    /// How codes are stored: packed, one atom of each of the dictionary's groups in a byte; or any atoms in two bytes and
    /// a coefficient
    #[arg(long, value_enum, default_value_t = Format::I8)]
    format: Format,
    /// Sums that the search for packed codes follows
    #[arg(long, value_name = "N", default_value_t = lexico::encode::BEAM_WIDTH)]
    beam: usize,
    /// The code file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Additive,
    I8,
    F8,
    F32,
}

impl Encode {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        ui::check_out(&self.out, &[&self.file, &self.dictionary])?;
        let dictionary = AnyDictionary::load(
            &self.dictionary,
            &self.tensor,
            matches!(self.format, Format::Additive),
        )?;
        let atoms = dictionary.atoms();
        let input = TensorFile::open(&self.file)?;
        let (vectors, shape) = input.f32_tensor("vectors", 2)?;
        if shape[1] != atoms.head_dim() {
            anyhow::bail!(
                "{}: its vectors have length {}, the atoms of {} {}",
                self.file.display(),
                shape[1],
                self.tensor,
                atoms.head_dim()
            );
        }
        let mut codes = Codes::new(CodeFormat {
            sparsity: self.sparsity,
            variable: self.tolerance > 0.0,
            coefficients: match (self.format, &dictionary) {
                (_, AnyDictionary::Grouped(codebooks)) => {
                    CoefficientFormat::InAtoms(codebooks.groups())
                }
                (Format::F8, _) => CoefficientFormat::F8,
                (Format::F32, _) => CoefficientFormat::F32,
                _ => CoefficientFormat::I8,
            },
        })?;
        let started = Instant::now();
        codes.extend(&match &dictionary {
            AnyDictionary::Grouped(codebooks) => BeamSearch::new(codebooks, self.sparsity)?
                .with_beam(self.beam)
                .encode(&vectors)?,
            AnyDictionary::Free(free) => Pursuit::new(free, self.sparsity)?
                .with_tolerance(self.tolerance)?
                .encode(&vectors)?,
        });
        let seconds = started.elapsed().as_secs_f64();
        let error = lexico::mean_relative_error(&vectors, &codes.decode(atoms)?, shape[1]);
        let bytes = codes.bytes_used();
        CodeFile::new(codes, &self.tensor, atoms).save(&self.out)?;
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

/// What codes are over.
enum AnyDictionary {
    Free(Dictionary),
    Grouped(Codebooks),
}

impl AnyDictionary {
    fn load(path: &Path, tensor: &str, codebooks: bool) -> anyhow::Result<Self> {
        Ok(if codebooks {
            Self::Grouped(Codebooks::load(path, tensor)?)
        } else {
            Self::Free(Dictionary::load(path, tensor)?)
        })
    }

    fn atoms(&self) -> &Dictionary {
        match self {
            Self::Free(dictionary) => dictionary,
            Self::Grouped(codebooks) => codebooks.dictionary(),
        }
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
        let coefficients = codes.codes.format().coefficients;
        let packed = matches!(coefficients, CoefficientFormat::InAtoms(_));
        let dictionary = AnyDictionary::load(&self.dictionary, tensor, packed)?;
        let dictionary = dictionary.atoms();
        let started = Instant::now();
        let vectors = codes.decode(dictionary)?;
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
