use std::path::{Path, PathBuf};

use lexico::shown::{shown_message, shown_path};

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A data set cannot be read.
    #[error("{name}, line {line}: {reason}", name = shown_message(name), reason = shown_message(reason))]
    Data {
        /// The data set.
        name: String,
        /// The line, from 1.
        line: usize,
        /// Reason why it is refused.
        reason: String,
    },
    /// Dictionaries for sparse codes that a task needs are not there.
    #[error("{name}: it has no dictionaries for sparse codes, which this task compares; `lexico train --atoms 4096` learns them", name = shown_message(.0))]
    NoSparse(String),
    /// A file or folder cannot serve as a data set, as a part of one, or as a report.
    #[error("{path}: {reason}", path = shown_path(path), reason = shown_message(reason))]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Reason why it is refused, with the row of a table or the entry of an archive, and what helps.
        reason: String,
    },
    /// Settings that no run can meet.
    #[error("{}", shown_message(.0))]
    Options(String),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] lexico_llm::Error),
    /// A dictionary cannot do what is asked of it.
    #[error(transparent)]
    Codec(#[from] lexico::Error),
    /// The caller asked for the work to stop.
    #[error("interrupted")]
    Interrupted,
}

/// The error that a file or folder cannot be used.
pub(crate) fn refused(path: &Path, reason: impl ToString) -> Error {
    Error::File {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;
