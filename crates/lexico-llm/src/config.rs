//! A decoder's shape, as a Hugging Face `config.json` gives it.

use std::collections::BTreeMap;
use std::path::Path;

use lexico::dictionary::{ModelIdentity, RotaryIdentity};
use serde::Deserialize;

use crate::error::{Error, Result, io, refused};

/// Architectures that the decoder runs: [`Config::biases`] and [`Config::head_norms`] of each.
const ARCHITECTURES: [(&str, bool, bool); 4] = [
    ("LlamaForCausalLM", false, false),
    ("MistralForCausalLM", false, false),
    ("Qwen2ForCausalLM", true, false),
    ("Qwen3ForCausalLM", false, true),
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
    /// True where queries, keys and values have biases (Qwen 2).
    pub biases: bool,
    /// True where every query and key head is normalised before rotation (Qwen 3).
    pub head_norms: bool,
    /// Positions that a query sees, its own among them; all where there is none (Mistral 0.1).
    pub window: Option<usize>,
    /// True where the output head is the embedding.
    pub tied_head: bool,
    /// End-of-text tokens.
    pub end_tokens: Vec<u32>,
}

/// A rotary embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of frequencies for long contexts.
    pub scaling: RotaryScaling,
}

/// Scaling of a rotary embedding's frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// Scaling of Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between
    /// blended.
    Llama3(Llama3Scaling),
    /// Each frequency is divided by a factor of its own, `[m / 2]`, as GGUF files have it.
    Factors(Vec<f32>),
}

/// Constants of [`RotaryScaling::Llama3`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Divisor of long wavelengths.
    pub factor: f64,
    /// Wavelengths above `original_context / low_frequency_factor` are long.
    pub low_frequency_factor: f64,
    /// Wavelengths below `original_context / high_frequency_factor` are short.
    pub high_frequency_factor: f64,
    /// Positions that the model was first trained on.
    pub original_context: f64,
}

/// Name and shape of a weight: `[out, in]` of a matrix.
pub(crate) type Weight = (String, Vec<usize>);

/// The weights of a layer.
pub(crate) struct LayerWeights {
    /// Norms before attention, and before the feed-forward part.
    pub(crate) norms: [Weight; 2],
    /// Norms of every query head, and of every key head, where the family has them.
    pub(crate) head_norms: Option<[Weight; 2]>,
    /// Matrices of queries, keys, values and attention's output; gate, up and down; each with its bias where the
    /// family has one.
    pub(crate) linears: [(Weight, Option<Weight>); 7],
}

/// The constants of Llama 3.1 8B. Every published model has them, but for the factor; GGUF files hold the frequencies'
/// factors only.
pub(crate) const LLAMA3: Llama3Scaling = Llama3Scaling {
    factor: 8.0,
    low_frequency_factor: 1.0,
    high_frequency_factor: 4.0,
    original_context: 8192.0,
};

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
            RotaryScaling::Llama3(own) => {
                let (low, high) = (own.low_frequency_factor, own.high_frequency_factor);
                let scaled = |frequency: f32| {
                    let frequency = f64::from(frequency);
                    let wavelengths = own.original_context * frequency / std::f64::consts::TAU;
                    let kept = ((wavelengths - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - kept) * frequency / own.factor + kept * frequency) as f32
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
            RotaryScaling::Llama3(own) => {
                let named = [
                    ("factor", own.factor),
                    ("low_freq_factor", own.low_frequency_factor),
                    ("high_freq_factor", own.high_frequency_factor),
                    ("original_max_position_embeddings", own.original_context),
                ];
                parameters.extend(named.map(|(name, number)| (name.to_owned(), number)));
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
    /// [`Error::Io`], [`Error::File`], and those of [`Config::parse`].
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = String::from_utf8(read_required(folder, "config.json")?);
        let text = text.map_err(|_| refused(&path, "it is not UTF-8 text"))?;
        Self::parse(&text, &path)
    }

    /// Parses the text of `config.json`; `path` stands in messages.
    ///
    /// # Errors
    /// [`Error::File`]: not JSON, an entry missing, an architecture or rotary embedding that is
    /// not known, a shape that is impossible.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let error = |reason: String| refused(path, reason);
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|e| error(format!("not a model's config: {e}")))?;
        let architecture = raw.architectures.first().cloned().unwrap_or_default();
        let known = ARCHITECTURES.iter().find(|known| known.0 == architecture);
        let Some(&(_, biases, head_norms)) = known else {
            let known = ARCHITECTURES.map(|(name, ..)| name).join(", ");
            let reason =
                format!("architecture {architecture:?} is not supported; these are: {known}");
            return Err(error(reason));
        };
        let mistral = architecture == "MistralForCausalLM";
        let window = raw.sliding_window.filter(|_| mistral);
        if raw.attention_bias || raw.mlp_bias {
            let reason =
                format!("biases beyond the usual ones of {architecture} are not supported");
            return Err(error(reason));
        }
        if raw.use_sliding_window {
            let reason = "a sliding window in some layers is not supported";
            return Err(refused(path, reason));
        }
        if window == Some(0) {
            return Err(refused(path, "sliding_window = 0 is impossible"));
        }
        if raw.hidden_act != "silu" {
            let reason = format!(
                "activation {:?} is not supported, only \"silu\"",
                raw.hidden_act
            );
            return Err(error(reason));
        }
        let rotary = raw.rotary().map_err(error)?;
        let heads = raw.num_attention_heads;
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        // Far above any model, and low enough that no product of sizes overflows.
        const MAX: usize = 1 << 24;
        const MAX_HEADS: usize = 1 << 12;
        let context = raw.max_position_embeddings;
        for (name, size, max) in [
            ("num_hidden_layers", raw.num_hidden_layers, MAX_HEADS),
            ("num_attention_heads", heads, MAX_HEADS),
            ("hidden_size", raw.hidden_size, MAX),
            ("intermediate_size", raw.intermediate_size, MAX),
            ("num_key_value_heads", kv_heads, MAX),
            ("vocab_size", raw.vocab_size, MAX),
            ("max_position_embeddings", context, MAX),
        ] {
            if !(1..=max).contains(&size) {
                return Err(error(format!("{name} = {size} is impossible")));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("{heads} attention heads cannot share {kv_heads} KV heads evenly");
            return Err(error(reason));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 14 {
            let reason =
                format!("head_dim = {head_dim} is impossible: it must be even and above 0");
            return Err(error(reason));
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
            context,
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
    pub(crate) fn weights(&self, layer: Option<usize>) -> Vec<Weight> {
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
        let mut weights = layer.norms.to_vec();
        weights.extend(layer.head_norms.into_iter().flatten());
        for (matrix, bias) in layer.linears {
            weights.push(matrix);
            weights.extend(bias);
        }
        weights
    }

    pub(crate) fn layer_weights(&self, layer: usize) -> LayerWeights {
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let weight = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let linear = |part: &str, from: usize, to: usize, biased: bool| {
            let bias = || (format!("model.layers.{layer}.{part}.bias"), vec![to]);
            ((weight(part), vec![to, from]), biased.then(bias))
        };
        let norms = ["input_layernorm", "post_attention_layernorm"];
        let head_norms = ["self_attn.q_norm", "self_attn.k_norm"];
        let head_norms = head_norms.map(|part| (weight(part), vec![self.head_dim]));
        LayerWeights {
            norms: norms.map(|part| (weight(part), vec![hidden])),
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

    /// Identity that a dictionary must agree with to serve this model.
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
        let needed = "config.json, tokenizer.json and model.safetensors or its shards";
        return Err(missing(folder, file, needed));
    }
    std::fs::read(&path).map_err(io(&path))
}

/// The complaint about a model folder that lacks a file.
pub(crate) fn missing(folder: &Path, file: &str, needed: &str) -> Error {
    let reason = format!("no {file}; a model folder in Hugging Face layout has {needed}");
    refused(folder, reason)
}

/// Ends of texts that `generation_config.json` names.
#[derive(Default, Deserialize)]
pub(crate) struct GenerationConfig {
    /// End-of-text tokens, which take precedence over the config's.
    pub(crate) eos_token_id: Option<OneOrMany<u32>>,
    /// Texts that end a generation.
    pub(crate) stop_strings: Option<OneOrMany<String>>,
}

impl GenerationConfig {
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self> {
        serde_json::from_str(text).map_err(|e| refused(path, e.to_string()))
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
    /// Name of transformers 4.
    rope_theta: Option<f64>,
    /// Name of transformers 4.
    rope_scaling: Option<RopeParameters>,
    /// Name of transformers 5.
    rope_parameters: Option<RopeParameters>,
}

fn silu() -> String {
    "silu".to_owned()
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_type: Option<String>,
    /// Name of `rope_type` in older files; those that a newer transformers wrote again have both.
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
                let original = given.original_max_position_embeddings;
                let scaling = Llama3Scaling {
                    low_frequency_factor: parameter("low_freq_factor", given.low_freq_factor)?,
                    high_frequency_factor: parameter("high_freq_factor", given.high_freq_factor)?,
                    factor: parameter("factor", given.factor)?,
                    original_context: parameter("original_max_position_embeddings", original)?,
                };
                if scaling.low_frequency_factor >= scaling.high_frequency_factor {
                    return Err("low_freq_factor must be below high_freq_factor".to_owned());
                }
                RotaryScaling::Llama3(scaling)
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
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(crate) fn list(self) -> Vec<T> {
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
        assert!(matches!(newer.scaling, RotaryScaling::Llama3(_)));
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
            let config = GenerationConfig::parse(text, Path::new("g.json")).unwrap();
            config.stop_strings.map_or_else(Vec::new, OneOrMany::list)
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
