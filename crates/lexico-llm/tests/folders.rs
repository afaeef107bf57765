//! Model folders: whole, sharded, in every number type, and broken in every way.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::path::Path;

use common::{small_config, small_weights, write_model, write_weights};
use half::{bf16, f16};
use lexico::tensor_file::{Dtype, NewTensor, TensorFile};
use lexico_llm::decoder::{Decoder, Logits, Sequence};
use lexico_llm::{Error, Model, Quantize};
use serde_json::json;

fn logits(model: &Model) -> Vec<f32> {
    let mut cache = model.cache(&"full:dense=f32".parse().unwrap()).unwrap();
    let mut step = [Sequence {
        tokens: &[5, 6, 7],
        cache: cache.as_mut(),
    }];
    let logits = model.decoder.forward(&mut step, Logits::All).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn loaded(folder: &Path) -> Vec<f32> {
    logits(&Model::load(folder, Quantize::None).unwrap())
}

fn refused(folder: &Path) -> String {
    match Model::load(folder, Quantize::None) {
        Ok(_) => panic!("a broken folder loads"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn shards_give_what_one_file_gives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_model(path);
    let whole = loaded(path);
    let mut weights = small_weights();
    let rest = weights.split_off(5);
    let mut map = serde_json::Map::new();
    for (shard, tensors) in [("a.safetensors", &weights), ("b.safetensors", &rest)] {
        write_weights(&path.join(shard), tensors);
        map.extend(tensors.iter().map(|t| (t.name.clone(), shard.into())));
    }
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    let index = path.join("model.safetensors.index.json");
    std::fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert_eq!(loaded(path), whole);

    std::fs::remove_file(path.join("b.safetensors")).unwrap();
    let message = refused(path);
    assert!(message.contains("no b.safetensors"), "{message}");
    for (bad, word) in [
        ("{\"weight_map\": {\"x\": \"../../etc/passwd\"}}", "passwd"),
        ("{}", "weight_map"),
        ("{\"weight_map\": {}}", "model.embed_tokens.weight"),
    ] {
        std::fs::write(&index, bad).unwrap();
        let message = refused(path);
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

#[test]
fn half_precision_weights_are_converted() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let whole = loaded(folder.path());
    let convert: [(Dtype, fn(f32) -> [u8; 2]); 2] = [
        (Dtype::F16, |x: f32| f16::from_f32(x).to_le_bytes()),
        (Dtype::BF16, |x| bf16::from_f32(x).to_le_bytes()),
    ];
    for (dtype, convert) in convert {
        let halves = small_weights().into_iter().map(|t| {
            let numbers = t
                .bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b));
            NewTensor::new(
                &t.name,
                dtype,
                &t.shape,
                numbers.flat_map(convert).collect(),
            )
        });
        write_weights(
            &folder.path().join("model.safetensors"),
            &halves.collect::<Vec<_>>(),
        );
        let worst = loaded(folder.path())
            .iter()
            .zip(&whole)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst < 0.1, "{dtype:?}: {worst}");
    }
}

#[test]
fn what_is_missing_is_named() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path());
        std::fs::remove_file(folder.path().join(file)).unwrap();
        let message = refused(folder.path());
        assert!(message.contains(&format!("no {file}")), "{message}");
    }
    let message = refused(Path::new("/no/such/model"));
    assert!(message.contains("/no/such/model"), "{message}");
}

#[test]
fn what_is_damaged_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let with_config = |key: &str, value: serde_json::Value| {
        let mut config = small_config();
        config[key] = value;
        config.to_string().into_bytes()
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("config.json", b"{".to_vec(), "config.json"),
        ("config.json", vec![0xff, 0xfe], "UTF-8"),
        ("config.json", b"{}".to_vec(), "missing field"),
        (
            "config.json",
            with_config("num_hidden_layers", 3.into()),
            "model.layers.2",
        ),
        (
            "config.json",
            with_config("num_hidden_layers", 4000.into()),
            "model.layers.2",
        ),
        (
            "config.json",
            with_config("vocab_size", 10_000_000.into()),
            "shape",
        ),
        (
            "config.json",
            with_config("hidden_size", json!(1u64 << 40)),
            "hidden_size",
        ),
        ("tokenizer.json", b"[]".to_vec(), "tokenizer"),
        ("tokenizer.json", Vec::new(), "tokenizer"),
        (
            "tokenizer_config.json",
            b"{\"bos_token\": \"<none>\"}".to_vec(),
            "<none>",
        ),
        (
            "tokenizer_config.json",
            b"nonsense".to_vec(),
            "tokenizer_config.json",
        ),
        (
            "generation_config.json",
            b"{\"eos_token_id\": \"x\"}".to_vec(),
            "generation_config.json",
        ),
        (
            "generation_config.json",
            b"{\"eos_token_id\": -1}".to_vec(),
            "eos_token_id",
        ),
        (
            "generation_config.json",
            b"{\"stop_strings\": 1}".to_vec(),
            "stop_strings",
        ),
        (
            "config.json",
            with_config("eos_token_id", (-1).into()),
            "eos_token_id",
        ),
        (
            "tokenizer_config.json",
            b"{\"bos_token\": 1}".to_vec(),
            "bos_token",
        ),
        (
            "tokenizer_config.json",
            b"{\"chat_template\": 1}".to_vec(),
            "chat_template",
        ),
        (
            "model.safetensors",
            b"nonsense, but long enough".to_vec(),
            "model.safetensors",
        ),
    ];
    for (file, bytes, word) in cases {
        write_model(path);
        std::fs::write(path.join(file), bytes).unwrap();
        let message = refused(path);
        assert!(
            message.contains(word),
            "{file}: {message:?} does not name {word:?}"
        );
        let _ = std::fs::remove_file(path.join(file));
    }
    write_model(path);
    let mut weights = small_weights();
    weights[3].dtype = Dtype::I32;
    write_weights(&path.join("model.safetensors"), &weights);
    let message = refused(path);
    assert!(
        message.contains("I32") && message.contains(&weights[3].name),
        "{message}"
    );
}

/// Blocks hold neither NaN nor infinity: quantising would make sound numbers of them.
#[test]
fn weights_that_are_not_finite_are_not_quantised() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    std::fs::copy(tiny.join("config.json"), path.join("config.json")).unwrap();
    let file = TensorFile::open(tiny.join("model.safetensors")).unwrap();
    let damaged = "model.layers.1.mlp.up_proj.weight";
    for bad in [bf16::NAN, bf16::INFINITY] {
        let tensors = file.names().into_iter().map(|name| {
            let (dtype, shape) = file.info(&name).unwrap();
            let mut bytes = file.bytes(&name).unwrap();
            if name == damaged {
                bytes[600..602].copy_from_slice(&bad.to_le_bytes());
            }
            NewTensor::new(&name, dtype, shape, bytes)
        });
        write_weights(
            &path.join("model.safetensors"),
            &tensors.collect::<Vec<_>>(),
        );
        for quantize in [Quantize::Q8_0, Quantize::Q6K, Quantize::Q4K] {
            let message = match Decoder::open(path, quantize) {
                Ok(_) => panic!("{quantize:?} takes {bad}"),
                Err(error) => error.to_string(),
            };
            assert!(
                message.contains(damaged) && message.contains("NaN"),
                "{message}"
            );
        }
    }
}

#[test]
fn steps_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let model = Model::load(folder.path(), Quantize::None).unwrap();
    assert_eq!(model.end_tokens, [1, 2]);
    let step = |tokens: &[u32]| {
        let mut cache = model.cache(&"full".parse().unwrap()).unwrap();
        let mut sequences = [Sequence {
            tokens,
            cache: cache.as_mut(),
        }];
        model
            .decoder
            .forward(&mut sequences, Logits::Last)
            .map(drop)
    };
    assert!(matches!(step(&[]), Err(Error::EmptyPrompt)));
    let nothing = model.decoder.forward(&mut [], Logits::Last);
    assert!(matches!(nothing, Err(Error::EmptyPrompt)));
    assert!(matches!(
        step(&[1024]),
        Err(Error::TokenOutside {
            token: 1024,
            vocabulary: 1024
        })
    ));
    assert!(matches!(
        step(&[3; 65]),
        Err(Error::ContextFull {
            wanted: 65,
            context: 64
        })
    ));
    step(&[3; 64]).unwrap();
    let needs = model.cache(&"lexico".parse().unwrap()).map(drop);
    assert!(matches!(needs, Err(Error::NoDictionary { .. })));
}

/// What training cut and padded its texts to, tokenizers keep in their files; prompts stay whole.
#[test]
fn truncation_and_padding_in_a_tokenizer_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let whole = Model::load(folder.path(), Quantize::None)
        .unwrap()
        .tokenizer
        .encode_first("one two three four five six")
        .unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 10});
    json["padding"] = json!({
        "strategy": {"Fixed": 1_000_000_000}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    });
    std::fs::write(&path, json.to_string()).unwrap();
    let model = Model::load(folder.path(), Quantize::None).unwrap();
    assert_eq!(
        model
            .tokenizer
            .encode_first("one two three four five six")
            .unwrap(),
        whole
    );
}

/// A damaged dictionary beside a model must not keep the model from its cure.
#[test]
fn dictionaries_load_apart_from_the_model() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let dictionary = folder.path().join(lexico_llm::DICTIONARY_FILE);
    std::fs::write(&dictionary, "nonsense, but long enough").unwrap();
    let mut model = Model::load(folder.path(), Quantize::None).unwrap();
    let message = model
        .load_dictionaries(&dictionary)
        .unwrap_err()
        .to_string();
    assert!(message.contains("dictionary.safetensors"), "{message}");
}

/// Writes [`write_model`]'s folder with other entries in its config.
fn write_model_with(folder: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    write_model(folder);
    let mut config = small_config();
    change(&mut config);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_head_that_differs_from_the_embedding_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_model(path);
    let own_head = loaded(path);
    write_model_with(path, |config| config["tie_word_embeddings"] = true.into());
    let model = Model::load(path, Quantize::None).unwrap();
    assert_eq!(logits(&model), own_head);
    let head = |notes: &[String]| notes.iter().any(|note| note.contains("lm_head.weight"));
    assert!(head(&model.notes), "{:?}", model.notes);
    assert!(
        !Decoder::open(path, Quantize::None)
            .unwrap()
            .config()
            .tied_head
    );

    // The embedding once more is no head of its own.
    let mut weights = small_weights();
    let embedding = weights[0].bytes.clone();
    weights[1].bytes = embedding;
    write_weights(&path.join("model.safetensors"), &weights);
    let model = Model::load(path, Quantize::None).unwrap();
    assert!(model.decoder.config().tied_head && !head(&model.notes));
    assert_ne!(logits(&model), own_head);
}

#[test]
fn the_tokenizers_end_is_an_end_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let loaded = |own: serde_json::Value, generation: Option<&str>, tokenizer: &str| {
        write_model_with(path, |config| config["eos_token_id"] = own);
        let _ = std::fs::remove_file(path.join("generation_config.json"));
        if let Some(generation) = generation {
            std::fs::write(path.join("generation_config.json"), generation).unwrap();
        }
        std::fs::write(path.join("tokenizer_config.json"), tokenizer).unwrap();
        let model = Model::load(path, Quantize::None).unwrap();
        (model.end_tokens, model.notes.join("\n"))
    };
    let tokenizer = "{\"eos_token\": \"</s>\"}";
    let id = 1;
    assert_eq!(
        loaded(json!([1, 2]), None, tokenizer),
        (vec![1, 2], String::new())
    );
    let (ends, notes) = loaded(json!(5), None, tokenizer);
    assert_eq!(ends, [5, id]);
    assert!(
        notes.contains("</s>") && notes.contains("tokenizer_config.json"),
        "{notes}"
    );
    let (ends, notes) = loaded(json!(5), Some("{\"eos_token_id\": [7, 1]}"), tokenizer);
    assert_eq!(ends, [7, id]);
    assert!(
        notes.contains("token 5") && notes.contains("generation_config.json"),
        "{notes}"
    );
    assert_eq!(
        loaded(json!(null), None, tokenizer),
        (vec![id], String::new())
    );
    let (ends, notes) = loaded(json!(null), None, "{}");
    assert!(
        ends.is_empty() && notes.contains("no token that ends"),
        "{notes}"
    );
    let (ends, notes) = loaded(json!(5), None, "{\"eos_token\": \"<none>\"}");
    assert_eq!(ends, [5]);
    assert!(notes.contains("<none>"), "{notes}");
}

#[test]
fn quantised_folders_are_named_with_their_cure() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for method in [
        "gptq",
        "awq",
        "fp8",
        "bitsandbytes",
        "compressed-tensors",
        "mxfp4",
    ] {
        write_model_with(path, |config| {
            config["quantization_config"] = json!({ "quant_method": method });
        });
        let message = refused(path);
        assert!(
            message.contains(method) && message.contains("GGUF"),
            "{message}"
        );
    }
    write_model(path);
    for (name, word) in [
        ("model.layers.0.self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "FP8"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        (
            "model.layers.0.mlp.up_proj.weight_packed",
            "compressed-tensors",
        ),
    ] {
        let mut weights = small_weights();
        weights.push(NewTensor::f32(name, &[2], &[1.0, 2.0]));
        write_weights(&path.join("model.safetensors"), &weights);
        let message = refused(path);
        assert!(
            message.contains(word) && message.contains("GGUF"),
            "{message}"
        );
    }
}

/// transformers warns of them and goes on.
#[test]
fn weights_that_nothing_uses_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_model(path);
    assert!(Model::load(path, Quantize::None).unwrap().notes.is_empty());
    let mut weights = small_weights();
    let leftover = "model.layers.0.self_attn.rotary_emb.inv_freq";
    weights.push(NewTensor::f32(leftover, &[2], &[1.0, 2.0]));
    write_weights(&path.join("model.safetensors"), &weights);
    assert!(Model::load(path, Quantize::None).unwrap().notes.is_empty());
    let bias = "model.layers.0.self_attn.q_proj.bias";
    weights.push(NewTensor::f32(bias, &[16], &[1.0; 16]));
    write_weights(&path.join("model.safetensors"), &weights);
    let notes = Model::load(path, Quantize::None).unwrap().notes;
    assert!(notes.len() == 1 && notes[0].contains(bias), "{notes:?}");
}

/// Whether the tokenizer puts the first token there or we do.
#[test]
fn a_prompt_that_names_the_begin_token_begins_with_it_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_model(path);
    let config = "{\"bos_token\": \"<s>\", \"add_bos_token\": true}";
    std::fs::write(path.join("tokenizer_config.json"), config).unwrap();
    let tokens = |text: &str| {
        let model = Model::load(path, Quantize::None).unwrap();
        model.tokenizer.encode_first(text).unwrap()
    };
    let texts = ["<s>Hello", "Hello", "<s>", "", "<s><s>Hello"];
    let own = texts.map(tokens);
    assert_eq!(own[0], own[1]);
    assert_eq!(own[2], own[3]);
    assert_eq!(own[4].len(), own[0].len() + 1);

    let file = path.join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [own[0][0]], "tokens": ["<s>"]}},
    });
    std::fs::write(&file, json.to_string()).unwrap();
    std::fs::write(
        path.join("tokenizer_config.json"),
        "{\"bos_token\": \"<s>\"}",
    )
    .unwrap();
    assert_eq!(texts.map(tokens), own);
}
