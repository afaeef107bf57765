//! GSM8K (Cobbe et al., 2021): word problems, answered with worked steps that end in `#### ` and the number.
//!
//! Prompts, examples and the two ways to find a number in an answer are those of EleutherAI's
//! lm-evaluation-harness, task `gsm8k` version 3.0: five examples before each problem, drawn anew for each from the
//! training problems as Python's `random.Random(1234)` draws them, and up to 256 tokens for an answer.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::json;

use super::python_random::PythonRandom;
use crate::data::{self, Record};
use crate::error::{Error, Result};
use crate::questions::{Item, Questions, Verdict};
use crate::task::{Measure, named};

/// Seed of the harness's examples.
const SEED: u64 = 1234;
/// Tokens that the harness lets a model write where a task does not say.
const MAX_TOKENS: usize = 256;
const STOP: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// Way to find a number in what the model wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Extraction {
    /// The first number after `#### `; the harness's `strict-match`.
    #[default]
    Strict,
    /// The last number of all; the harness's `flexible-extract`.
    Flexible,
}

impl Extraction {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Flexible => "flexible",
        }
    }
}

impl FromStr for Extraction {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Self::Strict, Self::Flexible];
        let found = all.into_iter().find(|extraction| extraction.name() == name);
        found.ok_or_else(|| {
            Error::Options(format!(
                "no way {name:?} to find an answer; there are strict, flexible"
            ))
        })
    }
}

/// Takes the problems of `test`, each with `shots` examples of `train` before it. Both are `.jsonl`, `.json` or
/// `.parquet` files with the texts `question` and `answer`.
///
/// # Errors
/// [`Error::Data`] and [`Error::File`] where a file cannot be read or lacks a field, [`Error::Options`] where
/// there are fewer examples.
pub fn read(test: &Path, train: &Path, shots: usize, extraction: Extraction) -> Result<Questions> {
    let examples = data::read(train)?;
    let examples: Vec<(String, &str)> = examples.iter().map(problem).collect::<Result<_>>()?;
    if shots > examples.len() {
        return Err(Error::Options(format!(
            "{shots} examples are impossible: {} has {}",
            train.display(),
            examples.len()
        )));
    }
    let mut random = PythonRandom::new(SEED);
    let mut items = Vec::new();
    for (number, record) in data::read(test)?.iter().enumerate() {
        let (question, answer) = problem(record)?;
        let mut prompt = String::new();
        for example in random.sample(examples.len(), shots) {
            let (question, answer) = &examples[example];
            prompt += &format!("{question} {answer}\n\n");
        }
        if !answer.contains("#### ") {
            return Err(record.refused("field \"answer\" has no \"#### NUMBER\"".to_owned()));
        }
        items.push(Item {
            id: number.to_string(),
            group: None,
            prompt: prompt + &question,
            begun: String::new(),
            is_message: true,
            max_tokens: MAX_TOKENS,
            stop: STOP.map(str::to_owned).into(),
            expected: normalised(answer),
        });
    }
    Ok(Questions {
        name: "gsm8k",
        measure: Measure::Accuracy,
        settings: named([
            ("shots", json!(shots)),
            ("extraction", json!(extraction.name())),
        ]),
        items,
        judge: Box::new(move |_, item, text| judge(text, extraction, &item.expected)),
    })
}

/// The files of the test and of the training problems in `openai/gsm8k` on the hub, downloaded where its cache
/// lacks them. With `progress`, bars are drawn on stderr.
///
/// # Errors
/// Those of [`DatasetName::fetch`](lexico_llm::hub::DatasetName::fetch).
pub fn fetch(progress: bool) -> Result<(PathBuf, PathBuf)> {
    let file = |split: &str| {
        super::fetch_one("openai/gsm8k", &format!("main/{split}-*.parquet"), progress)
    };
    Ok((file("test")?, file("train")?))
}

fn judge(text: &str, extraction: Extraction, expected: &str) -> Verdict {
    Verdict::exact(extract(text, extraction).map(normalised), expected)
}

/// A problem as in a prompt, and its answer.
fn problem(record: &Record) -> Result<(String, &str)> {
    let question = format!("Question: {}\nAnswer:", record.text("question")?);
    Ok((question, record.text("answer")?))
}

/// The number in what a model wrote, as it stands there.
pub fn extract(text: &str, extraction: Extraction) -> Option<&str> {
    match extraction {
        Extraction::Strict => strict(text),
        Extraction::Flexible => flexible(text),
    }
}

/// The first match of `#### (-?[0-9.,]+)`.
fn strict(text: &str) -> Option<&str> {
    text.match_indices("#### ").find_map(|(at, mark)| {
        let rest = &text[at + mark.len()..];
        let sign = usize::from(rest.starts_with('-'));
        let of_number = |c: char| c.is_ascii_digit() || matches!(c, '.' | ',');
        let length = rest[sign..].find(|c| !of_number(c));
        let length = length.unwrap_or(rest.len() - sign);
        (length > 0).then(|| &rest[..sign + length])
    })
}

/// The last match of `(-?[$0-9.,]{2,})|(-?[0-9]+)`.
fn flexible(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let of_number = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'$' | b'.' | b',');
    let mut last = None;
    let mut at = 0;
    while at < bytes.len() {
        let start = at + usize::from(bytes[at] == b'-');
        let length = bytes[start..]
            .iter()
            .take_while(|byte| of_number(byte))
            .count();
        if length >= 2 || (length == 1 && bytes[start].is_ascii_digit()) {
            last = Some(&text[at..start + length]);
            at = start + length;
        } else {
            at += 1;
        }
    }
    last
}

/// Text that the harness compares: without commas, `$`, all before the last `#### ` and a full stop at the end.
fn normalised(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text
        .rsplit_once("#### ")
        .map_or(text.as_str(), |(_, number)| number);
    let (line, end) = match text.strip_suffix('\n') {
        Some(line) => (line, "\n"),
        None => (text, ""),
    };
    let line = line.strip_suffix('.').unwrap_or(line);
    format!("{line}{end}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Completion, answer, then what either way finds, and whether it is right.
    type Case = (String, String, String, f64, String, f64);

    #[test]
    fn numbers_are_found_as_by_the_harness() {
        let golden = include_str!("../../tests/fixtures/gsm8k.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        assert_eq!(golden["until"], serde_json::json!(STOP));
        let cases: Vec<Case> = serde_json::from_value(golden["cases"].clone()).unwrap();
        assert!(cases.len() >= 122);
        for (text, answer, strict, strict_score, flexible, flexible_score) in cases {
            for (extraction, found, score) in [
                (Extraction::Strict, strict, strict_score),
                (Extraction::Flexible, flexible, flexible_score),
            ] {
                let what = format!("{extraction:?} of {text:?} for {answer:?}");
                let number = extract(&text, extraction);
                assert_eq!(number.unwrap_or("[invalid]"), found, "{what}");
                let verdict = judge(&text, extraction, &normalised(&answer));
                assert_eq!(verdict.score, score, "{what}");
            }
        }
    }

    fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.jsonl");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn prompts_are_examples_and_the_problem() {
        let (_a, test) = written(r#"{"question": "2+2?", "answer": "4.\n#### 4"}"#);
        let (_b, train) = written(r#"{"question": "1+1?", "answer": "2.\n#### 2"}"#);
        let set = super::read(&test, &train, 1, Extraction::Strict).unwrap();
        let item = &set.items[0];
        assert_eq!(
            item.prompt,
            "Question: 1+1?\nAnswer: 2.\n#### 2\n\nQuestion: 2+2?\nAnswer:"
        );
        assert_eq!((item.id.as_str(), item.max_tokens), ("0", 256));
        let verdict = set.judge(0, " It is 4.\n#### 4.\n\n");
        assert_eq!(verdict.score, 1.0);
        assert_eq!(
            (verdict.answer.as_deref(), item.expected.as_str()),
            (Some("4"), "4")
        );
        assert_eq!(set.judge(0, "4").answer, None);
    }

    #[test]
    fn what_cannot_be_a_set_is_refused() {
        let (_a, good) = written(r#"{"question": "2+2?", "answer": "\n#### 4"}"#);
        let (_b, bad) =
            written("{\"question\": \"2+2?\", \"answer\": \"#### 4\"}\n{\"question\": \"?\"}\n");
        let (_c, other) = written(r#"{"question": 3, "answer": "4"}"#);
        let read = |test: &Path, train: &Path, shots| {
            let set = super::read(test, train, shots, Extraction::Strict);
            set.map(|_| ()).unwrap_err().to_string()
        };
        for (error, expected) in [
            (
                read(&good, &bad, 1),
                "line 2: no field \"answer\"; there are question",
            ),
            (read(&bad, &good, 1), "line 2: no field \"answer\""),
            (
                read(&other, &good, 0),
                "line 1: field \"question\" holds no text",
            ),
            (read(&good, &good, 2), "2 examples are impossible: "),
        ] {
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn ways_to_find_an_answer_have_names() {
        for extraction in [Extraction::Strict, Extraction::Flexible] {
            assert_eq!(extraction.name().parse::<Extraction>().unwrap(), extraction);
        }
        let error = "loose".parse::<Extraction>().unwrap_err().to_string();
        assert!(error.contains("strict, flexible"), "{error}");
    }
}
