//! What [`super::translate`] writes for Jinja2's operators where minijinja's own do otherwise.

use minijinja::value::Rest;
use minijinja::{Environment, State, Value};

use super::markup::{escaped, escaped_value};
use super::python::{
    Bytes, Kind, LARGEST, Made, Range, attribute, bytes, check_depth, contains, equal, float,
    integer, items, like, list, order, pairs, slice_ends, slice_places, spend, text, tuple, whole,
    wrong,
};
use super::{format, methods};

pub(super) fn add_to(environment: &mut Environment) {
    environment.add_filter("__add", add);
    environment.add_filter("__times", times);
    environment.add_filter("__mod", modulo);
    environment.add_filter("__neg", negative);
    environment.add_filter("__pos", positive);
    environment.add_filter("__concat", concat);
    environment.add_filter("__concat_escaped", concat_escaped);
    environment.add_filter("__compare", compare);
    environment.add_filter("__slice", slice);
    environment.add_filter("__slice_of_constant", slice_of_constant);
    environment.add_filter("__fresh", fresh);
    environment.add_filter("__each", each);
    environment.add_filter("__kept", kept);
    environment.add_filter("__item", item);
    environment.add_filter("__method", method);
}

fn unfit(operator: &str, left: &Value, right: &Value) -> minijinja::Error {
    let (left, right) = (Kind::of(left).name(), Kind::of(right).name());
    wrong(format!("{left} {operator} {right} is not possible"))
}

/// An operator of two numbers: whole ones where both are, `True` and `False` being 1 and 0.
fn calculate(
    left: &Value,
    right: &Value,
    whole: fn(i128, i128) -> Option<i128>,
    fraction: fn(f64, f64) -> f64,
) -> Made<Value> {
    if let (Some(left), Some(right)) = (integer(left), integer(right)) {
        let result = whole(left, right).ok_or_else(|| wrong("a number is too large"));
        return result.map(Value::from);
    }
    match (float(left), float(right)) {
        (Some(left), Some(right)) => Ok(Value::from(fraction(left, right))),
        _ => Err(wrong("that is no number")),
    }
}

/// `left + right`
pub(super) fn add(state: &State, left: &Value, right: &Value) -> Made<Value> {
    match (Kind::of(left), Kind::of(right)) {
        (a, b) if a.is_number() && b.is_number() => {
            calculate(left, right, i128::checked_add, |a, b| a + b)
        }
        (Kind::Text, Kind::Text) => {
            let safe = left.is_safe() || right.is_safe();
            let (mut left_text, mut right_text) = (text(left)?, text(right)?);
            // As Jinja2, whose safe texts stay safe.
            if safe && !left.is_safe() {
                left_text = escaped(&left_text);
            }
            if safe && !right.is_safe() {
                right_text = escaped(&right_text);
            }
            spend(state, left_text.len() + right_text.len())?;
            let sum = left_text + &right_text;
            Ok(if safe {
                Value::from_safe_string(sum)
            } else {
                Value::from(sum)
            })
        }
        (Kind::Bytes, Kind::Bytes) => {
            let sum = [bytes(left), bytes(right)].concat();
            spend(state, sum.len())?;
            Ok(Value::from_object(Bytes(sum)))
        }
        (Kind::List, Kind::List) | (Kind::Tuple, Kind::Tuple) => {
            let mut sum = items(state, left)?;
            sum.extend(items(state, right)?);
            Ok(if left.is_tuple() {
                tuple(sum)
            } else {
                list(sum)
            })
        }
        _ => Err(unfit("+", left, right)),
    }
}

/// `left * right`
fn times(state: &State, left: &Value, right: &Value) -> Made<Value> {
    let (repeated, count) = match integer(right) {
        Some(count) => (left, count),
        None => (right, integer(left).unwrap_or(-1)),
    };
    let times = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    match Kind::of(repeated) {
        Kind::Text | Kind::Bytes | Kind::List | Kind::Tuple
            if integer(left).or(integer(right)).is_none() =>
        {
            Err(unfit("*", left, right))
        }
        Kind::Text => {
            let text = text(repeated)?;
            spend(state, text.len().saturating_mul(times))?;
            Ok(like(repeated, text.repeat(times)))
        }
        Kind::Bytes => {
            let bytes = bytes(repeated);
            spend(state, bytes.len().saturating_mul(times))?;
            Ok(Value::from_object(Bytes(bytes.repeat(times))))
        }
        Kind::List | Kind::Tuple => {
            let items = items(state, repeated)?;
            spend(state, items.len().saturating_mul(times).saturating_mul(48))?;
            let all: Vec<Value> = (0..times).flat_map(|_| items.iter().cloned()).collect();
            Ok(if repeated.is_tuple() {
                tuple(all)
            } else {
                list(all)
            })
        }
        _ if Kind::of(left).is_number() && Kind::of(right).is_number() => {
            calculate(left, right, i128::checked_mul, |a, b| a * b)
        }
        _ => Err(unfit("*", left, right)),
    }
}

/// `left % right`: the remainder, or a text with values put in.
pub(super) fn modulo(state: &State, left: &Value, right: &Value) -> Made<Value> {
    if left.as_str().is_some() {
        return format::percent(state, left, right);
    }
    if !(Kind::of(left).is_number() && Kind::of(right).is_number()) {
        return Err(unfit("%", left, right));
    }
    if float(right) == Some(0.0) {
        return Err(wrong("a remainder of a division by 0"));
    }
    let whole = |a: i128, b: i128| {
        Some(a.checked_rem(b)?).map(|r| {
            if r != 0 && (r < 0) != (b < 0) {
                r + b
            } else {
                r
            }
        })
    };
    calculate(left, right, whole, |a, b| match a % b {
        0.0 => 0f64.copysign(b),
        r if (r < 0.0) != (b < 0.0) => r + b,
        r => r,
    })
}

fn negative(value: &Value) -> Made<Value> {
    if !Kind::of(value).is_number() {
        return Err(wrong(format!(
            "-{} is not possible",
            Kind::of(value).name()
        )));
    }
    calculate(value, &Value::from(0), |a, _| a.checked_neg(), |a, _| -a)
}

fn positive(value: &Value) -> Made<Value> {
    if !Kind::of(value).is_number() {
        return Err(wrong(format!(
            "+{} is not possible",
            Kind::of(value).name()
        )));
    }
    calculate(value, &Value::from(0), |a, _| Some(a), |a, _| a)
}

/// `first ~ others`
fn concat(state: &State, first: &Value, others: Rest<Value>) -> Made<String> {
    joined(state, first, &others, text)
}

/// `first ~ others` within `{% autoescape %}`: where one is safe, the others are escaped.
fn concat_escaped(state: &State, first: &Value, others: Rest<Value>) -> Made<Value> {
    if first.is_safe() || others.iter().any(Value::is_safe) {
        return joined(state, first, &others, escaped_value).map(Value::from_safe_string);
    }
    joined(state, first, &others, text).map(Value::from)
}

fn joined(
    state: &State,
    first: &Value,
    others: &[Value],
    written: fn(&Value) -> Made<String>,
) -> Made<String> {
    let mut joined = written(first)?;
    for other in others {
        joined.push_str(&written(other)?);
        spend(state, joined.len().min(LARGEST) / 16)?;
        if joined.len() > LARGEST {
            return Err(wrong("a text is too large"));
        }
    }
    Ok(joined)
}

/// `left < a <= b`: operators and operands in turn.
fn compare(state: &State, left: &Value, others: Rest<Value>) -> Made<bool> {
    let mut left = left;
    for pair in others.chunks_exact(2) {
        let right = &pair[1];
        let holds = match pair[0].as_str().unwrap_or_default() {
            "==" => equal(state, left, right)?,
            "!=" => !equal(state, left, right)?,
            "in" => contains(state, right, left)?,
            "not in" => !contains(state, right, left)?,
            "<" => order(state, left, right)?.is_some_and(|order| order.is_lt()),
            "<=" => order(state, left, right)?.is_some_and(|order| order.is_le()),
            ">" => order(state, left, right)?.is_some_and(|order| order.is_gt()),
            _ => order(state, left, right)?.is_some_and(|order| order.is_ge()),
        };
        if !holds {
            return Ok(false);
        }
        left = right;
    }
    Ok(true)
}

/// `value[start:stop:step]`
fn slice(state: &State, value: &Value, start: &Value, stop: &Value, step: &Value) -> Made<Value> {
    let kind = Kind::of(value);
    if !matches!(
        kind,
        Kind::Text | Kind::Bytes | Kind::List | Kind::Tuple | Kind::Range
    ) {
        return Err(wrong(format!("{} cannot be sliced", kind.name())));
    }
    let bound = |value: &Value| {
        if value.is_none() {
            return Ok(None);
        }
        match integer(value) {
            Some(at) => whole("slice", Some(Value::from(at)), 0).map(Some),
            None => Err(wrong(format!(
                "what begins or ends at {} cannot be sliced",
                Kind::of(value).name()
            ))),
        }
    };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?);
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(wrong("a slice's step is 0"));
    }
    if let Some(text) = value.as_str() {
        let characters: Vec<char> = text.chars().collect();
        spend(state, text.len())?;
        let places = slice_places(slice_ends(start, stop, step, characters.len()), step);
        let part: String = places.into_iter().map(|at| characters[at]).collect();
        return Ok(like(value, part));
    }
    let ends = slice_ends(start, stop, step, value.len().unwrap_or(0));
    if let Some(range) = value.downcast_object_ref::<Range>() {
        let at = |place: i64| range.start + place * range.step;
        let (start, stop) = (at(ends.0), at(ends.1));
        let step = range.step.saturating_mul(step);
        return Ok(Value::from_object(Range { start, stop, step }));
    }
    if kind == Kind::Bytes {
        let all = bytes(value);
        spend(state, all.len())?;
        let part = slice_places(ends, step).into_iter().map(|at| all[at]);
        return Ok(Value::from_object(Bytes(part.collect())));
    }
    let all = items(state, value)?;
    let found = slice_places(ends, step)
        .into_iter()
        .map(|at| all[at].clone())
        .collect();
    Ok(if kind == Kind::Tuple {
        tuple(found)
    } else {
        list(found)
    })
}

/// A slice where all is written down: Jinja2 works it out beforehand, and what cannot be sliced is undefined.
fn slice_of_constant(
    state: &State,
    value: &Value,
    start: &Value,
    stop: &Value,
    step: &Value,
) -> Made<Value> {
    let kind = Kind::of(value);
    let sliceable = matches!(kind, Kind::Text | Kind::List | Kind::Tuple);
    let is_bound = |value: &Value| value.is_none() || integer(value).is_some();
    match sliceable && [start, stop, step].into_iter().all(is_bound) {
        true => slice(state, value, start, stop, step),
        false => Ok(Value::UNDEFINED),
    }
}

/// A list or dict that is like another one, and not the same.
pub(super) fn fresh(state: &State, value: &Value) -> Made<Value> {
    match Kind::of(value) {
        Kind::Dict => {
            let pairs = pairs(value)?;
            spend(state, pairs.len() * 64)?;
            Ok(Value::from_pairs(pairs))
        }
        _ => items(state, value).map(list),
    }
}

/// What a loop goes through; with `unpacked`, each of it gives more than one name its value.
fn each(state: &State, value: &Value, unpacked: Option<bool>) -> Made<Value> {
    if unpacked.is_none() && Kind::of(value) == Kind::List {
        return Ok(value.clone());
    }
    let mut all = items(state, value)?;
    if unpacked.is_some() {
        for item in &mut all {
            if matches!(Kind::of(item), Kind::Text | Kind::Dict) {
                *item = list(items(state, item)?);
            }
        }
    }
    Ok(list(all))
}

/// `value[name]`
fn item(value: &Value, name: &Value) -> Made<Value> {
    let found = attribute(value, name)?;
    match name.as_str() {
        Some(name) if found.is_undefined() => method(value, name),
        _ => Ok(found),
    }
}

/// What is given a name.
fn kept(state: &State, value: &Value) -> Made<Value> {
    check_depth(state, value, 0)?;
    Ok(value.clone())
}

/// An attribute that has the name of a method, and is not called.
fn method(value: &Value, name: &str) -> Made<Value> {
    if let Some(found) = methods::attribute_of_kind(value, name) {
        return Ok(found);
    }
    attribute(value, &Value::from(name))
}
