//! Jinja2's filters that lay out texts and values on lines: Python's `textwrap.wrap` and `pprint.pformat`.

use std::cmp::Ordering;

use minijinja::{State, Value};

use super::markup::escaped;
use super::methods::lines;
use super::python::{
    Kind, Made, arguments, check_size, flag, float, is_space, like, needed_text, order, pairs,
    repr, repr_in_order, spend, whole, wrong,
};

/// `value | filesizeformat`: a number of bytes as people write it.
pub(super) fn filesizeformat(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let binary = flag(
        arguments("filesizeformat", args, &["binary"])?
            .pop()
            .flatten(),
        false,
    );
    let bytes = match value.as_str() {
        Some(text) => super::filters::parse_float(text),
        None => float(value),
    };
    let bytes = bytes.ok_or_else(|| wrong("filesizeformat takes a number"))?;
    let (base, letter) = if binary { (1024.0, "i") } else { (1000.0, "") };
    if bytes == 1.0 {
        return Ok(Value::from("1 Byte"));
    }
    if bytes < base {
        if bytes.is_infinite() {
            return Err(wrong("filesizeformat takes no infinite number"));
        }
        return Ok(Value::from(format!(
            "{bytes:.0} Bytes",
            bytes = bytes.trunc() + 0.0
        )));
    }
    let units = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let power = |at: usize| match binary {
        true => 1024u128.pow(at as u32 + 2),
        false => 1000u128.pow(at as u32 + 2),
    };
    // A number that is none is below nothing.
    let below = |power: u128| !bytes.is_nan() && (bytes as u128) < power;
    let mut at = 0;
    while at + 1 < units.len() && !below(power(at)) {
        at += 1;
    }
    let unit = match (units[at], binary) {
        ("k", true) => "K",
        (unit, _) => unit,
    };
    let size = base * bytes / power(at) as f64;
    Ok(Value::from(match size.is_nan() {
        true => format!("nan {unit}{letter}B"),
        false => format!("{size:.1} {unit}{letter}B"),
    }))
}

/// `value | wordwrap`: a text on lines that are not longer than a width.
pub(super) fn wordwrap(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let names = [
        "width",
        "break_long_words",
        "wrapstring",
        "break_on_hyphens",
    ];
    let mut given = arguments("wordwrap", args, &names)?.into_iter();
    let width = whole("wordwrap", given.next().flatten(), 79)?;
    let cuts_words = flag(given.next().flatten(), true);
    let between = given.next().flatten().filter(|between| !between.is_none());
    let between_value = between.unwrap_or(Value::from("\n"));
    let between = needed_text("wordwrap", Some(between_value.clone()))?;
    let at_hyphens = flag(given.next().flatten(), true);
    // The lines of a safe text are safe no more; what is safe between them has them escaped.
    let text = needed_text("wordwrap", Some(value.clone()))?;
    spend(state, text.len())?;
    let mut out = String::new();
    for (at, line) in lines(&text, false).enumerate() {
        let width = usize::try_from(width).ok().filter(|width| *width > 0);
        let width = width.ok_or_else(|| wrong("wordwrap takes a width above 0"))?;
        if at > 0 {
            spend(state, between.len())?;
            out.push_str(&between);
        }
        let wrapped = wrapped(line, width, cuts_words, at_hyphens);
        for (inner, line) in wrapped.iter().enumerate() {
            spend(state, between.len() + line.len())?;
            if inner > 0 {
                out.push_str(&between);
            }
            match between_value.is_safe() {
                true => out.push_str(&escaped(line)),
                false => out.push_str(line),
            }
        }
        check_size(&out)?;
    }
    Ok(like(&between_value, out))
}

/// What `textwrap` takes for white space.
fn wraps_at(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\x0b' | '\x0c' | '\r' | ' ')
}

fn is_word(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}

/// A line cut at white space, and at hyphens where that is wanted.
fn chunks(line: &[char], at_hyphens: bool) -> Vec<Vec<char>> {
    let letter = |at: usize| {
        line.get(at)
            .is_some_and(|c| is_word(*c) && !c.is_numeric() && *c != '_')
    };
    let ends_word = |at: usize| is_word(line[at]) || "!\"'&.,?".contains(line[at]);
    // Two dashes or more with words on both sides: where they end.
    let dashes = |at: usize| {
        let count = line[at..].iter().take_while(|c| **c == '-').count();
        let after = line.get(at + count);
        (at > 0 && ends_word(at - 1) && count > 1 && after.is_some_and(|c| is_word(*c)))
            .then_some(at + count)
    };
    // Whether the hyphen at a place joins words that have letters.
    let hyphen = |at: usize| {
        let before = at >= 2 && letter(at - 1) && letter(at - 2)
            || at >= 3 && ends_word(at - 1) && line[at - 2] == '-' && letter(at - 3);
        let after =
            letter(at + 1) && (letter(at + 2) || line.get(at + 2) == Some(&'-') && letter(at + 3));
        line[at] == '-' && before && after
    };
    let mut chunks = Vec::new();
    let mut from = 0;
    while from < line.len() {
        let space = wraps_at(line[from]);
        let end = (from + 1..line.len()).find(|at| wraps_at(line[*at]) != space);
        let mut to = end.unwrap_or(line.len());
        if at_hyphens && !space {
            to = dashes(from).unwrap_or_else(|| {
                let mut at = from + 1;
                while at < to && dashes(at).is_none() {
                    at += 1;
                    if hyphen(at - 1) && at - 1 > from {
                        break;
                    }
                }
                at
            });
        }
        chunks.push(line[from..to].to_vec());
        from = to;
    }
    chunks
}

/// The lines that a line becomes.
fn wrapped(line: &str, width: usize, cuts_words: bool, at_hyphens: bool) -> Vec<String> {
    let line: Vec<char> = line.chars().collect();
    let mut chunks: Vec<Vec<char>> = chunks(&line, at_hyphens);
    chunks.reverse();
    let is_blank = |chunk: &[char]| chunk.iter().all(|c| is_space(*c));
    let mut lines = Vec::new();
    while !chunks.is_empty() {
        let mut current: Vec<Vec<char>> = Vec::new();
        let mut length = 0;
        if !lines.is_empty() {
            chunks.pop_if(|chunk| is_blank(chunk));
        }
        while let Some(chunk) = chunks.pop_if(|chunk| length + chunk.len() <= width) {
            length += chunk.len();
            current.push(chunk);
        }
        if let Some(long) = chunks.last_mut().filter(|chunk| chunk.len() > width) {
            let space = width - length;
            // Where there is no room left this adds nothing, and keeps the white space before it: as in Python 3.11.
            if cuts_words {
                let hyphen = long[..space.min(long.len())]
                    .iter()
                    .rposition(|c| *c == '-');
                let hyphen =
                    hyphen.filter(|at| at_hyphens && long[..*at].iter().any(|c| *c != '-'));
                let rest = long.split_off(hyphen.map_or(space, |at| at + 1));
                current.push(std::mem::replace(long, rest));
            } else if current.is_empty() {
                current.extend(chunks.pop());
            }
        }
        current.pop_if(|chunk| is_blank(chunk));
        if !current.is_empty() {
            lines.push(current.concat().into_iter().collect());
        }
    }
    lines
}

/// `value | pprint`: a value on lines of 80 characters.
pub(super) fn pprint(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("pprint", args, &[])?;
    let mut out = String::new();
    format(state, value, &mut out, 0, 0, 0)?;
    Ok(Value::from(out))
}

const WIDTH: usize = 80;

/// Writes a value that begins behind `indent` characters and has `after` more behind it.
fn format(
    state: &State,
    value: &Value,
    out: &mut String,
    indent: usize,
    after: usize,
    level: usize,
) -> Made<()> {
    let short = sorted_repr(state, value)?;
    spend(state, short.len())?;
    check_size(out)?;
    let fits = short.chars().count() + indent + after <= WIDTH;
    match Kind::of(value) {
        Kind::Text if !fits && !value.is_safe() => {
            let lines = text_lines(
                value.as_str().unwrap_or_default(),
                indent,
                after,
                level == 0,
            );
            spend(state, lines.len().saturating_mul(indent + 2))?;
            let many = level == 0 && lines.len() > 1;
            let indent = indent + usize::from(level == 0);
            let joined = lines.join(&format!("\n{}", " ".repeat(indent)));
            match many {
                true => out.extend(["(", &joined, ")"]),
                false => out.push_str(&joined),
            }
        }
        Kind::List | Kind::Tuple if !fits => {
            let (open, close) = match (Kind::of(value), value.len()) {
                (Kind::List, _) => ("[", "]"),
                (_, Some(1)) => ("(", ",)"),
                _ => ("(", ")"),
            };
            out.push_str(open);
            let count = value.len().unwrap_or(0);
            for (at, item) in value.try_iter()?.enumerate() {
                let last = at + 1 == count;
                format(
                    state,
                    &item,
                    out,
                    indent + 1,
                    if last { after + close.len() } else { 1 },
                    level + 1,
                )?;
                if !last {
                    new_line(state, out, indent + 1)?;
                }
            }
            out.push_str(close);
        }
        Kind::Dict if !fits => {
            out.push('{');
            let pairs = sorted_pairs(state, value)?;
            for (at, (key, item)) in pairs.iter().enumerate() {
                let last = at + 1 == pairs.len();
                let key = sorted_repr(state, key)?;
                out.push_str(&key);
                out.push_str(": ");
                let indent_of_item = indent + key.chars().count() + 3;
                format(
                    state,
                    item,
                    out,
                    indent_of_item,
                    if last { after + 1 } else { 1 },
                    level + 1,
                )?;
                if !last {
                    new_line(state, out, indent + 1)?;
                }
            }
            out.push('}');
        }
        _ => out.push_str(&short),
    }
    Ok(())
}

fn new_line(state: &State, out: &mut String, indent: usize) -> Made<()> {
    spend(state, indent)?;
    out.push_str(",\n");
    out.push_str(&" ".repeat(indent));
    Ok(())
}

/// A long text: its lines, and of those what fits, to stand below each other; with `alone` in brackets.
fn text_lines(text: &str, indent: usize, after: usize, alone: bool) -> Vec<String> {
    let length = |text: &str| repr(&Value::from(text)).map_or(0, |text| text.chars().count());
    let width = WIDTH.saturating_sub(indent + usize::from(alone));
    let after = after + usize::from(alone);
    let mut chunks: Vec<String> = Vec::new();
    let lines: Vec<&str> = lines(text, true).collect();
    for (at, line) in lines.iter().enumerate() {
        let last_line = at + 1 == lines.len();
        let most = |last: bool| {
            if last {
                width.saturating_sub(after)
            } else {
                width
            }
        };
        if length(line) <= most(last_line) {
            chunks.push((*line).to_owned());
            continue;
        }
        let mut current = String::new();
        let parts = words_with_space(line);
        for (at, part) in parts.iter().enumerate() {
            let last = last_line && at + 1 == parts.len();
            if length(&(current.clone() + part)) > most(last) {
                if !current.is_empty() {
                    chunks.push(std::mem::take(&mut current));
                }
                current = (*part).to_owned();
            } else {
                current.push_str(part);
            }
        }
        if !current.is_empty() {
            chunks.push(current);
        }
    }
    let shown = chunks
        .iter()
        .map(|chunk| repr(&Value::from(chunk.as_str())).unwrap_or_default());
    shown.collect()
}

/// The words of a line, each with the white space behind it.
fn words_with_space(line: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let word = rest.find(is_space).unwrap_or(rest.len());
        let space = rest[word..]
            .find(|c| !is_space(c))
            .unwrap_or(rest.len() - word);
        let (part, after) = rest.split_at(word + space);
        parts.push(part);
        rest = after;
    }
    parts
}

/// `repr` with the keys of dicts in order.
fn sorted_repr(state: &State, value: &Value) -> Made<String> {
    repr_in_order(value, &|dict| sorted_pairs(state, dict))
}

fn sorted_pairs(state: &State, value: &Value) -> Made<Vec<(Value, Value)>> {
    let pairs = pairs(value)?;
    let keys = pairs.iter().map(|(key, _)| key.clone()).collect();
    let places = super::filters::places_by(keys, |a, b| {
        match order(state, a, b) {
            Ok(order) => Ok(order == Some(Ordering::Less)),
            // Keys of two types are in the order of the types' names.
            Err(_) if Kind::of(a) != Kind::of(b) => Ok(Kind::of(a).name() < Kind::of(b).name()),
            Err(error) => Err(error),
        }
    })?;
    Ok(places.into_iter().map(|at| pairs[at].clone()).collect())
}
