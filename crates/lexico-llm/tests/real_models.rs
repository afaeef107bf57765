//! Real models against llama.cpp: `LEXICO_REAL_MODELS` names the folder where `crates/lexico-cli/tests/fetch_models.sh`
//! put them. Without it these tests say that they were skipped.

#![allow(clippy::unwrap_used)] // a test may panic

use std::path::Path;

use lexico::attention::NumberType;
use lexico_llm::Quantize;
use lexico_llm::cache::FullCache;
use lexico_llm::decoder::{Decoder, Logits};
use serde::Deserialize;

/// `fixtures/make_llama_logits.py`.
#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    file: String,
    tokens: Vec<u32>,
    stride: usize,
    /// Of llama.cpp on the weights widened to f32.
    exact: Vec<Vec<f32>>,
    /// Of llama.cpp on the file.
    llama_cpp: Vec<Vec<f32>>,
}

/// The mean and the largest difference.
fn off(a: &[Vec<f32>], b: &[Vec<f32>]) -> (f32, f32) {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    let differences: Vec<f32> = pairs.map(|(a, b)| (a - b).abs()).collect();
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    (mean, differences.iter().fold(0.0, |most, x| x.max(most)))
}

#[test]
fn logits_are_off_by_no_more_than_those_of_llama_cpp() {
    let Some(folder) = std::env::var_os("LEXICO_REAL_MODELS") else {
        println!("skipped: LEXICO_REAL_MODELS names no folder of real models");
        return;
    };
    let expected = include_str!("fixtures/llama_logits.json");
    let expected: Expected = serde_json::from_str(expected).unwrap();
    for case in expected.cases {
        let path = Path::new(&folder).join(&case.file);
        if !path.is_file() {
            println!("skipped: there is no {}", path.display());
            continue;
        }
        let decoder = Decoder::open(&path, Quantize::None).unwrap();
        // In one prefill, and token by token.
        for chunk in [case.tokens.len(), 1] {
            let mut cache = FullCache::new(decoder.config(), NumberType::F32);
            let mut found = Vec::new();
            for tokens in case.tokens.chunks(chunk) {
                let logits = decoder
                    .forward_one(tokens, &mut cache, Logits::All)
                    .unwrap();
                let logits = logits.to_vec2::<f32>().unwrap().into_iter();
                found.extend(logits.map(|row| row.into_iter().step_by(case.stride).collect()));
            }
            let (ours, theirs) = (off(&found, &case.exact), off(&case.llama_cpp, &case.exact));
            println!(
                "{}, {chunk} at once: off by {ours:.4?}, llama.cpp by {theirs:.4?}",
                case.file
            );
            assert!(
                ours.0 <= 1.1 * theirs.0,
                "{}: {ours:?} to {theirs:?}",
                case.file
            );
        }
    }
}
