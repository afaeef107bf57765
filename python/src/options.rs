//! A cache's options as text: those of `--cache lexico:…` of the program, which means the same by them.

use std::fmt;
use std::str::FromStr;

use lexico::attention::NumberType;
use lexico::cache::Coding;
use lexico::dictionary::{CodeFamily, LayerSparsities};
use lexico::encode::BEAM_WIDTH;
use lexico::shown::shown;
use lexico::{CoefficientFormat, DictionarySet, Fit, LayerSettings};
use pyo3::prelude::*;

use crate::error::value;

const NAMES: &str = "sparsity, key-sparsity, value-sparsity, allocation, tolerance, fit, sinks, window, batch, format, beam, dense";

/// Options of a cache; what was not given is `None` where it depends on the dictionaries.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Options {
    sparsity: Option<f64>,
    key_sparsity: Option<usize>,
    value_sparsity: Option<usize>,
    /// Whether atoms go to the heads that need them.
    measured: Option<bool>,
    tolerance: Option<f32>,
    fit: Fit,
    sinks: usize,
    window: usize,
    batch: usize,
    format: Option<Format>,
    beam: Option<usize>,
    number_type: NumberType,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Additive,
    Sparse(CoefficientFormat),
}

/// A value that cannot be.
fn refused(option: &str, given: impl fmt::Display, reason: impl fmt::Display) -> PyErr {
    value(format!("cache: {option}={}: {reason}", shown(given)))
}

fn number<T: FromStr<Err: fmt::Display>>(option: &str, given: &str) -> PyResult<T> {
    let number = given.parse();
    number.map_err(|error: T::Err| refused(option, given, format!("{error}; it must be a number")))
}

fn one_of<T: Copy>(option: &str, given: &str, words: &[(&str, T)]) -> PyResult<T> {
    let known = words.iter().find(|(word, _)| *word == given);
    known.map(|(_, meant)| *meant).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        refused(
            option,
            given,
            format!("it must be one of {}", words.join(", ")),
        )
    })
}

impl Options {
    /// Reads `lexico` or `lexico:option=value,…`.
    pub(crate) fn parse(text: &str) -> PyResult<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        if name != "lexico" {
            let name = shown(name);
            return Err(value(format!(
                "cache: no cache method \"{name}\" here; it is written lexico:sparsity=12,window=128"
            )));
        }
        let usual = LayerSettings::new(LayerSparsities::same(1, 1, 1));
        let mut options = Self {
            sparsity: None,
            key_sparsity: None,
            value_sparsity: None,
            measured: None,
            tolerance: None,
            fit: usual.fit,
            sinks: usual.sinks,
            window: usual.recent_window,
            batch: usual.batch,
            format: None,
            beam: None,
            number_type: usual.number_type,
        };
        let mut seen: Vec<&str> = Vec::new();
        for pair in rest.split(',').filter(|pair| !pair.is_empty()) {
            let (name, given) = pair.split_once('=').unwrap_or((pair, ""));
            if seen.contains(&name) {
                return Err(refused(name, given, "it is given twice"));
            }
            seen.push(name);
            options.set(name, given)?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, given: &str) -> PyResult<()> {
        match name {
            "sparsity" => self.sparsity = Some(number(name, given)?),
            "key-sparsity" => self.key_sparsity = Some(number(name, given)?),
            "value-sparsity" => self.value_sparsity = Some(number(name, given)?),
            "allocation" => {
                self.measured = Some(one_of(name, given, &[("measured", true), ("same", false)])?);
            }
            "tolerance" => self.tolerance = Some(number(name, given)?),
            "fit" => {
                let words = [
                    ("unbiased", Fit::Unbiased),
                    ("least-squares", Fit::LeastSquares),
                ];
                self.fit = one_of(name, given, &words)?;
            }
            "sinks" => self.sinks = number(name, given)?,
            "window" => self.window = number(name, given)?,
            "batch" => self.batch = number(name, given)?,
            "format" => {
                let words = [
                    ("additive", Format::Additive),
                    ("i8", Format::Sparse(CoefficientFormat::I8)),
                    ("f8", Format::Sparse(CoefficientFormat::F8)),
                    ("f32", Format::Sparse(CoefficientFormat::F32)),
                ];
                self.format = Some(one_of(name, given, &words)?);
            }
            "beam" => self.beam = Some(number(name, given)?),
            "dense" => {
                let words = [("f16", NumberType::F16), ("f32", NumberType::F32)];
                self.number_type = one_of(name, given, &words)?;
            }
            _ => {
                let name = shown(name);
                return Err(value(format!(
                    "cache: no option \"{name}\"; its options are: {NAMES}"
                )));
            }
        }
        Ok(())
    }

    /// The settings of every layer; `sliding_windows` are those of the layers, of which those left out have none.
    pub(crate) fn layers(
        &self,
        dictionaries: &DictionarySet,
        sliding_windows: &[Option<usize>],
    ) -> PyResult<Vec<LayerSettings>> {
        let coding = self.coding(dictionaries)?;
        let sparsities = self.sparsities(dictionaries, coding.family())?;
        let layers = sparsities.len();
        let settings = sparsities.into_iter().enumerate();
        let settings = settings.map(|(layer, sparsities)| LayerSettings {
            coding,
            fit: self.fit,
            sinks: self.sinks,
            recent_window: self.window,
            batch: self.batch,
            // Each layer codes at its own steps, so that no token waits for all; as the program has it.
            delay: self.batch / 4 + layer.saturating_mul(self.batch / 2) / layers,
            number_type: self.number_type,
            sliding_window: sliding_windows.get(layer).copied().flatten(),
            ..LayerSettings::new(sparsities)
        });
        Ok(settings.collect())
    }

    fn coding(&self, dictionaries: &DictionarySet) -> PyResult<Coding> {
        let format = self.format.unwrap_or(match dictionaries.usual_family() {
            CodeFamily::Additive => Format::Additive,
            CodeFamily::Sparse => Format::Sparse(CoefficientFormat::default()),
        });
        match (format, self.tolerance, self.beam) {
            (Format::Additive, Some(tolerance), _) => {
                let reason = "additive codes all have as many atoms; give format=i8 too";
                Err(refused("tolerance", tolerance, reason))
            }
            (Format::Additive, None, beam) => Ok(Coding::Additive {
                beam_width: beam.unwrap_or(BEAM_WIDTH),
            }),
            (Format::Sparse(_), _, Some(beam)) => {
                let reason = "only the search for additive codes has a beam";
                Err(refused("beam", beam, reason))
            }
            (Format::Sparse(coefficients), tolerance, None) => Ok(Coding::Sparse {
                coefficients,
                tolerance: tolerance.unwrap_or(0.0),
            }),
        }
    }

    fn sparsities(
        &self,
        dictionaries: &DictionarySet,
        family: CodeFamily,
    ) -> PyResult<Vec<LayerSparsities>> {
        let usual = || dictionaries.usual_sparsity(family) as f64;
        let mean = self.sparsity.unwrap_or_else(usual);
        let max = dictionaries.max_sparsity(family);
        if max == 0 {
            let (format, reason) = match family {
                CodeFamily::Additive => (
                    "additive",
                    "these dictionaries have no codebooks; use format=i8",
                ),
                CodeFamily::Sparse => (
                    "i8",
                    "these dictionaries have codebooks alone; use format=additive",
                ),
            };
            return Err(refused("format", format, reason));
        }
        if !(1.0..=max as f64).contains(&mean) {
            return Err(refused(
                "sparsity",
                mean,
                format!("it must be from 1 to {max}"),
            ));
        }
        let by_part = self.key_sparsity.is_some() || self.value_sparsity.is_some();
        if let (Some(_), Some(_), Some(given)) =
            (self.key_sparsity, self.value_sparsity, self.sparsity)
        {
            let reason = "with key-sparsity and value-sparsity it says nothing; leave it out";
            return Err(refused("sparsity", given, reason));
        }
        if self.measured == Some(true) {
            if by_part {
                let reason =
                    "the measured losses decide between keys and values too; give sparsity alone";
                return Err(refused("allocation", "measured", reason));
            }
            if dictionaries.losses(family).is_none() {
                let reason = "these dictionaries were made without measuring losses; `lexico measure` adds them";
                return Err(refused("allocation", "measured", reason));
            }
        }
        if self.measured != Some(false)
            && !by_part
            && let Some(allocated) = dictionaries.allocate(family, mean)
        {
            return Ok(allocated);
        }
        if mean.fract() != 0.0 {
            let reason = "sparsities that are the same for all heads are whole numbers";
            return Err(refused("sparsity", mean, reason));
        }
        let mean = mean as usize;
        let (keys, values) = (
            self.key_sparsity.unwrap_or(mean),
            self.value_sparsity.unwrap_or(mean),
        );
        let each = LayerSparsities::same(dictionaries.model.kv_heads, keys, values);
        Ok(vec![each; dictionaries.model.layers])
    }
}
