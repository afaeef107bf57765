//! A decoder's shape, as a Hugging Face `config.json` gives it.

use std::collections::BTreeMap;
use std::path::Path;

use lexico::dictionary::{ModelIdentity, RotaryIdentity};
use serde::Deserialize;

use crate::error::{Error, Result, io};

/// Architectures that the decoder runs.
const ARCHITECTURES: [&str; 4] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
];
/// Kinds of rotary embedding that the decoder runs.
const ROTARY_KINDS: [&str; 2] = ["default", "llama3"];

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
    /// The rotary embedding.
    pub rotary: Rotary,
    /// Whether queries, keys and values have biases (Qwen 2).
    pub biases: bool,
    /// Whether every query and key head is normalised before rotation (Qwen 3).
    pub head_norms: bool,
    /// Positions that a query sees, its own among them; all where there is none (Mistral 0.1).
    pub window: Option<usize>,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
    /// End-of-text tokens.
    pub end_tokens: Vec<u32>,
}

/// A rotary embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are scaled for long contexts.
    pub scaling: RotaryScaling,
}

/// How a rotary embedding's frequencies are scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// As in Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between
    /// blended.
    Llama3 {
        /// What long wavelengths are divided by.
        factor: f64,
        /// Wavelengths above `original_context / low_frequency_factor` are long.
        low_frequency_factor: f64,
        /// Wavelengths below `original_context / high_frequency_factor` are short.
        high_frequency_factor: f64,
        /// Positions that the model was first trained on.
        original_context: f64,
    },
    /// Each frequency is divided by a factor of its own, `[m / 2]`, as GGUF files have it.
    Factors(Vec<f32>),
}

/// Names and shapes of the weights of a layer.
pub(crate) struct LayerWeights {
    /// Before attention, and before the feed-forward part.
    pub(crate) norms: [(String, usize); 2],
    /// Of every query head, and of every key head, where the family has them.
    pub(crate) head_norms: Option<[(String, usize); 2]>,
    /// Of queries, keys, values and attention's output; gate, up and down.
    pub(crate) linears: [LinearWeights; 7],
}

/// Names and shapes of a matrix, `[out, in]`, and of its bias where the family has one.
pub(crate) struct LinearWeights {
    pub(crate) matrix: (String, [usize; 2]),
    pub(crate) bias: Option<(String, usize)>,
}

impl Rotary {
    /// The frequencies of a head's pairs, `[m / 2]`; in f32 as PyTorch transformers computes them.
    pub(crate) fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / (self.theta as f32).powf(exponent)
        });
        match &self.scaling {
            RotaryScaling::None => plain.collect(),
            RotaryScaling::Factors(factors) => plain.zip(factors).map(|(x, f)| x / f).collect(),
            &RotaryScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_context,
            } => {
                let scaled = |frequency: f32| {
                    let frequency = f64::from(frequency);
                    let wavelengths = original_context * frequency / std::f64::consts::TAU;
                    let kept = ((wavelengths - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - kept) * frequency / factor + kept * frequency) as f32
                };
                plain.map(scaled).collect()
            }
        }
    }

    fn identity(&self) -> RotaryIdentity {
        let mut parameters = BTreeMap::new();
        let kind = match &self.scaling {
            RotaryScaling::None => "default",
            RotaryScaling::Factors(factors) => {
                let named = factors.iter().enumerate();
                parameters.extend(named.map(|(i, &f)| (format!("factor_{i:03}"), f64::from(f))));
                "factors"
            }
            &RotaryScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_context,
            } => {
                parameters.insert("factor".to_owned(), factor);
                parameters.insert("low_freq_factor".to_owned(), low_frequency_factor);
                parameters.insert("high_freq_factor".to_owned(), high_frequency_factor);
                let original = "original_max_position_embeddings";
                parameters.insert(original.to_owned(), original_context);
                "llama3"
            }
        };
        RotaryIdentity {
            kind: kind.to_owned(),
            theta: self.theta,
            parameters,
        }
    }
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
        let (biases, head_norms, window) = match architecture.as_str() {
            "MistralForCausalLM" => (false, false, raw.sliding_window),
            "Qwen2ForCausalLM" => (true, false, None),
            "Qwen3ForCausalLM" => (false, true, None),
            _ => (false, false, None),
        };
        if raw.attention_bias || raw.mlp_bias {
            let reason =
                format!("biases beyond the usual ones of {architecture} are not supported");
            return Err(error(reason));
        }
        if raw.use_sliding_window {
            return Err(error(
                "a sliding window in some layers is not supported".to_owned(),
            ));
        }
        if window == Some(0) {
            return Err(error("sliding_window = 0 is impossible".to_owned()));
        }
        if raw.hidden_act != "silu" {
            return Err(error(format!(
                "activation {:?} is not supported, only \"silu\"",
                raw.hidden_act
            )));
        }
        let rotary = raw.rotary().map_err(error)?;
        let heads = raw.num_attention_heads;
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        // Far above any model, and low enough that no product of sizes overflows.
        const MAX: usize = 1 << 24;
        const MAX_HEADS: usize = 1 << 12;
        for (name, size) in [
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", heads),
        ] {
            if size > MAX_HEADS {
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
            if size == 0 || size > MAX {
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
            ("rope_theta", rotary.theta),
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
            rotary,
            biases,
            head_norms,
            window,
            tied_head: raw.tie_word_embeddings,
            end_tokens: raw.eos_token_id.map_or_else(Vec::new, OneOrMany::list),
        })
    }

    /// Names and shapes of the weights of a layer, or of those outside of the layers.
    pub(crate) fn weights(&self, layer: Option<usize>) -> Vec<(String, Vec<usize>)> {
        let Some(layer) = layer else {
            let table = vec![self.vocabulary, self.hidden];
            let mut weights = vec![
                ("model.embed_tokens.weight".to_owned(), table.clone()),
                ("model.norm.weight".to_owned(), vec![self.hidden]),
            ];
            if !self.tied_head {
                weights.push(("lm_head.weight".to_owned(), table));
            }
            return weights;
        };
        let layer = self.layer_weights(layer);
        let norms = layer
            .norms
            .into_iter()
            .chain(layer.head_norms.into_iter().flatten());
        let mut weights: Vec<_> = norms.map(|(name, length)| (name, vec![length])).collect();
        for LinearWeights { matrix, bias } in layer.linears {
            weights.push((matrix.0, matrix.1.to_vec()));
            weights.extend(bias.map(|(name, length)| (name, vec![length])));
        }
        weights
    }

    pub(crate) fn layer_weights(&self, layer: usize) -> LayerWeights {
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let weight = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let linear = |part: &str, from: usize, to: usize, biased: bool| LinearWeights {
            matrix: (weight(part), [to, from]),
            bias: biased.then(|| (format!("model.layers.{layer}.{part}.bias"), to)),
        };
        let head_norms =
            ["self_attn.q_norm", "self_attn.k_norm"].map(|part| (weight(part), self.head_dim));
        LayerWeights {
            norms: ["input_layernorm", "post_attention_layernorm"]
                .map(|part| (weight(part), hidden)),
            head_norms: self.head_norms.then_some(head_norms),
            linears: [
                linear("self_attn.q_proj", hidden, queries, self.biases),
                linear("self_attn.k_proj", hidden, keys, self.biases),
                linear("self_attn.v_proj", hidden, keys, self.biases),
                linear("self_attn.o_proj", queries, hidden, false),
                linear("mlp.gate_proj", hidden, intermediate, false),
                linear("mlp.up_proj", hidden, intermediate, false),
                linear("mlp.down_proj", intermediate, hidden, false),
            ],
        }
    }

    /// The text of a `config.json`.
    pub(crate) fn to_json(&self) -> String {
        let rotary = self.rotary.identity();
        let mut parameters = serde_json::json!(rotary.parameters);
        parameters["rope_type"] = rotary.kind.into();
        parameters["rope_theta"] = rotary.theta.into();
        let config = serde_json::json!({
            "architectures": [self.architecture], "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context, "rms_norm_eps": self.norm_epsilon,
            "hidden_act": "silu", "tie_word_embeddings": self.tied_head,
            "sliding_window": self.window, "eos_token_id": self.end_tokens,
            "rope_parameters": parameters,
        });
        format!("{config:#}\n")
    }

    /// What a dictionary must agree with to serve this model.
    pub fn identity(&self, name: &str) -> ModelIdentity {
        // One decoder serves both, and GGUF files call both llama.
        let architecture = match self.architecture.as_str() {
            "MistralForCausalLM" => "LlamaForCausalLM",
            other => other,
        };
        ModelIdentity {
            name: name.to_owned(),
            architecture: architecture.to_owned(),
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rotary: self.rotary.identity(),
        }
    }

    /// Bytes of keys and values of `positions` in FP16, no more than a sliding window needs: what
    /// every cache is measured against.
    pub fn fp16_cache_bytes(&self, positions: usize) -> usize {
        let positions = positions.min(self.window.unwrap_or(usize::MAX));
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
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
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
    rope_type: Option<String>,
    /// What older files call `rope_type`; those that a newer transformers wrote again have both.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

impl RawConfig {
    fn rotary(&self) -> std::result::Result<Rotary, String> {
        let nested = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = nested.and_then(|p| p.rope_theta).or(self.rope_theta);
        let kind = match nested.map(|p| (p.rope_type.as_deref(), p.r#type.as_deref())) {
            Some((Some(kind), Some(older))) if kind != older => {
                return Err(format!("rope_type {kind:?} and type {older:?} disagree"));
            }
            Some((kind, older)) => kind.or(older).unwrap_or("default"),
            None => "default",
        };
        let scaling = match (kind, nested) {
            ("default", _) => RotaryScaling::None,
            ("llama3", Some(given)) => {
                let parameter = |name: &str, value: Option<f64>| match value {
                    Some(value) if value > 0.0 && value.is_finite() => Ok(value),
                    Some(value) => Err(format!("{name} = {value} is impossible")),
                    None => Err(format!("a llama3 rotary embedding needs {name}")),
                };
                let low_frequency_factor = parameter("low_freq_factor", given.low_freq_factor)?;
                let high_frequency_factor = parameter("high_freq_factor", given.high_freq_factor)?;
                if low_frequency_factor >= high_frequency_factor {
                    return Err("low_freq_factor must be below high_freq_factor".to_owned());
                }
                RotaryScaling::Llama3 {
                    factor: parameter("factor", given.factor)?,
                    low_frequency_factor,
                    high_frequency_factor,
                    original_context: parameter(
                        "original_max_position_embeddings",
                        given.original_max_position_embeddings,
                    )?,
                }
            }
            _ => {
                let known = ROTARY_KINDS.join(", ");
                return Err(format!(
                    "rotary embedding of type {kind:?} is not supported; these are: {known}"
                ));
            }
        };
        Ok(Rotary {
            // The one default that transformers itself has.
            theta: theta.unwrap_or(10_000.0),
            scaling,
        })
    }
}

/// transformers writes one where there is one, else a list.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "eos_token_id is neither a token nor a list of tokens, or stop_strings neither a text nor a list"
)]
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
        assert_eq!(config(|_| ()).unwrap().rotary.theta, 10_000.0);
        let four = config(|c| c["rope_theta"] = 5e5.into()).unwrap();
        let five = config(|c| {
            c["rope_parameters"] = serde_json::json!({"rope_theta": 5e5, "rope_type": "default"});
        });
        assert_eq!((four.rotary.theta, five.unwrap().rotary.theta), (5e5, 5e5));
    }

    #[test]
    fn both_spellings_of_the_rotary_kind_are_read() {
        let scaling = |rope_scaling| config(|c| c["rope_scaling"] = rope_scaling);
        let parameters = serde_json::json!({
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let named = |names: &[&str]| {
            let mut parameters = parameters.clone();
            for &name in names {
                parameters[name] = "llama3".into();
            }
            scaling(parameters).unwrap().rotary
        };
        let newer = named(&["rope_type"]);
        assert!(matches!(newer.scaling, RotaryScaling::Llama3 { .. }));
        assert_eq!(named(&["type"]), newer);
        assert_eq!(named(&["rope_type", "type"]), newer);
        let two = scaling(serde_json::json!({"rope_type": "default", "type": "llama3"}));
        assert!(two.unwrap_err().to_string().contains("disagree"));
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
