//! A cache's options as text: those of `--cache lexico:…` of the program, which means the same by them.

use std::thread::available_parallelism;

use lexico::cache::CacheOptions;
use lexico::shown::shown;
use lexico::{DictionarySet, Error, LayerSettings};
use pyo3::prelude::*;

use crate::error::{codec, value};

fn refused(error: Error) -> PyErr {
    match error {
        Error::Setting { .. } => value(format!("cache: {error}")),
        other => codec(other),
    }
}

/// Reads `lexico` or `lexico:option=value,…`.
pub(crate) fn parse(text: &str) -> PyResult<CacheOptions> {
    let (name, rest) = text.split_once(':').unwrap_or((text, ""));
    if name != "lexico" {
        let name = shown(name);
        return Err(value(format!(
            "cache: no cache method \"{name}\" here; it is written lexico:sparsity=12,window=128"
        )));
    }
    let mut options = CacheOptions::default();
    let mut seen: Vec<&str> = Vec::new();
    for pair in rest.split(',').filter(|pair| !pair.is_empty()) {
        let (name, given) = pair.split_once('=').unwrap_or((pair, ""));
        if seen.contains(&name) {
            return Err(value(format!("cache: {} is given twice", shown(name))));
        }
        seen.push(name);
        options.set(name, given).map_err(refused)?;
    }
    Ok(options)
}

/// The settings of every layer; `sliding_windows` are those of the layers, of which those left out have none.
pub(crate) fn layers(
    options: &CacheOptions,
    dictionaries: &DictionarySet,
    sliding_windows: &[Option<usize>],
) -> PyResult<Vec<LayerSettings>> {
    let mut settings = options.layers(dictionaries).map_err(refused)?;
    // Where other threads are spare; what a cache holds does not depend on it.
    let background = available_parallelism().is_ok_and(|cores| cores.get() > 1);
    for (layer, &window) in settings.iter_mut().zip(sliding_windows) {
        layer.sliding_window = window;
        layer.background = background;
    }
    Ok(settings)
}
