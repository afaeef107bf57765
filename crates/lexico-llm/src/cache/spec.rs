use std::fmt;
use std::str::FromStr;

use ::lexico::attention::NumberType;

use super::method::Budget;
use super::stored::{OWN, Own};
use super::{
    CacheBudget, CacheContext, KvCache, Lengths, Method, fp8, full, h2o, kivi, kvarn, lexico,
    llama_cpp, oscar, per_token, pyramidkv, random, snapkv, streaming_llm, turboquant,
    vllm_turboquant, zipcache,
};
use crate::error::{Error, Result};

/// Every cache method there is.
pub static METHODS: &[&Method] = &[
    &lexico::METHOD,
    &full::METHOD,
    &per_token::METHOD,
    &kivi::METHOD,
    &zipcache::METHOD,
    &turboquant::METHOD,
    &vllm_turboquant::METHOD,
    &llama_cpp::METHOD,
    &fp8::METHOD,
    &kvarn::METHOD,
    &oscar::METHOD,
    &streaming_llm::METHOD,
    &snapkv::METHOD,
    &pyramidkv::METHOD,
    &h2o::METHOD,
    &random::METHOD,
];

/// Caches that a comparison of all methods runs beside each method as it is by default: methods of their own in the
/// literature that are an option of another here.
const VARIANTS: &[&str] = &["turboquant:norm=eden"];

/// A cache method and its options, as `NAME[:key=value,…]` gives them.
#[derive(Debug, Clone)]
pub struct CacheSpec {
    method: &'static Method,
    /// Options in the order given.
    options: Vec<(&'static str, String)>,
}

impl CacheSpec {
    /// The method.
    pub fn method(&self) -> &'static Method {
        self.method
    }

    /// Every method as it is by default, and the variants that stand beside them in a comparison of all.
    pub fn all() -> Vec<Self> {
        let methods = METHODS.iter().flat_map(|method| {
            let variant = |text: &&str| text.split(':').next() == Some(method.name);
            let variants = VARIANTS.iter().copied().filter(variant);
            std::iter::once(method.name).chain(variants)
        });
        methods.filter_map(|text| text.parse().ok()).collect()
    }

    /// Name of the method or, where it is one, of the variant that stands beside it: caches of one family differ in size.
    pub fn family(&self) -> &'static str {
        let own = |variant: &&&str| {
            let variant = variant.parse::<Self>();
            variant.is_ok_and(|variant| {
                let mut options = variant.options.iter();
                variant.method.name == self.method.name
                    && options.all(|(name, value)| self.text(name) == value)
            })
        };
        let variant = VARIANTS.iter().find(own);
        variant.unwrap_or(&self.method.name)
    }

    /// Returns true where new positions attend to each other as they are while a prompt is read, so that the model computes
    /// the same of the prompt as with every other such cache.
    pub fn exact_prompts(&self) -> bool {
        let mut options = self.method.options.iter();
        !options.any(|own| own.summary == OWN.summary) || Own::of(self) == Own::Exact
    }

    /// These options and one more.
    ///
    /// # Errors
    /// [`Error::UnknownOption`] and [`Error::OptionValue`], also for one that is there.
    pub fn with(&self, option: &str, value: &str) -> Result<Self> {
        let between = if self.options.is_empty() { ':' } else { ',' };
        format!("{self}{between}{option}={value}").parse()
    }

    /// Makes an empty cache.
    ///
    /// # Errors
    /// [`Error::OptionValue`], [`Error::NoDictionary`], and what the method itself refuses.
    pub fn build(&self, context: &CacheContext<'_>) -> Result<Box<dyn KvCache>> {
        (self.method.build)(self, context)
    }

    /// Bytes that a cache is expected to hold at the end of a sequence.
    ///
    /// # Errors
    /// Those of [`CacheSpec::build`].
    pub fn expected_bytes(&self, context: &CacheContext<'_>, lengths: Lengths) -> Result<f64> {
        (self.method.bytes)(self, context, lengths)
    }

    /// Adds to these options the best others of those that the method leaves to a budget, so that caches of sequences of
    /// these `lengths` are expected to keep to it on average. Nothing is added where none are left open.
    ///
    /// # Errors
    /// [`Error::Budget`] where the method cannot be made as small; those of [`CacheSpec::build`].
    pub fn within(
        &self,
        budget: CacheBudget,
        lengths: &[Lengths],
        context: &CacheContext<'_>,
    ) -> Result<Self> {
        // Enough lengths, evenly over all.
        const MAX: usize = 24;
        let count = lengths.len().clamp(1, MAX);
        let nth = |i| lengths.get(i * lengths.len() / count).copied();
        let sample: Vec<Lengths> = (0..count).filter_map(nth).collect();
        let sampled = sample.len().max(1) as f64;
        let fp16 = |lengths: Lengths| context.config.fp16_cache_bytes(lengths.end) as f64;
        let mean_fp16 = (sample.iter().map(|&l| fp16(l)).sum::<f64>() / sampled).max(1.0);
        let allowed = match budget {
            CacheBudget::Share(share) => share,
            CacheBudget::Bytes(bytes) => bytes / mean_fp16,
        };
        let over = |lengths: Lengths| match budget {
            CacheBudget::Share(_) => fp16(lengths).max(1.0),
            CacheBudget::Bytes(_) => mean_fp16,
        };
        let share = |spec: &Self| -> Result<f64> {
            let shares = sample.iter();
            let shares = shares.map(|&l| Ok(spec.expected_bytes(context, l)? / over(l)));
            Ok(shares.sum::<Result<f64>>()? / sampled)
        };
        let of_mean = Budget {
            bytes: allowed * mean_fp16,
        };
        let mut smallest: Option<(f64, Self)> = None;
        let mut refused = None;
        for setting in (self.method.settings)(self, context, of_mean) {
            let open = setting.into_iter();
            let open = open.filter(|(name, _)| self.given(name).is_none());
            let open: Vec<_> = open.collect();
            if open.is_empty() {
                return Ok(self.clone());
            }
            let mut spec = self.clone();
            spec.options.extend(open);
            let own = match share(&spec) {
                Ok(own) => own,
                // What is given may not go with every setting.
                Err(error) => {
                    refused.get_or_insert(error);
                    continue;
                }
            };
            if own <= allowed {
                return Ok(spec);
            }
            if smallest.as_ref().is_none_or(|(least, _)| own < *least) {
                smallest = Some((own, spec));
            }
        }
        let Some((own, spec)) = smallest else {
            return refused.map_or_else(|| Ok(self.clone()), Err);
        };
        Err(Error::Budget {
            spec: self.to_string(),
            share: 100.0 * allowed,
            smallest: spec.to_string(),
            smallest_share: 100.0 * own,
        })
    }

    /// Returns true where both make the same caches, whatever is left to defaults and however it is written.
    pub fn same_as(&self, other: &Self) -> bool {
        let text = |spec: &Self, name: &str| {
            let text = spec.text(name);
            text.parse::<f64>()
                .map_or_else(|_| text.to_owned(), |number| number.to_string())
        };
        let mut options = self.method.options.iter();
        self.method.name == other.method.name
            && options.all(|o| text(self, o.name) == text(other, o.name))
    }

    /// Value given for an option; `None` where it was left out.
    pub fn given(&self, option: &str) -> Option<&str> {
        let given = self.options.iter().find(|(name, _)| *name == option);
        given.map(|(_, value)| value.as_str())
    }

    /// Value of an option, or its default.
    pub(super) fn text(&self, option: &str) -> &str {
        let default = || self.method.options.iter().find(|o| o.name == option);
        self.given(option)
            .unwrap_or_else(|| default().map_or("", |o| o.default))
    }

    pub(super) fn number<T: FromStr<Err: fmt::Display>>(&self, option: &'static str) -> Result<T> {
        let number = self.text(option).parse();
        number.map_err(|e: T::Err| self.refused(option, e.to_string()))
    }

    /// Whole number that is at least 1.
    pub(super) fn positive(&self, option: &'static str) -> Result<usize> {
        match self.number(option)? {
            0 => Err(self.refused(option, "it must be 1 or more")),
            number => Ok(number),
        }
    }

    /// Error that an option's value cannot be used.
    pub(super) fn refused(&self, option: &'static str, reason: impl Into<String>) -> Error {
        Error::OptionValue {
            method: self.method.name,
            option,
            value: self.text(option).to_owned(),
            reason: reason.into(),
        }
    }

    pub(super) fn number_type(&self, option: &str) -> NumberType {
        match self.text(option) {
            "f32" => NumberType::F32,
            _ => NumberType::F16,
        }
    }
}

impl Default for CacheSpec {
    /// The method `lexico`, all options left to their defaults.
    fn default() -> Self {
        let (method, options) = (&lexico::METHOD, Vec::new());
        Self { method, options }
    }
}

impl FromStr for CacheSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let Some(&method) = METHODS.iter().find(|m| m.name == name) else {
            let names: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
            return Err(Error::UnknownMethod {
                name: name.to_owned(),
                known: names.join(", "),
            });
        };
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
            let value = option.current(value);
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
    use super::*;

    #[test]
    fn specs_read_and_print_alike() {
        for text in ["full", "lexico:sparsity=12,window=16", "full:dense=f32"] {
            assert_eq!(text.parse::<CacheSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn former_values_are_read_and_print_as_they_are_called_now() {
        let spec: CacheSpec = "turboquant:norm=corrected,bits=3".parse().unwrap();
        assert_eq!(spec.to_string(), "turboquant:norm=eden,bits=3");
        assert!(spec.same_as(&"turboquant:bits=3,norm=eden".parse().unwrap()));
    }

    /// TurboQuant with and without EDEN's scale are two rows and two curves.
    #[test]
    fn variants_stand_beside_their_methods() {
        let all: Vec<String> = CacheSpec::all().iter().map(ToString::to_string).collect();
        assert_eq!(all.len(), METHODS.len() + VARIANTS.len());
        let at = all.iter().position(|name| name == "turboquant").unwrap();
        assert_eq!(all[at + 1], "turboquant:norm=eden");
        for (text, family) in [
            ("turboquant:bits=2", "turboquant"),
            ("turboquant:norm=kept", "turboquant"),
            ("turboquant:bits=2,norm=corrected", "turboquant:norm=eden"),
            ("lexico:format=i8", "lexico"),
        ] {
            assert_eq!(text.parse::<CacheSpec>().unwrap().family(), family);
        }
    }

    /// Defaults are written once, as text: what is not in words must be a value.
    #[test]
    fn defaults_are_values_or_words() {
        for option in METHODS.iter().flat_map(|m| m.options) {
            let words = [
                "as trained",
                "sparsity",
                "measured, where it was",
                "additive, where there are codebooks",
                "none",
            ];
            assert_ne!(option.summary, "", "{option:?}");
            let words = words.contains(&option.default);
            assert!(
                words || option.values.refuse(option.default).is_none(),
                "{option:?}"
            );
        }
    }
}
