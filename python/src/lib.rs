//! The native part of the Python package `lexico`: the codec, and the server's engine. `lexico/_lexico.pyi` has its documentation.

#![allow(missing_docs, reason = "Python's stubs say what is for Python")]

mod arrays;
mod codec;
mod dictionaries;
mod engine;
mod error;
mod files;
mod layer_cache;
mod learn;
mod options;
mod work;

/// The module `lexico._lexico`.
#[pyo3::pymodule]
mod _lexico {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::codec::{Codebooks, Codes, Dictionary, HeadMaps};
    #[pymodule_export]
    use crate::dictionaries::Dictionaries;
    #[pymodule_export]
    use crate::engine::{BusyError, EndedError, Engine, Text, write_frontend_files};
    #[pymodule_export]
    use crate::error::LexicoError;
    #[pymodule_export]
    use crate::files::{read_blocks, write_blocks};
    #[pymodule_export]
    use crate::layer_cache::LayerCache;
    #[pymodule_export]
    use crate::learn::{head_maps, learn_codebooks, learn_dictionary};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("EFFORTS", crate::learn::efforts(module.py())?)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
