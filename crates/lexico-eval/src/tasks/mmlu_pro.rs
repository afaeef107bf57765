//! MMLU-Pro (Wang et al., 2024): questions of fourteen subjects with up to ten options, answered step by step.
//!
//! Prompts and the ways to find an answer are those of the published `evaluate_from_local.py` with `--ntrain 0`: no
//! examples, one sentence that says how to answer, the question with its options, and `Answer: Let's think step by
//! step.` An item without an answer counts as wrong; the script draws an option then.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::data::{self, Record};
use crate::error::{Error, Result};
use crate::metrics::{is_space, is_word};
use crate::questions::{Item, Questions, Verdict};
use crate::task::{Measure, named};

const LETTERS: &[u8] = b"ABCDEFGHIJ";
const MAX_TOKENS: usize = 2048;
const STOP: &str = "Question:";

/// Takes the questions of `path`, a `.parquet`, `.jsonl` or `.json` file, and of them those of `subjects`, in
/// which `_` may stand for a space; all where none is named.
///
/// # Errors
/// [`Error::Data`] and [`Error::File`] where the file cannot be read or lacks a field, [`Error::Options`] where a
/// subject has no question.
pub fn read(path: &Path, subjects: &[String]) -> Result<Questions> {
    let records = data::read(path)?;
    let mut there: BTreeSet<&str> = BTreeSet::new();
    for record in &records {
        there.insert(record.text("category")?);
    }
    let subjects: Vec<String> = subjects.iter().map(|s| s.replace('_', " ")).collect();
    if let Some(unknown) = subjects.iter().find(|s| !there.contains(s.as_str())) {
        let there: Vec<&str> = there.into_iter().collect();
        return Err(Error::Options(format!(
            "no question of {} is on {unknown:?}; there are {}",
            path.display(),
            there.join(", ")
        )));
    }
    let mut items = Vec::new();
    for record in &records {
        let category = record.text("category")?;
        if !subjects.is_empty() && !subjects.iter().any(|subject| subject == category) {
            continue;
        }
        let id = record.value("question_id")?;
        let (prompt, answer) = question(record, category)?;
        items.push(Item {
            id: id.as_str().map_or_else(|| id.to_string(), str::to_owned),
            group: Some(category.to_owned()),
            prompt,
            begun: String::new(),
            is_message: true,
            max_tokens: MAX_TOKENS,
            stop: vec![STOP.to_owned()],
            expected: answer.to_string(),
        });
    }
    let taken: BTreeSet<&String> = items
        .iter()
        .filter_map(|item| item.group.as_ref())
        .collect();
    Ok(Questions {
        name: "mmlu-pro",
        measure: Measure::Accuracy,
        settings: named([("subjects", json!(taken))]),
        items,
        judge: Box::new(|_, item, text| {
            Verdict::exact(extract(text).map(String::from), &item.expected)
        }),
    })
}

/// The file of the test questions in `TIGER-Lab/MMLU-Pro` on the hub, downloaded where its cache lacks it. With
/// `progress`, bars are drawn on stderr.
///
/// # Errors
/// Those of [`DatasetName::fetch`](lexico_llm::hub::DatasetName::fetch).
pub fn fetch(progress: bool) -> Result<PathBuf> {
    super::fetch_one("TIGER-Lab/MMLU-Pro", "data/test-*.parquet", progress)
}

/// The prompt of a record, and its answer.
fn question(record: &Record, category: &str) -> Result<(String, char)> {
    let options = record.texts("options")?;
    // Questions with fewer options are filled up.
    let options: Vec<&str> = options.into_iter().filter(|&text| text != "N/A").collect();
    if options.len() > LETTERS.len() {
        let reason = format!(
            "field \"options\" holds {}, more than {}",
            options.len(),
            LETTERS.len()
        );
        return Err(record.refused(reason));
    }
    let letters = LETTERS.iter().copied().map(char::from);
    let letters: Vec<char> = letters.take(options.len()).collect();
    let answer = record.text("answer")?;
    let found = letters.iter().find(|letter| answer == letter.to_string());
    let Some(&right) = found else {
        let reason = format!(
            "field \"answer\" is {answer:?}, which is no letter of the {} options",
            options.len()
        );
        return Err(record.refused(reason));
    };
    let mut prompt = format!(
        "The following are multiple choice questions (with answers) about {category}. Think step by step and then \
         finish your answer with \"the answer is (X)\" where X is the correct letter choice.\n\n\n\nQuestion:\n{}\n\
         Options:\n",
        record.text("question")?
    );
    for (letter, option) in letters.iter().zip(options) {
        prompt += &format!("{letter}. {option}\n");
    }
    Ok((prompt + "Answer: Let's think step by step.", right))
}

/// The letter that a text gives as its answer: that of `answer is (X)`, else of `Answer: X`, else the last that
/// stands alone.
pub fn extract(text: &str) -> Option<char> {
    sentence(text)
        .or_else(|| label(text))
        .or_else(|| alone(text))
}

fn letter(text: &str) -> Option<char> {
    text.chars().next().filter(|c| ('A'..='J').contains(c))
}

/// The first match of `answer is \(?([A-J])`.
fn sentence(text: &str) -> Option<char> {
    text.split("answer is ")
        .skip(1)
        .find_map(|rest| letter(rest.strip_prefix('(').unwrap_or(rest)))
}

/// The last match of `[aA]nswer:\s*([A-J])` in the first line in which one begins.
fn label(text: &str) -> Option<char> {
    let mut found = None;
    let mut line = 0;
    for (at, rest) in text
        .match_indices("nswer:")
        .map(|(at, it)| (at, &text[at + it.len()..]))
    {
        let before = &text[line..at];
        if let Some(end) = before.rfind('\n') {
            if found.is_some() {
                break;
            }
            line += end + 1;
        }
        if before.ends_with(['a', 'A']) {
            found = letter(rest.trim_start_matches(is_space)).or(found);
        }
    }
    found
}

/// The last word that is one letter from A to J.
fn alone(text: &str) -> Option<char> {
    let mut words = text.rsplit(|c| !is_word(c));
    words.find_map(|word| letter(word).filter(|_| word.len() == 1))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/fixtures/mmlu_pro.json")).unwrap()
    }

    #[test]
    fn letters_are_found_as_by_the_published_script() {
        let cases: Vec<(String, Option<char>)> =
            serde_json::from_value(golden()["extracted"].clone()).unwrap();
        assert_eq!(cases.len(), 64);
        for (text, expected) in cases {
            assert_eq!(extract(&text), expected, "{text:?}");
        }
    }

    #[test]
    fn prompts_are_those_of_the_published_script() {
        let golden = golden();
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("questions.json");
        std::fs::write(&list, golden["questions"].to_string()).unwrap();
        let parquet = folder.path().join("questions.parquet");
        std::fs::write(
            &parquet,
            include_bytes!("../../tests/fixtures/mmlu_pro.parquet"),
        )
        .unwrap();
        for path in [list, parquet] {
            let set = super::read(&path, &[]).unwrap();
            let prompts: Vec<&str> = set.items.iter().map(|item| item.prompt.as_str()).collect();
            assert_eq!(Value::from(prompts), golden["prompts"]);
            let ids: Vec<&str> = set.items.iter().map(|item| item.id.as_str()).collect();
            assert_eq!(ids, ["70", "71", "9000", "9001"]);
            assert_eq!(set.judge(1, "So the answer is (J).").score, 1.0);
            assert_eq!(set.judge(1, "So the answer is (A).").score, 0.0);
            let verdict = set.judge(3, "?");
            assert_eq!((verdict.score, verdict.answer), (0.0, None));
            assert_eq!(set.items[3].expected, "C");

            let subjects = ["computer_science".to_owned(), "law".to_owned()];
            let some = super::read(&path, &subjects).unwrap();
            assert_eq!(some.items, &set.items[2..]);
            let groups: Vec<_> = some.items.iter().map(|i| i.group.as_deref()).collect();
            assert_eq!(groups, [Some("computer science"), Some("law")]);
            let error = super::read(&path, &["alchemy".to_owned()])
                .err()
                .unwrap()
                .to_string();
            let there = "on \"alchemy\"; there are biology, computer science, engineering, law";
            assert!(error.ends_with(there), "{error}");
        }
    }

    #[test]
    fn questions_that_are_none_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.jsonl");
        let question = golden()["questions"][0].clone();
        let eleven: Vec<String> = (0..11).map(|n| n.to_string()).collect();
        for (field, value, expected) in [
            (
                "category",
                Value::Null,
                "line 2: field \"category\" holds no text",
            ),
            (
                "question",
                3.into(),
                "line 2: field \"question\" holds no text",
            ),
            (
                "options",
                "A, B".into(),
                "line 2: field \"options\" holds no list of texts",
            ),
            (
                "options",
                eleven.into(),
                "line 2: field \"options\" holds 11, more than 10",
            ),
            (
                "answer",
                "D".into(),
                "line 2: field \"answer\" is \"D\", which is no letter of the 3 options",
            ),
            ("answer", "".into(), "which is no letter"),
        ] {
            let mut bad = question.clone();
            bad[field] = value;
            std::fs::write(&path, format!("{question}\n{bad}\n")).unwrap();
            let error = super::read(&path, &[]).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let mut bad = question.clone();
        bad.as_object_mut().unwrap().remove("question_id");
        std::fs::write(&path, bad.to_string()).unwrap();
        let error = super::read(&path, &[]).err().unwrap().to_string();
        assert!(
            error.contains("line 1: no field \"question_id\"; there are "),
            "{error}"
        );
    }
}
