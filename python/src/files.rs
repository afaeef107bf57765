//! Files of named bytes, for saved caches.

use std::collections::HashMap;
use std::path::PathBuf;

use lexico::tensor_file::{self, Dtype, NewTensor, TensorFile};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::codec;
use crate::work::detached;

/// Writes named bytes and texts as a safetensors file: whole, or not at all.
#[pyfunction]
pub(crate) fn write_blocks(
    py: Python<'_>,
    path: PathBuf,
    blocks: Vec<(String, Vec<u8>)>,
    metadata: HashMap<String, String>,
) -> PyResult<()> {
    let written = detached(py, || {
        let tensor = |(name, bytes): (String, Vec<u8>)| {
            let length = bytes.len();
            NewTensor::new(&name, Dtype::U8, &[length], bytes)
        };
        let tensors: Vec<NewTensor> = blocks.into_iter().map(tensor).collect();
        tensor_file::write(&path, &tensors, metadata)
    })?;
    written.map_err(codec)
}

/// Reads what `write_blocks` wrote: the bytes by name, and the texts.
#[pyfunction]
pub(crate) fn read_blocks<'py>(
    py: Python<'py>,
    path: PathBuf,
) -> PyResult<(Bound<'py, PyDict>, HashMap<String, String>)> {
    let (blocks, metadata) = detached(py, || {
        let file = TensorFile::open(&path)?;
        let names = file.names().into_iter();
        let blocks = names.map(|name| Ok::<_, lexico::Error>((file.bytes(&name)?, name)));
        let blocks: Vec<(Vec<u8>, String)> = blocks.collect::<lexico::Result<_>>()?;
        Ok::<_, lexico::Error>((blocks, file.metadata()))
    })?
    .map_err(codec)?;
    let all = PyDict::new(py);
    for (bytes, name) in blocks {
        all.set_item(name, PyBytes::new(py, &bytes))?;
    }
    Ok((all, metadata))
}
