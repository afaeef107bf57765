//! Word problems in GSM8K's format, few-shot, judged by the number after `####`.

use std::ops::ControlFlow;

use lexico_llm::Model;
use lexico_llm::cache::CacheSpec;
use lexico_llm::generate::{GenerateOptions, generate};
use lexico_llm::sample::{Sampler, Sampling};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A problem and its worked answer, which ends in `#### ` and the number.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Problem {
    /// The problem.
    pub question: String,
    /// The worked answer.
    pub answer: String,
}

/// Problems to solve, and those that serve as examples.
#[derive(Debug, Clone)]
pub struct Problems {
    examples: Vec<Problem>,
    problems: Vec<Problem>,
}

/// Settings of [`Problems::run`].
#[derive(Debug, Clone, PartialEq)]
pub struct ProblemOptions {
    /// Problems to solve, from the first on.
    pub items: usize,
    /// Worked examples before each problem.
    pub shots: usize,
    /// Most tokens of an answer.
    pub max_tokens: usize,
}

impl Default for ProblemOptions {
    fn default() -> Self {
        Self {
            items: 100,
            shots: 5,
            max_tokens: 160,
        }
    }
}

/// What one cache method made of the problems.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProblemRun {
    /// The cache, as the command line names it.
    pub cache: String,
    /// Share of problems answered right.
    pub score: f64,
    /// Bytes of the cache at the end of each answer over FP16's, mean over the problems.
    pub share: f64,
    /// Problem by problem.
    pub items: Vec<ProblemItem>,
}

/// One problem's outcome.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProblemItem {
    /// The problem's number, from 0.
    pub id: usize,
    /// What the model wrote.
    pub text: String,
    /// The number it arrived at.
    pub answer: Option<String>,
    /// Whether that is the problem's.
    pub right: bool,
    /// Bytes of the cache at the end over FP16's.
    pub share: f64,
}

impl Problems {
    /// The tiny model's own problem sets, embedded.
    ///
    /// # Errors
    /// None in a sound build.
    pub fn tiny() -> Result<Self> {
        macro_rules! embedded {
            ($file:literal) => {
                parse(
                    include_str!(concat!("../../../../models/tiny/", $file)),
                    concat!("tiny/", $file),
                )
            };
        }
        Ok(Self {
            examples: embedded!("problems_train.jsonl")?,
            problems: embedded!("problems_test.jsonl")?,
        })
    }

    /// Number of problems.
    pub fn len(&self) -> usize {
        self.problems.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// The prompt of problem `item`: `shots` worked examples, then the question.
    ///
    /// # Panics
    /// Where there is no such problem, or there are fewer examples.
    pub fn prompt(&self, item: usize, shots: usize) -> String {
        let mut prompt = String::new();
        for Problem { question, answer } in &self.examples[..shots] {
            prompt += &format!("Question: {question}\nAnswer: {answer}\n\n");
        }
        prompt + &format!("Question: {}\nAnswer:", self.problems[item].question)
    }

    /// Lets `model` solve the problems greedily with its cache held as `cache`.
    ///
    /// `progress` is called at every token with the number of problems done and may break off.
    ///
    /// # Errors
    /// [`Error::Options`] where there are fewer problems or examples, [`Error::Interrupted`], and
    /// those of the model.
    pub fn run(
        &self,
        model: &Model,
        cache: &CacheSpec,
        options: &ProblemOptions,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<ProblemRun> {
        for (what, wanted, most, least) in [
            ("problems", options.items, self.problems.len(), 1),
            ("examples", options.shots, self.examples.len(), 0),
        ] {
            if wanted < least || wanted > most {
                let reason = format!("{wanted} {what} are impossible: between {least} and {most}");
                return Err(Error::Options(reason));
            }
        }
        let generate_options = GenerateOptions {
            max_tokens: options.max_tokens,
            stop: vec!["\n\n".to_owned()],
            ..GenerateOptions::default()
        };
        let mut items = Vec::with_capacity(options.items);
        for id in 0..options.items {
            let prompt = model
                .tokenizer
                .encode_first(&self.prompt(id, options.shots))?;
            let mut held = model.cache(cache)?;
            let mut interrupted = false;
            let mut sampler = Sampler::new(Sampling::default())?;
            let options = &generate_options;
            let on_text = &mut |_: &str| {
                let flow = progress(id);
                interrupted |= flow.is_break();
                flow
            };
            let generated = generate(
                model,
                held.as_mut(),
                &prompt,
                &mut sampler,
                options,
                on_text,
            )?;
            if interrupted {
                return Err(Error::Interrupted);
            }
            let fp16 = model.decoder.config().fp16_cache_bytes(held.len());
            let answer = final_number(&generated.text);
            items.push(ProblemItem {
                id,
                right: answer.is_some() && answer == final_number(&self.problems[id].answer),
                answer,
                text: generated.text,
                share: held.footprint().total() as f64 / fp16 as f64,
            });
        }
        let mean =
            |f: &dyn Fn(&ProblemItem) -> f64| items.iter().map(f).sum::<f64>() / items.len() as f64;
        Ok(ProblemRun {
            cache: cache.to_string(),
            score: mean(&|item| f64::from(u8::from(item.right))),
            share: mean(&|item| item.share),
            items,
        })
    }
}

/// Of the problems that `baseline` answers right, how many there are and how many `run` keeps.
pub fn kept(run: &ProblemRun, baseline: &ProblemRun) -> (usize, usize) {
    let right = || {
        run.items
            .iter()
            .zip(&baseline.items)
            .filter(|(_, full)| full.right)
    };
    (
        right().count(),
        right().filter(|(item, _)| item.right).count(),
    )
}

fn parse(text: &str, name: &str) -> Result<Vec<Problem>> {
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
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
        let set = Problems {
            examples: vec![problem("1+1?", "2.\n#### 2")],
            problems: vec![problem("2+2?", "4.\n#### 4")],
        };
        assert_eq!(
            set.prompt(0, 1),
            "Question: 1+1?\nAnswer: 2.\n#### 2\n\nQuestion: 2+2?\nAnswer:"
        );
        assert_eq!(set.prompt(0, 0), "Question: 2+2?\nAnswer:");
    }

    #[test]
    fn a_bad_line_is_named() {
        let text = "{\"question\": \"q\", \"answer\": \"a\"}\n{\"question\": 3}\n";
        let error = parse(text, "set.jsonl").unwrap_err().to_string();
        assert!(error.contains("set.jsonl, line 2"), "{error}");
    }
}
