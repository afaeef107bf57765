//! The dictionaries of all layers of a model, as files hold them.

use std::path::PathBuf;
use std::sync::Arc;

use lexico::dictionary::{CodeFamily, LayerDictionaries, ModelIdentity, Training};
use lexico::{DictionarySet, KeyValue};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::codec::{Codebooks, Dictionary, HeadMaps};
use crate::error::{codec, value};
use crate::work::detached;

/// The dictionaries, codebooks and maps of every layer of a model.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct Dictionaries(pub(crate) Arc<DictionarySet>);

impl Dictionaries {
    /// The dictionaries of a layer.
    pub(crate) fn layer(&self, layer: usize) -> PyResult<&LayerDictionaries> {
        let layers = &self.0.layers;
        layers.get(layer).ok_or_else(|| {
            let count = layers.len();
            PyIndexError::new_err(format!("layer {layer}; there are {count} layers"))
        })
    }
}

/// Those of the keys or of the values.
fn part<T>(both: Option<&KeyValue<Arc<T>>>, part: &str) -> PyResult<Option<Arc<T>>> {
    match part {
        "keys" => Ok(both.map(|both| Arc::clone(&both.keys))),
        "values" => Ok(both.map(|both| Arc::clone(&both.values))),
        _ => Err(value(format!(
            "part={part:?}: it must be \"keys\" or \"values\""
        ))),
    }
}

/// A JSON text as Python's objects.
fn from_json<'py>(
    py: Python<'py>,
    text: &serde_json::Result<String>,
) -> PyResult<Bound<'py, PyAny>> {
    match text {
        Ok(text) => py.import("json")?.call_method1("loads", (text,)),
        Err(error) => Err(value(error.to_string())),
    }
}

fn to_json<T: serde::de::DeserializeOwned>(given: &Bound<'_, PyDict>, name: &str) -> PyResult<T> {
    let json = given.py().import("json")?;
    let text: String = json.call_method1("dumps", (given,))?.extract()?;
    serde_json::from_str(&text).map_err(|error| value(format!("{name}: {error}")))
}

#[pymethods]
impl Dictionaries {
    /// `layers`: of each layer a dict of pairs, keys first, under `dictionaries`, `codebooks`, `maps`.
    #[new]
    fn new(
        model: &Bound<'_, PyDict>,
        training: &Bound<'_, PyDict>,
        layers: Vec<Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let model: ModelIdentity = to_json(model, "model")?;
        let training: Training = to_json(training, "training")?;
        let layers = layers.iter().map(|layer| {
            let mut own = LayerDictionaries::default();
            for (name, both) in layer.iter() {
                let name: String = name.extract()?;
                match name.as_str() {
                    "dictionaries" => {
                        let (keys, values): (PyRef<'_, Dictionary>, PyRef<'_, Dictionary>) =
                            both.extract()?;
                        own.sparse = Some(KeyValue::new(keys.0.clone(), values.0.clone()));
                    }
                    "codebooks" => {
                        let (keys, values): (PyRef<'_, Codebooks>, PyRef<'_, Codebooks>) =
                            both.extract()?;
                        own.codebooks = Some(KeyValue::new(keys.0.clone(), values.0.clone()));
                    }
                    "maps" => {
                        let (keys, values): (PyRef<'_, HeadMaps>, PyRef<'_, HeadMaps>) =
                            both.extract()?;
                        own.maps = Some(KeyValue::new(keys.0.clone(), values.0.clone()));
                    }
                    name => {
                        return Err(value(format!(
                            "a layer has \"dictionaries\", \"codebooks\" and \"maps\", and no {name:?}"
                        )));
                    }
                }
            }
            Ok(own)
        });
        let layers: Vec<LayerDictionaries> = layers.collect::<PyResult<_>>()?;
        let set = DictionarySet {
            layers,
            model,
            training,
        };
        set.check_alike().map_err(codec)?;
        Ok(Self(Arc::new(set)))
    }

    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let set = detached(py, || DictionarySet::load(&path))?.map_err(codec)?;
        Ok(Self(Arc::new(set)))
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        detached(py, || self.0.save(&path))?.map_err(codec)
    }

    fn __len__(&self) -> usize {
        self.0.layers.len()
    }

    /// Nothing changes it: a copy is itself.
    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __repr__(&self) -> String {
        let ModelIdentity {
            name,
            layers,
            kv_heads,
            head_dim,
            ..
        } = &self.0.model;
        format!("Dictionaries of {name}: {layers} layers, {kv_heads} KV heads, head dim {head_dim}")
    }

    #[getter]
    fn model<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        from_json(py, &serde_json::to_string(&self.0.model))
    }

    #[getter]
    fn training<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        from_json(py, &serde_json::to_string(&self.0.training))
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }

    /// The largest sparsity of additive codes, or of sparse ones.
    #[pyo3(signature = (*, additive))]
    fn max_sparsity(&self, additive: bool) -> usize {
        self.0.max_sparsity(match additive {
            true => CodeFamily::Additive,
            false => CodeFamily::Sparse,
        })
    }

    fn dictionary(&self, layer: usize, part: &str) -> PyResult<Option<Dictionary>> {
        let own = self::part(self.layer(layer)?.sparse.as_ref(), part)?;
        Ok(own.map(Dictionary))
    }

    fn codebooks(&self, layer: usize, part: &str) -> PyResult<Option<Codebooks>> {
        let own = self::part(self.layer(layer)?.codebooks.as_ref(), part)?;
        Ok(own.map(Codebooks))
    }

    fn maps(&self, layer: usize, part: &str) -> PyResult<Option<HeadMaps>> {
        let own = self::part(self.layer(layer)?.maps.as_ref(), part)?;
        Ok(own.map(HeadMaps))
    }

    /// Refuses a model, by its identity, that these dictionaries are not for.
    fn check_fits(&self, model: &Bound<'_, PyDict>) -> PyResult<()> {
        let model: ModelIdentity = to_json(model, "model")?;
        self.0.check_fits(&model).map_err(codec)
    }
}
