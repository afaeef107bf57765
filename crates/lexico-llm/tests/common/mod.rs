#![allow(dead_code)] // each test file uses a part

use std::collections::HashMap;
use std::path::Path;

use lexico::tensor_file::{self, NewTensor};
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
