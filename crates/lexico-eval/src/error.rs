use std::path::PathBuf;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A data set cannot be read.
    #[error("{name}, line {line}: {reason}")]
    Data {
        /// The data set.
        name: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A report's folder, or a file in it, cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    Report {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it, and what helps.
        reason: String,
    },
    /// A file cannot serve as a data set, or as a part of one.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where: the row of a table, the entry of an archive.
        reason: String,
    },
    /// Settings that no run can meet.
    #[error("{0}")]
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

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;
