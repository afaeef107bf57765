//! Word problems in GSM8K's format, few-shot, judged by the number after `####`.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::questions::Questions;
use crate::task::{Item, Verdict};

/// Most tokens of an answer.
const MAX_TOKENS: usize = 160;

/// A problem and its worked answer, which ends in `#### ` and the number.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Problem {
    question: String,
    answer: String,
}

/// The tiny model's own problem sets, embedded.
#[derive(Debug, Clone)]
pub struct Problems {
    shots: usize,
    items: Vec<Item>,
    expected: Vec<Option<String>>,
}

impl Problems {
    /// All problems, each after `shots` worked examples.
    ///
    /// # Errors
    /// [`Error::Options`] where there are fewer examples.
    pub fn new(shots: usize) -> Result<Self> {
        macro_rules! embedded {
            ($file:literal) => {
                parse(
                    include_str!(concat!("../../../../models/tiny/", $file)),
                    concat!("tiny/", $file),
                )
            };
        }
        let examples = embedded!("problems_train.jsonl")?;
        Self::of(&embedded!("problems_test.jsonl")?, &examples, shots)
    }

    fn of(problems: &[Problem], examples: &[Problem], shots: usize) -> Result<Self> {
        let Some(examples) = examples.get(..shots) else {
            let most = examples.len();
            let reason = format!("{shots} examples are impossible: there are {most}");
            return Err(Error::Options(reason));
        };
        let mut before = String::new();
        for Problem { question, answer } in examples {
            before += &format!("Question: {question}\nAnswer: {answer}\n\n");
        }
        let item = |(number, problem): (usize, &Problem)| Item {
            id: number.to_string(),
            prompt: format!("{before}Question: {}\nAnswer:", problem.question),
            max_tokens: MAX_TOKENS,
            stop: vec!["\n\n".to_owned()],
        };
        Ok(Self {
            shots,
            items: problems.iter().enumerate().map(item).collect(),
            expected: problems.iter().map(|p| final_number(&p.answer)).collect(),
        })
    }
}

impl Questions for Problems {
    fn name(&self) -> &'static str {
        "problems"
    }

    fn settings(&self) -> Map<String, Value> {
        Map::from_iter([("shots".to_owned(), json!(self.shots))])
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn judge(&self, item: usize, text: &str) -> Verdict {
        let answer = final_number(text);
        let expected = &self.expected[item];
        Verdict {
            score: f64::from(u8::from(answer.is_some() && answer == *expected)),
            answer,
            expected: expected.clone().unwrap_or_default(),
        }
    }
}

fn parse(text: &str, name: &str) -> Result<Vec<Problem>> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|e| Error::Data {
                name: name.to_owned(),
                line: number + 1,
                reason: e.to_string(),
            })
        })
        .collect()
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

    #[test]
    fn the_prompt_is_examples_and_question() {
        let problem = |q: &str, a: &str| Problem {
            question: q.to_owned(),
            answer: a.to_owned(),
        };
        let problems = [problem("2+2?", "4.\n#### 4")];
        let examples = [problem("1+1?", "2.\n#### 2")];
        let set = |shots| Problems::of(&problems, &examples, shots);
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
        let error = parse(text, "set.jsonl").unwrap_err().to_string();
        assert!(error.contains("set.jsonl, line 2"), "{error}");
    }
}
