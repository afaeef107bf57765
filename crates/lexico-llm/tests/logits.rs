//! Logits of the tiny model against those of PyTorch transformers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::PathBuf;

use lexico::tensor_file::TensorFile;
use lexico_llm::cache::{CacheSpec, KvCache};
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::{Model, Quantize};

const TOLERANCE: f32 = 2e-3;

struct Golden {
    /// `[2, 96]`
    tokens: Vec<Vec<u32>>,
    /// `[2, 96, vocabulary]`
    logits: Vec<Vec<f32>>,
}

fn golden() -> Option<Golden> {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/tiny/golden.safetensors");
    if !path.is_file() {
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    }
    let file = TensorFile::open(path).unwrap();
    let tokens = file.bytes("tokens").unwrap();
    let tokens: Vec<u32> = tokens
        .as_chunks::<8>()
        .0
        .iter()
        .map(|&b| i64::from_le_bytes(b) as u32)
        .collect();
    let (logits, shape) = file.f32_tensor("logits", 3).unwrap();
    Some(Golden {
        tokens: tokens.chunks(shape[1]).map(<[u32]>::to_vec).collect(),
        logits: logits
            .chunks(shape[1] * shape[2])
            .map(<[f32]>::to_vec)
            .collect(),
    })
}

fn full(model: &Model) -> Box<dyn KvCache> {
    model
        .cache(&"full:dense=f32".parse::<CacheSpec>().unwrap())
        .unwrap()
}

fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Logits of every token, fed in chunks.
fn chunked(model: &Model, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut cache = full(model);
    let mut logits = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let mut step = [Sequence {
            tokens,
            cache: cache.as_mut(),
        }];
        let out = model.decoder.forward(&mut step, Logits::All).unwrap();
        logits.extend(out.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
    assert_eq!(cache.len(), tokens.len());
    logits
}

#[test]
fn equal_transformers_in_one_prefill_in_chunks_and_token_by_token() {
    let Some(golden) = golden() else { return };
    let model = Model::tiny().unwrap();
    for (tokens, want) in golden.tokens.iter().zip(&golden.logits) {
        for chunk in [tokens.len(), 7, 1] {
            let difference = worst(&chunked(&model, tokens, chunk), want);
            println!("chunks of {chunk}: {difference:.1e}");
            assert!(difference < TOLERANCE, "chunks of {chunk}: {difference}");
        }
    }
}

/// Sequences of different lengths and pasts in one pass give what each gives alone.
#[test]
fn several_sequences_in_one_pass_equal_each_alone() {
    let model = Model::tiny().unwrap();
    let text =
        "Question: Ana has 12 coins. Ben gives Ana 7 more. How many coins does Ana have now?";
    let tokens = model.tokenizer.encode_first(text).unwrap();
    let spec: CacheSpec = "lexico:sparsity=8,window=8,batch=4".parse().unwrap();
    for cache in [
        |m: &Model, _: &CacheSpec| full(m),
        |m: &Model, s: &CacheSpec| m.cache(s).unwrap(),
    ] {
        let parts = [&tokens[..], &tokens[..5], &tokens[3..20]];
        let next = [7u32, 8, 9];
        let mut together: Vec<_> = parts.iter().map(|_| cache(&model, &spec)).collect();
        let mut logits = Vec::new();
        let steps: [Vec<&[u32]>; 2] = [
            parts.to_vec(),
            next.iter().map(std::slice::from_ref).collect(),
        ];
        for step in &steps {
            let mut sequences: Vec<Sequence<'_>> = together
                .iter_mut()
                .zip(step)
                .map(|(cache, tokens)| Sequence {
                    tokens,
                    cache: cache.as_mut(),
                })
                .collect();
            logits.push(
                model
                    .decoder
                    .forward(&mut sequences, Logits::Last)
                    .unwrap()
                    .to_vec2::<f32>()
                    .unwrap(),
            );
        }
        for i in 0..parts.len() {
            let mut alone = cache(&model, &spec);
            for (step, logits) in steps.iter().zip(&logits) {
                let mut sequences = [Sequence {
                    tokens: step[i],
                    cache: alone.as_mut(),
                }];
                let own = model
                    .decoder
                    .forward(&mut sequences, Logits::Last)
                    .unwrap()
                    .to_vec2::<f32>()
                    .unwrap();
                let difference = worst(&own[0], &logits[i]);
                assert!(difference < 1e-3, "sequence {i}: {difference}");
            }
        }
    }
}

/// Quantised matrices give nearly the same logits; fewer bits, farther away.
#[test]
fn quantised_weights_stay_near() {
    let tokens = {
        let model = Model::tiny().unwrap();
        let text =
            "Question: Ana has 12 coins. Ben gives Ana 7 more. How many coins does Ana have now?";
        model.tokenizer.encode_first(text).unwrap()
    };
    let logits = |quantize| {
        chunked(
            &Model::tiny_on(quantize, &lexico_llm::Device::Cpu).unwrap(),
            &tokens,
            tokens.len(),
        )
    };
    let exact = logits(Quantize::None);
    let whole = exact.iter().map(|x| x * x).sum::<f32>().sqrt();
    let error = |quantize| {
        let logits = logits(quantize);
        let squares = logits.iter().zip(&exact).map(|(a, b)| (a - b) * (a - b));
        squares.sum::<f32>().sqrt() / whole
    };
    let errors = [Quantize::Q8_0, Quantize::Q6K, Quantize::Q4K].map(error);
    println!("relative error of the logits with q8_0, q6_k, q4_k: {errors:?}");
    assert!(errors[0] > 0.0 && errors[0] < 0.02, "{errors:?}");
    assert!(
        errors[0] < errors[1] && errors[1] < errors[2] && errors[2] < 0.3,
        "{errors:?}"
    );
}

/// A prompt so long that a layer works on it in parts.
#[test]
fn a_long_prompt_is_the_same_in_one_piece_and_in_many() {
    let model = Model::tiny().unwrap();
    let vocabulary = model.decoder.config().vocabulary as u32;
    let tokens: Vec<u32> = (0..1100).map(|i| (i * 7919) % vocabulary).collect();
    let mut last = Vec::new();
    for size in [tokens.len(), 275] {
        let mut cache = full(&model);
        let mut logits = Vec::new();
        for tokens in tokens.chunks(size) {
            let mut step = [Sequence {
                tokens,
                cache: cache.as_mut(),
            }];
            let forward = model.decoder.forward(&mut step, Logits::Last).unwrap();
            logits = forward.squeeze(0).unwrap().to_vec1::<f32>().unwrap();
        }
        last.push(logits);
    }
    assert!(worst(&last[0], &last[1]) < TOLERANCE);
}

/// What a server relies on: who is decoded beside a sequence changes none of its logits.
#[test]
fn tokens_of_several_sequences_have_the_logits_that_each_has_alone() {
    for quantize in [Quantize::None, Quantize::Q8_0] {
        let model = Model::tiny_on(quantize, &lexico_llm::Device::Cpu).unwrap();
        let spec: CacheSpec = "lexico:window=8,batch=4".parse().unwrap();
        let count = model.decoder.rows_alike().min(21);
        assert!(count > 4);
        let text = |i: usize| -> Vec<u32> {
            (0..20 + 5 * i)
                .map(|t| ((7 * t + i) % 900) as u32)
                .collect()
        };
        let read = |i: usize| {
            let mut cache = model.cache(&spec).unwrap();
            let own = cache.as_mut();
            model
                .decoder
                .forward_one(&text(i), own, Logits::Last)
                .unwrap();
            cache
        };
        let mut caches: Vec<Box<dyn KvCache>> = (0..count).map(read).collect();
        let tokens: Vec<[u32; 1]> = (0..count).map(|i| [i as u32 + 100]).collect();
        let sequences = caches.iter_mut().zip(&tokens);
        let sequences = sequences.map(|(cache, tokens)| Sequence {
            tokens,
            cache: cache.as_mut(),
        });
        let mut sequences: Vec<Sequence<'_>> = sequences.collect();
        let together = model.decoder.forward(&mut sequences, Logits::Last).unwrap();
        for (i, together) in together.to_vec2::<f32>().unwrap().iter().enumerate() {
            let mut cache = read(i);
            let own = cache.as_mut();
            let alone = model
                .decoder
                .forward_one(&tokens[i], own, Logits::Last)
                .unwrap();
            assert_eq!(
                &alone.to_vec2::<f32>().unwrap()[0],
                together,
                "{quantize:?}, sequence {i}"
            );
        }
    }
}
