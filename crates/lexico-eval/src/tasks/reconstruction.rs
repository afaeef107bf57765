//! Errors of the keys and values that caches hold, against their bytes: no task, and no text needed.

use std::ops::ControlFlow;

use lexico_llm::Model;
use lexico_llm::cache::{CacheSpec, Decoded};
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::generate::{GenerateOptions, generate};
use lexico_llm::sample::{Sampler, Sampling};
use nalgebra::{DMatrix, SymmetricEigen};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::plot::{Axis, Colours, Layout, Legend, Line, Panel, Scale, svg};
use crate::task::unique;

/// Name of the rows of [`Reconstruction::add_gaussian_bound`].
pub const BOUND: &str = "gaussian-bound";

/// Ending of the names of caches that are as large as they are saved.
const STORED: &str = ", stored";

/// Keys, then values.
const PARTS: [&str; 2] = ["keys", "values"];

/// A model's keys and values, and how near caches come to them.
#[derive(Debug, Clone, Serialize)]
pub struct Reconstruction {
    /// The model's name.
    pub model: String,
    /// Positions.
    pub positions: usize,
    /// Every cache, layer by layer.
    pub rows: Vec<Row>,
    #[serde(skip)]
    layers: Vec<Decoded>,
    #[serde(skip)]
    tokens: Vec<u32>,
    #[serde(skip)]
    head_dim: usize,
}

/// A layer's keys or values in a cache.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Row {
    /// The cache, as the command line names it.
    pub format: String,
    /// Family of the cache, for lexico with the format of its codes: rows of one make one curve.
    pub method: String,
    /// The layer.
    pub layer: usize,
    /// `keys` or `values`.
    pub part: &'static str,
    /// Bits as allocated, over the numbers.
    pub bits_per_number: f64,
    /// `‖x − x̂‖ / ‖x‖`, mean over the vectors; none of the bound, which is of the squares.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
    /// `(x − x̂)²`, mean over the numbers.
    pub mean_squared_error: f64,
    /// Mean squared error over the mean of `x²`.
    pub distortion: f64,
}

/// Vectors that a cache holds of a layer; the bytes of the saved keys and values, of a cache that can be saved.
type HeldLayer = (Decoded, Option<[usize; 2]>);

impl Reconstruction {
    /// Has the model read `tokens` with the full cache in f32.
    ///
    /// # Errors
    /// Those of the model.
    pub fn new(model: &Model, tokens: Vec<u32>) -> Result<Self> {
        let config = model.decoder.config();
        let exact: CacheSpec = "full:dense=f32".parse()?;
        let mut new = Self {
            model: model.name.clone(),
            positions: tokens.len(),
            rows: Vec::new(),
            layers: Vec::new(),
            tokens,
            head_dim: config.head_dim,
        };
        let layers = new.read(model, &exact)?.into_iter().flatten();
        new.layers = layers.map(|(vectors, _)| vectors).collect();
        Ok(new)
    }

    /// Draws tokens from the model, from the beginning of a text on, where there is none to read.
    ///
    /// # Errors
    /// Those of the model; [`Error::Interrupted`].
    pub fn own_text(
        model: &Model,
        tokens: usize,
        seed: u64,
        on_token: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        let mut prompt = model.tokenizer.encode_first("")?;
        if prompt.is_empty() {
            prompt = model.tokenizer.encode_first("\n")?;
        }
        let mut cache = model.cache(&"full".parse()?)?;
        let mut sampler = Sampler::new(Sampling {
            temperature: 1.0,
            seed,
            ..Sampling::default()
        })?;
        let options = GenerateOptions {
            max_tokens: tokens.saturating_sub(prompt.len()),
            ignore_end: true,
            ..GenerateOptions::default()
        };
        let mut interrupted = false;
        let on_text = &mut |_: &str| {
            let flow = on_token();
            interrupted |= flow.is_break();
            flow
        };
        let cache = cache.as_mut();
        let generated = generate(model, cache, &prompt, &mut sampler, &options, on_text)?;
        if interrupted {
            return Err(Error::Interrupted);
        }
        prompt.extend(generated.tokens);
        Ok(prompt)
    }

    /// Reads the same tokens with a cache and returns what it holds, layer by layer; none of a layer whose positions it
    /// gives up.
    fn read(&self, model: &Model, spec: &CacheSpec) -> Result<Vec<Option<HeldLayer>>> {
        let mut cache = model.cache(spec)?;
        let mut sequences = [Sequence {
            tokens: &self.tokens,
            cache: cache.as_mut(),
        }];
        model.decoder.forward(&mut sequences, Logits::Last)?;
        let state = cache.state();
        let held = |layer| {
            let stored = state.as_ref().map(|state| {
                PARTS.map(|part| {
                    let name = format!("layers.{layer}.{part}.");
                    let own = |(block, _): &&(String, Vec<u8>)| block.starts_with(&name);
                    state.blocks.iter().filter(own).map(|(_, b)| b.len()).sum()
                })
            });
            let vectors = cache.decoded(layer)?;
            Ok(vectors.map(|vectors| (vectors, stored)))
        };
        let layers = 0..model.decoder.config().layers;
        Ok(layers.map(held).collect::<lexico_llm::Result<_>>()?)
    }

    /// Adds a cache, and where it can be saved, what it weighs so. A prompt attends at full precision, so that all caches
    /// are given the same keys and values.
    ///
    /// # Errors
    /// [`Error::Options`] where the cache gives positions up; those of the model.
    pub fn add(&mut self, model: &Model, spec: &CacheSpec) -> Result<()> {
        let read = self.read(model, spec)?;
        let name = spec.family();
        let method = match spec.given("format") {
            Some(format) => format!("{name} {format}"),
            None => name.to_owned(),
        };
        for (layer, (exact, held)) in self.layers.iter().zip(read).enumerate() {
            let of_all = |(vectors, _): &HeldLayer| vectors.keys.len() == exact.keys.len();
            let Some((vectors, stored)) = held.filter(of_all) else {
                return Err(Error::Options(format!(
                    "{spec} gives positions up, so that there is nothing to compare them with; leave it out"
                )));
            };
            let parts = [
                (&exact.keys, &vectors.keys),
                (&exact.values, &vectors.values),
            ];
            for (p, (exact, near)) in parts.into_iter().enumerate() {
                let row = Row {
                    format: spec.to_string(),
                    method: method.clone(),
                    layer,
                    part: PARTS[p],
                    ..compared(exact, near, self.head_dim)
                };
                let bits = |bytes: usize| 8.0 * bytes as f64 / exact.len().max(1) as f64;
                self.rows.push(Row {
                    bits_per_number: bits(vectors.bytes[p]),
                    ..row.clone()
                });
                if let Some(stored) = stored {
                    self.rows.push(Row {
                        format: format!("{spec}{STORED}"),
                        method: format!("{method}{STORED}"),
                        bits_per_number: bits(stored[p]),
                        ..row
                    });
                }
            }
        }
        Ok(())
    }

    /// Adds the least error with which vectors of the same mean and covariance, each head's its own, could be coded at
    /// several sizes if they were Gaussian: reverse water-filling (Shannon 1959; Cover & Thomas, ch. 10). The numbers of a
    /// layer share the bits where they do most.
    pub fn add_gaussian_bound(&mut self) {
        let mut bounded = Vec::new();
        for (layer, exact) in self.layers.iter().enumerate() {
            let heads = exact.keys.len() / (self.positions * self.head_dim).max(1);
            for (part, numbers) in PARTS.into_iter().zip([&exact.keys, &exact.values]) {
                let of_head = numbers.len() / heads.max(1);
                let variances: Vec<f64> = numbers
                    .chunks_exact(of_head.max(1))
                    .flat_map(|vectors| variances(vectors, self.head_dim))
                    .collect();
                let squares: f64 = numbers.iter().map(|&x| f64::from(x).powi(2)).sum();
                let signal = squares / numbers.len().max(1) as f64;
                bounded.push((layer, part, variances, signal));
            }
        }
        for half_bits in 1..=12 {
            let bits = f64::from(half_bits) / 2.0;
            for (layer, part, variances, signal) in &bounded {
                let error = water_filling(variances, bits);
                self.rows.push(Row {
                    format: BOUND.to_owned(),
                    method: BOUND.to_owned(),
                    layer: *layer,
                    part,
                    bits_per_number: bits,
                    relative_error: None,
                    mean_squared_error: error,
                    distortion: error / signal.max(f64::MIN_POSITIVE),
                });
            }
        }
    }

    /// The formats, in the order in which they were added.
    pub fn formats(&self) -> Vec<&str> {
        unique(self.rows.iter().map(|row| row.format.as_str()))
    }

    /// A row of text for each format but the bound: its name, and bits, relative error and distortion of the keys and of
    /// the values.
    pub fn mean_rows(&self) -> Vec<Vec<String>> {
        let formats = self.formats().into_iter();
        let row = |format: &str| {
            let mut row = vec![format.to_owned()];
            for part in PARTS {
                let [bits, relative, distortion] = self.mean(format, part);
                row.extend([
                    format!("{bits:.2}"),
                    format!("{relative:.4}"),
                    format!("{distortion:.5}"),
                ]);
            }
            row
        };
        formats.filter(|f| *f != BOUND).map(row).collect()
    }

    /// Bits a number, relative error and distortion of a format, mean over the layers.
    pub fn mean(&self, format: &str, part: &str) -> [f64; 3] {
        let rows = || {
            self.rows
                .iter()
                .filter(|r| r.format == format && r.part == part)
        };
        let count = rows().count().max(1) as f64;
        let mean = |f: fn(&Row) -> f64| rows().map(f).sum::<f64>() / count;
        [
            mean(|row| row.bits_per_number),
            mean(|row| row.relative_error.unwrap_or(f64::NAN)),
            mean(|row| row.distortion),
        ]
    }

    /// Bits that methods need for the squared error of each row of `reference`, layer by layer and part by part, over the
    /// bits that this has; between two sizes of a method the error's logarithm is interpolated linearly. A method
    /// whose smallest size is nearer still counts with that size; nothing of one that does not come so near.
    pub fn bits_at_error_of(&self, reference: &str) -> Vec<SameError> {
        let references = self.rows.iter().filter(|row| row.method == reference);
        let mut found = Vec::new();
        for wanted in references {
            for method in self.methods() {
                if method == reference || method == BOUND {
                    continue;
                }
                let own = self.rows.iter().filter(|row| {
                    (row.method.as_str(), row.layer, row.part)
                        == (method, wanted.layer, wanted.part)
                });
                let points: Vec<(f64, f64)> = own
                    .map(|row| (row.bits_per_number, row.distortion))
                    .collect();
                if let Some(bits) = bits_at(points, wanted.distortion) {
                    found.push(SameError {
                        reference: wanted.format.clone(),
                        method: method.to_owned(),
                        layer: wanted.layer,
                        part: wanted.part,
                        distortion: wanted.distortion,
                        reference_bits: wanted.bits_per_number,
                        bits,
                        ratio: bits / wanted.bits_per_number,
                    });
                }
            }
        }
        found
    }

    /// The methods, in the order in which they were added.
    pub fn methods(&self) -> Vec<&str> {
        unique(self.rows.iter().map(|row| row.method.as_str()))
    }

    /// Distortion against bits, the mean over the layers first, then every layer: keys beside values, or below them.
    #[must_use]
    pub fn curves(&self, beside: bool) -> String {
        let mut rows = vec![self.panels(None)];
        rows.extend((0..self.layers.len()).map(|layer| self.panels(Some(layer))));
        let mut layout = Layout {
            colours: Colours::Distinct,
            ..Layout::default()
        };
        if !beside {
            layout.legend = Legend::Below;
            layout.frame.0 = 270.0;
            rows = rows
                .into_iter()
                .flatten()
                .map(|panel| vec![panel])
                .collect();
        }
        svg(&rows, layout)
    }

    fn panels(&self, layer: Option<usize>) -> Vec<Panel> {
        let methods = self.methods();
        let line = |method: &str, part: &str| {
            let of_method = |r: &&Row| r.method == method && r.part == part;
            let own = |r: &&Row| layer.is_none_or(|layer| layer == r.layer);
            let rows: Vec<&Row> = self.rows.iter().filter(of_method).filter(own).collect();
            // Of each size, one row a layer.
            let layers = layer.map_or(self.layers.len().max(1), |_| 1);
            let of_size = |rows: &[&Row]| {
                let mean =
                    |f: fn(&Row) -> f64| rows.iter().map(|r| f(r)).sum::<f64>() / rows.len() as f64;
                (mean(|r| r.bits_per_number), mean(|r| r.distortion))
            };
            let mut points: Vec<(f64, f64)> = rows.chunks_exact(layers).map(of_size).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Line {
                name: method.to_owned(),
                points,
                bars: Vec::new(),
            }
        };
        let name = layer.map_or("mean of the layers".to_owned(), |layer| {
            format!("layer {layer}")
        });
        let panel = |part: &str| Panel {
            title: format!("{part}, {name}"),
            x: Axis::new("bits a number", Scale::FromZero),
            y: Axis::new("squared error over the signal's", Scale::Logarithmic),
            level: None,
            lines: methods.iter().map(|method| line(method, part)).collect(),
        };
        PARTS.map(panel).into()
    }
}

/// The errors of vectors `[n, m]`.
fn compared(exact: &[f32], near: &[f32], m: usize) -> Row {
    let (mut errors, mut all, mut signal) = (0.0, 0.0, 0.0);
    for (exact, near) in exact.chunks_exact(m).zip(near.chunks_exact(m)) {
        let square = |x: f32| f64::from(x).powi(2);
        let error: f64 = exact.iter().zip(near).map(|(x, y)| square(x - y)).sum();
        let norm: f64 = exact.iter().map(|&x| square(x)).sum();
        errors += if norm > 0.0 {
            (error / norm).sqrt()
        } else {
            0.0
        };
        all += error;
        signal += norm;
    }
    let numbers = exact.len().max(1) as f64;
    Row {
        relative_error: Some(errors / (numbers / m as f64)),
        mean_squared_error: all / numbers,
        distortion: all / signal.max(f64::MIN_POSITIVE),
        ..Row::default()
    }
}

/// Bits that a method needs for the error of a format of another, in one layer's keys or values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SameError {
    /// The other's format.
    pub reference: String,
    /// The method.
    pub method: String,
    /// The layer.
    pub layer: usize,
    /// `keys` or `values`.
    pub part: &'static str,
    /// The squared error over the signal's.
    pub distortion: f64,
    /// Bits a number of the other.
    pub reference_bits: f64,
    /// Bits a number of the method.
    pub bits: f64,
    /// Bits of the method over those of the other.
    pub ratio: f64,
}

/// The bits at which a curve of bits and errors comes down to `error`, its first where it begins below; `None` where it
/// does not.
fn bits_at(mut points: Vec<(f64, f64)>, error: f64) -> Option<f64> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    if let Some(&(fewest, first)) = points.first()
        && first <= error
    {
        return Some(fewest);
    }
    let pairs = points.iter().zip(points.iter().skip(1));
    let crossed = |((_, above), (_, below)): &(&(f64, f64), &(f64, f64))| {
        (*below..=*above).contains(&error) && *below > 0.0
    };
    let (&(few, above), &(many, below)) = pairs.into_iter().find(crossed)?;
    if above == below {
        return Some(few);
    }
    let part = (above / error).ln() / (above / below).ln();
    Some(few + part * (many - few))
}

/// The variances of vectors `[n, m]` along their principal axes.
fn variances(vectors: &[f32], head_dim: usize) -> Vec<f64> {
    let rows = vectors.len() / head_dim;
    let numbers = vectors.iter().map(|&x| f64::from(x));
    let mut matrix = DMatrix::from_row_iterator(rows, head_dim, numbers);
    for mut column in matrix.column_iter_mut() {
        let mean = column.mean();
        column.add_scalar_mut(-mean);
    }
    let covariance = matrix.transpose() * &matrix / rows.max(1) as f64;
    let eigenvalues = SymmetricEigen::new(covariance).eigenvalues;
    // Rounding may leave a zero a little below.
    eigenvalues.iter().map(|&v| v.max(0.0)).collect()
}

/// The least mean squared error with which independent Gaussian numbers of these variances are coded in `bits` each,
/// on average.
fn water_filling(variances: &[f64], bits: f64) -> f64 {
    let count = variances.len().max(1) as f64;
    let rate = |level: f64| {
        let above = variances.iter().filter(|&&v| v > level);
        above.map(|v| 0.5 * (v / level).log2()).sum::<f64>() / count
    };
    let max = variances.iter().copied().fold(0.0, f64::max);
    if max <= 0.0 {
        return 0.0;
    }
    // The rate falls as the level rises; bisection of its logarithm.
    let (mut low, mut high) = (max.ln() - 200.0, max.ln());
    for _ in 0..200 {
        let middle = f64::midpoint(low, high);
        if rate(middle.exp()) > bits {
            low = middle;
        } else {
            high = middle;
        }
    }
    let level = high.exp();
    variances.iter().map(|v| v.min(level)).sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn water_filling_gives_bits_where_they_do_most() {
        // One number: σ² 4^−bits.
        assert!((water_filling(&[3.0], 2.0) - 3.0 / 16.0).abs() < 1e-9);
        // 16 and 1 at half a bit each: one bit in all, to the larger alone, 16 / 4 = 4 > 1.
        assert!((water_filling(&[16.0, 1.0], 0.5) - 2.5).abs() < 1e-9);
        // At 2 bits each, 4 in all: 3 and 1, both down to 1/4.
        assert!((water_filling(&[16.0, 1.0], 2.0) - 0.25).abs() < 1e-9);
        assert_eq!(water_filling(&[0.0, 0.0], 1.0), 0.0);
    }

    #[test]
    fn bits_for_an_error_are_interpolated() {
        let points = vec![(4.0, 0.01), (2.0, 0.1), (1.0, 0.4)];
        let at = |error| bits_at(points.clone(), error);
        assert!((at(0.1).unwrap() - 2.0).abs() < 1e-9);
        // Half way in the logarithm.
        assert!((at(0.2).unwrap() - 1.5).abs() < 1e-9);
        assert!((at(0.001_f64.sqrt()).unwrap() - 3.0).abs() < 1e-9);
        assert_eq!([at(0.5), at(0.009)], [Some(1.0), None]);
        assert_eq!(bits_at(vec![(1.0, 0.3)], 0.3), Some(1.0));
        assert_eq!(bits_at(Vec::new(), 0.3), None);
    }

    #[test]
    fn variances_are_along_principal_axes() {
        // (±3, ±3) and (±1, ∓1) around a mean of (10, 0).
        let vectors = [13.0, 3.0, 7.0, -3.0, 11.0, -1.0, 9.0, 1.0];
        let mut found = variances(&vectors, 2);
        found.sort_by(f64::total_cmp);
        assert!(
            (found[0] - 1.0).abs() < 1e-9 && (found[1] - 9.0).abs() < 1e-9,
            "{found:?}"
        );
    }

    #[test]
    fn more_bits_are_nearer_and_the_bound_is_below() -> Result<()> {
        let model = Model::tiny()?;
        let mut on = || ControlFlow::Continue(());
        let tokens = Reconstruction::own_text(&model, 200, 1, &mut on)?;
        assert_eq!(tokens.len(), 200);
        let mut found = Reconstruction::new(&model, tokens)?;
        let formats = [
            "per-token:bits=2,window=0",
            "per-token:bits=4,window=0",
            "turboquant:bits=2",
            "turboquant:bits=4",
            "lexico:sparsity=4,window=0,batch=1,allocation=same,fit=least-squares",
            "lexico:sparsity=16,window=0,batch=1,allocation=same,fit=least-squares",
        ];
        for format in formats {
            found.add(&model, &format.parse()?)?;
        }
        let full = "full".parse()?;
        found.add(&model, &full)?;
        for part in PARTS {
            for pair in formats.chunks(2) {
                let [few, many] = [pair[0], pair[1]].map(|format| found.mean(format, part));
                assert!(
                    few[0] < many[0] && few[1] > many[1] && few[2] > many[2],
                    "{pair:?}"
                );
            }
            let [bits, error, _] = found.mean("full", part);
            assert!((16.0..18.0).contains(&bits) && error < 1e-3);
        }
        assert!(found.add(&model, &"snapkv:capacity=50".parse()?).is_err());
        // Saved codes are as near, in fewer bytes.
        let stored = format!("{}{STORED}", formats[4]);
        let [memory, saved] = [formats[4], &stored].map(|format| found.mean(format, "keys"));
        assert!(saved[0] < memory[0] && saved[1..] == memory[1..]);
        assert!(!found.formats().contains(&"turboquant:bits=2, stored"));
        found.add_gaussian_bound();
        assert_eq!(found.formats().len(), 10);
        let plot = found.curves(true);
        assert!(!plot.contains("NaN") && plot.contains(BOUND));
        Ok(())
    }
}
