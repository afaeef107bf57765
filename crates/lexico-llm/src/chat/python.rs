//! Python's values, as Jinja2's templates see them: their texts, their comparison, their kinds.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::VecDeque;
use std::fmt;
use std::fmt::Write;
use std::sync::{Arc, Mutex};

use minijinja::tests::is_sameas;
use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use unicode_general_category::{GeneralCategory, get_general_category};

pub(super) type Made<T> = Result<T, Error>;

/// Longest text that one step may make, and most items of a list.
pub(super) const LARGEST: usize = 1 << 26;
/// Lists within lists.
const DEEPEST: usize = 150;

/// What Jinja2 refuses, or we do.
pub(super) fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// Refuses what would take more memory than a template may.
pub(super) fn spend(state: &State, bytes: usize) -> Made<()> {
    if bytes > LARGEST {
        return Err(wrong(format!(
            "a text or list of {bytes} bytes or items is too large"
        )));
    }
    state.consume_fuel((bytes / 64) as u64)
}

/// Refuses a text that has grown too large.
pub(super) fn check_size(text: &str) -> Made<()> {
    if text.len() > LARGEST {
        return Err(wrong("a text is too large"));
    }
    Ok(())
}

/// `str.isspace` of Python.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

thread_local! {
    /// Values that are to be let go of; `None` while there are none.
    static LEFT: RefCell<Option<Vec<Value>>> = const { RefCell::new(None) };
}

/// Lets go of values one after the other: objects within objects, without end, would else take all of the stack.
pub(super) fn let_go(values: impl IntoIterator<Item = Value>) {
    let others_wait = LEFT.with_borrow_mut(|left| {
        let others_wait = left.is_some();
        left.get_or_insert_default().extend(values);
        others_wait
    });
    if others_wait {
        return;
    }
    // What is let go of here may call this again, which only adds to those that wait.
    while let Some(next) = LEFT.with_borrow_mut(|left| left.as_mut().and_then(Vec::pop)) {
        drop(next);
    }
    LEFT.with_borrow_mut(|left| *left = None);
}

/// A method that was looked up and not called yet.
#[derive(Debug)]
pub(super) struct Method {
    pub(super) of: Value,
    pub(super) name: String,
}

impl Drop for Method {
    fn drop(&mut self) {
        let_go([std::mem::take(&mut self.of)]);
    }
}

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Made<Value> {
        self.of.call_method(state, &self.name, args)
    }
}

/// `range(…)`
#[derive(Debug)]
pub(super) struct Range {
    pub(super) start: i64,
    pub(super) stop: i64,
    pub(super) step: i64,
}

impl Range {
    pub(super) fn length(&self) -> usize {
        let (start, stop) = (i128::from(self.start), i128::from(self.stop));
        let step = i128::from(self.step);
        let length = (stop - start + step - step.signum()) / step;
        usize::try_from(length).unwrap_or(0)
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = key.as_usize().filter(|at| *at < self.length())?;
        Some(Value::from(self.start + at as i64 * self.step))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.length())
    }
}

/// `b'…'`: no text, though minijinja takes its own bytes for one.
#[derive(Debug)]
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Object for Bytes {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).copied().map(Value::from)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }
}

/// The bytes of a value that is bytes.
pub(super) fn bytes(value: &Value) -> &[u8] {
    value
        .downcast_object_ref::<Bytes>()
        .map_or(&[], |bytes| &bytes.0)
}

/// `keys()`, `values()` or `items()` of a dict: no list, and not to be indexed.
#[derive(Debug)]
pub(super) struct View {
    /// `keys`, `values` or `items`.
    pub(super) kind: &'static str,
    pub(super) items: Vec<Value>,
}

impl Drop for View {
    fn drop(&mut self) {
        let_go(std::mem::take(&mut self.items));
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.items.clone())
    }
}

/// What `map` and `select` make: it gives each item once, and has no length.
pub(super) struct Generator(Arc<Mutex<VecDeque<Value>>>);

impl Generator {
    pub(super) fn of(items: Vec<Value>) -> Value {
        Value::from_object(Self(Arc::new(Mutex::new(items.into()))))
    }

    fn next(items: &Mutex<VecDeque<Value>>) -> Option<Value> {
        items.lock().map_or(None, |mut items| items.pop_front())
    }

    pub(super) fn first(&self) -> Option<Value> {
        Self::next(&self.0)
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        if let Ok(mut items) = self.0.lock()
            && Arc::strong_count(&self.0) == 1
        {
            let_go(std::mem::take(&mut *items));
        }
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<generator>")
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let items = self.0.clone();
        Enumerator::Iter(Box::new(std::iter::from_fn(move || Self::next(&items))))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

/// What a value is to Python.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Undefined,
    None,
    Bool,
    Integer,
    Float,
    Text,
    Bytes,
    List,
    Tuple,
    Dict,
    Range,
    View,
    Generator,
    Namespace,
    /// Functions, macros, methods.
    Callable,
    /// A loop and the like.
    Other,
}

impl Kind {
    pub(super) fn of(value: &Value) -> Self {
        match value.kind() {
            ValueKind::Undefined => Self::Undefined,
            ValueKind::None => Self::None,
            ValueKind::Bool => Self::Bool,
            ValueKind::Number if value.is_integer() => Self::Integer,
            ValueKind::Number => Self::Float,
            ValueKind::String => Self::Text,
            _ => value.as_object().map_or(Self::Other, Self::of_object),
        }
    }

    fn of_object(object: &DynObject) -> Self {
        if object.downcast_ref::<Tuple>().is_some()
            || object.downcast_ref::<super::filters::Group>().is_some()
        {
            Self::Tuple
        } else if object.downcast_ref::<Range>().is_some() {
            Self::Range
        } else if object.downcast_ref::<Bytes>().is_some() {
            Self::Bytes
        } else if object.downcast_ref::<View>().is_some() {
            Self::View
        } else if object.downcast_ref::<Generator>().is_some() {
            Self::Generator
        } else if object
            .downcast_ref::<super::functions::Namespace>()
            .is_some()
        {
            Self::Namespace
        } else if object.type_name().ends_with("Loop") {
            Self::Other
        } else if object.type_name().ends_with("::Macro") {
            Self::Callable
        } else {
            match object.repr() {
                ObjectRepr::Map => Self::Dict,
                ObjectRepr::Seq | ObjectRepr::Iterable => Self::List,
                _ if object.downcast_ref::<super::functions::Cycler>().is_some()
                    || object.downcast_ref::<super::macros::Blocks>().is_some() =>
                {
                    Self::Other
                }
                _ => Self::Callable,
            }
        }
    }

    /// The name of the type in Python.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Undefined => "Undefined",
            Self::None => "NoneType",
            Self::Bool => "bool",
            Self::Integer => "int",
            Self::Float => "float",
            Self::Text => "str",
            Self::Bytes => "bytes",
            Self::List => "list",
            Self::Tuple => "tuple",
            Self::Dict => "dict",
            Self::Range => "range",
            Self::View => "dict view",
            Self::Generator => "generator",
            Self::Namespace => "Namespace",
            Self::Callable => "function",
            Self::Other => "object",
        }
    }

    pub(super) fn is_number(self) -> bool {
        matches!(self, Self::Bool | Self::Integer | Self::Float)
    }

    fn is_iterable(self) -> bool {
        use Kind::{Bytes, Dict, Generator, List, Range, Text, Tuple, Undefined, View};
        matches!(
            self,
            Undefined | Text | Bytes | List | Tuple | Dict | Range | View | Generator
        )
    }
}

/// Whether a value gives items.
pub(super) fn is_iterable(value: &Value) -> bool {
    Kind::of(value).is_iterable()
}

/// The items of a value, as `for` in Python takes them.
pub(super) fn items(state: &State, value: &Value) -> Made<Vec<Value>> {
    let kind = Kind::of(value);
    if !kind.is_iterable() {
        return Err(wrong(format!("{} is not iterable", kind.name())));
    }
    if kind == Kind::Undefined {
        return Ok(Vec::new());
    }
    let mut items = Vec::new();
    for item in value.try_iter()?.checked() {
        state.consume_fuel(1)?;
        items.push(item?);
    }
    Ok(items)
}

/// The pairs of a dict.
pub(super) fn pairs(value: &Value) -> Made<Vec<(Value, Value)>> {
    let dict = value.as_object().filter(|_| Kind::of(value) == Kind::Dict);
    let Some(pairs) = dict.and_then(|dict| dict.try_iter_pairs()) else {
        return Err(wrong(format!("{} is no dict", Kind::of(value).name())));
    };
    Ok(pairs.collect())
}

/// The item of a name or place; undefined where there is none.
pub(super) fn attribute(value: &Value, name: &Value) -> Made<Value> {
    let kind = Kind::of(value);
    match kind {
        Kind::Undefined => Err(wrong(format!("an undefined value has no {}", repr(name)?))),
        Kind::Text | Kind::Bytes | Kind::List | Kind::Tuple | Kind::Range => {
            let place = integer(name).and_then(|place| i64::try_from(place).ok());
            let is_named = kind == Kind::Tuple && name.as_str().is_some();
            match place {
                Some(place) => Ok(value.get_item(&Value::from(place)).unwrap_or_default()),
                None if is_named => Ok(value.get_item(name).unwrap_or_default()),
                None => Ok(Value::UNDEFINED),
            }
        }
        Kind::View | Kind::Generator => Ok(Value::UNDEFINED),
        _ => Ok(value.get_item(name).unwrap_or_default()),
    }
}

/// `str(value)`
pub(super) fn text(value: &Value) -> Made<String> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    if value.is_undefined() {
        return Ok(String::new());
    }
    repr(value)
}

/// `repr(value)`
pub(super) fn repr(value: &Value) -> Made<String> {
    repr_in_order(value, &pairs)
}

/// `repr(value)` with the pairs of dicts as `pairs` orders them.
pub(super) fn repr_in_order(value: &Value, pairs: &Pairs) -> Made<String> {
    let mut out = String::new();
    write_repr(value, &mut out, pairs, 0)?;
    Ok(out)
}

type Pairs<'p> = dyn Fn(&Value) -> Made<Vec<(Value, Value)>> + 'p;

fn write_repr(value: &Value, out: &mut String, pairs: &Pairs, depth: usize) -> Made<()> {
    if depth > DEEPEST {
        return Err(wrong("lists are too deep within each other to be printed"));
    }
    if out.len() > LARGEST {
        return Err(wrong("a list is too large to be printed"));
    }
    let list = |items: &mut dyn Iterator<Item = Value>, out: &mut String| -> Made<usize> {
        let mut count = 0;
        for item in items {
            if count > 0 {
                out.push_str(", ");
            }
            write_repr(&item, out, pairs, depth + 1)?;
            count += 1;
        }
        Ok(count)
    };
    match Kind::of(value) {
        Kind::Undefined => out.push_str("Undefined"),
        Kind::None => out.push_str("None"),
        Kind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        Kind::Integer => {
            let _ = write!(out, "{value}");
        }
        Kind::Float => out.push_str(&float_text(float(value).unwrap_or(f64::NAN))),
        Kind::Text => {
            let text = value.as_str().unwrap_or_default();
            if value.is_safe() {
                out.push_str("Markup(");
            }
            write_text_repr(text, out);
            if value.is_safe() {
                out.push(')');
            }
        }
        Kind::List => {
            out.push('[');
            list(&mut value.try_iter()?, out)?;
            out.push(']');
        }
        Kind::Tuple => {
            out.push('(');
            if list(&mut value.try_iter()?, out)? == 1 {
                out.push(',');
            }
            out.push(')');
        }
        Kind::Dict => {
            out.push('{');
            for (at, (key, value)) in pairs(value)?.into_iter().enumerate() {
                if at > 0 {
                    out.push_str(", ");
                }
                write_repr(&key, out, pairs, depth + 1)?;
                out.push_str(": ");
                write_repr(&value, out, pairs, depth + 1)?;
            }
            out.push('}');
        }
        Kind::View => {
            let kind = value
                .downcast_object_ref::<View>()
                .map_or("items", |view| view.kind);
            let _ = write!(out, "dict_{kind}([");
            list(&mut value.try_iter()?, out)?;
            out.push_str("])");
        }
        Kind::Range => {
            let Some(range) = value.downcast_object_ref::<Range>() else {
                return Ok(());
            };
            let _ = write!(out, "range({}, {}", range.start, range.stop);
            if range.step != 1 {
                let _ = write!(out, ", {}", range.step);
            }
            out.push(')');
        }
        Kind::Bytes => {
            write_bytes_repr(bytes(value), out);
        }
        kind => {
            if write_known_repr(value, out, pairs, depth)? {
                return Ok(());
            }
            let what = format!(
                "{} cannot be printed: Python prints what is to it alone",
                kind.name()
            );
            return Err(wrong(what));
        }
    }
    Ok(())
}

/// Writes what has a `repr` of its own, without a place in memory; returns false of other values.
fn write_known_repr(value: &Value, out: &mut String, pairs: &Pairs, depth: usize) -> Made<bool> {
    if let Some(declared) = value.downcast_object_ref::<super::macros::Macro>() {
        out.push_str(&declared.shown()?);
    } else if value
        .downcast_object_ref::<super::macros::Blocks>()
        .is_some()
    {
        out.push_str("<TemplateReference None>");
    } else if let Some(class) = super::functions::class_name(value) {
        let _ = write!(out, "<class '{class}'>");
    } else if is_loop(value) {
        let (at, of) = (value.get_attr("index")?, value.get_attr("length")?);
        if Kind::of(&at) != Kind::Integer || Kind::of(&of) != Kind::Integer {
            return Ok(false);
        }
        let _ = write!(out, "<LoopContext {at}/{of}>");
    } else if let Some(namespace) = value.downcast_object_ref::<super::functions::Namespace>() {
        let attributes = Value::from_pairs(namespace.attributes());
        out.push_str("<Namespace ");
        write_repr(&attributes, out, pairs, depth + 1)?;
        out.push('>');
    } else {
        return Ok(false);
    }
    Ok(true)
}

pub(super) fn is_loop(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|object| object.type_name().ends_with("Loop"))
}

fn write_bytes_repr(bytes: &[u8], out: &mut String) {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') {
        '"'
    } else {
        '\''
    };
    out.push('b');
    out.push(quote);
    for byte in bytes {
        let _ = match byte {
            b'\\' => write!(out, "\\\\"),
            b'\n' => write!(out, "\\n"),
            b'\r' => write!(out, "\\r"),
            b'\t' => write!(out, "\\t"),
            byte if char::from(*byte) == quote => write!(out, "\\{quote}"),
            b' '..=b'~' => write!(out, "{}", char::from(*byte)),
            byte => write!(out, "\\x{byte:02x}"),
        };
    }
    out.push(quote);
}

fn write_text_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        let code = c as u32;
        let _ = match c {
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            c if c == quote => write!(out, "\\{c}"),
            c if is_printable(c) => write!(out, "{c}"),
            _ if code < 0x100 => write!(out, "\\x{code:02x}"),
            _ if code < 0x10000 => write!(out, "\\u{code:04x}"),
            _ => write!(out, "\\U{code:08x}"),
        };
    }
    out.push(quote);
}

/// `str.isprintable` of one character.
pub(super) fn is_printable(c: char) -> bool {
    use GeneralCategory as G;
    let hidden = [
        G::Control,
        G::Format,
        G::Surrogate,
        G::PrivateUse,
        G::Unassigned,
        G::LineSeparator,
        G::ParagraphSeparator,
        G::SpaceSeparator,
    ];
    c == ' ' || !hidden.contains(&get_general_category(c))
}

/// The number that a value is.
pub(super) fn float(value: &Value) -> Option<f64> {
    match Kind::of(value) {
        Kind::Bool => Some(f64::from(u8::from(value.is_true()))),
        Kind::Integer | Kind::Float => f64::try_from(value.clone()).ok().or_else(|| {
            // Too large to be exact.
            value.to_string().parse().ok()
        }),
        _ => None,
    }
}

/// The whole number that a value is.
pub(super) fn integer(value: &Value) -> Option<i128> {
    match Kind::of(value) {
        Kind::Bool => Some(i128::from(value.is_true())),
        Kind::Integer => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// `repr` of a float: as few digits as make it out, with an exponent where it is long.
pub(super) fn float_text(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') {
        plain
    } else {
        format!("{plain}.0")
    }
}

/// Whether two values are the same to Python.
pub(super) fn equal(state: &State, left: &Value, right: &Value) -> Made<bool> {
    let size = left.len().unwrap_or(1).min(right.len().unwrap_or(1));
    state.consume_fuel(1 + size as u64 / 8)?;
    let kinds = (Kind::of(left), Kind::of(right));
    match kinds {
        (a, b) if a.is_number() && b.is_number() => {
            Ok(left == right || integer(left).is_some() && integer(left) == integer(right))
        }
        (Kind::List | Kind::Tuple, Kind::List | Kind::Tuple) => {
            if kinds.0 != kinds.1 || left.len() != right.len() {
                return Ok(false);
            }
            for (a, b) in left.try_iter()?.zip(right.try_iter()?) {
                if !equal(state, &a, &b)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        (Kind::Namespace, Kind::Namespace) | (Kind::Generator, Kind::Generator) => {
            Ok(is_sameas(left, right))
        }
        (a, b) if a == b => Ok(left == right),
        _ => Ok(false),
    }
}

/// `left < right` and the like; the error is Python's.
pub(super) fn order(state: &State, left: &Value, right: &Value) -> Made<Option<Ordering>> {
    state.consume_fuel(1)?;
    let kinds = (Kind::of(left), Kind::of(right));
    match kinds {
        (a, b) if a.is_number() && b.is_number() => {
            if let (Some(a), Some(b)) = (integer(left), integer(right)) {
                return Ok(Some(a.cmp(&b)));
            }
            let (Some(a), Some(b)) = (float(left), float(right)) else {
                return Ok(None);
            };
            Ok(a.partial_cmp(&b))
        }
        (Kind::Text, Kind::Text) => Ok(Some(left.as_str().cmp(&right.as_str()))),
        (Kind::Bytes, Kind::Bytes) => Ok(Some(bytes(left).cmp(bytes(right)))),
        (Kind::List, Kind::List) | (Kind::Tuple, Kind::Tuple) => {
            for (a, b) in left.try_iter()?.zip(right.try_iter()?) {
                if !equal(state, &a, &b)? {
                    return order(state, &a, &b);
                }
            }
            Ok(Some(left.len().cmp(&right.len())))
        }
        (a, b) => Err(wrong(format!(
            "{} and {} have no order",
            a.name(),
            b.name()
        ))),
    }
}

/// `item in container`
pub(super) fn contains(state: &State, container: &Value, item: &Value) -> Made<bool> {
    match Kind::of(container) {
        Kind::Text => {
            let (Some(text), Some(part)) = (container.as_str(), item.as_str()) else {
                return Err(wrong(format!(
                    "only a text is in a text, not {}",
                    Kind::of(item).name()
                )));
            };
            state.consume_fuel(1 + text.len() as u64 / 64)?;
            Ok(text.contains(part))
        }
        Kind::Bytes if Kind::of(item) == Kind::Bytes => {
            let (all, part) = (bytes(container), bytes(item));
            state.consume_fuel(1 + all.len() as u64 / 64)?;
            // As Latin-1, in which each is a character.
            let text = |bytes: &[u8]| bytes.iter().copied().map(char::from).collect::<String>();
            Ok(text(all).contains(&text(part)))
        }
        Kind::Bytes if integer(item).is_none_or(|byte| !(0..256).contains(&byte)) => {
            Err(wrong("only a byte is in bytes"))
        }
        Kind::Dict => {
            check_key(item)?;
            Ok(container
                .get_item(item)
                .is_ok_and(|found| !found.is_undefined())
                || {
                    // A key may stand for a value that is undefined.
                    container.try_iter()?.any(|key| key == *item)
                })
        }
        _ => {
            for other in items(state, container)? {
                if equal(state, &other, item)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// Only what cannot change is a key of a dict.
pub(super) fn check_key(key: &Value) -> Made<()> {
    match Kind::of(key) {
        kind @ (Kind::List | Kind::Dict | Kind::View) => {
            Err(wrong(format!("a {} is no key of a dict", kind.name())))
        }
        _ => Ok(()),
    }
}

/// Refuses lists that are so deep within each other that to let go of them would take too much of the stack.
pub(super) fn check_depth(state: &State, value: &Value, depth: usize) -> Made<()> {
    if depth > DEEPEST {
        return Err(wrong(format!(
            "more than {DEEPEST} lists or dicts within each other"
        )));
    }
    match Kind::of(value) {
        Kind::List | Kind::Tuple => {
            for item in value.try_iter()? {
                if item.as_object().is_some() {
                    check_depth(state, &item, depth + 1)?;
                }
            }
            state.consume_fuel(1 + value.len().unwrap_or(0) as u64 / 16)
        }
        Kind::Dict => {
            for (_, item) in pairs(value)? {
                state.consume_fuel(1)?;
                check_depth(state, &item, depth + 1)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The arguments of a call, by the names that Python gives them; those not given are `None`.
pub(super) fn arguments(called: &str, args: &[Value], names: &[&str]) -> Made<Vec<Option<Value>>> {
    let (plain, named) = split_arguments(args);
    if plain.len() > names.len() {
        return Err(wrong(format!(
            "{called} takes {} arguments, not {}",
            names.len(),
            plain.len()
        )));
    }
    let mut found: Vec<Option<Value>> = plain.iter().cloned().map(Some).collect();
    found.resize(names.len(), None);
    for (name, value) in named {
        let at = names.iter().position(|known| *known == name);
        let Some(at) = at.filter(|at| found[*at].is_none()) else {
            return Err(wrong(format!(
                "{called} takes no further argument {name:?}"
            )));
        };
        found[at] = Some(value);
    }
    Ok(found)
}

/// Arguments without names, and those with.
pub(super) fn split_arguments(args: &[Value]) -> (&[Value], Vec<(String, Value)>) {
    match args.split_last() {
        Some((last, plain)) if last.is_kwargs() => {
            let pairs = last.as_object().and_then(|named| named.try_iter_pairs());
            let named = pairs.into_iter().flatten();
            (
                plain,
                named
                    .map(|(name, value)| (name.to_string(), value))
                    .collect(),
            )
        }
        _ => (args, Vec::new()),
    }
}

/// An argument that must be given.
pub(super) fn needed(called: &str, argument: Option<Value>) -> Made<Value> {
    argument.ok_or_else(|| wrong(format!("{called} lacks an argument")))
}

/// An argument that must be a text.
pub(super) fn needed_text(called: &str, argument: Option<Value>) -> Made<String> {
    let value = needed(called, argument)?;
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong(format!(
            "{called} takes a text, not {}",
            Kind::of(&value).name()
        ))),
    }
}

/// An argument that is a whole number where it is given.
pub(super) fn whole(called: &str, argument: Option<Value>, default: i64) -> Made<i64> {
    let Some(value) = argument else {
        return Ok(default);
    };
    let Some(number) = integer(&value) else {
        return Err(wrong(format!(
            "{called} takes a whole number, not {}",
            Kind::of(&value).name()
        )));
    };
    Ok(i64::try_from(number).unwrap_or(if number < 0 { i64::MIN } else { i64::MAX }))
}

/// An argument that is true or false to Python.
pub(super) fn flag(argument: Option<Value>, default: bool) -> bool {
    argument.map_or(default, |value| is_true(&value))
}

/// `bool(value)`
pub(super) fn is_true(value: &Value) -> bool {
    value.is_true()
}

/// A text made of another one: safe where that was.
pub(super) fn like(value: &Value, text: String) -> Value {
    match value.is_safe() {
        true => Value::from_safe_string(text),
        false => Value::from(text),
    }
}

/// A list of values.
pub(super) fn list(items: Vec<Value>) -> Value {
    Value::from(items)
}

/// A tuple of values.
pub(super) fn tuple(items: Vec<Value>) -> Value {
    Value::from(Tuple::from(items))
}

/// Where a slice begins and ends in `length` items, as Python's `slice.indices` has it.
pub(super) fn slice_ends(
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
    length: usize,
) -> (i64, i64) {
    let length = length as i64;
    let (low, high) = if step < 0 {
        (-1, length - 1)
    } else {
        (0, length)
    };
    let bound = |bound: Option<i64>, default: i64| match bound {
        None => default,
        Some(at) if at < 0 => at.saturating_add(length).max(low),
        Some(at) => at.min(high),
    };
    let (first, last) = if step < 0 { (high, low) } else { (low, high) };
    (bound(start, first), bound(stop, last))
}

/// The places from `start` to before `stop`.
pub(super) fn slice_places((start, stop): (i64, i64), step: i64) -> Vec<usize> {
    let mut at = start;
    let mut found = Vec::new();
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        found.push(at as usize);
        at = at.saturating_add(step);
    }
    found
}
