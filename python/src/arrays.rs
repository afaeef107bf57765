//! Arrays in and out.

use numpy::{IntoPyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use crate::error::value;

/// Numbers of an array in rows, `f32`: the array's own where they lie so, else a copy.
pub(crate) struct Numbers<'py> {
    array: PyReadonlyArrayDyn<'py, f32>,
    name: &'static str,
}

impl<'py> Numbers<'py> {
    /// Takes an array, or what `numpy.asarray` makes one of.
    pub(crate) fn new(given: &Bound<'py, PyAny>, name: &'static str) -> PyResult<Self> {
        let own = given.cast::<PyArrayDyn<f32>>();
        let array = match own {
            Ok(array) if array.is_c_contiguous() => array.clone(),
            _ => converted(given, name)?,
        };
        let array = array
            .try_readonly()
            .map_err(|error| value(format!("{name}: {error}")))?;
        Ok(Self { array, name })
    }

    pub(crate) fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    /// The shape, of so many dimensions, which `wanted` names.
    pub(crate) fn dims<const N: usize>(&self, wanted: &str) -> PyResult<[usize; N]> {
        let shape = self.shape();
        <[usize; N]>::try_from(shape).map_err(|_| {
            let name = self.name;
            value(format!(
                "{name}: its shape is {shape:?}, but {wanted} is needed"
            ))
        })
    }

    pub(crate) fn numbers(&self) -> PyResult<&[f32]> {
        let numbers = self.array.as_slice();
        numbers.map_err(|error| value(format!("{}: {error}", self.name)))
    }
}

fn converted<'py>(given: &Bound<'py, PyAny>, name: &str) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    static NUMPY: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let py = given.py();
    let numpy = NUMPY.get_or_try_init(py, || py.import("numpy").map(Bound::unbind))?;
    let array = numpy.bind(py).call_method1("asarray", (given,))?;
    let kind: String = array.getattr("dtype")?.getattr("kind")?.extract()?;
    if !["f", "i", "u"].contains(&kind.as_str()) {
        let dtype = array.getattr("dtype")?;
        return Err(PyTypeError::new_err(format!(
            "{name}: numbers are needed, and its dtype is {dtype}"
        )));
    }
    let options = PyDict::new(py);
    options.set_item("dtype", "float32")?;
    let array = numpy
        .bind(py)
        .call_method("ascontiguousarray", (array,), Some(&options))?;
    Ok(array.cast_into::<PyArrayDyn<f32>>()?)
}

/// An array of this shape that takes the numbers over.
pub(crate) fn array<'py, T: numpy::Element>(
    py: Python<'py>,
    numbers: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let flat = numbers.into_pyarray(py);
    flat.reshape(shape.to_vec())
}
