//! Word problems in GSM8K's format, few-shot, judged by the number after `####`.

use std::path::Path;

use serde_json::json;

use crate::data::{self, Record};
use crate::error::{Error, Result};
use crate::questions::{Item, Questions, Verdict};
use crate::task::{Measure, named};

/// Max tokens of an answer.
const MAX_TOKENS: usize = 160;

/// The tiny model's own problem sets, embedded: all problems, each after `shots` worked examples.
///
/// # Errors
/// [`Error::Options`] where there are fewer examples.
pub fn problems(shots: usize) -> Result<Questions> {
    macro_rules! embedded {
        ($file:literal) => {
            data::parse_json(
                Path::new(concat!("tiny/", $file)),
                include_bytes!(concat!("../../../../models/tiny/", $file)),
            )
        };
    }
    let examples = embedded!("problems_train.jsonl")?;
    asked(&embedded!("problems_test.jsonl")?, &examples, shots)
}

/// Problems and examples, each a `question` and a worked `answer` that ends in `#### ` and the number.
fn asked(problems: &[Record], examples: &[Record], shots: usize) -> Result<Questions> {
    let Some(examples) = examples.get(..shots) else {
        let all = examples.len();
        let reason = format!("{shots} examples are impossible: there are {all}");
        return Err(Error::Options(reason));
    };
    let mut before = String::new();
    for example in examples {
        let (question, answer) = (example.text("question")?, example.text("answer")?);
        before += &format!("Question: {question}\nAnswer: {answer}\n\n");
    }
    let item = |(number, problem): (usize, &Record)| {
        Ok(Item {
            id: number.to_string(),
            group: None,
            prompt: format!("{before}Question: {}\nAnswer:", problem.text("question")?),
            begun: String::new(),
            is_message: true,
            max_tokens: MAX_TOKENS,
            stop: vec!["\n\n".to_owned()],
            expected: final_number(problem.text("answer")?).unwrap_or_default(),
        })
    };
    Ok(Questions {
        name: "problems",
        measure: Measure::Accuracy,
        settings: named([("shots", json!(shots))]),
        items: problems
            .iter()
            .enumerate()
            .map(item)
            .collect::<Result<_>>()?,
        judge: Box::new(|_, item, text| Verdict::exact(final_number(text), &item.expected)),
    })
}

/// The number after the first `####`, without thousands commas, currency or a full stop.
fn final_number(text: &str) -> Option<String> {
    let (_, after) = text.split_once("####")?;
    let word = after.split_whitespace().next()?;
    let word = word.trim_start_matches('$').trim_end_matches('.');
    let number: String = word.chars().filter(|c| *c != ',').collect();
    let digits = number.strip_prefix('-').unwrap_or(&number);
    let whole = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit());
    whole.then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_the_number_after_the_mark() {
        for (text, number) in [
            ("1 + 1 = 2.\n#### 2", Some("2")),
            ("#### 1,234\n\n", Some("1234")),
            ("#### -5 apples #### 6", Some("-5")),
            ("#### $42.", Some("42")),
            ("#### 4.5", None),
            ("no mark 7", None),
            ("####", None),
            ("#### seven", None),
        ] {
            assert_eq!(final_number(text).as_deref(), number, "{text:?}");
        }
    }

    fn records(text: &str) -> Vec<Record> {
        data::parse_json(Path::new("set.jsonl"), text.as_bytes()).unwrap()
    }

    #[test]
    fn the_prompt_is_examples_and_question() {
        let problems = records(r#"{"question": "2+2?", "answer": "4.\n#### 4"}"#);
        let examples = records(r#"{"question": "1+1?", "answer": "2.\n#### 2"}"#);
        let set = |shots| asked(&problems, &examples, shots);
        assert_eq!(
            set(1).unwrap().items[0].prompt,
            "Question: 1+1?\nAnswer: 2.\n#### 2\n\nQuestion: 2+2?\nAnswer:"
        );
        let none = set(0).unwrap();
        assert_eq!(none.items[0].prompt, "Question: 2+2?\nAnswer:");
        assert!(set(2).is_err());
        assert_eq!(none.judge(0, " 2+2=4.\n#### 4").score, 1.0);
        assert_eq!(none.judge(0, " 2+2=5.\n#### 5").score, 0.0);
        assert_eq!(none.judge(0, " 4").answer, None);
    }

    #[test]
    fn a_bad_line_is_named() {
        let text = "{\"question\": \"q\", \"answer\": \"a\"}\n{\"question\": 3}\n";
        let error = asked(&records(text), &[], 0).err().unwrap().to_string();
        assert!(error.contains("set.jsonl, line 2"), "{error}");
    }
}
