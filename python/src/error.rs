//! Errors as Python's exceptions.

use lexico::Error as Codec;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyOSError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    lexico,
    LexicoError,
    PyException,
    "A file, dictionaries or saved caches that cannot be used, and why."
);

/// The exception of an error of the codec.
pub(crate) fn codec(error: Codec) -> PyErr {
    match &error {
        Codec::Io { path, reason } => match reason.raw_os_error() {
            // Python makes of these the class that belongs to the number, as FileNotFoundError.
            Some(number) => {
                let text = reason.to_string();
                let text = text.split(" (os error").next().unwrap_or_default();
                PyOSError::new_err((number, text.to_owned(), path.clone()))
            }
            None => PyOSError::new_err(error.to_string()),
        },
        Codec::NotSafetensors { .. }
        | Codec::Format { .. }
        | Codec::Metadata { .. }
        | Codec::MissingTensor { .. }
        | Codec::Tensor { .. }
        | Codec::Device(_)
        | Codec::OtherModel(_)
        | Codec::OtherDictionary(_)
        | Codec::Stored(_)
        | Codec::SavedLayer(_)
        | Codec::Level(_) => LexicoError::new_err(error.to_string()),
        Codec::Interrupted => PyKeyboardInterrupt::new_err(()),
        // All others are of arguments.
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// A `ValueError`.
pub(crate) fn value(message: impl Into<String>) -> PyErr {
    PyValueError::new_err(message.into())
}
