//! Python's two ways to put values into a text: `'%s' % value` and `'{}'.format(value)`.

use std::iter::Peekable;
use std::str::Chars;

use minijinja::{State, Value};

use super::filters::{parse_float, parse_int};
use super::markup::{escaped, escaped_value};
use super::methods::attribute_of_kind;
use super::python::{
    Kind, LARGEST, Made, attribute, float, integer, items, like, repr, spend, text, wrong,
};

/// How a value is written.
#[derive(Debug, Clone)]
struct Spec {
    fill: char,
    /// `<`, `>`, `^`, or `=`: between sign and digits.
    align: Option<char>,
    /// `-`, `+` or a space.
    sign: char,
    alternate: bool,
    /// Whether zeros stand before a number.
    zero: bool,
    width: usize,
    /// Between groups of digits.
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            fill: ' ',
            align: None,
            sign: '-',
            alternate: false,
            zero: false,
            width: 0,
            grouping: None,
            precision: None,
            kind: None,
        }
    }
}

/// Most digits behind the point.
const MOST_DIGITS: usize = 1000;

impl Spec {
    /// Fills up to the width; `sign` is what stands before digits.
    fn padded(&self, state: &State, sign: &str, body: &str, default: char) -> Made<String> {
        let length = sign.chars().count() + body.chars().count();
        let missing = self.width.saturating_sub(length);
        spend(state, length + missing.saturating_mul(self.fill.len_utf8()))?;
        let fill = |count: usize| self.fill.to_string().repeat(count);
        let default = if self.zero && default == '>' {
            '='
        } else {
            default
        };
        Ok(match self.align.unwrap_or(default) {
            '<' => format!("{sign}{body}{}", fill(missing)),
            '^' => format!(
                "{}{sign}{body}{}",
                fill(missing / 2),
                fill(missing - missing / 2)
            ),
            '=' => format!("{sign}{}{body}", fill(missing)),
            _ => format!("{}{sign}{body}", fill(missing)),
        })
    }

    /// What stands before a number.
    fn sign_of(&self, negative: bool) -> &'static str {
        match (negative, self.sign) {
            (true, _) => "-",
            (_, '+') => "+",
            (_, ' ') => " ",
            _ => "",
        }
    }

    /// Digits in groups; `sign` is what stands before them. Zeros that fill up a number are digits too.
    fn grouped(&self, state: &State, sign: &str, digits: &str, size: usize) -> Made<String> {
        let Some(separator) = self.grouping else {
            return Ok(digits.to_owned());
        };
        let whole = digits
            .find(|c: char| !c.is_digit(if size == 3 { 10 } else { 16 }))
            .unwrap_or(digits.len());
        let (whole, rest) = digits.split_at(whole);
        let fills = self.fill == '0' && self.align.map_or(self.zero, |align| align == '=');
        let room = match fills {
            true => self.width.saturating_sub(sign.len() + rest.len()),
            false => 0,
        };
        spend(state, room)?;
        let mut count = whole.len();
        while count + (count.saturating_sub(1)) / size < room {
            count += 1;
        }
        let zeros = "0".repeat(count - whole.len());
        let mut out = String::new();
        for (at, digit) in zeros.chars().chain(whole.chars()).enumerate() {
            if at > 0 && (count - at).is_multiple_of(size) {
                out.push(separator);
            }
            out.push(digit);
        }
        Ok(out + rest)
    }
}

/// Digits of a positive number with an exponent or without, as C's `e`, `f` and `g` have them.
fn float_digits(value: f64, kind: char, precision: usize, alternate: bool) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "nan" } else { "inf" }.to_owned();
    }
    let scientific = |precision: usize| {
        let text = format!("{value:.precision$e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        (digits.to_owned(), exponent.parse::<i32>().unwrap_or(0))
    };
    let with_exponent = |digits: &str, exponent: i32| {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    };
    let point = |digits: String| {
        if alternate && !digits.contains('.') {
            digits + "."
        } else {
            digits
        }
    };
    let short = |digits: String| match digits.contains('.') && !alternate {
        true => digits
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
        false => digits,
    };
    match kind {
        'f' => point(format!("{value:.precision$}")),
        'e' => {
            let (digits, exponent) = scientific(precision);
            with_exponent(&point(digits), exponent)
        }
        // `r`: as `g`, of a number that is to be seen to be a fraction.
        _ => {
            let precision = precision.max(1);
            let (digits, exponent) = scientific(precision - 1);
            let most = precision as i32 - i32::from(kind == 'r');
            if (-4..most).contains(&exponent) {
                let places = (precision as i32 - 1 - exponent).max(0) as usize;
                let plain = short(format!("{value:.places$}"));
                let whole = kind == 'r' && !plain.contains('.');
                return if whole { plain + ".0" } else { plain };
            }
            with_exponent(&short(digits), exponent)
        }
    }
}

fn float_value(state: &State, value: f64, spec: &Spec) -> Made<String> {
    let kind = spec.kind.unwrap_or('r');
    let precision = spec.precision.unwrap_or(6);
    if precision > MOST_DIGITS {
        return Err(wrong(format!(
            "more than {MOST_DIGITS} digits are not taken"
        )));
    }
    let size = value.abs();
    let lower = kind.to_ascii_lowercase();
    let mut digits = match lower {
        'r' if spec.precision.is_none() => super::python::float_text(size),
        '%' => float_digits(size * 100.0, 'f', precision, spec.alternate) + "%",
        'n' => float_digits(size, 'g', precision, spec.alternate),
        'e' | 'f' | 'g' | 'r' => float_digits(size, lower, precision, spec.alternate),
        _ => return Err(wrong(format!("a fraction has no format {kind:?}"))),
    };
    if kind.is_ascii_uppercase() {
        digits = digits.to_uppercase();
    }
    let sign = spec.sign_of(value.is_sign_negative() && !value.is_nan());
    let digits = spec.grouped(state, sign, &digits, 3)?;
    spec.padded(state, sign, &digits, '>')
}

fn integer_value(state: &State, value: i128, spec: &Spec) -> Made<String> {
    let kind = spec.kind.unwrap_or('d');
    let size = value.unsigned_abs();
    let (prefix, digits) = match kind {
        'b' => ("0b", format!("{size:b}")),
        'o' => ("0o", format!("{size:o}")),
        'x' => ("0x", format!("{size:x}")),
        'X' => ("0X", format!("{size:X}")),
        'd' | 'n' => ("", size.to_string()),
        'c' => {
            let c = u32::try_from(value).ok().and_then(char::from_u32);
            let c = c.ok_or_else(|| wrong("no character has this number"))?;
            return spec.padded(state, "", &c.to_string(), '<');
        }
        _ => return Err(wrong(format!("a whole number has no format {kind:?}"))),
    };
    if spec.precision.is_some() {
        return Err(wrong("a whole number has no precision"));
    }
    let decimal = prefix.is_empty();
    let prefix = if spec.alternate { prefix } else { "" };
    let sign = format!("{}{prefix}", spec.sign_of(value < 0));
    let digits = spec.grouped(state, &sign, &digits, if decimal { 3 } else { 4 })?;
    spec.padded(state, &sign, &digits, '>')
}

// `{}`

/// `template.format(…)`; into a safe template, values are put escaped.
pub(super) fn braces(
    state: &State,
    template: &str,
    safe: bool,
    plain: &[Value],
    named: &[(String, Value)],
) -> Made<String> {
    let mut fields = Fields {
        state,
        safe,
        plain,
        named,
        next: Some(0),
    };
    fields.fill(template, 2)
}

struct Fields<'v, 's> {
    state: &'v State<'s, 's>,
    safe: bool,
    plain: &'v [Value],
    named: &'v [(String, Value)],
    /// Number of the next field that names none; `None` where fields name theirs.
    next: Option<usize>,
}

impl Fields<'_, '_> {
    fn fill(&mut self, template: &str, levels: usize) -> Made<String> {
        if levels == 0 {
            return Err(wrong("a format's fields are too deep within each other"));
        }
        let mut out = String::new();
        let mut rest = template;
        while let Some(at) = rest.find(['{', '}']) {
            out.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                out.push_str(brace);
                rest = after;
                continue;
            }
            if brace == "}" {
                return Err(wrong("a single \"}\" in a format"));
            }
            // The field ends with the brace that fits.
            let mut depth = 1;
            let end = rest.char_indices().find(|(_, c)| {
                depth += i32::from(*c == '{') - i32::from(*c == '}');
                depth == 0
            });
            let Some((end, _)) = end else {
                return Err(wrong("a single \"{\" in a format"));
            };
            out.push_str(&self.field(&rest[..end], levels)?);
            rest = &rest[end + 1..];
            spend(self.state, out.len().min(LARGEST) / 16)?;
            if out.len() > LARGEST {
                return Err(wrong("a text is too large"));
            }
        }
        out.push_str(rest);
        Ok(out)
    }

    fn field(&mut self, field: &str, levels: usize) -> Made<String> {
        // A name may have brackets with anything in them.
        let mut bracket = false;
        let end = field.find(|c| {
            bracket = (bracket || c == '[') && c != ']';
            !bracket && matches!(c, '!' | ':')
        });
        let (name, rest) = field.split_at(end.unwrap_or(field.len()));
        let (conversion, spec) = match rest.strip_prefix('!') {
            Some(rest) => {
                let (conversion, spec) = rest.split_once(':').unwrap_or((rest, ""));
                (Some(conversion), spec)
            }
            None => (None, rest.strip_prefix(':').unwrap_or("")),
        };
        let value = self.named_value(name)?;
        let spec = match spec.contains(['{', '}']) {
            true => self.fill(spec, levels - 1)?,
            false => spec.to_owned(),
        };
        let value = match conversion {
            None => value,
            Some("s") => Value::from(text(&value)?),
            Some("r") => Value::from(repr(&value)?),
            Some("a") => Value::from(ascii(&repr(&value)?)),
            Some(_) => return Err(wrong("an unknown conversion in a format")),
        };
        if self.safe && value.is_safe() {
            return match spec.is_empty() {
                true => text(&value),
                false => Err(wrong("a safe text in a safe one has no format")),
            };
        }
        let made = format_value(self.state, &value, &spec)?;
        Ok(if self.safe { escaped(&made) } else { made })
    }

    fn named_value(&mut self, name: &str) -> Made<Value> {
        let end = name.find(['.', '[']).unwrap_or(name.len());
        let (first, mut rest) = name.split_at(end);
        let place = match first {
            "" => {
                let place = self
                    .next
                    .ok_or_else(|| wrong("a format numbers some fields, and others not"))?;
                self.next = Some(place + 1);
                Some(place)
            }
            digits if digits.bytes().all(|b| b.is_ascii_digit()) => {
                if self.next.is_some_and(|next| next > 0) {
                    return Err(wrong("a format numbers some fields, and others not"));
                }
                self.next = None;
                digits.parse().ok()
            }
            _ => None,
        };
        let mut value = match place {
            Some(place) => self.plain.get(place),
            None => self
                .named
                .iter()
                .find(|(name, _)| name == first)
                .map(|(_, value)| value),
        };
        let mut value = value
            .take()
            .cloned()
            .ok_or_else(|| wrong("a format lacks a value"))?;
        while !rest.is_empty() {
            let key = if let Some(attribute) = rest.strip_prefix('.') {
                let end = attribute.find(['.', '[']).unwrap_or(attribute.len());
                rest = &attribute[end..];
                if let Some(found) = attribute_of_kind(&value, &attribute[..end]) {
                    value = found;
                    continue;
                }
                &attribute[..end]
            } else {
                let inside = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'));
                let (inside, after) = inside.ok_or_else(|| wrong("a format's field is unfit"))?;
                rest = after;
                inside
            };
            let key = match key.parse::<u32>() {
                Ok(place) => Value::from(place),
                Err(_) => Value::from(key),
            };
            value = attribute(&value, &key)?;
        }
        Ok(value)
    }
}

/// `format(value, spec)`
fn format_value(state: &State, value: &Value, spec: &str) -> Made<String> {
    if spec.is_empty() {
        return text(value);
    }
    let spec = parse_spec(spec)?;
    match (Kind::of(value), spec.kind) {
        (Kind::Text, None | Some('s')) => {
            if spec.sign != '-'
                || spec.alternate
                || spec.grouping.is_some()
                || spec.align == Some('=')
            {
                return Err(wrong("a text has no such format"));
            }
            let text = text(value)?;
            let most = spec.precision.unwrap_or(usize::MAX);
            let text: String = text.chars().take(most).collect();
            spec.padded(state, "", &text, '<')
        }
        (Kind::Integer | Kind::Bool, kind) => match (integer(value), float(value)) {
            (_, Some(value)) if kind.is_some_and(|kind| "eEfFgG%".contains(kind)) => {
                float_value(state, value, &spec)
            }
            (Some(value), _) => integer_value(state, value, &spec),
            _ => Err(wrong("a number is too large")),
        },
        (Kind::Float, _) => float_value(state, float(value).unwrap_or(f64::NAN), &spec),
        (kind, _) => Err(wrong(format!("a {} has no such format", kind.name()))),
    }
}

fn parse_spec(text: &str) -> Made<Spec> {
    let mut spec = Spec::default();
    let characters: Vec<char> = text.chars().collect();
    let is_align = |at: usize| characters.get(at).is_some_and(|c| "<>=^".contains(*c));
    let mut at = 0;
    let mut filled = false;
    if is_align(1) {
        (spec.fill, spec.align) = (characters[0], Some(characters[1]));
        (at, filled) = (2, true);
    } else if is_align(0) {
        spec.align = Some(characters[0]);
        at = 1;
    }
    let rest: String = characters[at..].iter().collect();
    let mut rest = rest.chars().peekable();
    if let Some(sign) = rest.next_if(|c| "+- ".contains(*c)) {
        spec.sign = sign;
    }
    spec.alternate = rest.next_if_eq(&'#').is_some();
    if rest.next_if_eq(&'0').is_some() {
        spec.zero = true;
        if !filled {
            spec.fill = '0';
        }
    }
    spec.width = number(&mut rest)?.unwrap_or(0);
    spec.grouping = rest.next_if(|c| ",_".contains(*c));
    if rest.next_if_eq(&'.').is_some() {
        let precision = number(&mut rest)?;
        spec.precision = Some(precision.ok_or_else(|| wrong("a format lacks its precision"))?);
    }
    spec.kind = rest.next();
    if rest.next().is_some() {
        return Err(wrong("a format is unfit"));
    }
    Ok(spec)
}

fn number(rest: &mut Peekable<Chars>) -> Made<Option<usize>> {
    let mut digits = String::new();
    while let Some(digit) = rest.next_if(char::is_ascii_digit) {
        digits.push(digit);
    }
    if digits.is_empty() {
        return Ok(None);
    }
    let number = digits.parse().ok().filter(|number| *number <= LARGEST);
    number
        .map(Some)
        .ok_or_else(|| wrong("a format is too wide"))
}

/// `ascii`: what is not ASCII is escaped.
pub(super) fn ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c as u32 {
            code @ 0..0x80 => out.push(char::from(code as u8)),
            code @ 0x80..0x100 => out.push_str(&format!("\\x{code:02x}")),
            code @ 0x100..0x10000 => out.push_str(&format!("\\u{code:04x}")),
            code => out.push_str(&format!("\\U{code:08x}")),
        }
    }
    out
}

// `%`

/// `template % values`: a safe text where the template is one, into which values are put escaped.
pub(super) fn percent(state: &State, template: &Value, values: &Value) -> Made<Value> {
    let made = percent_text(state, &text(template)?, template.is_safe(), values)?;
    Ok(like(template, made))
}

fn percent_text(state: &State, template: &str, safe: bool, values: &Value) -> Made<String> {
    let kind = Kind::of(values);
    let mut given = match kind {
        Kind::Tuple => items(state, values)?,
        _ => vec![values.clone()],
    }
    .into_iter();
    let lacking = || wrong("a format lacks a value");
    let mut named = false;
    let mut out = String::new();
    let mut rest = template.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        if rest.next_if_eq(&'%').is_some() {
            out.push('%');
            continue;
        }
        let key = match rest.next_if_eq(&'(') {
            Some(_) => Some(key_of(&mut rest)?),
            None => None,
        };
        let mut spec = Spec::default();
        let (mut left, mut zero) = (false, false);
        while let Some(flag) = rest.next_if(|c| "#0- +".contains(*c)) {
            match flag {
                '#' => spec.alternate = true,
                '0' => zero = true,
                '-' => left = true,
                '+' => spec.sign = '+',
                _ if spec.sign == '-' => spec.sign = ' ',
                _ => {}
            }
        }
        let mut starred = |rest: &mut Peekable<Chars>| -> Made<Option<i64>> {
            if rest.next_if_eq(&'*').is_none() {
                return Ok(number(rest)?.map(|number| number as i64));
            }
            let value = given.next().ok_or_else(lacking)?;
            if safe {
                return Err(wrong("a safe format's width is written out"));
            }
            let number = integer(&value).and_then(|number| i64::try_from(number).ok());
            let number = number.filter(|number| number.unsigned_abs() <= LARGEST as u64);
            number
                .map(Some)
                .ok_or_else(|| wrong("a format's width is no fit number"))
        };
        let width = starred(&mut rest)?.unwrap_or(0);
        left |= width < 0;
        spec.width = width.unsigned_abs() as usize;
        if rest.next_if_eq(&'.').is_some() {
            let precision = starred(&mut rest)?.unwrap_or(0);
            spec.precision = Some(usize::try_from(precision).unwrap_or(0));
        }
        while rest.next_if(|c| "hlL".contains(*c)).is_some() {}
        let conversion = rest
            .next()
            .ok_or_else(|| wrong("a format ends within a field"))?;
        let value = match key {
            Some(key) if kind == Kind::Dict => {
                named = true;
                let found = attribute(values, &Value::from(key))?;
                Some(found)
                    .filter(|found| !found.is_undefined())
                    .ok_or_else(lacking)?
            }
            Some(_) => return Err(wrong("a format with names takes a dict")),
            None => given.next().ok_or_else(lacking)?,
        };
        let (value, conversion) = match safe {
            true => wrapped(&value, conversion)?,
            false => (value, conversion),
        };
        out.push_str(&converted(state, &value, conversion, spec, left, zero)?);
        if out.len() > LARGEST {
            return Err(wrong("a text is too large"));
        }
    }
    // Python lets what could be indexed go unused.
    let indexable = matches!(
        kind,
        Kind::Dict | Kind::List | Kind::Range | Kind::Bytes | Kind::Undefined
    );
    if given.next().is_some() && !named && !indexable {
        return Err(wrong("a format leaves values over"));
    }
    Ok(out)
}

/// What markupsafe wraps a value in that is put into a safe text: it is escaped as a text, and read as a number.
fn wrapped(value: &Value, conversion: char) -> Made<(Value, char)> {
    let made = match (conversion, value.as_str()) {
        ('s', _) => Value::from(escaped_value(value)?),
        ('r', _) => Value::from(escaped(&repr(value)?)),
        ('a', _) => Value::from(ascii(&escaped(&repr(value)?))),
        ('d' | 'i' | 'u', Some(text)) => parse_int(text, 10)?.map_or(Value::UNDEFINED, Value::from),
        ('e' | 'E' | 'f' | 'F' | 'g' | 'G', Some(text)) => {
            parse_float(text).map_or(Value::UNDEFINED, Value::from)
        }
        ('d' | 'i' | 'u' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G', None) => value.clone(),
        _ => return Err(wrong(format!("%{conversion} is not for a safe text"))),
    };
    let is_text = matches!(conversion, 'r' | 'a');
    Ok((made, if is_text { 's' } else { conversion }))
}

fn key_of(rest: &mut Peekable<Chars>) -> Made<String> {
    let mut key = String::new();
    let mut depth = 1;
    for c in rest.by_ref() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth == 0 {
            return Ok(key);
        }
        key.push(c);
    }
    Err(wrong("a format's name has no end"))
}

fn converted(
    state: &State,
    value: &Value,
    conversion: char,
    mut spec: Spec,
    left: bool,
    zero: bool,
) -> Made<String> {
    spec.align = left.then_some('<');
    let is_text = "sracR".contains(conversion);
    if zero && !left && !is_text {
        (spec.fill, spec.align) = ('0', Some('='));
    }
    let whole = || -> Made<i128> {
        let number = match Kind::of(value) {
            Kind::Float => float(value)
                .filter(|v| v.is_finite() && v.abs() < 1e38)
                .map(|v| v as i128),
            _ => integer(value),
        };
        number.ok_or_else(|| {
            wrong(format!(
                "%{conversion} takes a number, not {}",
                Kind::of(value).name()
            ))
        })
    };
    let unsigned = Spec {
        sign: '-',
        ..spec.clone()
    };
    match conversion {
        's' | 'r' | 'a' => {
            let text = match conversion {
                's' => text(value)?,
                'r' => repr(value)?,
                _ => ascii(&repr(value)?),
            };
            let most = spec.precision.unwrap_or(usize::MAX);
            unsigned.padded(state, "", &text.chars().take(most).collect::<String>(), '>')
        }
        'c' => {
            let c = match (value.as_str(), integer(value)) {
                (Some(text), _) if text.chars().count() == 1 => Some(text.to_owned()),
                (None, Some(code)) => {
                    let c = u32::try_from(code).ok().and_then(char::from_u32);
                    c.map(String::from)
                }
                _ => None,
            };
            unsigned.padded(
                state,
                "",
                &c.ok_or_else(|| wrong("%c takes a character"))?,
                '>',
            )
        }
        'd' | 'i' | 'u' | 'o' | 'x' | 'X' => {
            let number = match conversion {
                'o' | 'x' | 'X' => {
                    integer(value).ok_or_else(|| wrong("that format takes a whole number"))?
                }
                _ => whole()?,
            };
            let size = number.unsigned_abs();
            let (prefix, mut digits) = match conversion {
                'o' => ("0o", format!("{size:o}")),
                'x' => ("0x", format!("{size:x}")),
                'X' => ("0X", format!("{size:X}")),
                _ => ("", size.to_string()),
            };
            if let Some(precision) = spec.precision {
                spend(state, precision)?;
                digits = format!(
                    "{}{digits}",
                    "0".repeat(precision.saturating_sub(digits.len()))
                );
            }
            let prefix = if spec.alternate { prefix } else { "" };
            let sign = format!("{}{prefix}", spec.sign_of(number < 0));
            spec.padded(state, &sign, &digits, '>')
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let number =
                float(value).ok_or_else(|| wrong(format!("%{conversion} takes a number")))?;
            spec.kind = Some(conversion);
            float_value(state, number, &spec)
        }
        _ => Err(wrong("a format has a field of an unknown kind")),
    }
}
