//! Variables that are assigned to one another.

use super::{Drawn, Generator, LONG, NOISE, insert};
use crate::error::Result;

const TEMPLATE: &str = "Memorize and track the chain(s) of variable assignment hidden in the following \
                        text.\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text \
                        above.";
const PREFIX: &str = " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are \
                      assigned the value {query}, they are: ";
/// Assignments after the first.
const HOPS: usize = 4;
/// Tokens that the example may have.
const EXAMPLE: usize = 500;
/// The example's value.
const VALUE: &str = "12345";
const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ";

pub(super) fn draw(mut own: Generator<'_>, samples: usize) -> Result<Option<Vec<Drawn>>> {
    let template = own.length - own.max;
    let Some(max) = EXAMPLE.checked_sub(template) else {
        return Ok(None);
    };
    let example = |own: &mut Generator<'_>, size| prompt(own, size, true);
    let Some(size) = fitting(&mut own, 5, (0, max), 0, example)? else {
        return Ok(None);
    };
    let Some(example) = own.until_it_fits(size, 5, (0, max), example)? else {
        return Ok(None);
    };
    let example = format!("{} {}\n", example.prompt, example.answers.join(" "));
    let step = if own.length < LONG { 5 } else { 10 };
    let limits = (own.max_tokens, own.max);
    let of_example = (own.count)(&example)?;
    let question = |own: &mut Generator<'_>, size| prompt(own, size, false);
    let Some(size) = fitting(&mut own, step, limits, of_example, question)? else {
        return Ok(None);
    };
    let whole = |own: &mut Generator<'_>, size| -> Result<Option<Drawn>> {
        let Some(drawn) = prompt(own, size, false)? else {
            return Ok(None);
        };
        let prompt = format!("{}\n{}", renamed(own, &example), drawn.prompt);
        Ok(Some(Drawn { prompt, ..drawn }))
    };
    (0..samples)
        .map(|_| own.until_it_fits(size, step, limits, whole))
        .collect()
}

/// The number of noise sentences that fit beside `more` tokens.
fn fitting(
    own: &mut Generator<'_>,
    step: usize,
    (answer, max): (usize, usize),
    more: usize,
    make: impl Fn(&mut Generator<'_>, usize) -> Result<Option<Drawn>> + Copy,
) -> Result<Option<usize>> {
    let Some(sample) = make(own, step)? else {
        return Ok(None);
    };
    let a_piece = (own.count)(&sample.prompt)? as f64 / step as f64;
    let most = (max as f64 / a_piece * 3.0) as usize;
    own.bisect((step, most), (answer + more, max), make)
        .map(Some)
}

/// A prompt with so many sentences of noise. `None` where there is no room for the chain, or two variables are drawn
/// alike, which ends the generator's draw.
fn prompt(own: &mut Generator<'_>, size: usize, example: bool) -> Result<Option<Drawn>> {
    let length = if example { 3 } else { 5 };
    let variables: Vec<String> = (0..=HOPS)
        .map(|_| own.random.letters(LETTERS, length))
        .collect();
    let value = |own: &mut Generator<'_>| {
        if example {
            VALUE.to_owned()
        } else {
            own.numpy.integer(10_000, 99_999).to_string()
        }
    };
    let mut different = variables.clone();
    different.sort_unstable();
    different.dedup();
    if different.len() < variables.len() {
        // One more is drawn for each that is not new, and a second value, before it fails.
        let mut drawn = different.len();
        while drawn < variables.len() {
            let more = own.random.letters(LETTERS, length);
            if !different.contains(&more) {
                different.push(more);
                drawn += 1;
            }
        }
        for _ in 0..2 {
            value(own);
        }
        return Ok(None);
    }
    let value = value(own);
    let mut chain = vec![format!("VAR {} = {value}", variables[0])];
    for pair in variables.windows(2) {
        chain.push(format!("VAR {} = VAR {} ", pair[1], pair[0]));
    }
    if chain.len() > size {
        return Ok(None);
    }
    let mut places = own.random.sample(size, chain.len());
    places.sort_unstable();
    let noise = vec![NOISE.to_owned(); size];
    let context = insert(noise, places.into_iter().zip(chain).collect()).join("\n");
    let context = context.replace(". \n", ".\n");
    let prefix = PREFIX.replace("{query}", &value);
    let mut prompt = TEMPLATE.replace("{query}", &value);
    prompt = prompt.replacen("{context}", &context, 1) + &prefix;
    Ok(Some(Drawn {
        prompt,
        begun: prefix.len(),
        answers: variables,
    }))
}

/// The example with other variables and another value.
fn renamed(own: &mut Generator<'_>, example: &str) -> String {
    let mut text = example.to_owned();
    let words: Vec<&str> = example.split_whitespace().collect();
    for variable in &words[words.len().saturating_sub(HOPS + 1)..] {
        text = text.replace(variable, &own.random.letters(LETTERS, variable.len()));
    }
    let value = own.numpy.integer(10_000, 99_999).to_string();
    text.replace(VALUE, &value)
}
