//! The functions that transformers and Jinja2 give to templates.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use minijinja::value::{Object, ObjectRepr, Rest, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::python::{
    Kind, Made, Range, arguments, check_key, is_loop, items, let_go, needed, needed_text, pairs,
    spend, split_arguments, text, whole, wrong,
};

type Function = fn(&mut State, &[Value]) -> Made<Value>;

/// The class that transformers has for namespaces.
const NAMESPACE_CLASS: &str = "transformers.utils.chat_template_utils._cached_compile_jinja_template.<locals>.TemplateNamespace";

/// Longest `range`, as in Jinja2's sandbox.
const LONGEST_RANGE: usize = 100_000;

pub(super) fn add_to(environment: &mut Environment) {
    let functions: [(&'static str, Function); 4] = [
        ("range", range),
        ("lipsum", |_, _| {
            Err(wrong("lipsum() is not taken: its text is random"))
        }),
        ("raise_exception", raise_exception),
        ("strftime_now", strftime_now),
    ];
    for (name, function) in functions {
        environment.add_function(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            function(state, &args.into_values())
        });
    }
    environment.add_filter("__set", set_attribute);
    let classes: [(&'static str, Option<&'static str>, Function); 4] = [
        ("dict", None, |state, args| dict(state, args)),
        ("namespace", Some(NAMESPACE_CLASS), namespace),
        ("cycler", Some("jinja2.utils.Cycler"), cycler),
        ("joiner", Some("jinja2.utils.Joiner"), joiner),
    ];
    for (global, shown, make) in classes {
        environment.add_global(
            global,
            Value::from_object(Class {
                global,
                shown,
                make,
            }),
        );
    }
}

fn range(_: &mut State, args: &[Value]) -> Made<Value> {
    let number = |value: &Value| whole("range()", Some(value.clone()), 0);
    let (start, stop, step) = match args {
        [stop] => (0, number(stop)?, 1),
        [start, stop] => (number(start)?, number(stop)?, 1),
        [start, stop, step] => (number(start)?, number(stop)?, number(step)?),
        _ => return Err(wrong("range() takes one to three numbers")),
    };
    if step == 0 {
        return Err(wrong("range() takes no step of 0"));
    }
    let range = Range { start, stop, step };
    if range.length() > LONGEST_RANGE {
        return Err(wrong(format!(
            "a range of more than {LONGEST_RANGE} numbers"
        )));
    }
    Ok(Value::from_object(range))
}

/// A class of Python's, `dict` say: it makes what it is called for, and has a name to be printed.
#[derive(Debug)]
struct Class {
    global: &'static str,
    /// Its name in Python, where that can be printed.
    shown: Option<&'static str>,
    make: Function,
}

/// The name of a class where a value is one.
pub(super) fn class_name(value: &Value) -> Option<&'static str> {
    value.downcast_object_ref::<Class>()?.shown
}

impl Object for Class {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Made<Value> {
        (self.make)(state, args)
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State<'_, '_>,
        name: &str,
        args: &[Value],
    ) -> Made<Value> {
        match name {
            "fromkeys" if self.global == "dict" => from_keys(state, args),
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// `dict(mapping or pairs, **named)`
fn dict(state: &State, args: &[Value]) -> Made<Value> {
    let (plain, named) = split_arguments(args);
    let mut all = match plain {
        [] => Vec::new(),
        [one] if Kind::of(one) == Kind::Dict => pairs(one)?,
        [one] => {
            let mut all = Vec::new();
            for pair in items(state, one)? {
                let pair = items(state, &pair)?;
                let [key, value] = pair.as_slice() else {
                    return Err(wrong("dict() takes pairs"));
                };
                check_key(key)?;
                all.push((key.clone(), value.clone()));
            }
            all
        }
        _ => return Err(wrong("dict() takes one mapping")),
    };
    spend(state, all.len() * 96)?;
    all.extend(
        named
            .into_iter()
            .map(|(name, value)| (Value::from(name), value)),
    );
    Ok(Value::from_pairs(all))
}

/// `dict.fromkeys(keys, value)`
pub(super) fn from_keys(state: &State, args: &[Value]) -> Made<Value> {
    let mut given = arguments("fromkeys", args, &["iterable", "value"])?.into_iter();
    let keys = items(state, &needed("fromkeys", given.next().flatten())?)?;
    let value = given.next().flatten().unwrap_or(Value::from(()));
    keys.iter().try_for_each(check_key)?;
    Ok(Value::from_pairs(
        keys.into_iter().map(|key| (key, value.clone())),
    ))
}

/// `namespace(a=1)`: what `{% set %}` gives attributes, each with its place among them.
#[derive(Debug, Default)]
pub(super) struct Namespace(Mutex<BTreeMap<String, (usize, Value)>>);

impl Namespace {
    /// The attributes in the order in which they were first set.
    pub(super) fn attributes(&self) -> Vec<(String, Value)> {
        let Ok(attributes) = self.0.lock() else {
            return Vec::new();
        };
        let mut all: Vec<_> = attributes.iter().collect();
        all.sort_by_key(|(_, (place, _))| *place);
        let all = all.into_iter();
        all.map(|(name, (_, value))| (name.clone(), value.clone()))
            .collect()
    }

    fn set(&self, name: &str, value: Value) {
        if let Ok(mut attributes) = self.0.lock() {
            let next = attributes.len();
            let place = attributes.get(name).map_or(next, |(place, _)| *place);
            attributes.insert(name.to_owned(), (place, value));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Ok(attributes) = self.0.get_mut() {
            let attributes = std::mem::take(attributes).into_values();
            let_go(attributes.map(|(_, value)| value));
        }
    }
}

impl Object for Namespace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let attributes = self.0.lock().ok()?;
        let (_, value) = attributes.get(key.as_str()?)?;
        Some(value.clone())
    }
}

fn namespace(state: &mut State, args: &[Value]) -> Made<Value> {
    let namespace = Namespace::default();
    for (name, value) in pairs(&dict(state, args)?)? {
        match name.as_str() {
            Some(name) if !name.starts_with('_') => namespace.set(name, value),
            _ => {
                return Err(wrong(
                    "an attribute of a namespace may not begin with \"_\"",
                ));
            }
        }
    }
    Ok(Value::from_object(namespace))
}

/// `{% set namespace.name = value %}`
fn set_attribute(namespace: &Value, name: &str, value: Value) -> Made<Value> {
    let Some(namespace) = namespace.downcast_object_ref::<Namespace>() else {
        return Err(wrong("only a namespace has attributes that can be set"));
    };
    if holds_loop(&value)? {
        // It holds what it goes through, which may be the loop before, and so on: to let go would take all of the stack.
        return Err(wrong("a loop that a namespace keeps is not taken"));
    }
    namespace.set(name, value);
    Ok(Value::from(""))
}

fn holds_loop(value: &Value) -> Made<bool> {
    let items = match Kind::of(value) {
        Kind::Other => return Ok(is_loop(value)),
        Kind::List | Kind::Tuple => value.try_iter()?.collect(),
        Kind::Dict => pairs(value)?.into_iter().map(|(_, item)| item).collect(),
        _ => Vec::new(),
    };
    for item in items {
        if item.as_object().is_some() && holds_loop(&item)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn raise_exception(_: &mut State, args: &[Value]) -> Made<Value> {
    let message = arguments("raise_exception", args, &["message"])?
        .pop()
        .flatten();
    Err(wrong(text(&needed("raise_exception", message)?)?))
}

/// The time of day where the program runs, as transformers gives it to templates.
fn strftime_now(_: &mut State, args: &[Value]) -> Made<Value> {
    let format = arguments("strftime_now", args, &["format"])?
        .pop()
        .flatten();
    let format = needed_text("strftime_now", format)?;
    let text = jiff::fmt::strtime::format(&format, jiff::Zoned::now().datetime());
    text.map(Value::from)
        .map_err(|e| wrong(format!("strftime_now: {e}")))
}

/// `cycler('a', 'b')`: gives its items in turn.
#[derive(Debug)]
pub(super) struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

fn cycler(_: &mut State, args: &[Value]) -> Made<Value> {
    let (items, named) = split_arguments(args);
    if items.is_empty() || !named.is_empty() {
        return Err(wrong("cycler() takes items"));
    }
    let (items, at) = (items.to_vec(), AtomicUsize::new(0));
    Ok(Value::from_object(Cycler { items, at }))
}

impl Cycler {
    fn current(&self) -> Value {
        self.items[self.at.load(Ordering::Relaxed) % self.items.len()].clone()
    }
}

impl Drop for Cycler {
    fn drop(&mut self) {
        let_go(std::mem::take(&mut self.items));
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.current())
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        name: &str,
        _: &[Value],
    ) -> Made<Value> {
        match name {
            "next" => {
                let current = self.current();
                self.at.fetch_add(1, Ordering::Relaxed);
                Ok(current)
            }
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// `joiner(', ')`: nothing the first time, the text from then on.
#[derive(Debug)]
struct Joiner {
    text: Value,
    used: AtomicUsize,
}

fn joiner(_: &mut State, args: &[Value]) -> Made<Value> {
    let text = arguments("joiner", args, &["sep"])?.pop().flatten();
    let text = text.unwrap_or(Value::from(", "));
    Ok(Value::from_object(Joiner {
        text,
        used: AtomicUsize::new(0),
    }))
}

impl Drop for Joiner {
    fn drop(&mut self) {
        let_go([std::mem::take(&mut self.text)]);
    }
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, _: &[Value]) -> Made<Value> {
        match self.used.fetch_add(1, Ordering::Relaxed) {
            0 => Ok(Value::from("")),
            _ => Ok(self.text.clone()),
        }
    }
}
