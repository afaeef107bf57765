//! The little of Python's pickle format that `torch.save(tensor)` writes.
//!
//! Pickles are programs, and a hostile one can loop, nest or grow without end. This reader knows
//! the dozen instructions that a saved tensor takes, runs none of the names it meets, and stops
//! after as many steps as such a file can need.

use std::rc::Rc;

/// A tensor's place in a PyTorch file.
#[derive(Debug, PartialEq)]
pub(crate) struct SavedTensor {
    /// Name of the storage's class: `FloatStorage`, `HalfStorage`, …
    pub(crate) storage: String,
    /// The file in the archive's `data` folder.
    pub(crate) key: String,
    /// First element, counted in elements.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    /// Offset in elements.
    pub(crate) strides: Vec<usize>,
}

/// Instructions of a file with one tensor; torch writes about 40.
const MAX_STEPS: usize = 1000;

#[derive(Debug, Clone)]
enum Value {
    Mark,
    Text(String),
    Number(i64),
    /// A class or function, named and never called.
    Name(String),
    Tuple(Vec<Rc<Value>>),
    Dict(Vec<(Rc<Value>, Rc<Value>)>),
    /// Storage that a persistent id stands for.
    Persistent(Rc<Value>),
    /// A call, kept as it stands.
    Call(Rc<Value>, Rc<Value>),
    /// `None`, `True`, `False`: of no interest here.
    Other,
}

/// Reads the one tensor of a pickle, or the only entry of a dict.
pub(crate) fn read_tensor(bytes: &[u8]) -> Result<SavedTensor, String> {
    let value = Machine::default().run(bytes)?;
    let mut value = value.as_ref();
    if let Value::Dict(entries) = value {
        let [(_, only)] = entries.as_slice() else {
            let count = entries.len();
            return Err(format!("it holds {count} objects, not one tensor"));
        };
        value = only.as_ref();
    }
    tensor(value).ok_or_else(|| "what it holds is not a tensor".to_owned())
}

/// `_rebuild_tensor_v2(storage, offset, shape, strides, …)`
fn tensor(value: &Value) -> Option<SavedTensor> {
    let Value::Call(function, arguments) = value else {
        return None;
    };
    let rebuilds = |name: &str| name == "torch._utils _rebuild_tensor_v2";
    if !matches!(function.as_ref(), Value::Name(name) if rebuilds(name)) {
        return None;
    }
    let [storage, offset, shape, strides, ..] = tuple(arguments)? else {
        return None;
    };
    let Value::Persistent(id) = storage.as_ref() else {
        return None;
    };
    // ('storage', class, key, device, elements)
    let [_, class, key, ..] = tuple(id)? else {
        return None;
    };
    let (Value::Name(class), Value::Text(key)) = (class.as_ref(), key.as_ref()) else {
        return None;
    };
    let sizes = |value| tuple(value)?.iter().map(size).collect::<Option<Vec<_>>>();
    Some(SavedTensor {
        storage: class.strip_prefix("torch ")?.to_owned(),
        key: key.clone(),
        offset: size(offset)?,
        shape: sizes(shape)?,
        strides: sizes(strides)?,
    })
}

fn tuple(value: &Rc<Value>) -> Option<&[Rc<Value>]> {
    match value.as_ref() {
        Value::Tuple(values) => Some(values),
        _ => None,
    }
}

fn size(value: &Rc<Value>) -> Option<usize> {
    match value.as_ref() {
        Value::Number(number) => usize::try_from(*number).ok(),
        _ => None,
    }
}

#[derive(Default)]
struct Machine {
    stack: Vec<Rc<Value>>,
    memo: Vec<(u32, Rc<Value>)>,
}

impl Machine {
    fn run(mut self, mut bytes: &[u8]) -> Result<Rc<Value>, String> {
        for _ in 0..MAX_STEPS {
            let [instruction] = take::<1>(&mut bytes)?;
            let value = match instruction {
                // PROTO
                0x80 => {
                    take::<1>(&mut bytes)?;
                    continue;
                }
                // STOP
                b'.' => return self.pop(),
                b'(' => Value::Mark,
                // GLOBAL
                b'c' => {
                    let module = line(&mut bytes)?;
                    Value::Name(format!("{module} {}", line(&mut bytes)?))
                }
                // BINUNICODE
                b'X' => {
                    let length = u32::from_le_bytes(take(&mut bytes)?) as usize;
                    let (text, rest) = bytes.split_at_checked(length).ok_or_else(cut)?;
                    bytes = rest;
                    Value::Text(String::from_utf8_lossy(text).into_owned())
                }
                // BININT1, BININT2, BININT
                b'K' => Value::Number(i64::from(take::<1>(&mut bytes)?[0])),
                b'M' => Value::Number(i64::from(u16::from_le_bytes(take(&mut bytes)?))),
                b'J' => Value::Number(i64::from(i32::from_le_bytes(take(&mut bytes)?))),
                // LONG1: little-endian, two's complement, of any length
                0x8a => {
                    let [length] = take::<1>(&mut bytes)?;
                    let (digits, rest) = bytes.split_at_checked(length.into()).ok_or_else(cut)?;
                    bytes = rest;
                    let negative = digits.last().is_some_and(|d| d & 0x80 != 0);
                    let mut number = [if negative { 0xff } else { 0 }; 8];
                    let place = number.get_mut(..digits.len());
                    let place = place.ok_or("a number is too large")?;
                    place.copy_from_slice(digits);
                    Value::Number(i64::from_le_bytes(number))
                }
                // NONE, NEWTRUE, NEWFALSE
                b'N' | 0x88 | 0x89 => Value::Other,
                b')' => Value::Tuple(Vec::new()),
                // TUPLE1, TUPLE2, TUPLE3
                0x85..=0x87 => {
                    let count = usize::from(instruction - 0x84);
                    let start = self.stack.len().checked_sub(count).ok_or_else(cut)?;
                    Value::Tuple(self.stack.split_off(start))
                }
                b't' => Value::Tuple(self.pop_to_mark()?),
                b'}' => Value::Dict(Vec::new()),
                // SETITEM, SETITEMS
                b's' | b'u' => {
                    let items = if instruction == b's' {
                        let start = self.stack.len().checked_sub(2).ok_or_else(cut)?;
                        self.stack.split_off(start)
                    } else {
                        self.pop_to_mark()?
                    };
                    let Value::Dict(entries) = self.pop()?.as_ref().clone() else {
                        return Err("items are set on what is not a dict".to_owned());
                    };
                    let new = items.as_chunks::<2>().0.iter();
                    let new = new.map(|[key, value]| (key.clone(), value.clone()));
                    Value::Dict(entries.into_iter().chain(new).collect())
                }
                // BINPERSID
                b'Q' => Value::Persistent(self.pop()?),
                // REDUCE
                b'R' => {
                    let arguments = self.pop()?;
                    Value::Call(self.pop()?, arguments)
                }
                // BINPUT, LONG_BINPUT
                b'q' | b'r' => {
                    let place = memo_place(instruction == b'r', &mut bytes)?;
                    let top = self.stack.last().ok_or_else(cut)?;
                    self.memo.push((place, top.clone()));
                    continue;
                }
                // BINGET, LONG_BINGET
                b'h' | b'j' => {
                    let place = memo_place(instruction == b'j', &mut bytes)?;
                    let known = self.memo.iter().rev().find(|(at, _)| *at == place);
                    let (_, value) = known.ok_or("it recalls what it never stored")?;
                    self.stack.push(value.clone());
                    continue;
                }
                other => {
                    let reason = format!("instruction {other:#04x} is none of a saved tensor's");
                    return Err(reason);
                }
            };
            self.stack.push(Rc::new(value));
        }
        Err("it is longer than a saved tensor".to_owned())
    }

    fn pop(&mut self) -> Result<Rc<Value>, String> {
        self.stack.pop().ok_or_else(cut)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Rc<Value>>, String> {
        let is_mark = |value: &Rc<Value>| matches!(value.as_ref(), Value::Mark);
        let mark = self.stack.iter().rposition(is_mark);
        let values = self.stack.split_off(mark.ok_or_else(cut)? + 1);
        self.stack.pop();
        Ok(values)
    }
}

fn cut() -> String {
    "it is cut short".to_owned()
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], String> {
    let (taken, rest) = bytes.split_first_chunk::<N>().ok_or_else(cut)?;
    *bytes = rest;
    Ok(*taken)
}

fn line(bytes: &mut &[u8]) -> Result<String, String> {
    let end = bytes.iter().position(|&b| b == b'\n').ok_or_else(cut)?;
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    *bytes = &bytes[end + 1..];
    Ok(text)
}

fn memo_place(long: bool, bytes: &mut &[u8]) -> Result<u32, String> {
    Ok(if long {
        u32::from_le_bytes(take(bytes)?)
    } else {
        u32::from(take::<1>(bytes)?[0])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_programs_end() {
        let refused = |program: Vec<u8>| read_tensor(&program).unwrap_err();
        // Copies of copies, nesting without end, calls without arguments, an empty stack.
        let doubling = [&b")q\0"[..], &b"h\0h\0\x86q\0".repeat(40), b"."].concat();
        assert!(refused(doubling).contains("not a tensor"));
        assert!(refused([&b")"[..], &b"\x85".repeat(1_000_000)].concat()).contains("longer"));
        assert!(
            refused(b"ctorch._utils\n_rebuild_tensor_v2\n)R.".to_vec()).contains("not a tensor")
        );
        for program in [
            &b"R."[..],
            b".",
            b"",
            b"t.",
            b"s.",
            b"X\xff\xff\xff\xff",
            b"h\x05.",
            b"cno line",
        ] {
            refused(program.to_vec());
        }
        assert!(refused(b"\x8a\x09123456789.".to_vec()).contains("too large"));
        assert!(refused(b"cos\nsystem\nX\x02\0\0\0ls\x85R.".to_vec()).contains("not a tensor"));
    }
}
