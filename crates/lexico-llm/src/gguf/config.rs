//! The decoder's shape as a GGUF file gives it, in the words of `config.json`.

use serde_json::{Value, json};

use super::file::GgufFile;
use super::tokenizer::end_tokens;
use crate::config::{Config, LLAMA3, Llama3Scaling, RotaryScaling};
use crate::error::Result;

/// Architectures in GGUF's words, and the config's.
const ARCHITECTURES: [(&str, &str); 3] = [
    // Mistral's models too: nothing but a sliding window tells them apart.
    ("llama", "LlamaForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
];

/// Sizes that must be there: their names after the architecture, and the config's.
const SIZES: [(&str, &str); 5] = [
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("context_length", "max_position_embeddings"),
];

/// The tensor of the factors that the rotary embedding's frequencies are divided by.
pub(super) const FACTORS: &str = "rope_freqs.weight";

pub(super) fn architecture(file: &GgufFile) -> Result<&'static str> {
    let Some(name) = file.text("general.architecture")? else {
        return Err(file.error("it does not name its general.architecture"));
    };
    let known = ARCHITECTURES.iter().find(|(own, _)| *own == name);
    known.map(|(own, _)| *own).ok_or_else(|| {
        let known = ARCHITECTURES.map(|(own, _)| own).join(", ");
        let reason = format!("architecture {name:?} is not supported; these are: {known}");
        file.error(reason)
    })
}

/// Reads the config from the first file's metadata and from the tensors of all.
pub(super) fn read(files: &[GgufFile]) -> Result<Config> {
    let file = &files[0];
    let architecture = architecture(file)?;
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| file.unsigned(&key(name));
    let missing = |name: &str| file.error(format!("it lacks the metadata entry {:?}", key(name)));
    let unsupported = |name: &str| {
        let key = key(name);
        file.error(format!(
            "its metadata entry {key:?} asks for what is not supported"
        ))
    };

    let mut config = json!({});
    for (own, name) in SIZES {
        config[name] = size(own)?.ok_or_else(|| missing(own))?.into();
    }
    config["num_key_value_heads"] = json!(size("attention.head_count_kv")?);
    let context = config["max_position_embeddings"].as_u64().unwrap_or(0);
    let window = size("attention.sliding_window")?.filter(|&w| w > 0 && w < context);
    let class = match ARCHITECTURES.iter().find(|(own, _)| *own == architecture) {
        // A window of fewer positions than the context is Mistral's.
        Some(("llama", _)) if window.is_some() => "MistralForCausalLM",
        Some(_) if window.is_some() => return Err(unsupported("attention.sliding_window")),
        Some((_, class)) => class,
        None => architecture,
    };
    config["architectures"] = json!([class]);
    config["sliding_window"] = json!(window);
    let epsilon = file.float(&key("attention.layer_norm_rms_epsilon"))?;
    let epsilon = epsilon.ok_or_else(|| missing("attention.layer_norm_rms_epsilon"))?;
    config["rms_norm_eps"] = number(epsilon);
    config["rope_theta"] = json!(file.float(&key("rope.freq_base"))?.map(number));
    let key_length = size("attention.key_length")?;
    if let Some(length) = key_length.or(size("rope.dimension_count")?) {
        for other in ["attention.value_length", "rope.dimension_count"] {
            if size(other)?.is_some_and(|other| other != length) {
                let key = key(other);
                let reason =
                    format!("its {key:?} is not its head dim of {length}: that is not supported");
                return Err(file.error(reason));
            }
        }
        config["head_dim"] = length.into();
    }
    let scaling = file.text(&key("rope.scaling.type"))?;
    let scaling = scaling.filter(|kind| *kind != "none");
    config["rope_scaling"] = json!(scaling.map(|kind| json!({"rope_type": kind})));
    // Linear scaling in files of two ages, experts, and attention to later positions.
    for name in ["rope.scaling.factor", "rope.scale_linear"] {
        if file.float(&key(name))?.is_some_and(|factor| factor != 1.0) {
            return Err(unsupported(name));
        }
    }
    if size("expert_count")?.is_some_and(|count| count > 0) {
        return Err(unsupported("expert_count"));
    }
    if file.bool(&key("attention.causal"))? == Some(false) {
        return Err(unsupported("attention.causal"));
    }
    let tensor = |name: &str| files.iter().find_map(|file| file.tensors.get(name));
    config["tie_word_embeddings"] = tensor("output.weight").is_none().into();
    // The vocabulary is as large as the embedding, whatever the metadata says.
    let embedding = tensor("token_embd.weight");
    let rows = embedding.and_then(|tensor| tensor.shape.first());
    let rows = rows.ok_or_else(|| file.error("it has no tensor \"token_embd.weight\""))?;
    config["vocab_size"] = (*rows).into();
    config["eos_token_id"] = json!(end_tokens(file)?);

    let mut config = Config::parse(&config.to_string(), file.path())?;
    for file in files {
        if let Some(factors) = file.f32_tensor(FACTORS)? {
            config.rotary.scaling = scaling_by(file, &config, factors)?;
        }
    }
    Ok(config)
}

/// JSON has no NaN and no infinity; 0 is refused as they would be.
fn number(number: f64) -> Value {
    json!(if number.is_finite() { number } else { 0.0 })
}

fn scaling_by(file: &GgufFile, config: &Config, factors: Vec<f32>) -> Result<RotaryScaling> {
    let pairs = config.head_dim / 2;
    if factors.len() != pairs || factors.iter().any(|f| !(*f > 0.0 && f.is_finite())) {
        let reason = format!("its tensor {FACTORS} does not hold {pairs} factors above 0");
        return Err(file.error(reason));
    }
    let largest = factors.iter().copied().fold(0.0, f32::max);
    let mut llama3 = config.rotary.clone();
    let plain = llama3.frequencies(config.head_dim);
    llama3.scaling = RotaryScaling::Llama3(Llama3Scaling {
        factor: f64::from(largest),
        ..LLAMA3
    });
    let scaled = llama3.frequencies(config.head_dim);
    let mut frequencies = plain.iter().zip(&scaled).zip(&factors);
    // Told by what it does, so that one dictionary serves the model from either kind of file.
    if frequencies.all(|((plain, scaled), factor)| (plain / factor / scaled - 1.0).abs() < 1e-4) {
        return Ok(llama3.scaling);
    }
    Ok(RotaryScaling::Factors(factors))
}
