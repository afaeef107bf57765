use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, ValueEnum};
use lexico::cache::Coder;
use lexico::codes::CodeFile;
use lexico::dictionary::{Atoms, CodeFamily, Codebooks, HeadMaps};
use lexico::encode::{BEAM_WIDTH, Fit, MAX_BEAM_WIDTH};
use lexico::tensor_file::{self, NewTensor, TensorFile};
use lexico::{Codes, CoefficientFormat, Dictionary};
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
    /// The KV head that the vectors are of, from 0: needed for additive codes where the tensor has maps of heads
    #[arg(long, value_name = "H")]
    head: Option<usize>,
    /// Max number of atoms of a vector
    #[arg(short, long, value_name = "S")]
    sparsity: usize,
    /// Relative error at which a vector needs no more atoms; lengths then vary. Not with additive codes
    #[arg(long, value_name = "D")]
    tolerance: Option<f32>,
    /// Codes to make: additive, a byte for one atom of each codebook; or any atoms, each in two bytes and a coefficient
    /// of this format [default: additive where the tensor has codebooks, else i8, as in `lexico run`]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Coefficients that keep scores nearest, or vectors
    #[arg(long, value_enum, default_value_t = FitChoice::Unbiased)]
    fit: FitChoice,
    /// Width of the beam search for additive codes [default: 8]
    #[arg(long, value_name = "N", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=MAX_BEAM_WIDTH as u64))]
    beam: Option<usize>,
    /// The code file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    #[value(alias = "packed")]
    Additive,
    I8,
    F8,
    F32,
}

#[derive(Clone, Copy, ValueEnum)]
enum FitChoice {
    Unbiased,
    LeastSquares,
}

impl Encode {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        ui::check_out(&self.out, &[&self.file, &self.dictionary])?;
        let coder = self.coder()?;
        let fit = match self.fit {
            FitChoice::Unbiased => Fit::Unbiased,
            FitChoice::LeastSquares => Fit::LeastSquares,
        };
        let encoder = coder.encoder(self.sparsity, fit)?;
        let atoms = all_atoms(&coder);
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
        let mut codes = Codes::new(coder.format(self.sparsity))?;
        let map = self.map(&coder)?;
        let started = Instant::now();
        let mapped = map.map(|(maps, head)| maps.to_coded(head, 0.., &vectors));
        codes.extend(&encoder.encode(mapped.as_deref().unwrap_or(&vectors))?);
        let seconds = started.elapsed().as_secs_f64();
        let bytes = codes.bytes_used();
        let mut file = CodeFile::new(codes, &self.tensor, atoms);
        if let Some((maps, head)) = map {
            file = file.behind(maps, head);
        }
        let decoded = file.decode_behind(atoms, coder.maps())?;
        let error = lexico::mean_relative_error(&vectors, &decoded, shape[1]);
        file.save(&self.out)?;
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

    /// The maps behind which the coder finds codes, and the head that the vectors are of.
    fn map<'c>(&self, coder: &'c Coder) -> anyhow::Result<Option<(&'c HeadMaps, usize)>> {
        let tensor = &self.tensor;
        match (coder.maps(), self.head) {
            (None, None) => Ok(None),
            (None, Some(_)) => match coder {
                Coder::Additive { .. } => anyhow::bail!(
                    "--head: {tensor} has no maps of heads; one code serves all of them, leave it out"
                ),
                Coder::Sparse { .. } => anyhow::bail!(
                    "--head: sparse codes are the same for all heads; leave it out, or give --format additive"
                ),
            },
            (Some(maps), head) => {
                let joint = maps.check_alone();
                joint.with_context(|| format!("{}: {tensor}", self.dictionary.display()))?;
                let heads = maps.heads();
                let head = head.ok_or_else(|| {
                    anyhow::anyhow!(
                        "--head: {tensor} has maps of {heads} KV heads; say which one the vectors are of, from 0 to {}",
                        heads - 1
                    )
                })?;
                anyhow::ensure!(
                    head < heads,
                    "--head {head}: {tensor} has maps of {heads} KV heads, 0 to {}",
                    heads - 1
                );
                Ok(Some((maps, head)))
            }
        }
    }

    /// The coder that the options ask for.
    fn coder(&self) -> anyhow::Result<Coder> {
        let file = TensorFile::open(&self.dictionary)?;
        let has_codebooks = Codebooks::are_in(&file, &self.tensor);
        let format = self.format.unwrap_or(match has_codebooks {
            true => Format::Additive,
            false => Format::I8,
        });
        let coefficients = match format {
            Format::Additive => {
                anyhow::ensure!(
                    self.tolerance.is_none(),
                    "--tolerance: additive codes all have as many atoms; give --format i8 too"
                );
                let codebooks = Codebooks::load(&self.dictionary, &self.tensor)?;
                let maps = HeadMaps::load(&self.dictionary, &self.tensor)?;
                if let Some(maps) = maps
                    .as_ref()
                    .filter(|m| m.head_dim() != codebooks.head_dim())
                {
                    anyhow::bail!(
                        "{}: the maps of {} are of head dim {}, its atoms of {}",
                        self.dictionary.display(),
                        self.tensor,
                        maps.head_dim(),
                        codebooks.head_dim()
                    );
                }
                return Ok(Coder::Additive {
                    codebooks: Arc::new(codebooks),
                    maps: maps.map(Arc::new),
                    beam_width: self.beam.unwrap_or(BEAM_WIDTH),
                });
            }
            Format::I8 => CoefficientFormat::I8,
            Format::F8 => CoefficientFormat::F8,
            Format::F32 => CoefficientFormat::F32,
        };
        anyhow::ensure!(
            self.beam.is_none(),
            "--beam: only the search for additive codes has a beam; give --format additive too, or leave it out"
        );
        Ok(Coder::Sparse {
            dictionary: Arc::new(Dictionary::load(&self.dictionary, &self.tensor)?),
            coefficients,
            tolerance: self.tolerance.unwrap_or(0.0),
        })
    }
}

/// The whole dictionary, or all codebooks: what a code file names.
fn all_atoms(coder: &Coder) -> Atoms<'_> {
    match coder {
        Coder::Additive { codebooks, .. } => codebooks.as_ref().into(),
        Coder::Sparse { dictionary, .. } => dictionary.as_ref().into(),
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
        let started = Instant::now();
        let vectors = match codes.codes.format().family() {
            CodeFamily::Additive => {
                let maps = HeadMaps::load(&self.dictionary, tensor)?;
                let codebooks = Codebooks::load(&self.dictionary, tensor)?;
                codes.decode_behind(&codebooks, maps.as_ref())?
            }
            CodeFamily::Sparse => codes.decode(&Dictionary::load(&self.dictionary, tensor)?)?,
        };
        let seconds = started.elapsed().as_secs_f64();
        let shape = [codes.codes.len(), codes.head_dim];
        let tensors = [NewTensor::f32("vectors", &shape, &vectors)];
        tensor_file::write(&self.out, &tensors, HashMap::new())?;
        if self.json {
            return ui::json(&json!({
                "vectors": shape[0],
                "head_dim": shape[1],
                "head": codes.head,
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
