use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ::lexico::attention::NumberType;
use ::lexico::{CoefficientFormat, DictionarySet};

use super::{FullCache, KvCache, LexicoCache, LexicoSettings};
use crate::config::Config;
use crate::error::{Error, Result};

/// A cache method, as the command line, reports and errors know it.
#[derive(Debug)]
pub struct Method {
    /// Its name.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Its options.
    pub options: &'static [MethodOption],
    build: fn(&CacheSpec, &CacheContext<'_>) -> Result<Box<dyn KvCache>>,
}

/// An option of a cache method.
#[derive(Debug)]
pub struct MethodOption {
    /// Its name.
    pub name: &'static str,
    /// What it is where it is not given.
    pub default: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
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

const fn option(name: &'static str, default: &'static str, summary: &'static str) -> MethodOption {
    MethodOption {
        name,
        default,
        summary,
    }
}

/// Every cache method there is.
pub static METHODS: &[Method] = &[
    Method {
        name: "lexico",
        summary: "sparse codes over the model's dictionaries, the newest positions dense",
        options: &[
            option("sparsity", "as trained", "nonzeros of a key and of a value"),
            option("key-sparsity", "sparsity", "nonzeros of a key"),
            option("value-sparsity", "sparsity", "nonzeros of a value"),
            option(
                "tolerance",
                "0",
                "relative error at which a vector needs no more nonzeros",
            ),
            option("window", "128", "newest positions, kept dense"),
            option("batch", "16", "positions that leave the window at once"),
            option("coefficients", "f8", "f8 or f32"),
            option("dense", "f16", "numbers of the window: f16 or f32"),
        ],
        build: |spec, context| {
            let Some(dictionaries) = context.dictionaries else {
                return Err(Error::NoDictionary {
                    model: context.model.to_owned(),
                });
            };
            let sparsity = spec.number("sparsity", dictionaries.training.sparsity)?;
            let settings = LexicoSettings {
                key_sparsity: spec.number("key-sparsity", sparsity)?,
                value_sparsity: spec.number("value-sparsity", sparsity)?,
                tolerance: spec.number("tolerance", 0.0)?,
                window: spec.number("window", 128)?,
                batch: spec.number("batch", 16)?,
                coefficients: match spec.one_of("coefficients", &["f8", "f32"])? {
                    "f32" => CoefficientFormat::F32,
                    _ => CoefficientFormat::F8,
                },
                dense: spec.number_type("dense")?,
            };
            let cache = LexicoCache::new(context.config, dictionaries.clone(), settings)?;
            Ok(Box::new(cache))
        },
    },
    Method {
        name: "full",
        summary: "every key and value dense",
        options: &[option("dense", "f16", "numbers: f16 or f32")],
        build: |spec, context| {
            let number_type = spec.number_type("dense")?;
            Ok(Box::new(FullCache::new(context.config, number_type)))
        },
    },
];

/// A cache method and its options, as `NAME[:key=value,…]` gives them.
#[derive(Debug, Clone)]
pub struct CacheSpec {
    method: &'static Method,
    /// In the order given.
    options: Vec<(&'static str, String)>,
}

impl CacheSpec {
    /// The method.
    pub fn method(&self) -> &'static Method {
        self.method
    }

    /// Makes an empty cache.
    ///
    /// # Errors
    /// [`Error::OptionValue`], [`Error::NoDictionary`], and what the method itself refuses.
    pub fn build(&self, context: &CacheContext<'_>) -> Result<Box<dyn KvCache>> {
        (self.method.build)(self, context)
    }

    fn given(&self, option: &str) -> Option<&str> {
        let given = self.options.iter().find(|(name, _)| *name == option);
        given.map(|(_, value)| value.as_str())
    }

    fn number<T: FromStr<Err: fmt::Display>>(&self, option: &'static str, default: T) -> Result<T> {
        self.given(option).map_or(Ok(default), |value| {
            value
                .parse()
                .map_err(|e: T::Err| self.bad_value(option, value, e.to_string()))
        })
    }

    /// The first choice is the default.
    fn one_of(&self, option: &'static str, choices: &[&'static str]) -> Result<&'static str> {
        let Some(value) = self.given(option) else {
            return Ok(choices[0]);
        };
        let chosen = choices.iter().find(|choice| **choice == value);
        chosen.copied().ok_or_else(|| {
            let reason = format!("it must be one of {}", choices.join(", "));
            self.bad_value(option, value, reason)
        })
    }

    fn number_type(&self, option: &'static str) -> Result<NumberType> {
        Ok(match self.one_of(option, &["f16", "f32"])? {
            "f32" => NumberType::F32,
            _ => NumberType::F16,
        })
    }

    fn bad_value(&self, option: &'static str, value: &str, reason: String) -> Error {
        Error::OptionValue {
            method: self.method.name,
            option,
            value: value.to_owned(),
            reason,
        }
    }
}

impl FromStr for CacheSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let method = METHODS.iter().find(|m| m.name == name).ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
            Error::UnknownMethod {
                name: name.to_owned(),
                known: names.join(", "),
            }
        })?;
        let mut options: Vec<(&'static str, String)> = Vec::new();
        for pair in rest.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let Some(option) = method.options.iter().find(|o| o.name == key) else {
                let names: Vec<&str> = method.options.iter().map(|o| o.name).collect();
                return Err(Error::UnknownOption {
                    method: method.name,
                    option: key.to_owned(),
                    known: format!("its options are: {}", names.join(", ")),
                });
            };
            let refused = |reason: &str| Error::OptionValue {
                method: method.name,
                option: option.name,
                value: value.to_owned(),
                reason: reason.to_owned(),
            };
            if value.is_empty() {
                return Err(refused("an option is written key=value"));
            }
            if options.iter().any(|(name, _)| *name == option.name) {
                return Err(refused("it is given twice"));
            }
            options.push((option.name, value.to_owned()));
        }
        Ok(Self { method, options })
    }
}

impl fmt::Display for CacheSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.method.name)?;
        for (i, (key, value)) in self.options.iter().enumerate() {
            let separator = if i == 0 { ':' } else { ',' };
            write!(f, "{separator}{key}={value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_read_and_print_alike() {
        for text in ["full", "lexico:sparsity=12,window=16", "full:dense=f32"] {
            assert_eq!(text.parse::<CacheSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_unknown_is_named_with_what_there_is() {
        let refused = |text: &str| text.parse::<CacheSpec>().unwrap_err().to_string();
        for (text, words) in [
            ("kivvy", vec!["kivvy", "lexico", "full"]),
            ("", vec!["\"\"", "lexico"]),
            ("lexico:sparsty=3", vec!["sparsty", "sparsity", "window"]),
            ("full:dense", vec!["key=value"]),
            ("full:dense=f16,dense=f32", vec!["twice"]),
        ] {
            let message = refused(text);
            assert!(
                words.iter().all(|w| message.contains(w)),
                "{text}: {message}"
            );
        }
    }
}
