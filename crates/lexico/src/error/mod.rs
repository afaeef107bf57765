mod learn;

pub use learn::LearnError;

use std::path::{Path, PathBuf};

use crate::kernels::LevelError;
use crate::shown::{shown, shown_message, shown_path};

/// Everything that can go wrong in this crate; each message says what was wrong with what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {reason}", path = shown_path(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        reason: std::io::Error,
    },
    /// A file is not a whole, well-formed safetensors file.
    #[error("{path}: not a safetensors file, or a damaged one: {reason}", path = shown_path(path), reason = shown_message(reason))]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// The fault found.
        reason: String,
    },
    /// A safetensors file carries another `format` than the one wanted, or none.
    #[error("{path}: its metadata says format = {found}, but {wanted:?} is needed; {cure}", path = shown_path(path), found = shown(found))]
    Format {
        /// The file.
        path: PathBuf,
        /// The format its metadata names, quoted, or `none`.
        found: String,
        /// The format wanted.
        wanted: &'static str,
        /// The command that makes such a file.
        cure: &'static str,
    },
    /// A metadata entry is missing or cannot be understood.
    #[error("{path}: metadata entry {key:?}: {reason}", path = shown_path(path), reason = shown_message(reason))]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The entry's name.
        key: &'static str,
        /// The fault found.
        reason: String,
    },
    /// A tensor is not in the file.
    #[error("{path}: no tensor \"{name}\"; it holds {present}", path = shown_path(path), name = shown(name), present = shown_message(present))]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor wanted.
        name: String,
        /// The tensors that are there.
        present: String,
    },
    /// A tensor is there but cannot be used.
    #[error("{path}: tensor \"{name}\": {reason}", path = shown_path(path), name = shown(name), reason = shown_message(reason))]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The fault found.
        reason: String,
    },
    /// A GPU, its memory or its programs fail.
    #[error("the device: {0}")]
    Device(String),
    /// A matrix cannot serve as a dictionary; the reasons are written in `dictionary`, in the file of each part.
    #[error("not a dictionary: {}", shown_message(.0))]
    Dictionary(String),
    /// The dictionaries of some layers cannot be of one model.
    #[error("the dictionaries do not belong together: {}", shown_message(.0))]
    Layers(String),
    /// A dictionary file belongs to another model.
    #[error("the dictionary does not fit the model: {}", shown_message(.0))]
    OtherModel(String),
    /// Codes were made with another dictionary than the one given.
    #[error("the codes were made with another dictionary than the one given ({})", shown_message(.0))]
    OtherDictionary(String),
    /// A block of stored codes is damaged or holds other codes than those expected.
    #[error("stored codes: {}", shown_message(.0))]
    Stored(String),
    /// More positions than a cache's memory holds.
    #[error(
        "{positions} positions do not fit into {bytes} bytes of memory, which hold {capacity}; give more memory, or fewer atoms"
    )]
    Memory {
        /// The positions that there would be.
        positions: usize,
        /// The memory of all layers.
        bytes: usize,
        /// The positions that it holds.
        capacity: usize,
    },
    /// A sparsity outside `1..=min(m, N)`.
    #[error(
        "sparsity {sparsity} is impossible here: it must lie between 1 and {max} (head dim {head_dim}, {atoms} atoms)"
    )]
    Sparsity {
        /// The sparsity asked for.
        sparsity: usize,
        /// The largest one possible.
        max: usize,
        /// `m`.
        head_dim: usize,
        /// `N`.
        atoms: usize,
    },
    /// More atoms a vector than there are codebooks, or none.
    #[error(
        "sparsity {sparsity} is impossible here: it must lie between 1 and {codebooks}, the number of codebooks"
    )]
    Codebooks {
        /// The sparsity asked for.
        sparsity: usize,
        /// The codebooks that there are.
        codebooks: usize,
    },
    /// Additive codes of an impossible size.
    #[error(
        "additive codes have at least 1 atom, over codebooks of 65,536 atoms in all and 2,048 in the first at most; sparsity {sparsity} with {first} in the first is impossible"
    )]
    AdditiveCodes {
        /// The sparsity asked for.
        sparsity: usize,
        /// Atoms of the first codebook.
        first: usize,
    },
    /// A tolerance outside `[0, 1)`.
    #[error("tolerance {0} is impossible: it is a relative error and must lie in [0, 1)")]
    Tolerance(f32),
    /// More nonzeros a vector than one length byte counts.
    #[error("with a tolerance, lengths are stored in one byte: sparsity {0} is above 255")]
    VariableSparsity(usize),
    /// Vectors of another length than the dictionary's atoms.
    #[error(
        "{found} numbers are not a whole number of vectors of length {head_dim}, the dictionary's head dim"
    )]
    VectorLength {
        /// The count of numbers given.
        found: usize,
        /// `m`.
        head_dim: usize,
    },
    /// A vector holds a NaN or an infinity.
    #[error("vector {row} holds a NaN or an infinity; only finite vectors can be coded")]
    NotFinite {
        /// The first such vector.
        row: usize,
    },
    /// A setting of a cache that cannot be.
    #[error("{setting}={value}: {reason}", value = shown(value), reason = shown_message(reason))]
    Setting {
        /// The setting.
        setting: &'static str,
        /// The value given.
        value: String,
        /// Why it cannot be that.
        reason: String,
    },
    /// A layer's keys or values cannot be coded.
    #[error("{part}s cannot be coded: {source}")]
    Coding {
        /// `key` or `value`.
        part: &'static str,
        /// Why.
        source: Box<Error>,
    },
    /// The saved state of a layer's cache contradicts itself.
    #[error("the saved cache contradicts itself: {0} cannot be right")]
    SavedLayer(&'static str),
    /// The level that the kernels are to run at is none of this processor's.
    #[error(transparent)]
    Level(LevelError),
    /// A dictionary cannot be learned with these settings or vectors.
    #[error("cannot learn a dictionary: {0}")]
    Learn(LearnError),
    /// Vectors to learn from cannot be read.
    #[error(transparent)]
    Vectors(Box<dyn std::error::Error + Send + Sync>),
    /// The caller asked for the work to stop.
    #[error("interrupted")]
    Interrupted,
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |reason| Error::Io {
            path: path.to_owned(),
            reason,
        }
    }

    pub(crate) fn setting(setting: &'static str, value: impl Into<String>, reason: &str) -> Error {
        Error::Setting {
            setting,
            value: value.into(),
            reason: reason.to_owned(),
        }
    }

    pub(crate) fn tensor(path: &Path, name: &str, reason: impl Into<String>) -> Error {
        Error::Tensor {
            path: path.to_owned(),
            name: name.to_owned(),
            reason: reason.into(),
        }
    }
}
