//! Needles in a haystack.

use std::fmt::Write;

use super::{Drawn, Generator, LONG, NOISE, RulerOptions, insert, words};
use crate::error::{Error, Result};
use crate::metrics::is_space;
use crate::tasks::needle::sentences;
use crate::tasks::python_random::PythonRandom;

const TEMPLATE: &str = "Some special magic {type} are hidden within the following text. Make sure to memorize it. I will \
                        quiz you about the {type} afterwards.\n{context}\nWhat are all the special magic {type} for \
                        {query} mentioned in the provided text?";
const PREFIX: &str = " The special magic {type} for {query} mentioned in the provided text are";
/// Depths at which needles are put into a text.
const DEPTHS: usize = 40;

/// What is hidden, and in what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needles {
    haystack: Haystack,
    key: Kind,
    value: Kind,
    keys: usize,
    values: usize,
    queries: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Haystack {
    Noise,
    Essays,
    Needles,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Words,
    Numbers,
    Uuids,
}

impl Needles {
    pub(super) const SINGLE_1: Self = Self {
        haystack: Haystack::Noise,
        key: Kind::Words,
        value: Kind::Numbers,
        keys: 1,
        values: 1,
        queries: 1,
    };
    pub(super) const SINGLE_2: Self = Self {
        haystack: Haystack::Essays,
        ..Self::SINGLE_1
    };
    pub(super) const SINGLE_3: Self = Self {
        value: Kind::Uuids,
        ..Self::SINGLE_2
    };
    pub(super) const MULTIKEY_1: Self = Self {
        keys: 4,
        ..Self::SINGLE_2
    };
    pub(super) const MULTIKEY_2: Self = Self {
        haystack: Haystack::Needles,
        ..Self::SINGLE_1
    };
    pub(super) const MULTIKEY_3: Self = Self {
        key: Kind::Uuids,
        value: Kind::Uuids,
        ..Self::MULTIKEY_2
    };
    pub(super) const MULTIVALUE: Self = Self {
        values: 4,
        ..Self::SINGLE_2
    };
    pub(super) const MULTIQUERY: Self = Self {
        keys: 4,
        queries: 4,
        ..Self::SINGLE_2
    };

    pub(super) fn wants_essays(self) -> bool {
        self.haystack == Haystack::Essays
    }

    pub(super) fn draw(
        self,
        mut own: Generator<'_>,
        options: &RulerOptions,
    ) -> Result<Option<Vec<Drawn>>> {
        let hidden = Hidden {
            needles: self,
            compounds: words::Compounds::new()?,
            essay: match (&options.haystack, self.haystack) {
                (Some(text), Haystack::Essays) => Some(pieces(text)?),
                _ => None,
            },
        };
        let step = match hidden.essay {
            Some(_) => 500,
            None if own.length < LONG => 5,
            None => 25,
        };
        let limits = (own.max_tokens, own.max);
        let sample = hidden.prompt(&mut own, step)?;
        let Some(sample) = sample else {
            return Ok(None);
        };
        let a_piece = (own.count)(&sample.prompt)? as f64 / step as f64;
        let most = (own.max as f64 / a_piece * 3.0) as usize;
        let size = own.bisect((step, most), limits, |own, size| hidden.prompt(own, size))?;
        (0..options.samples)
            .map(|_| own.until_it_fits(size, step, limits, |own, size| hidden.prompt(own, size)))
            .collect()
    }
}

/// A text's words, its white space being the space between them.
fn pieces(text: &str) -> Result<Vec<String>> {
    let mut even = String::with_capacity(text.len());
    for c in text.chars() {
        let c = if is_space(c) { ' ' } else { c };
        if c != ' ' || !even.ends_with(' ') {
            even.push(c);
        }
    }
    if even.trim().is_empty() {
        return Err(Error::Options("the haystack holds no text".to_owned()));
    }
    Ok(even.split(' ').map(str::to_owned).collect())
}

struct Hidden {
    needles: Needles,
    compounds: words::Compounds,
    essay: Option<Vec<String>>,
}

impl Hidden {
    /// A prompt with so many pieces of the haystack; none where they are too few.
    fn prompt(&self, own: &mut Generator<'_>, size: usize) -> Result<Option<Drawn>> {
        let Needles {
            key,
            value,
            keys: count,
            values: each,
            queries,
            ..
        } = self.needles;
        let (mut keys, mut values, mut needles) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count {
            let name = self.one(key, &mut own.random);
            let mut of_key = Vec::with_capacity(each);
            for _ in 0..each {
                let one = self.one(value, &mut own.random);
                needles.push(value.needle(&name, &one));
                of_key.push(one);
            }
            keys.push(name);
            values.push(of_key);
        }
        own.shuffle(&mut needles);
        let Some(context) = self.context(own, size, needles) else {
            return Ok(None);
        };
        let asked = own.random.sample(count, queries);
        let names: Vec<&str> = asked.iter().map(|&number| keys[number].as_str()).collect();
        let query = match names.as_slice() {
            [before @ .., last] if !before.is_empty() => {
                format!("{}, and {last}", before.join(", "))
            }
            names => names.concat(),
        };
        let (mut template, mut prefix) = (TEMPLATE.to_owned(), PREFIX.to_owned());
        let mut kind = value.name();
        if queries * each == 1 {
            for (many, one) in [("Some", "A"), ("are all", "is"), ("are", "is")] {
                template = template.replace(many, one);
                prefix = prefix.replace(many, one);
            }
            kind = kind.trim_end_matches('s');
        }
        let fill = |text: &str| text.replace("{type}", kind).replace("{query}", &query);
        let (prefix, mut prompt) = (fill(&prefix), fill(&template));
        // The context last, so that nothing in it is taken for a place to fill.
        prompt = prompt.replacen("{context}", &context, 1);
        prompt += &prefix;
        let answers = asked.iter().flat_map(|&number| values[number].clone());
        Ok(Some(Drawn {
            prompt,
            begun: prefix.len(),
            answers: answers.collect(),
        }))
    }

    /// The haystack with the needles in it.
    fn context(
        &self,
        own: &mut Generator<'_>,
        size: usize,
        needles: Vec<String>,
    ) -> Option<String> {
        if let Some(essay) = &self.essay {
            return Some(in_text(essay, size, needles, &mut own.random));
        }
        let value = self.needles.value;
        let sentences = if self.needles.haystack == Haystack::Needles {
            let one = |_| {
                let key = self.one(self.needles.key, &mut own.random);
                value.needle(&key, &self.one(value, &mut own.random))
            };
            (0..size).map(one).collect()
        } else {
            vec![NOISE.to_owned(); size]
        };
        if needles.len() > size {
            return None;
        }
        let mut places = own.random.sample(size, needles.len());
        places.sort_unstable();
        // The first needle goes to the last place.
        let places = places.into_iter().zip(needles.into_iter().rev());
        Some(insert(sentences, places.collect()).join("\n"))
    }

    fn one(&self, kind: Kind, random: &mut PythonRandom) -> String {
        match kind {
            Kind::Numbers => (1_000_000 + random.below(9_000_000)).to_string(),
            Kind::Words => self.compounds.get(random.below(self.compounds.count)),
            Kind::Uuids => random.uuid(),
        }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }

    fn needle(self, key: &str, value: &str) -> String {
        let name = self.name();
        format!("One of the special magic {name} for {key} is: {value}.")
    }
}

/// So many words of a text, over and over where it ends, with needles between its sentences.
fn in_text(
    words: &[String],
    size: usize,
    needles: Vec<String>,
    random: &mut PythonRandom,
) -> String {
    let taken: Vec<&str> = words
        .iter()
        .cycle()
        .take(size)
        .map(String::as_str)
        .collect();
    let text = taken.join(" ");
    let sentences: Vec<&str> = sentences(text.trim())
        .into_iter()
        .map(str::trim_end)
        .collect();
    let depths = random.sample(DEPTHS, needles.len());
    let place = |depth: usize| {
        let depth = (depth as f64 * 100.0 / (DEPTHS - 1) as f64).round();
        (sentences.len() as f64 * (depth / 100.0)) as usize
    };
    let mut places: Vec<usize> = depths.into_iter().map(place).collect();
    places.sort_unstable();
    let mut context = String::with_capacity(text.len());
    let mut from = 0;
    for (place, needle) in places.into_iter().zip(needles) {
        let place = place.min(sentences.len());
        // Two spaces where no sentence is between two needles, and one before a needle that comes first.
        let _ = write!(context, "{} {needle} ", sentences[from..place].join(" "));
        from = place;
    }
    context + &sentences[from..].join(" ")
}
