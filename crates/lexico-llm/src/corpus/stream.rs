//! Stdin and pipes, which are read once, from their beginning.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::json::{document, read_line};
use super::{PIECE, add, not_text};
use crate::error::{Result, io, refused};

pub(super) struct Stream {
    path: PathBuf,
    input: Box<dyn BufRead>,
    /// The field of every line; without one the stream is plain text.
    field: Option<String>,
    /// The first bytes of a character whose others are still to come.
    begun: Vec<u8>,
    /// Bytes of plain text, or lines, that were read.
    read: u64,
}

impl Stream {
    pub(super) fn open(path: &Path, field: Option<String>) -> Result<Self> {
        let input: Box<dyn BufRead> = if path == Path::new("-") {
            Box::new(BufReader::new(std::io::stdin()))
        } else {
            Box::new(BufReader::new(File::open(path).map_err(io(path))?))
        };
        Ok(Self {
            path: path.to_owned(),
            input,
            field,
            begun: Vec::new(),
            read: 0,
        })
    }

    /// The next text, of about a piece; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<String>> {
        let text = match self.field.clone() {
            Some(field) => self.documents(&field)?,
            None => self.plain()?,
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    fn documents(&mut self, field: &str) -> Result<String> {
        let mut texts = String::new();
        let mut line = Vec::new();
        while texts.len() < PIECE
            && read_line(&mut self.input, &mut line).map_err(io(&self.path))? > 0
        {
            self.read += 1;
            let text = document(&line, field)
                .map_err(|reason| refused(&self.path, format!("line {}: {reason}", self.read)))?;
            add(&mut texts, &text.unwrap_or_default());
        }
        Ok(texts)
    }

    fn plain(&mut self) -> Result<String> {
        let mut bytes = std::mem::take(&mut self.begun);
        let mut input = (&mut self.input).take(PIECE as u64);
        let read = input.read_to_end(&mut bytes).map_err(io(&self.path))?;
        // To the end of the line where that is near.
        input.set_limit(PIECE as u64);
        let more = input.read_until(b'\n', &mut bytes);
        let more = more.map_err(io(&self.path))?;
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let ended = read < PIECE || more == 0;
                if ended || error.utf8_error().error_len().is_some() {
                    return Err(not_text(&self.path, self.read + valid as u64));
                }
                let mut bytes = error.into_bytes();
                self.begun = bytes.split_off(valid);
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        let first = self.read == 0;
        self.read += text.len() as u64;
        match text.strip_prefix('\u{feff}') {
            Some(rest) if first => Ok(rest.to_owned()),
            _ => Ok(text),
        }
    }
}
