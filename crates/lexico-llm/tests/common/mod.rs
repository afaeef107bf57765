#![allow(dead_code)] // each test file uses a part

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use lexico::tensor_file::{self, NewTensor, TensorFile};
use lexico_llm::cache::{CacheContext, CacheSpec, KvCache};
use lexico_llm::config::Config;
use lexico_llm::decoder::{Decoder, Logits, Sequence};
use serde_json::{Value, json};

/// The config of a small model with weights that are easily made.
pub(crate) fn small_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "vocab_size": 1024, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": [1, 2],
    })
}

/// Names and shapes of the weights of [`small_config`].
pub(crate) fn small_weights() -> Vec<NewTensor> {
    let mut tensors = Vec::new();
    let mut number = 0u32;
    let mut add = |name: String, shape: &[usize]| {
        let draw = |_| {
            // A small linear congruential generator: the same weights everywhere.
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (number >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let numbers: Vec<f32> = (0..shape.iter().product()).map(draw).collect();
        tensors.push(NewTensor::f32(&name, shape, &numbers));
    };
    add("model.embed_tokens.weight".to_owned(), &[1024, 16]);
    add("lm_head.weight".to_owned(), &[1024, 16]);
    add("model.norm.weight".to_owned(), &[16]);
    for l in 0..2 {
        for (part, shape) in [
            ("input_layernorm", &[16][..]),
            ("post_attention_layernorm", &[16]),
            ("self_attn.q_proj", &[16, 16]),
            ("self_attn.k_proj", &[8, 16]),
            ("self_attn.v_proj", &[8, 16]),
            ("self_attn.o_proj", &[16, 16]),
            ("mlp.gate_proj", &[24, 16]),
            ("mlp.up_proj", &[24, 16]),
            ("mlp.down_proj", &[16, 24]),
        ] {
            add(format!("model.layers.{l}.{part}.weight"), shape);
        }
    }
    tensors
}

/// Writes a whole model folder.
pub(crate) fn write_model(folder: &Path) {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny.join(file), folder.join(file)).unwrap();
    }
    std::fs::write(folder.join("config.json"), small_config().to_string()).unwrap();
    write_weights(&folder.join("model.safetensors"), &small_weights());
}

pub(crate) fn write_weights(path: &Path, tensors: &[NewTensor]) {
    tensor_file::write(path, tensors, HashMap::new()).unwrap();
}

/// The models of `fixtures/make_families.py`.
pub(crate) const FAMILIES: [&str; 8] = [
    "llama",
    "llama-3.1",
    "mistral-window",
    "mistral",
    "mistral-nemo",
    "qwen2-tied",
    "qwen2",
    "qwen3",
];

pub(crate) fn family_folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/families")
        .join(family)
}

/// Tokens, and transformers' logits of them under a name.
pub(crate) fn golden(family: &str, name: &str) -> (Vec<u32>, Vec<f32>) {
    golden_of(&family_folder(family), name)
}

pub(crate) fn golden_of(folder: &Path, name: &str) -> (Vec<u32>, Vec<f32>) {
    let golden = TensorFile::open(folder.join("golden.safetensors")).unwrap();
    let tokens = golden.bytes("tokens").unwrap();
    let tokens = tokens.as_chunks::<8>().0.iter();
    let tokens = tokens.map(|&b| i64::from_le_bytes(b) as u32).collect();
    (tokens, golden.f32_tensor(name, 2).unwrap().0)
}

pub(crate) fn full(config: &Config) -> Box<dyn KvCache> {
    let context = CacheContext {
        model: "drawn",
        config,
        dictionaries: None,
        calibration: None,
        device: &candle_core::Device::Cpu,
    };
    "full:dense=f32"
        .parse::<CacheSpec>()
        .unwrap()
        .build(&context)
        .unwrap()
}

/// Logits of every token, fed in chunks.
pub(crate) fn chunked(decoder: &Decoder, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut cache = full(decoder.config());
    let mut logits = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let mut step = [Sequence {
            tokens,
            cache: cache.as_mut(),
        }];
        let out = decoder.forward(&mut step, Logits::All).unwrap();
        logits.extend(out.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
    assert_eq!(cache.len(), tokens.len());
    logits
}
