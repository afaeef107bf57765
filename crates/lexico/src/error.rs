use std::path::{Path, PathBuf};

/// Everything that can go wrong in this crate; each message says what was wrong with what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {reason}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: std::io::Error,
    },
    /// A file is not a whole, well-formed safetensors file.
    #[error("{path}: not a safetensors file, or a damaged one: {reason}", path = path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What gave it away.
        reason: String,
    },
    /// A safetensors file carries another `format` than the one wanted, or none.
    #[error("{path}: its metadata says format = {found}, but {wanted:?} is needed; {cure}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format its metadata names, quoted, or `none`.
        found: String,
        /// The format wanted.
        wanted: &'static str,
        /// What makes such a file.
        cure: &'static str,
    },
    /// A metadata entry is missing or cannot be understood.
    #[error("{path}: metadata entry {key:?}: {reason}", path = path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The entry's name.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is not in the file.
    #[error("{path}: no tensor {name:?}; it holds {present}", path = path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor wanted.
        name: String,
        /// The tensors that are there.
        present: String,
    },
    /// A tensor is there but cannot be used.
    #[error("{path}: tensor {name:?}: {reason}", path = path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A GPU, its memory or its programs fail.
    #[error("the device: {0}")]
    Device(String),
    /// No such atoms can be added to a dictionary.
    #[error("adaptive atoms: {0}")]
    Adaptive(String),
    /// A matrix cannot serve as a dictionary.
    #[error("not a dictionary: {0}")]
    Dictionary(String),
    /// A dictionary file belongs to another model.
    #[error("the dictionary does not fit the model: {0}")]
    OtherModel(String),
    /// Codes were made with another dictionary than the one given.
    #[error("the codes were made with another dictionary than the one given (tensor {0:?})")]
    OtherDictionary(String),
    /// A block of stored codes is damaged or holds other codes than those expected.
    #[error("stored codes: {0}")]
    Stored(String),
    /// A sparsity outside `1..=min(m, N)`.
    #[error(
        "sparsity {sparsity} is impossible here: it must lie between 1 and {most} (head dim {head_dim}, {atoms} atoms)"
    )]
    Sparsity {
        /// The sparsity asked for.
        sparsity: usize,
        /// The largest one possible.
        most: usize,
        /// `m`.
        head_dim: usize,
        /// `N`.
        atoms: usize,
    },
    /// More atoms a vector than a codebooks dictionary has groups, or none.
    #[error(
        "sparsity {sparsity} is impossible here: it must lie between 1 and {groups}, the groups of the dictionary"
    )]
    CodebookSizes {
        /// The sparsity asked for.
        sparsity: usize,
        /// CodebookSizes that there are.
        groups: usize,
    },
    /// Codes of one atom a group cannot be of this format.
    #[error(
        "codes of one atom a group have a fixed sparsity of at least 1 and over 65,536 atoms at the most, 2,048 of them in the first group; sparsity {sparsity}, variable: {variable}, is impossible"
    )]
    AdditiveCodes {
        /// The sparsity asked for.
        sparsity: usize,
        /// Whether lengths were to vary.
        variable: bool,
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
        /// How many numbers there were.
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
    /// Dictionary learning cannot start with these settings or vectors.
    #[error("cannot learn a dictionary: {0}")]
    Learn(String),
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

    pub(crate) fn tensor(path: &Path, name: &str, reason: impl Into<String>) -> Error {
        Error::Tensor {
            path: path.to_owned(),
            name: name.to_owned(),
            reason: reason.into(),
        }
    }
}
