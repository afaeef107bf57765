//! Arrays in and out.

use numpy::{IntoPyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::value;

/// Numbers of an array in rows, `f32` or `f64`: the array's own where they lie so, else a copy.
pub(crate) struct Numbers<'py, T: Number = f32> {
    array: PyReadonlyArrayDyn<'py, T>,
    name: &'static str,
}

/// A number type of arrays.
pub(crate) trait Number: numpy::Element {
    /// As numpy calls it.
    const NAME: &'static str;
}

impl Number for f32 {
    const NAME: &'static str = "float32";
}

impl Number for f64 {
    const NAME: &'static str = "float64";
}

impl<'py, T: Number> Numbers<'py, T> {
    /// Takes an array, or what `numpy.asarray` makes one of.
    pub(crate) fn new(given: &Bound<'py, PyAny>, name: &'static str) -> PyResult<Self> {
        let own = given.cast::<PyArrayDyn<T>>();
        let array = match own {
            Ok(array) if array.is_c_contiguous() && is_aligned(array)? => array.clone(),
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

    pub(crate) fn numbers(&self) -> PyResult<&[T]> {
        let numbers = self.array.as_slice();
        numbers.map_err(|error| value(format!("{}: {error}", self.name)))
    }
}

fn is_aligned(array: &Bound<'_, PyAny>) -> PyResult<bool> {
    array.getattr("flags")?.getattr("aligned")?.extract()
}

fn converted<'py, T: Number>(
    given: &Bound<'py, PyAny>,
    name: &str,
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
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
    // In rows, and at addresses that are multiples of a number's size.
    let array = numpy
        .bind(py)
        .call_method1("require", (array, T::NAME, vec!["C", "A"]))?;
    Ok(array.cast_into::<PyArrayDyn<T>>()?)
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
