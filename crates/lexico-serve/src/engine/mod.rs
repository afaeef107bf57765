//! The engine: one thread that reads prompts and writes texts, all of them together, step by step.

mod choice;
mod guarded;
mod request;
mod scheduler;
mod sequence;

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use lexico_llm::cache::{CacheSpec, Lengths};
use lexico_llm::{Model, Result};

use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::prefix::{Key, PrefixStore, Prefixes};
pub(crate) use request::{ChoiceSettings, Request};
pub use request::{Event, Failure, FinishReason, Logprob};
use scheduler::Scheduler;

/// What the engine works with.
pub(crate) struct Setup {
    pub(crate) model: Arc<Model>,
    pub(crate) spec: CacheSpec,
    pub(crate) memory: Arc<Memory>,
    pub(crate) prefixes: Arc<Mutex<Prefixes>>,
    pub(crate) store: Option<PrefixStore>,
    /// The name of the empty prefix.
    pub(crate) root: Key,
    /// Tokens of a prompt that are read in one step.
    pub(crate) chunk: usize,
    /// Max number of texts that are read or written at once.
    pub(crate) parallel: usize,
    /// Max number of texts that wait.
    pub(crate) queue: usize,
    /// Time that a text waits for memory at the most.
    pub(crate) patience: std::time::Duration,
    /// Max number of tokens of a text, its prompt included.
    pub(crate) context: usize,
    pub(crate) metrics: Arc<Metrics>,
}

/// The texts that one call of a client asks for.
pub(crate) struct Call {
    pub(crate) requests: Vec<Request>,
    pub(crate) asked: Instant,
}

/// A running engine.
pub(crate) struct Engine {
    pub(crate) setup: Arc<Setup>,
    /// `None` once it is to end.
    calls: Mutex<Option<Sender<Call>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Setup {
    /// The bytes that the cache of a text takes at its end, with a little for what sizes cannot tell in advance.
    pub(crate) fn bytes_of(&self, prompt: usize, max_tokens: usize) -> Result<usize> {
        let end = (prompt + max_tokens).min(self.context);
        let expected = self
            .model
            .cache_bytes(&self.spec, Lengths { prompt, end })?;
        Ok((expected * 1.03) as usize)
    }

    pub(crate) fn prefixes(&self) -> std::sync::MutexGuard<'_, Prefixes> {
        self.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where the system gives no thread.
    pub(crate) fn start(setup: Setup) -> std::io::Result<Self> {
        let setup = Arc::new(setup);
        let (sender, receiver) = channel();
        let own = Arc::clone(&setup);
        let run = move || Scheduler::new(&own, receiver).run();
        let thread = std::thread::Builder::new().name("engine".to_owned());
        Ok(Self {
            setup,
            calls: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread.spawn(run)?)),
        })
    }

    /// Hands over a call; the events of its texts tell what becomes of them.
    pub(crate) fn submit(&self, call: Call) {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = match calls.as_ref() {
            Some(sender) => sender.send(call).map_err(|e| e.0),
            None => Err(call),
        };
        if let Err(call) = refused {
            for request in call.requests {
                let ending = Event::Failed(Failure::Ending);
                let _ = request.events.send((request.index, ending));
            }
        }
    }

    /// Takes no more calls: the thread ends once the texts at hand are written or given up by their clients.
    pub(crate) fn close(&self) {
        let calls = self.calls.lock();
        drop(calls.unwrap_or_else(PoisonError::into_inner).take());
    }

    /// The thread, to wait for its end, where nobody does yet.
    pub(crate) fn thread(&self) -> Option<JoinHandle<()>> {
        let thread = self.thread.lock();
        thread.unwrap_or_else(PoisonError::into_inner).take()
    }
}
