//! The metrics of LongBench (Bai et al., 2024), as its published `metrics.py` computes them; all are from 0 to 1.
//!
//! They are those of the English data sets and of code. Where Python's `\d` takes decimal digits of all scripts,
//! the digits here are ASCII.

mod rouge;
mod similarity;

use std::collections::HashMap;

pub use rouge::rouge_l;
pub use similarity::ratio;

/// F1 of the words that two texts share, without case, punctuation and articles.
pub fn qa_f1(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (normalised(prediction), normalised(answer));
    let (prediction, answer): (Vec<&str>, Vec<&str>) =
        (words(&prediction).collect(), words(&answer).collect());
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for word in &answer {
        *counts.entry(word).or_default() += 1;
    }
    let mut same = 0;
    for word in &prediction {
        if let Some(count) = counts.get_mut(word)
            && *count > 0
        {
            *count -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let precision = f64::from(same) / prediction.len() as f64;
    let recall = f64::from(same) / answer.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// Share of the numbers in a prediction that are the answer.
pub fn count(prediction: &str, answer: &str) -> f64 {
    let (mut all, mut right) = (0_u32, 0_u32);
    for number in numbers(prediction) {
        all += 1;
        right += u32::from(number == answer);
    }
    if all == 0 {
        return 0.0;
    }
    f64::from(right) / f64::from(all)
}

/// Share of the numbers in a prediction that are that of the answer's paragraph; 0 where the answer names none.
pub fn retrieval(prediction: &str, answer: &str) -> f64 {
    paragraph(answer).map_or(0.0, |number| count(prediction, number))
}

/// The number after the first `Paragraph `.
pub(crate) fn paragraph(answer: &str) -> Option<&str> {
    let mut rests = answer.split("Paragraph ").skip(1);
    rests.find_map(|rest| {
        numbers(rest)
            .next()
            .filter(|number| rest.starts_with(number))
    })
}

/// One over the number of classes that a prediction names, where the answer is among them.
///
/// Classes that are a part of the answer's name do not count, but for one behind another such: the published
/// loop leaves it out.
pub fn classification(prediction: &str, answer: &str, classes: &[String]) -> f64 {
    let named = classes.iter().filter(|class| prediction.contains(*class));
    let mut named: Vec<&String> = named.collect();
    let mut at = 0;
    // Python goes on with the next place, though what was behind it has moved up.
    while let Some(&class) = named.get(at) {
        if answer.contains(class) && class != answer {
            let first = named.iter().position(|other| *other == class);
            named.remove(first.unwrap_or(at));
        }
        at += 1;
    }
    if named.iter().any(|class| *class == answer) {
        1.0 / named.len() as f64
    } else {
        0.0
    }
}

/// [`ratio`] of the answer and the first line of a prediction without `` ` ``, `#` and `//`.
pub fn code_similarity(prediction: &str, answer: &str) -> f64 {
    ratio(code_line(prediction), answer)
}

/// The first line that has none of `` ` ``, `#` and `//`; empty where there is no such.
pub(crate) fn code_line(prediction: &str) -> &str {
    let mut lines = prediction.trim_start_matches('\n').split('\n');
    let line = lines.find(|line| !line.contains(['`', '#']) && !line.contains("//"));
    line.unwrap_or_default()
}

/// Lower case, without ASCII punctuation and then without articles.
fn normalised(text: &str) -> String {
    let text = text.to_lowercase();
    let text: String = text.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (word, after) = rest.split_at(rest.find(|c| !is_word(c)).unwrap_or(rest.len()));
        kept += if matches!(word, "a" | "an" | "the") {
            " "
        } else {
            word
        };
        let (between, after) = after.split_at(after.find(is_word).unwrap_or(after.len()));
        kept += between;
        rest = after;
    }
    kept
}

/// Words as Python's `split` takes them apart.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// True for characters that Python takes for white space.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// True for characters of a word, as regular expressions have them.
pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Runs of ASCII digits.
pub(crate) fn numbers(text: &str) -> impl Iterator<Item = &str> {
    let numbers = text.split(|c: char| !c.is_ascii_digit());
    numbers.filter(|number| !number.is_empty())
}
