//! Common words of a list, frequent words of a coded text, and the words themselves.
//!
//! `words.zip` holds the lists of nouns, adjectives and verbs of wonderwords 3.0.1, which the generator draws from, with
//! their licence (MIT).

use std::io::{Cursor, Read};

use super::{Drawn, Generator, LONG};
use crate::error::{Error, Result};
use crate::tasks::python_random::PythonRandom;

const LISTS: &[u8] = include_bytes!("words.zip");

const COMMON: &str = "Below is a numbered list of words. In these words, some appear more often than others. Memorize \
                      the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the \
                      above list?";
const COMMON_PREFIX: &str = " Answer: The top 10 words that appear most often in the list are:";
/// Number of common words.
const COMMON_WORDS: usize = 10;
/// Words that the lengths of lists are estimated from.
const ESTIMATED: usize = 4096;

const FREQUENT: &str = "Read the following coded text and track the frequency of each coded word. Find the three most \
                        frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please \
                        ignore the dots '....'. What are the three most frequently appeared words in the above coded \
                        text?";
const FREQUENT_PREFIX: &str =
    " Answer: According to the coded text above, the three most frequently appeared words are:";
/// Letters of a coded word.
const LETTERS: usize = 6;
/// Riemann's zeta function at 2, the exponent of the coded words' frequencies.
const ZETA: f64 = std::f64::consts::PI * std::f64::consts::PI / 6.0;

/// The words of one of the lists.
fn list(name: &str) -> Result<Vec<String>> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Options(format!("RULER's {name} cannot be read: {error}"))
    };
    let mut archive = zip::ZipArchive::new(Cursor::new(LISTS)).map_err(|e| failed(&e))?;
    let mut file = archive.by_name(name).map_err(|e| failed(&e))?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|e| failed(&e))?;
    Ok(text
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect())
}

/// All different texts "adjective-noun" in order, millions of them, none of which is kept.
pub(super) struct Compounds {
    pub(super) count: usize,
    nouns: Vec<String>,
    blocks: Vec<Block>,
}

/// Compounds that are next to each other.
struct Block {
    first: usize,
    adjective: String,
    /// All of them, where other adjectives begin with this one ("old", "old-fashioned") and so theirs are in between.
    mixed: Option<Vec<String>>,
}

impl Compounds {
    pub(super) fn new() -> Result<Self> {
        let mut nouns = list("nounlist.txt")?;
        nouns.sort_unstable();
        nouns.dedup();
        let mut adjectives = list("adjectivelist.txt")?;
        for adjective in &mut adjectives {
            adjective.push('-');
        }
        adjectives.sort_unstable();
        adjectives.dedup();
        let (mut blocks, mut count) = (Vec::new(), 0);
        let mut rest = adjectives.as_slice();
        while let [adjective, ..] = rest {
            let alike = rest.iter().take_while(|own| own.starts_with(adjective));
            let (own, after) = rest.split_at(alike.count());
            let mixed = (own.len() > 1).then(|| {
                let all = own
                    .iter()
                    .flat_map(|own| nouns.iter().map(move |noun| format!("{own}{noun}")));
                let mut all: Vec<String> = all.collect();
                all.sort_unstable();
                all.dedup();
                all
            });
            let of_block = mixed.as_ref().map_or(nouns.len(), Vec::len);
            blocks.push(Block {
                first: count,
                adjective: adjective.clone(),
                mixed,
            });
            count += of_block;
            rest = after;
        }
        Ok(Self {
            count,
            nouns,
            blocks,
        })
    }

    /// The one of a place; it is below the count.
    pub(super) fn get(&self, place: usize) -> String {
        let after = self.blocks.partition_point(|block| block.first <= place);
        let block = &self.blocks[after - 1];
        let place = place - block.first;
        match &block.mixed {
            Some(all) => all[place].clone(),
            None => format!("{}{}", block.adjective, self.nouns[place]),
        }
    }
}

pub(super) fn common(mut own: Generator<'_>, samples: usize) -> Result<Option<Vec<Drawn>>> {
    let mut words = Vec::new();
    for name in ["nounlist.txt", "adjectivelist.txt", "verblist.txt"] {
        words.extend(list(name)?);
    }
    words.sort_unstable();
    words.dedup();
    own.shuffle(&mut words);
    let (step, limits) = (10, (own.max_tokens, own.max));
    let make = |own: &mut Generator<'_>, size: usize| -> Result<Option<Drawn>> {
        if size > words.len() {
            return Err(Error::Options(format!(
                "prompts of {} tokens are impossible for cwe: they take more than the {} words that are here",
                own.length,
                words.len()
            )));
        }
        // Words of the example, and how often common and other ones come in it and in the list.
        let (example, (often, seldom), (common, others)) = if own.length < LONG {
            (20, (3, 1), (6, 1))
        } else {
            (40, (10, 3), (30, 3))
        };
        let (text, answers) = numbered(own, &words, example, often, seldom);
        let example = COMMON.replacen("{context}", &text, 1) + COMMON_PREFIX;
        let example = format!("{example} {}\n", with_numbers(&answers));
        let (text, answers) = numbered(own, &words, size, common, others);
        let question = COMMON.replacen("{context}", &text, 1);
        Ok(Some(Drawn {
            prompt: example + &question + COMMON_PREFIX,
            begun: COMMON_PREFIX.len(),
            answers: answers.into_iter().map(str::to_owned).collect(),
        }))
    };
    let Some(sample) = make(&mut own, ESTIMATED)? else {
        return Ok(None);
    };
    let a_word = (own.count)(&sample.prompt)? as f64 / ESTIMATED as f64;
    let most = (own.max as f64 / a_word).floor() as usize * 2;
    let size = own.bisect((step, most), limits, make)?;
    (0..samples)
        .map(|_| own.until_it_fits(size, step, limits, make))
        .collect()
}

/// A numbered list of so many words, the common ones `often` and the others `seldom`; and the common ones.
fn numbered<'w>(
    own: &mut Generator<'_>,
    words: &'w [String],
    size: usize,
    often: usize,
    seldom: usize,
) -> (String, Vec<&'w str>) {
    let drawn = own.random.sample(words.len(), size);
    let drawn: Vec<&str> = drawn
        .into_iter()
        .map(|place| words[place].as_str())
        .collect();
    let (common, others) = drawn.split_at(COMMON_WORDS.min(drawn.len()));
    let mut list = common.repeat(often);
    list.extend(others.repeat(seldom));
    own.shuffle(&mut list);
    (with_numbers(&list), common.to_vec())
}

/// `1. word 2. word …`
fn with_numbers(words: &[&str]) -> String {
    let words = words.iter().enumerate();
    let words: Vec<String> = words
        .map(|(i, word)| format!("{}. {word}", i + 1))
        .collect();
    words.join(" ")
}

pub(super) fn frequent(mut own: Generator<'_>, samples: usize) -> Result<Option<Vec<Drawn>>> {
    let max = own.max - own.max_tokens;
    let (vocabulary, step) = (max / 50, max / 32);
    // The dots and three words that are asked for.
    if vocabulary < 4 {
        return Ok(None);
    }
    let words = coded(&mut own.random, own.seed, vocabulary);
    let mut size = max / LETTERS;
    while own.fits(&text(&own, &words, size), 1, max)? {
        size += step;
    }
    let size = size - step;
    let mut made = Vec::with_capacity(samples);
    for _ in 0..samples {
        let words = coded(&mut own.random, own.seed, vocabulary);
        let mut size = size;
        let mut prompt = text(&own, &words, size);
        while !own.fits(&prompt, 0, max)? {
            let Some(less) = size.checked_sub(step) else {
                return Ok(None);
            };
            size = less;
            prompt = text(&own, &words, size);
        }
        made.push(Drawn {
            prompt,
            begun: FREQUENT_PREFIX.len(),
            answers: words[1..4].to_vec(),
        });
    }
    Ok(Some(made))
}

/// So many different coded words.
fn coded(random: &mut PythonRandom, seed: u32, count: usize) -> Vec<String> {
    let mut words = std::collections::BTreeSet::new();
    let mut one = || random.letters(b"abcdefghijklmnopqrstuvwxyz", LETTERS);
    words.extend((0..count).map(|_| one()));
    while words.len() < count {
        words.insert(one());
    }
    let mut words: Vec<String> = words.into_iter().collect();
    PythonRandom::new(u64::from(seed)).shuffle(&mut words);
    // What comes most often is noise.
    words[0] = "...".to_owned();
    words
}

/// A text of about so many coded words.
fn text(own: &Generator<'_>, words: &[String], size: usize) -> String {
    let mut all = Vec::new();
    for (place, word) in words.iter().enumerate() {
        let times = size as f64 * ((place + 1) as f64).powi(2).recip() / ZETA;
        all.extend(std::iter::repeat_n(word.as_str(), times as usize));
    }
    own.shuffle(&mut all);
    FREQUENT.replacen("{context}", &all.join(" "), 1) + FREQUENT_PREFIX
}
