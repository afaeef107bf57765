//! Jinja2's filters: `value | upper`.

use std::cmp::Ordering;
use std::fmt::Write;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Rest, ValueOrKwargs};
use minijinja::{Environment, State, Value};

use super::format::percent;
use super::json::to_json;
use super::layout;
use super::markup::{self, escaped, escaped_value, escapes, set_escapes};
use super::methods::{attribute_of_kind, capitalize, is_letter, lines, replaced, stripped};
use super::operators::add;
use super::python::{
    Generator, Kind, Made, arguments, attribute, check_size, equal, flag, float, integer, is_loop,
    is_space, is_true, items, let_go, like, list, needed, needed_text, order, pairs, spend,
    split_arguments, text, tuple, whole, wrong,
};
use super::translate::ESCAPING_FILTERS;

type Filter = fn(&mut State, &Value, &[Value]) -> Made<Value>;

const FILTERS: [(&str, Filter); 54] = [
    ("abs", abs),
    ("attr", attr),
    ("batch", batch),
    ("capitalize", |_, value, args| {
        plain("capitalize", value, args, capitalize)
    }),
    ("center", center),
    ("count", length),
    ("d", default),
    ("default", default),
    ("dictsort", dictsort),
    ("e", escape),
    ("escape", escape),
    ("first", first),
    ("float", to_float),
    ("forceescape", |_, value, _| {
        Ok(Value::from_safe_string(escaped(&text(value)?)))
    }),
    ("format", format),
    ("groupby", groupby),
    ("indent", indent),
    ("int", to_int),
    ("items", dict_items),
    ("join", join),
    ("last", last),
    ("length", length),
    ("list", |state, value, args| {
        arguments("list", args, &[])?;
        items(state, value).map(list)
    }),
    ("lower", |_, value, args| {
        plain("lower", value, args, str::to_lowercase)
    }),
    ("map", map),
    ("max", |state, value, args| {
        extreme(state, value, args, Ordering::Greater)
    }),
    ("min", |state, value, args| {
        extreme(state, value, args, Ordering::Less)
    }),
    ("reject", |state, value, args| {
        select(state, value, args, false, false)
    }),
    ("rejectattr", |state, value, args| {
        select(state, value, args, true, false)
    }),
    ("replace", replace),
    ("reverse", reverse),
    ("round", round),
    ("safe", |_, value, _| {
        Ok(Value::from_safe_string(text(value)?))
    }),
    ("select", |state, value, args| {
        select(state, value, args, false, true)
    }),
    ("selectattr", |state, value, args| {
        select(state, value, args, true, true)
    }),
    ("slice", slice),
    ("sort", sort),
    ("string", |_, value, args| {
        arguments("string", args, &[])?;
        match value.as_str() {
            Some(_) => Ok(value.clone()),
            None => text(value).map(Value::from),
        }
    }),
    ("sum", sum),
    ("title", |_, value, args| plain("title", value, args, title)),
    ("tojson", |state, value, args| {
        to_json(state, value, args).map(Value::from)
    }),
    ("trim", trim),
    ("truncate", truncate),
    ("unique", unique),
    ("upper", |_, value, args| {
        plain("upper", value, args, str::to_uppercase)
    }),
    ("urlencode", urlencode),
    ("wordcount", wordcount),
    ("filesizeformat", layout::filesizeformat),
    ("pprint", layout::pprint),
    ("striptags", markup::striptags),
    ("urlize", markup::urlize),
    ("wordwrap", layout::wordwrap),
    ("xmlattr", markup::xmlattr),
    ("random", random),
];

pub(super) fn add_to(environment: &mut Environment) {
    for (name, filter) in FILTERS {
        environment.add_filter(
            name,
            move |state: &mut State, value: Value, args: Rest<ValueOrKwargs>| {
                filter(state, &value, &args.into_values())
            },
        );
        // As the translator writes them where what is in force does not count.
        for (kind, on) in [("__escaping_", true), ("__plain_", false)] {
            if ESCAPING_FILTERS.contains(&name) {
                environment.add_filter(
                    format!("{kind}{name}"),
                    move |state: &mut State, value: Value, args: Rest<ValueOrKwargs>| {
                        let before = set_escapes(state, on);
                        let made = filter(state, &value, &args.into_values());
                        set_escapes(state, before);
                        made
                    },
                );
            }
        }
    }
}

pub(super) fn is_filter(name: &str) -> bool {
    FILTERS.iter().any(|(filter, _)| *filter == name)
}

/// The value that an argument has where it is given and not `none`.
fn some(given: &mut impl Iterator<Item = Option<Value>>) -> Option<Value> {
    given.next().flatten().filter(|value| !value.is_none())
}

// Texts.

fn plain(name: &str, value: &Value, args: &[Value], change: fn(&str) -> String) -> Made<Value> {
    arguments(name, args, &[])?;
    Ok(like(value, change(&text(value)?)))
}

/// Jinja2's `title`, which is not Python's: a word begins after white space, `-` and opening brackets.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut begins = true;
    for c in text.chars() {
        if is_space(c) || "-({[<".contains(c) {
            out.push(c);
            begins = true;
        } else if begins {
            out.extend(c.to_uppercase());
            begins = false;
        } else {
            out.extend(c.to_lowercase());
        }
    }
    out
}

fn trim(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let taken = arguments("trim", args, &["chars"])?.pop().flatten();
    let taken = taken.filter(|taken| !taken.is_none());
    let taken = taken
        .map(|taken| needed_text("trim", Some(taken)))
        .transpose()?;
    let text = text(value)?;
    let stripped = stripped(&text, "strip", taken.as_deref());
    Ok(like(value, stripped.to_owned()))
}

fn escape(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("escape", args, &[])?;
    if value.is_safe() {
        return Ok(value.clone());
    }
    Ok(Value::from_safe_string(escaped(&text(value)?)))
}

fn center(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let width = arguments("center", args, &["width"])?.pop().flatten();
    let text = match value.as_str() {
        Some(_) => value.clone(),
        None => Value::from(text(value)?),
    };
    text.call_method(state, "center", &[width.unwrap_or(Value::from(80))])
}

fn replace(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("replace", args, &["old", "new", "count"])?.into_iter();
    let old = needed("replace", given.next().flatten())?;
    let new = needed("replace", given.next().flatten())?;
    let count = whole("replace", some(&mut given), -1)?;
    let (old_text, new_text) = (text(&old)?, text(&new)?);
    if !escapes(state) {
        return replaced(state, &text(value)?, &old_text, &new_text, count).map(Value::from);
    }
    if !(value.is_safe() || old.is_safe() || new.is_safe()) {
        return replaced(state, &text(value)?, &old_text, &new_text, count).map(Value::from);
    }
    let (text, new) = (escaped_value(value)?, escaped_value(&new)?);
    replaced(state, &text, &old_text, &new, count).map(Value::from_safe_string)
}

fn format(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let (plain, named) = split_arguments(args);
    let values = match (plain, named.is_empty()) {
        (plain, true) => tuple(plain.to_vec()),
        ([], false) => Value::from_pairs(
            named
                .into_iter()
                .map(|(name, value)| (Value::from(name), value)),
        ),
        _ => return Err(wrong("format takes values with names or without, not both")),
    };
    let template = match value.as_str() {
        Some(_) => value.clone(),
        None => Value::from(text(value)?),
    };
    percent(state, &template, &values)
}

fn indent(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("indent", args, &["width", "first", "blank"])?.into_iter();
    let width = given.next().flatten().unwrap_or(Value::from(4));
    let (first, blank) = (
        flag(given.next().flatten(), false),
        flag(given.next().flatten(), false),
    );
    let Some(text) = value.as_str() else {
        return Err(wrong(format!(
            "indent takes a text, not {}",
            Kind::of(value).name()
        )));
    };
    let by = match width.as_str() {
        Some(by) => by.to_owned(),
        None => {
            let width = usize::try_from(whole("indent", Some(width.clone()), 4)?).unwrap_or(0);
            spend(state, width)?;
            " ".repeat(width)
        }
    };
    // By a safe text: what it is put before is escaped.
    let escapes = width.is_safe() && !value.is_safe();
    let text = format!("{text}\n");
    spend(
        state,
        text.len() + lines(&text, false).count().saturating_mul(by.len() + 1),
    )?;
    let mut out = String::with_capacity(text.len());
    for (at, line) in lines(&text, false).enumerate() {
        if at > 0 {
            out.push('\n');
        }
        let indented = at > 0 && (blank || !line.is_empty());
        if indented {
            out.push_str(&by);
        }
        match escapes && (indented || blank) {
            true => out.push_str(&escaped(line)),
            false => out.push_str(line),
        }
        check_size(&out)?;
    }
    if first {
        let rest = if escapes && !blank {
            escaped(&out)
        } else {
            out
        };
        out = by + &rest;
    }
    Ok(match value.is_safe() || escapes && (blank || first) {
        true => Value::from_safe_string(out),
        false => Value::from(out),
    })
}

fn truncate(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let names = ["length", "killwords", "end", "leeway"];
    let mut given = arguments("truncate", args, &names)?.into_iter();
    let length = whole("truncate", given.next().flatten(), 255)?;
    let cut_words = flag(given.next().flatten(), false);
    let end_value = given.next().flatten().unwrap_or(Value::from("..."));
    let end = needed_text("truncate", Some(end_value.clone()))?;
    let leeway = whole("truncate", some(&mut given), 5)?;
    let text = needed_text("truncate", Some(value.clone()))?;
    let characters: Vec<char> = text.chars().collect();
    spend(state, characters.len())?;
    let kept = length.saturating_sub(end.chars().count() as i64);
    let Ok(kept) = usize::try_from(kept) else {
        return Err(wrong(
            "truncate takes a length no less than that of its end",
        ));
    };
    if leeway < 0 {
        return Err(wrong("truncate takes no leeway below 0"));
    }
    if characters.len() as i64 <= length.saturating_add(leeway) {
        return Ok(value.clone());
    }
    let mut short: String = characters.into_iter().take(kept).collect();
    if !cut_words && let Some(at) = short.rfind(' ') {
        short.truncate(at);
    }
    add(state, &like(value, short), &end_value)
}

fn wordcount(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("wordcount", args, &[])?;
    let text = text(value)?;
    let words = text.split(|c: char| !(c == '_' || is_letter(c) || c.is_numeric()));
    Ok(Value::from(words.filter(|word| !word.is_empty()).count()))
}

fn urlencode(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("urlencode", args, &[])?;
    let quoted = |value: &Value, query: bool| -> Made<String> {
        let mut out = String::new();
        for byte in text(value)?.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                    out.push(char::from(byte))
                }
                b'/' if !query => out.push('/'),
                b' ' if query => out.push('+'),
                _ => {
                    let _ = write!(out, "%{byte:02X}");
                }
            }
        }
        Ok(out)
    };
    let kind = Kind::of(value);
    let pairs: Vec<(Value, Value)> = match kind {
        Kind::Dict => pairs(value)?,
        _ if super::python::is_iterable(value) && kind != Kind::Text => {
            let mut pairs = Vec::new();
            for pair in items(state, value)? {
                match items(state, &pair)?.as_slice() {
                    [key, value] => pairs.push((key.clone(), value.clone())),
                    _ => return Err(wrong("urlencode takes pairs")),
                }
            }
            pairs
        }
        _ => return quoted(value, false).map(Value::from),
    };
    let mut parts = Vec::new();
    for (key, value) in &pairs {
        parts.push(format!("{}={}", quoted(key, true)?, quoted(value, true)?));
    }
    Ok(Value::from(parts.join("&")))
}

// Numbers.

fn abs(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("abs", args, &[])?;
    match (integer(value), float(value)) {
        (Some(number), _) => {
            let size = number
                .checked_abs()
                .ok_or_else(|| wrong("a number is too large"))?;
            Ok(Value::from(size))
        }
        (None, Some(number)) => Ok(Value::from(number.abs())),
        _ => Err(wrong(format!("abs of a {}", Kind::of(value).name()))),
    }
}

/// Digits of other scripts than ours as ours, and without single underscores between them.
fn plain_digits(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut before = None;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '_' {
            let between = before.is_some_and(char::is_alphanumeric);
            if !between || !rest.peek().copied().is_some_and(char::is_alphanumeric) {
                return None;
            }
        } else if !c.is_ascii() && c.is_numeric() {
            // Digits of a script stand in a row, in their order, ten from a place that they share.
            out.push(other_digit(c)?);
        } else {
            out.push(c);
        }
        before = Some(c);
    }
    Some(out)
}

fn other_digit(c: char) -> Option<char> {
    if !super::methods::is_decimal(c) {
        return None;
    }
    let mut value = 0;
    while value < 9 {
        let below = char::from_u32(c as u32 - value - 1)?;
        if !super::methods::is_decimal(below) {
            break;
        }
        value += 1;
    }
    char::from_digit(value, 10)
}

/// `int(text, base)`
pub(super) fn parse_int(text: &str, base: u32) -> Made<Option<i128>> {
    let text = stripped(text, "strip", None);
    let Some(text) = plain_digits(text) else {
        return Ok(None);
    };
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(&text)),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixes = [("0x", 16), ("0o", 8), ("0b", 2)];
    let prefixed = prefixes
        .iter()
        .find(|(prefix, of)| lower.starts_with(prefix) && (base == *of || base == 0));
    let (digits, base) = match prefixed {
        Some((prefix, of)) => (&digits[prefix.len()..], *of),
        None if base == 0 && digits.starts_with('0') && digits.bytes().any(|b| b != b'0') => {
            return Ok(None);
        }
        None => (digits, if base == 0 { 10 } else { base }),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(base)) {
        return Ok(None);
    }
    let size = i128::from_str_radix(digits, base).map_err(|_| wrong("a number is too large"))?;
    Ok(Some(if negative { -size } else { size }))
}

/// `float(text)`
pub(super) fn parse_float(text: &str) -> Option<f64> {
    plain_digits(stripped(text, "strip", None))?.parse().ok()
}

fn to_int(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("int", args, &["default", "base"])?.into_iter();
    let default = given.next().flatten().unwrap_or(Value::from(0));
    let base = whole("int", given.next().flatten(), 10)?;
    let cut = |number: f64| -> Made<Value> {
        if number.abs() >= 1e38 {
            return Err(wrong("a number is too large"));
        }
        Ok(Value::from(number as i128))
    };
    match Kind::of(value) {
        Kind::Undefined => Err(wrong("int of an undefined value")),
        Kind::Text => {
            let text = text(value)?;
            let base = u32::try_from(base)
                .ok()
                .filter(|base| *base == 0 || (2..=36).contains(base));
            if let Some(base) = base
                && let Some(number) = parse_int(&text, base)?
            {
                return Ok(Value::from(number));
            }
            match parse_float(&text) {
                Some(number) if number.is_finite() => cut(number),
                _ => Ok(default),
            }
        }
        Kind::Float => match float(value) {
            Some(number) if number.is_finite() => cut(number),
            Some(number) if number.is_infinite() => Err(wrong("int of what is infinite")),
            _ => Ok(default),
        },
        _ => Ok(integer(value).map_or(default, Value::from)),
    }
}

fn to_float(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let default = arguments("float", args, &["default"])?.pop().flatten();
    let default = default.unwrap_or(Value::from(0.0));
    if value.is_undefined() {
        return Err(wrong("float of an undefined value"));
    }
    let number = match value.as_str() {
        Some(text) => parse_float(text),
        None => float(value),
    };
    Ok(number.map_or(default, Value::from))
}

fn round(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("round", args, &["precision", "method"])?.into_iter();
    let precision = whole("round", given.next().flatten(), 0)?;
    let method = match given.next().flatten() {
        Some(method) => needed_text("round", Some(method))?,
        None => "common".to_owned(),
    };
    let places = i32::try_from(precision)
        .ok()
        .filter(|places| places.abs() <= 300);
    let places = places.ok_or_else(|| wrong("round takes at most 300 places"))?;
    let number =
        float(value).ok_or_else(|| wrong(format!("round of a {}", Kind::of(value).name())))?;
    let scale = 10f64.powi(places);
    match method.as_str() {
        "ceil" => Ok(Value::from((number * scale).ceil() / scale)),
        "floor" => Ok(Value::from((number * scale).floor() / scale)),
        "common" => match integer(value) {
            Some(whole) if places >= 0 => Ok(Value::from(whole)),
            Some(whole) => {
                let unit = 10i128
                    .checked_pow(places.unsigned_abs())
                    .unwrap_or(i128::MAX);
                let (tens, rest) = (whole.div_euclid(unit), whole.rem_euclid(unit));
                let up = match (rest).cmp(&(unit - rest)) {
                    Ordering::Less => false,
                    Ordering::Equal => tens % 2 != 0,
                    Ordering::Greater => true,
                };
                Ok(Value::from((tens + i128::from(up)).saturating_mul(unit)))
            }
            None if !number.is_finite() => Ok(Value::from(number)),
            None if places >= 0 => {
                let digits = format!("{number:.*}", places as usize);
                Ok(Value::from(digits.parse().unwrap_or(number)))
            }
            None => Ok(Value::from((number * scale).round_ties_even() / scale)),
        },
        _ => Err(wrong("round is \"common\", \"ceil\" or \"floor\"")),
    }
}

// Items.

fn default(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("default", args, &["default_value", "boolean"])?.into_iter();
    let other = given.next().flatten().unwrap_or(Value::from(""));
    let falsy = flag(given.next().flatten(), false);
    Ok(if value.is_undefined() || (falsy && !is_true(value)) {
        other
    } else {
        value.clone()
    })
}

fn length(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("length", args, &[])?;
    match Kind::of(value) {
        Kind::Undefined => Ok(Value::from(0)),
        Kind::Text
        | Kind::Bytes
        | Kind::List
        | Kind::Tuple
        | Kind::Dict
        | Kind::Range
        | Kind::View => Ok(Value::from(value.len().unwrap_or(0))),
        _ if is_loop(value) => Ok(value.get_attr("length")?),
        kind => Err(wrong(format!("a {} has no length", kind.name()))),
    }
}

fn first(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("first", args, &[])?;
    if let Some(generator) = value.downcast_object_ref::<Generator>() {
        return Ok(generator.first().unwrap_or(Value::UNDEFINED));
    }
    if !super::python::is_iterable(value) {
        return Err(wrong(format!("a {} has no items", Kind::of(value).name())));
    }
    if value.is_undefined() {
        return Ok(Value::UNDEFINED);
    }
    Ok(value.try_iter()?.next().unwrap_or(Value::UNDEFINED))
}

/// What is random is refused, as there is nothing to agree with.
fn random(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("random", args, &[])?;
    let counted = length(state, value, &[]);
    match counted.is_ok_and(|count| count == Value::from(0)) {
        true => Ok(Value::UNDEFINED),
        false => Err(wrong(
            "the filter \"random\" is not taken: what it gives is random",
        )),
    }
}

fn last(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("last", args, &[])?;
    if Kind::of(value) == Kind::Generator {
        return Err(wrong("a generator has no last item"));
    }
    Ok(items(state, value)?.pop().unwrap_or(Value::UNDEFINED))
}

fn reverse(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("reverse", args, &[])?;
    if let Some(text) = value.as_str() {
        return Ok(like(value, text.chars().rev().collect()));
    }
    let mut all = items(state, value)?;
    all.reverse();
    Ok(if Kind::of(value) == Kind::Generator {
        list(all)
    } else {
        Generator::of(all)
    })
}

/// The parts of `a.b.0`.
fn path(named: &Value) -> Vec<Value> {
    let Some(text) = named.as_str() else {
        return vec![named.clone()];
    };
    let part = |part: &str| match part.parse::<u32>() {
        Ok(place) if part.bytes().all(|b| b.is_ascii_digit()) => Value::from(place),
        _ => Value::from(part),
    };
    text.split('.').map(part).collect()
}

fn follow(value: &Value, path: &[Value], default: Option<&Value>) -> Made<Value> {
    let mut found = value.clone();
    for part in path {
        found = attribute(&found, part)?;
        if let Some(default) = default.filter(|_| found.is_undefined()) {
            found = default.clone();
        }
    }
    Ok(found)
}

/// A text without regard to case, for sorting.
fn folded(value: Value, by_case: bool) -> Value {
    match value.as_str() {
        Some(text) if !by_case => Value::from(text.to_lowercase()),
        _ => value,
    }
}

/// The places of keys in their order. What is equal stays as it is, backwards too.
pub(super) fn sorted_places(state: &State, keys: Vec<Value>, backwards: bool) -> Made<Vec<usize>> {
    places_by(keys, |a, b| {
        let (a, b) = if backwards { (b, a) } else { (a, b) };
        Ok(order(state, a, b)? == Some(Ordering::Less))
    })
}

/// The places of keys in the order that `less` tells.
///
/// A merge sort, for the standard library's may panic where an order is none, as that of NaN.
pub(super) fn places_by(
    keys: Vec<Value>,
    less: impl Fn(&Value, &Value) -> Made<bool>,
) -> Made<Vec<usize>> {
    let after = |a: usize, b: usize| less(&keys[b], &keys[a]);
    let mut places: Vec<usize> = (0..keys.len()).collect();
    let mut width = 1;
    while width < places.len() {
        let mut merged = Vec::with_capacity(places.len());
        for run in places.chunks(2 * width) {
            let (left, right) = run.split_at(width.min(run.len()));
            let (mut left, mut right) = (
                left.iter().copied().peekable(),
                right.iter().copied().peekable(),
            );
            while let (Some(&a), Some(&b)) = (left.peek(), right.peek()) {
                merged.extend(if after(a, b)? {
                    right.next()
                } else {
                    left.next()
                });
            }
            merged.extend(left.chain(right));
        }
        places = merged;
        width *= 2;
    }
    Ok(places)
}

fn sort(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let names = ["reverse", "case_sensitive", "attribute"];
    let mut given = arguments("sort", args, &names)?.into_iter();
    let backwards = flag(given.next().flatten(), false);
    let by_case = flag(given.next().flatten(), false);
    let named = some(&mut given);
    let all = items(state, value)?;
    let mut keys = Vec::new();
    for item in &all {
        keys.push(match &named {
            None => folded(item.clone(), by_case),
            Some(named) => {
                let each: Vec<Value> = match named.as_str() {
                    Some(names) => names.split(',').map(Value::from).collect(),
                    None => vec![named.clone()],
                };
                let found = each.iter().map(|named| follow(item, &path(named), None));
                let found = found.map(|found| Ok(folded(found?, by_case)));
                list(found.collect::<Made<_>>()?)
            }
        });
    }
    let places = sorted_places(state, keys, backwards)?;
    Ok(list(places.into_iter().map(|at| all[at].clone()).collect()))
}

fn dictsort(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let names = ["case_sensitive", "by", "reverse"];
    let mut given = arguments("dictsort", args, &names)?.into_iter();
    let by_case = flag(given.next().flatten(), false);
    let by = given
        .next()
        .flatten()
        .map_or(Ok("key".to_owned()), |by| text(&by))?;
    let backwards = flag(given.next().flatten(), false);
    if by != "key" && by != "value" {
        return Err(wrong("dictsort is by \"key\" or \"value\""));
    }
    let pairs = pairs(value)?;
    let keys = pairs
        .iter()
        .map(|(k, v)| folded(if by == "key" { k } else { v }.clone(), by_case));
    let places = sorted_places(state, keys.collect(), backwards)?;
    let pair = |at: usize| tuple(vec![pairs[at].0.clone(), pairs[at].1.clone()]);
    Ok(list(places.into_iter().map(pair).collect()))
}

fn dict_items(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    arguments("items", args, &[])?;
    if value.is_undefined() {
        return Ok(Generator::of(Vec::new()));
    }
    let pairs = pairs(value)?.into_iter();
    Ok(Generator::of(
        pairs.map(|(key, value)| tuple(vec![key, value])).collect(),
    ))
}

fn unique(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("unique", args, &["case_sensitive", "attribute"])?.into_iter();
    let by_case = flag(given.next().flatten(), false);
    let path = some(&mut given)
        .map(|named| path(&named))
        .unwrap_or_default();
    let (mut seen, mut kept) = (Vec::new(), Vec::new());
    'items: for item in items(state, value)? {
        let key = folded(follow(&item, &path, None)?, by_case);
        super::python::check_key(&key)?;
        for other in &seen {
            if equal(state, other, &key)? {
                continue 'items;
            }
        }
        seen.push(key);
        kept.push(item);
    }
    Ok(Generator::of(kept))
}

fn extreme(state: &mut State, value: &Value, args: &[Value], wanted: Ordering) -> Made<Value> {
    let mut given = arguments("min or max", args, &["case_sensitive", "attribute"])?.into_iter();
    let by_case = flag(given.next().flatten(), false);
    let path = some(&mut given)
        .map(|named| path(&named))
        .unwrap_or_default();
    let mut best: Option<(Value, Value)> = None;
    for item in items(state, value)? {
        let key = folded(follow(&item, &path, None)?, by_case);
        let better = match &best {
            Some((other, _)) => order(state, &key, other)? == Some(wanted),
            None => true,
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map_or(Value::UNDEFINED, |(_, item)| item))
}

fn sum(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("sum", args, &["attribute", "start"])?.into_iter();
    let path = some(&mut given)
        .map(|named| path(&named))
        .unwrap_or_default();
    let mut total = given.next().flatten().unwrap_or(Value::from(0));
    if Kind::of(&total) == Kind::Text {
        return Err(wrong("sum of texts; join joins them"));
    }
    for item in items(state, value)? {
        total = add(state, &total, &follow(&item, &path, None)?)?;
    }
    Ok(total)
}

fn join(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("join", args, &["d", "attribute"])?.into_iter();
    let between = given.next().flatten().unwrap_or(Value::from(""));
    let path = some(&mut given)
        .map(|named| path(&named))
        .unwrap_or_default();
    let mut all = items(state, value)?;
    for item in &mut all {
        *item = follow(item, &path, None)?;
    }
    // A safe text among them has the rest escaped.
    let safe = escapes(state) && (between.is_safe() || all.iter().any(Value::is_safe));
    let written = |value: &Value| match safe {
        true => escaped_value(value),
        false => text(value),
    };
    let between = written(&between)?;
    let mut out = String::new();
    for (at, item) in all.iter().enumerate() {
        if at > 0 {
            out.push_str(&between);
        }
        let item = written(item)?;
        spend(state, between.len() + item.len())?;
        out.push_str(&item);
        check_size(&out)?;
    }
    Ok(match safe {
        true => Value::from_safe_string(out),
        false => Value::from(out),
    })
}

fn map(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let (plain, named) = split_arguments(args);
    let all = match Kind::of(value) {
        // As Jinja2, which maps nothing at all to nothing.
        Kind::None | Kind::Undefined => Vec::new(),
        _ => items(state, value)?,
    };
    let mut mapped = Vec::new();
    if let Some((filter, rest)) = plain.split_first() {
        let filter = needed_text("map", Some(filter.clone()))?;
        for item in all {
            let mut given = vec![item];
            given.extend_from_slice(rest);
            given.extend(args[plain.len()..].iter().cloned());
            mapped.push(state.apply_filter(&filter, &given)?);
        }
        return Ok(Generator::of(mapped));
    }
    let find = |name: &str| {
        named
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    };
    let Some(attribute) = find("attribute") else {
        return Err(wrong("map takes a filter or an attribute"));
    };
    if named
        .iter()
        .any(|(name, _)| name != "attribute" && name != "default")
    {
        return Err(wrong("map takes no further argument"));
    }
    let path = path(attribute);
    for item in all {
        mapped.push(follow(&item, &path, find("default"))?);
    }
    Ok(Generator::of(mapped))
}

/// `select`, `reject`, and those by an attribute.
fn select(
    state: &mut State,
    value: &Value,
    args: &[Value],
    by_attribute: bool,
    wanted: bool,
) -> Made<Value> {
    let (path, rest) = match args.split_first() {
        Some((named, rest)) if by_attribute => (path(named), rest),
        None if by_attribute => return Err(wrong("selectattr and rejectattr take an attribute")),
        _ => (Vec::new(), args),
    };
    let all = match Kind::of(value) {
        Kind::None | Kind::Undefined => Vec::new(),
        _ => items(state, value)?,
    };
    let mut kept = Vec::new();
    for item in all {
        let tested = follow(&item, &path, None)?;
        let holds = match rest.split_first() {
            None => is_true(&tested),
            Some((test, others)) => {
                let test = needed_text("select", Some(test.clone()))?;
                let mut given = vec![tested];
                given.extend_from_slice(others);
                state.perform_test(&test, &given)?
            }
        };
        if holds == wanted {
            kept.push(item);
        }
    }
    Ok(Generator::of(kept))
}

/// What `groupby` gives: a key, and the items that have it.
#[derive(Debug)]
pub(super) struct Group {
    key: Value,
    items: Value,
}

impl Drop for Group {
    fn drop(&mut self) {
        let_go([
            std::mem::take(&mut self.key),
            std::mem::take(&mut self.items),
        ]);
    }
}

impl Object for Group {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match (key.as_str(), key.as_usize()) {
            (Some("grouper"), _) | (_, Some(0)) => Some(self.key.clone()),
            (Some("list"), _) | (_, Some(1)) => Some(self.items.clone()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(2)
    }
}

fn groupby(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let names = ["attribute", "default", "case_sensitive"];
    let mut given = arguments("groupby", args, &names)?.into_iter();
    let path = path(&needed("groupby", given.next().flatten())?);
    let default = some(&mut given);
    let by_case = flag(given.next().flatten(), false);
    let all = items(state, value)?;
    let mut keys = Vec::new();
    for item in &all {
        keys.push(follow(item, &path, default.as_ref())?);
    }
    let folded: Vec<Value> = keys
        .iter()
        .map(|key| folded(key.clone(), by_case))
        .collect();
    let mut groups: Vec<(usize, Vec<Value>)> = Vec::new();
    for at in sorted_places(state, folded.clone(), false)? {
        match groups.last_mut() {
            Some((first, group)) if equal(state, &folded[*first], &folded[at])? => {
                group.push(all[at].clone())
            }
            _ => groups.push((at, vec![all[at].clone()])),
        }
    }
    let group = |(first, items): (usize, Vec<Value>)| {
        let (key, items) = (keys[first].clone(), list(items));
        Value::from_object(Group { key, items })
    };
    Ok(list(groups.into_iter().map(group).collect()))
}

fn batch(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("batch", args, &["linecount", "fill_with"])?.into_iter();
    let size = whole("batch", Some(needed("batch", given.next().flatten())?), 1)?;
    let fill = some(&mut given);
    let Some(size) = usize::try_from(size).ok().filter(|size| *size > 0) else {
        return Err(wrong("batch takes a number above 0"));
    };
    let all = items(state, value)?;
    let mut batches: Vec<Vec<Value>> = all.chunks(size).map(<[Value]>::to_vec).collect();
    if let (Some(last), Some(fill)) = (batches.last_mut(), fill) {
        spend(state, size.saturating_mul(48))?;
        last.resize(size, fill);
    }
    Ok(Generator::of(batches.into_iter().map(list).collect()))
}

fn slice(state: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let mut given = arguments("slice", args, &["slices", "fill_with"])?.into_iter();
    let count = whole("slice", Some(needed("slice", given.next().flatten())?), 1)?;
    let fill = some(&mut given);
    let Some(count) = usize::try_from(count).ok().filter(|count| *count > 0) else {
        return Err(wrong("slice takes a number above 0"));
    };
    let all = items(state, value)?;
    spend(state, count.saturating_mul(96))?;
    let (size, longer) = (all.len() / count, all.len() % count);
    let mut slices = Vec::new();
    let mut from = 0;
    for at in 0..count {
        let to = from + size + usize::from(at < longer);
        let mut part = all[from..to].to_vec();
        if let Some(fill) = fill.as_ref().filter(|_| at >= longer) {
            part.push(fill.clone());
        }
        slices.push(list(part));
        from = to;
    }
    Ok(Generator::of(slices))
}

/// `value | attr('name')`: an attribute, never an item.
fn attr(_: &mut State, value: &Value, args: &[Value]) -> Made<Value> {
    let name = needed_text("attr", arguments("attr", args, &["name"])?.pop().flatten())?;
    if let Some(found) = attribute_of_kind(value, &name) {
        return Ok(found);
    }
    match Kind::of(value) {
        Kind::Callable => attribute(value, &Value::from(name)),
        Kind::Namespace | Kind::Other | Kind::Undefined => attribute(value, &Value::from(name)),
        _ => Ok(Value::UNDEFINED),
    }
}
