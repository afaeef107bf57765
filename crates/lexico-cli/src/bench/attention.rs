use std::time::Instant;

use clap::{Args, value_parser};
use lexico::attention::{DenseRows, Head, NumberType, Source, attend_heads};
use lexico::threads::Rayon;
use lexico::{CodeFormat, Codes, CoefficientFormat, Dictionary, SparseBatch};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::median;
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
    /// Nonzeros of a code
    #[arg(short, long, default_value_t = 16, value_name = "S", value_parser = value_parser!(u32).range(1..=4096))]
    sparsity: u32,
    /// Query heads that share a KV head
    #[arg(long, default_value_t = 4, value_name = "G", value_parser = value_parser!(u32).range(1..=256))]
    group: u32,
    /// KV heads
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = value_parser!(u32).range(1..=256))]
    kv_heads: u32,
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

/// One context's figures.
struct Row {
    context: usize,
    lexico_microseconds: f64,
    full_microseconds: f64,
    full_bytes: usize,
    lexico_bytes: usize,
}

impl Row {
    fn ratio(&self) -> f64 {
        self.lexico_microseconds / self.full_microseconds
    }

    fn full_bytes_per_second(&self) -> f64 {
        self.full_bytes as f64 / self.full_microseconds * 1e6
    }
}

impl Attention {
    pub(super) fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(self.repetitions > 0, "--repetitions must be at least 1");
        anyhow::ensure!(
            self.sparsity <= self.head_dim.min(self.atoms),
            "--sparsity {} is impossible: at most the head dim of {} and the {} atoms",
            self.sparsity,
            self.head_dim,
            self.atoms
        );
        interrupt::listen()?;
        let bar = ui::progress(self.context.len() as u64, "contexts");
        let mut rows = Vec::new();
        for &context in &self.context {
            bar.set_message(format!("{context} positions"));
            rows.push(self.measure(context as usize)?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let threads = rayon::current_num_threads();
        if self.json {
            let rows: Vec<_> = rows
                .iter()
                .map(|row| {
                    json!({
                        "context": row.context,
                        "lexico_microseconds": row.lexico_microseconds,
                        "full_microseconds": row.full_microseconds,
                        "full_bytes_per_second": row.full_bytes_per_second(),
                        "full_bytes": row.full_bytes, "lexico_bytes": row.lexico_bytes,
                        "ratio": row.ratio(),
                    })
                })
                .collect();
            let mut report = json!({
                "head_dim": self.head_dim, "atoms": self.atoms, "sparsity": self.sparsity,
                "group": self.group, "kv_heads": self.kv_heads, "layers": self.layers,
                "threads": threads,
            });
            // A single context's figures stand beside its settings.
            match (&rows[..], report.as_object_mut()) {
                ([one], Some(report)) => {
                    report.extend(one.as_object().cloned().unwrap_or_default())
                }
                (_, report) => {
                    if let Some(report) = report {
                        report.insert("rows".to_owned(), json!(rows));
                    }
                }
            }
            return ui::json(&report);
        }
        let rows = rows.iter().map(|row| {
            [
                row.context.to_string(),
                format!("{:.0} µs", row.full_microseconds),
                format!("{:.1} GB/s", row.full_bytes_per_second() * 1e-9),
                format!("{:.0} µs", row.lexico_microseconds),
                format!("{:.2}", row.ratio()),
            ]
        });
        let header = ["context", "full", "reading", "lexico", "over full"];
        ui::line(&ui::table(header, rows.collect()))?;
        ui::line(&format!("{threads} threads"))
    }

    /// A decoding step's attention, on codes and on f16, in turn.
    fn measure(&self, context: usize) -> anyhow::Result<Row> {
        let layers = (0..self.layers).map(|number| Layer::draw(self, context, number.into()));
        let mut layers = layers.collect::<anyhow::Result<Vec<Layer>>>()?;
        let (mut full_times, mut lexico_times) = (Vec::new(), Vec::new());
        let each = 1e6 / layers.len() as f64;
        // In turn, so that whatever else the machine does falls on both.
        for _ in 0..self.repetitions {
            for (kind, times) in [
                (Kind::Full, &mut full_times),
                (Kind::Lexico, &mut lexico_times),
            ] {
                let started = Instant::now();
                for layer in &mut layers {
                    layer.attend(kind);
                }
                times.push(started.elapsed().as_secs_f64() * each);
            }
            anyhow::ensure!(!interrupt::happened(), "interrupted");
        }
        let pairs = |rows: &[(DenseRows, DenseRows)]| -> usize {
            rows.iter().map(|(k, v)| k.bytes() + v.bytes()).sum()
        };
        Ok(Row {
            context,
            lexico_microseconds: median(&mut lexico_times),
            full_microseconds: median(&mut full_times),
            full_bytes: pairs(&layers[0].dense),
            lexico_bytes: layers[0]
                .coded
                .iter()
                .map(|(k, v)| k.bytes() + v.bytes())
                .sum(),
        })
    }

    /// Codes of drawn atoms and coefficients: what attention takes does not depend on their making.
    fn codes(&self, context: usize, rng: &mut ChaCha8Rng) -> anyhow::Result<Codes> {
        let sparsity = self.sparsity as usize;
        let mut codes = Codes::new(CodeFormat {
            sparsity,
            variable: false,
            coefficients: CoefficientFormat::I8,
        })?;
        for first in (0..context).step_by(DRAWN) {
            let count = DRAWN.min(context - first);
            let nonzeros = count * sparsity;
            let index = |_| rng.random_range(0..self.atoms) as u16;
            let indices: Vec<u16> = (0..nonzeros).map(index).collect();
            let coefficients = (0..nonzeros).map(|_| rng.random_range(-1f32..1.0));
            codes.extend(&SparseBatch {
                sparsity,
                lengths: vec![sparsity as u16; count],
                coefficients: coefficients.collect(),
                indices,
                relative_errors: vec![0.0; count],
            });
        }
        Ok(codes)
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Full,
    Lexico,
}

/// Drawn keys and values of a layer, dense and coded.
struct Layer {
    head_dim: usize,
    group: usize,
    keys: Dictionary,
    values: Dictionary,
    queries: Vec<f32>,
    own_keys: Vec<f32>,
    own_values: Vec<f32>,
    dense: Vec<(DenseRows, DenseRows)>,
    coded: Vec<(Codes, Codes)>,
    out: Vec<f32>,
}

impl Layer {
    fn draw(shape: &Attention, context: usize, seed: u64) -> anyhow::Result<Self> {
        let (m, atoms) = (shape.head_dim as usize, shape.atoms as usize);
        let (group, kv_heads) = (shape.group as usize, shape.kv_heads as usize);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-1f32..1.0)).collect()
        };
        let keys = Dictionary::normalised(draw(atoms * m), m)?.in_half_precision()?;
        let values = Dictionary::normalised(draw(atoms * m), m)?.in_half_precision()?;
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
        for _ in 0..kv_heads {
            coded.push((
                shape.codes(context, &mut rng)?,
                shape.codes(context, &mut rng)?,
            ));
        }
        Ok(Self {
            head_dim: m,
            group,
            keys,
            values,
            out: vec![0.0; queries.len()],
            queries,
            own_keys,
            own_values,
            dense,
            coded,
        })
    }

    fn attend(&mut self, kind: Kind) {
        let m = self.head_dim;
        let past = |head: usize| match kind {
            Kind::Full => Source::Dense {
                keys: &self.dense[head].0,
                values: &self.dense[head].1,
            },
            Kind::Lexico => Source::Codes {
                keys: &self.coded[head].0,
                values: &self.coded[head].1,
                key_atoms: (&self.keys).into(),
                value_atoms: (&self.values).into(),
            },
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
