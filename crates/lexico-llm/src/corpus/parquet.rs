//! Parquet files: one column of strings is texts.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::{Texts, add_share};
use crate::error::{Error, Result, io, listed, refused};
use crate::panics::caught;

/// Rows that are decoded at once.
const ROWS: usize = 256;
/// Bytes of text that a byte of a file can stand for; a file that says more is not believed.
const MAX_COMPRESSION: u64 = 1024;

pub(super) struct ParquetFile {
    path: PathBuf,
    column: usize,
    groups: Vec<Group>,
}

/// A row group, whose rows are taken to be of one length.
#[derive(PartialEq)]
struct Group {
    rows: u64,
    /// The first byte, and the one after the last, in bytes of text from the file's beginning.
    bytes: Range<u64>,
}

impl Group {
    /// The group that begins at byte `start` of a file of `file` stored bytes; `None` where it lies outside.
    fn new(group: &RowGroupMetaData, column: usize, start: u64, file: u64) -> Option<Self> {
        let column = group.columns().get(column)?;
        let rows = u64::try_from(group.num_rows()).ok()?;
        let stored = u64::try_from(column.compressed_size()).ok()?;
        let first = column.dictionary_page_offset();
        let first = first.unwrap_or_else(|| column.data_page_offset());
        if u64::try_from(first).ok()?.checked_add(stored)? > file {
            return None;
        }
        let bytes = u64::try_from(column.uncompressed_size()).ok()?;
        // Every row has a place of its own.
        let bytes = bytes.min(stored.checked_mul(MAX_COMPRESSION)?).max(rows);
        let bytes = start..start.checked_add(bytes)?;
        Some(Self { rows, bytes })
    }

    /// The bytes where row `row` lies.
    fn place(&self, row: u64) -> Range<u64> {
        let length = u128::from(self.bytes.end - self.bytes.start);
        let start =
            |row: u64| self.bytes.start + (length * u128::from(row) / u128::from(self.rows)) as u64;
        start(row)..start(row + 1)
    }

    /// The rows that lie in `block`, in part or as a whole.
    fn rows(&self, block: &Range<u64>) -> Range<u64> {
        let length = u128::from(self.bytes.end - self.bytes.start).max(1);
        // How many rows begin before a byte.
        let before = |byte: u64| {
            let bytes = byte.clamp(self.bytes.start, self.bytes.end) - self.bytes.start;
            (u128::from(bytes) * u128::from(self.rows)).div_ceil(length) as u64
        };
        before(block.start.saturating_add(1)).saturating_sub(1)..before(block.end)
    }
}

impl ParquetFile {
    pub(super) fn open(path: &Path, field: &str) -> Result<Self> {
        guarded(path, || {
            let reader = reader(path)?;
            let columns = reader.metadata().file_metadata().schema_descr().columns();
            let Some(column) = columns.iter().position(|c| c.path().string() == field) else {
                let names: Vec<String> = columns.iter().map(|c| c.path().string()).collect();
                let there_are = listed(&names);
                let reason = format!("no column {field:?}{there_are}; --field names another");
                return Err(refused(path, reason));
            };
            let texts = columns[column].physical_type() == Type::BYTE_ARRAY;
            if !texts || columns[column].max_rep_level() > 0 {
                let reason = format!("column {field:?} holds no texts; --field names another");
                return Err(refused(path, reason));
            }
            let groups = groups(path, reader.metadata(), column)?;
            Ok(Self {
                path: path.to_owned(),
                column,
                groups,
            })
        })
    }

    /// Adds what of row group `number` belongs to `block`.
    fn read_group(
        &self,
        reader: &dyn FileReader,
        number: usize,
        block: &Range<u64>,
        texts: &mut String,
    ) -> Result<()> {
        let error = damaged(&self.path);
        let few = || ParquetError::EOF(format!("row group {number} has fewer rows than it says"));
        let group = &self.groups[number];
        let rows = group.rows(block);
        let column = reader
            .get_row_group(number)
            .and_then(|group| group.get_column_reader(self.column));
        let ColumnReader::ByteArrayColumnReader(mut column) = column.map_err(&error)? else {
            return Err(changed(&self.path));
        };
        let skipped = column.skip_records(rows.start as usize);
        if skipped.map_err(&error)? as u64 != rows.start {
            return Err(error(few()));
        }
        let (mut levels, mut values) = (Vec::new(), Vec::<ByteArray>::new());
        let mut row = rows.start;
        while row < rows.end {
            levels.clear();
            values.clear();
            let count = ROWS.min((rows.end - row) as usize);
            let read = column.read_records(count, Some(&mut levels), None, &mut values);
            let (read, _, _) = read.map_err(&error)?;
            if read == 0 {
                return Err(error(few()));
            }
            // Rows of the highest level have values, the others are null; where none may be, there are no levels.
            let highest = levels.iter().copied().max();
            let rows = (row..row + read as u64).enumerate();
            let present = rows.filter(|(at, _)| levels.get(*at).copied() == highest);
            for ((_, row), value) in present.zip(&values) {
                let Ok(text) = std::str::from_utf8(value.data()) else {
                    let reason = format!("row {row} of row group {number} is not UTF-8 text");
                    return Err(refused(&self.path, reason));
                };
                add_share(texts, text, &group.place(row), block);
            }
            row += read as u64;
        }
        Ok(())
    }
}

impl Texts for ParquetFile {
    fn length(&self) -> u64 {
        self.groups.last().map_or(0, |last| last.bytes.end)
    }

    fn read(&self, block: Range<u64>) -> Result<String> {
        guarded(&self.path, || {
            let reader = reader(&self.path)?;
            if groups(&self.path, reader.metadata(), self.column)? != self.groups {
                return Err(changed(&self.path));
            }
            let mut texts = String::new();
            for (number, group) in self.groups.iter().enumerate() {
                if block.start < group.bytes.end && group.bytes.start < block.end {
                    self.read_group(&reader, number, &block, &mut texts)?;
                }
            }
            Ok(texts)
        })
    }
}

/// Calls what reads a file: of some damaged files the parquet crate makes a panic, which ends here.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    caught(read).unwrap_or_else(|_| {
        let reason = "its pages contradict each other".to_owned();
        Err(damaged(path)(ParquetError::General(reason)))
    })
}

fn reader(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(io(path))?;
    SerializedFileReader::new(file).map_err(damaged(path))
}

fn groups(path: &Path, metadata: &ParquetMetaData, column: usize) -> Result<Vec<Group>> {
    let file = std::fs::metadata(path).map_err(io(path))?.len();
    let mut start = 0;
    let mut groups = Vec::with_capacity(metadata.num_row_groups());
    for group in metadata.row_groups() {
        let Some(group) = Group::new(group, column, start, file) else {
            let reason = "a row group lies outside the file".to_owned();
            return Err(damaged(path)(ParquetError::EOF(reason)));
        };
        start = group.bytes.end;
        groups.push(group);
    }
    Ok(groups)
}

fn damaged(path: &Path) -> impl Fn(ParquetError) -> Error + '_ {
    move |error| refused(path, format!("not a whole parquet file: {error}"))
}

fn changed(path: &Path) -> Error {
    refused(path, "it changed while it was read")
}
