//! GGUF files of every family, written by ggml's own Python package (`fixtures/make_families.py`),
//! against the folders they were made from.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use common::{FAMILIES, chunked, family_folder, golden, golden_of};
use lexico_llm::config::{Config, RotaryScaling};
use lexico_llm::decoder::Decoder;
use lexico_llm::generate::{GenerateOptions, generate};
use lexico_llm::gguf::GgufModel;
use lexico_llm::sample::{Sampler, Sampling};
use lexico_llm::{Model, Quantize, Tokenizer, TokenizerFiles};

fn file(family: &str, name: &str) -> PathBuf {
    family_folder(family).join(name)
}

fn open(path: &Path) -> Decoder {
    Decoder::open(path, Quantize::None).unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

fn greedy_text(path: &Path, prompt: &[u32]) -> String {
    let model = Model::load(path, Quantize::None).unwrap();
    let mut cache = model.cache(&"full:dense=f32".parse().unwrap()).unwrap();
    let mut sampler = Sampler::new(Sampling::default()).unwrap();
    let options = GenerateOptions {
        max_tokens: 100,
        ignore_end: true,
        ..Default::default()
    };
    let mut text = String::new();
    generate(
        &model,
        cache.as_mut(),
        prompt,
        &mut sampler,
        &options,
        &mut |new| {
            text += new;
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    text
}

#[test]
fn f16_files_give_the_text_of_their_folders() {
    for family in FAMILIES {
        let (tokens, want) = golden(family, "logits");
        let got = chunked(&open(&file(family, "f16.gguf")), &tokens, 7);
        let difference = worst(&got, &want);
        println!("{family}: {difference:.1e}");
        assert!(difference < 2e-3, "{family}: {difference}");
        let (from_file, from_folder) = (
            greedy_text(&file(family, "f16.gguf"), &tokens),
            greedy_text(&family_folder(family), &tokens),
        );
        assert!(from_folder.len() > 50, "{family}: {from_folder:?}");
        assert_eq!(from_file, from_folder, "{family}");
    }
}

/// The weights' own rounding moves transformers' logits so far; candle's products round the
/// activations to 8 bits as well, which adds up to 1.6 times as much (and as much in llama.cpp on the same files).
#[test]
fn q8_0_files_stay_within_the_rounding_of_their_weights() {
    for family in FAMILIES {
        let (tokens, exact) = golden(family, "logits");
        let (_, rounded) = golden(family, "logits_q8_0");
        let got = chunked(&open(&file(family, "q8_0.gguf")), &tokens, tokens.len());
        let (own, ours, all) = (
            worst(&rounded, &exact),
            worst(&got, &rounded),
            worst(&got, &exact),
        );
        println!("{family}: weights {own:.3}, beyond them {ours:.3}, together {all:.3}");
        assert!(ours < 2.0 * own, "{family}: {ours} beyond {own}");
    }
}

/// A file with a matrix in every number type: `fixtures/make_quantised.py`.
#[test]
fn every_number_type_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantised");
    let path = folder.join("every-type.gguf");
    assert_eq!(GgufModel::open(&path).unwrap().number_types().len(), 13);
    let (tokens, want) = golden_of(&folder, "logits");
    let largest = want.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    for chunk in [tokens.len(), 1] {
        let difference = worst(&chunked(&open(&path), &tokens, chunk), &want);
        println!("{difference:.3} of {largest:.1}");
        // Activations are rounded to 8 bits; a mistake in a layout moves logits by their own size.
        assert!(difference < 0.04 * largest, "{difference} of {largest}");
    }
}

#[test]
fn both_kinds_of_file_say_the_same_of_the_model() {
    for family in FAMILIES {
        let (a, b) = (
            open(&file(family, "f16.gguf")),
            open(&family_folder(family)),
        );
        let (mut ours, theirs) = (a.config().clone(), b.config().clone());
        if family == "llama-3.1" {
            // The fixture's constants are not Llama's: the factors stay factors.
            ours.rotary.scaling = theirs.rotary.scaling.clone();
        } else {
            assert_eq!(ours.identity("x"), theirs.identity("x"), "{family}");
        }
        ours.architecture = theirs.architecture.clone();
        assert_eq!(ours, theirs, "{family}");
    }
}

/// Matrices that a file holds in blocks are quantised to smaller ones, and stay where they are smaller already.
#[test]
fn a_quantised_file_is_quantised_to_less_and_never_to_more() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantised");
    let path = folder.join("every-type.gguf");
    let (tokens, want) = golden_of(&folder, "logits");
    let largest = want.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let logits = |quantize| {
        let decoder = Decoder::open(&path, quantize).unwrap();
        chunked(&decoder, &tokens, tokens.len())
    };
    let stored = logits(Quantize::None);
    let formats = [
        (Quantize::Q8_0, 0.03),
        (Quantize::Q6K, 0.1),
        (Quantize::Q4K, 0.4),
    ];
    for (quantize, share) in formats {
        let smaller = logits(quantize);
        let (moved, off) = (worst(&smaller, &stored), worst(&smaller, &want));
        println!("{quantize:?}: {moved:.3} moved, {off:.3} off, of {largest:.1}");
        assert!(moved > 0.0, "{quantize:?} quantised nothing");
        assert!(off < share * largest, "{quantize:?}: {off} of {largest}");
    }
    // Each matrix of this file takes less than 8 bits a number, or is one of 8 bits.
    let path = file("llama", "q8_0.gguf");
    let logits = |quantize| {
        let decoder = Decoder::open(&path, quantize).unwrap();
        let (tokens, _) = golden("llama", "logits");
        chunked(&decoder, &tokens, tokens.len())
    };
    assert_eq!(logits(Quantize::Q8_0), logits(Quantize::None));
}

/// Texts as `tokenizers`, sentencepiece and llama.cpp encode them: `fixtures/make_gguf_tokenizers.py`.
#[test]
fn vocabularies_encode_as_the_libraries_they_come_from() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let text = std::fs::read_to_string(fixtures.join("tokenizers.json")).unwrap();
    let kinds: HashMap<String, Vec<(String, Vec<u32>)>> = serde_json::from_str(&text).unwrap();
    assert_eq!(kinds.len(), 5);
    for (kind, texts) in kinds {
        let path = fixtures.join(format!("tokenizers/{kind}.gguf"));
        let model = Model::load(&path, Quantize::None).unwrap();
        assert!(texts.len() > 12, "{kind}");
        for (text, want) in texts {
            let tokens = model.tokenizer.encode_more(&text).unwrap();
            assert_eq!(tokens, want, "{kind}: {text:?}");
            // Special tokens are left out, sentencepiece's own sign is a space, NFC composes.
            let changed = text.contains(['<', '▁']) || kind == "qwen2" && text.contains('\u{301}');
            if !changed {
                assert_eq!(model.tokenizer.decode(&tokens).unwrap(), text, "{kind}");
            }
        }
        let first = model.tokenizer.encode_first("Hello").unwrap();
        let begins = !["qwen2", "gpt-2"].contains(&kind.as_str());
        assert_eq!(first[0] == 0, begins, "{kind}: {first:?}");
        // </s>, and <|end|> by its text.
        let turn = if kind == "llama" { 4 } else { 3 };
        assert_eq!(model.end_tokens, [1, turn], "{kind}");
    }
}

/// Bytes that make no character turn those before them into replacement characters, in a decoder that
/// has pieces of single bytes; what was given out is not taken back, and nothing after it is lost.
#[test]
fn text_after_bytes_that_make_no_character_is_not_lost() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/llama.gguf");
    let tokenizer = Model::load(&path, Quantize::None).unwrap().tokenizer;
    let byte = |byte: u32| 5 + byte;
    assert_eq!(
        tokenizer.encode_more("é").unwrap()[1..],
        [0xc3, 0xa9].map(byte)
    );
    for character in ["é", "你", "😀"] {
        let bytes = character.bytes().chain([0xff]);
        let mut tokens: Vec<u32> = bytes.map(|b| byte(u32::from(b))).collect();
        tokens.extend(tokenizer.encode_more("word").unwrap());
        let mut stream = tokenizer.stream();
        let mut text: String = tokens.iter().map(|&t| stream.push(t).unwrap()).collect();
        text += &stream.finish().unwrap();
        assert!(
            text.starts_with(character) && text.ends_with("\u{fffd} word"),
            "{text:?}"
        );
    }
}

/// A name from outside must not steer the terminal.
#[test]
fn names_have_no_control_characters() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/sound-name.gguf");
    let name = GgufModel::open(&path).unwrap().name();
    assert_eq!(name, "a[2Jb");
}

#[test]
fn frontends_find_the_tokenizer_and_the_shape_of_a_file() {
    for family in FAMILIES {
        let path = file(family, "f16.gguf");
        let gguf = GgufModel::open(&path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        gguf.write_frontend_files(folder.path()).unwrap();
        let config = Config::load(folder.path()).unwrap();
        let mut own = gguf.config().clone();
        if let RotaryScaling::Factors(_) = own.rotary.scaling {
            // Factors have no place in a config, and a frontend has no use for them.
            own.rotary.scaling = RotaryScaling::None;
        }
        assert_eq!(format!("{config:?}"), format!("{own:?}"), "{family}");
        let json = std::fs::read(folder.path().join("tokenizer.json")).unwrap();
        let files = TokenizerFiles::read(folder.path()).unwrap();
        let tokenizer = Tokenizer::parse(&json, files, folder.path()).unwrap();
        let model = Model::load(&path, Quantize::None).unwrap();
        for text in ["One, two and 345.", " a  b\n\n", "Größe, 大きさ, 🙂"] {
            let first = model.tokenizer.encode_first(text).unwrap();
            assert_eq!(
                tokenizer.encode_first(text).unwrap(),
                first,
                "{family}: {text:?}"
            );
            // As a library that knows nothing of tokenizer_config.json does.
            let alone = Tokenizer::parse(&json, TokenizerFiles::of_config("{}"), folder.path());
            assert_eq!(
                alone.unwrap().encode_first(text).unwrap(),
                first,
                "{family}: {text:?}"
            );
        }
    }
}
