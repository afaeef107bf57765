//! What training has done so far, in a folder: whatever ends the program, it can go on from there.
//!
//! Small files are written beside their target and renamed, and end in a checksum. Sampled vectors lie in
//! files of fixed size and are overwritten in place (see [`Rows`](super::rows::Rows)): windows that were read
//! after the last saving are read again, and do the same again to the same places.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lexico::tensor_file::write_atomically;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::losses::Kind;
use crate::error::{Error, Result, io};

/// What every file of a state begins with.
const MAGIC: &[u8] = b"lexico training state 1\n";
const SETTINGS: &str = "settings";
const LOCK: &str = "lock";
/// What files are called while they are written.
const UNFINISHED: &str = ".lexico-";

/// Where [`train`](super::train) keeps what it has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateOptions {
    /// A folder of its own, made where it is not there.
    pub folder: PathBuf,
    /// Whether to go on with what is in the folder. Otherwise there may be nothing.
    pub resume: bool,
    /// Time between two savings.
    pub every: Duration,
}

impl Default for StateOptions {
    fn default() -> Self {
        Self {
            folder: PathBuf::from("lexico.state"),
            resume: false,
            every: Duration::from_secs(120),
        }
    }
}

/// An open folder, which no other program can open meanwhile.
pub(super) struct State {
    folder: PathBuf,
    every: Duration,
    _lock: File,
}

impl State {
    /// Opens the folder; where it holds a state, it must be one of these settings, and to be resumed.
    pub(super) fn open(options: &StateOptions, settings: &Map<String, Value>) -> Result<Self> {
        let folder = &options.folder;
        let refuse = |reason: String| refused(folder, reason);
        if let Err(error) = std::fs::create_dir(folder)
            && !folder.is_dir()
        {
            return Err(io(folder)(error));
        }
        let path = folder.join(LOCK);
        let foreign = |entry: std::fs::DirEntry| {
            let name = entry.file_name();
            name != LOCK && !name.to_string_lossy().starts_with(UNFINISHED)
        };
        let begun = [SETTINGS, super::READING].map(|name| folder.join(name).exists());
        if !begun[0] && entries(folder)?.into_iter().any(foreign) {
            return Err(refuse(
                "it is there and no state of a training; name another".to_owned(),
            ));
        }
        let mut open = OpenOptions::new();
        let lock = open.write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(io(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(refuse("another training is at work in it".to_owned()));
            }
            // Some file systems know no locks.
            Err(TryLockError::Error(_)) => {}
        }
        // Before the first saving there is nothing to lose or to go on with.
        if begun == [true, false] {
            remove_files(folder)?;
        }
        let state = Self {
            folder: folder.clone(),
            every: options.every,
            _lock: lock,
        };
        if begun != [true, true] {
            state.save_json(SETTINGS, settings)?;
            return Ok(state);
        }
        if !options.resume {
            return Err(refuse(
                "it holds a training that was not finished: --resume goes on with it, and removing the folder \
                 gives it up"
                    .to_owned(),
            ));
        }
        let there: Map<String, Value> = state.load_json(SETTINGS)?.unwrap_or_default();
        let differ = differences(&there, settings);
        if !differ.is_empty() {
            return Err(refuse(format!(
                "it is of other settings: {}; give those of the state to go on with it, or remove the folder to \
                 give it up",
                differ.join(", ")
            )));
        }
        Ok(state)
    }

    /// Removes a state in which nothing was saved.
    pub(super) fn remove_if_nothing_saved(&self) -> Result<()> {
        if self.path(super::READING).exists() {
            return Ok(());
        }
        self.remove()
    }

    /// Removes a state that cannot lead anywhere.
    pub(super) fn remove(&self) -> Result<()> {
        remove_state(&self.folder)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Time between two savings.
    pub(super) fn every(&self) -> Duration {
        self.every
    }

    /// Replaces a file of the state; one that is there stays whole until the new one is.
    pub(super) fn save(&self, name: &str, content: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(MAGIC.len() + content.len() + 4);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(content);
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        write_atomically(&self.path(name), &bytes).map_err(|error| self.not_saved(error.into()))
    }

    /// What was last saved under this name; `None` where nothing was.
    pub(super) fn load(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let mut bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(&path)(error)),
        };
        let Some((content, checksum)) = bytes.split_last_chunk::<4>() else {
            return Err(damaged(&path));
        };
        let whole = crc32fast::hash(content) == u32::from_le_bytes(*checksum);
        if !whole || !content.starts_with(MAGIC) {
            return Err(damaged(&path));
        }
        bytes.truncate(content.len());
        bytes.drain(..MAGIC.len());
        Ok(Some(bytes))
    }

    pub(super) fn save_json(&self, name: &str, content: &impl serde::Serialize) -> Result<()> {
        let json = serde_json::to_vec(content)
            .map_err(|error| refused(&self.path(name), error.to_string()))?;
        self.save(name, &json)
    }

    pub(super) fn load_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(json) = self.load(name)? else {
            return Ok(None);
        };
        let content = serde_json::from_slice(&json);
        content.map(Some).map_err(|_| damaged(&self.path(name)))
    }

    /// An error of writing, with what is still there and what helps.
    pub(super) fn not_saved(&self, error: Error) -> Error {
        let reason = match error {
            Error::Io { path, reason } => format!("{}: {reason}", path.display()),
            Error::Codec(lexico::Error::Io { path, reason }) => {
                format!("{}: {reason}", path.display())
            }
            other => return other,
        };
        refused(
            &self.folder,
            format!(
                "what was done since the last saving could not be saved ({reason}); all before is whole: make \
                 room and go on with --resume, or name a roomier --work-dir"
            ),
        )
    }
}

/// Removes a state that is of no more use, and the folder with it where nothing else is in there.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_state(folder: &Path) -> Result<()> {
    remove_files(folder)?;
    let lock = folder.join(LOCK);
    std::fs::remove_file(&lock).map_err(io(&lock))?;
    // What is not ours keeps the folder.
    let _ = std::fs::remove_dir(folder);
    Ok(())
}

/// Removes all of a state but the lock, in an order in which what is left is never taken for a whole one, or
/// for something else.
fn remove_files(folder: &Path) -> Result<()> {
    let remove = |path: PathBuf| match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(&path)(error)),
        _ => Ok(()),
    };
    remove(folder.join(super::READING))?;
    let losses = Kind::ALL.map(Kind::file);
    for entry in entries(folder)? {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("layers.") || losses.contains(&&*name) || name.starts_with(UNFINISHED) {
            remove(entry.path())?;
        }
    }
    remove(folder.join(SETTINGS))
}

fn entries(folder: &Path) -> Result<Vec<std::fs::DirEntry>> {
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect);
    entries.map_err(io(folder))
}

fn differences(there: &Map<String, Value>, now: &Map<String, Value>) -> Vec<String> {
    let text = |settings: &Map<String, Value>, name: &str| match settings.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => "none".to_owned(),
    };
    let names = there
        .keys()
        .chain(now.keys().filter(|&name| !there.contains_key(name)));
    names
        .filter(|&name| there.get(name) != now.get(name))
        .map(|name| {
            let (there, now) = (text(there, name), text(now, name));
            format!("{name} ({there} in the state, {now} now)")
        })
        .collect()
}

pub(super) fn refused(path: &Path, reason: String) -> Error {
    Error::State {
        path: path.to_owned(),
        reason,
    }
}

pub(super) fn damaged(path: &Path) -> Error {
    let reason = "it is damaged or cut short; remove the folder of the state and train anew";
    refused(path, reason.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let options = StateOptions {
            folder: folder.path().join("state"),
            ..StateOptions::default()
        };
        let settings: Map<String, Value> = (1..200)
            .map(|i| {
                (
                    format!("rate {i}"),
                    Value::from(f64::from(i as f32 / 1000.0)),
                )
            })
            .collect();
        let state = State::open(&options, &settings).unwrap();
        let there: Map<String, Value> = state.load_json(SETTINGS).unwrap().unwrap();
        assert_eq!(differences(&there, &settings), Vec::<String>::new());
    }
}
