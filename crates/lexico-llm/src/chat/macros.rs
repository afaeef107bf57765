//! Macros and blocks, as Jinja2 calls and shows them. [`super::translate`] writes them down as minijinja's macros, which
//! take a fixed number of arguments.

use std::sync::Arc;

use lexico::shown::shown;
use minijinja::value::{Object, ObjectRepr, Rest};
use minijinja::{Environment, State, Value};

use super::markup::escapes;
use super::python::{Kind, Made, repr, split_arguments, text, tuple, wrong};

pub(super) fn add_to(environment: &mut Environment) {
    environment.add_filter("__macro", declared);
    environment.add_filter("__blocks", |blocks: Value| {
        Value::from_object(Blocks(blocks))
    });
    environment.add_filter("__written", written);
    environment.add_filter("__recursive", recursive);
    environment.add_function("__flag", || minijinja::functions::namespace(None));
    environment.add_function("__load", |why: &str| -> Made<Value> { Err(wrong(why)) });
    environment.add_test("__missing", |value: &Value| {
        value.downcast_object_ref::<Missing>().is_some()
    });
}

/// What a block's filter or a call makes is written as it stands, and has to be a text.
fn written(value: &Value) -> Made<Value> {
    match Kind::of(value) {
        Kind::Text => Ok(Value::from_safe_string(text(value)?)),
        kind => Err(wrong(format!("a block makes a text, not {}", kind.name()))),
    }
}

/// Stands for an argument that was not given and has a value of its own.
#[derive(Debug)]
struct Missing;

impl Object for Missing {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }
}

/// A macro, or what is between `{% call %}` and its end.
#[derive(Debug)]
pub(super) struct Macro {
    /// A text, or `None` of Python.
    name: Value,
    /// minijinja's macro: it takes all arguments, then the undeclared names.
    body: Value,
    arguments: Vec<String>,
    /// How many of them have no value of their own.
    required: usize,
    /// The undeclared names that it reads: `caller`, `kwargs`, `varargs`.
    undeclared: Vec<String>,
}

/// `body|__macro(name, arguments, those that have a value, undeclared)`
fn declared(body: Value, name: Value, names: Rest<Vec<String>>) -> Made<Value> {
    let Ok([mut arguments, optional, undeclared]) = <[Vec<String>; 3]>::try_from(names.0) else {
        return Err(wrong("a macro has three lists of names"));
    };
    let required = arguments.len();
    arguments.extend(optional);
    Ok(Value::from_object(Macro {
        name,
        body,
        arguments,
        required,
        undeclared,
    }))
}

impl Macro {
    fn reads(&self, name: &str) -> bool {
        self.undeclared.iter().any(|read| read == name)
    }

    /// `repr` of a macro.
    pub(super) fn shown(&self) -> Made<String> {
        match self.name.is_none() {
            true => Ok("<Macro anonymous>".to_owned()),
            false => Ok(format!("<Macro {}>", repr(&self.name)?)),
        }
    }

    /// What the body is called with.
    fn given(&self, args: &[Value]) -> Made<Vec<Value>> {
        let (plain, mut named) = split_arguments(args);
        let mut take = |name: &str| {
            let at = named.iter().position(|(given, _)| given == name)?;
            Some(named.remove(at).1)
        };
        let count = self.arguments.len();
        let mut given: Vec<Value> = plain.iter().take(count).cloned().collect();
        for (at, name) in self.arguments.iter().enumerate().skip(given.len()) {
            given.push(take(name).unwrap_or_else(|| match at < self.required {
                true => Value::UNDEFINED,
                false => Value::from_object(Missing),
            }));
        }
        if self.reads("caller") {
            given.push(
                take("caller")
                    .filter(|caller| !caller.is_none())
                    .unwrap_or_default(),
            );
        }
        if self.reads("kwargs") {
            let named = std::mem::take(&mut named).into_iter();
            given.push(Value::from_pairs(
                named.map(|(name, value)| (Value::from(name), value)),
            ));
        }
        if let Some((name, _)) = named.first() {
            return Err(wrong(format!(
                "a macro takes no argument named \"{}\"",
                shown(name)
            )));
        }
        let more = plain.get(count..).unwrap_or_default();
        if self.reads("varargs") {
            given.push(tuple(more.to_vec()));
        } else if !more.is_empty() {
            return Err(wrong(format!(
                "a macro takes {count} arguments, not {}",
                plain.len()
            )));
        }
        Ok(given)
    }
}

impl Object for Macro {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        Some(match key.as_str()? {
            "name" => self.name.clone(),
            "arguments" => tuple(
                self.arguments
                    .iter()
                    .map(|name| Value::from(name.as_str()))
                    .collect(),
            ),
            "caller" => Value::from(self.reads("caller")),
            "catch_kwargs" => Value::from(self.reads("kwargs")),
            "catch_varargs" => Value::from(self.reads("varargs")),
            "explicit_caller" => Value::from(self.arguments.iter().any(|name| name == "caller")),
            _ => return None,
        })
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Made<Value> {
        // Its own text is escaped as where it stands, what it returns as where it is called.
        let safe = escapes(state);
        let made = self.body.call(state, &self.given(args)?)?;
        match safe {
            true => Ok(Value::from_safe_string(text(&made)?)),
            false => Ok(made),
        }
    }
}

/// `loop` of a recursive loop: minijinja's, at the depth that it is at.
#[derive(Debug)]
struct RecursiveLoop {
    round: Value,
    /// The macro that the loop is.
    body: Value,
    depth: usize,
    caller: Option<Value>,
}

fn recursive(round: Value, body: Value, depth: usize, caller: Option<Value>) -> Value {
    Value::from_object(RecursiveLoop {
        round,
        body,
        depth,
        caller,
    })
}

impl Object for RecursiveLoop {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "depth" => Some(Value::from(self.depth + 1)),
            "depth0" => Some(Value::from(self.depth)),
            _ => self.round.as_object()?.get_value(key),
        }
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Made<Value> {
        let [items] = args else {
            return Err(wrong("loop() takes what it goes through"));
        };
        let mut given = vec![items.clone(), Value::from(self.depth + 1)];
        given.extend(self.caller.clone());
        self.body.call(state, &given)
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State<'_, '_>,
        name: &str,
        args: &[Value],
    ) -> Made<Value> {
        self.round.call_method(state, name, args)
    }
}

/// `self`: the blocks of the template.
#[derive(Debug)]
pub(super) struct Blocks(Value);

impl Object for Blocks {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let found = self.0.get_item(key).ok()?;
        (!found.is_undefined()).then(|| Value::from_object(Block(found)))
    }
}

/// A block that can be called.
#[derive(Debug)]
struct Block(Value);

impl Object for Block {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Made<Value> {
        self.0.call(state, args)
    }
}
