//! Real models, in GGUF files as people have them: `tests/fetch_models.sh FOLDER` brings two, and
//! `LEXICO_REAL_MODELS=FOLDER` names where they are. Without them these tests say that they were skipped.

#![allow(clippy::unwrap_used)] // a test may panic

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

const FILES: [&str; 2] = [
    "smollm2-135m-instruct-q4_1.gguf",
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
];

/// The files that are there.
fn models() -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("LEXICO_REAL_MODELS") else {
        println!("skipped: LEXICO_REAL_MODELS names no folder of real models");
        return Vec::new();
    };
    let files = FILES.map(|file| Path::new(&folder).join(file)).into_iter();
    let (there, missing): (Vec<_>, Vec<_>) = files.partition(|file| file.is_file());
    for file in missing {
        println!("skipped: there is no {}", file.display());
    }
    there
}

fn answer(model: &Path, arguments: &[&str]) -> Value {
    let output = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
        .args(["run", "--json", "-n", "24"])
        // Under its own system prompt SmolLM2 speaks of L'Étoile instead, here and in llama.cpp.
        .args(["--system-prompt", "You are a helpful assistant.", "--model"])
        .arg(model)
        .args(arguments)
        .arg("What is the capital of France?")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {message}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_capital_of_france_is_paris() {
    for model in models() {
        let mut caches = vec!["full"];
        // Dictionaries lie beside their model, under its name.
        let dictionary = model.with_extension("safetensors");
        let with_dictionary = ["--dictionary", dictionary.to_str().unwrap()];
        match dictionary.is_file() {
            true => caches.push("lexico"),
            false => println!("skipped: codes, for want of {}", dictionary.display()),
        }
        for cache in caches {
            let mut arguments = vec!["--cache", cache];
            if cache == "lexico" {
                arguments.extend(with_dictionary);
            }
            let answer = answer(&model, &arguments);
            let text = answer["text"].as_str().unwrap();
            assert!(
                text.contains("Paris"),
                "{} on {cache}: {text}",
                model.display()
            );
        }
    }
}

/// Matrices of every format that `--quantize` knows, made of those in the file's blocks.
#[test]
fn a_quantised_file_answers_in_fewer_bits_too() {
    for model in models() {
        for quantize in ["q8_0", "q6_k", "q4_k"] {
            let answer = answer(&model, &["--cache", "full", "--quantize", quantize]);
            let text = answer["text"].as_str().unwrap();
            assert!(
                text.contains("Paris"),
                "{} in {quantize}: {text}",
                model.display()
            );
        }
    }
}
