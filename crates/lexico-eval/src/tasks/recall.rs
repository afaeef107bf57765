//! Many keys with their values, and a question for the value of one (after Li et al., "How Long Can Open-Source LLMs
//! Truly Promise on Context Length?", 2023, and Liu et al., "Lost in the Middle", 2024).

use std::collections::HashSet;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::size::fitted;
use crate::error::Result;
use crate::task::{Item, Verdict};

const MAX_TOKENS: usize = 32;
/// Digits of a value.
const DIGITS: usize = 6;
const COLOURS: [&str; 16] = [
    "red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "orange",
    "purple", "silver", "golden", "amber", "scarlet", "violet",
];
const THINGS: [&str; 32] = [
    "apple", "boat", "candle", "drum", "engine", "flower", "garden", "hammer", "island", "jacket",
    "kettle", "lamp", "mirror", "needle", "orchard", "pencil", "quilt", "river", "spoon", "table",
    "umbrella", "violin", "window", "anchor", "basket", "castle", "door", "feather", "glove",
    "horse", "ladder", "mountain",
];

/// How much to recall from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecallOptions {
    /// Tokens of the prompts.
    pub lengths: Vec<usize>,
    /// Prompts of each length.
    pub repeats: usize,
    /// What keys, values and questions are drawn with.
    pub seed: u64,
}

/// Lists of keys and values with a question each.
#[derive(Debug, Clone)]
pub struct Recall {
    items: Vec<Item>,
    lengths: Vec<usize>,
    values: Vec<String>,
}

impl Recall {
    /// Makes the prompts, each of the most pairs with which it has no more tokens than its length; `count` counts
    /// them.
    ///
    /// # Errors
    /// [`Error::Options`](crate::Error::Options) where a length is too short for a pair, and those of `count`.
    pub fn new(options: &RecallOptions, count: &dyn Fn(&str) -> Result<usize>) -> Result<Self> {
        let mut set = Self {
            items: Vec::new(),
            lengths: Vec::new(),
            values: Vec::new(),
        };
        for &length in &options.lengths {
            for repeat in 0..options.repeats {
                let mut random = ChaCha8Rng::seed_from_u64(options.seed);
                random.set_stream(set.items.len() as u64);
                // Where in the list the asked key is.
                let depth: f64 = random.random();
                let asked = |pairs: usize| (depth * pairs as f64) as usize;
                let build = |count: usize| {
                    let pairs = pairs(random.clone(), count);
                    let mut text = "Remember which value belongs to which key.\n\n".to_owned();
                    for (key, value) in &pairs {
                        text += &format!("{key}: {value}\n");
                    }
                    let (key, _) = &pairs[asked(count)];
                    text + &format!("\nWhich value belongs to {key}?\n{key}:")
                };
                let prompt = fitted(length, 1, build, count)?;
                let (_, key) = prompt.rsplit_once('\n').unwrap_or_default();
                let line = prompt.lines().find_map(|line| line.strip_prefix(key));
                set.values.push(line.unwrap_or_default().trim().to_owned());
                set.items.push(Item {
                    id: format!("{length}/{repeat}"),
                    prompt,
                    max_tokens: MAX_TOKENS,
                    stop: Vec::new(),
                });
                set.lengths.push(length);
            }
        }
        Ok(set)
    }

    /// The prompts, by length.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Tokens that a prompt was to have.
    ///
    /// # Panics
    /// Where there is no such item.
    pub fn length(&self, item: usize) -> usize {
        self.lengths[item]
    }

    /// Whether the first number in `text` that has as many digits as values have is the value.
    ///
    /// # Panics
    /// Where there is no such item.
    pub fn judge(&self, item: usize, text: &str) -> Verdict {
        let expected = &self.values[item];
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        let answer = numbers.find(|number| number.len() == DIGITS);
        let answer = answer.map(str::to_owned);
        Verdict {
            score: f64::from(answer.as_ref() == Some(expected)),
            answer,
            expected: expected.clone(),
        }
    }
}

/// Different keys, each with a value.
fn pairs(mut random: ChaCha8Rng, count: usize) -> Vec<(String, u32)> {
    let mut seen = HashSet::new();
    let mut pairs = Vec::with_capacity(count);
    while pairs.len() < count {
        let mut word = |words: &[&'static str]| words[random.random_range(0..words.len())];
        let (colour, thing) = (word(&COLOURS), word(&THINGS));
        // As many numbers as make different keys easy to find, for any count.
        let number = random.random_range(0..100.max(count));
        if seen.insert((colour, thing, number)) {
            let value = random.random_range(100_000..1_000_000);
            pairs.push((format!("{colour}-{thing}-{number}"), value));
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
        let set = Recall::new(&options, &count).unwrap();
        assert_eq!(set.items().len(), 8);
        let mut places = HashSet::new();
        for (number, item) in set.items().iter().enumerate() {
            let tokens = count(&item.prompt).unwrap();
            let length = set.length(number);
            assert!(
                tokens <= length && tokens + 60 > length,
                "{tokens} of {length}"
            );
            let mut parts = item.prompt.split("\n\n").skip(1);
            let (list, question) = (parts.next().unwrap(), parts.next().unwrap());
            let pairs: Vec<(&str, &str)> = list
                .lines()
                .map(|line| line.split_once(": ").unwrap())
                .collect();
            let keys: HashSet<&str> = pairs.iter().map(|(key, _)| *key).collect();
            assert_eq!(keys.len(), pairs.len());
            let (_, asked) = question.split_once('\n').unwrap();
            let asked = asked.strip_suffix(':').unwrap();
            let place = pairs.iter().position(|(key, _)| *key == asked).unwrap();
            places.insert(place);
            let verdict = set.judge(number, &format!(" {}.\n", pairs[place].1));
            assert_eq!(verdict.score, 1.0);
            assert_eq!(verdict.expected, pairs[place].1);
        }
        assert!(places.len() > 2, "{places:?}");
        assert_eq!(set.items(), Recall::new(&options, &count).unwrap().items());
        let other = RecallOptions {
            seed: 10,
            ..options
        };
        assert_ne!(set.items(), Recall::new(&other, &count).unwrap().items());
    }

    #[test]
    fn only_the_value_itself_counts() {
        let count = |text: &str| Ok(text.len());
        let options = RecallOptions {
            lengths: vec![300],
            repeats: 1,
            seed: 0,
        };
        let set = Recall::new(&options, &count).unwrap();
        let value = set.values[0].clone();
        for (text, score) in [
            (format!("{value} and more"), 1.0),
            (format!("\n {value},"), 1.0),
            (format!("It is {value}."), 1.0),
            (format!("red-apple-7: {value}"), 1.0),
            (format!("{value}0"), 0.0),
            (format!("100000 or {value}"), 0.0),
            (String::new(), 0.0),
        ] {
            assert_eq!(set.judge(0, &text).score, score, "{text:?}");
        }
        assert_eq!(set.judge(0, " \n").answer, None);
        let short = RecallOptions {
            lengths: vec![60],
            ..options
        };
        let error = Recall::new(&short, &count).unwrap_err().to_string();
        assert!(
            error.contains("prompts of 60 tokens are impossible"),
            "{error}"
        );
    }
}
