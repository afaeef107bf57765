//! `tojson` as transformers has it: Python's `json.dumps`.

use std::fmt::Write;

use minijinja::{State, Value};

use super::python::{
    Kind, LARGEST, Made, arguments, flag, float, float_text, integer, items, pairs, text, wrong,
};

/// Lists within lists.
const DEEPEST: usize = 150;

struct Writer {
    out: String,
    ascii: bool,
    /// What a level is indented by.
    indent: Option<String>,
    between: String,
    after_key: String,
    sorted: bool,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
pub(super) fn to_json(state: &State, value: &Value, args: &[Value]) -> Made<String> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let mut given = arguments("tojson", args, &names)?.into_iter();
    let ascii = flag(given.next().flatten(), false);
    let indent = given.next().flatten().filter(|indent| !indent.is_none());
    let indent = indent.map(|indent| indent_of(&indent)).transpose()?;
    let separators = given
        .next()
        .flatten()
        .filter(|separators| !separators.is_none());
    let (between, after_key) = match separators {
        Some(given) => separators_of(state, &given)?,
        None => (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ),
    };
    let sorted = flag(given.next().flatten(), false);
    let out = String::new();
    let mut writer = Writer {
        out,
        ascii,
        indent,
        between,
        after_key,
        sorted,
    };
    writer.value(state, value, 0)?;
    Ok(writer.out)
}

fn indent_of(indent: &Value) -> Made<String> {
    if let Some(text) = indent.as_str() {
        return Ok(text.chars().take(64).collect());
    }
    let Some(spaces) = integer(indent) else {
        return Err(wrong("tojson is indented by a whole number or a text"));
    };
    match usize::try_from(spaces.max(0)) {
        Ok(spaces) if spaces <= 64 => Ok(" ".repeat(spaces)),
        _ => Err(wrong("tojson is indented by at most 64")),
    }
}

fn separators_of(state: &State, given: &Value) -> Made<(String, String)> {
    let both = items(state, given)?;
    match both.as_slice() {
        [between, after_key] => Ok((text(between)?, text(after_key)?)),
        _ => Err(wrong("tojson takes two separators")),
    }
}

impl Writer {
    fn value(&mut self, state: &State, value: &Value, depth: usize) -> Made<()> {
        if depth > DEEPEST {
            return Err(wrong("lists are too deep within each other for tojson"));
        }
        if self.out.len() > LARGEST {
            return Err(wrong("a text is too large"));
        }
        state.consume_fuel(1)?;
        match Kind::of(value) {
            Kind::None => self.out.push_str("null"),
            Kind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            Kind::Integer => self.out.push_str(&value.to_string()),
            Kind::Float => self
                .out
                .push_str(&json_float(float(value).unwrap_or(f64::NAN))),
            Kind::Text => self.text(value.as_str().unwrap_or_default()),
            Kind::List | Kind::Tuple => {
                let items = value.try_iter()?;
                self.out.push('[');
                let mut empty = true;
                for item in items {
                    self.next(empty, depth);
                    empty = false;
                    self.value(state, &item, depth + 1)?;
                }
                self.close(empty, depth, ']');
            }
            Kind::Dict => {
                let mut pairs = pairs(value)?;
                if self.sorted {
                    sort_pairs(state, &mut pairs)?;
                }
                self.out.push('{');
                let empty = pairs.is_empty();
                for (at, (key, value)) in pairs.into_iter().enumerate() {
                    self.next(at == 0, depth);
                    let key = json_key(&key)?;
                    self.text(&key);
                    self.out.push_str(&self.after_key);
                    self.value(state, &value, depth + 1)?;
                }
                self.close(empty, depth, '}');
            }
            kind => return Err(wrong(format!("a {} is no JSON", kind.name()))),
        }
        Ok(())
    }

    fn next(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.between);
        }
        self.line(depth + 1);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            let _ = match c {
                '"' => write!(self.out, "\\\""),
                '\\' => write!(self.out, "\\\\"),
                '\n' => write!(self.out, "\\n"),
                '\r' => write!(self.out, "\\r"),
                '\t' => write!(self.out, "\\t"),
                '\x08' => write!(self.out, "\\b"),
                '\x0c' => write!(self.out, "\\f"),
                c if c < ' ' => write!(self.out, "\\u{:04x}", c as u32),
                c if self.ascii && !(' '..='~').contains(&c) => {
                    let mut units = [0; 2];
                    let mut units = c.encode_utf16(&mut units).iter();
                    units.try_for_each(|unit| write!(self.out, "\\u{unit:04x}"))
                }
                c => write!(self.out, "{c}"),
            };
        }
        self.out.push('"');
    }
}

fn json_float(value: f64) -> String {
    match value {
        _ if value.is_nan() => "NaN".to_owned(),
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        _ => float_text(value),
    }
}

/// A key is a text, and numbers and the like are made one.
fn json_key(key: &Value) -> Made<String> {
    match Kind::of(key) {
        Kind::Text => text(key),
        Kind::Integer => Ok(key.to_string()),
        Kind::Float => Ok(json_float(float(key).unwrap_or(f64::NAN))),
        Kind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        Kind::None => Ok("null".to_owned()),
        kind => Err(wrong(format!("a {} is no key in JSON", kind.name()))),
    }
}

fn sort_pairs(state: &State, pairs: &mut Vec<(Value, Value)>) -> Made<()> {
    let keys = pairs.iter().map(|(key, _)| key.clone()).collect();
    let order = super::filters::sorted_places(state, keys, false)?;
    *pairs = order.into_iter().map(|at| pairs[at].clone()).collect();
    Ok(())
}
