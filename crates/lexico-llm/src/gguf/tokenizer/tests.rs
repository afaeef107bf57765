//! Vocabularies against the libraries and programs that they come from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hashbrown::HashMap;
use serde::Deserialize;
use serde_json::json;
use tokenizers::Tokenizer as Inner;

use super::sentence_pieces::merges;
use super::{Kind, Vocabulary, build, byte_level_tokenizer, end_tokens, read, splits};
use crate::gguf::GgufFile;
use crate::tokenizer::Tokenizer;
use crate::tokenizer_config::TokenizerFiles;

/// What `tests/fixtures/make_splits.py` writes.
#[derive(Deserialize)]
struct Expected {
    tokens: Vec<String>,
    merges: Vec<String>,
    /// Names of every way of splitting.
    families: Vec<Vec<String>>,
    /// A text, and its tokens by the families that share them.
    texts: Vec<(String, Vec<(Vec<usize>, String)>)>,
}

impl Expected {
    fn tokenizer(&self, name: &str) -> Inner {
        let numbers = self.tokens.iter().map(String::as_str).zip(0..).collect();
        let merges = self.merges.iter().map(|merge| {
            let (left, right) = merge.split_once(' ').unwrap();
            [left, right]
        });
        let merges: Vec<[&str; 2]> = merges.collect();
        let split = splits::by_name(name).unwrap();
        build(byte_level_tokenizer(split), &numbers, &merges, json!([])).unwrap()
    }

    /// Compares every text by every name; their count.
    fn check(&self) -> usize {
        let named: BTreeSet<&str> = self.families.iter().flatten().map(String::as_str).collect();
        assert_eq!(named, splits::names().collect());
        let (mut compared, mut wrong) = (0, Vec::new());
        for (number, names) in self.families.iter().enumerate() {
            for name in names {
                let tokenizer = self.tokenizer(name);
                for (text, results) in &self.texts {
                    let own = results
                        .iter()
                        .find(|(families, _)| families.contains(&number));
                    let (_, want) = own.unwrap();
                    let got = by_word(&tokenizer.encode(text.as_str(), false).unwrap());
                    compared += 1;
                    if got != *want {
                        wrong.push(format!("{name}: {text:?}: {got}, not {want}"));
                    }
                }
            }
        }
        for line in wrong.iter().take(20) {
            println!("{line}");
        }
        assert!(wrong.is_empty(), "{} of {compared} differ", wrong.len());
        compared
    }
}

/// Tokens, those of each word together: `3 17|4`.
fn by_word(encoding: &tokenizers::Encoding) -> String {
    let words = encoding.get_word_ids();
    let mut text = String::new();
    for (at, token) in encoding.get_ids().iter().enumerate() {
        if at > 0 {
            text.push(if words[at] == words[at - 1] { ' ' } else { '|' });
        }
        text += &token.to_string();
    }
    text
}

#[test]
fn every_name_splits_text_as_the_tokenizers_library_does() {
    let fixture = include_str!("../../../tests/fixtures/splits.json");
    let expected: Expected = serde_json::from_str(fixture).unwrap();
    let compared = expected.check();
    assert_eq!(compared, expected.texts.len() * splits::names().count());
}

/// The same of many texts: `LEXICO_SPLITS` names a file that `make_splits.py` wrote.
#[test]
#[ignore = "needs a file of LEXICO_SPLITS"]
fn every_name_splits_the_texts_of_a_file() {
    let path = std::env::var("LEXICO_SPLITS").unwrap();
    let expected: Expected = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let compared = expected.check();
    let (texts, names) = (expected.texts.len(), splits::names().count());
    println!("{texts} texts by {names} names: {compared} encodings, all equal");
}

/// Vocabularies of real files, and what llama.cpp or the family's own tokenizer makes of texts:
/// `LEXICO_VOCABULARIES` names a file that `make_vocabularies.py` wrote.
#[test]
#[ignore = "needs a file of LEXICO_VOCABULARIES"]
fn real_vocabularies_encode_as_their_own_tokenizers() {
    #[derive(Deserialize)]
    struct Case {
        gguf: String,
        by: String,
        texts: Vec<(String, Vec<u32>)>,
    }
    let path = std::env::var("LEXICO_VOCABULARIES").unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut wrong = 0;
    for case in cases {
        let name = Path::new(&case.gguf).file_name().unwrap().to_owned();
        let file = GgufFile::open(Path::new(&case.gguf)).unwrap();
        let texts = match read(&file, usize::MAX) {
            Ok(texts) => texts,
            Err(error) => {
                println!("{name:?}: {error}");
                continue;
            }
        };
        let files = TokenizerFiles::of_config(&texts.config);
        let tokenizer = Tokenizer::new(texts.inner, files, file.path()).unwrap();
        let mut differ = 0;
        for (text, want) in &case.texts {
            let got = tokenizer.encode_more(text).unwrap();
            if got != *want {
                differ += 1;
                if differ < 4 {
                    println!("{name:?}: {text:?}: {got:?}, not {want:?}");
                }
            }
        }
        // llama.cpp's own expressions are not always the family's.
        let allowed = if case.by == "llama.cpp" {
            case.texts.len() / 200
        } else {
            0
        };
        wrong += usize::from(differ > allowed);
        println!(
            "{name:?} by {}: {differ} of {} texts differ; {:?}",
            case.by,
            case.texts.len(),
            texts.notes
        );
    }
    assert_eq!(wrong, 0);
}

/// Vocabularies that are odd in one way each: `tests/fixtures/make_vocabularies_odd.py`.
#[test]
fn odd_vocabularies_are_read_as_llama_cpp_reads_them() {
    #[derive(Deserialize)]
    struct Odd {
        texts: Vec<(String, Vec<u32>)>,
        /// Tokens that end a text.
        ends: Vec<u64>,
        /// Tokens that are neither control tokens nor unknown.
        shown: Vec<usize>,
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let text = std::fs::read_to_string(fixtures.join("vocabularies.json")).unwrap();
    let all: BTreeMap<String, Odd> = serde_json::from_str(&text).unwrap();
    let mut wrong = Vec::new();
    for (name, odd) in &all {
        let path = fixtures.join(format!("vocabularies/{name}.gguf"));
        let file = GgufFile::open(&path).unwrap();
        let texts = read(&file, usize::MAX).unwrap();
        println!("{name}: {:?}", texts.notes);
        let files = TokenizerFiles::of_config(&texts.config);
        let tokenizer = Tokenizer::new(texts.inner, files, &path).unwrap();
        for (text, want) in &odd.texts {
            let got = tokenizer.encode_first(text).unwrap();
            if got != *want {
                wrong.push(format!("{name}: {text:?}: {got:?}, not {want:?}"));
            }
        }
        let ends = end_tokens(&file).unwrap();
        if ends != odd.ends {
            wrong.push(format!("{name}: ends {ends:?}, not {:?}", odd.ends));
        }
        let vocabulary = Vocabulary::read(&file).unwrap().unwrap();
        let kinds = vocabulary.roles.kinds.iter().enumerate();
        let shown = kinds.filter(|(_, kind)| !matches!(kind, Kind::Control | Kind::Unknown));
        let shown: Vec<usize> = shown.map(|(id, _)| id).collect();
        if shown != odd.shown {
            wrong.push(format!("{name}: shown {shown:?}, not {:?}", odd.shown));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Qwen and Llama 3 have `</s>` as plain text: it ends an answer as in llama.cpp, and nothing is said of it.
#[test]
fn a_plain_end_beside_the_files_own_is_not_noted() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let file = GgufFile::open(&fixtures.join("vocabularies/ends-2.gguf")).unwrap();
    let notes = format!("{:?}", read(&file, usize::MAX).unwrap().notes);
    assert!(
        notes.contains("<|eom_id|>") && !notes.contains("</s>"),
        "{notes}"
    );
}

/// A run of digits of any length takes no quadratic time.
#[test]
fn long_runs_are_split_in_little_time() {
    let fixture = include_str!("../../../tests/fixtures/splits.json");
    let expected: Expected = serde_json::from_str(fixture).unwrap();
    for name in splits::names() {
        let tokenizer = expected.tokenizer(name);
        let began = std::time::Instant::now();
        for unit in [
            "1", " ", "\n", "a", "A", "中", "ก", "!", "\u{301}", "a ", " \n", "'",
        ] {
            let text = unit.repeat(60_000 / unit.len());
            let encoding = tokenizer.encode_fast(text, false).unwrap();
            assert!(!encoding.get_ids().is_empty());
        }
        let took = began.elapsed();
        println!("{name}: {took:?}");
        assert!(took.as_secs() < 60, "{name}: {took:?}");
    }
}

/// A small file must not make much memory.
#[test]
fn pieces_of_one_another_are_merged_up_to_a_limit() {
    let merges_up_to = |longest: usize| {
        let pieces: Vec<String> = (1..=longest).map(|n| "a".repeat(n)).collect();
        let numbers: HashMap<&str, usize> = pieces.iter().map(String::as_str).zip(0..).collect();
        let found = merges(&numbers, &vec![0.0; longest])?;
        Some(
            found
                .into_iter()
                .map(|pair| pair.map(str::to_owned))
                .collect::<Vec<_>>(),
        )
    };
    let found = merges_up_to(4).unwrap();
    let found: Vec<[&str; 2]> = found
        .iter()
        .map(|pair| pair.each_ref().map(String::as_str))
        .collect();
    let all = [
        ["a", "a"],
        ["a", "aa"],
        ["aa", "a"],
        ["a", "aaa"],
        ["aa", "aa"],
        ["aaa", "a"],
    ];
    assert_eq!(found, all);
    assert!(merges_up_to(4096).is_none());
}
