//! Many keys with their values, and a question for the value of one (after Li et al., "How Long Can Open-Source LLMs
//! Truly Promise on Context Length?", 2023, and Liu et al., "Lost in the Middle", 2024). The sentences are those of the
//! embedded model's drills.

use std::collections::HashSet;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::drawn::{check_count, fitted, item, random};
use crate::error::Result;
use crate::questions::{Questions, Verdict};
use crate::task::{Measure, named};

const NAMES: [&str; 46] = [
    "Ana", "Ben", "Cara", "Dev", "Ella", "Finn", "Gia", "Hugo", "Iris", "Jon", "Kira", "Leo",
    "Mia", "Nils", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Vic", "Wes", "Xena",
    "Yuri", "Zoe", "Amir", "Bela", "Cleo", "Dina", "Egon", "Fay", "Gus", "Hana", "Ivo", "Jade",
    "Kofi", "Lena", "Max", "Nora", "Omar", "Pia", "Raj", "Sara", "Theo", "Vera",
];
const THINGS: [&str; 20] = [
    "apples", "books", "coins", "marbles", "stickers", "pens", "shells", "cards", "beads", "eggs",
    "cookies", "stamps", "buttons", "peaches", "ribbons", "tickets", "stones", "plums", "balloons",
    "crayons",
];

/// Settings of [`recall`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecallOptions {
    /// Tokens of the prompts.
    pub lengths: Vec<usize>,
    /// Number of prompts of each length.
    pub repeats: usize,
    /// Seed of keys, values and questions.
    pub seed: u64,
}

/// Makes lists of keys and values with a question each, each of the most pairs with which it has no more tokens than its
/// length; `count` counts them.
///
/// # Errors
/// [`Error::Options`](crate::Error::Options) where a length is too short for a pair, and those of `count`.
pub fn recall(options: &RecallOptions, count: &dyn Fn(&str) -> Result<usize>) -> Result<Questions> {
    let (lengths, repeats, seed) = (&options.lengths, options.repeats, options.seed);
    check_count(lengths, lengths.len(), repeats)?;
    let mut items = Vec::new();
    for &length in lengths {
        for repeat in 0..repeats {
            let mut random = random(seed, items.len());
            // Where in the list the asked key is.
            let depth: f64 = random.random();
            let asked = |pairs: usize| (depth * pairs as f64) as usize;
            let build = |count: usize| {
                let pairs = pairs(random.clone(), count);
                let mut text = "Records:\n".to_owned();
                for (key, value) in &pairs {
                    text += &format!("{key} keeps {value}.\n");
                }
                let (key, _) = &pairs[asked(count)];
                text + &format!("Question: What does {key} keep?\nAnswer:")
            };
            let prompt = fitted(length, 1, build, count)?;
            let value = value(&prompt).unwrap_or_default().to_owned();
            let (id, group) = (format!("{length}/{repeat}"), format!("{length} tokens"));
            items.push(item(id, group, prompt, &["\nQuestion:"], value));
        }
    }
    Ok(Questions {
        name: "recall",
        measure: Measure::Accuracy,
        settings: named([
            ("lengths", json!(lengths)),
            ("repeats", json!(repeats)),
            ("draw", json!(seed)),
        ]),
        items,
        judge: Box::new(|_, item, text| Verdict::exact(first_value(text), &item.expected)),
    })
}

/// The first number in a text, and the word after it.
fn first_value(text: &str) -> Option<String> {
    let mut words = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty());
    let number = words.find(|word| word.chars().all(|c| c.is_ascii_digit()))?;
    Some(match words.next() {
        Some(thing) => format!("{number} {thing}"),
        None => number.to_owned(),
    })
}

/// The value that a prompt asks for.
fn value(prompt: &str) -> Option<&str> {
    let (list, question) = prompt.rsplit_once("Question: What does ")?;
    let key = question.strip_suffix(" keep?\nAnswer:")?;
    list.lines().find_map(|line| {
        let (own, value) = line.split_once(" keeps ")?;
        (own == key).then_some(value.trim_end_matches('.'))
    })
}

/// Different keys, each with a value.
fn pairs(mut random: ChaCha8Rng, count: usize) -> Vec<(String, String)> {
    let mut seen = HashSet::new();
    let mut pairs = Vec::with_capacity(count);
    // As many names to a key as make different keys easy to find; up to 24 keys are single names.
    let mut names = 1;
    while (NAMES.len() as u128).pow(names) < 3 * count as u128 / 2 {
        names += 1;
    }
    while pairs.len() < count {
        let mut word = |words: &[&'static str]| words[random.random_range(0..words.len())];
        let key = (0..names)
            .map(|_| word(&NAMES))
            .collect::<Vec<_>>()
            .join(" ");
        let thing = word(&THINGS);
        if seen.insert(key.clone()) {
            pairs.push((key, format!("{} {thing}", random.random_range(10..100))));
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use lexico_llm::Model;

    use super::*;

    #[test]
    fn one_of_many_pairs_is_asked_for() {
        let tokenizer = Model::tiny().unwrap().tokenizer;
        let count = |text: &str| Ok(tokenizer.encode_first(text)?.len());
        let options = RecallOptions {
            lengths: vec![100, 800],
            repeats: 4,
            seed: 9,
        };
        let set = recall(&options, &count).unwrap();
        assert_eq!(set.items.len(), 8);
        let mut places = HashSet::new();
        for (number, item) in set.items.iter().enumerate() {
            let tokens = count(&item.prompt).unwrap();
            let length = options.lengths[number / 4];
            assert!(
                tokens <= length && tokens + 60 > length,
                "{tokens} of {length}"
            );
            let (list, question) = item.prompt.split_once("Question: What does ").unwrap();
            let pairs: Vec<(&str, &str)> = list
                .lines()
                .skip(1)
                .map(|line| line.trim_end_matches('.').split_once(" keeps ").unwrap())
                .collect();
            let keys: HashSet<&str> = pairs.iter().map(|(key, _)| *key).collect();
            assert_eq!(keys.len(), pairs.len());
            let asked = question.strip_suffix(" keep?\nAnswer:").unwrap();
            let place = pairs.iter().position(|(key, _)| *key == asked).unwrap();
            places.insert(place);
            let verdict = set.judge(number, &format!(" {}.\n", pairs[place].1));
            assert_eq!(verdict.score, 1.0);
            assert_eq!(item.expected, pairs[place].1);
        }
        assert!(places.len() > 2, "{places:?}");
        assert_eq!(set.items, recall(&options, &count).unwrap().items);
        let other = RecallOptions {
            seed: 10,
            ..options
        };
        assert_ne!(set.items, recall(&other, &count).unwrap().items);
    }

    #[test]
    fn only_the_value_itself_counts() {
        let count = |text: &str| Ok(text.len());
        let options = RecallOptions {
            lengths: vec![300],
            repeats: 1,
            seed: 0,
        };
        let set = recall(&options, &count).unwrap();
        let value = set.items[0].expected.clone();
        for (text, score) in [
            (format!(" {value} and more"), 1.0),
            (format!("\n{value},"), 1.0),
            (format!("Ana keeps {value}."), 1.0),
            (format!("{value}0"), 0.0),
            (format!("1{value}"), 0.0),
            (format!("100 or {value}"), 0.0),
            (value[..2].to_owned(), 0.0),
            (String::new(), 0.0),
        ] {
            assert_eq!(set.judge(0, &text).score, score, "{text:?}");
        }
    }
}
