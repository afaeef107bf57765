//! Time of a layer's attention in a decoding step, on codes and on f16.
//!
//! ```sh
//! cargo bench -p lexico --bench attention -- --format additive:13,f8:8 --context 4096,32768
//! ```

mod speed;

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, value_parser};
use lexico::attention::{DenseRows, Head, NumberType, Source, attend_heads};
use lexico::dictionary::{Atoms, CodeFamily, CodebookSizes, Codebooks, JointBasis};
use lexico::threads::Rayon;
use lexico::{
    AdditiveFormat, CodeFormat, Codes, CoefficientFormat, Dictionary, EncodedBatch, KeyValue,
    SparseFormat,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use speed::{Common, Device, drawn, gpu, median, microseconds, print_json};

/// Sparse codes are drawn so many at a time.
const DRAWN: usize = 1024;

/// Measures the microseconds that a layer's attention takes in a decoding step, on codes and on f16
///
/// On a GPU only codes are measured, of one layer.
#[derive(Parser)]
#[command(name = "attention")]
struct Attention {
    /// Length of a key or value
    #[arg(long, default_value_t = 128, value_name = "M", value_parser = value_parser!(u32).range(1..=4096))]
    head_dim: u32,
    /// Atoms of a dictionary
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = value_parser!(u32).range(1..=65536))]
    atoms: u32,
    /// Atoms of the first codebook
    #[arg(long, alias = "first-group", default_value_t = 2048, value_name = "N", value_parser = value_parser!(u32).range(1..=65536))]
    first_codebook: u32,
    /// Nonzeros of a code where --format does not say
    #[arg(short, long, default_value_t = 16, value_name = "S", value_parser = value_parser!(u32).range(1..=4096))]
    sparsity: u32,
    /// Format of the codes: i8, f8 or additive, each with its nonzeros behind a colon where they are not
    /// --sparsity; additive:12x2 codes 2 heads together; several, with commas between them, are measured in turn
    #[arg(
        short,
        long,
        default_value = "i8",
        value_name = "FORMAT[:S[xH]],...",
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
    #[command(flatten)]
    common: Common,
}

fn main() -> anyhow::Result<()> {
    Attention::parse().run()
}

/// Format as it is asked for.
#[derive(Debug, Clone, Copy)]
struct Format {
    name: &'static str,
    /// Number type of sparse codes' coefficients; `None` for additive codes.
    coefficients: Option<CoefficientFormat>,
    sparsity: Option<u32>,
    /// Heads that are coded together.
    together: usize,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, sparsity) = match text.split_once(':') {
            Some((name, sparsity)) => (name, Some(sparsity)),
            None => (text, None),
        };
        let (name, coefficients) = match name {
            "i8" => ("i8", Some(CoefficientFormat::I8)),
            "f8" => ("f8", Some(CoefficientFormat::F8)),
            "additive" | "packed" => ("additive", None),
            _ => return Err(format!("{name:?} is none of i8, f8 and additive")),
        };
        let (sparsity, together) = match sparsity.and_then(|s| s.split_once('x')) {
            Some((sparsity, together)) => (Some(sparsity), together),
            None => (sparsity, "1"),
        };
        let together = match together.parse() {
            Ok(together @ 1..=256) if coefficients.is_none() || together == 1 => together,
            _ => {
                return Err(format!(
                    "{together:?} is no number of heads that additive codes tell together"
                ));
            }
        };
        let sparsity = sparsity.map(|s| match s.parse() {
            Ok(s) if (1..=4096).contains(&s) => Ok(s),
            _ => Err(format!("{s:?} is no number of nonzeros from 1 to 4096")),
        });
        Ok(Self {
            name,
            coefficients,
            sparsity: sparsity.transpose()?,
            together,
        })
    }
}

/// Format with all its settings.
#[derive(Clone, Copy)]
struct Stored {
    name: &'static str,
    format: CodeFormat,
    together: usize,
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}:{}", self.name, self.format.sparsity());
        f.pad(&match self.together {
            1 => text,
            together => format!("{text}x{together}"),
        })
    }
}

/// Figures of one context.
struct Row {
    context: usize,
    /// Figures of dense f16; `None` on a GPU.
    full: Option<Figures>,
    /// Figures of each format.
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
    fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(self.repetitions > 0, "--repetitions must be at least 1");
        let formats = self.format.iter().map(|&format| self.stored(format));
        let formats = formats.collect::<anyhow::Result<Vec<Stored>>>()?;
        self.common.set_threads()?;
        let mut rows = Vec::new();
        for &context in &self.context {
            let row = match self.measure_on_gpu(context as usize, &formats)? {
                Some(row) => row,
                None => self.measure(context as usize, &formats)?,
            };
            rows.push(row);
        }
        let threads = rayon::current_num_threads();
        if self.common.json {
            let rows = rows.iter().map(|row| {
                let coded = formats.iter().zip(&row.coded);
                let coded = coded.map(|(format, coded)| {
                    json!({
                        "format": format.name, "sparsity": format.format.sparsity(), "joint_heads": format.together,
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
            return print_json(&json!({
                "head_dim": self.head_dim, "atoms": self.atoms, "first_group": self.first_codebook,
                "group": self.group, "kv_heads": self.kv_heads, "layers": self.layers,
                "batch": self.batch, "device": self.common.device.to_string(),
                "threads": threads, "rows": rows.collect::<Vec<_>>(),
            }));
        }
        println!(
            "{:12} {:>8} {:>10} {:>10} {:>10} {:>10}",
            "format", "context", "µs", "GB/s", "over full", "over first"
        );
        for row in &rows {
            let line = |name: String, figures: &Figures| {
                let over = |other: Option<&Figures>| {
                    other.map_or("-".to_owned(), |other| {
                        format!("{:.3}", figures.over(other))
                    })
                };
                println!(
                    "{name:12} {:>8} {:>10.0} {:>10.1} {:>10} {:>10}",
                    row.context,
                    figures.microseconds,
                    figures.bytes_per_second() * 1e-9,
                    over(row.full.as_ref()),
                    over(row.coded.first()),
                );
            };
            if let Some(full) = &row.full {
                line("full".to_owned(), full);
            }
            for (format, coded) in formats.iter().zip(&row.coded) {
                line(format.to_string(), coded);
            }
        }
        println!("on {}", self.common.place());
        Ok(())
    }

    /// Checks that there can be such codes.
    fn stored(&self, format: Format) -> anyhow::Result<Stored> {
        let sparsity = format.sparsity.unwrap_or(self.sparsity);
        let Format {
            name,
            coefficients,
            together,
            ..
        } = format;
        anyhow::ensure!(
            (self.kv_heads as usize).is_multiple_of(together),
            "{together} heads together: --kv-heads must be a multiple of it, not {}",
            self.kv_heads
        );
        if coefficients.is_some() {
            anyhow::ensure!(
                sparsity <= self.head_dim.min(self.atoms),
                "{name} of {sparsity} nonzeros is impossible: at most the head dim of {} and the {} atoms",
                self.head_dim,
                self.atoms
            );
        }
        let sparsity = sparsity as usize;
        let sizes = self.sizes();
        let format = match coefficients {
            Some(coefficients) => CodeFormat::from(SparseFormat {
                sparsity,
                variable: false,
                coefficients,
            }),
            None => AdditiveFormat { sparsity, sizes }.into(),
        };
        Codes::new(format)?;
        Ok(Stored {
            name,
            format,
            together,
        })
    }

    fn sizes(&self) -> CodebookSizes {
        CodebookSizes {
            first: self.first_codebook as usize,
        }
    }

    /// Measures a decoding step's attention, on f16 and on codes of each format, in turn.
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

    /// Measures attention on codes on a GPU, one format after the other; `None` where the device is the processor.
    fn measure_on_gpu(&self, context: usize, formats: &[Stored]) -> anyhow::Result<Option<Row>> {
        if self.common.device == Device::Cpu {
            return Ok(None);
        }
        anyhow::ensure!(
            formats.iter().all(|format| format.together == 1),
            "heads are coded together on processors alone"
        );
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
            let on_gpu = gpu::attention(self.common.device, *format, atoms, group, pairs, draw)?;
            let Some((bytes, attend)) = on_gpu else {
                return Ok(None);
            };
            // Kernels are compiled by then.
            attend()?;
            coded.push(Figures {
                microseconds: microseconds(self.repetitions, attend)?,
                bytes,
            });
        }
        Ok(Some(Row {
            context,
            full: None,
            coded,
        }))
    }

    /// Draws atoms and coefficients: the time of attention does not depend on how they were found.
    fn batches(
        &self,
        context: usize,
        format: CodeFormat,
        rng: &mut ChaCha8Rng,
    ) -> Vec<EncodedBatch> {
        let sparsity = format.sparsity();
        let mut batches = Vec::new();
        for first in (0..context).step_by(DRAWN) {
            let count = DRAWN.min(context - first);
            let nonzeros = count * sparsity;
            let index = |nonzero: usize| {
                let atoms = match format {
                    CodeFormat::Additive(AdditiveFormat { sizes, .. }) => {
                        let codebook = nonzero % sparsity;
                        sizes.start(codebook)..sizes.start(codebook + 1)
                    }
                    CodeFormat::Sparse(_) => 0..self.atoms as usize,
                };
                rng.random_range(atoms) as u16
            };
            let indices: Vec<u16> = (0..nonzeros).map(index).collect();
            batches.push(EncodedBatch {
                sparsity,
                lengths: vec![sparsity as u16; count],
                indices,
                coefficients: drawn(rng, nonzeros),
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
    /// Format with this number.
    Coded(usize),
}

/// Layer of drawn keys and values, dense and coded.
struct Layer {
    head_dim: usize,
    group: usize,
    dictionaries: Dictionaries,
    queries: Vec<f32>,
    own_keys: Vec<f32>,
    own_values: Vec<f32>,
    dense: Vec<(DenseRows, DenseRows)>,
    /// Keys and values in each format, of each KV head.
    coded: Vec<Vec<(Codes, Codes)>>,
    /// The basis of heads that are coded together, for each format that does.
    bases: Vec<Option<JointBasis>>,
    out: Vec<f32>,
}

/// Dictionaries of keys and of values.
struct Dictionaries {
    universal: [Dictionary; 2],
    /// Codebooks, as many as the longest additive codes need.
    codebooks: [Codebooks; 2],
}

impl Dictionaries {
    fn draw(shape: &Attention, formats: &[Stored], rng: &mut ChaCha8Rng) -> anyhow::Result<Self> {
        let (m, atoms) = (shape.head_dim as usize, shape.atoms as usize);
        let mut draw = |count: usize| drawn(rng, count);
        let mut universal = || -> anyhow::Result<Dictionary> {
            Ok(Dictionary::normalised(draw(atoms * m), m)?.in_half_precision()?)
        };
        let universal = [universal()?, universal()?];
        let additive = formats.iter().map(|format| format.format);
        let additive = additive.filter(|format| format.family() == CodeFamily::Additive);
        let count = additive.map(CodeFormat::sparsity).max().unwrap_or(1);
        let mut codebooks = || -> anyhow::Result<Codebooks> {
            let atoms = draw(shape.sizes().atoms(count) * m);
            Ok(Codebooks::new(atoms, m, shape.sizes())?.in_eight_bits()?)
        };
        let codebooks = [codebooks()?, codebooks()?];
        Ok(Self {
            universal,
            codebooks,
        })
    }

    /// Returns the atoms of keys and of values in a format.
    fn atoms(&self, format: CodeFormat) -> [Atoms<'_>; 2] {
        match format {
            CodeFormat::Additive(format) => {
                self.codebooks.each_ref().map(|d| d.first(format.sparsity))
            }
            CodeFormat::Sparse(_) => self.universal.each_ref().map(Into::into),
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
        let mut draw = |count: usize| drawn(&mut rng, count);
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
        let bases = formats.iter().map(|format| {
            // Its numbers do not matter, and are taken as they come.
            let n = format.together * m;
            let mut basis = vec![0.0; n * n];
            basis.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
            let bases = basis.repeat(kv_heads / format.together);
            let joint = (format.together > 1).then_some(format.together);
            joint
                .map(|h| JointBasis::new(&bases, kv_heads, h, m))
                .transpose()
        });
        let bases = bases.collect::<Result<_, _>>()?;
        Ok(Self {
            bases,
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
            Kind::Full => self.dense.iter().map(|(k, v)| k.bytes() + v.bytes()).sum(),
            Kind::Coded(format) => {
                let heads = self.coded[format].iter();
                heads.map(|(k, v)| k.bytes() + v.bytes()).sum()
            }
        }
    }

    fn attend(&mut self, kind: Kind) {
        let m = self.head_dim;
        let codes: KeyValue<Vec<&Codes>> = match kind {
            Kind::Full => KeyValue::default(),
            Kind::Coded(format) => {
                let heads = self.coded[format].iter();
                heads
                    .map(|(keys, values)| KeyValue::new(keys, values))
                    .collect()
            }
        };
        let past = |head: usize| match kind {
            Kind::Full => Source::Dense(KeyValue::new(&self.dense[head].0, &self.dense[head].1)),
            Kind::Coded(format) => {
                let (keys, values) = &self.coded[format][head];
                let [key_atoms, value_atoms] = self.dictionaries.atoms(keys.format());
                let atoms = KeyValue::new(key_atoms, value_atoms);
                match &self.bases[format] {
                    Some(basis) => {
                        let first = head / basis.together() * basis.together();
                        let own = first..first + basis.together();
                        Source::Joint {
                            codes: codes.as_ref().map(|codes| &codes[own.clone()]),
                            basis: KeyValue::new(basis.of_head(head), basis.of_head(head)),
                            atoms,
                            offsets: None,
                        }
                    }
                    None => Source::Codes {
                        codes: KeyValue::new(keys, values),
                        atoms,
                        offsets: None,
                    },
                }
            }
        };
        let own = self.own_keys.chunks(m).zip(self.own_values.chunks(m));
        let sources: Vec<[Source<'_>; 2]> = own
            .enumerate()
            .map(|(head, (keys, values))| [past(head), Source::Causal(KeyValue::new(keys, values))])
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
