//! Every family against PyTorch transformers: small random models made by `fixtures/make_families.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};

use lexico::tensor_file::TensorFile;
use lexico_llm::Quantize;
use lexico_llm::cache::{CacheContext, KvCache};
use lexico_llm::config::Config;
use lexico_llm::decoder::{Decoder, Logits, Sequence};

const FAMILIES: [&str; 8] = [
    "llama",
    "llama-3.1",
    "mistral-window",
    "mistral",
    "mistral-nemo",
    "qwen2-tied",
    "qwen2",
    "qwen3",
];

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/families")
        .join(family)
}

fn config(family: &str, file: &str) -> Config {
    let path = folder(family).join(file);
    Config::parse(&std::fs::read_to_string(&path).unwrap(), &path).unwrap()
}

fn full(config: &Config) -> Box<dyn KvCache> {
    let context = CacheContext {
        model: "drawn",
        config,
        dictionaries: None,
    };
    "full:dense=f32"
        .parse::<lexico_llm::cache::CacheSpec>()
        .unwrap()
        .build(&context)
        .unwrap()
}

/// Logits of every token, fed in chunks.
fn chunked(decoder: &Decoder, tokens: &[u32], chunk: usize) -> Vec<f32> {
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

#[test]
fn logits_equal_transformers_in_prefill_in_chunks_and_in_decode() {
    for family in FAMILIES {
        let golden = TensorFile::open(folder(family).join("golden.safetensors")).unwrap();
        let tokens = golden.bytes("tokens").unwrap();
        let tokens = tokens
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&b| i64::from_le_bytes(b) as u32);
        let tokens: Vec<u32> = tokens.collect();
        let (want, _) = golden.f32_tensor("logits", 2).unwrap();
        let decoder = Decoder::load_folder(&folder(family), Quantize::None).unwrap();
        for chunk in [tokens.len(), 7, 1] {
            let got = chunked(&decoder, &tokens, chunk);
            assert_eq!(got.len(), want.len());
            let worst = got
                .iter()
                .zip(&want)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            println!("{family}, chunks of {chunk}: {worst:.1e}");
            assert!(worst < 2e-3, "{family}, chunks of {chunk}: {worst}");
        }
    }
}

#[test]
fn configs_of_transformers_4_and_5_say_the_same() {
    for family in FAMILIES {
        let (four, five) = ("config_transformers4.json", "config.json");
        assert_eq!(config(family, four), config(family, five), "{family}");
    }
}

/// What a sliding window hides is given back, and the cache is counted against what it needs.
#[test]
fn a_sliding_window_bounds_the_cache() {
    let decoder = Decoder::load_folder(&folder("mistral-window"), Quantize::None).unwrap();
    let config = decoder.config();
    let window = config.window.unwrap();
    let mut cache = full(config);
    for position in 0..200 {
        let mut step = [Sequence {
            tokens: &[position % 90 + 2],
            cache: cache.as_mut(),
        }];
        decoder.forward(&mut step, Logits::Last).unwrap();
    }
    assert_eq!(cache.len(), 200);
    assert_eq!(
        config.fp16_cache_bytes(200),
        config.fp16_cache_bytes(window)
    );
    // Twice FP16's for f32, and at most 64 positions and their growth too many.
    assert!(cache.footprint().total() < 2 * 2 * config.fp16_cache_bytes(1) * (window + 64));
}
