//! The cache of one layer of one sequence.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use lexico::attention::NumberType;
use lexico::cache::{CacheOptions, Coding, LayerFootprint, LayerState};
use lexico::threads::Rayon;
use lexico::{Fit, KeyValue, LayerSettings};
use numpy::PyArrayDyn;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use serde::{Deserialize, Serialize};

use crate::arrays::{Numbers, array};
use crate::dictionaries::Dictionaries;
use crate::error::{LexicoError, codec, value};
use crate::options;
use crate::work::detached;

type Array<'py> = Bound<'py, PyArrayDyn<f32>>;

/// First bytes of a saved layer: the format and the version that is written and read.
const FORMAT: &[u8] = b"lexico-layer/1\n";

/// No text is longer.
const MAX_FIRST_POSITION: usize = 1 << 30;

/// Keys and values of a layer: the past as codes, the first and the newest positions dense.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct LayerCache {
    /// The options, as they were given.
    text: String,
    options: CacheOptions,
    kv_heads: usize,
    head_dim: usize,
    sliding_window: Option<usize>,
    cache: Mutex<lexico::LayerCache>,
    /// True once positions could not be coded: some are missing.
    broken: AtomicBool,
}

/// The beginning of a saved layer; the blocks follow it.
#[derive(Serialize, Deserialize)]
struct Header {
    /// The cache, as options give it.
    cache: String,
    sparsities: KeyValue<Vec<usize>>,
    sliding_window: Option<usize>,
    checksums: KeyValue<u32>,
    positions: usize,
    leaving: Option<usize>,
    #[serde(default)]
    all_dense: bool,
    /// Names of the blocks and their bytes.
    blocks: Vec<(String, usize)>,
}

fn damaged(part: &str) -> PyErr {
    LexicoError::new_err(format!("the saved layer is damaged or cut short: {part}"))
}

impl LayerCache {
    fn make(
        dictionaries: &Dictionaries,
        layer: usize,
        text: &str,
        options: &CacheOptions,
        settings: LayerSettings,
        first_position: usize,
    ) -> PyResult<Self> {
        let joint = dictionaries.0.joint().layers;
        if joint > 1 {
            return Err(LexicoError::new_err(format!(
                "{joint} layers are coded together, for which there are no caches in Python; learn dictionaries with \
                 --joint-layers 1"
            )));
        }
        let own = dictionaries.layer(layer)?;
        if settings.sliding_window == Some(0) {
            return Err(value(
                "sliding_window=0: a query sees its own position at least",
            ));
        }
        if first_position > MAX_FIRST_POSITION {
            return Err(value(format!(
                "first_position={first_position}: it must be at most {MAX_FIRST_POSITION}"
            )));
        }
        let mut cache = lexico::LayerCache::new(own, settings).map_err(codec)?;
        if first_position > 0 {
            // As if those before it had been dropped.
            let state = LayerState {
                positions: first_position,
                ..cache.save()
            };
            cache.load(&state).map_err(codec)?;
        }
        Ok(Self {
            text: text.to_owned(),
            options: options.clone(),
            kv_heads: dictionaries.0.model.kv_heads,
            head_dim: cache.head_dim(),
            sliding_window: cache.settings().sliding_window,
            cache: Mutex::new(cache),
            broken: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> PyResult<MutexGuard<'_, lexico::LayerCache>> {
        let broken = || {
            let reason = "this cache cannot be used any further: work on it broke off";
            LexicoError::new_err(reason)
        };
        let cache = self.cache.lock().map_err(|_| broken())?;
        match self.broken.load(Ordering::Relaxed) {
            true => Err(broken()),
            false => Ok(cache),
        }
    }

    /// Asks the cache while other threads of Python go on: another one's work on it may take a while.
    fn asked<T: Send>(
        &self,
        py: Python<'_>,
        ask: impl FnOnce(&mut lexico::LayerCache) -> T + Send,
    ) -> PyResult<T> {
        detached(py, || Ok(ask(&mut *self.lock()?)))?
    }

    /// New keys and values of every head, and how many; only finite ones can be coded.
    fn new_positions(&self, keys: &Numbers<'_>, values: &Numbers<'_>) -> PyResult<usize> {
        let (heads, m) = (self.kv_heads, self.head_dim);
        for (name, part) in [("keys", keys), ("values", values)] {
            let shape = part.shape();
            if shape.len() != 3 || shape[0] != heads || shape[2] != m {
                return Err(value(format!(
                    "{name}: their shape is {shape:?}, but [{heads}, t, {m}] is needed, KV heads first"
                )));
            }
            if !part.numbers()?.iter().all(|x| x.is_finite()) {
                return Err(value(format!("{name}: a number is a NaN or an infinity")));
            }
        }
        let (t, others) = (keys.shape()[1], values.shape()[1]);
        if t != others {
            return Err(value(format!("keys of {t} positions, values of {others}")));
        }
        Ok(t)
    }

    fn header(cache: &lexico::LayerCache, text: &str, state: &LayerState) -> Header {
        let blocks = state.blocks.iter();
        Header {
            cache: text.to_owned(),
            sparsities: cache.settings().sparsities.clone(),
            sliding_window: cache.settings().sliding_window,
            checksums: state.checksums,
            positions: state.positions,
            leaving: state.leaving,
            all_dense: state.all_dense,
            blocks: blocks
                .map(|(name, bytes)| (name.clone(), bytes.len()))
                .collect(),
        }
    }
}

#[pymethods]
impl LayerCache {
    #[new]
    #[pyo3(signature = (dictionaries, layer, cache = "lexico", *, sliding_window = None, first_position = 0))]
    fn new(
        dictionaries: &Dictionaries,
        layer: usize,
        cache: &str,
        sliding_window: Option<usize>,
        first_position: usize,
    ) -> PyResult<Self> {
        let options = options::parse(cache)?;
        let windows = vec![sliding_window; dictionaries.0.layers.len()];
        let mut settings = options::layers(&options, &dictionaries.0, &windows)?;
        // Refused by its number where there is no such layer.
        dictionaries.layer(layer)?;
        let settings = settings.swap_remove(layer);
        Self::make(
            dictionaries,
            layer,
            cache,
            &options,
            settings,
            first_position,
        )
    }

    /// Caches of all layers.
    #[staticmethod]
    #[pyo3(signature = (dictionaries, cache = "lexico", *, sliding_windows = None, first_position = 0))]
    fn for_layers(
        dictionaries: &Dictionaries,
        cache: &str,
        sliding_windows: Option<Vec<Option<usize>>>,
        first_position: usize,
    ) -> PyResult<Vec<Self>> {
        let options = options::parse(cache)?;
        let layers = dictionaries.0.layers.len();
        let windows = sliding_windows.unwrap_or_else(|| vec![None; layers]);
        if windows.len() != layers {
            let count = windows.len();
            return Err(value(format!(
                "sliding_windows of {count} layers; there are {layers}"
            )));
        }
        let settings = options::layers(&options, &dictionaries.0, &windows)?;
        let settings = settings.into_iter().enumerate();
        settings
            .map(|(layer, settings)| {
                Self::make(
                    dictionaries,
                    layer,
                    cache,
                    &options,
                    settings,
                    first_position,
                )
            })
            .collect()
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.asked(py, |cache| cache.len())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let asked = self.asked(py, |cache| (cache.len(), cache.footprint().total()));
        let (positions, bytes) = asked?;
        Ok(format!(
            "LayerCache \"{}\" of {positions} positions, {bytes} bytes",
            self.text
        ))
    }

    #[getter]
    fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    #[getter]
    fn sliding_window(&self) -> Option<usize> {
        self.sliding_window
    }

    /// The settings, for a form of this cache on another device.
    #[getter]
    fn settings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let settings = self.asked(py, |cache| cache.settings().clone())?;
        let LayerSettings {
            coding,
            fit,
            sparsities,
            sinks,
            recent_window,
            memory,
            batch,
            number_type,
            ..
        } = settings;
        let all = PyDict::new(py);
        let (format, beam, tolerance) = match coding {
            Coding::Additive { beam_width } => ("additive", beam_width, 0.0),
            Coding::Sparse {
                coefficients,
                tolerance,
            } => (coefficients.name(), 0, tolerance),
        };
        let fit = match fit {
            Fit::Unbiased => "unbiased",
            Fit::LeastSquares => "least-squares",
        };
        let dense = match number_type {
            NumberType::F16 => "f16",
            NumberType::F32 => "f32",
        };
        all.set_item("format", format)?;
        all.set_item("beam", beam)?;
        all.set_item("tolerance", tolerance)?;
        all.set_item("fit", fit)?;
        all.set_item("keys", sparsities.keys)?;
        all.set_item("values", sparsities.values)?;
        all.set_item("sinks", sinks)?;
        all.set_item("window", recent_window)?;
        all.set_item("memory", memory.map(|memory| memory.bytes()))?;
        all.set_item("batch", batch)?;
        all.set_item("dense", dense)?;
        Ok(all)
    }

    #[getter]
    fn coded(&self, py: Python<'_>) -> PyResult<usize> {
        self.asked(py, |cache| cache.coded())
    }

    fn append(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        values: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (keys, values) = (Numbers::new(keys, "keys")?, Numbers::new(values, "values")?);
        self.new_positions(&keys, &values)?;
        let new = KeyValue::new(keys.numbers()?, values.numbers()?);
        let appended = self.asked(py, |cache| cache.append(new, &Rayon))?;
        if appended.is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
        appended.map_err(codec)
    }

    #[pyo3(signature = (queries, keys = None, values = None))]
    fn attend<'py>(
        &self,
        py: Python<'py>,
        queries: &Bound<'py, PyAny>,
        keys: Option<&Bound<'py, PyAny>>,
        values: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Array<'py>> {
        let queries = Numbers::new(queries, "queries")?;
        let new = match (keys, values) {
            (None, None) => None,
            (Some(keys), Some(values)) => {
                Some((Numbers::new(keys, "keys")?, Numbers::new(values, "values")?))
            }
            _ => {
                return Err(value(
                    "keys and values belong together: give both, or neither",
                ));
            }
        };
        let t = match &new {
            Some((keys, values)) => self.new_positions(keys, values)?,
            None => 1,
        };
        let (shape, kv_heads, m) = (queries.shape(), self.kv_heads, self.head_dim);
        let wrong = match *shape {
            [heads, own, length] => !heads.is_multiple_of(kv_heads) || own != t || length != m,
            [heads, _, own, length] => heads != kv_heads || own != t || length != m,
            _ => true,
        };
        if wrong {
            return Err(value(format!(
                "queries: their shape is {shape:?}, but [heads, {t}, {m}] is needed, heads being a multiple of {kv_heads}, or \
                 [{kv_heads}, G, {t}, {m}]"
            )));
        }
        let new = match &new {
            Some((keys, values)) => Some(KeyValue::new(keys.numbers()?, values.numbers()?)),
            None => None,
        };
        let numbers = queries.numbers()?;
        let out = detached(py, || {
            let mut out = vec![0.0; numbers.len()];
            if t > 0 {
                self.lock()?.attend(numbers, new, &mut out, &Rayon);
            }
            Ok::<_, PyErr>(out)
        })?;
        array(py, out?, queries.shape())
    }

    fn drop(&self, py: Python<'_>, count: usize) -> PyResult<()> {
        let held = self.asked(py, |cache| {
            let held = cache.len();
            if count <= held {
                cache.drop_front(count);
            }
            held
        })?;
        match count > held {
            true => Err(value(format!("{count} positions to drop; {held} are held"))),
            false => Ok(()),
        }
    }

    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let fork = self.asked(py, |cache| cache.fork())?;
        Ok(Self {
            text: self.text.clone(),
            options: self.options.clone(),
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            sliding_window: self.sliding_window,
            cache: Mutex::new(fork),
            broken: AtomicBool::new(false),
        })
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.fork(py)
    }

    fn decode<'py>(&self, py: Python<'py>) -> PyResult<(Array<'py>, Array<'py>)> {
        let (decoded, held) = detached(py, || {
            let cache = self.lock()?;
            Ok::<_, PyErr>((cache.decode().map_err(codec)?, cache.len()))
        })??;
        let shape = [self.kv_heads, held, self.head_dim];
        Ok((
            array(py, decoded.keys, &shape)?,
            array(py, decoded.values, &shape)?,
        ))
    }

    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.asked(py, |cache| cache.footprint().total())
    }

    fn footprint<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let LayerFootprint {
            codes,
            sinks,
            recent_window,
            leaving,
            bookkeeping,
        } = self.asked(py, |cache| cache.footprint())?;
        let parts = PyDict::new(py);
        for (name, bytes) in [
            ("codes", codes.keys + codes.values),
            ("sinks", sinks),
            ("window", recent_window),
            ("leaving", leaving),
            ("bookkeeping", bookkeeping),
        ] {
            parts.set_item(name, bytes)?;
        }
        Ok(parts)
    }

    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = detached(py, || {
            let cache = self.lock()?;
            let state = cache.save();
            let header = serde_json::to_vec(&Self::header(&cache, &self.text, &state));
            let header = header.map_err(|error| value(error.to_string()))?;
            let mut rest = (header.len() as u32).to_le_bytes().to_vec();
            rest.extend(header);
            state
                .blocks
                .iter()
                .for_each(|(_, bytes)| rest.extend(bytes));
            let checksum = crc32fast::hash(&rest).to_le_bytes();
            Ok::<_, PyErr>([FORMAT, &checksum, &rest].concat())
        })?;
        Ok(PyBytes::new(py, &bytes?))
    }

    fn load(&self, py: Python<'_>, saved: &[u8]) -> PyResult<()> {
        let rest = saved.strip_prefix(FORMAT).ok_or_else(|| {
            LexicoError::new_err("it is no saved layer, or one of another version")
        })?;
        let short = || damaged("it ends within its header");
        let (checksum, rest) = rest.split_first_chunk().ok_or_else(short)?;
        if crc32fast::hash(rest) != u32::from_le_bytes(*checksum) {
            return Err(damaged("its checksum differs"));
        }
        let (length, rest) = rest.split_first_chunk().ok_or_else(short)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (header, mut rest) = rest.split_at_checked(length).ok_or_else(short)?;
        let header: Header = serde_json::from_slice(header)
            .map_err(|error| damaged(&format!("its header: {error}")))?;
        let mut blocks = Vec::with_capacity(header.blocks.len());
        for (name, length) in &header.blocks {
            let split = rest.split_at_checked(*length);
            let (own, after) = split.ok_or_else(|| damaged("it ends before its last block"))?;
            blocks.push((name.clone(), own.to_vec()));
            rest = after;
        }
        if !rest.is_empty() {
            return Err(damaged("there is more after its last block"));
        }
        let (options, state) = (
            options::parse(&header.cache)?,
            LayerState {
                checksums: header.checksums,
                positions: header.positions,
                leaving: header.leaving,
                all_dense: header.all_dense,
                blocks,
            },
        );
        detached(py, || {
            let mut cache = self.lock()?;
            let settings = cache.settings();
            let (sparsities, sliding) = (&settings.sparsities, settings.sliding_window);
            let same = options == self.options && header.sliding_window == sliding;
            if !same || header.sparsities != *sparsities {
                return Err(LexicoError::new_err(format!(
                    "it was saved by a cache with other settings, {:?} behind a sliding window of {:?}; this one is {:?} behind \
                     {sliding:?}, or its atoms are allocated otherwise",
                    header.cache, header.sliding_window, self.text,
                )));
            }
            cache.load(&state).map_err(codec)
        })?
    }
}
