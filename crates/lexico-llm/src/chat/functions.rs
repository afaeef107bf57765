//! The functions that transformers and Jinja2 give to templates.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Object, ObjectRepr, Rest, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::python::{
    Kind, Made, Range, arguments, check_key, items, needed, needed_text, pairs, spend,
    split_arguments, text, whole, wrong,
};

type Function = fn(&mut State, &[Value]) -> Made<Value>;

/// The class that transformers has for namespaces.
const NAMESPACE: &str = "transformers.utils.chat_template_utils._cached_compile_jinja_template.<locals>.TemplateNamespace";

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
    let classes: [(&'static str, Option<&'static str>, Function); 4] = [
        ("dict", None, |state, args| dict(state, args)),
        ("namespace", Some(NAMESPACE), namespace),
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

fn namespace(state: &mut State, args: &[Value]) -> Made<Value> {
    let mut attributes = pairs(&dict(state, args)?)?;
    for (name, _) in &attributes {
        if name.as_str().is_none_or(|name| name.starts_with('_')) {
            return Err(wrong(
                "an attribute of a namespace may not begin with \"_\"",
            ));
        }
    }
    // One that no template can name, lest an empty namespace be false.
    attributes.push((Value::from(""), Value::from(true)));
    minijinja::functions::namespace(Some(ValueOrKwargs::from(Value::from_pairs(attributes))))
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
