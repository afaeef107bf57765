//! A decoder's shape, as a Hugging Face `config.json` gives it.

use std::collections::BTreeMap;
use std::path::Path;

use lexico::dictionary::{ModelIdentity, RotaryIdentity};
use lexico::shown::shown;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::{Error, Result, from_json, io, refused};

/// Architectures that the decoder runs: [`Config::biases`] and [`Config::head_norms`] of each.
const ARCHITECTURES: [(&str, bool, bool); 4] = [
    ("LlamaForCausalLM", false, false),
    ("MistralForCausalLM", false, false),
    ("Qwen2ForCausalLM", true, false),
    ("Qwen3ForCausalLM", false, true),
];
/// The window of transformers' classes where a config does not name it.
const USUAL_WINDOW: usize = 4096;
/// The first layer with a window, of transformers' classes for Qwen, where a config does not name it.
const USUAL_WINDOW_LAYER: usize = 28;
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
        Ok(Self::load_noting(folder)?.0)
    }

    /// Reads the `config.json` of a model folder; returns what the user should know of it, too.
    pub(crate) fn load_noting(folder: &Path) -> Result<(Self, Vec<String>)> {
        let path = folder.join("config.json");
        let text = String::from_utf8(read_required(folder, "config.json")?);
        let text = text.map_err(|_| refused(&path, "it is not UTF-8 text"))?;
        Self::parse_noting(&text, &path)
    }

    /// Parses the text of `config.json`; `path` stands in messages.
    ///
    /// # Errors
    /// [`Error::File`]: not JSON, an entry missing, an architecture or rotary embedding that is
    /// not known, a shape that is impossible.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        Ok(Self::parse_noting(text, path)?.0)
    }

    /// Parses as [`Config::parse`]; returns where entries disagree and which of them holds, too.
    pub(crate) fn parse_noting(text: &str, path: &Path) -> Result<(Self, Vec<String>)> {
        let error = |reason: String| refused(path, reason);
        let raw: RawConfig =
            from_json(text.as_bytes()).map_err(|e| error(format!("not a model's config: {e}")))?;
        if let Some(method) = raw.quantisation() {
            return Err(error(quantised(&method)));
        }
        let architecture = raw.architectures.first().cloned().unwrap_or_default();
        let known = ARCHITECTURES.iter().find(|known| known.0 == architecture);
        let Some(&(_, biases, head_norms)) = known else {
            let known = ARCHITECTURES.map(|(name, ..)| name).join(", ");
            let architecture = shown(architecture);
            let reason =
                format!("architecture \"{architecture}\" is not supported; these are: {known}");
            return Err(error(reason));
        };
        if raw.attention_bias == Some(true) || raw.mlp_bias == Some(true) {
            let reason =
                format!("biases beyond the usual ones of {architecture} are not supported");
            return Err(error(reason));
        }
        if raw.hidden_act != "silu" {
            let reason = format!(
                "activation \"{}\" is not supported, only \"silu\"",
                shown(raw.hidden_act)
            );
            return Err(error(reason));
        }
        let mut notes = Vec::new();
        let rotary = raw.rotary(&mut notes).map_err(error)?;
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
        if raw.head_dim.is_none() && !raw.hidden_size.is_multiple_of(heads) {
            let reason = format!(
                "hidden_size = {} is no multiple of num_attention_heads = {heads}, and there is no head_dim",
                raw.hidden_size
            );
            return Err(error(reason));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 14 {
            let reason =
                format!("head_dim = {head_dim} is impossible: it must be even and above 0");
            return Err(error(reason));
        }
        let window = raw.window(&architecture, &mut notes).map_err(error)?;
        for (name, number) in [
            ("rms_norm_eps", raw.rms_norm_eps),
            ("rope_theta", rotary.theta),
        ] {
            if !(number > 0.0 && number.is_finite()) {
                return Err(error(format!("{name} = {number} is impossible")));
            }
        }
        let notes = notes.iter().map(|note| format!("config.json: {note}"));
        let notes = notes.collect();
        let config = Self {
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
            tied_head: raw.tie_word_embeddings.unwrap_or(false),
            end_tokens: raw.eos_token_id.map_or_else(Vec::new, OneOrMany::list),
        };
        Ok((config, notes))
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
        from_json(text.as_bytes()).map_err(|e| refused(path, e))
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
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    /// `null` is another thing than nothing.
    #[serde(default, deserialize_with = "there")]
    sliding_window: Option<Option<usize>>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<Value>,
    /// Older name of it.
    compression_config: Option<Value>,
    eos_token_id: Option<OneOrMany<u32>>,
    /// Name of transformers 4.
    rope_theta: Option<f64>,
    /// Name of transformers 4.
    rope_scaling: Option<RopeParameters>,
    /// Name of transformers 5.
    rope_parameters: Option<RopeParameters>,
}

/// Takes an entry that is there, `null` too.
fn there<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    json: D,
) -> std::result::Result<Option<T>, D::Error> {
    T::deserialize(json).map(Some)
}

/// The complaint about weights in a format of quantised ones.
pub(crate) fn quantised(method: &str) -> String {
    format!(
        "its weights are quantised ({}), and only F32, F16 and BF16 are read from safetensors files; use the model that was \
         quantised, with --quantize perhaps, or a GGUF file of it",
        shown(method)
    )
}

fn silu() -> String {
    "silu".to_owned()
}

#[derive(Deserialize, PartialEq)]
struct RopeParameters {
    rope_type: Option<String>,
    /// Name of `rope_type` in older files; those that a newer transformers wrote again have both.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

impl RopeParameters {
    /// Returns true where there is no entry; Python takes such a one for none.
    fn is_empty(&self) -> bool {
        let Self {
            rope_type,
            r#type,
            others,
            ..
        } = self;
        let numbers = [
            self.rope_theta,
            self.factor,
            self.low_freq_factor,
            self.high_freq_factor,
            self.original_max_position_embeddings,
            self.partial_rotary_factor,
        ];
        let texts = rope_type.is_none() && r#type.is_none();
        texts && others.is_empty() && numbers.iter().all(Option::is_none)
    }
}

impl RawConfig {
    /// The format of quantised weights that the config names.
    fn quantisation(&self) -> Option<String> {
        let config = self.quantization_config.as_ref();
        let config = config.or(self.compression_config.as_ref());
        let config = config.filter(|config| !config.is_null())?;
        let method = config["quant_method"].as_str();
        Some(method.unwrap_or("quantization_config").to_owned())
    }

    /// The window of all layers, where they have one; mixed layers are refused.
    fn window(
        &self,
        architecture: &str,
        notes: &mut Vec<String>,
    ) -> std::result::Result<Option<usize>, String> {
        let own = self.sliding_window.unwrap_or(Some(USUAL_WINDOW));
        let types = self.layer_types.as_deref();
        let slides = |kind: &String| kind == "sliding_attention";
        let window = match architecture {
            "MistralForCausalLM" => own,
            "Qwen2ForCausalLM" | "Qwen3ForCausalLM" => {
                let layers = self.num_hidden_layers;
                let window = own.filter(|_| self.use_sliding_window == Some(true));
                let first = self.max_window_layers.unwrap_or(USUAL_WINDOW_LAYER);
                let sliding = match types {
                    Some(types) if types.len() != layers => {
                        let count = types.len();
                        return Err(format!(
                            "layer_types names {count} layers, num_hidden_layers is {layers}"
                        ));
                    }
                    Some(types) => {
                        let known = |kind: &&String| slides(kind) || *kind == "full_attention";
                        if let Some(kind) = types.iter().find(|kind| !known(kind)) {
                            let kind = shown(kind);
                            return Err(format!("layers of type \"{kind}\" are not supported"));
                        }
                        types.iter().filter(|kind| slides(kind)).count()
                    }
                    None if window.is_some() => layers.saturating_sub(first),
                    None => 0,
                };
                match (sliding, window) {
                    (0, _) => None,
                    (_, None) => {
                        let reason = "layer_types asks for a sliding window in some layers, and use_sliding_window or \
                                      sliding_window for none";
                        return Err(reason.to_owned());
                    }
                    (_, Some(window)) if window >= self.max_position_embeddings => None,
                    (_, Some(window)) if sliding == layers => Some(window),
                    _ => {
                        let reason = format!(
                            "a sliding window in some layers ({sliding} of {layers}) is not supported"
                        );
                        return Err(reason);
                    }
                }
            }
            _ => {
                let asked = types.is_some_and(|types| types.iter().any(slides));
                if asked || self.use_sliding_window == Some(true) {
                    notes.push(format!(
                        "it asks for a sliding window, which {architecture} does not have: it has none here, as in \
                         transformers"
                    ));
                }
                None
            }
        };
        match window {
            Some(0) => Err("sliding_window = 0 is impossible".to_owned()),
            window => Ok(window),
        }
    }

    fn rotary(&self, notes: &mut Vec<String>) -> std::result::Result<Rotary, String> {
        let named = [
            ("rope_scaling", &self.rope_scaling),
            ("rope_parameters", &self.rope_parameters),
        ];
        let mut named = named.into_iter().filter_map(|(name, given)| {
            let given = given.as_ref().filter(|given| !given.is_empty())?;
            Some((name, given))
        });
        // As transformers 4 and 5 take them.
        let (first, second) = (named.next(), named.next());
        let nested = first.map(|(_, given)| given);
        // The one default that transformers itself has.
        let theta = nested
            .and_then(|given| given.rope_theta)
            .or(self.rope_theta);
        let theta = theta.unwrap_or(10_000.0);
        if let (Some((_, given)), Some((_, other))) = (first, second)
            && given != other
        {
            let mut note =
                "rope_scaling and rope_parameters disagree: rope_scaling holds, as in transformers"
                    .to_owned();
            if other.rope_theta.is_some_and(|other| other != theta) {
                note += &format!(", and with it rope_theta = {theta}");
            }
            notes.push(note);
        } else if let (Some(own), Some(outer)) =
            (nested.and_then(|n| n.rope_theta), self.rope_theta)
            && own != outer
        {
            notes.push(format!(
                "rope_theta is {outer} and, in rope_parameters or rope_scaling, {own}: {own} holds, as in transformers"
            ));
        }
        if let Some((name, given)) = first {
            if let Some(kind) = given.others.iter().find(|(_, value)| value.is_object()) {
                let kind = shown(kind.0);
                return Err(format!(
                    "{name} of its own for each kind of layer (\"{kind}\") is not supported"
                ));
            }
            let kind = given.rope_type.as_ref().or(given.r#type.as_ref());
            if kind.is_none() && given.factor.is_some_and(|factor| factor != 1.0) {
                return Err(format!("{name} has a factor and no rope_type"));
            }
            if kind.is_some_and(|kind| kind == "default") && given.factor.is_some_and(|f| f != 1.0)
            {
                notes.push(format!(
                    "{name} has a factor, which rope_type \"default\" does not use: it is passed over, as in transformers"
                ));
            }
        }
        let partial = nested.and_then(|given| given.partial_rotary_factor);
        let partial = partial.or(self.partial_rotary_factor);
        if let Some(factor) = partial.filter(|&factor| factor != 1.0) {
            return Err(format!("partial_rotary_factor = {factor} is not supported"));
        }
        let kind = match nested.map(|p| (p.rope_type.as_deref(), p.r#type.as_deref())) {
            Some((Some(kind), Some(older))) if kind != older => {
                return Err(format!(
                    "rope_type \"{}\" and type \"{}\" disagree",
                    shown(kind),
                    shown(older)
                ));
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
                let own = given.original_max_position_embeddings;
                let outer = self.original_max_position_embeddings;
                if let (Some(own), Some(outer)) = (own, outer)
                    && own != outer
                {
                    return Err(format!(
                        "original_max_position_embeddings is {outer} and, for the rotary embedding, {own}; versions of \
                         transformers take one or the other"
                    ));
                }
                let original = own.or(outer);
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
                    "rotary embedding of type \"{}\" is not supported; these are: {known}",
                    shown(kind)
                ));
            }
        };
        Ok(Rotary { theta, scaling })
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

    /// Configs whose entries disagree, and what transformers reads in them: `fixtures/make_configs.py`.
    #[test]
    fn entries_that_disagree_are_read_as_transformers_reads_them() {
        let golden = include_str!("../tests/fixtures/configs.json");
        let golden: Vec<Value> = serde_json::from_str(golden).unwrap();
        for case in &golden {
            let given = &case["config"];
            let read = Config::parse_noting(&given.to_string(), Path::new("config.json"));
            let windows: Vec<Option<usize>> =
                serde_json::from_value(case["windows"].clone()).unwrap();
            let seen = windows.iter().map(|w| w.filter(|&w| w < 8192));
            let seen: Vec<Option<usize>> = seen.collect();
            if seen.iter().any(|window| *window != seen[0]) {
                let reason = read.unwrap_err().to_string();
                assert!(reason.contains("1 of 4"), "{given}: {reason}");
                continue;
            }
            let (config, notes) = read.unwrap();
            assert_eq!(config.window.filter(|&w| w < 8192), seen[0], "{given}");
            let (rope, rotary) = (&case["rope"], &config.rotary);
            assert_eq!(rope["rope_theta"], rotary.theta, "{given}");
            match &rotary.scaling {
                RotaryScaling::Llama3(own) => {
                    assert_eq!(rope["rope_type"], "llama3", "{given}");
                    assert_eq!(rope["factor"], own.factor);
                    let original = &rope["original_max_position_embeddings"];
                    assert_eq!(*original, own.original_context);
                }
                _ => assert_eq!(rope["rope_type"], "default", "{given}"),
            }
            let rope_entries = ["rope_parameters", "rope_scaling", "rope_theta"];
            let places = rope_entries.map(|entry| given.get(entry));
            let places = places.iter().flatten().filter(|place| {
                let empty = place.as_object().is_some_and(|place| place.is_empty());
                !place.is_null() && !empty
            });
            assert_eq!(
                places.count() > 1 || rope["factor"] == 4.0,
                !notes.is_empty(),
                "{given}: {notes:?}"
            );
        }
        assert_eq!(golden.len(), 29);
    }

    #[test]
    fn messages_repeat_no_document_and_steer_no_terminal() {
        let evil = format!("\u{1b}[31m{}", "word ".repeat(200_000));
        let keys = [
            "hidden_size",
            "architectures",
            "hidden_act",
            "rope_scaling",
            "eos_token_id",
            "tie_word_embeddings",
            "layer_types",
            "quantization_config",
        ];
        for key in keys {
            for value in [
                serde_json::json!(evil),
                serde_json::json!([evil]),
                serde_json::json!({ "rope_type": evil, "quant_method": evil }),
                serde_json::json!({ evil.clone(): evil }),
            ] {
                // Some of these are read: an architecture's name in a list is a name.
                let Err(error) = config(|c| c[key] = value) else {
                    continue;
                };
                let message = error.to_string();
                assert!(message.len() < 2000, "{key}: {} bytes", message.len());
                assert!(!message.contains('\u{1b}'), "{key}: {message}");
            }
        }
        // The entry that is wrong is named.
        let error = config(|c| c["vocab_size"] = "many".into()).unwrap_err();
        assert!(error.to_string().contains("vocab_size"), "{error}");
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
        let cases: [(fn(&mut serde_json::Value), &str); 19] = [
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
            (
                |c| c["quantization_config"] = serde_json::json!({"quant_method": "gptq"}),
                "gptq",
            ),
            (
                |c| c["quantization_config"] = serde_json::json!({"bits": 4}),
                "GGUF",
            ),
            (
                |c| c["rope_scaling"] = serde_json::json!({"factor": 4.0}),
                "rope_type",
            ),
            (
                |c| {
                    c["rope_parameters"] =
                        serde_json::json!({"full_attention": {"rope_theta": 1e4}})
                },
                "full_attention",
            ),
            (
                |c| c["partial_rotary_factor"] = 0.5.into(),
                "partial_rotary_factor",
            ),
            (|c| c["hidden_size"] = 66.into(), "no multiple"),
            (
                |c| {
                    c["original_max_position_embeddings"] = 8.into();
                    c["rope_scaling"] = serde_json::json!({
                        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
                    });
                },
                "original_max_position_embeddings is 8",
            ),
        ];
        for (change, word) in cases {
            let message = refused(change);
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    }
}
