//! Lines of JSON, and lists of JSON objects: one field of each object is a text.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use lexico::shown::shown;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::{MAX_JSON, PIECE, Texts, add, add_share, cut_at};
use crate::error::{Result, io, listed, refused};

/// Opens a file of JSON: a list where it begins as one, else lines.
pub(super) fn open(path: &Path, field: &str) -> Result<Box<dyn Texts>> {
    let file = File::open(path).map_err(io(path))?;
    let length = file.metadata().map_err(io(path))?.len();
    let mut start = Vec::new();
    let read = file.take(PIECE as u64).read_to_end(&mut start);
    read.map_err(io(path))?;
    let first = without_mark(&start).trim_ascii_start().first();
    if first == Some(&b'[') {
        return Ok(Box::new(List::read(path, length, field)?));
    }
    Ok(Box::new(LinesFile {
        path: path.to_owned(),
        field: field.to_owned(),
        length,
    }))
}

/// A file with an object in every line, or in some.
struct LinesFile {
    path: PathBuf,
    field: String,
    length: u64,
}

impl LinesFile {
    /// Finds the beginning of the line that holds byte `at`.
    fn line_start(&self, file: &mut File, at: u64) -> std::io::Result<u64> {
        let mut end = at;
        let mut bytes = Vec::with_capacity(PIECE);
        // No line is longer: what is found in the middle of one is refused as such.
        while end > at.saturating_sub(MAX_JSON) {
            let start = end.saturating_sub(PIECE as u64);
            bytes.clear();
            file.seek(SeekFrom::Start(start))?;
            file.take(end - start).read_to_end(&mut bytes)?;
            if let Some(last) = bytes.iter().rposition(|&b| b == b'\n') {
                return Ok(start + last as u64 + 1);
            }
            end = start;
        }
        Ok(end)
    }

    fn refused(&self, start: u64, reason: &str) -> crate::Error {
        match self.line_number(start) {
            Ok(number) => refused(&self.path, format!("line {number}: {reason}")),
            Err(error) => io(&self.path)(error),
        }
    }

    /// The number of the line that begins at byte `start`, the first being 1.
    fn line_number(&self, start: u64) -> std::io::Result<u64> {
        let mut before = BufReader::new(File::open(&self.path)?.take(start));
        let mut number = 1;
        while before.skip_until(b'\n')? > 0 {
            number += 1;
        }
        Ok(number)
    }
}

impl Texts for LinesFile {
    fn length(&self) -> u64 {
        self.length
    }

    fn read(&self, block: Range<u64>) -> Result<String> {
        let mut file = File::open(&self.path).map_err(io(&self.path))?;
        let start = self.line_start(&mut file, block.start);
        let mut start = start.map_err(io(&self.path))?;
        file.seek(SeekFrom::Start(start)).map_err(io(&self.path))?;
        let mut file = BufReader::new(file);
        let mut texts = String::new();
        let mut line = Vec::new();
        while start < block.end {
            let read = read_line(&mut file, &mut line).map_err(io(&self.path))?;
            if read == 0 {
                break;
            }
            let place = start..start + read as u64;
            // A short line of the block before is not looked at.
            let long = place.end - place.start > block.end - block.start;
            if long || block.contains(&start) {
                let text = document(&line, &self.field);
                let text = text.map_err(|reason| self.refused(start, &reason))?;
                add_share(&mut texts, &text.unwrap_or_default(), &place, &block);
            }
            start = place.end;
        }
        Ok(texts)
    }
}

/// A file that is one list of objects, held as text: JSON cannot be entered in the middle.
struct List {
    texts: String,
}

impl List {
    fn read(path: &Path, length: u64, field: &str) -> Result<Self> {
        if length > MAX_JSON {
            let max = MAX_JSON >> 20;
            let reason = format!(
                "a list of JSON of more than {max} MiB is not read; write each object in a line of its own, as by \
                 `jq -c '.[]'`, to a .jsonl file"
            );
            return Err(refused(path, reason));
        }
        let bytes = std::fs::read(path).map_err(io(path))?;
        let mut texts = String::new();
        let mut json = serde_json::Deserializer::from_slice(without_mark(&bytes));
        let list = Objects {
            field,
            texts: &mut texts,
        };
        json.deserialize_seq(list)
            .and_then(|()| json.end())
            .map_err(|e| {
                refused(
                    path,
                    format!("not a list of JSON objects with texts: {}", shown(e)),
                )
            })?;
        Ok(Self { texts })
    }
}

impl Texts for List {
    fn length(&self) -> u64 {
        self.texts.len() as u64
    }

    fn read(&self, block: Range<u64>) -> Result<String> {
        let at = |byte: u64| cut_at(&self.texts, byte.min(self.length()) as usize);
        Ok(self.texts[at(block.start)..at(block.end)].to_owned())
    }
}

/// Reads a line with its end; the count of its bytes is 0 at the end of the file.
pub(super) fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<usize> {
    line.clear();
    input.take(MAX_JSON + 1).read_until(b'\n', line)
}

/// The text in `field` of a line; blank lines and `null` have none. Else what is wrong with it.
pub(super) fn document(line: &[u8], field: &str) -> std::result::Result<Option<String>, String> {
    if line.len() as u64 > MAX_JSON {
        let max = MAX_JSON >> 20;
        return Err(format!(
            "it is longer than {max} MiB; is this JSON with an object in each line?"
        ));
    }
    let line = without_mark(line).trim_ascii();
    if line.is_empty() {
        return Ok(None);
    }
    let mut json = serde_json::Deserializer::from_slice(line);
    let text = json.deserialize_any(Object { field });
    text.and_then(|text| json.end().map(|()| text))
        // It counts lines and columns in the line alone.
        .map_err(|e| match e.classify() {
            serde_json::error::Category::Data => without_place(&e),
            _ => format!("not JSON: {} (column {})", without_place(&e), e.column()),
        })
}

fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.rsplit_once(" at line ").map(|(reason, _)| reason);
    shown(reason.unwrap_or(&text))
}

/// Strips the mark that some programs begin UTF-8 with.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// Takes the text in `field` of an object, passing over all else.
#[derive(Clone, Copy)]
struct Object<'f> {
    field: &'f str,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        json: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Option<String>;

    fn expecting(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(out, "an object with a field {:?}", self.field)
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        use serde::de::Error;
        let mut found = None;
        let mut others = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == self.field {
                found = Some(map.next_value::<Value>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
                others.push(key);
            }
        }
        let field = self.field;
        let reason = match found {
            Some(Value::String(text)) => return Ok(Some(text)),
            Some(Value::Null) => return Ok(None),
            Some(_) => format!("field {field:?} holds no text"),
            None => format!("no field {field:?}{}", listed(&others)),
        };
        Err(A::Error::custom(format!("{reason}; --field names another")))
    }
}

/// Takes the texts of all objects in a list.
struct Objects<'t> {
    field: &'t str,
    texts: &'t mut String,
}

impl<'de> Visitor<'de> for Objects<'_> {
    type Value = ();

    fn expecting(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(out, "a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        let object = Object { field: self.field };
        while let Some(text) = list.next_element_seed(object)? {
            add(self.texts, &text.unwrap_or_default());
        }
        Ok(())
    }
}
