//! Jinja2's filters for HTML, and the texts that it calls safe.

use std::collections::HashMap;
use std::sync::LazyLock;

use minijinja::{Environment, State, Value};
use regex::Regex;

use super::methods::split_at_space;
use super::python::{
    Kind, Made, arguments, flag, is_true, items, needed_text, pairs, spend, text, whole, wrong,
};

/// What [`super::translate`] writes for `{% autoescape %}`.
pub(super) fn add_to(environment: &mut Environment) {
    environment.add_filter("__escape", |state: &mut State, value: Value| {
        set_escapes(state, is_true(&value))
    });
    environment.add_filter("__escaped", |value: &Value| escaped_value(value));
    environment.add_filter(
        "__escaped_if",
        |state: &State, value: &Value| match escapes(state) {
            true => escaped_value(value),
            false => text(value),
        },
    );
    environment.add_filter("__safe_if", |state: &State, value: Value| -> Made<Value> {
        match escapes(state) {
            true => Ok(Value::from_safe_string(text(&value)?)),
            false => Ok(value),
        }
    });
}

/// Kept with a rendering: whether `{% autoescape %}` is in force.
struct Escapes(bool);

pub(super) fn escapes(state: &State) -> bool {
    state.get_extension::<Escapes>().is_some_and(|on| on.0)
}

/// Sets whether `{% autoescape %}` is in force; returns whether it was.
pub(super) fn set_escapes(state: &mut State, on: bool) -> bool {
    let escapes = state.get_or_insert_extension(Escapes(false));
    std::mem::replace(&mut escapes.0, on)
}

/// A text as it stands in HTML.
pub(super) fn escaped(text: &str) -> String {
    let text = text
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

/// The text of a value as it stands in HTML; safe ones stay.
pub(super) fn escaped_value(value: &Value) -> Made<String> {
    let text = text(value)?;
    Ok(match value.is_safe() {
        true => text,
        false => escaped(&text),
    })
}

/// A text made by a filter: safe where all that is written is escaped.
fn made(state: &State, text: String) -> Value {
    match escapes(state) {
        true => Value::from_safe_string(text),
        false => Value::from(text),
    }
}

/// A text without its tags, its entities resolved, with single spaces.
pub(super) fn striptags(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("striptags", args, &[])?;
    let text = text(value)?;
    spend(state, text.len())?;
    Ok(Value::from(stripped_of_tags(&text)))
}

pub(super) fn stripped_of_tags(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        let (open, close) = match rest[start..].starts_with("<!--") {
            true => (4, "-->"),
            false => (0, ">"),
        };
        let Some(end) = rest[start + open..].find(close) else {
            break;
        };
        kept.push_str(&rest[..start]);
        rest = &rest[start + open + end + close.len()..];
    }
    kept.push_str(rest);
    let words: Vec<&str> = split_at_space(&kept).collect();
    unescaped(&words.join(" "))
}

/// HTML5's named entities: `&amp;` and what it stands for.
static ENTITIES: LazyLock<HashMap<&str, &str>> = LazyLock::new(|| {
    let entities = entities::ENTITIES.iter();
    entities
        .map(|entity| (entity.entity, entity.characters))
        .collect()
});

/// `html.unescape`
pub(super) fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match numbered(rest).or_else(|| named(rest)) {
            Some((characters, length)) => {
                out.push_str(&characters);
                rest = &rest[length..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

/// The longest named entity that a text begins with, and its length.
fn named(text: &str) -> Option<(String, usize)> {
    const LONGEST: usize = "&CounterClockwiseContourIntegral;".len();
    let ends = (2..=LONGEST.min(text.len())).rev();
    let mut prefixes = ends.filter_map(|end| text.get(..end));
    prefixes.find_map(|name| Some(((*ENTITIES.get(name)?).to_owned(), name.len())))
}

/// The character of `&#39;` or `&#x27;`, and the length of that.
fn numbered(text: &str) -> Option<(String, usize)> {
    let number = text.strip_prefix("&#")?;
    let (digits, radix) = match number.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16),
        None => (number, 10),
    };
    let count = digits.chars().take_while(|c| c.is_digit(radix)).count();
    if count == 0 {
        return None;
    }
    let code = u32::from_str_radix(&digits[..count], radix);
    let end = text.len() - digits.len() + count;
    let end = end + usize::from(text[end..].starts_with(';'));
    Some((numbered_character(code.unwrap_or(u32::MAX)), end))
}

/// What HTML5 makes of a number: those of Windows' characters are taken for them, those that are none fall out.
fn numbered_character(code: u32) -> String {
    const WINDOWS: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž',
        '\u{8f}', '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}',
        'ž', 'Ÿ',
    ];
    match code {
        0 => char::REPLACEMENT_CHARACTER.into(),
        0x0d => "\r".to_owned(),
        0x80..=0x9f => WINDOWS[code as usize - 0x80].into(),
        0x01..=0x08 | 0x0b | 0x0e..=0x1f | 0x7f | 0xfdd0..=0xfdef => String::new(),
        _ if code <= 0x10ffff && code & 0xfffe == 0xfffe => String::new(),
        _ => char::from_u32(code)
            .unwrap_or(char::REPLACEMENT_CHARACTER)
            .into(),
    }
}

/// The attributes of a tag, out of a dict.
pub(super) fn xmlattr(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let space = flag(
        arguments("xmlattr", args, &["autospace"])?.pop().flatten(),
        true,
    );
    let mut attributes = Vec::new();
    for (key, value) in pairs(value)? {
        if matches!(Kind::of(&value), Kind::None | Kind::Undefined) {
            continue;
        }
        let key = match key.as_str() {
            Some(name)
                if !name.contains([' ', '\t', '\n', '\r', '\x0b', '\x0c', '/', '>', '=']) =>
            {
                key
            }
            _ => return Err(wrong("a name of xmlattr is not fit for an attribute")),
        };
        let attribute = format!("{}=\"{}\"", escaped_value(&key)?, escaped_value(&value)?);
        spend(state, attribute.len())?;
        attributes.push(attribute);
    }
    let mut joined = attributes.join(" ");
    if space && !joined.is_empty() {
        joined.insert(0, ' ');
    }
    Ok(made(state, joined))
}

/// Jinja2's patterns of what is an address.
static HTTP: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let pattern = r"(?i)^((https?://|www\.)(([\w%-]+\.)+)?([a-z]{2,63}|xn--[\w%]{2,59})|([\w%-]{2,63}\.)+(com|net|int|edu|gov|org|info|mil)|(https?://)((([\d]{1,3})(\.[\d]{1,3}){3})|(\[([\da-f]{0,4}:){2}([\da-f]{0,4}:?){1,6}\])))(?::[\d]{1,5})?(?:[/?#]\S*)?$";
    Regex::new(pattern).ok()
});
static EMAIL: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\S+@\w[\w.-]*\.\w+$").ok());
static SCHEME: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^([\w.+-]{2,}:(/){0,2})$").ok());

fn fits(pattern: &Option<Regex>, text: &str) -> bool {
    pattern
        .as_ref()
        .is_some_and(|pattern| pattern.is_match(text))
}

/// A text with its addresses as links.
pub(super) fn urlize(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let names = [
        "trim_url_limit",
        "nofollow",
        "target",
        "rel",
        "extra_schemes",
    ];
    let given = arguments("urlize", args, &names)?;
    let given = given
        .into_iter()
        .map(|value| value.filter(|value| !value.is_none()));
    let mut given = given.collect::<Vec<_>>().into_iter();
    let limit = given
        .next()
        .flatten()
        .map(|limit| whole("urlize", Some(limit), 0))
        .transpose()?;
    if limit.is_some_and(|limit| limit < 0) {
        return Err(wrong("urlize takes no limit below 0"));
    }
    let nofollow = flag(given.next().flatten(), false);
    let target = given.next().flatten();
    let rel = given
        .next()
        .flatten()
        .map_or(Ok(String::new()), |rel| needed_text("urlize", Some(rel)))?;
    let mut schemes = Vec::new();
    if let Some(extra) = given.next().flatten() {
        for scheme in items(state, &extra)? {
            let scheme = needed_text("urlize", Some(scheme))?;
            if !fits(&SCHEME, &scheme) {
                return Err(wrong(
                    "urlize takes the beginnings of addresses, \"tel:\" say",
                ));
            }
            schemes.push(scheme);
        }
    }
    let mut rels: Vec<&str> = split_at_space(&rel).chain(["noopener"]).collect();
    rels.extend(nofollow.then_some("nofollow"));
    rels.sort_unstable();
    rels.dedup();
    let mut attributes = format!(" rel=\"{}\"", escaped(&rels.join(" ")));
    if let Some(target) = target.filter(Value::is_true) {
        attributes += &format!(" target=\"{}\"", escaped_value(&target)?);
    }
    let text = escaped_value(value)?;
    spend(state, text.len())?;
    let mut out = String::with_capacity(text.len());
    let is_space = |c: char| super::python::is_space(c);
    for part in text.split_inclusive(is_space) {
        let word = part.trim_end_matches(is_space);
        let linked = linked(word, &attributes, limit, &schemes);
        spend(state, linked.len())?;
        out.push_str(&linked);
        out.push_str(&part[word.len()..]);
        super::python::check_size(&out)?;
    }
    Ok(made(state, out))
}

/// A word, as a link where it is an address; what stands around it stays outside.
fn linked(word: &str, attributes: &str, limit: Option<i64>, schemes: &[String]) -> String {
    let mut middle = word;
    while let Some(rest) = ["(", "<", "&lt;"]
        .iter()
        .find_map(|open| middle.strip_prefix(open))
    {
        middle = rest;
    }
    let head = &word[..word.len() - middle.len()];
    let whole = middle;
    while let Some(rest) = [")", ">", ".", ",", "\n", "&gt;"]
        .iter()
        .find_map(|end| middle.strip_suffix(end))
    {
        middle = rest;
    }
    // Brackets that the address opened are its own.
    for (open, close) in [("(", ")"), ("<", ">"), ("&lt;", "&gt;")] {
        let opened = middle.matches(open).count();
        if opened <= middle.matches(close).count() {
            continue;
        }
        let tail = &whole[middle.len()..];
        for _ in 0..opened.min(tail.matches(close).count()) {
            if let Some(at) = whole[middle.len()..].find(close) {
                middle = &whole[..middle.len() + at + close.len()];
            }
        }
    }
    let tail = &whole[middle.len()..];
    let short = || match limit {
        Some(limit) if middle.chars().count() as i64 > limit => {
            middle.chars().take(limit as usize).collect::<String>() + "..."
        }
        _ => middle.to_owned(),
    };
    let is_email = |text: &str| text.contains('@') && fits(&EMAIL, text);
    let link = if fits(&HTTP, middle) {
        let scheme = match middle.starts_with("https://") || middle.starts_with("http://") {
            true => "",
            false => "https://",
        };
        format!("<a href=\"{scheme}{middle}\"{attributes}>{}</a>", short())
    } else if let Some(address) = middle
        .strip_prefix("mailto:")
        .filter(|address| is_email(address))
    {
        format!("<a href=\"{middle}\">{address}</a>")
    } else if is_email(middle)
        && !middle.starts_with("www.")
        && !middle.starts_with('@')
        && !middle.contains(':')
    {
        format!("<a href=\"mailto:{middle}\">{middle}</a>")
    } else {
        let mut link = middle.to_owned();
        for scheme in schemes {
            if link != *scheme && link.starts_with(scheme) {
                link = format!("<a href=\"{link}\"{attributes}>{link}</a>");
            }
        }
        link
    };
    format!("{head}{link}{tail}")
}
