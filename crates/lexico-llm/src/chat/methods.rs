//! Python's methods of texts, dicts, lists and numbers. Those that would change a list or a dict are refused, as
//! transformers' sandbox refuses them.

use minijinja::{Error, ErrorKind, State, Value};
use unicode_general_category::{GeneralCategory, get_general_category};

use super::format;
use super::operators::fresh;
use super::python::{
    Bytes, Kind, Made, Method, View, arguments, bytes, check_key, check_size, equal, flag, float,
    integer, is_printable, is_space, items, list, needed, needed_text, pairs, spend,
    split_arguments, tuple, whole, wrong,
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
/// Methods that change a dict.
const DICT_CHANGES: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const LIST: [&str; 11] = [
    "append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse",
    "sort",
];
const TUPLE: [&str; 2] = ["count", "index"];
const NUMBER: [&str; 8] = [
    "as_integer_ratio",
    "bit_count",
    "bit_length",
    "conjugate",
    "from_bytes",
    "hex",
    "is_integer",
    "to_bytes",
];

const BYTES: [&str; 39] = [
    "capitalize",
    "center",
    "count",
    "decode",
    "endswith",
    "expandtabs",
    "find",
    "hex",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdigit",
    "islower",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
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
    "upper",
    "zfill",
];
/// Attributes of numbers.
const NUMBER_ATTRIBUTES: [&str; 4] = ["denominator", "imag", "numerator", "real"];

/// What Python's dicts keep to themselves.
const DICT_PRIVATE: [&str; 35] = [
    "__class__",
    "__class_getitem__",
    "__contains__",
    "__delattr__",
    "__delitem__",
    "__dir__",
    "__doc__",
    "__eq__",
    "__format__",
    "__ge__",
    "__getattribute__",
    "__getitem__",
    "__getstate__",
    "__gt__",
    "__hash__",
    "__init__",
    "__init_subclass__",
    "__ior__",
    "__iter__",
    "__le__",
    "__len__",
    "__lt__",
    "__ne__",
    "__new__",
    "__or__",
    "__reduce__",
    "__reduce_ex__",
    "__repr__",
    "__reversed__",
    "__ror__",
    "__setattr__",
    "__setitem__",
    "__sizeof__",
    "__str__",
    "__subclasshook__",
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
    let all = [
        &TEXT[..],
        &DICT,
        &LIST,
        &TUPLE,
        &NUMBER,
        &NUMBER_ATTRIBUTES,
        &BYTES,
        &MACRO,
    ];
    all.iter().any(|names| names.contains(&name))
}

/// Whether a value has a method of this name.
fn has_method(value: &Value, name: &str) -> bool {
    let names = match Kind::of(value) {
        Kind::Text => &TEXT[..],
        Kind::Bytes => &BYTES,
        Kind::Dict => &DICT,
        Kind::List => &LIST,
        Kind::Tuple | Kind::Range => &TUPLE,
        Kind::Bool | Kind::Integer | Kind::Float => &NUMBER,
        _ => return false,
    };
    names.contains(&name)
}

/// What an attribute is to all values of a kind, before a dict's items: a method, or what a sandbox keeps back.
pub(super) fn attribute_of_kind(value: &Value, name: &str) -> Option<Value> {
    let kind = Kind::of(value);
    let kept_back = match kind {
        Kind::List => name != "copy" && LIST.contains(&name) && !TUPLE.contains(&name),
        Kind::Dict => DICT_CHANGES.contains(&name) || DICT_PRIVATE.contains(&name),
        Kind::Undefined => name == "__class__",
        _ => false,
    };
    if kept_back {
        return Some(Value::UNDEFINED);
    }
    if has_method(value, name) {
        let (of, name) = (value.clone(), name.to_owned());
        return Some(Value::from_object(Method { of, name }));
    }
    number_attribute(value, name)
}

/// Calls a method of a value that is no object of its own kind.
pub(super) fn call(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Made<Value> {
    match (Kind::of(value), value.as_str()) {
        (Kind::Text, Some(text)) if value.is_safe() => safe_text_method(state, text, name, args),
        (Kind::Text, Some(text)) => text_method(state, text, name, args),
        (Kind::Dict, _) => dict_method(state, value, name, args),
        (Kind::List | Kind::Tuple | Kind::Range, _) => list_method(state, value, name, args),
        (Kind::Bool | Kind::Integer | Kind::Float, _) => number_method(value, name, args),
        (Kind::Bytes, _) => bytes_method(state, bytes(value), name, args),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn none_of(name: &str, args: &[Value]) -> Made<()> {
    arguments(name, args, &[]).map(drop)
}

/// A method of a safe text: what it makes of it is safe too, what is put into it is escaped.
fn safe_text_method(state: &State, text: &str, name: &str, args: &[Value]) -> Made<Value> {
    let safe = |value: &Value| match value.as_str() {
        Some(text) => Value::from_safe_string(text.to_owned()),
        None => value.clone(),
    };
    // Which argument is escaped.
    let put_in = match name {
        "replace" | "center" | "ljust" | "rjust" => Some(1),
        "join" => {
            let joined = needed(name, arguments(name, args, &["iterable"])?.pop().flatten())?;
            let escaped = |item: &Value| super::markup::escaped_value(item).map(Value::from);
            let joined = items(state, &joined)?
                .iter()
                .map(escaped)
                .collect::<Made<_>>()?;
            return Ok(safe(&text_method(state, text, name, &[list(joined)])?));
        }
        "format" => {
            let (plain, named) = split_arguments(args);
            let made = format::braces(state, text, true, plain, &named)?;
            return Ok(Value::from_safe_string(made));
        }
        "format_map" => {
            let made = format::braces(state, text, true, &[], &mapping(args)?)?;
            return Ok(Value::from_safe_string(made));
        }
        "unescape" | "striptags" => {
            none_of(name, args)?;
            return Ok(Value::from(match name {
                "striptags" => super::markup::stripped_of_tags(text),
                _ => super::markup::unescaped(text),
            }));
        }
        _ => None,
    };
    let mut given = args.to_vec();
    if let Some(put_in) = put_in
        .and_then(|at| given.get_mut(at))
        .filter(|value| value.as_str().is_some())
    {
        *put_in = Value::from(super::markup::escaped_value(put_in)?);
    }
    let made = text_method(state, text, name, &given)?;
    match Kind::of(&made) {
        Kind::List => Ok(list(items(state, &made)?.iter().map(safe).collect())),
        Kind::Tuple => Ok(tuple(items(state, &made)?.iter().map(safe).collect())),
        _ => Ok(safe(&made)),
    }
}

fn number_method(value: &Value, name: &str, args: &[Value]) -> Made<Value> {
    match (name, integer(value)) {
        ("to_bytes", Some(number)) => return to_bytes(number, args),
        ("from_bytes", Some(_)) => return from_bytes(args),
        _ => none_of(name, args)?,
    }
    match (name, integer(value), float(value)) {
        ("bit_length", Some(number), _) => {
            Ok(Value::from(128 - number.unsigned_abs().leading_zeros()))
        }
        ("bit_count", Some(number), _) => Ok(Value::from(number.unsigned_abs().count_ones())),
        ("as_integer_ratio", Some(number), _) => {
            Ok(tuple(vec![Value::from(number), Value::from(1)]))
        }
        ("as_integer_ratio", None, Some(number)) => integer_ratio(number),
        ("is_integer", None, Some(number)) => Ok(Value::from(number.fract() == 0.0)),
        ("hex", None, Some(number)) => Ok(Value::from(hexadecimal(number))),
        ("conjugate", Some(number), _) => Ok(Value::from(number)),
        ("conjugate", ..) => Ok(value.clone()),
        _ if NUMBER.contains(&name) => Err(wrong(format!("{name}() of this number is not taken"))),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// `real` and the like; `None` where the value has no such attribute.
fn number_attribute(value: &Value, name: &str) -> Option<Value> {
    match (name, integer(value), float(value)) {
        ("real" | "numerator", Some(number), _) => Some(Value::from(number)),
        ("imag", Some(_), _) => Some(Value::from(0)),
        ("denominator", Some(_), _) => Some(Value::from(1)),
        ("real", None, Some(number)) => Some(Value::from(number)),
        ("imag", None, Some(_)) => Some(Value::from(0.0)),
        _ => None,
    }
}

/// `float.as_integer_ratio`
fn integer_ratio(number: f64) -> Made<Value> {
    let large = || wrong("a number is too large");
    if !number.is_finite() {
        return Err(wrong("what is infinite or no number is no ratio"));
    }
    let (mut above, mut below) = (number, 1i128);
    while above.fract() != 0.0 {
        above *= 2.0;
        below = below.checked_mul(2).ok_or_else(large)?;
    }
    if above.abs() >= 1e38 {
        return Err(large());
    }
    Ok(tuple(vec![Value::from(above as i128), Value::from(below)]))
}

/// `float.hex`
fn hexadecimal(number: f64) -> String {
    if !number.is_finite() {
        return super::python::float_text(number);
    }
    let sign = if number.is_sign_negative() { "-" } else { "" };
    let bits = number.to_bits();
    let (exponent, digits) = ((bits >> 52 & 0x7ff) as i64, bits & ((1 << 52) - 1));
    match (exponent, digits) {
        (0, 0) => format!("{sign}0x0.0p+0"),
        (0, _) => format!("{sign}0x0.{digits:013x}p-1022"),
        _ => format!("{sign}0x1.{digits:013x}p{:+}", exponent - 1023),
    }
}

/// Ways to write text as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Ascii,
    Latin1,
    Utf8 {
        marked: bool,
    },
    /// Units of two or four bytes; which end comes first, or a mark that tells.
    Wide {
        four: bool,
        big: Option<bool>,
    },
}

impl Encoding {
    /// By Python's names, which take any sign between letters for an underscore.
    fn of(name: &str) -> Option<Self> {
        let name: String = name
            .chars()
            .map(|c| match c.is_ascii_alphanumeric() || c == '.' {
                true => c.to_ascii_lowercase(),
                false => '_',
            })
            .collect();
        let wide = |four, big| Some(Self::Wide { four, big });
        match name.as_str() {
            "utf_8" | "utf8" | "u8" | "utf" | "cp65001" => Some(Self::Utf8 { marked: false }),
            "utf_8_sig" => Some(Self::Utf8 { marked: true }),
            "ascii" | "us_ascii" | "646" | "us" => Some(Self::Ascii),
            "latin_1" | "latin1" | "iso_8859_1" | "iso8859_1" | "iso8859" | "8859" | "cp819"
            | "latin" | "l1" => Some(Self::Latin1),
            "utf_16" | "utf16" | "u16" => wide(false, None),
            "utf_16_le" | "utf_16le" => wide(false, Some(false)),
            "utf_16_be" | "utf_16be" => wide(false, Some(true)),
            "utf_32" | "utf32" | "u32" => wide(true, None),
            "utf_32_le" | "utf_32le" => wide(true, Some(false)),
            "utf_32_be" | "utf_32be" => wide(true, Some(true)),
            _ => None,
        }
    }
}

/// The encoding that `encode` and `decode` are given, and what becomes of what does not fit.
fn encoding(name: &str, args: &[Value]) -> Made<(Encoding, String)> {
    let mut given = arguments(name, args, &["encoding", "errors"])?.into_iter();
    let mut text = |default: &str| match given.next().flatten() {
        Some(value) => needed_text(name, Some(value)),
        None => Ok(default.to_owned()),
    };
    let (encoding, errors) = (text("utf-8")?, text("strict")?);
    let encoding = Encoding::of(&encoding);
    let encoding =
        encoding.ok_or_else(|| wrong(format!("{name}() in this encoding is not taken")))?;
    Ok((encoding, errors))
}

/// `str.encode`
fn encoded(state: &State, text: &str, args: &[Value]) -> Made<Value> {
    let (encoding, errors) = encoding("encode", args)?;
    spend(state, text.len().saturating_mul(4))?;
    let mut out = Vec::new();
    match encoding {
        Encoding::Utf8 { marked } => {
            if marked {
                out.extend("\u{feff}".bytes());
            }
            out.extend(text.bytes());
        }
        Encoding::Wide { four, big } => {
            let mark = big.is_none().then_some('\u{feff}');
            for c in mark.into_iter().chain(text.chars()) {
                let (mut units, big) = ([0; 2], big == Some(true));
                match (four, big) {
                    (true, true) => out.extend(u32::from(c).to_be_bytes()),
                    (true, false) => out.extend(u32::from(c).to_le_bytes()),
                    (false, _) => {
                        for unit in c.encode_utf16(&mut units) {
                            out.extend(if big {
                                unit.to_be_bytes()
                            } else {
                                unit.to_le_bytes()
                            });
                        }
                    }
                }
            }
        }
        Encoding::Ascii | Encoding::Latin1 => {
            let most = if encoding == Encoding::Ascii {
                0x7f
            } else {
                0xff
            };
            for c in text.chars() {
                let code = u32::from(c);
                match (u8::try_from(code), errors.as_str()) {
                    (Ok(byte), _) if code <= most => out.push(byte),
                    (_, "ignore") => {}
                    (_, "replace") => out.push(b'?'),
                    (_, "xmlcharrefreplace") => out.extend(format!("&#{code};").bytes()),
                    (_, "backslashreplace") => out.extend(format::ascii(&c.to_string()).bytes()),
                    _ => return Err(wrong("encode() cannot write a character")),
                }
            }
        }
    }
    Ok(Value::from_object(Bytes(out)))
}

/// `bytes.decode`
fn decoded(bytes: &[u8], args: &[Value]) -> Made<Value> {
    let (encoding, errors) = encoding("decode", args)?;
    let mut out = String::with_capacity(bytes.len());
    let unfit = |bytes: &[u8], out: &mut String| match errors.as_str() {
        "ignore" => Ok(()),
        "replace" => {
            out.push(char::REPLACEMENT_CHARACTER);
            Ok(())
        }
        "backslashreplace" => {
            bytes
                .iter()
                .for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
            Ok(())
        }
        _ => Err(wrong("decode() cannot read a byte")),
    };
    match encoding {
        Encoding::Latin1 => out.extend(bytes.iter().copied().map(char::from)),
        Encoding::Ascii => {
            for byte in bytes {
                match byte.is_ascii() {
                    true => out.push(char::from(*byte)),
                    false => unfit(&[*byte], &mut out)?,
                }
            }
        }
        Encoding::Utf8 { marked } => {
            let mark = "\u{feff}".as_bytes();
            let bytes = bytes.strip_prefix(mark).filter(|_| marked).unwrap_or(bytes);
            for chunk in bytes.utf8_chunks() {
                out.push_str(chunk.valid());
                if !chunk.invalid().is_empty() {
                    unfit(chunk.invalid(), &mut out)?;
                }
            }
        }
        Encoding::Wide { four, big } => {
            let text = match four {
                true => wide_text::<4>(bytes, big, |units| units.map(char::from_u32).collect()),
                false => wide_text::<2>(bytes, big, |units| {
                    let units = units.map(|unit| unit as u16);
                    char::decode_utf16(units).map(Result::ok).collect()
                }),
            };
            out = text.ok_or_else(|| wrong("decode() cannot read a byte"))?;
        }
    }
    Ok(Value::from(out))
}

/// Reads units of `N` bytes; without `big` a mark before them tells which end comes first.
fn wide_text<const N: usize>(
    bytes: &[u8],
    big: Option<bool>,
    read: fn(&mut dyn Iterator<Item = u32>) -> Option<String>,
) -> Option<String> {
    let (units, rest) = bytes.as_chunks::<N>();
    let unit = |unit: &[u8; N], big: bool| {
        let place = |at: usize| if big { N - 1 - at } else { at };
        (0..N)
            .map(|at| u32::from(unit[at]) << (8 * place(at)))
            .sum::<u32>()
    };
    let mark = u32::from('\u{feff}');
    let (big, from) = match (big, units.first()) {
        (Some(big), _) => (big, 0),
        (None, Some(first)) if unit(first, false) == mark => (false, 1),
        (None, Some(first)) if unit(first, true) == mark => (true, 1),
        _ => (false, 0),
    };
    read(&mut units[from..].iter().map(|bytes| unit(bytes, big))).filter(|_| rest.is_empty())
}

/// A method of bytes: that of a text in which each byte is a character. Those that are no letters, digits or white
/// space among bytes stand there as characters of no meaning.
fn bytes_method(state: &State, own: &[u8], name: &str, args: &[Value]) -> Made<Value> {
    match name {
        "decode" => return decoded(own, args),
        "hex" => {
            none_of(name, args)?;
            spend(state, own.len() * 2)?;
            let digits = own.iter().map(|byte| format!("{byte:02x}"));
            return Ok(Value::from(digits.collect::<String>()));
        }
        "fromhex" | "maketrans" | "translate" => {
            return Err(wrong(format!("{name}() of bytes is not taken")));
        }
        _ if BYTES.contains(&name) => {}
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    }
    const APART: u32 = 0xf0000;
    let as_text = |bytes: &[u8]| -> Value {
        let characters = bytes.iter().map(|byte| match byte {
            0x0b | 0x0c if name == "splitlines" => u32::from(*byte) + APART,
            0x1c..=0x1f | 0x80.. => u32::from(*byte) + APART,
            _ => u32::from(*byte),
        });
        Value::from(characters.filter_map(char::from_u32).collect::<String>())
    };
    let as_bytes = |value: &Value| match value.as_str() {
        Some(text) => {
            let bytes = text.chars().map(|c| u32::from(c) as u8);
            Value::from_object(Bytes(bytes.collect()))
        }
        None => value.clone(),
    };
    if name == "isascii" {
        none_of(name, args)?;
        return Ok(Value::from(own.is_ascii()));
    }
    let mut given = Vec::new();
    for value in args {
        given.push(match Kind::of(value) {
            Kind::Text => return Err(wrong(format!("{name}() of bytes takes bytes"))),
            Kind::Bytes if name != "join" => as_text(bytes(value)),
            Kind::Integer
                if ["count", "find", "index", "rfind", "rindex"].contains(&name)
                    && given.is_empty() =>
            {
                let byte = integer(value).and_then(|byte| u8::try_from(byte).ok());
                as_text(&[byte.ok_or_else(|| wrong("a byte is a number below 256"))?])
            }
            Kind::List | Kind::Tuple => {
                let parts = items(state, value)?;
                if parts.iter().any(|part| Kind::of(part) != Kind::Bytes) {
                    return Err(wrong(format!("{name}() of bytes takes bytes")));
                }
                let parts: Vec<Value> = parts.iter().map(|part| as_text(bytes(part))).collect();
                match Kind::of(value) {
                    Kind::List => list(parts),
                    _ => tuple(parts),
                }
            }
            _ => value.clone(),
        });
    }
    spend(state, own.len().saturating_mul(4))?;
    let text = as_text(own);
    let made = text_method(state, text.as_str().unwrap_or_default(), name, &given)?;
    match Kind::of(&made) {
        Kind::List => Ok(list(items(state, &made)?.iter().map(as_bytes).collect())),
        Kind::Tuple => Ok(tuple(items(state, &made)?.iter().map(as_bytes).collect())),
        _ => Ok(as_bytes(&made)),
    }
}

/// The end that `to_bytes` and `from_bytes` are told comes first, and whether there is a sign.
fn byte_order(name: &str, order: Option<Value>, signed: Option<Value>) -> Made<(bool, bool)> {
    let order = order.map_or(Ok("big".to_owned()), |order| needed_text(name, Some(order)))?;
    match order.as_str() {
        "big" => Ok((true, flag(signed, false))),
        "little" => Ok((false, flag(signed, false))),
        _ => Err(wrong(format!("{name}() is \"big\" or \"little\""))),
    }
}

/// `int.to_bytes`
fn to_bytes(number: i128, args: &[Value]) -> Made<Value> {
    let name = "to_bytes";
    if split_arguments(args).0.len() > 2 {
        return Err(wrong("to_bytes() takes \"signed\" by its name"));
    }
    let mut given = arguments(name, args, &["length", "byteorder", "signed"])?.into_iter();
    let length = whole(name, given.next().flatten(), 1)?;
    let (big, signed) = byte_order(name, given.next().flatten(), given.next().flatten())?;
    let length = usize::try_from(length)
        .ok()
        .filter(|length| *length <= 1 << 16);
    let length = length.ok_or_else(|| wrong("to_bytes() takes a length that is not too large"))?;
    let bits = (length * 8).min(127) as u32 - u32::from(signed && length > 0 && length <= 15);
    let fits = match number < 0 {
        true => signed && length > 0 && (bits >= 127 || number >= -(1 << bits)),
        false => bits >= 127 || number < 1 << bits,
    };
    if !fits {
        return Err(wrong("to_bytes() has too few bytes for a number"));
    }
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.resize(length, if number < 0 { 0xff } else { 0 });
    if big {
        bytes.reverse();
    }
    Ok(Value::from_object(Bytes(bytes)))
}

/// `int.from_bytes`
fn from_bytes(args: &[Value]) -> Made<Value> {
    let name = "from_bytes";
    if split_arguments(args).0.len() > 2 {
        return Err(wrong("from_bytes() takes \"signed\" by its name"));
    }
    let mut given = arguments(name, args, &["bytes", "byteorder", "signed"])?.into_iter();
    let value = needed(name, given.next().flatten())?;
    let (big, signed) = byte_order(name, given.next().flatten(), given.next().flatten())?;
    if Kind::of(&value) != Kind::Bytes || bytes(&value).len() > 15 {
        return Err(wrong("from_bytes() of these is not taken"));
    }
    let mut bytes = bytes(&value).to_vec();
    if !big {
        bytes.reverse();
    }
    let negative = signed && bytes.first().is_some_and(|byte| *byte > 0x7f);
    let begin = if negative { -1 } else { 0 };
    let number = bytes
        .iter()
        .fold(begin, |number, byte| number << 8 | i128::from(*byte));
    Ok(Value::from(number))
}

/// `str.maketrans`: what `translate` puts in the place of characters, by their numbers.
fn translation(state: &State, args: &[Value]) -> Made<Value> {
    let given = arguments("maketrans", args, &["x", "y", "z"])?;
    let code = |c: char| Value::from(u32::from(c));
    let mut table: Vec<(Value, Value)> = Vec::new();
    match (&given[0], &given[1], &given[2]) {
        (Some(dict), None, None) => {
            for (key, value) in pairs(dict)? {
                let mut characters = key.as_str().unwrap_or_default().chars();
                let key = match (characters.next(), characters.next()) {
                    (Some(c), None) => code(c),
                    _ if Kind::of(&key) == Kind::Integer => key,
                    _ => return Err(wrong("maketrans() takes characters or their numbers")),
                };
                table.push((key, value));
            }
        }
        (Some(from), Some(to), dropped) => {
            let from = needed_text("maketrans", Some(from.clone()))?;
            let to = needed_text("maketrans", Some(to.clone()))?;
            spend(state, (from.len() + to.len()) * 96)?;
            if from.chars().count() != to.chars().count() {
                return Err(wrong("maketrans() takes two texts of the same length"));
            }
            table.extend(
                from.chars()
                    .zip(to.chars())
                    .map(|(from, to)| (code(from), code(to))),
            );
            if let Some(dropped) = dropped {
                let dropped = needed_text("maketrans", Some(dropped.clone()))?;
                table.extend(dropped.chars().map(|c| (code(c), Value::from(()))));
            }
        }
        _ => return Err(wrong("maketrans() lacks an argument")),
    }
    Ok(Value::from_pairs(table))
}

/// `str.translate`
fn translated(state: &State, text: &str, args: &[Value]) -> Made<Value> {
    let table = needed(
        "translate",
        arguments("translate", args, &["table"])?.pop().flatten(),
    )?;
    if !matches!(Kind::of(&table), Kind::Dict | Kind::List | Kind::Tuple) {
        return Err(wrong("translate() takes a dict"));
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let found = table
            .as_object()
            .and_then(|table| table.get_value(&Value::from(u32::from(c))));
        match found {
            None => out.push(c),
            Some(found) if found.is_none() => {}
            Some(found) => match (found.as_str(), integer(&found)) {
                (Some(text), _) => out.push_str(text),
                (None, Some(code)) => {
                    let c = u32::try_from(code).ok().and_then(char::from_u32);
                    out.push(c.ok_or_else(|| wrong("translate() makes no character"))?);
                }
                _ => return Err(wrong("translate() makes characters or texts")),
            },
        }
        state.consume_fuel(1)?;
        check_size(&out)?;
    }
    Ok(Value::from(out))
}

/// `str.casefold`: as Unicode's full folding of case.
fn casefold(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            'ı' => out.push(c),
            'ẞ' => out.push_str("ss"),
            // Cherokee's capitals came first.
            '\u{13a0}'..='\u{13fd}' | '\u{ab70}'..='\u{abbf}' => out.extend(c.to_uppercase()),
            _ => out.extend(c.to_uppercase().flat_map(char::to_lowercase)),
        }
    }
    out
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
                _ => fresh(state, value),
            }
        }
        "fromkeys" => super::functions::from_keys(state, args),
        _ if DICT_CHANGES.contains(&name) => Err(changes(name)),
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
            fresh(state, value)
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
        "casefold" => changed(casefold),
        "encode" => encoded(state, text, args),
        "translate" => translated(state, text, args),
        "maketrans" => translation(state, args),
        "isalpha" => all(is_letter),
        "isalnum" => all(|c| is_letter(c) || c.is_numeric()),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|c| is_decimal(c) || is_other_digit(c)),
        "isnumeric" => all(|c| c.is_numeric() || NUMERIC_IDEOGRAPHS.contains(c)),
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
            format::braces(state, text, false, plain, &named).map(Value::from)
        }
        "format_map" => format::braces(state, text, false, &[], &mapping(args)?).map(Value::from),
        _ if TEXT.contains(&name) => Err(wrong(format!("{name}() of this text is not taken"))),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// What `format_map` takes.
fn mapping(args: &[Value]) -> Made<Vec<(String, Value)>> {
    let name = "format_map";
    let mapping = needed(name, arguments(name, args, &["mapping"])?.pop().flatten())?;
    let named = pairs(&mapping)?.into_iter();
    Ok(named.map(|(key, value)| (key.to_string(), value)).collect())
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

/// Ideographs that stand for numbers.
const NUMERIC_IDEOGRAPHS: &str = concat!(
    "㐅㒃㠪㭍一七万三九二五亖亿什仟仨伍佰億兆兩八六十千卄卅卌叁参參叄四壱壹幺廾廿弌弍弎弐拾捌柒漆玖百肆萬貮貳贰阡陆陌陸零",
    "\u{f96b}\u{f973}\u{f978}\u{f9b2}\u{f9d1}\u{f9d3}\u{f9fd}\u{20001}\u{20064}\u{200e2}\u{20121}\u{2092a}\u{20983}",
    "\u{2098c}\u{2099c}\u{20aea}\u{20afd}\u{20b19}\u{22390}\u{22998}\u{23b1b}\u{2626d}\u{2f890}",
);

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

/// The words of a text between white space.
pub(super) fn split_at_space(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
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
