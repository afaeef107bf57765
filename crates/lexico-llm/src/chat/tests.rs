//! Jinja2's tests: `value is even`.

use minijinja::tests::is_sameas;
use minijinja::value::{Rest, ValueOrKwargs};
use minijinja::{Environment, ErrorKind, State, Value};

use super::operators::modulo;
use super::python::{
    Kind, Made, arguments, contains, equal, integer, is_iterable, is_loop, needed, needed_text,
    order, text, wrong,
};

/// A test of what kind of value there is.
type OfKind = fn(Kind) -> bool;
type Test = fn(&mut State, &Value, &[Value]) -> Made<bool>;

pub(super) fn add_to(environment: &mut Environment) {
    let of_kind: [(&'static str, OfKind); 10] = [
        ("defined", |kind| kind != Kind::Undefined),
        ("undefined", |kind| kind == Kind::Undefined),
        ("none", |kind| kind == Kind::None),
        ("boolean", |kind| kind == Kind::Bool),
        ("integer", |kind| kind == Kind::Integer),
        ("float", |kind| kind == Kind::Float),
        ("number", Kind::is_number),
        ("string", |kind| kind == Kind::Text),
        ("mapping", |kind| kind == Kind::Dict),
        ("sequence", |kind| {
            use Kind::{Bytes, Dict, List, Range, Text, Tuple, Undefined};
            matches!(kind, Undefined | Text | Bytes | List | Tuple | Dict | Range)
        }),
    ];
    for (name, test) in of_kind {
        environment.add_test(name, move |value: Value| test(Kind::of(&value)));
    }
    environment.add_test("callable", |value: Value| {
        is_loop(&value) || matches!(Kind::of(&value), Kind::Callable | Kind::Undefined)
    });
    environment.add_test("iterable", |value: Value| {
        is_loop(&value) || is_iterable(&value)
    });
    environment.add_test("escaped", |value: Value| value.is_safe());
    environment.add_test("true", |value: Value| {
        Kind::of(&value) == Kind::Bool && value.is_true()
    });
    environment.add_test("false", |value: Value| {
        Kind::of(&value) == Kind::Bool && !value.is_true()
    });
    let of_values: [(&'static str, Test); 22] = [
        ("even", |state, value, args| {
            remainder(state, value, 2, 0, args)
        }),
        ("odd", |state, value, args| {
            remainder(state, value, 2, 1, args)
        }),
        ("divisibleby", divisible),
        ("lower", |_, value, _| {
            cased(value, char::is_lowercase, char::is_uppercase)
        }),
        ("upper", |_, value, _| {
            cased(value, char::is_uppercase, char::is_lowercase)
        }),
        ("eq", is_equal),
        ("equalto", is_equal),
        ("==", is_equal),
        ("ne", |state, value, args| {
            is_equal(state, value, args).map(|equal| !equal)
        }),
        ("!=", |state, value, args| {
            is_equal(state, value, args).map(|equal| !equal)
        }),
        ("lt", |state, value, args| {
            ordered(state, value, args, |o| o.is_lt())
        }),
        ("<", |state, value, args| {
            ordered(state, value, args, |o| o.is_lt())
        }),
        ("lessthan", |state, value, args| {
            ordered(state, value, args, |o| o.is_lt())
        }),
        ("le", |state, value, args| {
            ordered(state, value, args, |o| o.is_le())
        }),
        ("<=", |state, value, args| {
            ordered(state, value, args, |o| o.is_le())
        }),
        ("gt", |state, value, args| {
            ordered(state, value, args, |o| o.is_gt())
        }),
        (">", |state, value, args| {
            ordered(state, value, args, |o| o.is_gt())
        }),
        ("greaterthan", |state, value, args| {
            ordered(state, value, args, |o| o.is_gt())
        }),
        ("ge", |state, value, args| {
            ordered(state, value, args, |o| o.is_ge())
        }),
        (">=", |state, value, args| {
            ordered(state, value, args, |o| o.is_ge())
        }),
        ("in", |state, value, args| {
            contains(state, &other("in", args)?, value)
        }),
        ("sameas", same),
    ];
    for (name, test) in of_values {
        environment.add_test(
            name,
            move |state: &mut State, value: Value, args: Rest<ValueOrKwargs>| {
                test(state, &value, &args.into_values())
            },
        );
    }
    environment.add_test("filter", |name: Value| -> Made<bool> {
        let name = needed_text("filter", Some(name))?;
        Ok(super::filters::is_filter(&name))
    });
    environment.add_test("test", |state: &mut State, name: Value| -> Made<bool> {
        let name = needed_text("test", Some(name))?;
        // Of an unknown name this is an error of that kind.
        let asked = state.perform_test(&name, &[]);
        Ok(!asked.is_err_and(|error| error.kind() == ErrorKind::UnknownTest))
    });
}

fn other(test: &str, args: &[Value]) -> Made<Value> {
    needed(test, arguments(test, args, &["other"])?.pop().flatten())
}

fn is_equal(state: &mut State, value: &Value, args: &[Value]) -> Made<bool> {
    equal(state, value, &other("eq", args)?)
}

fn ordered(
    state: &mut State,
    value: &Value,
    args: &[Value],
    holds: fn(std::cmp::Ordering) -> bool,
) -> Made<bool> {
    Ok(order(state, value, &other("a comparison", args)?)?.is_some_and(holds))
}

fn remainder(state: &mut State, value: &Value, of: i64, wanted: i64, args: &[Value]) -> Made<bool> {
    arguments("even or odd", args, &[])?;
    let rest = modulo(state, value, &Value::from(of))?;
    equal(state, &rest, &Value::from(wanted))
}

fn divisible(state: &mut State, value: &Value, args: &[Value]) -> Made<bool> {
    let by = needed(
        "divisibleby",
        arguments("divisibleby", args, &["num"])?.pop().flatten(),
    )?;
    let rest = modulo(state, value, &by)?;
    equal(state, &rest, &Value::from(0))
}

fn cased(value: &Value, wanted: fn(char) -> bool, other: fn(char) -> bool) -> Made<bool> {
    let text = text(value)?;
    Ok(text.contains(wanted) && !text.contains(other))
}

/// `is` of Python. Whether equal values that cannot change are one is Python's own affair, but for the few that it
/// always keeps.
fn same(state: &mut State, value: &Value, args: &[Value]) -> Made<bool> {
    let other = other("sameas", args)?;
    let kind = Kind::of(value);
    if kind != Kind::of(&other) {
        return Ok(false);
    }
    let kept = match kind {
        Kind::None | Kind::Bool => true,
        Kind::Integer => integer(value).is_some_and(|number| (-5..=256).contains(&number)),
        Kind::Text => value.as_str().is_some_and(|text| {
            !value.is_safe() && text.chars().count() < 2 && text.chars().all(|c| c <= '\u{ff}')
        }),
        Kind::Float | Kind::Tuple | Kind::Bytes | Kind::Undefined => false,
        _ => return Ok(is_sameas(value, &other)),
    };
    match equal(state, value, &other)? {
        true if !kept => Err(wrong(
            "sameas of equal texts, numbers or tuples is not taken",
        )),
        equal => Ok(equal),
    }
}
