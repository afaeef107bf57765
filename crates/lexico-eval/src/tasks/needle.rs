//! A fact at some depth of a long text, and a question for it (after Kamradt, "Needle in a Haystack", 2023).

use std::path::Path;

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::drawn::{check_count, fitted, item, random};
use crate::data;
use crate::error::{Error, Result};
use crate::metrics::numbers;
use crate::questions::{Questions, Verdict};
use crate::task::{Measure, named};

const PLACES: [&str; 16] = [
    "Lisbon", "Oslo", "Kyoto", "Cairo", "Lima", "Dublin", "Prague", "Nairobi", "Vienna", "Havana",
    "Seoul", "Athens", "Quito", "Riga", "Tunis", "Hanoi",
];
const KINDS: [&str; 16] = [
    "old", "young", "quiet", "cheerful", "tired", "careful", "tall", "friendly", "patient",
    "curious", "busy", "honest", "gentle", "clever", "stubborn", "lonely",
];
const PEOPLE: [&str; 16] = [
    "baker",
    "gardener",
    "teacher",
    "sailor",
    "painter",
    "doctor",
    "farmer",
    "tailor",
    "librarian",
    "carpenter",
    "miller",
    "musician",
    "postman",
    "fisher",
    "weaver",
    "shepherd",
];
const DEEDS: [&str; 16] = [
    "opened the window",
    "swept the yard",
    "wrote a long letter",
    "mended the fence",
    "drank a cup of tea",
    "looked for the key",
    "fed the horses",
    "listened to the rain",
    "carried the basket home",
    "read an old book",
    "sang a short song",
    "lit the lamp",
    "waited for the ferry",
    "planted some beans",
    "washed the cups",
    "walked along the river",
];
const TIMES: [&str; 8] = [
    "before breakfast",
    "in the evening",
    "after the storm",
    "on a cold morning",
    "at the end of the week",
    "while the others slept",
    "as on every other day",
    "when the bells rang",
];

/// Words of random numbers that a sentence has to itself.
const DRAWS: u128 = 16;

/// Settings of [`needle`].
#[derive(Debug, Clone, PartialEq)]
pub struct NeedleOptions {
    /// Tokens of the prompts.
    pub lengths: Vec<usize>,
    /// Depths of the fact in the text: 0 is its beginning and 1 its end.
    pub depths: Vec<f64>,
    /// Number of facts for each length and depth.
    pub repeats: usize,
    /// The text, from its beginning and over again where it ends; without one, simple sentences that are drawn.
    pub haystack: Option<String>,
    /// Seed of the facts and the sentences.
    pub seed: u64,
}

/// Makes long texts with a fact in each, each of the most sentences with which it has no more tokens than its length;
/// `count` counts them.
///
/// # Errors
/// [`Error::Options`] where a length is too short, a depth outside 0 to 1 or the text empty, and those of `count`.
pub fn needle(options: &NeedleOptions, count: &dyn Fn(&str) -> Result<usize>) -> Result<Questions> {
    let (lengths, depths) = (&options.lengths, &options.depths);
    let (repeats, seed) = (options.repeats, options.seed);
    let outside = |depth: &&f64| !(0.0..=1.0).contains(*depth);
    if let Some(depth) = depths.iter().find(outside) {
        return Err(Error::Options(format!(
            "a depth of {depth} is impossible: from 0 to 1"
        )));
    }
    let haystack = Haystack::new(options)?;
    check_count(lengths, lengths.len() * depths.len(), repeats)?;
    let mut items = Vec::new();
    for &length in lengths {
        for &depth in depths {
            for repeat in 0..repeats {
                let mut random = random(seed, items.len() + 1);
                let place = PLACES.choose(&mut random).copied().unwrap_or_default();
                let number = random.random_range(100_000..1_000_000).to_string();
                let build = |sentences: usize| {
                    let before = (depth * sentences as f64).round() as usize;
                    let mut text =
                        "A secret number is told in the following text. Remember it.\n\n"
                            .to_owned();
                    haystack.add(0..before, &mut text);
                    text += &format!("The secret number of {place} is {number}. ");
                    haystack.add(before..sentences, &mut text);
                    let text = text.trim_end();
                    format!(
                        "{text}\n\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of \
                         {place} is"
                    )
                };
                let prompt = fitted(length, 0, build, count)?;
                let id = format!("{length}/{depth}/{repeat}");
                let group = format!("{length} tokens, depth {depth}");
                items.push(item(id, group, prompt, &[], number));
            }
        }
    }
    Ok(Questions {
        name: "needle",
        measure: Measure::Accuracy,
        settings: named([
            ("lengths", json!(lengths)),
            ("depths", json!(depths)),
            ("repeats", json!(repeats)),
            ("draw", json!(seed)),
        ]),
        items,
        judge: Box::new(|_, item, text| Verdict {
            score: f64::from(text.contains(&item.expected)),
            answer: numbers(text).next().map(str::to_owned),
        }),
    })
}

/// Reads a text for [`NeedleOptions::haystack`].
///
/// # Errors
/// [`Error::File`] where it cannot be read or is not UTF-8.
pub fn read_haystack(path: &Path) -> Result<String> {
    data::read_text(path)
}

/// Sentences without end.
enum Haystack<'t> {
    /// Sentences of a text, over and over.
    Text(Vec<&'t str>),
    /// Sentences drawn from a seed.
    Drawn(u64),
}

impl<'t> Haystack<'t> {
    fn new(options: &'t NeedleOptions) -> Result<Self> {
        let Some(text) = &options.haystack else {
            return Ok(Self::Drawn(options.seed));
        };
        let sentences = sentences(text);
        if sentences.is_empty() {
            return Err(Error::Options("the haystack holds no text".to_owned()));
        }
        Ok(Self::Text(sentences))
    }

    /// Adds the sentences of these numbers to a text.
    fn add(&self, numbers: std::ops::Range<usize>, text: &mut String) {
        match self {
            Self::Text(sentences) => {
                for number in numbers {
                    let sentence = sentences[number % sentences.len()];
                    *text += sentence;
                    if !sentence.ends_with(char::is_whitespace) {
                        text.push(' ');
                    }
                }
            }
            Self::Drawn(seed) => {
                let mut random = ChaCha8Rng::seed_from_u64(*seed);
                for number in numbers {
                    random.set_word_pos(DRAWS * number as u128);
                    let mut word =
                        |words: &[&'static str]| words[random.random_range(0..words.len())];
                    *text += &format!(
                        "The {} {} {} {}. ",
                        word(&KINDS),
                        word(&PEOPLE),
                        word(&DEEDS),
                        word(&TIMES)
                    );
                }
            }
        }
    }
}

/// A text's sentences, each with the white space behind it.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let mut sentences = Vec::new();
    let mut start = 0;
    // Whether what was read last ends a sentence, once white space has followed it.
    let mut ends = false;
    let mut spaced = false;
    for (at, c) in text.char_indices() {
        if c.is_whitespace() {
            spaced = true;
            ends |= c == '\n';
            continue;
        }
        if ends && spaced {
            sentences.push(&text[start..at]);
            start = at;
        }
        ends = matches!(c, '.' | '!' | '?');
        spaced = false;
    }
    sentences.push(&text[start..]);
    sentences.retain(|sentence| !sentence.trim().is_empty());
    sentences
}

#[cfg(test)]
mod tests {
    use lexico_llm::Model;

    use super::*;

    fn options() -> NeedleOptions {
        NeedleOptions {
            lengths: vec![150, 700],
            depths: vec![0.0, 0.5, 1.0],
            repeats: 2,
            haystack: None,
            seed: 3,
        }
    }

    #[test]
    fn the_fact_is_at_its_depth_in_a_text_of_the_length() {
        let tokenizer = Model::tiny().unwrap().tokenizer;
        let count = |text: &str| Ok(tokenizer.encode_first(text)?.len());
        let text =
            "It rained. The net was empty! Was it?\nIt was.\n\n  So they went home".to_owned();
        for haystack in [None, Some(text)] {
            let options = NeedleOptions {
                haystack,
                ..options()
            };
            let set = needle(&options, &count).unwrap();
            assert_eq!(set.items.len(), 12);
            let cells = options.lengths.iter().flat_map(|&length| {
                let cell = move |&depth| vec![(length, depth); options.repeats];
                options.depths.iter().flat_map(cell)
            });
            for (item, (length, depth)) in set.items.iter().zip(cells) {
                let tokens = count(&item.prompt).unwrap();
                assert!(
                    tokens <= length && tokens + 60 > length,
                    "{tokens} of {length}"
                );
                let (body, _) = item.prompt.split_once("\n\nQuestion: ").unwrap();
                let (_, body) = body.split_once("Remember it.\n\n").unwrap();
                let at = body.find("The secret number of ").unwrap() as f64 / body.len() as f64;
                match depth {
                    0.0 => assert_eq!(at, 0.0),
                    1.0 => assert!(body.trim_end().ends_with(&format!("is {}.", item.expected))),
                    _ => assert!((0.25..0.75).contains(&at), "{at}: {body}"),
                }
                assert_eq!(item.prompt.matches(&item.expected).count(), 1);
            }
            assert_eq!(set.items[1].id, "150/0/1");
            let again = needle(&options, &count).unwrap();
            assert_eq!(set.items, again.items);
            let other = NeedleOptions { seed: 4, ..options };
            assert_ne!(set.items, needle(&other, &count).unwrap().items);
        }
    }

    #[test]
    fn the_number_in_the_continuation_counts() {
        let count = |text: &str| Ok(text.split(' ').count());
        let set = needle(&options(), &count).unwrap();
        let number = &set.items[0].expected;
        for (text, score, answer) in [
            (format!(" {number}."), 1.0, Some(number.as_str())),
            (format!(" 7, no, {number}"), 1.0, Some("7")),
            (" unknown".to_owned(), 0.0, None),
            (number[1..].to_owned(), 0.0, Some(&number[1..])),
        ] {
            let verdict = set.judge(0, &text);
            assert_eq!(
                (verdict.score, verdict.answer.as_deref()),
                (score, answer),
                "{text}"
            );
        }
    }

    #[test]
    fn sentences_are_told_apart() {
        for (text, expected) in [
            ("A b. C? D", &["A b. ", "C? ", "D"][..]),
            ("A\nb\n\n C.  D e", &["A\n", "b\n\n ", "C.  ", "D e"]),
            ("1.5 is 3.", &["1.5 is 3."]),
            (" \n", &[]),
            ("", &[]),
        ] {
            assert_eq!(sentences(text), expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_impossible_is_refused() {
        let count = |text: &str| Ok(text.split(' ').count());
        let error = |options: NeedleOptions| needle(&options, &count).err().unwrap().to_string();
        let too_short = NeedleOptions {
            lengths: vec![5],
            ..options()
        };
        assert!(error(too_short).contains("prompts of 5 tokens are impossible"));
        for depth in [-0.1, 1.5, f64::NAN] {
            let outside = NeedleOptions {
                depths: vec![depth],
                ..options()
            };
            assert!(error(outside).contains("is impossible: from 0 to 1"));
        }
        let empty = NeedleOptions {
            haystack: Some(" \n".to_owned()),
            ..options()
        };
        assert!(error(empty).contains("the haystack holds no text"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hay.txt");
        std::fs::write(&path, b"ok \xff").unwrap();
        let error = read_haystack(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("hay.txt: it is not UTF-8 text, from byte 3 on"),
            "{error}"
        );
    }
}
