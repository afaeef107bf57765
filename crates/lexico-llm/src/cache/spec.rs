use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ::lexico::attention::NumberType;
use ::lexico::dictionary::LayerSparsities;
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
    /// Whether it needs the model's dictionaries.
    pub needs_dictionaries: bool,
    /// Its options.
    pub options: &'static [MethodOption],
    build: fn(&CacheSpec, &CacheContext<'_>) -> Result<Box<dyn KvCache>>,
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

const fn option(
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

const NUMBER_TYPES: Values = Values::OneOf(&["f16", "f32"]);

/// Every cache method there is.
pub static METHODS: &[Method] = &[
    Method {
        name: "lexico",
        summary: "sparse codes over the model's dictionaries, the newest positions dense",
        needs_dictionaries: true,
        options: &[
            option(
                "sparsity",
                Values::Number,
                "as trained",
                "nonzeros of keys and values, on average",
            ),
            option(
                "key-sparsity",
                Values::Count,
                "sparsity",
                "nonzeros of a key",
            ),
            option(
                "value-sparsity",
                Values::Count,
                "sparsity",
                "nonzeros of a value",
            ),
            option(
                "allocation",
                Values::OneOf(&["measured", "same"]),
                "measured, where it was",
                "which heads get the nonzeros",
            ),
            option(
                "tolerance",
                Values::Number,
                "0",
                "relative error that needs no more nonzeros",
            ),
            option(
                "fit",
                Values::OneOf(&["unbiased", "least-squares"]),
                "unbiased",
                "coefficients that keep scores, or vectors, nearest",
            ),
            option(
                "adaptive",
                Values::Count,
                "0",
                "atoms that a session may add to each dictionary for vectors that miss the tolerance",
            ),
            option(
                "window",
                Values::Count,
                "128",
                "newest positions, kept dense",
            ),
            option(
                "batch",
                Values::Count,
                "16",
                "positions that leave the window at once",
            ),
            option(
                "coefficients",
                Values::OneOf(&["i8", "f8", "f32"]),
                "i8",
                "numbers of the codes",
            ),
            option("dense", NUMBER_TYPES, "f16", "numbers of the window"),
        ],
        build: |spec, context| {
            let Some(dictionaries) = context.dictionaries else {
                return Err(Error::NoDictionary {
                    method: "lexico",
                    model: context.model.to_owned(),
                });
            };
            let settings = LexicoSettings {
                sparsities: sparsities(spec, context, dictionaries)?,
                tolerance: spec.number("tolerance")?,
                unbiased: spec.text("fit") == "unbiased",
                adaptive: spec.number("adaptive")?,
                window: spec.number("window")?,
                batch: spec.number("batch")?,
                coefficients: match spec.text("coefficients") {
                    "f32" => CoefficientFormat::F32,
                    "f8" => CoefficientFormat::F8,
                    _ => CoefficientFormat::I8,
                },
                dense: spec.number_type("dense"),
            };
            let cache = LexicoCache::new(context.config, dictionaries.clone(), settings)?;
            Ok(Box::new(cache))
        },
    },
    Method {
        name: "full",
        summary: "every key and value dense",
        needs_dictionaries: false,
        options: &[option("dense", NUMBER_TYPES, "f16", "numbers")],
        build: |spec, context| {
            let number_type = spec.number_type("dense");
            Ok(Box::new(FullCache::new(context.config, number_type)))
        },
    },
];

/// The sparsities of every layer and head that the options ask for.
fn sparsities(
    spec: &CacheSpec,
    context: &CacheContext<'_>,
    dictionaries: &DictionarySet,
) -> Result<Vec<LayerSparsities>> {
    let refused = |option: &'static str, reason: &str| Error::OptionValue {
        method: "lexico",
        option,
        value: spec.text(option).to_owned(),
        reason: reason.to_owned(),
    };
    let mean: f64 = match spec.given("sparsity") {
        Some(_) => spec.number("sparsity")?,
        None => dictionaries.training.sparsity as f64,
    };
    let most = dictionaries.most_nonzeros();
    if !(1.0..=most as f64).contains(&mean) {
        let reason =
            format!("it must be from 1 to {most}, the head dim or the atoms of a dictionary");
        return Err(refused("sparsity", &reason));
    }
    let part = |option| match spec.given(option) {
        Some(_) => spec.number(option).map(Some),
        None => Ok(None),
    };
    let (keys, values) = (part("key-sparsity")?, part("value-sparsity")?);
    let by_part = keys.is_some() || values.is_some();
    let losses = dictionaries.training.losses.as_ref();
    let allocated = match spec.given("allocation") {
        Some("measured") if by_part => {
            let reason =
                "the measured losses decide between keys and values too; give sparsity alone";
            return Err(refused("allocation", reason));
        }
        Some("measured") if losses.is_none() => {
            let reason =
                "these dictionaries were made without measuring losses; `lexico measure` adds them";
            return Err(refused("allocation", reason));
        }
        Some("same") => None,
        _ if by_part => None,
        _ => dictionaries.allocate(mean),
    };
    if let Some(allocated) = allocated {
        return Ok(allocated);
    }
    if mean.fract() != 0.0 {
        let reason = "sparsities that are the same for all heads are whole numbers";
        return Err(refused("sparsity", reason));
    }
    let mean = mean as usize;
    let (keys, values) = (keys.unwrap_or(mean), values.unwrap_or(mean));
    let each = LayerSparsities::same(context.config.kv_heads, keys, values);
    Ok(vec![each; context.config.layers])
}

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

    /// An option's value, or its default.
    fn text(&self, option: &str) -> &str {
        let default = || self.method.options.iter().find(|o| o.name == option);
        self.given(option)
            .unwrap_or_else(|| default().map_or("", |o| o.default))
    }

    fn number<T: FromStr<Err: fmt::Display>>(&self, option: &'static str) -> Result<T> {
        let value = self.text(option);
        value.parse().map_err(|e: T::Err| Error::OptionValue {
            method: self.method.name,
            option,
            value: value.to_owned(),
            reason: e.to_string(),
        })
    }

    fn number_type(&self, option: &str) -> NumberType {
        match self.text(option) {
            "f32" => NumberType::F32,
            _ => NumberType::F16,
        }
    }
}

impl Values {
    /// What is wrong with `value`, if anything is.
    fn refuse(&self, value: &str) -> Option<String> {
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
            let refused = |reason: String| Error::OptionValue {
                method: method.name,
                option: option.name,
                value: value.to_owned(),
                reason,
            };
            if value.is_empty() {
                return Err(refused("an option is written key=value".to_owned()));
            }
            if let Some(reason) = option.values.refuse(value) {
                return Err(refused(reason));
            }
            if options.iter().any(|(name, _)| *name == option.name) {
                return Err(refused("it is given twice".to_owned()));
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
    use ::lexico::dictionary::{CodingLosses, LayerLosses};

    use super::*;

    #[test]
    fn specs_read_and_print_alike() {
        for text in ["full", "lexico:sparsity=12,window=16", "full:dense=f32"] {
            assert_eq!(text.parse::<CacheSpec>().unwrap().to_string(), text);
        }
    }

    /// Defaults are written once, as text: what is not in words must be a value.
    #[test]
    fn defaults_are_values_or_words() {
        for option in METHODS.iter().flat_map(|m| m.options) {
            let words =
                ["as trained", "sparsity", "measured, where it was"].contains(&option.default);
            assert!(
                words || option.values.refuse(option.default).is_none(),
                "{option:?}"
            );
        }
    }

    /// The mean sparsity of all heads that a spec asks for, or what it is refused with.
    fn mean(text: &str, losses: Option<&CodingLosses>) -> std::result::Result<f64, String> {
        let model = crate::Model::tiny().unwrap();
        let config = model.decoder.config();
        let mut dictionaries = (**model.dictionaries.as_ref().unwrap()).clone();
        dictionaries.training.losses = losses.cloned();
        dictionaries.training.sparsity = 6;
        let dictionaries = Arc::new(dictionaries);
        let context = CacheContext {
            model: "tiny",
            config,
            dictionaries: Some(&dictionaries),
        };
        let spec: CacheSpec = text.parse().unwrap();
        spec.build(&context).map_err(|e| e.to_string())?;
        let layers = sparsities(&spec, &context, &dictionaries).unwrap();
        let heads = layers.iter().flat_map(|l| l.keys.iter().chain(&l.values));
        let count = 2 * config.layers * config.kv_heads;
        Ok(heads.sum::<usize>() as f64 / count as f64)
    }

    #[test]
    fn sparsities_follow_the_losses_where_there_are_any() {
        let layer = LayerLosses {
            keys: vec![vec![1.0, 0.1], vec![0.1, 0.01]],
            values: vec![vec![0.1, 0.001], vec![0.001, 0.0001]],
        };
        let losses = CodingLosses {
            sparsities: vec![2, 8],
            layers: vec![layer; 4],
        };
        let some = Some(&losses);
        for (text, losses, expected) in [
            ("lexico", None, 6.0),
            ("lexico", some, 6.0),
            ("lexico:sparsity=7.25", some, 7.25),
            ("lexico:sparsity=7,allocation=measured", some, 7.0),
            ("lexico:sparsity=7,allocation=same", some, 7.0),
            ("lexico:key-sparsity=9,value-sparsity=4", some, 6.5),
            ("lexico:value-sparsity=4", some, 5.0),
            ("lexico:sparsity=40.5", some, 40.5),
            ("lexico:sparsity=64", some, 64.0),
        ] {
            assert_eq!(mean(text, losses), Ok(expected), "{text}");
        }
        for (text, losses, words) in [
            ("lexico:sparsity=7.25", None, "whole"),
            ("lexico:sparsity=7.25,allocation=same", some, "whole"),
            ("lexico:allocation=measured", None, "lexico measure"),
            ("lexico:allocation=measured,key-sparsity=3", some, "alone"),
            ("lexico:sparsity=0.5", some, "from 1"),
            ("lexico:sparsity=NaN", some, "from 1"),
            ("lexico:sparsity=65", some, "64"),
            ("lexico:key-sparsity=0", some, "sparsity"),
        ] {
            let refused = mean(text, losses).unwrap_err();
            assert!(refused.contains(words), "{text}: {refused}");
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
            ("full:dense=f64", vec!["dense=f64", "f16, f32"]),
            ("lexico:sparsity=many", vec!["sparsity=many", "number"]),
            ("lexico:window=-1", vec!["window=-1", "whole number"]),
            ("lexico:tolerance=x", vec!["tolerance=x", "number"]),
        ] {
            let message = refused(text);
            assert!(
                words.iter().all(|w| message.contains(w)),
                "{text}: {message}"
            );
        }
    }
}
