//! Jinja2's filters for HTML, and the texts that it calls safe.

use std::sync::LazyLock;

use lexico::shown::shown;
use minijinja::{State, Value};
use regex::Regex;

use super::escapes;
use super::methods::split_at_space;
use super::python::{
    Kind, Made, arguments, flag, items, needed_text, pairs, spend, text, whole, wrong,
};

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
    stripped_of_tags(&text).map(Value::from)
}

pub(super) fn stripped_of_tags(text: &str) -> Made<String> {
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

/// `html.unescape`, of those entities that are told by number or have one of the common names.
pub(super) fn unescaped(text: &str) -> Made<String> {
    const NAMES: [(&str, &str); 6] = [
        ("amp;", "&"),
        ("lt;", "<"),
        ("gt;", ">"),
        ("quot;", "\""),
        ("apos;", "'"),
        ("nbsp;", "\u{a0}"),
    ];
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some((name, c)) = NAMES.iter().find(|(name, _)| rest.starts_with(name)) {
            out.push_str(c);
            rest = &rest[name.len()..];
        } else if let Some((c, length)) = numbered(rest)? {
            out.push(c);
            rest = &rest[length..];
        } else if rest.starts_with(|c: char| c.is_ascii_alphabetic()) {
            // Python knows 2,231 names, some without a semicolon.
            let name: String = rest
                .chars()
                .take_while(char::is_ascii_alphanumeric)
                .collect();
            return Err(wrong(format!(
                "the entity \"{}\" is not taken",
                shown(name)
            )));
        } else {
            out.push('&');
        }
    }
    Ok(out + rest)
}

/// The character of `#39;` or `#x27;`, and the length of that.
fn numbered(text: &str) -> Made<Option<(char, usize)>> {
    let Some(number) = text.strip_prefix('#') else {
        return Ok(None);
    };
    let (digits, radix) = match number.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16),
        None => (number, 10),
    };
    let count = digits.chars().take_while(|c| c.is_digit(radix)).count();
    if count == 0 {
        return Ok(None);
    }
    let code = u32::from_str_radix(&digits[..count], radix).ok();
    let c = code.and_then(char::from_u32).filter(|c| {
        let hidden = c.is_control() && !"\t\n".contains(*c);
        !hidden && *c as u32 & 0xfffe != 0xfffe && !('\u{fdd0}'..='\u{fdef}').contains(c)
    });
    let c = c.ok_or_else(|| wrong("an entity of no character is not taken"))?;
    let end = text.len() - digits.len() + count;
    Ok(Some((c, end + usize::from(text[end..].starts_with(';')))))
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
