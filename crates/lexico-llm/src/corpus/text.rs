//! Plain text.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{LOOK, Texts, cut, not_text};
use crate::error::{Result, io};

/// A file of plain text, as one long text.
pub(super) struct TextFile {
    path: PathBuf,
    length: u64,
}

impl TextFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let length = std::fs::metadata(path).map_err(io(path))?.len();
        let path = path.to_owned();
        Ok(Self { path, length })
    }

    /// Finds the beginning of a block that is to begin at byte `at`.
    fn boundary(&self, file: &mut File, at: u64) -> Result<u64> {
        if at == 0 || at >= self.length {
            return Ok(at.min(self.length));
        }
        let mut bytes = Vec::with_capacity(LOOK);
        file.seek(SeekFrom::Start(at - 1)).map_err(io(&self.path))?;
        let read = file.take(LOOK as u64).read_to_end(&mut bytes);
        read.map_err(io(&self.path))?;
        Ok(at - 1 + cut(&bytes) as u64)
    }
}

impl Texts for TextFile {
    fn length(&self) -> u64 {
        self.length
    }

    fn read(&self, block: Range<u64>) -> Result<String> {
        let mut file = File::open(&self.path).map_err(io(&self.path))?;
        let start = self.boundary(&mut file, block.start)?;
        let end = self.boundary(&mut file, block.end)?;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(start)).map_err(io(&self.path))?;
        let read = file.take(end.saturating_sub(start)).read_to_end(&mut bytes);
        read.map_err(io(&self.path))?;
        let text = String::from_utf8(bytes)
            .map_err(|e| not_text(&self.path, start + e.utf8_error().valid_up_to() as u64))?;
        match text.strip_prefix('\u{feff}') {
            Some(rest) if start == 0 => Ok(rest.to_owned()),
            _ => Ok(text),
        }
    }
}
