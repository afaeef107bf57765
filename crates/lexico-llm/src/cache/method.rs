use std::sync::Arc;

use ::lexico::DictionarySet;

use super::{CacheSpec, KvCache};
use crate::config::Config;
use crate::error::Result;

/// A cache method, as the command line, reports and errors know it.
#[derive(Debug)]
pub struct Method {
    /// Its name.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Whether it needs the model's dictionaries.
    pub needs_dictionaries: bool,
    /// Its options.
    pub options: &'static [MethodOption],
    /// Makes an empty cache.
    pub(super) build: fn(&CacheSpec, &CacheContext<'_>) -> Result<Box<dyn KvCache>>,
    /// Bytes that a cache is expected to hold at the end: its [`Footprint`](super::Footprint)'s total, within a few
    /// per cent.
    pub(super) bytes: fn(&CacheSpec, &CacheContext<'_>, Lengths) -> Result<f64>,
    /// The settings among which a budget chooses, the best first: the first whose bytes it allows is taken.
    pub(super) settings: fn(&CacheContext<'_>, Budget) -> Vec<Setting>,
}

/// An option of a cache method.
#[derive(Debug)]
pub struct MethodOption {
    /// Its name.
    pub name: &'static str,
    /// What it can be.
    pub values: Values,
    /// What it is where it is not given: a value, or in words where another option decides.
    pub default: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
}

/// What an option can be.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// A whole number.
    Count,
    /// A number.
    Number,
    /// One of these words.
    OneOf(&'static [&'static str]),
}

/// Some options of a method and their values.
pub(super) type Setting = Vec<(&'static str, String)>;

/// Positions of a sequence: what a cache's size depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Those of the prompt.
    pub prompt: usize,
    /// All at the end, those of the prompt included.
    pub end: usize,
}

/// Bytes that a cache may hold at the end of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// The bytes.
    pub bytes: f64,
    /// The sequence's positions.
    pub lengths: Lengths,
}

impl Budget {
    /// Positions that would fill it in FP16.
    pub(super) fn fp16_positions(&self, config: &Config) -> usize {
        (self.bytes / config.fp16_cache_bytes(1) as f64) as usize
    }

    /// How many of the newest positions a method that keeps some dense should keep so: a quarter of the budget, as
    /// a power of two from 16 to 128.
    pub(super) fn window(&self, config: &Config) -> usize {
        let quarter = (self.fp16_positions(config) / 4).max(1);
        (1 << quarter.ilog2()).clamp(16, 128)
    }

    /// That window and its halves, down to 16.
    pub(super) fn windows(&self, config: &Config) -> impl Iterator<Item = usize> + use<> {
        std::iter::successors(Some(self.window(config)), |window| Some(window / 2))
            .take_while(|&window| window >= 16)
    }
}

/// What a cache is made for.
#[derive(Clone, Copy)]
pub struct CacheContext<'a> {
    /// The model's name, for messages.
    pub model: &'a str,
    /// The model's shape.
    pub config: &'a Config,
    /// The model's dictionaries, where there are any.
    pub dictionaries: Option<&'a Arc<DictionarySet>>,
}

pub(super) const fn option(
    name: &'static str,
    values: Values,
    default: &'static str,
    summary: &'static str,
) -> MethodOption {
    MethodOption {
        name,
        values,
        default,
        summary,
    }
}

pub(super) const NUMBER_TYPES: Values = Values::OneOf(&["f16", "f32"]);

impl Values {
    /// What is wrong with `value`, if anything is.
    pub(super) fn refuse(&self, value: &str) -> Option<String> {
        match self {
            Values::Count => value
                .parse::<usize>()
                .err()
                .map(|e| format!("{e}; it must be a whole number")),
            Values::Number => value
                .parse::<f32>()
                .err()
                .map(|e| format!("{e}; it must be a number")),
            Values::OneOf(words) => {
                (!words.contains(&value)).then(|| format!("it must be one of {}", words.join(", ")))
            }
        }
    }
}
