//! Files that an input names: itself, those of a folder, or those of a data set on the hub.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, io, listed, refused};
use crate::hub::{Dataset, DatasetName};

/// Files of an input, or a stream.
pub(super) enum Source {
    Files(Dataset),
    /// Stream that can be read but once, by name.
    Stream(String),
}

/// Format in which a file holds texts.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Format {
    Text,
    Json,
    Parquet,
}

impl Format {
    /// The format that a file's extension stands for.
    pub(super) fn of(path: &Path) -> Option<Self> {
        /// Files of JSON in data sets that describe the others.
        const DESCRIPTIONS: [&str; 4] = [
            "dataset_dict.json",
            "dataset_info.json",
            "dataset_infos.json",
            "state.json",
        ];
        let name = path.file_name()?.to_str()?;
        let extension = path.extension()?.to_str()?.to_lowercase();
        match extension.as_str() {
            "txt" | "text" | "raw" | "tokens" => Some(Self::Text),
            "json" if DESCRIPTIONS.contains(&name) => None,
            "json" | "jsonl" | "ndjson" => Some(Self::Json),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// Finds an input's files.
pub(super) fn find(input: &Path, progress: bool) -> Result<Source> {
    if input == Path::new("-") {
        return Ok(Source::Stream("stdin".to_owned()));
    }
    if let (false, Some(text)) = (input.exists(), input.to_str()) {
        if let Ok(dataset) = text.parse::<DatasetName>() {
            let readable = |file: &str| Format::of(Path::new(file)).is_some();
            return Ok(Source::Files(dataset.fetch(&readable, progress)?));
        }
        if text.starts_with("hf:") {
            let reason = "a data set on the hub is named hf://datasets/ORG/NAME[@REVISION][/PATH]";
            return Err(refused(input, reason));
        }
    }
    let name = match input.file_name() {
        Some(name) => name.to_string_lossy().into_owned(),
        None => input.display().to_string(),
    };
    let metadata = std::fs::metadata(input).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => refused(
            input,
            "there is no such file or folder; a data set on the hub is named hf://datasets/ORG/NAME",
        ),
        _ => io(input)(e),
    })?;
    if !metadata.is_file() && !metadata.is_dir() {
        return Ok(Source::Stream(name));
    }
    let mut found = Dataset {
        name,
        ..Dataset::default()
    };
    if metadata.is_file() {
        found.files.push(input.to_owned());
        return Ok(Source::Files(found));
    }
    walk(input, &mut HashSet::new(), &mut found)?;
    if found.files.is_empty() {
        return Err(no_files(input, &found.skipped));
    }
    Ok(Source::Files(found))
}

/// Adds the files of a folder and those in it, in sorted order, each folder once.
fn walk(folder: &Path, seen: &mut HashSet<PathBuf>, found: &mut Dataset) -> Result<()> {
    if !seen.insert(folder.canonicalize().map_err(io(folder))?) {
        return Ok(());
    }
    let entries = std::fs::read_dir(folder).map_err(io(folder))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut paths: Vec<PathBuf> = paths.collect::<std::io::Result<_>>().map_err(io(folder))?;
    paths.sort();
    for path in paths {
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let metadata = std::fs::metadata(&path).map_err(io(&path))?;
        if metadata.is_dir() && !hidden {
            walk(&path, seen, found)?;
        } else if metadata.is_file() && !hidden && Format::of(&path).is_some() {
            found.files.push(path);
        } else {
            found.skipped.push(path.display().to_string());
        }
    }
    Ok(())
}

fn no_files(folder: &Path, skipped: &[String]) -> Error {
    if skipped.is_empty() {
        return refused(folder, "the folder is empty");
    }
    let names = skipped.iter().map(|path| {
        let name = Path::new(path).file_name();
        name.map_or_else(|| path.clone(), |name| name.to_string_lossy().into_owned())
    });
    let there = listed(&names.collect::<Vec<_>>());
    let reason = format!(
        "no file in it is .txt, .jsonl, .json or .parquet{there}; plain text of another extension is named file by \
         file"
    );
    refused(folder, reason)
}
