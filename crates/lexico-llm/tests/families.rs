//! Every family against PyTorch transformers: small random models made by `fixtures/make_families.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use common::{FAMILIES, chunked, family_folder, full, golden};
use lexico_llm::Quantize;
use lexico_llm::config::Config;
use lexico_llm::decoder::{Decoder, Logits, Sequence};

fn config(family: &str, file: &str) -> Config {
    let path = family_folder(family).join(file);
    Config::parse(&std::fs::read_to_string(&path).unwrap(), &path).unwrap()
}

#[test]
fn logits_equal_transformers_in_prefill_in_chunks_and_in_decode() {
    for family in FAMILIES {
        let (tokens, want) = golden(family, "logits");
        let decoder = Decoder::open(&family_folder(family), Quantize::None).unwrap();
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
    let decoder = Decoder::open(&family_folder("mistral-window"), Quantize::None).unwrap();
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
