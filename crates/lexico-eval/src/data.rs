//! Records of a data set: lines of JSON, a list of JSON objects, or the rows of a parquet file.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::rc::Rc;

use lexico::shown::shown;
use parquet::errors::ParquetError;
use parquet::file::reader::SerializedFileReader;
use parquet::record::Field;
use parquet::record::reader::RowIter;
use serde_json::{Map, Value};

use crate::error::{Error, Result, refused};

/// Bytes of a data set that are read: they are held in memory, and a compressed one may stand for any number.
const MAX: u64 = 1 << 30;

/// A record, with its place for what has to be said of it.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    path: Rc<Path>,
    place: Place,
    fields: Map<String, Value>,
}

/// Place of a record in a file, from 1.
#[derive(Debug, Clone, Copy)]
enum Place {
    Line(usize),
    Row(usize),
}

impl Record {
    /// The text in a field.
    pub(crate) fn text(&self, field: &str) -> Result<&str> {
        let value = self.value(field)?;
        let text = value.as_str();
        text.ok_or_else(|| self.refused(format!("field {field:?} holds no text")))
    }

    /// The texts in a field that holds a list of them.
    pub(crate) fn texts(&self, field: &str) -> Result<Vec<&str>> {
        let texts = self.value(field)?.as_array();
        let texts = texts.and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.refused(format!("field {field:?} holds no list of texts")))
    }

    /// The value of a field.
    pub(crate) fn value(&self, field: &str) -> Result<&Value> {
        self.fields.get(field).ok_or_else(|| {
            let names: Vec<String> = self.fields.keys().map(shown).collect();
            let there_are = if names.is_empty() {
                String::new()
            } else {
                format!("; there are {}", names.join(", "))
            };
            self.refused(format!("no field {field:?}{there_are}"))
        })
    }

    /// The error that something is wrong with the record.
    pub(crate) fn refused(&self, reason: String) -> Error {
        match self.place {
            Place::Line(line) => Error::Data {
                name: self.path.display().to_string(),
                line,
                reason,
            },
            Place::Row(row) => refused(&self.path, format!("row {row}: {reason}")),
        }
    }
}

/// The records of a `.jsonl`, `.json` or `.parquet` file, of which there is one at the least.
///
/// # Errors
/// [`Error::Data`] with the line, and [`Error::File`].
pub(crate) fn read(path: &Path) -> Result<Vec<Record>> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.unwrap_or_default().to_lowercase().as_str() {
        "jsonl" | "ndjson" | "json" => parse_json(path, &bytes(path)?),
        "parquet" => some(path, read_parquet(path)?),
        _ => Err(refused(
            path,
            "a data set is a .jsonl, .json or .parquet file",
        )),
    }
}

/// A file as text.
///
/// # Errors
/// [`Error::File`] where it cannot be read or is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let text = String::from_utf8(bytes(path)?).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        refused(path, format!("it is not UTF-8 text, from byte {at} on"))
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// The records of a file that ends in `name` in a zip archive.
///
/// # Errors
/// [`Error::File`] where the archive is damaged or has no such file, and as [`read`].
pub(crate) fn read_zipped(archive: &Path, name: &str) -> Result<Vec<Record>> {
    let damaged = |error: &dyn std::fmt::Display| {
        refused(
            archive,
            format!("it cannot be read as a zip archive: {error}"),
        )
    };
    let file = File::open(archive).map_err(|e| refused(archive, e))?;
    let mut zip = zip::ZipArchive::new(file).map_err(|e| damaged(&e))?;
    // Names that are no text are none of a data set.
    let mut names = zip.file_names().flatten().map(String::from);
    let found = names.find(|entry| {
        let end = entry.strip_suffix(name);
        end.is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
    });
    drop(names);
    let Some(entry) = found else {
        return Err(refused(archive, format!("there is no {name} in it")));
    };
    let file = zip.by_name(&entry).map_err(|e| damaged(&e))?;
    let path = archive.join(&entry);
    let bytes = limited(&path, file, |e| damaged(&e))?;
    parse_json(&path, &bytes)
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| refused(path, e))?;
    limited(path, file, |e| refused(path, e))
}

fn limited(
    path: &Path,
    input: impl Read,
    failed: impl FnOnce(std::io::Error) -> Error,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = input.take(MAX + 1).read_to_end(&mut bytes);
    read.map_err(failed)?;
    if bytes.len() as u64 > MAX {
        let reason = format!("it is larger than {} MiB, as no task's data is", MAX >> 20);
        return Err(refused(path, reason));
    }
    Ok(bytes)
}

/// The records in JSON: a list of objects where it begins as one, else an object in each line.
pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Vec<Record>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let shared: Rc<Path> = path.into();
    let record = |place, fields| Record {
        path: Rc::clone(&shared),
        place,
        fields,
    };
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        let list: Vec<Map<String, Value>> = serde_json::from_slice(bytes)
            .map_err(|e| refused(path, format!("not a list of JSON objects: {}", shown(e))))?;
        let records = (1..).zip(list);
        let records = records.map(|(row, fields)| record(Place::Row(row), fields));
        return some(path, records.collect());
    }
    let mut records = Vec::new();
    for (line, text) in (1..).zip(bytes.split(|&b| b == b'\n')) {
        if text.trim_ascii().is_empty() {
            continue;
        }
        let fields = parse_line(text).map_err(|reason| Error::Data {
            name: path.display().to_string(),
            line,
            reason,
        })?;
        records.push(record(Place::Line(line), fields));
    }
    some(path, records)
}

fn parse_line(text: &[u8]) -> std::result::Result<Map<String, Value>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "it is not UTF-8 text".to_owned())?;
    let value: Value = serde_json::from_str(text).map_err(|e| {
        // It counts lines in this one alone.
        let reason = e.to_string();
        let reason = reason.rsplit_once(" at line ").map(|(reason, _)| reason);
        let reason = reason.unwrap_or("it breaks off");
        format!("not JSON: {} (column {})", shown(reason), e.column())
    })?;
    match value {
        Value::Object(fields) => Ok(fields),
        _ => Err("not a JSON object with fields".to_owned()),
    }
}

fn read_parquet(path: &Path) -> Result<Vec<Record>> {
    let damaged = |error: ParquetError| refused(path, format!("not a whole parquet file: {error}"));
    // Of some damaged files the parquet crate makes a panic.
    let read = lexico_llm::caught(|| {
        let file = File::open(path).map_err(|e| refused(path, e))?;
        let reader = SerializedFileReader::new(file).map_err(damaged)?;
        let shared: Rc<Path> = path.into();
        let mut records = Vec::new();
        for (number, row) in (1..).zip(RowIter::from_file_into(Box::new(reader))) {
            let columns = row.map_err(damaged)?.into_columns();
            let fields = columns.into_iter().map(|(name, field)| (name, json(field)));
            records.push(Record {
                path: Rc::clone(&shared),
                place: Place::Row(number),
                fields: fields.collect(),
            });
        }
        Ok(records)
    });
    read.unwrap_or_else(|_| {
        let reason = "its pages contradict each other".to_owned();
        Err(damaged(ParquetError::General(reason)))
    })
}

/// A parquet value as JSON; `null` of what no task reads.
fn json(field: Field) -> Value {
    match field {
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float(value) => value.into(),
        Field::Double(value) => value.into(),
        Field::Str(value) => value.into(),
        // Some writers do not say that a column is of text.
        Field::Bytes(value) => value.as_utf8().map_or(Value::Null, Value::from),
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().cloned().map(json).collect())
        }
        _ => Value::Null,
    }
}

fn some(path: &Path, records: Vec<Record>) -> Result<Vec<Record>> {
    if records.is_empty() {
        return Err(refused(path, "it holds no records"));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use std::path::PathBuf;

    use super::*;

    fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    fn error(name: &str, bytes: &[u8]) -> String {
        let (_folder, path) = file(name, bytes);
        read(&path).unwrap_err().to_string()
    }

    #[test]
    fn lines_and_lists_are_read() {
        let lines = "\u{feff}{\"a\": \"x\", \"l\": [\"y\", \"z\"]}\r\n\n{\"a\": \"é\", \"l\": []}"
            .as_bytes();
        let list = r#" [{"a": "x", "l": ["y", "z"]}, {"a": "é", "l": []}]"#.as_bytes();
        for (name, bytes) in [("d.jsonl", lines), ("d.JSON", lines), ("d.json", list)] {
            let (_folder, path) = file(name, bytes);
            let records = read(&path).unwrap();
            let texts: Vec<_> = records.iter().map(|r| r.text("a").unwrap()).collect();
            assert_eq!(texts, ["x", "é"], "{name}");
            assert_eq!(records[0].texts("l").unwrap(), ["y", "z"]);
            assert!(records[1].texts("l").unwrap().is_empty());
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (name, bytes, expected) in [
            (
                "d.jsonl",
                &b"{}\n{\"a\": 1"[..],
                "d.jsonl, line 2: not JSON: EOF",
            ),
            ("d.jsonl", b"{}\n\n[1]", "line 3: not a JSON object"),
            (
                "d.jsonl",
                b"{}\n{\"a\": \"\xff\"}",
                "line 2: it is not UTF-8",
            ),
            ("d.jsonl", b" \n", "it holds no records"),
            ("d.jsonl", b"", "it holds no records"),
            ("d.json", b"[]", "it holds no records"),
            ("d.json", b"[{}, 3]", "not a list of JSON objects"),
            ("d.json", b"[{}", "not a list of JSON objects"),
            ("d.parquet", b"PAR1", "not a whole parquet file"),
            ("d.parquet", b"{}", "not a whole parquet file"),
            (
                "d.txt",
                b"{}",
                "a data set is a .jsonl, .json or .parquet file",
            ),
            ("d", b"{}", "a data set is a .jsonl, .json or .parquet file"),
        ] {
            let error = error(name, bytes);
            assert!(error.contains(expected), "{name} {bytes:?}: {error}");
        }
        let missing = read(Path::new("no/such.jsonl")).unwrap_err().to_string();
        assert!(missing.starts_with("no/such.jsonl: "), "{missing}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.jsonl");
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(read(&path), Err(Error::File { .. })));
    }

    #[test]
    fn fields_are_named_in_errors() {
        let (_folder, path) = file("d.jsonl", b"{\"a\": 1, \"b\": [\"x\", 2]}");
        let record = &read(&path).unwrap()[0];
        for (error, expected) in [
            (
                record.text("c").unwrap_err(),
                "line 1: no field \"c\"; there are a, b",
            ),
            (
                record.text("a").unwrap_err(),
                "line 1: field \"a\" holds no text",
            ),
            (
                record.texts("a").unwrap_err(),
                "field \"a\" holds no list of texts",
            ),
            (
                record.texts("b").unwrap_err(),
                "field \"b\" holds no list of texts",
            ),
        ] {
            assert!(error.to_string().contains(expected), "{error}");
        }
        let (_folder, path) = file("d.json", b"[{\"a\": \"x\"}, {}]");
        let error = read(&path).unwrap()[1].text("a").unwrap_err().to_string();
        assert!(error.ends_with("d.json: row 2: no field \"a\""), "{error}");
    }

    #[test]
    fn archives_are_read_by_the_ends_of_names() {
        let (_folder, path) = file("d.zip", b"");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated);
        for (name, text) in [
            ("data/xa.jsonl", "{\"n\": \"1\"}"),
            ("data/a.jsonl", "{\"n\": \"2\"}"),
        ] {
            zip.start_file(name, options).unwrap();
            zip.write_all(text.as_bytes()).unwrap();
        }
        zip.finish().unwrap();
        assert_eq!(
            read_zipped(&path, "a.jsonl").unwrap()[0].text("n").unwrap(),
            "2"
        );
        let error = read_zipped(&path, "b.jsonl").unwrap_err().to_string();
        assert!(
            error.ends_with("d.zip: there is no b.jsonl in it"),
            "{error}"
        );

        let whole = std::fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() / 2], b"", b"{}"] {
            std::fs::write(&path, damaged).unwrap();
            let error = read_zipped(&path, "a.jsonl").unwrap_err().to_string();
            assert!(
                error.contains("it cannot be read as a zip archive"),
                "{error}"
            );
        }
    }

    #[test]
    fn damaged_parquet_files_are_errors() {
        let whole = include_bytes!("../tests/fixtures/mmlu_pro.parquet");
        let (_folder, path) = file("d.parquet", whole);
        assert_eq!(read(&path).unwrap().len(), 4);
        for at in (0..whole.len()).step_by(3) {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes).unwrap();
            // Some damage is to what is not read, or to a text.
            for record in read(&path).unwrap_or_default() {
                let _ = record.texts("options");
            }
        }
        for length in (0..whole.len()).step_by(11) {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(read(&path).is_err(), "{length}");
        }
    }
}
