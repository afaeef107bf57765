use std::fmt::Display;
use std::str::FromStr;

use super::{Coding, LayerSettings, MemoryLimit};
use crate::attention::NumberType;
use crate::codes::CoefficientFormat;
use crate::dictionary::{CodeFamily, DictionarySet, LayerSparsities};
use crate::encode::{BEAM_WIDTH, Fit, MAX_BEAM_WIDTH};
use crate::size::parse_size;
use crate::{Error, Result};

/// The options of a model's caches, each a word and a value, as in `sparsity=12,window=128`. What is left out is as the dictionaries
/// or [`LayerSettings::new`] have it.
///
/// ```
/// let mut options = lexico::cache::CacheOptions::default();
/// options.set("sparsity", "6")?;
/// options.set("window", "32")?;
/// assert!(options.set("window", "narrow").is_err());
/// # Ok::<(), lexico::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct CacheOptions {
    sparsity: Option<f64>,
    key_sparsity: Option<usize>,
    value_sparsity: Option<usize>,
    allocation: Option<Allocation>,
    tolerance: Option<f32>,
    fit: Fit,
    sinks: usize,
    window: Window,
    memory: Option<usize>,
    batch: usize,
    format: Option<Format>,
    beam: Option<usize>,
    number_type: NumberType,
}

impl Default for CacheOptions {
    fn default() -> Self {
        let usual = LayerSettings::new(LayerSparsities::same(1, 1, 1));
        Self {
            sparsity: None,
            key_sparsity: None,
            value_sparsity: None,
            allocation: None,
            tolerance: None,
            fit: usual.fit,
            sinks: usual.sinks,
            window: Window { told: None },
            memory: None,
            batch: usual.batch,
            format: None,
            beam: None,
            number_type: usual.number_type,
        }
    }
}

/// The recent window: the same whether it is told or left out, but a limit of memory goes only with the latter.
#[derive(Debug, Clone, Copy)]
struct Window {
    told: Option<usize>,
}

impl Window {
    fn positions(self) -> usize {
        let usual = || LayerSettings::new(LayerSparsities::same(1, 1, 1)).recent_window;
        self.told.unwrap_or_else(usual)
    }
}

impl PartialEq for Window {
    fn eq(&self, other: &Self) -> bool {
        self.positions() == other.positions()
    }
}

/// Which heads get the atoms.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Allocation {
    Measured,
    Same,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Additive,
    Sparse(CoefficientFormat),
}

impl Format {
    fn family(self) -> CodeFamily {
        match self {
            Self::Additive => CodeFamily::Additive,
            Self::Sparse(_) => CodeFamily::Sparse,
        }
    }
}

const ALLOCATIONS: &[(&str, Allocation)] = &[
    ("measured", Allocation::Measured),
    ("same", Allocation::Same),
];
const FITS: &[(&str, Fit)] = &[
    ("unbiased", Fit::Unbiased),
    ("least-squares", Fit::LeastSquares),
];
const FORMATS: &[(&str, Format)] = &[
    ("additive", Format::Additive),
    ("i8", Format::Sparse(CoefficientFormat::I8)),
    ("f8", Format::Sparse(CoefficientFormat::F8)),
    ("f32", Format::Sparse(CoefficientFormat::F32)),
];
const NUMBER_TYPES: &[(&str, NumberType)] = &[("f16", NumberType::F16), ("f32", NumberType::F32)];

fn number<T: FromStr<Err: Display>>(option: &'static str, given: &str, needed: &str) -> Result<T> {
    let number = given.parse();
    number.map_err(|error: T::Err| {
        Error::setting(option, given, &format!("{error}; it must be {needed}"))
    })
}

fn count(option: &'static str, given: &str) -> Result<usize> {
    number(option, given, "a whole number")
}

fn beam_width(given: &str) -> Result<usize> {
    match count("beam", given)? {
        width @ 1..=MAX_BEAM_WIDTH => Ok(width),
        _ => {
            let reason = format!("it must be from 1 to {MAX_BEAM_WIDTH}");
            Err(Error::setting("beam", given, &reason))
        }
    }
}

fn memory(given: &str) -> Result<usize> {
    let bytes = parse_size(given).map(|bytes| bytes as usize);
    let reason = "it must be a size, as 64MiB or 2GiB";
    bytes.ok_or_else(|| Error::setting("memory", given, reason))
}

fn one_of<T: Copy>(option: &'static str, given: &str, words: &[(&str, T)]) -> Result<T> {
    let known = words.iter().find(|(word, _)| *word == given);
    known.map(|(_, meant)| *meant).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let reason = format!("it must be one of {}", words.join(", "));
        Error::setting(option, given, &reason)
    })
}

/// The word for a value.
fn word<T: PartialEq>(words: &[(&'static str, T)], value: &T) -> &'static str {
    let known = words.iter().find(|(_, meant)| meant == value);
    known.map_or("", |(word, _)| *word)
}

impl CacheOptions {
    /// The options there are.
    pub const NAMES: [&'static str; 13] = [
        "sparsity",
        "key-sparsity",
        "value-sparsity",
        "allocation",
        "tolerance",
        "fit",
        "sinks",
        "window",
        "memory",
        "batch",
        "format",
        "beam",
        "dense",
    ];

    /// Sets an option to what `value` says.
    ///
    /// # Errors
    /// [`Error::Setting`] for an option that is none of [`NAMES`](Self::NAMES), and a value that is no number, or no word, of its kind.
    pub fn set(&mut self, option: &str, value: &str) -> Result<()> {
        match option {
            "sparsity" => self.sparsity = Some(number("sparsity", value, "a number")?),
            "key-sparsity" => self.key_sparsity = Some(count("key-sparsity", value)?),
            "value-sparsity" => self.value_sparsity = Some(count("value-sparsity", value)?),
            "allocation" => self.allocation = Some(one_of("allocation", value, ALLOCATIONS)?),
            "tolerance" => self.tolerance = Some(number("tolerance", value, "a number")?),
            "fit" => self.fit = one_of("fit", value, FITS)?,
            "sinks" => self.sinks = count("sinks", value)?,
            "window" => self.window.told = Some(count("window", value)?),
            "memory" => self.memory = Some(memory(value)?),
            "batch" => self.batch = count("batch", value)?,
            "format" => self.format = Some(one_of("format", value, FORMATS)?),
            "beam" => self.beam = Some(beam_width(value)?),
            "dense" => self.number_type = one_of("dense", value, NUMBER_TYPES)?,
            _ => {
                let names = Self::NAMES.join(", ");
                let reason = format!("there is no such option; there are: {names}");
                return Err(Error::setting("option", option, &reason));
            }
        }
        Ok(())
    }

    /// The family of codes.
    pub fn family(&self, dictionaries: &DictionarySet) -> CodeFamily {
        self.format
            .map_or_else(|| dictionaries.usual_family(), Format::family)
    }

    /// The settings of every layer. Each layer codes at its own steps, so that no token waits for all; nothing is coded in the
    /// background, and no layer has a sliding window: that is for whoever knows the model and the machine.
    ///
    /// # Errors
    /// [`Error::Setting`] where options contradict each other, or ask for what the dictionaries do not have.
    pub fn layers(&self, dictionaries: &DictionarySet) -> Result<Vec<LayerSettings>> {
        let coding = self.coding(dictionaries)?;
        let sparsities = self.sparsities(dictionaries, coding.family())?;
        let layers = sparsities.len();
        let settings = sparsities.into_iter().enumerate();
        let settings = settings.map(|(layer, sparsities)| {
            LayerSettings {
                coding,
                fit: self.fit,
                sinks: self.sinks,
                recent_window: self.window.positions(),
                batch: self.batch,
                // The steps after which a batch takes its place among the codes: each layer has its own.
                delay: self.batch / 4 + layer.saturating_mul(self.batch / 2) / layers,
                number_type: self.number_type,
                ..LayerSettings::new(sparsities)
            }
        });
        let mut settings: Vec<_> = settings.collect();
        if let Some(bytes) = self.memory {
            let memory = self.limit(bytes, &settings, dictionaries.model.head_dim)?;
            settings
                .iter_mut()
                .for_each(|own| own.memory = Some(memory));
        }
        Ok(settings)
    }

    /// The limit of memory of caches with these settings.
    fn limit(
        &self,
        bytes: usize,
        layers: &[LayerSettings],
        head_dim: usize,
    ) -> Result<MemoryLimit> {
        let refused = |reason: &str| Err(Error::setting("memory", bytes.to_string(), reason));
        if self.window.told.is_some() {
            return refused(
                "with window, which says how many are dense, it says nothing; leave one of them out",
            );
        }
        if self.batch == 0 {
            return refused("at least one position leaves the window at once: batch=1 or more");
        }
        let Some(memory) = MemoryLimit::new(bytes, layers, head_dim) else {
            return refused(
                "codes of so many atoms take as much as what they stand for; take fewer",
            );
        };
        let least = self.sinks + 4 * self.batch;
        if memory.capacity() < least {
            let of_dense = layers
                .iter()
                .map(|layer| layer.dense_bytes(head_dim))
                .sum::<usize>();
            return refused(&format!(
                "it holds {} positions, and at least {least} are needed; a position takes {of_dense} bytes before it is coded",
                memory.capacity()
            ));
        }
        Ok(memory)
    }

    /// The codes, and how they are found.
    fn coding(&self, dictionaries: &DictionarySet) -> Result<Coding> {
        match self.family(dictionaries) {
            CodeFamily::Additive => {
                if let Some(tolerance) = self.tolerance {
                    let reason = "additive codes all have as many atoms; give format=i8 too";
                    return Err(Error::setting("tolerance", tolerance.to_string(), reason));
                }
                Ok(Coding::Additive {
                    beam_width: self.beam.unwrap_or(BEAM_WIDTH),
                })
            }
            CodeFamily::Sparse => {
                if let Some(beam) = self.beam {
                    let reason = "only the search for additive codes has a beam";
                    return Err(Error::setting("beam", beam.to_string(), reason));
                }
                Ok(Coding::Sparse {
                    coefficients: match self.format {
                        Some(Format::Sparse(coefficients)) => coefficients,
                        _ => CoefficientFormat::default(),
                    },
                    tolerance: self.tolerance.unwrap_or(0.0),
                })
            }
        }
    }

    /// The sparsities of every layer and head.
    fn sparsities(
        &self,
        dictionaries: &DictionarySet,
        family: CodeFamily,
    ) -> Result<Vec<LayerSparsities>> {
        let usual = || dictionaries.usual_sparsity(family) as f64;
        let mean = self.sparsity.unwrap_or_else(usual);
        let of_mean = |reason: &str| Err(Error::setting("sparsity", mean.to_string(), reason));
        let max = dictionaries.max_sparsity(family);
        if max == 0 {
            let usual = match family {
                CodeFamily::Additive => Format::Additive,
                CodeFamily::Sparse => Format::Sparse(CoefficientFormat::default()),
            };
            let reason = match family {
                CodeFamily::Additive => {
                    "these dictionaries have no codebooks; `lexico train` makes some that do, or use format=i8"
                }
                CodeFamily::Sparse => {
                    "these dictionaries have codebooks alone; use format=additive"
                }
            };
            let format = word(FORMATS, &self.format.unwrap_or(usual));
            return Err(Error::setting("format", format, reason));
        }
        if !(1.0..=max as f64).contains(&mean) {
            let limit = match family {
                CodeFamily::Additive => "the number of codebooks",
                CodeFamily::Sparse => "the head dim or the atoms of a dictionary",
            };
            return of_mean(&format!("it must be from 1 to {max}, {limit}"));
        }
        let (keys, values) = (self.key_sparsity, self.value_sparsity);
        if keys.is_some() && values.is_some() && self.sparsity.is_some() {
            return of_mean("with key-sparsity and value-sparsity it says nothing; leave it out");
        }
        let by_part = keys.is_some() || values.is_some();
        if self.allocation == Some(Allocation::Measured) {
            let refused = |reason| Err(Error::setting("allocation", "measured", reason));
            if by_part {
                return refused(
                    "the measured losses decide between keys and values too; give sparsity alone",
                );
            }
            if dictionaries.losses(family).is_none() {
                return refused(
                    "these dictionaries were made without measuring losses; `lexico measure` adds them",
                );
            }
        }
        if self.allocation != Some(Allocation::Same)
            && !by_part
            && let Some(allocated) = dictionaries.allocate(family, mean)
        {
            return Ok(allocated);
        }
        if mean.fract() != 0.0 {
            return of_mean("sparsities that are the same for all heads are whole numbers");
        }
        let mean = mean as usize;
        let (keys, values) = (keys.unwrap_or(mean), values.unwrap_or(mean));
        let heads = dictionaries.model.kv_heads * dictionaries.joint().layers;
        let each = LayerSparsities::same(heads, keys, values);
        Ok(vec![each; dictionaries.layers.len()])
    }
}
