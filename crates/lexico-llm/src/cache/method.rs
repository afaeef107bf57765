use std::fmt;
use std::num::{ParseFloatError, ParseIntError};
use std::str::FromStr;
use std::sync::Arc;

use ::lexico::{DictionarySet, parse_size};
use candle_core::Device;

use super::{CacheSpec, Calibration, KvCache};
use crate::config::Config;
use crate::error::Result;

/// Cache method as the command line, reports and errors know it.
#[derive(Debug)]
pub struct Method {
    /// Name.
    pub name: &'static str,
    /// Summary of what it does, in a line.
    pub summary: &'static str,
    /// True where it needs the model's dictionaries.
    pub needs_dictionaries: bool,
    /// True where its caches can be saved, those in the processor's memory.
    pub saves: bool,
    /// Options.
    pub options: &'static [MethodOption],
    /// Makes an empty cache.
    pub(super) build: fn(&CacheSpec, &CacheContext<'_>) -> Result<Box<dyn KvCache>>,
    /// Bytes that a cache is expected to hold at the end: its [`Footprint`](super::Footprint)'s total, within a few
    /// per cent.
    pub(super) bytes: fn(&CacheSpec, &CacheContext<'_>, Lengths) -> Result<f64>,
    /// The settings among which a budget chooses, the best first: the first whose bytes it allows is taken.
    pub(super) settings: fn(&CacheSpec, &CacheContext<'_>, Budget) -> Vec<Setting>,
}

/// An option of a cache method.
#[derive(Debug)]
pub struct MethodOption {
    /// Name.
    pub name: &'static str,
    /// Values that it can have.
    pub values: Values,
    /// Default: a value, or words where another option decides.
    pub default: &'static str,
    /// Summary of what it does, in a line.
    pub summary: &'static str,
    /// Former names of values, each with the name that it has now.
    pub(super) aliases: &'static [(&'static str, &'static str)],
}

impl MethodOption {
    /// Returns the same option, of which help says this.
    pub(super) const fn about(self, summary: &'static str) -> Self {
        Self { summary, ..self }
    }

    /// Returns the same option, whose values have had other names: pairs of a former name and the name now.
    pub(super) const fn with_aliases(
        self,
        aliases: &'static [(&'static str, &'static str)],
    ) -> Self {
        Self { aliases, ..self }
    }

    /// Returns a value by the name that it has now.
    pub(super) fn current<'v>(&self, value: &'v str) -> &'v str {
        let alias = self.aliases.iter().find(|(former, _)| *former == value);
        alias.map_or(value, |(_, now)| now)
    }
}

/// Values that an option can have.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// Whole numbers.
    Count,
    /// Numbers.
    Number,
    /// Sizes in bytes, as 64MiB.
    Size,
    /// One of these words.
    OneOf(&'static [&'static str]),
}

/// Some options of a method and their values.
pub(super) type Setting = Vec<(&'static str, String)>;

/// Positions of a sequence: what a cache's size depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Positions of the prompt.
    pub prompt: usize,
    /// Positions at the end, those of the prompt included.
    pub end: usize,
}

/// Size that a cache may have at the end of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CacheBudget {
    /// Share of FP16's bytes.
    Share(f64),
    /// Bytes.
    Bytes(f64),
}

impl fmt::Display for CacheBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without what only rounding has added.
        let round = |x: f64| (x * 1e6).round() / 1e6;
        match *self {
            CacheBudget::Share(share) => write!(f, "{}%", round(100.0 * share)),
            CacheBudget::Bytes(bytes) if bytes < 1024.0 => write!(f, "{}B", round(bytes)),
            CacheBudget::Bytes(bytes) => write!(f, "{}KiB", round(bytes / 1024.0)),
        }
    }
}

impl FromStr for CacheBudget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let share = text.strip_suffix('%');
        let share = share.and_then(|text| text.trim().parse::<f64>().ok());
        match (share.map(|percent| percent / 100.0), parse_size(text)) {
            (Some(share), _) if share > 0.0 && share <= 1.0 => Ok(CacheBudget::Share(share)),
            (None, Some(bytes)) => Ok(CacheBudget::Bytes(bytes)),
            _ => Err("a budget is a share of FP16, as 20%, or a size, as 64MiB".to_owned()),
        }
    }
}

/// Bytes allowed for a sequence of mean length, for which a method chooses settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Budget {
    pub(super) bytes: f64,
}

impl Budget {
    /// Positions that would fill it in FP16.
    pub(super) fn fp16_positions(&self, config: &Config) -> usize {
        (self.bytes / config.fp16_cache_bytes(1) as f64) as usize
    }

    /// Recent window that a method should keep dense: a quarter of the budget, as a power of two from 16 to 128, whatever
    /// the method's default.
    pub(super) fn window(&self, config: &Config) -> usize {
        let quarter = (self.fp16_positions(config) / 4).max(1);
        (1 << quarter.ilog2()).clamp(16, 128)
    }

    /// Recent window and its halves, down to 16.
    pub(super) fn windows(&self, config: &Config) -> impl Iterator<Item = usize> + use<> {
        std::iter::successors(Some(self.window(config)), |window| Some(window / 2))
            .take_while(|&window| window >= 16)
    }
}

/// Model that a cache is made for.
#[derive(Clone, Copy)]
pub struct CacheContext<'a> {
    /// The model's name, for messages.
    pub model: &'a str,
    /// The model's shape.
    pub config: &'a Config,
    /// The model's dictionaries, where there are any.
    pub dictionaries: Option<&'a Arc<DictionarySet>>,
    /// What was found out about the model on a text, where it was: for methods that calibrate.
    pub calibration: Option<&'a Calibration>,
    /// Device on which the model computes. Methods that have kernels for it hold their cache there; others in the processor's
    /// memory.
    pub device: &'a Device,
}

/// An option of this name, without a summary yet.
pub(super) const fn option(
    name: &'static str,
    values: Values,
    default: &'static str,
) -> MethodOption {
    MethodOption {
        name,
        values,
        default,
        summary: "",
        aliases: &[],
    }
}

pub(super) const NUMBER_TYPES: Values = Values::OneOf(&["f16", "f32"]);

impl Values {
    /// Returns what is wrong with `value`, if anything is.
    pub(super) fn refuse(&self, value: &str) -> Option<String> {
        let count = |e: ParseIntError| format!("{e}; it must be a whole number");
        let number = |e: ParseFloatError| format!("{e}; it must be a number");
        match self {
            Values::Count => value.parse::<usize>().err().map(count),
            Values::Number => value.parse::<f32>().err().map(number),
            Values::Size if parse_size(value).is_some() => None,
            Values::Size => Some("it must be a size, as 64MiB or 2GiB".to_owned()),
            Values::OneOf(words) if words.contains(&value) => None,
            Values::OneOf(words) => Some(format!("it must be one of {}", words.join(", "))),
        }
    }
}
