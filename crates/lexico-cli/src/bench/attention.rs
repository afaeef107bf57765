use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, value_parser};
use lexico::attention::{DenseRows, Head, NumberType, Source, attend_heads};
use lexico::dictionary::{Atoms, CodebookSizes, Codebooks};
use lexico::threads::Rayon;
use lexico::{CodeFormat, Codes, CoefficientFormat, Dictionary, EncodedBatch};
use lexico_llm::DeviceName;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::{gpu, median};
use crate::{interrupt, ui};

/// Sparse codes are drawn so many at a time.
const DRAWN: usize = 1024;

#[derive(Args)]
pub(super) struct Attention {
    /// Length of a key or value
    #[arg(long, default_value_t = 128, value_name = "M", value_parser = value_parser!(u32).range(1..=4096))]
    head_dim: u32,
    /// Atoms of a dictionary
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = value_parser!(u32).range(1..=65536))]
    atoms: u32,
    /// Atoms of the first group of a codebooks dictionary
    #[arg(long, default_value_t = 2048, value_name = "N", value_parser = value_parser!(u32).range(1..=65536))]
    first_group: u32,
    /// Nonzeros of a code where --format does not say
    #[arg(short, long, default_value_t = 16, value_name = "S", value_parser = value_parser!(u32).range(1..=4096))]
    sparsity: u32,
    /// How codes are stored: i8, f8 or packed, each with its nonzeros behind a colon where they are not
    /// --sparsity; several, with commas between them, are measured in turn
    #[arg(
        short,
        long,
        default_value = "i8",
        value_name = "FORMAT[:S],...",
        value_delimiter = ','
    )]
    format: Vec<Format>,
    /// Query heads that share a KV head
    #[arg(long, default_value_t = 4, value_name = "G", value_parser = value_parser!(u32).range(1..=256))]
    group: u32,
    /// KV heads
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = value_parser!(u32).range(1..=256))]
    kv_heads: u32,
    /// Sequences that attend together, each with keys and values of its own
    #[arg(short, long, default_value_t = 1, value_name = "N", value_parser = value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Where to attend: cpu, cuda or cuda:N (builds with --features cuda), or auto. On a GPU codes alone are
    /// measured, of one layer
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: DeviceName,
    /// Positions; several, with commas between them, give a row each
    #[arg(
        short, long, visible_alias = "ctx-size", default_values_t = [32768], value_name = "N,...",
        value_delimiter = ',', value_parser = value_parser!(u32).range(1..=1 << 22)
    )]
    context: Vec<u32>,
    /// Layers, each with keys, values and dictionaries of its own, one after the other; figures are of one.
    /// A single layer of a short context stays in the processor's caches, as in no model
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = value_parser!(u32).range(1..=1024))]
    layers: u32,
    /// Runs of each; the median counts
    #[arg(short, long, default_value_t = 15, value_name = "N")]
    repetitions: usize,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

/// A format as it is asked for.
#[derive(Debug, Clone, Copy)]
struct Format {
    kind: FormatKind,
    sparsity: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
enum FormatKind {
    I8,
    F8,
    Additive,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, sparsity) = match text.split_once(':') {
            Some((name, sparsity)) => (name, Some(sparsity)),
            None => (text, None),
        };
        let kind = match name {
            "i8" => FormatKind::I8,
            "f8" => FormatKind::F8,
            "packed" => FormatKind::Additive,
            _ => return Err(format!("{name:?} is none of i8, f8 and packed")),
        };
        let sparsity = sparsity.map(|s| match s.parse() {
            Ok(s) if (1..=4096).contains(&s) => Ok(s),
            _ => Err(format!("{s:?} is no number of nonzeros from 1 to 4096")),
        });
        Ok(Self {
            kind,
            sparsity: sparsity.transpose()?,
        })
    }
}

/// A format with all that it needs.
#[derive(Clone, Copy)]
struct Stored {
    name: &'static str,
    format: CodeFormat,
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.format.sparsity)
    }
}

/// One context's figures.
struct Row {
    context: usize,
    /// `None` on a GPU.
    full: Option<Figures>,
    /// Of each format.
    coded: Vec<Figures>,
}

struct Figures {
    microseconds: f64,
    bytes: usize,
}

impl Figures {
    fn over(&self, other: &Figures) -> f64 {
        self.microseconds / other.microseconds
    }

    fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.microseconds * 1e6
    }
}

impl Attention {
    pub(super) fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(self.repetitions > 0, "--repetitions must be at least 1");
        let formats = self.format.iter().map(|&format| self.stored(format));
        let formats = formats.collect::<anyhow::Result<Vec<Stored>>>()?;
        interrupt::listen()?;
        let bar = ui::progress(self.context.len() as u64, "contexts");
        let mut rows = Vec::new();
        for &context in &self.context {
            bar.set_message(format!("{context} positions"));
            let row = match self.measure_on_gpu(context as usize, &formats)? {
                Some(row) => row,
                None => self.measure(context as usize, &formats)?,
            };
            rows.push(row);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let threads = rayon::current_num_threads();
        if self.json {
            let rows = rows.iter().map(|row| {
                let coded = formats.iter().zip(&row.coded);
                let coded = coded.map(|(format, coded)| {
                    json!({
                        "format": format.name, "sparsity": format.format.sparsity,
                        "microseconds": coded.microseconds, "bytes": coded.bytes,
                        "over_full": row.full.as_ref().map(|full| coded.over(full)),
                        "over_first": coded.over(&row.coded[0]),
                    })
                });
                json!({
                    "context": row.context,
                    "full_microseconds": row.full.as_ref().map(|full| full.microseconds),
                    "full_bytes_per_second": row.full.as_ref().map(Figures::bytes_per_second),
                    "full_bytes": row.full.as_ref().map(|full| full.bytes),
                    "formats": coded.collect::<Vec<_>>(),
                })
            });
            return ui::json(&json!({
                "head_dim": self.head_dim, "atoms": self.atoms, "first_group": self.first_group,
                "group": self.group, "kv_heads": self.kv_heads, "layers": self.layers,
                "batch": self.batch, "device": self.device.to_string(),
                "threads": threads, "rows": rows.collect::<Vec<_>>(),
            }));
        }
        let mut lines = Vec::new();
        for row in &rows {
            if let Some(full) = &row.full {
                lines.push([
                    "full".to_owned(),
                    row.context.to_string(),
                    format!("{:.0} µs", full.microseconds),
                    format!("{:.1} GB/s", full.bytes_per_second() * 1e-9),
                    String::new(),
                    String::new(),
                ]);
            }
            for (format, coded) in formats.iter().zip(&row.coded) {
                lines.push([
                    format.to_string(),
                    row.context.to_string(),
                    format!("{:.0} µs", coded.microseconds),
                    format!("{:.1} GB/s", coded.bytes_per_second() * 1e-9),
                    row.full
                        .as_ref()
                        .map_or_else(String::new, |full| format!("{:.3}", coded.over(full))),
                    format!("{:.2}", coded.over(&row.coded[0])),
                ]);
            }
        }
        let over_first = format!("over {}", formats[0]);
        let header = [
            "keys and values",
            "context",
            "time",
            "reading",
            "over full",
            &over_first,
        ];
        ui::line(&ui::table(header, lines))?;
        ui::line(&match self.device {
            DeviceName::Cpu => format!("{threads} threads"),
            device => device.to_string(),
        })
    }

    /// Checks that there can be such codes.
    fn stored(&self, format: Format) -> anyhow::Result<Stored> {
        let sparsity = format.sparsity.unwrap_or(self.sparsity);
        let (name, coefficients) = match format.kind {
            FormatKind::I8 => ("i8", CoefficientFormat::I8),
            FormatKind::F8 => ("f8", CoefficientFormat::F8),
            FormatKind::Additive => ("packed", CoefficientFormat::InAtoms(self.groups())),
        };
        if !matches!(format.kind, FormatKind::Additive) {
            anyhow::ensure!(
                sparsity <= self.head_dim.min(self.atoms),
                "{name} of {sparsity} nonzeros is impossible: at most the head dim of {} and the {} atoms",
                self.head_dim,
                self.atoms
            );
        }
        let format = CodeFormat {
            sparsity: sparsity as usize,
            variable: false,
            coefficients,
        };
        Codes::new(format)?;
        Ok(Stored { name, format })
    }

    fn groups(&self) -> CodebookSizes {
        CodebookSizes {
            first: self.first_group as usize,
        }
    }

    /// A decoding step's attention, on f16 and on codes of each format, in turn.
    fn measure(&self, context: usize, formats: &[Stored]) -> anyhow::Result<Row> {
        let layers =
            (0..self.layers).map(|number| Layer::draw(self, context, formats, number.into()));
        let mut layers = layers.collect::<anyhow::Result<Vec<Layer>>>()?;
        let kinds = std::iter::once(Kind::Full).chain((0..formats.len()).map(Kind::Coded));
        let mut times: Vec<(Kind, Vec<f64>)> = kinds.map(|kind| (kind, Vec::new())).collect();
        let each = 1e6 / layers.len() as f64;
        // In turn, so that whatever else the machine does falls on all.
        for _ in 0..self.repetitions {
            for (kind, times) in &mut times {
                let started = Instant::now();
                for layer in &mut layers {
                    layer.attend(*kind);
                }
                times.push(started.elapsed().as_secs_f64() * each);
            }
            anyhow::ensure!(!interrupt::happened(), "interrupted");
        }
        let mut figures = times.iter_mut().map(|(kind, times)| Figures {
            microseconds: median(times),
            bytes: layers[0].bytes(*kind),
        });
        let full = figures.next().context("full is measured first")?;
        Ok(Row {
            context,
            full: Some(full),
            coded: figures.collect(),
        })
    }

    /// As [`Self::measure`], of codes on a GPU, one format after the other; `None` where the device is the processor.
    fn measure_on_gpu(&self, context: usize, formats: &[Stored]) -> anyhow::Result<Option<Row>> {
        if self.device == DeviceName::Cpu {
            return Ok(None);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let dictionaries = Dictionaries::draw(self, formats, &mut rng)?;
        let mut coded = Vec::new();
        for Stored { format, .. } in formats {
            let pairs = (self.kv_heads * self.batch) as usize;
            // What they hold does not matter; the same few are repeated.
            let some = self.batches(context.min(DRAWN), *format, &mut rng);
            let draw = || -> anyhow::Result<Vec<EncodedBatch>> {
                let whole = context / DRAWN;
                let rest = self.batches(context % DRAWN, *format, &mut rng);
                let whole = std::iter::repeat_n(&some, whole).flatten().cloned();
                Ok(whole.chain(rest).collect())
            };
            let atoms = dictionaries.atoms(*format);
            let group = self.group as usize;
            let on_gpu = gpu::attention(self.device, *format, atoms, group, pairs, draw)?;
            let Some((bytes, attend)) = on_gpu else {
                return Ok(None);
            };
            // Kernels are compiled by then.
            attend()?;
            let mut times = Vec::new();
            for _ in 0..self.repetitions {
                let started = Instant::now();
                attend()?;
                times.push(started.elapsed().as_secs_f64() * 1e6);
                anyhow::ensure!(!interrupt::happened(), "interrupted");
            }
            coded.push(Figures {
                microseconds: median(&mut times),
                bytes,
            });
        }
        Ok(Some(Row {
            context,
            full: None,
            coded,
        }))
    }

    /// Codes of drawn atoms and coefficients: what attention takes does not depend on their making.
    fn batches(
        &self,
        context: usize,
        format: CodeFormat,
        rng: &mut ChaCha8Rng,
    ) -> Vec<EncodedBatch> {
        let sparsity = format.sparsity;
        let mut batches = Vec::new();
        for first in (0..context).step_by(DRAWN) {
            let count = DRAWN.min(context - first);
            let nonzeros = count * sparsity;
            let index = |nonzero: usize| {
                let atoms = match format.coefficients {
                    CoefficientFormat::InAtoms(groups) => {
                        let group = nonzero % sparsity;
                        groups.start(group)..groups.start(group + 1)
                    }
                    _ => 0..self.atoms as usize,
                };
                rng.random_range(atoms) as u16
            };
            let indices: Vec<u16> = (0..nonzeros).map(index).collect();
            let coefficients = (0..nonzeros).map(|_| rng.random_range(-1f32..1.0));
            batches.push(EncodedBatch {
                sparsity,
                lengths: vec![sparsity as u16; count],
                coefficients: coefficients.collect(),
                indices,
                relative_errors: vec![0.0; count],
            });
        }
        batches
    }

    fn codes(
        &self,
        context: usize,
        format: CodeFormat,
        rng: &mut ChaCha8Rng,
    ) -> anyhow::Result<Codes> {
        let mut codes = Codes::new(format)?;
        for batch in self.batches(context, format, rng) {
            codes.extend(&batch);
        }
        Ok(codes)
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Full,
    /// The format with this number.
    Coded(usize),
}

/// Drawn keys and values of a layer, dense and coded.
struct Layer {
    head_dim: usize,
    group: usize,
    dictionaries: Dictionaries,
    queries: Vec<f32>,
    own_keys: Vec<f32>,
    own_values: Vec<f32>,
    dense: Vec<(DenseRows, DenseRows)>,
    /// Of each format, of each KV head.
    coded: Vec<Vec<(Codes, Codes)>>,
    out: Vec<f32>,
}

/// Those of keys and of values.
struct Dictionaries {
    universal: [Dictionary; 2],
    /// As many groups as the largest packed codes need.
    codebooks: [Codebooks; 2],
}

impl Dictionaries {
    fn draw(shape: &Attention, formats: &[Stored], rng: &mut ChaCha8Rng) -> anyhow::Result<Self> {
        let (m, atoms) = (shape.head_dim as usize, shape.atoms as usize);
        let mut draw = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-1f32..1.0)).collect()
        };
        let mut universal = || -> anyhow::Result<Dictionary> {
            Ok(Dictionary::normalised(draw(atoms * m), m)?.in_half_precision()?)
        };
        let universal = [universal()?, universal()?];
        let packed = formats.iter().map(|format| format.format);
        let packed = packed.filter(|f| matches!(f.coefficients, CoefficientFormat::InAtoms(_)));
        let groups = packed.map(|format| format.sparsity).max().unwrap_or(1);
        let mut codebooks = || -> anyhow::Result<Codebooks> {
            let atoms = draw(shape.groups().atoms(groups) * m);
            Ok(Codebooks::new(atoms, m, shape.groups())?.in_half_precision()?)
        };
        let codebooks = [codebooks()?, codebooks()?];
        Ok(Self {
            universal,
            codebooks,
        })
    }

    /// What keys and values in a format are coded over.
    fn atoms(&self, format: CodeFormat) -> [Atoms<'_>; 2] {
        match format.coefficients {
            CoefficientFormat::InAtoms(_) => {
                self.codebooks.each_ref().map(|d| d.atoms(format.sparsity))
            }
            _ => self.universal.each_ref().map(Into::into),
        }
    }
}

impl Layer {
    fn draw(
        shape: &Attention,
        context: usize,
        formats: &[Stored],
        seed: u64,
    ) -> anyhow::Result<Self> {
        let m = shape.head_dim as usize;
        let group = shape.group as usize;
        let kv_heads = (shape.kv_heads * shape.batch) as usize;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let dictionaries = Dictionaries::draw(shape, formats, &mut rng)?;
        let mut draw = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-1f32..1.0)).collect()
        };
        let queries = draw(kv_heads * group * m);
        let (own_keys, own_values) = (draw(kv_heads * m), draw(kv_heads * m));
        // What dense vectors hold does not matter; the same few are repeated.
        let some = draw(DRAWN * m);
        let rows = || {
            let mut rows = DenseRows::new(m, NumberType::F16);
            for first in (0..context).step_by(DRAWN) {
                rows.extend(&some[..DRAWN.min(context - first) * m]);
            }
            rows
        };
        let dense = (0..kv_heads).map(|_| (rows(), rows())).collect();
        let mut coded = Vec::new();
        for Stored { format, .. } in formats {
            let mut heads = Vec::new();
            for _ in 0..kv_heads {
                let keys = shape.codes(context, *format, &mut rng)?;
                heads.push((keys, shape.codes(context, *format, &mut rng)?));
            }
            coded.push(heads);
        }
        Ok(Self {
            head_dim: m,
            group,
            dictionaries,
            out: vec![0.0; queries.len()],
            queries,
            own_keys,
            own_values,
            dense,
            coded,
        })
    }

    fn bytes(&self, kind: Kind) -> usize {
        match kind {
            Kind::Full => {
                let heads = self.dense.iter();
                heads.map(|(k, v)| k.bytes() + v.bytes()).sum()
            }
            Kind::Coded(format) => {
                let heads = self.coded[format].iter();
                heads.map(|(k, v)| k.bytes() + v.bytes()).sum()
            }
        }
    }

    fn attend(&mut self, kind: Kind) {
        let m = self.head_dim;
        let past = |head: usize| match kind {
            Kind::Full => Source::Dense {
                keys: &self.dense[head].0,
                values: &self.dense[head].1,
            },
            Kind::Coded(format) => {
                let (keys, values) = &self.coded[format][head];
                let [key_atoms, value_atoms] = self.dictionaries.atoms(keys.format());
                Source::Codes {
                    keys,
                    values,
                    key_atoms,
                    value_atoms,
                }
            }
        };
        let own = self.own_keys.chunks(m).zip(self.own_values.chunks(m));
        let sources: Vec<[Source<'_>; 2]> = own
            .enumerate()
            .map(|(head, (keys, values))| [past(head), Source::Causal { keys, values }])
            .collect();
        let parts = self.queries.chunks(self.group * m);
        let parts = parts.zip(self.out.chunks_mut(self.group * m));
        let mut heads: Vec<Head<'_>> = parts
            .zip(&sources)
            .map(|((queries, out), sources)| Head {
                queries,
                sources,
                out,
            })
            .collect();
        attend_heads(&mut heads, m, 1, None, &Rayon);
    }
}
