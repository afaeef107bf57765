//! Files that lie, each in one way: every one gives an error that names what is wrong, none a panic.
//! `hostile/make_hostile.py` writes them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lexico::DictionarySet;
use lexico_llm::chat::{ChatTemplate, Message};
use lexico_llm::config::Config;
use lexico_llm::decoder::Decoder;
use lexico_llm::{Model, Quantize};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile")
}

/// What a user would do with a file of this name; the message where it is refused.
fn used(path: &Path) -> Result<(), String> {
    let name = path.file_name().unwrap().to_str().unwrap();
    let (kind, _) = name.split_once('-').unwrap_or((name, ""));
    match (kind, path.extension().unwrap().to_str().unwrap()) {
        (_, "gguf") => Model::load(path, Quantize::None)
            .and_then(|model| model.chat_template().map(drop))
            .map_err(|e| e.to_string()),
        (_, "safetensors") => DictionarySet::load(path)
            .map(drop)
            .map_err(|e| e.to_string()),
        ("config", _) => in_folder(path, "config.json", |folder| {
            Config::load(folder).map(drop).map_err(|e| e.to_string())
        }),
        ("index", _) => in_folder(path, "model.safetensors.index.json", |folder| {
            std::fs::write(
                folder.join("config.json"),
                common::small_config().to_string(),
            )
            .unwrap();
            let opened = Decoder::open(folder, Quantize::None);
            opened.map(drop).map_err(|e| e.to_string())
        }),
        ("template", _) => {
            let source = std::fs::read_to_string(path).unwrap();
            let messages = [Message::new("user", "Hello")];
            let template = ChatTemplate::parse(&source, Vec::new());
            let rendered = template.and_then(|template| template.render(&messages, true));
            rendered.map(drop).map_err(|e| e.to_string())
        }
        _ => panic!("{name}: nothing is known to be done with such a file"),
    }
}

fn in_folder(
    path: &Path,
    name: &str,
    open: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(path, folder.path().join(name)).unwrap();
    open(folder.path())
}

#[test]
fn every_lie_is_named() {
    let text = std::fs::read_to_string(folder().join("expected.json")).unwrap();
    let expected: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
    assert!(expected.len() > 100);
    let mut failures = Vec::new();
    for (name, word) in &expected {
        match used(&folder().join(name)) {
            Ok(()) if word.is_empty() => {}
            Err(message) if !word.is_empty() && message.contains(word.as_str()) => {}
            other => failures.push(format!("{name}: {other:?}, {word:?} expected")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Every file cut at every length, or with any byte changed, loads or is refused.
#[test]
fn a_sound_file_may_be_damaged_anywhere() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["sound.gguf", "dictionary-sound.safetensors"] {
        let sound = std::fs::read(folder().join(name)).unwrap();
        let path = scratch.path().join(name);
        let mut refused = 0;
        for at in 0..sound.len() {
            std::fs::write(&path, &sound[..at]).unwrap();
            assert!(used(&path).is_err(), "{name} cut at {at} loads");
            for flip in [0xff, 0x80, 1] {
                let mut damaged = sound.clone();
                damaged[at] ^= flip;
                std::fs::write(&path, damaged).unwrap();
                refused += usize::from(used(&path).is_err());
            }
        }
        // The rest are changed numbers of weights, or names of no consequence.
        assert!(refused > sound.len() / 8, "{name}: only {refused}");
    }
}
