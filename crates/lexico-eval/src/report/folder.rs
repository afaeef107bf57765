//! The folder of a report, and what an interrupted run leaves in it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use lexico::tensor_file::write_atomically;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Report;
use crate::error::{Result, refused};
use crate::task::Outcome;

/// Results, as one JSON document.
pub const RESULTS: &str = "results.json";
/// The same for people, in one file.
pub const PAGE: &str = "report.html";
/// The page's plot.
pub const PLOT: &str = "plot.svg";
/// Progress so far: the settings in its first line, and a batch in every other.
const PROGRESS: &str = "progress.jsonl";

/// A folder that a report is to be written to. While it is open no other program can open it.
pub struct ReportFolder {
    folder: PathBuf,
    /// True where it was not there before.
    made: bool,
    progress: File,
    /// The settings of what was done before, and where their line ends.
    before: Option<Map<String, Value>>,
    saved: Vec<Batch>,
}

/// Some items that were run together.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Batch {
    pub(crate) cache: String,
    /// Items of the cache that were run before.
    pub(crate) first: usize,
    pub(crate) outcomes: Vec<Outcome>,
}

impl ReportFolder {
    /// Opens `folder`, which is made where it is not there; else it must be empty or, to `resume`, hold an
    /// interrupted run.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File).
    pub fn open(folder: &Path, resume: bool) -> Result<Self> {
        let refuse = |reason: &str| Err(refused(folder, reason));
        let failed = |error: std::io::Error| refused(folder, error);
        let made = match std::fs::create_dir(folder) {
            Ok(()) => true,
            Err(_) if folder.is_dir() => false,
            Err(_) if folder.exists() => return refuse("it is there and no folder; name another"),
            Err(error) => return Err(failed(error)),
        };
        let path = folder.join(PROGRESS);
        // Where nothing was saved there is nothing to go on with.
        let there = path.metadata().is_ok_and(|file| file.len() > 0);
        if folder.join(RESULTS).exists() {
            return refuse("it holds a report already; name another folder, or remove it");
        }
        let mut entries = std::fs::read_dir(folder).map_err(failed)?;
        let foreign = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.map_or(true, |entry| entry.file_name() != PROGRESS)
        };
        if !there && entries.any(foreign) {
            return refuse("it is there and not empty; name another folder");
        }
        if there && !resume {
            return refuse(
                "it holds a run that was interrupted: --resume goes on with it, and removing the folder gives it up",
            );
        }
        let mut open = OpenOptions::new();
        let open = open.read(true).write(true).create(true).truncate(false);
        let progress = open.open(&path).map_err(failed)?;
        match progress.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return refuse("another run is at work in it"),
            // Some file systems know no locks.
            Err(TryLockError::Error(_)) => {}
        }
        let mut opened = Self {
            folder: folder.to_owned(),
            made,
            progress,
            before: None,
            saved: Vec::new(),
        };
        opened.read()?;
        Ok(opened)
    }

    /// Returns true where it holds a run that was interrupted.
    pub fn has_progress(&self) -> bool {
        self.before.is_some()
    }

    /// Reads what was done. A line that was not written to its end is cut off.
    fn read(&mut self) -> Result<()> {
        let path = self.folder.join(PROGRESS);
        let failed = |error: std::io::Error| refused(&path, error);
        let text = std::fs::read(&path).map_err(failed)?;
        let whole = text.iter().rposition(|&b| b == b'\n');
        let whole = whole.map_or(0, |end| end + 1);
        let damaged = |line: usize, error: serde_json::Error| {
            let reason =
                format!("line {line} is damaged ({error}); remove the folder and run anew");
            refused(&path, reason)
        };
        let mut lines = text[..whole].split(|&b| b == b'\n').enumerate();
        if let Some((_, first)) = lines.next()
            && !first.is_empty()
        {
            self.before = Some(serde_json::from_slice(first).map_err(|e| damaged(1, e))?);
        }
        for (number, line) in lines.filter(|(_, line)| !line.is_empty()) {
            let batch = serde_json::from_slice(line).map_err(|e| damaged(number + 1, e))?;
            self.saved.push(batch);
        }
        self.progress.set_len(whole as u64).map_err(failed)?;
        let end = SeekFrom::End(0);
        self.progress.seek(end).map_err(failed)?;
        Ok(())
    }

    /// Begins a run with these settings, or goes on with one that was begun with the same.
    pub(crate) fn begin(&mut self, settings: &Map<String, Value>) -> Result<()> {
        let Some(before) = &self.before else {
            return self.append(settings);
        };
        let text = |settings: &Map<String, Value>, name: &str| {
            let value = settings.get(name);
            value.map_or("none".to_owned(), Value::to_string)
        };
        let names = before.keys();
        let names = names.chain(settings.keys().filter(|&name| !before.contains_key(name)));
        let differ: Vec<String> = names
            .filter(|&name| before.get(name) != settings.get(name))
            .map(|name| {
                let (then, now) = (text(before, name), text(settings, name));
                format!("{name} ({then} then, {now} now)")
            })
            .collect();
        if differ.is_empty() {
            return Ok(());
        }
        let reason = format!(
            "the run that was interrupted had other settings: {}; give the same to go on with it, or remove the folder",
            differ.join(", ")
        );
        Err(refused(&self.folder, reason))
    }

    /// The batch of a cache that begins after `first` items, where it was done before.
    pub(crate) fn saved(&self, cache: &str, first: usize) -> Option<&Batch> {
        self.saved
            .iter()
            .find(|batch| batch.cache == cache && batch.first == first)
    }

    /// Saves settings, or a batch.
    pub(crate) fn append(&mut self, line: &impl Serialize) -> Result<()> {
        self.append_all(std::slice::from_ref(line))
    }

    /// Saves batches, a line each.
    pub(crate) fn append_all(&mut self, lines: &[impl Serialize]) -> Result<()> {
        let failed = |reason: String| {
            let reason = format!(
                "what was done last could not be saved ({reason}); all before is whole: make room and go on with \
                 --resume"
            );
            refused(&self.folder, reason)
        };
        let mut bytes = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut bytes, line).map_err(|e| failed(e.to_string()))?;
            bytes.push(b'\n');
        }
        let written = self.progress.write_all(&bytes);
        let written = written.and_then(|()| self.progress.sync_data());
        written.map_err(|e| failed(e.to_string()))
    }

    /// Writes the report, in place of what an interrupted run would go on with.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File).
    pub fn finish(self, report: &impl Report) -> Result<()> {
        let failed = |error: &dyn std::fmt::Display| refused(&self.folder, error);
        let results = serde_json::to_vec_pretty(report).map_err(|e| failed(&e))?;
        let (page, plot) = (report.page().map_err(|e| failed(&e))?, report.plot());
        // The results last: with them a folder is whole.
        for (name, content) in [
            (PAGE, page.as_bytes()),
            (PLOT, plot.as_bytes()),
            (RESULTS, &results),
        ] {
            write_atomically(&self.folder.join(name), content).map_err(|e| failed(&e))?;
        }
        std::fs::remove_file(self.folder.join(PROGRESS)).map_err(|e| failed(&e))
    }
}

impl Drop for ReportFolder {
    /// A run that saved nothing leaves nothing.
    fn drop(&mut self) {
        if self.progress.metadata().is_ok_and(|file| file.len() == 0) {
            // What cannot be removed does no harm, and a folder with something in it stays.
            let _ = std::fs::remove_file(self.folder.join(PROGRESS));
            if self.made {
                let _ = std::fs::remove_dir(&self.folder);
            }
        }
    }
}
