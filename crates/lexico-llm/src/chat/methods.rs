//! Python's methods of texts, dicts, lists and numbers. Those that would change a list or a dict are refused, as
//! transformers' sandbox refuses them.

use minijinja::{Error, ErrorKind, State, Value};
use unicode_general_category::{GeneralCategory, get_general_category};

use super::format;
use super::python::{
    Kind, Made, View, arguments, check_key, check_size, equal, flag, float, integer, is_printable,
    is_space, items, like, list, needed, needed_text, pairs, spend, split_arguments, tuple, whole,
    wrong,
};

const TEXT: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
const DICT: [&str; 11] = [
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];
const LIST: [&str; 11] = [
    "append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse",
    "sort",
];
const TUPLE: [&str; 2] = ["count", "index"];
const NUMBER: [&str; 12] = [
    "as_integer_ratio",
    "bit_count",
    "bit_length",
    "conjugate",
    "denominator",
    "from_bytes",
    "hex",
    "imag",
    "is_integer",
    "numerator",
    "real",
    "to_bytes",
];

/// Attributes of a macro, which minijinja's have otherwise or not at all.
const MACRO: [&str; 5] = [
    "arguments",
    "caller",
    "catch_kwargs",
    "catch_varargs",
    "defaults",
];

/// Whether a name is that of a method of any kind of value, or of a macro's attribute.
pub(super) fn is_method_name(name: &str) -> bool {
    [&TEXT[..], &DICT, &LIST, &TUPLE, &NUMBER, &MACRO]
        .iter()
        .any(|names| names.contains(&name))
}

/// Whether a value has a method of this name.
pub(super) fn has_method(value: &Value, name: &str) -> bool {
    let names = match Kind::of(value) {
        Kind::Text => &TEXT[..],
        Kind::Dict => &DICT,
        Kind::List => &LIST,
        Kind::Tuple | Kind::Range => &TUPLE,
        Kind::Bool | Kind::Integer | Kind::Float => &NUMBER,
        _ => return false,
    };
    names.contains(&name)
}

/// Calls a method of a value that is no object of its own kind.
pub(super) fn call(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Made<Value> {
    match (Kind::of(value), value.as_str()) {
        (Kind::Text, Some(text)) if value.is_safe() => {
            let made = text_method(state, text, name, args)?;
            let kept = [
                "strip",
                "lstrip",
                "rstrip",
                "upper",
                "lower",
                "title",
                "capitalize",
            ];
            match made.as_str() {
                Some(text) if kept.contains(&name) => Ok(like(value, text.to_owned())),
                None if Kind::of(&made).is_number() => Ok(made),
                _ => Err(wrong(format!("{name}() of a safe text is not taken"))),
            }
        }
        (Kind::Text, Some(text)) => text_method(state, text, name, args),
        (Kind::Dict, _) => dict_method(state, value, name, args),
        (Kind::List | Kind::Tuple | Kind::Range, _) => list_method(state, value, name, args),
        (Kind::Bool | Kind::Integer | Kind::Float, _) => number_method(value, name, args),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn none_of(name: &str, args: &[Value]) -> Made<()> {
    arguments(name, args, &[]).map(drop)
}

fn number_method(value: &Value, name: &str, args: &[Value]) -> Made<Value> {
    none_of(name, args)?;
    match (name, integer(value), float(value)) {
        ("bit_length", Some(number), _) => {
            Ok(Value::from(128 - number.unsigned_abs().leading_zeros()))
        }
        ("is_integer", None, Some(number)) => Ok(Value::from(number.fract() == 0.0)),
        ("conjugate", ..) => Ok(value.clone()),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn changes(name: &str) -> Error {
    wrong(format!(
        "{name}() would change a list or a dict, which a template may not"
    ))
}

fn dict_method(state: &State, value: &Value, name: &str, args: &[Value]) -> Made<Value> {
    let view = |kind, items| Ok(Value::from_object(View { kind, items }));
    match name {
        "get" => {
            let (plain, _) = split_arguments(args);
            if plain.len() != args.len() {
                return Err(wrong("get() takes no arguments by name"));
            }
            let mut given = arguments(name, args, &["key", "default"])?.into_iter();
            let key = needed(name, given.next().flatten())?;
            check_key(&key)?;
            let found = value.as_object().and_then(|dict| dict.get_value(&key));
            Ok(found.or(given.next().flatten()).unwrap_or(Value::from(())))
        }
        "items" | "keys" | "values" | "copy" => {
            none_of(name, args)?;
            let pairs = pairs(value)?;
            spend(state, pairs.len() * 64)?;
            let pairs = pairs.into_iter();
            match name {
                "items" => view("items", pairs.map(|(k, v)| tuple(vec![k, v])).collect()),
                "keys" => view("keys", pairs.map(|(k, _)| k).collect()),
                "values" => view("values", pairs.map(|(_, v)| v).collect()),
                _ => Ok(value.clone()),
            }
        }
        "fromkeys" => super::functions::from_keys(state, args),
        "clear" | "pop" | "popitem" | "setdefault" | "update" => Err(changes(name)),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn list_method(state: &State, value: &Value, name: &str, args: &[Value]) -> Made<Value> {
    let kind = Kind::of(value);
    match name {
        "count" => {
            let item = needed(name, arguments(name, args, &["value"])?.pop().flatten())?;
            let mut count = 0;
            for other in items(state, value)? {
                count += usize::from(equal(state, &other, &item)?);
            }
            Ok(Value::from(count))
        }
        "index" => {
            let mut given = arguments(name, args, &["value", "start", "stop"])?.into_iter();
            let item = needed(name, given.next().flatten())?;
            let (start, stop) = (given.next().flatten(), given.next().flatten());
            let all = items(state, value)?;
            let length = all.len() as i64;
            let start = from_end(whole(name, start, 0)?, length);
            let stop = from_end(whole(name, stop, length)?, length);
            for (at, other) in all.iter().enumerate() {
                if (start..stop).contains(&(at as i64)) && equal(state, other, &item)? {
                    return Ok(Value::from(at));
                }
            }
            Err(wrong("index() finds no such item"))
        }
        "copy" if kind == Kind::List => {
            none_of(name, args)?;
            Ok(value.clone())
        }
        _ if kind == Kind::List && LIST.contains(&name) => Err(changes(name)),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// A place that may count from the end, within `0..=length`.
fn from_end(at: i64, length: i64) -> i64 {
    let at = if at < 0 {
        at.saturating_add(length)
    } else {
        at
    };
    at.clamp(0, length)
}

/// The part of a text that `start` and `end` leave, and the number of characters before it.
fn part<'t>(
    name: &str,
    text: &'t str,
    start: Option<Value>,
    end: Option<Value>,
) -> Made<Option<(&'t str, usize)>> {
    let given = |value: Option<Value>| value.filter(|value| !value.is_none());
    let length = text.chars().count() as i64;
    let start = whole(name, given(start), 0)?;
    let end = from_end(whole(name, given(end), length)?, length);
    let start = if start < 0 {
        from_end(start, length)
    } else {
        start
    };
    if start > end {
        return Ok(None);
    }
    let byte = |at: i64| {
        text.char_indices()
            .nth(at as usize)
            .map_or(text.len(), |(byte, _)| byte)
    };
    Ok(Some((&text[byte(start)..byte(end)], start as usize)))
}

fn text_method(state: &State, text: &str, name: &str, args: &[Value]) -> Made<Value> {
    let all = |holds: fn(char) -> bool| -> Made<Value> {
        none_of(name, args)?;
        Ok(Value::from(!text.is_empty() && text.chars().all(holds)))
    };
    let changed = |change: fn(&str) -> String| -> Made<Value> {
        none_of(name, args)?;
        Ok(Value::from(change(text)))
    };
    match name {
        "upper" => changed(str::to_uppercase),
        "lower" => changed(str::to_lowercase),
        "title" => changed(title),
        "capitalize" => changed(capitalize),
        "swapcase" => changed(|text| {
            let swapped = text.chars().map(|c| match c.is_uppercase() {
                true => c.to_lowercase().to_string(),
                false => c.to_uppercase().to_string(),
            });
            swapped.collect()
        }),
        "casefold" if text.is_ascii() => changed(str::to_lowercase),
        "isalpha" => all(is_letter),
        "isalnum" => all(|c| is_letter(c) || c.is_numeric()),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|c| is_decimal(c) || is_other_digit(c)),
        "isnumeric" if text.chars().any(is_ideograph) => {
            Err(wrong("isnumeric() of an ideograph is not taken"))
        }
        "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "isprintable" => {
            none_of(name, args)?;
            Ok(Value::from(text.chars().all(is_printable)))
        }
        "isascii" => {
            none_of(name, args)?;
            Ok(Value::from(text.is_ascii()))
        }
        "isidentifier" => {
            none_of(name, args)?;
            let starts = text.starts_with(|c: char| c == '_' || is_letter(c));
            let goes_on = |c: char| c == '_' || is_letter(c) || is_decimal(c);
            Ok(Value::from(starts && text.chars().all(goes_on)))
        }
        "islower" => {
            none_of(name, args)?;
            let other = |c: char| c.is_uppercase() || is_title(c);
            Ok(Value::from(
                text.contains(char::is_lowercase) && !text.contains(other),
            ))
        }
        "isupper" => {
            none_of(name, args)?;
            let other = |c: char| c.is_lowercase() || is_title(c);
            Ok(Value::from(
                text.contains(char::is_uppercase) && !text.contains(other),
            ))
        }
        "istitle" => {
            none_of(name, args)?;
            Ok(Value::from(is_titled(text)))
        }
        "strip" | "lstrip" | "rstrip" => strip(text, name, args),
        "split" | "rsplit" => split(text, name, args),
        "splitlines" => {
            let given = arguments(name, args, &["keepends"])?.pop().flatten();
            let lines = lines(text, flag(given, false)).map(Value::from);
            Ok(list(lines.collect()))
        }
        "startswith" | "endswith" => begins_or_ends(state, text, name, args),
        "find" | "rfind" | "index" | "rindex" | "count" => find(text, name, args),
        "replace" => replace(state, text, args),
        "removeprefix" | "removesuffix" => {
            let part = needed_text(name, arguments(name, args, &["part"])?.pop().flatten())?;
            let rest = match name {
                "removeprefix" => text.strip_prefix(part.as_str()),
                _ => text.strip_suffix(part.as_str()),
            };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        "partition" | "rpartition" => {
            let separator = needed_text(name, arguments(name, args, &["sep"])?.pop().flatten())?;
            if separator.is_empty() {
                return Err(wrong(format!("{name}() of nothing")));
            }
            let parts = match name {
                "partition" => text.split_once(separator.as_str()),
                _ => text.rsplit_once(separator.as_str()),
            };
            let parts = match parts {
                Some((before, after)) => [before, &separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Ok(tuple(parts.map(Value::from).into()))
        }
        "zfill" | "center" | "ljust" | "rjust" | "expandtabs" => widen(state, text, name, args),
        "join" => {
            let joined = needed(name, arguments(name, args, &["iterable"])?.pop().flatten())?;
            if joined.is_undefined() {
                return Ok(Value::from(""));
            }
            let mut out = String::new();
            for (at, item) in items(state, &joined)?.iter().enumerate() {
                let Some(item) = item.as_str() else {
                    return Err(wrong(format!(
                        "join() takes texts, not {}",
                        Kind::of(item).name()
                    )));
                };
                spend(state, text.len() + item.len())?;
                if at > 0 {
                    out.push_str(text);
                }
                out.push_str(item);
                check_size(&out)?;
            }
            Ok(Value::from(out))
        }
        "format" => {
            let (plain, named) = split_arguments(args);
            format::braces(state, text, plain, &named).map(Value::from)
        }
        "format_map" => {
            let mapping = needed(name, arguments(name, args, &["mapping"])?.pop().flatten())?;
            let named = pairs(&mapping)?.into_iter();
            let named: Vec<_> = named.map(|(key, value)| (key.to_string(), value)).collect();
            format::braces(state, text, &[], &named).map(Value::from)
        }
        _ if TEXT.contains(&name) => Err(wrong(format!("{name}() of this text is not taken"))),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

pub(super) fn is_letter(c: char) -> bool {
    use GeneralCategory as G;
    let letters = [
        G::UppercaseLetter,
        G::LowercaseLetter,
        G::TitlecaseLetter,
        G::ModifierLetter,
        G::OtherLetter,
    ];
    letters.contains(&get_general_category(c))
}

pub(super) fn is_decimal(c: char) -> bool {
    get_general_category(c) == GeneralCategory::DecimalNumber
}

/// Digits that stand higher, lower or in circles.
fn is_other_digit(c: char) -> bool {
    matches!(c as u32,
        0xb2 | 0xb3 | 0xb9 | 0x1369..=0x1371 | 0x19da | 0x2070 | 0x2074..=0x2079 | 0x2080..=0x2089
        | 0x2460..=0x2468 | 0x2474..=0x247c | 0x2488..=0x2490 | 0x24ea | 0x24f5..=0x24fd | 0x24ff
        | 0x2776..=0x277e | 0x2780..=0x2788 | 0x278a..=0x2792 | 0x10a40..=0x10a43
        | 0x10e60..=0x10e68 | 0x11052..=0x1105a | 0x1f100..=0x1f10a)
}

fn is_ideograph(c: char) -> bool {
    get_general_category(c) == GeneralCategory::OtherLetter
        && matches!(c as u32, 0x3400..=0x9fff | 0xf900..=0xfaff | 0x20000..=0x3ffff)
}

fn is_title(c: char) -> bool {
    get_general_category(c) == GeneralCategory::TitlecaseLetter
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || is_title(c)
}

/// A character as it begins a title.
fn title_case(c: char) -> String {
    match c {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".to_owned(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".to_owned(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".to_owned(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".to_owned(),
        c if is_title(c) => c.to_string(),
        c => {
            // Ligatures: their first letter alone.
            let mut upper = c.to_uppercase();
            let first = upper.next().into_iter();
            first.chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

/// `str.title`
fn title(text: &str) -> String {
    let mut within = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if within {
            out.extend(c.to_lowercase());
        } else {
            out.push_str(&title_case(c));
        }
        within = is_cased(c);
    }
    out
}

/// `str.capitalize`
pub(super) fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().map_or_else(String::new, title_case);
    first + &characters.as_str().to_lowercase()
}

fn is_titled(text: &str) -> bool {
    let (mut within, mut any) = (false, false);
    for c in text.chars() {
        if c.is_uppercase() || is_title(c) {
            if within {
                return false;
            }
            (within, any) = (true, true);
        } else if c.is_lowercase() {
            if !within {
                return false;
            }
            any = true;
        } else {
            within = false;
        }
    }
    any
}

fn strip(text: &str, name: &str, args: &[Value]) -> Made<Value> {
    let given = arguments(name, args, &["chars"])?.pop().flatten();
    let given = given.filter(|value| !value.is_none());
    let taken = given
        .map(|value| needed_text(name, Some(value)))
        .transpose()?;
    Ok(Value::from(stripped(text, name, taken.as_deref())))
}

/// A text without the characters at its ends: white space where none are named.
pub(super) fn stripped<'t>(text: &'t str, name: &str, taken: Option<&str>) -> &'t str {
    let is_taken = |c: char| taken.map_or_else(|| is_space(c), |taken| taken.contains(c));
    match name {
        "lstrip" => text.trim_start_matches(is_taken),
        "rstrip" => text.trim_end_matches(is_taken),
        _ => text.trim_matches(is_taken),
    }
}

fn split(text: &str, name: &str, args: &[Value]) -> Made<Value> {
    let mut given = arguments(name, args, &["sep", "maxsplit"])?.into_iter();
    let separator = given.next().flatten().filter(|value| !value.is_none());
    let most = whole(name, given.next().flatten(), -1)?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let backwards = name == "rsplit";
    let mut parts: Vec<&str> = Vec::new();
    if let Some(separator) = separator {
        let separator = needed_text(name, Some(separator))?;
        if separator.is_empty() {
            return Err(wrong(format!("{name}() at nothing")));
        }
        if backwards {
            parts.extend(text.rsplitn(most.saturating_add(1), separator.as_str()));
        } else {
            parts.extend(text.splitn(most.saturating_add(1), separator.as_str()));
        }
    } else {
        let mut rest = text;
        loop {
            rest = stripped(rest, if backwards { "rstrip" } else { "lstrip" }, None);
            if rest.is_empty() {
                break;
            }
            if parts.len() >= most {
                parts.push(rest);
                break;
            }
            if backwards {
                let at = rest.char_indices().rfind(|(_, c)| is_space(*c));
                let at = at.map_or(0, |(at, c)| at + c.len_utf8());
                parts.push(&rest[at..]);
                rest = &rest[..at];
            } else {
                let at = rest.find(is_space).unwrap_or(rest.len());
                parts.push(&rest[..at]);
                rest = &rest[at..];
            }
        }
    }
    if backwards {
        parts.reverse();
    }
    Ok(list(parts.into_iter().map(Value::from).collect()))
}

/// The lines of a text as Python cuts them, with or without their ends.
pub(super) fn lines(text: &str, ends: bool) -> impl Iterator<Item = &str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some(at) = rest.find(is_end) else {
            return Some(std::mem::take(&mut rest));
        };
        let long = match rest[at..].starts_with("\r\n") {
            true => 2,
            false => rest[at..].chars().next().map_or(0, char::len_utf8),
        };
        let line = &rest[..if ends { at + long } else { at }];
        rest = &rest[at + long..];
        Some(line)
    })
}

fn begins_or_ends(state: &State, text: &str, name: &str, args: &[Value]) -> Made<Value> {
    let mut given = arguments(name, args, &["part", "start", "end"])?.into_iter();
    let asked = needed(name, given.next().flatten())?;
    let asked = match Kind::of(&asked) {
        Kind::Tuple => items(state, &asked)?,
        _ => vec![asked],
    };
    let within = part(name, text, given.next().flatten(), given.next().flatten())?;
    for one in asked {
        let one = needed_text(name, Some(one))?;
        let found = within.is_some_and(|(text, _)| match name {
            "startswith" => text.starts_with(&one),
            _ => text.ends_with(&one),
        });
        if found {
            return Ok(Value::from(true));
        }
    }
    Ok(Value::from(false))
}

fn find(text: &str, name: &str, args: &[Value]) -> Made<Value> {
    let mut given = arguments(name, args, &["sub", "start", "end"])?.into_iter();
    let asked = needed_text(name, given.next().flatten())?;
    let within = part(name, text, given.next().flatten(), given.next().flatten())?;
    if name == "count" {
        let count = within.map_or(0, |(text, _)| text.matches(asked.as_str()).count());
        return Ok(Value::from(count));
    }
    let found = within.and_then(|(text, before)| {
        let at = match name {
            "find" | "index" => text.find(&asked),
            _ => text.rfind(&asked),
        };
        Some(before + text[..at?].chars().count())
    });
    match found {
        Some(at) => Ok(Value::from(at)),
        None if name.ends_with("find") => Ok(Value::from(-1)),
        None => Err(wrong(format!("{name}() finds no such text"))),
    }
}

fn replace(state: &State, text: &str, args: &[Value]) -> Made<Value> {
    let name = "replace";
    let mut given = arguments(name, args, &["old", "new", "count"])?.into_iter();
    let old = needed_text(name, given.next().flatten())?;
    let new = needed_text(name, given.next().flatten())?;
    let count = whole(name, given.next().flatten(), -1)?;
    replaced(state, text, &old, &new, count).map(Value::from)
}

/// A text with the first `count` of a part replaced, all where it is negative.
pub(super) fn replaced(
    state: &State,
    text: &str,
    old: &str,
    new: &str,
    count: i64,
) -> Made<String> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let found = text.matches(old).take(most).count();
    spend(state, text.len() + found.saturating_mul(new.len()))?;
    Ok(text.replacen(old, new, most))
}

fn widen(state: &State, text: &str, name: &str, args: &[Value]) -> Made<Value> {
    if name == "expandtabs" {
        return expand_tabs(state, text, args);
    }
    let names: &[&str] = if name == "zfill" {
        &["width"]
    } else {
        &["width", "fillchar"]
    };
    let mut given = arguments(name, args, names)?.into_iter();
    let width = needed(name, given.next().flatten())?;
    let width = usize::try_from(whole(name, Some(width), 0)?).unwrap_or(0);
    let length = text.chars().count();
    let Some(missing) = width.checked_sub(length) else {
        return Ok(Value::from(text));
    };
    let fill = match given.next().flatten() {
        Some(fill) => needed_text(name, Some(fill))?,
        None => if name == "zfill" { "0" } else { " " }.to_owned(),
    };
    if fill.chars().count() != 1 {
        return Err(wrong(format!("{name}() fills up with one character")));
    }
    spend(state, missing.saturating_mul(fill.len()))?;
    let fill = |count: usize| fill.repeat(count);
    Ok(Value::from(match name {
        "zfill" => {
            let sign = if text.starts_with(['+', '-']) { 1 } else { 0 };
            format!("{}{}{}", &text[..sign], fill(missing), &text[sign..])
        }
        "ljust" => format!("{text}{}", fill(missing)),
        "rjust" => format!("{}{text}", fill(missing)),
        _ => {
            let before = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fill(before), fill(missing - before))
        }
    }))
}

fn expand_tabs(state: &State, text: &str, args: &[Value]) -> Made<Value> {
    let given = arguments("expandtabs", args, &["tabsize"])?.pop().flatten();
    let size = usize::try_from(whole("expandtabs", given, 8)?).unwrap_or(0);
    spend(state, text.matches('\t').count().saturating_mul(size))?;
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        match c {
            '\t' => {
                let spaces = if size == 0 { 0 } else { size - column % size };
                out.push_str(&" ".repeat(spaces));
                column += spaces;
            }
            _ => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') {
                    0
                } else {
                    column + 1
                };
            }
        }
    }
    Ok(Value::from(out))
}
