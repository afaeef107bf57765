//! What a GGUF file says of the decoder's shape, in the words of `config.json`.

use serde_json::{Map, Value, json};

use super::file::GgufFile;
use crate::config::{Config, RotaryScaling};
use crate::error::Result;

/// Architectures in GGUF's words, and the config's.
const ARCHITECTURES: [(&str, &str); 3] = [
    // Mistral's models too: nothing but a sliding window tells them apart.
    ("llama", "LlamaForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
];

/// Sizes: their names after the architecture, and the config's.
const SIZES: [(&str, &str); 7] = [
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("context_length", "max_position_embeddings"),
    ("attention.sliding_window", "sliding_window"),
];
const REQUIRED_SIZES: usize = 4;

/// The constants of Llama 3's rotary scaling as every published model has them: GGUF files hold the
/// frequencies' factors only.
const LLAMA3: (f64, f64, f64) = (1.0, 4.0, 8192.0);

pub(super) fn architecture(file: &GgufFile) -> Result<&str> {
    let known = ARCHITECTURES.map(|(own, _)| own).join(", ");
    let Some(name) = file.metadata.text("general.architecture") else {
        return Err(file.error("it does not name its general.architecture".to_owned()));
    };
    if ARCHITECTURES.iter().all(|(own, _)| *own != name) {
        return Err(file.error(format!(
            "architecture {name:?} is not supported; these are: {known}"
        )));
    }
    Ok(name)
}

/// The factors that the rotary embedding's frequencies are divided by, where a file has them.
pub(super) fn rotary_factors(files: &[GgufFile]) -> Result<Option<Vec<f32>>> {
    for file in files {
        if let Some(factors) = file.f32_tensor("rope_freqs.weight")? {
            return Ok(Some(factors));
        }
    }
    Ok(None)
}

pub(super) fn read(file: &GgufFile, tied_head: bool, factors: Option<Vec<f32>>) -> Result<Config> {
    let architecture = architecture(file)?;
    let metadata = &file.metadata;
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| metadata.unsigned(&key(name));
    let missing = |name: &str| file.error(format!("it lacks the metadata entry {:?}", key(name)));

    let window = size("attention.sliding_window").filter(|&window| window > 0);
    let class = match ARCHITECTURES.iter().find(|(own, _)| *own == architecture) {
        Some(("llama", _)) if window.is_some() => "MistralForCausalLM",
        Some((_, class)) => class,
        None => architecture,
    };
    let mut config = Map::new();
    config.insert("architectures".to_owned(), json!([class]));
    config.insert("tie_word_embeddings".to_owned(), tied_head.into());
    for (i, (own, name)) in SIZES.iter().enumerate() {
        match size(own) {
            Some(number) => config.insert((*name).to_owned(), number.into()),
            None if i < REQUIRED_SIZES => return Err(missing(own)),
            None => None,
        };
    }
    if window.is_none() {
        config.remove("sliding_window");
    }
    if size("context_length").is_none() {
        return Err(missing("context_length"));
    }
    let epsilon = metadata.float(&key("attention.layer_norm_rms_epsilon"));
    let epsilon = epsilon.ok_or_else(|| missing("attention.layer_norm_rms_epsilon"))?;
    config.insert("rms_norm_eps".to_owned(), number(epsilon));
    if let Some(theta) = metadata.float(&key("rope.freq_base")) {
        config.insert("rope_theta".to_owned(), number(theta));
    }
    let key_length = size("attention.key_length").or_else(|| size("rope.dimension_count"));
    if let Some(length) = key_length {
        for other in ["attention.value_length", "rope.dimension_count"] {
            if size(other).is_some_and(|other| other != length) {
                return Err(file.error(format!(
                    "its {:?} is not its head dim of {length}: that is not supported",
                    key(other)
                )));
            }
        }
        config.insert("head_dim".to_owned(), length.into());
    }
    let scaling = metadata.text(&key("rope.scaling.type")).unwrap_or("none");
    if scaling != "none" {
        config.insert("rope_scaling".to_owned(), json!({"rope_type": scaling}));
    }
    // The vocabulary is as large as the embedding, whatever the metadata says.
    let vocabulary = file.tensors.get("token_embd.weight").map(|t| t.shape[0]);
    let vocabulary = vocabulary
        .map(|rows| rows as u64)
        .or_else(|| size("vocab_size"))
        .or_else(|| Some(metadata.texts("tokenizer.ggml.tokens")?.len() as u64));
    let vocabulary = vocabulary.ok_or_else(|| missing("vocab_size"))?;
    config.insert("vocab_size".to_owned(), vocabulary.into());
    config.insert("eos_token_id".to_owned(), json!(end_tokens(file)));

    let mut config = Config::parse(&Value::Object(config).to_string(), file.path())?;
    if let Some(factors) = factors {
        config.rotary.scaling = scaling_by(file, &config, factors)?;
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
        return Err(file.error(format!(
            "its tensor rope_freqs.weight does not hold {pairs} factors above 0"
        )));
    }
    let largest = factors.iter().copied().fold(0.0, f32::max);
    let mut llama3 = config.rotary.clone();
    let plain = llama3.frequencies(config.head_dim);
    let (low_frequency_factor, high_frequency_factor, original_context) = LLAMA3;
    llama3.scaling = RotaryScaling::Llama3 {
        factor: f64::from(largest),
        low_frequency_factor,
        high_frequency_factor,
        original_context,
    };
    let scaled = llama3.frequencies(config.head_dim);
    let mut frequencies = plain.iter().zip(&scaled).zip(&factors);
    // Told by what it does, so that one dictionary serves the model from either kind of file.
    if frequencies.all(|((plain, scaled), factor)| (plain / factor / scaled - 1.0).abs() < 1e-4) {
        return Ok(llama3.scaling);
    }
    Ok(RotaryScaling::Factors(factors))
}

/// Texts by which models end a turn or a text, llama.cpp's list for these families.
const END_TEXTS: [&str; 5] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
];

fn end_tokens(file: &GgufFile) -> Vec<u64> {
    let id = |name: &str| file.metadata.unsigned(&format!("tokenizer.ggml.{name}"));
    let named = ["eos_token_id", "eot_token_id", "eom_token_id"];
    let mut tokens: Vec<u64> = named.into_iter().filter_map(id).collect();
    let texts = file.metadata.texts("tokenizer.ggml.tokens").unwrap_or(&[]);
    let by_text = texts.iter().enumerate();
    tokens.extend(
        by_text
            .filter(|(_, text)| END_TEXTS.contains(&text.as_str()))
            .map(|(id, _)| id as u64),
    );
    tokens.sort_unstable();
    tokens.dedup();
    tokens.retain(|&token| u32::try_from(token).is_ok());
    tokens
}
