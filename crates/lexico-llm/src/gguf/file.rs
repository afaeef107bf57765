//! The container: metadata by key, tensors by name. The format's own document is ggml's `gguf.md`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::iter;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use positioned_io::ReadAt;

use crate::error::{Result, io, refused};
use crate::weights::numbers;

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Far above any vocabulary, and low enough that a small file cannot make much memory.
const MAX_ELEMENTS: u64 = 1 << 24;
/// Bytes of a text, and of a header, at the most: real headers take a twentieth.
const MAX_TEXT_BYTES: u64 = 1 << 24;
const MAX_HEADER_BYTES: u64 = 1 << 28;
/// Bytes of a header that are read at a time.
const HEADER_BUFFER: usize = 1 << 20;
/// Dimensions that ggml's tensors have at the most.
const MAX_DIMENSIONS: u32 = 4;

/// An open file; its header is read.
pub(crate) struct GgufFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    pub(super) tensors: HashMap<String, TensorPlace>,
}

/// A tensor's place in its file.
pub(crate) struct TensorPlace {
    /// Shape as PyTorch has it: rows first.
    pub(crate) shape: Vec<usize>,
    /// The format's own number for it where it is not known here.
    pub(crate) number_type: std::result::Result<GgmlDType, u32>,
    /// Offset from the beginning of the file.
    start: u64,
    bytes: u64,
}

/// A value of the metadata.
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Texts),
    Numbers(Vec<f64>),
}

/// A list of texts, one after the other. Some vocabularies hold pieces that are no UTF-8: there the text has replacement
/// characters, and the bytes are kept beside it.
#[derive(Default)]
pub(super) struct Texts {
    all: String,
    /// Where each of them ends.
    ends: Vec<usize>,
    /// Bytes of those that are no UTF-8, by their place in the list.
    pub(super) not_utf8: HashMap<usize, Vec<u8>>,
}

impl Texts {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, &end)| &self.all[start..end])
    }
}

/// The metadata by key.
type Metadata = HashMap<String, Value>;

impl GgufFile {
    /// Opens `path`, reads its header and checks every tensor's place against the file's length.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io(path))?;
        let about = file.metadata().map_err(io(path))?;
        if !about.is_file() {
            return Err(refused(path, "it is not a regular file"));
        }
        let mut header = Header {
            path,
            reader: BufReader::with_capacity(HEADER_BUFFER, &file),
            position: 0,
            total: about.len(),
        };
        let (metadata, tensors) = header.read()?;
        Ok(Self {
            path: path.to_owned(),
            metadata,
            tensors,
            file,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A value of the metadata, `None` where there is none; one of another type is an error.
    fn value<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let wrong = || self.error(format!("its metadata entry {key:?} is not {kind}"));
        read(value).map(Some).ok_or_else(wrong)
    }

    pub(super) fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.value(key, "a number from 0 on", |value| match value {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.value(key, "a number", |value| match value {
            Value::Float(number) => Some(*number),
            Value::Unsigned(number) => Some(*number as f64),
            Value::Signed(number) => Some(*number as f64),
            _ => None,
        })
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.value(key, "true or false", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.value(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<&Texts>> {
        self.value(key, "a list of texts", |value| match value {
            Value::Texts(texts) => Some(texts),
            _ => None,
        })
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<&[f64]>> {
        self.value(key, "a list of numbers", |value| match value {
            Value::Numbers(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// Fills `out` with the bytes of a tensor from its byte `first` on.
    pub(crate) fn read_bytes(
        &self,
        name: &str,
        tensor: &TensorPlace,
        first: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let last = (first as u64).saturating_add(out.len() as u64);
        if last > tensor.bytes {
            let reason = format!("tensor {name:?} has {} bytes, too few", tensor.bytes);
            return Err(self.error(reason));
        }
        let read = self.file.read_exact_at(tensor.start + first as u64, out);
        read.map_err(io(&self.path))
    }

    /// A small tensor in f32.
    pub(super) fn f32_tensor(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.tensors.get(name) else {
            return Ok(None);
        };
        if tensor.number_type != Ok(GgmlDType::F32) || tensor.bytes > 1 << 20 {
            let reason = format!("tensor {name:?} is no vector of F32 numbers");
            return Err(self.error(reason));
        }
        let mut bytes = vec![0; tensor.bytes as usize];
        self.read_bytes(name, tensor, 0, &mut bytes)?;
        Ok(Some(numbers(GgmlDType::F32, &bytes)))
    }
}

/// A header that is being read; nothing is read or allocated beyond the file's length.
struct Header<'p, R> {
    path: &'p Path,
    reader: R,
    position: u64,
    total: u64,
}

impl<R: Read> Header<'_, R> {
    fn wrong<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(refused(self.path, reason))
    }

    fn read(&mut self) -> Result<(Metadata, HashMap<String, TensorPlace>)> {
        if self.total < 4 || self.bytes::<4>()? != MAGIC {
            return self.wrong("it is not a GGUF file");
        }
        match u32::from_le_bytes(self.bytes()?) {
            2 | 3 => {}
            version if (1..=16).contains(&version.swap_bytes()) => {
                return self.wrong("it is written for big-endian machines, which is not supported");
            }
            version => {
                return self.wrong(format!(
                    "its version {version} is not supported, 2 and 3 are; convert the model again"
                ));
            }
        }
        let tensor_count = self.number()?;
        let entry_count = self.number()?;
        // The least that an entry and a tensor take.
        self.check_room(entry_count, 8 + 4 + 1)?;
        self.check_room(tensor_count, 8 + 4 + 8 + 4 + 8)?;
        let mut metadata = Metadata::new();
        for _ in 0..entry_count {
            let key = self.text()?;
            let value = self.value(&key)?;
            if metadata.contains_key(&key) {
                return self.wrong(format!("it has two metadata entries {key:?}"));
            }
            metadata.insert(key, value);
        }
        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let name = self.text()?;
            let place = self.tensor_place(&name)?;
            if tensors.contains_key(&name) {
                return self.wrong(format!("it has two tensors {name:?}"));
            }
            tensors.insert(name, place);
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(_) => return self.wrong("its general.alignment is no power of two up to 1048576"),
        };
        let data_start = self.position.next_multiple_of(alignment);
        for (name, tensor) in &mut tensors {
            let start = tensor.start.checked_add(data_start);
            let end = start.and_then(|start| start.checked_add(tensor.bytes));
            if end.is_none_or(|end| end > self.total) {
                return self.wrong(format!(
                    "tensor {name:?} of {} bytes at {} goes beyond the end of the file: it is cut \
                     short or damaged",
                    tensor.bytes, tensor.start
                ));
            }
            tensor.start += data_start;
        }
        // A file smaller than its tensors could make any amount of memory.
        let places = tensors.iter().map(|(name, t)| (t.start, t.bytes, name));
        let mut places: Vec<(u64, u64, &String)> = places.collect();
        places.sort_unstable();
        for pair in places.windows(2) {
            let ((start, bytes, name), (next, _, other)) = (pair[0], pair[1]);
            if start + bytes > next {
                return self.wrong(format!("its tensors {name:?} and {other:?} overlap"));
            }
        }
        Ok((metadata, tensors))
    }

    fn tensor_place(&mut self, name: &str) -> Result<TensorPlace> {
        let dimensions = u32::from_le_bytes(self.bytes()?);
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return self.wrong(format!("tensor {name:?} has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        let mut count: u64 = 1;
        for _ in 0..dimensions {
            let size = self.number()?;
            let product = count.checked_mul(size);
            // A tensor never has more numbers than eight a byte of its file.
            let Some(product) = product.filter(|&n| n > 0 && n / 8 <= self.total) else {
                let reason = format!("tensor {name:?} has an impossible dimension of {size}");
                return self.wrong(reason);
            };
            count = product;
            shape.push(size as usize);
        }
        shape.reverse();
        let number_type = number_type(u32::from_le_bytes(self.bytes()?));
        let start = self.number()?;
        let bytes = match number_type {
            // What is not known is not read.
            Err(_) => 0,
            Ok(known) => {
                let block = known.block_size() as u64;
                let width = shape.last().copied().unwrap_or(0) as u64;
                if !width.is_multiple_of(block) {
                    return self.wrong(format!(
                        "tensor {name:?} has rows of {width} numbers, {known:?} needs a multiple \
                         of {block}"
                    ));
                }
                (count / block).saturating_mul(known.type_size() as u64)
            }
        };
        Ok(TensorPlace {
            shape,
            number_type,
            start,
            bytes,
        })
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let kind = u32::from_le_bytes(self.bytes()?);
        match kind {
            8 => Ok(Value::Text(self.text()?)),
            9 => self.array(key),
            _ => {
                let unknown = format!("its metadata entry {key:?} is of unknown type {kind}");
                self.scalar(kind)?.map_or_else(|| self.wrong(unknown), Ok)
            }
        }
    }

    fn array(&mut self, key: &str) -> Result<Value> {
        let kind = u32::from_le_bytes(self.bytes()?);
        let count = self.number()?;
        if count > MAX_ELEMENTS {
            return self.wrong(format!("its metadata entry {key:?} has {count} elements"));
        }
        if kind == 8 {
            self.check_room(count, 8)?;
            return Ok(Value::Texts(self.texts(count)?));
        }
        self.check_room(count, 1)?;
        let mut numbers = Vec::new();
        for _ in 0..count {
            numbers.push(match self.scalar(kind)? {
                Some(Value::Unsigned(number)) => number as f64,
                Some(Value::Signed(number)) => number as f64,
                Some(Value::Float(number)) => number,
                Some(Value::Bool(value)) => f64::from(u8::from(value)),
                _ => {
                    let reason = format!("its metadata entry {key:?} is an array of type {kind}");
                    return self.wrong(reason);
                }
            });
        }
        Ok(Value::Numbers(numbers))
    }

    /// A value that is no text and no array; `None` for a type that is not known.
    fn scalar(&mut self, kind: u32) -> Result<Option<Value>> {
        Ok(Some(match kind {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.bytes()?))),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.bytes()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Unsigned(u64::from(u32::from_le_bytes(self.bytes()?))),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Float(decimal(f32::from_le_bytes(self.bytes()?))),
            7 => Value::Bool(self.bytes::<1>()? != [0]),
            10 => Value::Unsigned(self.number()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => return Ok(None),
        }))
    }

    fn texts(&mut self, count: u64) -> Result<Texts> {
        let mut list = Texts::default();
        for place in 0..count as usize {
            let bytes = self.text_bytes()?;
            let text = String::from_utf8_lossy(&bytes);
            list.all.push_str(&text);
            if let Cow::Owned(_) = text {
                list.not_utf8.insert(place, bytes);
            }
            list.ends.push(list.all.len());
        }
        Ok(list)
    }

    fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.text_bytes()?).into_owned())
    }

    fn text_bytes(&mut self) -> Result<Vec<u8>> {
        let length = self.number()?;
        self.check_room(length, 1)?;
        if length > MAX_TEXT_BYTES {
            return self.wrong(format!("its header holds a text of {length} bytes"));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        self.check_room(out.len() as u64, 1)?;
        self.reader.read_exact(out).map_err(io(self.path))?;
        self.position += out.len() as u64;
        if self.position > MAX_HEADER_BYTES {
            let reason = format!("its header is larger than {MAX_HEADER_BYTES} bytes");
            return self.wrong(reason);
        }
        Ok(())
    }

    fn check_room(&self, count: u64, bytes_each: u64) -> Result<()> {
        match count.checked_mul(bytes_each) {
            Some(bytes) if bytes <= self.total - self.position => Ok(()),
            _ => self.wrong("it is cut short: its header goes beyond its end"),
        }
    }
}

/// The number that people wrote: 0.00001 rather than the f32 next to it.
fn decimal(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// ggml's numbers of the types that candle has products for.
fn number_type(number: u32) -> std::result::Result<GgmlDType, u32> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => return Err(other),
    })
}
