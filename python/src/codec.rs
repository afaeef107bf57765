//! Dictionaries, codebooks, the maps of heads, and codes over them.

use std::sync::Arc;

use lexico::codes::CodeFormat;
use lexico::dictionary::{CodebookSizes, JointBasis, RotaryMeans};
use lexico::encode::MAX_BEAM_WIDTH;
use lexico::{AdditiveFormat, BeamSearch, EncodedBatch, Encoder, Fit, Pursuit, SparseFormat};
use numpy::PyArrayDyn;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use crate::arrays::{Numbers, array};
use crate::error::{codec, value};
use crate::work::detached;

type Array<'py, T> = Bound<'py, PyArrayDyn<T>>;

/// `N` unit atoms of length `m`, for sparse codes.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct Dictionary(pub(crate) Arc<lexico::Dictionary>);

/// Codebooks of atoms of any length, for additive codes.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct Codebooks(pub(crate) Arc<lexico::Codebooks>);

/// The maps of a layer's KV heads behind which additive codes are found.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct HeadMaps(pub(crate) Arc<lexico::dictionary::HeadMaps>);

/// Codes of some vectors.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct Codes {
    codes: lexico::Codes,
    batch: EncodedBatch,
    atoms: Source,
}

/// What codes are over.
enum Source {
    Dictionary(Arc<lexico::Dictionary>),
    Codebooks(Arc<lexico::Codebooks>),
}

fn fit(name: &str) -> PyResult<Fit> {
    match name {
        "unbiased" => Ok(Fit::Unbiased),
        "least-squares" => Ok(Fit::LeastSquares),
        _ => Err(value(format!(
            "fit={name:?}: it must be \"unbiased\" or \"least-squares\""
        ))),
    }
}

fn coefficient_format(name: &str) -> PyResult<lexico::CoefficientFormat> {
    let formats = [
        lexico::CoefficientFormat::I8,
        lexico::CoefficientFormat::F8,
        lexico::CoefficientFormat::F32,
    ];
    let format = formats.into_iter().find(|format| format.name() == name);
    format.ok_or_else(|| {
        value(format!(
            "coefficients={name:?}: it must be \"i8\", \"f8\" or \"f32\""
        ))
    })
}

/// Refuses vectors that are not of length `m`.
fn check_vectors(vectors: &Numbers<'_>, m: usize) -> PyResult<usize> {
    let [n, length] = vectors.dims("[n, m]")?;
    if length != m {
        return Err(value(format!(
            "vectors of length {length}; the atoms have length {m}"
        )));
    }
    Ok(n)
}

impl Codes {
    fn new(
        py: Python<'_>,
        vectors: &Numbers<'_>,
        encoder: &dyn Encoder,
        format: CodeFormat,
        atoms: Source,
    ) -> PyResult<Self> {
        check_vectors(vectors, encoder.head_dim())?;
        let numbers = vectors.numbers()?;
        let (codes, batch) = detached(py, || {
            let batch = encoder.encode(numbers)?;
            let mut codes = lexico::Codes::new(format)?;
            codes.extend(&batch);
            Ok::<_, lexico::Error>((codes, batch))
        })?
        .map_err(codec)?;
        Ok(Self {
            codes,
            batch,
            atoms,
        })
    }
}

#[pymethods]
impl Dictionary {
    #[new]
    fn new(py: Python<'_>, atoms: &Bound<'_, PyAny>) -> PyResult<Self> {
        let atoms = Numbers::new(atoms, "atoms")?;
        let [_, m] = atoms.dims("[N, m]")?;
        let numbers = atoms.numbers()?.to_vec();
        let own = detached(py, || lexico::Dictionary::new(numbers, m))?.map_err(codec)?;
        Ok(Self(own.into()))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Nothing changes it: a copy is itself.
    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __repr__(&self) -> String {
        format!(
            "Dictionary of {} atoms of length {}",
            self.0.len(),
            self.0.head_dim()
        )
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.0.head_dim()
    }

    #[getter]
    fn atoms<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        let shape = [self.0.len(), self.0.head_dim()];
        array(py, self.0.atoms().to_vec(), &shape)
    }

    #[pyo3(signature = (vectors, sparsity, *, coefficients = "i8", tolerance = 0.0, fit = "unbiased"))]
    fn encode(
        &self,
        py: Python<'_>,
        vectors: &Bound<'_, PyAny>,
        sparsity: usize,
        coefficients: &str,
        tolerance: f32,
        fit: &str,
    ) -> PyResult<Codes> {
        let vectors = Numbers::new(vectors, "vectors")?;
        let pursuit = Pursuit::new(&self.0, sparsity).map_err(codec)?;
        let pursuit = pursuit.with_tolerance(tolerance).map_err(codec)?;
        let pursuit = pursuit.with_fit(self::fit(fit)?);
        let format = SparseFormat {
            sparsity,
            variable: tolerance > 0.0,
            coefficients: coefficient_format(coefficients)?,
        };
        let atoms = Source::Dictionary(Arc::clone(&self.0));
        Codes::new(py, &vectors, &pursuit, format.into(), atoms)
    }
}

#[pymethods]
impl Codebooks {
    #[new]
    fn new(py: Python<'_>, atoms: &Bound<'_, PyAny>, first: usize) -> PyResult<Self> {
        let atoms = Numbers::new(atoms, "atoms")?;
        let [_, m] = atoms.dims("[N, m]")?;
        let numbers = atoms.numbers()?.to_vec();
        let sizes = CodebookSizes { first };
        let own = detached(py, || lexico::Codebooks::new(numbers, m, sizes))?.map_err(codec)?;
        Ok(Self(own.into()))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Nothing changes it: a copy is itself.
    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __repr__(&self) -> String {
        format!(
            "Codebooks: {}, the first of {} atoms, of length {}",
            self.0.len(),
            self.0.sizes().first,
            self.0.head_dim()
        )
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.0.head_dim()
    }

    #[getter]
    fn first(&self) -> usize {
        self.0.sizes().first
    }

    #[getter]
    fn atoms<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        let m = self.0.head_dim();
        let atoms = self.0.atoms().to_vec();
        let shape = [atoms.len() / m, m];
        array(py, atoms, &shape)
    }

    #[pyo3(signature = (vectors, sparsity, *, beam = 8, fit = "unbiased"))]
    fn encode(
        &self,
        py: Python<'_>,
        vectors: &Bound<'_, PyAny>,
        sparsity: usize,
        beam: usize,
        fit: &str,
    ) -> PyResult<Codes> {
        let vectors = Numbers::new(vectors, "vectors")?;
        if !(1..=MAX_BEAM_WIDTH).contains(&beam) {
            return Err(value(format!(
                "beam={beam}: it must be from 1 to {MAX_BEAM_WIDTH}"
            )));
        }
        let search = BeamSearch::new(&self.0, sparsity).map_err(codec)?;
        let search = search.with_beam_width(beam).with_fit(self::fit(fit)?);
        let format = AdditiveFormat {
            sparsity,
            sizes: self.0.sizes(),
        };
        let atoms = Source::Codebooks(Arc::clone(&self.0));
        Codes::new(py, &vectors, &search, format.into(), atoms)
    }
}

#[pymethods]
impl Codes {
    fn __len__(&self) -> usize {
        self.codes.len()
    }

    fn __repr__(&self) -> String {
        format!(
            "Codes of {} vectors, {} bytes",
            self.codes.len(),
            self.codes.bytes_used()
        )
    }

    #[getter]
    fn sparsity(&self) -> usize {
        self.batch.sparsity
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.codes.bytes_used()
    }

    #[getter]
    fn lengths<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, u16>> {
        array(py, self.batch.lengths.clone(), &[self.batch.len()])
    }

    #[getter]
    fn indices<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, u16>> {
        let shape = [self.batch.len(), self.batch.sparsity];
        array(py, self.batch.indices.clone(), &shape)
    }

    #[getter]
    fn coefficients<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        let shape = [self.batch.len(), self.batch.sparsity];
        array(py, self.batch.coefficients.clone(), &shape)
    }

    #[getter]
    fn relative_errors<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        array(py, self.batch.relative_errors.clone(), &[self.batch.len()])
    }

    fn decode<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        let (decoded, m) = detached(py, || match &self.atoms {
            Source::Dictionary(own) => (self.codes.decode(&**own), own.head_dim()),
            Source::Codebooks(own) => (self.codes.decode(&**own), own.head_dim()),
        })?;
        array(py, decoded.map_err(codec)?, &[self.codes.len(), m])
    }
}

#[pymethods]
impl HeadMaps {
    #[new]
    #[pyo3(signature = (means, matrices, *, frequencies = None, rotary_means = None, basis = None))]
    fn new(
        py: Python<'_>,
        means: &Bound<'_, PyAny>,
        matrices: &Bound<'_, PyAny>,
        frequencies: Option<&Bound<'_, PyAny>>,
        rotary_means: Option<&Bound<'_, PyAny>>,
        basis: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let means = Numbers::new(means, "means")?;
        let [_, m] = means.dims("[heads, m]")?;
        let matrices = Numbers::new(matrices, "matrices")?;
        let _: [usize; 3] = matrices.dims("[heads, m, m]")?;
        let (means, matrices) = (means.numbers()?, matrices.numbers()?);
        let own = detached(py, || lexico::dictionary::HeadMaps::new(means, matrices, m))?;
        let own = own.map_err(codec)?;
        let own = match (frequencies, rotary_means) {
            (None, None) => own,
            (Some(frequencies), Some(rotary_means)) => {
                let frequencies = Numbers::new(frequencies, "frequencies")?;
                let rotary_means = Numbers::new(rotary_means, "rotary_means")?;
                let (frequencies, rotary_means) = (frequencies.numbers()?, rotary_means.numbers()?);
                let rotary = RotaryMeans::new(frequencies, rotary_means, m).map_err(codec)?;
                own.with_rotary_means(rotary).map_err(codec)?
            }
            _ => {
                return Err(value(
                    "frequencies and rotary_means belong together: give both, or neither",
                ));
            }
        };
        let own = match basis {
            None => own,
            Some(basis) => {
                let basis = Numbers::new(basis, "basis")?;
                let [_, length, _] = basis.dims("[groups, h·m, h·m]")?;
                let together = length.checked_div(m).unwrap_or(0);
                let (numbers, heads) = (basis.numbers()?, own.heads());
                let basis = JointBasis::new(numbers, heads, together, m).map_err(codec)?;
                own.with_basis(basis).map_err(codec)?
            }
        };
        Ok(Self(own.into()))
    }

    /// Nothing changes it: a copy is itself.
    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __repr__(&self) -> String {
        let (heads, m) = (self.0.heads(), self.0.head_dim());
        match self.joint_heads() {
            1 => format!("HeadMaps of {heads} heads, head dim {m}"),
            joint => format!("HeadMaps of {heads} heads, {joint} together, head dim {m}"),
        }
    }

    /// Heads that are coded together.
    #[getter]
    fn joint_heads(&self) -> usize {
        self.0.basis().map_or(1, JointBasis::together)
    }

    #[getter]
    fn basis<'py>(&self, py: Python<'py>) -> PyResult<Option<Array<'py, f32>>> {
        let basis = self.0.basis().map(|basis| {
            let length = basis.together() * basis.head_dim();
            let groups = basis.heads() / basis.together();
            array(py, basis.numbers(), &[groups, length, length])
        });
        basis.transpose()
    }

    #[getter]
    fn heads(&self) -> usize {
        self.0.heads()
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.0.head_dim()
    }

    #[getter]
    fn means<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        array(py, self.0.numbers().0, &[self.0.heads(), self.0.head_dim()])
    }

    #[getter]
    fn matrices<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        let m = self.0.head_dim();
        array(py, self.0.numbers().1, &[self.0.heads(), m, m])
    }

    #[getter]
    fn inverses<'py>(&self, py: Python<'py>) -> PyResult<Array<'py, f32>> {
        let m = self.0.head_dim();
        array(py, self.0.inverses(), &[self.0.heads(), m, m])
    }

    #[getter]
    fn frequencies<'py>(&self, py: Python<'py>) -> PyResult<Option<Array<'py, f32>>> {
        let rotary = self.0.rotary_means();
        let frequencies = rotary.map(|rotary| rotary.frequencies().to_vec());
        let frequencies = frequencies.map(|own| {
            let pairs = own.len();
            array(py, own, &[pairs])
        });
        frequencies.transpose()
    }

    #[getter]
    fn rotary_means<'py>(&self, py: Python<'py>) -> PyResult<Option<Array<'py, f32>>> {
        let rotary = self.0.rotary_means();
        let means = rotary.map(|rotary| rotary.means().to_vec());
        let shape = [self.0.heads(), self.0.head_dim()];
        means.map(|own| array(py, own, &shape)).transpose()
    }

    fn apply<'py>(
        &self,
        py: Python<'py>,
        head: usize,
        positions: Vec<usize>,
        vectors: &Bound<'py, PyAny>,
    ) -> PyResult<Array<'py, f32>> {
        self.turn(
            py,
            head,
            positions,
            vectors,
            lexico::dictionary::HeadMaps::to_coded,
        )
    }

    fn invert<'py>(
        &self,
        py: Python<'py>,
        head: usize,
        positions: Vec<usize>,
        vectors: &Bound<'py, PyAny>,
    ) -> PyResult<Array<'py, f32>> {
        self.turn(
            py,
            head,
            positions,
            vectors,
            |maps, head, positions, vectors| maps.from_coded(head, positions, vectors.to_vec()),
        )
    }

    fn apply_all<'py>(
        &self,
        py: Python<'py>,
        positions: Vec<usize>,
        vectors: &Bound<'py, PyAny>,
    ) -> PyResult<Array<'py, f32>> {
        self.turn_all(py, positions, vectors, |maps, positions, vectors| {
            maps.all_to_coded(positions, vectors)
        })
    }

    fn invert_all<'py>(
        &self,
        py: Python<'py>,
        positions: Vec<usize>,
        vectors: &Bound<'py, PyAny>,
    ) -> PyResult<Array<'py, f32>> {
        self.turn_all(py, positions, vectors, |maps, positions, vectors| {
            maps.all_from_coded(positions, vectors.to_vec())
        })
    }
}

impl HeadMaps {
    fn turn_all<'py>(
        &self,
        py: Python<'py>,
        positions: Vec<usize>,
        vectors: &Bound<'py, PyAny>,
        turn: fn(&lexico::dictionary::HeadMaps, std::vec::IntoIter<usize>, &[f32]) -> Vec<f32>,
    ) -> PyResult<Array<'py, f32>> {
        let vectors = Numbers::new(vectors, "vectors")?;
        let shape: [usize; 3] = vectors.dims("[heads, n, m]")?;
        let (heads, m) = (self.0.heads(), self.0.head_dim());
        if shape[0] != heads || shape[2] != m {
            return Err(value(format!(
                "vectors: their shape is {shape:?}, but [{heads}, n, {m}] is needed"
            )));
        }
        if positions.len() != shape[1] {
            let count = positions.len();
            return Err(value(format!(
                "{count} positions of {} vectors of each head",
                shape[1]
            )));
        }
        let numbers = vectors.numbers()?;
        let turned = detached(py, || turn(&self.0, positions.into_iter(), numbers))?;
        array(py, turned, &shape)
    }

    fn turn<'py>(
        &self,
        py: Python<'py>,
        head: usize,
        positions: Vec<usize>,
        vectors: &Bound<'py, PyAny>,
        turn: fn(
            &lexico::dictionary::HeadMaps,
            usize,
            std::vec::IntoIter<usize>,
            &[f32],
        ) -> Vec<f32>,
    ) -> PyResult<Array<'py, f32>> {
        self.0.check_alone().map_err(codec)?;
        let vectors = Numbers::new(vectors, "vectors")?;
        let n = check_vectors(&vectors, self.0.head_dim())?;
        if head >= self.0.heads() {
            let heads = self.0.heads();
            return Err(PyIndexError::new_err(format!(
                "head {head}; there are maps of {heads} heads"
            )));
        }
        if positions.len() != n {
            let count = positions.len();
            return Err(value(format!("{count} positions of {n} vectors")));
        }
        let numbers = vectors.numbers()?;
        let turned = detached(py, || turn(&self.0, head, positions.into_iter(), numbers))?;
        array(py, turned, &[n, self.0.head_dim()])
    }
}
