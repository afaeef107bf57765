//! State of a training in a folder: whatever ends the program, it can go on from there.
//!
//! Small files are written beside their target and renamed, and end in a checksum. Sampled vectors lie in
//! files of fixed size and are overwritten in place (see [`Rows`](super::rows::Rows)): chunks that were read
//! after the last saving are read again, and do the same again to the same places.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lexico::tensor_file::write_atomically;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{losses, queries};
use crate::error::{Error, Result, io};

/// First bytes of every file of a state.
const MAGIC: &[u8] = b"lexico training state 1\n";
const SETTINGS: &str = "settings";
const LOCK: &str = "lock";
/// First letters of the names of files that are being written.
const UNFINISHED: &str = ".lexico-";

/// Settings of the state that [`train`](super::train) keeps on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateOptions {
    /// Folder for the state alone, made where it is not there.
    pub folder: PathBuf,
    /// Goes on with the state in the folder, if any; without it the folder must hold none.
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

/// Reason why the state of a training cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A folder of something else.
    #[error("it is there and no state of a training; name another")]
    Foreign,
    /// A state that another program has open.
    #[error("another training is at work in it")]
    InUse,
    /// A state that is there and is not to be resumed.
    #[error(
        "it holds a training that was not finished: --resume goes on with it, and removing the folder gives it up"
    )]
    Unfinished,
    /// A state of other settings.
    #[error(
        "it is of other settings: {}; give those of the state to go on with it, or remove the folder to give it up",
        .0.join(", ")
    )]
    OtherSettings(Vec<String>),
    /// A state of another text under the same name.
    #[error(
        "the corpus is another than the state was begun with, though it is called the same; give the same text to go \
         on, or remove the state's folder to give it up"
    )]
    OtherCorpus,
    /// A file that is damaged.
    #[error("it is damaged or cut short; remove the folder of the state and train anew")]
    Damaged,
}

/// Open folder of a state, which no other program can open meanwhile.
pub(super) struct State {
    folder: PathBuf,
    /// Time between two savings.
    pub(super) every: Duration,
    _lock: File,
}

impl State {
    /// Opens the folder; a state in it must have the same settings, and `resume` be set.
    pub(super) fn open(options: &StateOptions, settings: &Map<String, Value>) -> Result<Self> {
        let folder = &options.folder;
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
            return Err(refused(folder, StateError::Foreign));
        }
        let mut open = OpenOptions::new();
        let lock = open.write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(io(&path))?;
        // Some file systems know no locks: that is no reason to stop.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(refused(folder, StateError::InUse));
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
            return Err(refused(folder, StateError::Unfinished));
        }
        let there: Map<String, Value> = state.load_json(SETTINGS)?.unwrap_or_default();
        let differ = differences(&there, settings);
        if !differ.is_empty() {
            return Err(refused(folder, StateError::OtherSettings(differ)));
        }
        Ok(state)
    }

    /// Removes a state that cannot lead anywhere.
    pub(super) fn remove(&self) -> Result<()> {
        remove_state(&self.folder)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Replaces a file of the state; one that is there stays whole until the new one is.
    pub(super) fn save(&self, name: &str, content: &[u8]) -> Result<()> {
        let mut bytes = [MAGIC, content].concat();
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        write_atomically(&self.path(name), &bytes).map_err(|error| self.not_saved(error.into()))
    }

    /// Loads the content last saved under this name; `None` where nothing was.
    pub(super) fn load(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(&path)(error)),
        };
        let whole = bytes.split_last_chunk().filter(|(content, checksum)| {
            crc32fast::hash(content) == u32::from_le_bytes(**checksum)
        });
        let content = whole.and_then(|(content, _)| content.strip_prefix(MAGIC));
        let content = content.ok_or_else(|| damaged(&path))?;
        Ok(Some(content.to_vec()))
    }

    /// Removes the files whose names begin like this, all but `kept`.
    pub(super) fn remove_others(&self, beginning: &str, kept: &str) -> Result<()> {
        for entry in entries(&self.folder)? {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(beginning) && name != kept {
                std::fs::remove_file(entry.path()).map_err(io(&entry.path()))?;
            }
        }
        Ok(())
    }

    pub(super) fn save_json(&self, name: &str, content: &impl serde::Serialize) -> Result<()> {
        let json =
            serde_json::to_vec(content).map_err(|error| io(&self.path(name))(error.into()))?;
        self.save(name, &json)
    }

    pub(super) fn load_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let content = self.load(name)?.map(|json| serde_json::from_slice(&json));
        content.transpose().map_err(|_| damaged(&self.path(name)))
    }

    /// Turns an error of writing into one that says what is still there and what helps.
    pub(super) fn not_saved(&self, error: Error) -> Error {
        match error {
            Error::Io { .. } | Error::Codec(lexico::Error::Io { .. }) => {
                let (folder, source) = (self.folder.clone(), Box::new(error));
                Error::StateNotSaved { folder, source }
            }
            other => other,
        }
    }
}

/// Removes a state that is no longer needed, and the folder with it where nothing else is in there.
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

/// Removes all of a state but the lock, in an order that never leaves what looks like a whole state, or like something
/// else.
fn remove_files(folder: &Path) -> Result<()> {
    let remove = |path: PathBuf| match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(&path)(error)),
        _ => Ok(()),
    };
    remove(folder.join(super::READING))?;
    let losses = losses::FAMILIES.map(losses::file);
    for entry in entries(folder)? {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = ["layers.", queries::FILE, UNFINISHED];
        if ours.iter().any(|own| name.starts_with(own)) || losses.contains(&&*name) {
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
    let added = now.keys().filter(|&name| !there.contains_key(name));
    let names = there.keys().chain(added);
    let differ = names.filter(|&name| there.get(name) != now.get(name));
    let differ = differ.map(|name| {
        let (there, now) = (text(there, name), text(now, name));
        format!("{name} ({there} in the state, {now} now)")
    });
    differ.collect()
}

pub(super) fn refused(path: &Path, reason: StateError) -> Error {
    Error::State {
        path: path.to_owned(),
        reason,
    }
}

pub(super) fn damaged(path: &Path) -> Error {
    refused(path, StateError::Damaged)
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
