//! A decoder's shape, as a Hugging Face `config.json` gives it.

use std::path::Path;

use lexico::dictionary::{ModelIdentity, RotaryIdentity};
use serde::Deserialize;

use crate::error::{Error, Result, io};

/// Architectures that the decoder runs.
const ARCHITECTURES: [&str; 1] = ["LlamaForCausalLM"];

/// Shape and constants of a decoder of the Llama family.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name of the architecture.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layers.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// `m`.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Positions that the model was made for.
    pub context: usize,
    /// Added to the mean square in RMS norms.
    pub norm_epsilon: f64,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f64,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
    /// End-of-text tokens.
    pub end_tokens: Vec<u32>,
}

impl Config {
    /// Reads the `config.json` of a model folder.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::MissingFile`], and those of [`Config::parse`].
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = String::from_utf8(read_required(folder, "config.json")?);
        let text = text.map_err(|_| Error::Config {
            path: path.clone(),
            reason: "it is not UTF-8 text".to_owned(),
        })?;
        Self::parse(&text, &path)
    }

    /// Parses the text of `config.json`; `path` stands in messages.
    ///
    /// # Errors
    /// [`Error::Config`]: not JSON, an entry missing, an architecture or rotary embedding that is
    /// not known, a shape that is impossible.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let error = |reason: String| Error::Config {
            path: path.to_owned(),
            reason,
        };
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|e| error(format!("not a model's config: {e}")))?;
        let architecture = raw.architectures.first().cloned().unwrap_or_default();
        if !ARCHITECTURES.contains(&architecture.as_str()) {
            return Err(error(format!(
                "architecture {architecture:?} is not supported; these are: {}",
                ARCHITECTURES.join(", ")
            )));
        }
        if raw.attention_bias || raw.mlp_bias {
            return Err(error(
                "biases in a Llama model are not supported".to_owned(),
            ));
        }
        if raw.hidden_act != "silu" {
            return Err(error(format!(
                "activation {:?} is not supported, only \"silu\"",
                raw.hidden_act
            )));
        }
        let rope_theta = raw.rope_theta().map_err(error)?;
        let heads = raw.num_attention_heads;
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        // Far above any model, and low enough that no product of sizes overflows.
        const MOST: usize = 1 << 24;
        const MOST_HEADS: usize = 1 << 12;
        for (name, size) in [
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", heads),
        ] {
            if size > MOST_HEADS {
                return Err(error(format!("{name} = {size} is impossible")));
            }
        }
        let sizes = [
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("vocab_size", raw.vocab_size),
            ("max_position_embeddings", raw.max_position_embeddings),
        ];
        for (name, size) in sizes {
            if size == 0 || size > MOST {
                return Err(error(format!("{name} = {size} is impossible")));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("{heads} attention heads cannot share {kv_heads} KV heads evenly");
            return Err(error(reason));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 14 {
            return Err(error(format!(
                "head_dim = {head_dim} is impossible: it must be even and above 0"
            )));
        }
        for (name, number) in [
            ("rms_norm_eps", raw.rms_norm_eps),
            ("rope_theta", rope_theta),
        ] {
            if !(number > 0.0 && number.is_finite()) {
                return Err(error(format!("{name} = {number} is impossible")));
            }
        }
        Ok(Self {
            architecture,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            vocabulary: raw.vocab_size,
            context: raw.max_position_embeddings,
            norm_epsilon: raw.rms_norm_eps,
            rope_theta,
            tied_head: raw.tie_word_embeddings,
            end_tokens: raw.eos_token_id.map_or_else(Vec::new, OneOrMany::list),
        })
    }

    /// What a dictionary must agree with to serve this model.
    pub fn identity(&self, name: &str) -> ModelIdentity {
        ModelIdentity {
            name: name.to_owned(),
            architecture: self.architecture.clone(),
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rotary: RotaryIdentity {
                kind: "default".to_owned(),
                theta: self.rope_theta,
            },
        }
    }

    /// Bytes of keys and values of `positions` in FP16: what every cache is measured against.
    pub fn fp16_cache_bytes(&self, positions: usize) -> usize {
        4 * self.head_dim * self.kv_heads * self.layers * positions
    }
}

/// Reads a file that a model folder must have.
pub(crate) fn read_required(folder: &Path, file: &str) -> Result<Vec<u8>> {
    if !folder.is_dir() {
        let reason = std::io::Error::new(std::io::ErrorKind::NotFound, "no such model folder");
        return Err(io(folder)(reason));
    }
    let path = folder.join(file);
    if !path.is_file() {
        return Err(Error::MissingFile {
            folder: folder.to_owned(),
            file: file.to_owned(),
            needed: "config.json, tokenizer.json and model.safetensors or its shards",
        });
    }
    std::fs::read(&path).map_err(io(&path))
}

/// What `generation_config.json` says of how texts end.
#[derive(Debug, Default)]
pub(crate) struct GenerationConfig {
    /// These take precedence over the config's.
    pub(crate) end_tokens: Option<Vec<u32>>,
    pub(crate) stop_texts: Vec<String>,
}

impl GenerationConfig {
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Raw {
            eos_token_id: Option<OneOrMany<u32>>,
            stop_strings: Option<OneOrMany<String>>,
        }
        let raw: Raw = serde_json::from_str(text).map_err(|e| Error::Config {
            path: path.to_owned(),
            reason: e.to_string(),
        })?;
        Ok(Self {
            end_tokens: raw.eos_token_id.map(OneOrMany::list),
            stop_texts: raw.stop_strings.map_or_else(Vec::new, OneOrMany::list),
        })
    }
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    eos_token_id: Option<OneOrMany<u32>>,
    /// As transformers 4 writes it.
    rope_theta: Option<f64>,
    /// As transformers 4 writes it.
    rope_scaling: Option<RopeParameters>,
    /// As transformers 5 writes it.
    rope_parameters: Option<RopeParameters>,
}

fn silu() -> String {
    "silu".to_owned()
}

#[derive(Deserialize)]
struct RopeParameters {
    /// `type` in older files.
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

impl RawConfig {
    fn rope_theta(&self) -> std::result::Result<f64, String> {
        let parameters = [&self.rope_parameters, &self.rope_scaling];
        for given in parameters.into_iter().flatten() {
            let kind = given.rope_type.as_deref().unwrap_or("default");
            if kind != "default" {
                return Err(format!(
                    "rotary embedding of type {kind:?} is not supported; these are: \"default\""
                ));
            }
        }
        let nested = self.rope_parameters.as_ref().and_then(|p| p.rope_theta);
        // The one default that transformers itself has for Llama.
        Ok(nested.or(self.rope_theta).unwrap_or(10_000.0))
    }
}

/// transformers writes one where there is one, else a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn list(self) -> Vec<T> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl FnOnce(&mut serde_json::Value)) -> Result<Config> {
        let mut json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
            "vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        });
        change(&mut json);
        Config::parse(&json.to_string(), Path::new("config.json"))
    }

    #[test]
    fn both_spellings_of_the_rotary_base_are_read() {
        assert_eq!(config(|_| ()).unwrap().rope_theta, 10_000.0);
        let four = config(|c| c["rope_theta"] = 5e5.into()).unwrap();
        let five = config(|c| {
            c["rope_parameters"] = serde_json::json!({"rope_theta": 5e5, "rope_type": "default"});
        });
        assert_eq!((four.rope_theta, five.unwrap().rope_theta), (5e5, 5e5));
    }

    #[test]
    fn end_tokens_are_one_or_many() {
        let one = config(|c| c["eos_token_id"] = 7.into()).unwrap();
        let many = config(|c| c["eos_token_id"] = serde_json::json!([7, 8])).unwrap();
        assert_eq!((one.end_tokens, many.end_tokens), (vec![7], vec![7, 8]));
    }

    #[test]
    fn stop_texts_are_one_or_many() {
        let stops = |text| {
            GenerationConfig::parse(text, Path::new("g.json"))
                .unwrap()
                .stop_texts
        };
        assert_eq!(stops(r#"{"stop_strings": "a"}"#), ["a"]);
        assert_eq!(stops(r#"{"stop_strings": ["a", "b"]}"#), ["a", "b"]);
        assert!(stops("{}").is_empty());
    }

    #[test]
    fn what_cannot_run_is_refused_by_name() {
        let refused = |change: fn(&mut serde_json::Value)| config(change).unwrap_err().to_string();
        let cases: [(fn(&mut serde_json::Value), &str); 12] = [
            (
                |c| c["num_hidden_layers"] = (1u64 << 40).into(),
                "num_hidden_layers",
            ),
            (|c| c["vocab_size"] = (1u64 << 60).into(), "vocab_size"),
            (
                |c| c["architectures"] = serde_json::json!(["MambaForCausalLM"]),
                "MambaForCausalLM",
            ),
            (
                |c| c["rope_scaling"] = serde_json::json!({"type": "yarn"}),
                "yarn",
            ),
            (
                |c| c["rope_parameters"] = serde_json::json!({"rope_type": "odd"}),
                "odd",
            ),
            (
                |c| c["num_attention_heads"] = 0.into(),
                "num_attention_heads",
            ),
            (|c| c["num_key_value_heads"] = 3.into(), "3 KV heads"),
            (|c| c["head_dim"] = 7.into(), "head_dim"),
            (|c| c["rms_norm_eps"] = 0.into(), "rms_norm_eps"),
            (|c| c["rope_theta"] = (-1.0).into(), "rope_theta"),
            (|c| c["hidden_act"] = "gelu".into(), "gelu"),
            (|c| c["attention_bias"] = true.into(), "biases"),
        ];
        for (change, word) in cases {
            let message = refused(change);
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    }
}
