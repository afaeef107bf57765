//! The server's engine without its HTTP: many texts at once, tokens in and tokens out.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lexico_llm::cache::CacheSpec;
use lexico_llm::gguf::GgufModel;
use lexico_llm::hub::HubName;
use lexico_llm::published::read_dictionaries;
use lexico_llm::sample::Sampling;
use lexico_llm::{DICTIONARY_FILE, Device, Model, Quantize};
use lexico_serve::{Event, Failure, Logprob, Options, TextRequest, Worker};
use pyo3::create_exception;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use crate::error::{LexicoError, codec, value};
use crate::work::detached;

create_exception!(
    lexico,
    BusyError,
    LexicoError,
    "An engine whose memory or places are taken by other texts: ask again a little later."
);
create_exception!(
    lexico,
    EndedError,
    LexicoError,
    "An engine that has ended, or is about to."
);

/// Texts at the most: far more than any queue holds.
const PLACES: u32 = 1 << 20;
/// Events that are handed over at once.
const AT_ONCE: usize = 64;

/// Time between two looks for a Ctrl-C.
const SIGNALS: Duration = Duration::from_millis(200);

/// A loaded model that writes texts.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct Engine {
    worker: Arc<Worker>,
    /// `None` once it has ended.
    runtime: Mutex<Option<Runtime>>,
    /// A place for each text that is begun and not over: its end waits for all of them.
    places: Arc<Semaphore>,
}

/// A text that is being written.
#[pyclass(module = "lexico", frozen)]
pub(crate) struct Text {
    events: Arc<Events>,
    task: AbortHandle,
}

/// What has happened and was not taken yet.
#[derive(Default)]
struct Events {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    events: Vec<Event>,
    over: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Events {
    fn add(&self, events: Vec<Event>, over: bool) {
        let mut waiting = locked(&self.waiting);
        waiting.events.extend(events);
        waiting.over |= over;
        self.more.notify_all();
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut locked(&self.waiting).events)
    }

    /// Waits a while for the next; `None` where there is none yet, and `Some(None)` where none comes any more.
    fn next(&self, time: Duration) -> Option<Option<Event>> {
        let quiet = |waiting: &mut Waiting| waiting.events.is_empty() && !waiting.over;
        let waited = self
            .more
            .wait_timeout_while(locked(&self.waiting), time, quiet);
        let mut waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        match waiting.events.is_empty() {
            true => waiting.over.then_some(None),
            false => Some(Some(waiting.events.remove(0))),
        }
    }
}

/// Adds events, and says so; where it is dropped nothing more comes.
struct Teller {
    events: Arc<Events>,
    notify: Option<Py<PyAny>>,
}

impl Teller {
    fn tell(&self, happened: Vec<Event>, over: bool) {
        self.events.add(happened, over);
        if let Some(notify) = &self.notify {
            // An exception is of a loop that has ended: nobody waits.
            Python::try_attach(|py| drop(notify.call0(py)));
        }
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.tell(Vec::new(), true);
    }
}

fn failed(failure: &Failure) -> PyErr {
    let message = failure.to_string();
    match failure {
        Failure::Refused(_) | Failure::TooLong(_) | Failure::TooLarge { .. } => value(message),
        Failure::Busy => BusyError::new_err(message),
        Failure::Ending => EndedError::new_err(message),
        _ => LexicoError::new_err(message),
    }
}

fn ended() -> PyErr {
    EndedError::new_err("the engine has ended")
}

/// The exception of an error of loading.
fn of_model(error: lexico_llm::Error) -> PyErr {
    match error {
        lexico_llm::Error::Codec(error) => codec(error),
        lexico_llm::Error::Io { path, reason } => match reason.raw_os_error() {
            Some(number) => PyOSError::new_err((number, reason.to_string(), path)),
            None => PyOSError::new_err(reason.to_string()),
        },
        other => LexicoError::new_err(other.to_string()),
    }
}

/// A setting by its text.
fn setting<T: std::str::FromStr<Err: std::fmt::Display>>(name: &str, text: &str) -> PyResult<T> {
    text.parse()
        .map_err(|error: T::Err| value(format!("{name}: {error}")))
}

/// The folder or file of a model: a path, else a name on the hub.
fn place(model: &str) -> lexico_llm::Result<PathBuf> {
    let name = model.parse::<HubName>().ok();
    match name.filter(|_| !Path::new(model).exists()) {
        Some(name) => Ok(name.fetch(false)?.path),
        None => Ok(PathBuf::from(model)),
    }
}

/// Loads a model with its dictionaries: those that are named, else those beside it.
fn load(
    model: &str,
    quantize: Quantize,
    dictionary: Option<PathBuf>,
    needed: bool,
) -> lexico_llm::Result<Model> {
    let path = place(model)?;
    let mut loaded = Model::load_on(&path, quantize, &Device::Cpu)?;
    loaded
        .notes
        .iter()
        .for_each(|note| tracing::warn!("{note}"));
    let beside = match path.is_file() {
        true => path.with_file_name(DICTIONARY_FILE),
        false => path.join(DICTIONARY_FILE),
    };
    let beside = Some(beside).filter(|path| needed && path.is_file());
    if let Some(path) = dictionary.or(beside) {
        let dictionaries = read_dictionaries(&loaded, &path, false)?;
        loaded.set_dictionaries(dictionaries)?;
    }
    Ok(loaded)
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (model, *, dictionary = None, cache = "lexico", kv_memory = 2 << 30, quantize = "none", alias = None,
        parallel = 32, ctx_size = 0, n_predict = 2048, ubatch_size = 256, prefix_store = None, prefix_store_size = 16 << 30,
        kv_events = None, max_waiting = 1024, queue_timeout = 60.0, log_level = None))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn new(
        py: Python<'_>,
        model: &str,
        dictionary: Option<PathBuf>,
        cache: &str,
        kv_memory: usize,
        quantize: &str,
        alias: Option<String>,
        parallel: usize,
        ctx_size: usize,
        n_predict: usize,
        ubatch_size: usize,
        prefix_store: Option<String>,
        prefix_store_size: u64,
        kv_events: Option<String>,
        max_waiting: usize,
        queue_timeout: f64,
        log_level: Option<&str>,
    ) -> PyResult<Self> {
        if let Some(level) = log_level {
            let level: tracing::Level = setting("log_level", level)?;
            let log = tracing_subscriber::fmt()
                .with_writer(std::io::stderr)
                .with_ansi(false)
                .with_target(false)
                .with_max_level(level);
            // Where the program has a log of its own already, that one stays.
            let _ = log.try_init();
        }
        let queue_timeout = Duration::try_from_secs_f64(queue_timeout)
            .map_err(|error| value(format!("queue_timeout: {error}")))?;
        let (spec, quantize): (CacheSpec, Quantize) =
            (setting("cache", cache)?, setting("quantize", quantize)?);
        let needed = spec.method().needs_dictionaries;
        let options = Options {
            model_name: alias,
            cache: spec,
            kv_memory,
            parallel,
            queue: max_waiting,
            queue_timeout,
            context: NonZero::new(ctx_size).map_or(usize::MAX, NonZero::get),
            chunk: ubatch_size,
            max_tokens: n_predict,
            prefix_store,
            prefix_store_bytes: prefix_store_size,
            kv_events,
            ..Options::default()
        };
        let model = model.to_owned();
        let (worker, runtime) = detached(py, move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .thread_name("lexico")
                .enable_all()
                .build()?;
            let load = move || load(&model, quantize, dictionary, needed);
            let worker = runtime.block_on(Worker::start(&options, load))?;
            Ok((worker, runtime))
        })?
        .map_err(not_started)?;
        Ok(Self {
            worker: Arc::new(worker),
            runtime: Mutex::new(Some(runtime)),
            places: Arc::new(Semaphore::new(PLACES as usize)),
        })
    }

    #[getter]
    fn name(&self) -> &str {
        self.worker.name()
    }

    #[getter]
    fn context(&self) -> usize {
        self.worker.context()
    }

    #[getter]
    fn block_tokens(&self) -> usize {
        self.worker.block_tokens()
    }

    #[getter]
    fn block_bytes(&self) -> PyResult<usize> {
        self.worker.block_bytes().map_err(not_started)
    }

    #[getter]
    fn begin_token(&self) -> Option<u32> {
        self.worker.begin_token()
    }

    #[getter]
    fn end_tokens(&self) -> Vec<u32> {
        self.worker.end_tokens().to_vec()
    }

    #[getter]
    fn kv_events(&self) -> Option<&str> {
        self.worker.kv_events()
    }

    fn figures<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let figures = self.worker.figures();
        let all = PyDict::new(py);
        all.set_item("budget", figures.budget)?;
        all.set_item("reserved", figures.reserved)?;
        all.set_item("prefix_queries", figures.prefix_queries)?;
        all.set_item("prefix_hits", figures.prefix_hits)?;
        Ok(all)
    }

    fn metrics(&self) -> PyResult<String> {
        self.worker.metrics().map_err(LexicoError::new_err)
    }

    #[pyo3(signature = (prompt, *, max_tokens = None, min_tokens = 0, temperature = 0.0, top_p = 1.0, top_k = 0, min_p = 0.0,
        repetition_penalty = 1.0, presence_penalty = 0.0, frequency_penalty = 0.0, seed = 0, logit_bias = Vec::new(),
        stop = Vec::new(), stop_token_ids = Vec::new(), ignore_eos = false, logprobs = None, notify = None))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn write(
        &self,
        prompt: Vec<u32>,
        max_tokens: Option<usize>,
        min_tokens: usize,
        temperature: f32,
        top_p: f32,
        top_k: usize,
        min_p: f32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        seed: u64,
        logit_bias: Vec<(u32, f32)>,
        stop: Vec<String>,
        stop_token_ids: Vec<u32>,
        ignore_eos: bool,
        logprobs: Option<usize>,
        notify: Option<Py<PyAny>>,
    ) -> PyResult<Text> {
        let request = TextRequest {
            prompt,
            max_tokens,
            min_tokens,
            sampling: Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                repetition_window: usize::MAX,
                seed,
            },
            presence_penalty,
            frequency_penalty,
            logit_bias,
            stop,
            stop_tokens: stop_token_ids,
            ignore_end: ignore_eos,
            logprobs,
        };
        let runtime = locked(&self.runtime);
        let runtime = runtime.as_ref().ok_or_else(ended)?;
        let events = Arc::new(Events::default());
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| BusyError::new_err("too many texts are begun"))?;
        let worker = Arc::clone(&self.worker);
        let teller = Teller {
            events: Arc::clone(&events),
            notify,
        };
        let task = runtime.spawn(async move {
            let (_place, teller) = (place, teller);
            match worker.write(request).await {
                Err(failure) => teller.tell(vec![Event::Failed(failure)], false),
                Ok(mut text) => loop {
                    let happened = text.next_few(AT_ONCE).await;
                    if happened.is_empty() {
                        break;
                    }
                    teller.tell(happened, false);
                },
            }
        });
        let task = task.abort_handle();
        Ok(Text { events, task })
    }

    #[pyo3(signature = (timeout = 30.0))]
    fn end(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = Duration::try_from_secs_f64(timeout)
            .map_err(|error| value(format!("timeout: {error}")))?;
        let Some(runtime) = locked(&self.runtime).take() else {
            return Ok(true);
        };
        detached(py, || {
            let all_over = async {
                // Those that are begun but have not reached the engine yet are not turned away.
                let _all = self.places.acquire_many(PLACES).await;
                self.worker.end().await;
            };
            let whole = runtime
                .block_on(async { tokio::time::timeout(timeout, all_over).await })
                .is_ok();
            runtime.shutdown_background();
            whole
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(runtime) = locked(&self.runtime).take() {
            runtime.shutdown_background();
        }
    }
}

/// The exception of an engine that could not be started.
fn not_started(error: lexico_serve::Error) -> PyErr {
    match error {
        lexico_serve::Error::Model(error) => of_model(error),
        lexico_serve::Error::Load(error) => match error.downcast() {
            Ok(error) => of_model(*error),
            Err(error) => LexicoError::new_err(error.to_string()),
        },
        lexico_serve::Error::System(error) => error.into(),
        // Python names settings by themselves.
        error @ lexico_serve::Error::Setting { .. } => value(error.to_string()),
        error => LexicoError::new_err(error.to_string()),
    }
}

#[pymethods]
impl Text {
    /// What has happened since the last call.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let all = PyList::empty(py);
        for event in self.events.take() {
            match event {
                Event::Failed(failure) => return Err(failed(&failure)),
                event => all.append(dict(py, &event)?)?,
            }
        }
        Ok(all)
    }

    #[getter]
    fn over(&self) -> bool {
        let waiting = locked(&self.events.waiting);
        waiting.over && waiting.events.is_empty()
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// Waits for what happens next.
    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        loop {
            match py.detach(|| self.events.next(SIGNALS)) {
                Some(Some(Event::Failed(failure))) => return Err(failed(&failure)),
                Some(next) => return next.map(|event| dict(py, &event)).transpose(),
                None => py.check_signals()?,
            }
        }
    }

    fn cancel(&self) {
        self.task.abort();
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        // The engine forgets it.
        self.task.abort();
    }
}

fn dict<'py>(py: Python<'py>, event: &Event) -> PyResult<Bound<'py, PyDict>> {
    let all = PyDict::new(py);
    match event {
        Event::Read { cached, .. } => all.set_item("cached_tokens", cached)?,
        Event::Token {
            token,
            text,
            logprob,
        } => {
            all.set_item("token", token)?;
            all.set_item("text", text)?;
            if let Some(Logprob { logprob, top, .. }) = logprob {
                all.set_item("logprob", logprob)?;
                all.set_item("top_logprobs", top)?;
            }
        }
        Event::Done { text, reason } => {
            all.set_item("finish_reason", reason.name())?;
            all.set_item("text", text)?;
        }
        _ => {}
    }
    Ok(all)
}

/// Writes what a frontend reads of a GGUF file's model to a folder.
#[pyfunction]
pub(crate) fn write_frontend_files(py: Python<'_>, gguf: PathBuf, folder: PathBuf) -> PyResult<()> {
    detached(py, || GgufModel::open(&gguf)?.write_frontend_files(&folder))?.map_err(of_model)
}
