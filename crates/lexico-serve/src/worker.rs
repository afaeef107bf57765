//! An engine without HTTP: what writes texts for a program in the same process, tokens in and tokens out.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use lexico_llm::Model;
use lexico_llm::cache::KvCache;
use lexico_llm::sample::{Sampler, Sampling};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::engine::{Call, ChoiceSettings, Engine, Event, Failure, Request, Setup};
use crate::kv_events::KvEvents;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::prefix::{Key, PrefixStore, Prefixes};
use crate::{Error, Options, Result};

/// A loaded model that writes texts, many at once: scheduler, memory, prefixes, prefix store, events and figures of a
/// [`Server`](crate::Server), which has one of these.
///
/// ```
/// use lexico_llm::Model;
/// use lexico_serve::{Event, Options, TextRequest, Worker};
///
/// let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
/// let tokens = runtime.block_on(async {
///     let worker = Worker::start(&Options::default(), Model::tiny).await?;
///     let request = TextRequest {
///         max_tokens: Some(5),
///         ..TextRequest::greedy(vec![5, 6, 7])
///     };
///     let (mut text, mut tokens) = (worker.write(request).await?, Vec::new());
///     while let Some(event) = text.next().await {
///         if let Event::Token { token, .. } = event {
///             tokens.push(token);
///         }
///     }
///     worker.end().await;
///     Ok::<_, Box<dyn std::error::Error>>(tokens)
/// })?;
/// assert!((1..=5).contains(&tokens.len()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Worker {
    pub(crate) name: String,
    pub(crate) model: Arc<Model>,
    pub(crate) engine: Engine,
    /// Number of the model's logits.
    pub(crate) vocabulary: usize,
    /// Max number of tokens of an answer where a request names none.
    usual_max_tokens: usize,
    kv_events: Option<String>,
}

/// A text to be written, and how.
#[derive(Debug, Clone)]
pub struct TextRequest {
    /// The tokens to go on from, at least one.
    pub prompt: Vec<u32>,
    /// Max number of tokens to write; that of the [`Options`], as far as the context reaches, where there is none.
    pub max_tokens: Option<usize>,
    /// Tokens before which none that ends the text is taken.
    pub min_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Number taken off the logits of tokens that were written.
    pub presence_penalty: f32,
    /// Number taken off the logit of a token for each time that it was written.
    pub frequency_penalty: f32,
    /// Numbers added to logits, by token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Texts that end it.
    pub stop: Vec<String>,
    /// Tokens that end it beside the model's own.
    pub stop_tokens: Vec<u32>,
    /// Goes on past the tokens by which the model ends a text.
    pub ignore_end: bool,
    /// Log-probabilities of the tokens are wanted, and so many of the likeliest beside each.
    pub logprobs: Option<usize>,
}

impl TextRequest {
    /// A text of the likeliest tokens.
    pub fn greedy(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            max_tokens: None,
            min_tokens: 0,
            sampling: Sampling::default(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_end: false,
            logprobs: None,
        }
    }
}

/// A text that is being written. Where it is dropped the engine forgets the text.
pub struct Writing(UnboundedReceiver<(usize, Event)>);

impl Writing {
    /// What happens next; `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        Some(self.0.recv().await?.1)
    }

    /// What happens next and has happened since, `most` at the most; nothing after the last.
    pub async fn next_few(&mut self, most: usize) -> Vec<Event> {
        let mut events = Vec::new();
        self.0.recv_many(&mut events, most).await;
        events.into_iter().map(|(_, event)| event).collect()
    }
}

/// Memory and prefixes of a worker at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Bytes that caches and kept prefixes may take.
    pub budget: usize,
    /// Bytes of it that running texts will take at their ends, and that prefixes take.
    pub reserved: usize,
    /// Prompts that were looked for among the prefixes kept.
    pub prefix_queries: u64,
    /// Prompts of which a prefix was kept.
    pub prefix_hits: u64,
}

/// Texts that are asked for together: `n` for each prompt, prompt after prompt.
pub(crate) struct Order {
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) n: usize,
    pub(crate) max_tokens: Option<usize>,
    /// Max number of tokens where the client names none.
    pub(crate) usual_max_tokens: usize,
    pub(crate) choice: ChoiceSettings,
    pub(crate) stop: Arc<[String]>,
    pub(crate) ignore_end: bool,
    pub(crate) prompt_logprobs: bool,
}

/// What a text needs.
struct Needs {
    bytes: usize,
    max_tokens: usize,
}

impl Worker {
    /// Loads the model, and starts all that serves it, in the runtime that this is called in.
    ///
    /// # Errors
    /// [`Error::Load`] with the error of `load`; [`Error::Setting`] of one that cannot be, or does not go with the model;
    /// [`Error::System`].
    pub async fn start<E>(
        options: &Options,
        load: impl FnOnce() -> std::result::Result<Model, E> + Send + 'static,
    ) -> Result<Self>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        options.check()?;
        let load = move || load().map_err(|error| Error::Load(error.into()));
        Self::begin(options, Metrics::of(options)?, load).await
    }

    /// Starts, with figures that others read meanwhile.
    pub(crate) async fn begin(
        options: &Options,
        metrics: Arc<Metrics>,
        load: impl FnOnce() -> Result<Model> + Send + 'static,
    ) -> Result<Self> {
        let events = match &options.kv_events {
            Some(endpoint) => {
                let bound = KvEvents::bind(endpoint).await;
                Some(bound.map_err(|reason| Error::Setting {
                    setting: "--kv-events",
                    reason: format!("{endpoint}: {reason}"),
                })?)
            }
            None => None,
        };
        let own = options.clone();
        let read = tokio::task::spawn_blocking(move || {
            let model = load()?;
            // What is wrong with the cache's options shows before the first request.
            let cache = model.cache(&own.cache)?;
            let root = root(&model, cache.as_ref(), own.chunk)?;
            let saved = cache.state().is_some() && cache.fork().is_some();
            Ok::<_, Error>((model, root, saved, cache.capacity()))
        });
        let (model, root, saved, capacity) = read.await.map_err(std::io::Error::other)??;
        let store = match &options.prefix_store {
            None => None,
            Some(_) if !saved => {
                return Err(Error::Setting {
                    setting: "--prefix-store",
                    reason: format!(
                        "caches of {} cannot be kept; use --cache lexico",
                        options.cache
                    ),
                });
            }
            Some(place) => {
                let bytes = options.prefix_store_bytes;
                let opened =
                    PrefixStore::open(place, bytes, Arc::clone(&metrics), events.clone()).await;
                Some(opened.map_err(|reason| Error::Setting {
                    setting: "--prefix-store",
                    reason,
                })?)
            }
        };
        let kv_events = events.as_ref().map(|events| events.endpoint().to_owned());
        let model = Arc::new(model);
        let memory = Memory::new(options.cache_bytes());
        let prefixes = Prefixes::new(Arc::clone(&memory), events);
        let context = options.context.min(model.decoder.config().context);
        // The cache of one text may have a limit of its own: lexico:memory=….
        let context = context.min(capacity.unwrap_or(usize::MAX));
        let engine = Engine::start(Setup {
            model: Arc::clone(&model),
            spec: options.cache.clone(),
            memory,
            prefixes: Arc::new(Mutex::new(prefixes)),
            store,
            root,
            chunk: options.chunk,
            parallel: options.parallel,
            queue: options.queue,
            patience: options.queue_timeout,
            context,
            metrics,
        })?;
        let name = options.model_name.as_ref();
        Ok(Self {
            name: name.unwrap_or(&model.name).clone(),
            vocabulary: model.decoder.config().vocabulary,
            usual_max_tokens: options.max_tokens,
            engine,
            model,
            kv_events,
        })
    }

    /// The name that clients call the model by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Max number of tokens of a text, its prompt included.
    pub fn context(&self) -> usize {
        self.engine.setup.context
    }

    /// Tokens of a block, by which routers count: those of a prompt that are read in one step.
    pub fn block_tokens(&self) -> usize {
        self.engine.setup.chunk
    }

    /// Bytes of a block, as a text of the whole context has them in the mean.
    ///
    /// # Errors
    /// [`Error::Model`] where the cache's size cannot be told.
    pub fn block_bytes(&self) -> Result<usize> {
        let context = self.context().max(1);
        let bytes = self.engine.setup.bytes_of(context, 0)? as u128;
        let of_block = bytes * self.block_tokens() as u128 / context as u128;
        Ok(usize::try_from(of_block).unwrap_or(usize::MAX).max(1))
    }

    /// The token that texts begin with, where the model has one: prompts are taken as they are.
    pub fn begin_token(&self) -> Option<u32> {
        self.model.tokenizer.begin_token()
    }

    /// Tokens by which the model ends a text.
    pub fn end_tokens(&self) -> &[u32] {
        &self.model.end_tokens
    }

    /// Where events of kept prefixes are published, where they are: with its port where any free one was asked for.
    pub fn kv_events(&self) -> Option<&str> {
        self.kv_events.as_deref()
    }

    /// Memory and prefixes now.
    pub fn figures(&self) -> Figures {
        let setup = &self.engine.setup;
        let (prefix_queries, prefix_hits) = setup.metrics.prefixes_found();
        Figures {
            budget: setup.memory.budget(),
            reserved: setup.memory.taken(),
            prefix_queries,
            prefix_hits,
        }
    }

    /// All figures in Prometheus' text format.
    ///
    /// # Errors
    /// None in a sound build.
    pub fn metrics(&self) -> std::result::Result<String, String> {
        self.engine.setup.metrics.text()
    }

    /// Has a text written; its prefix is brought from the store first, where it is there.
    ///
    /// # Errors
    /// [`Failure::Refused`], [`Failure::TooLong`] and [`Failure::TooLarge`]. What happens later is an event.
    pub async fn write(&self, request: TextRequest) -> std::result::Result<Writing, Failure> {
        let refused = |error: lexico_llm::Error| Failure::Refused(error.to_string());
        Sampler::new(request.sampling.clone()).map_err(refused)?;
        let penalties = [request.presence_penalty, request.frequency_penalty];
        let biases = request.logit_bias.iter().map(|&(_, bias)| bias);
        if !penalties.into_iter().chain(biases).all(f32::is_finite) {
            let reason = "a penalty or a bias is no number".to_owned();
            return Err(Failure::Refused(reason));
        }
        let biased = request.logit_bias.iter().map(|(token, _)| token);
        self.check_tokens(biased)?;
        let order = Order {
            prompts: vec![request.prompt],
            n: 1,
            max_tokens: request.max_tokens,
            usual_max_tokens: self.usual_max_tokens,
            choice: ChoiceSettings {
                sampling: request.sampling,
                presence_penalty: request.presence_penalty,
                frequency_penalty: request.frequency_penalty,
                bias: request.logit_bias.into(),
                stop_tokens: request.stop_tokens,
                min_tokens: request.min_tokens,
                structure: None,
                logprobs: request.logprobs,
            },
            // Empty ones end nothing.
            stop: request.stop.into_iter().filter(|s| !s.is_empty()).collect(),
            ignore_end: request.ignore_end,
            prompt_logprobs: false,
        };
        Ok(Writing(self.order(order).await?))
    }

    /// Has texts written; their events come with their numbers.
    pub(crate) async fn order(
        &self,
        order: Order,
    ) -> std::result::Result<UnboundedReceiver<(usize, Event)>, Failure> {
        let asked = Instant::now();
        let setup = &self.engine.setup;
        let count = order.prompts.len() * order.n;
        let most = setup.parallel.saturating_add(setup.queue);
        if count > most {
            return Err(Failure::Refused(format!(
                "{count} texts are asked for, and the server takes at most {most} (--parallel and --max-waiting)"
            )));
        }
        let mut needs = Vec::with_capacity(order.prompts.len());
        for prompt in &order.prompts {
            needs.push(self.needs(&order, prompt)?);
        }
        if let Some(store) = &setup.store
            && !order.prompt_logprobs
        {
            store.fetch(setup, &order.prompts).await;
        }
        let (events, receiver) = unbounded_channel();
        let mut requests = Vec::with_capacity(count);
        for (prompt, needs) in order.prompts.iter().zip(needs) {
            for _ in 0..order.n {
                let index = requests.len();
                let mut sampling = order.choice.sampling.clone();
                sampling.seed = sampling.seed.wrapping_add(index as u64);
                let structure = order.choice.structure.as_ref();
                requests.push(Request {
                    index,
                    prompt: prompt.clone(),
                    bytes: needs.bytes,
                    max_tokens: needs.max_tokens,
                    choice: ChoiceSettings {
                        sampling,
                        bias: Arc::clone(&order.choice.bias),
                        stop_tokens: order.choice.stop_tokens.clone(),
                        structure: structure.map(|matcher| Box::new(matcher.deep_clone())),
                        ..order.choice
                    },
                    stop: Arc::clone(&order.stop),
                    ignore_end: order.ignore_end,
                    prompt_logprobs: order.prompt_logprobs,
                    events: events.clone(),
                });
            }
        }
        drop(events);
        self.engine.submit(Call { requests, asked });
        Ok(receiver)
    }

    /// What a text that goes on from a prompt needs, where it can be had.
    fn needs(&self, order: &Order, prompt: &[u32]) -> std::result::Result<Needs, Failure> {
        let context = self.context();
        let length = prompt.len();
        if length == 0 {
            return Err(Failure::Refused("the prompt has no tokens".to_owned()));
        }
        self.check_tokens(prompt)?;
        let wanted = order
            .max_tokens
            .unwrap_or(0)
            .max(usize::from(!order.prompt_logprobs));
        if length.saturating_add(wanted) > context {
            return Err(Failure::TooLong(format!(
                "the model's context is {context} tokens; the prompt has {length}, and {wanted} more are asked for"
            )));
        }
        let left = context - length;
        let max_tokens = order.max_tokens.unwrap_or(order.usual_max_tokens.min(left));
        let bytes = self.engine.setup.bytes_of(length, max_tokens);
        let bytes = bytes.map_err(|error| Failure::Internal(error.to_string()))?;
        let budget = self.engine.setup.memory.budget();
        match bytes > budget {
            true => Err(Failure::TooLarge { bytes, budget }),
            false => Ok(Needs { bytes, max_tokens }),
        }
    }

    /// Refuses tokens that the model does not have.
    pub(crate) fn check_tokens<'t>(
        &self,
        tokens: impl IntoIterator<Item = &'t u32>,
    ) -> std::result::Result<(), Failure> {
        let mut tokens = tokens.into_iter();
        match tokens.find(|&&t| t as usize >= self.vocabulary) {
            Some(token) => {
                let all = self.vocabulary;
                let reason = format!("token {token} is none of the model's {all}");
                Err(Failure::Refused(reason))
            }
            None => Ok(()),
        }
    }

    /// Ends once the texts at hand are written or dropped, and what is on its way to the store is there. No text is begun
    /// any more.
    pub async fn end(&self) {
        self.engine.close();
        let engine = self.engine.thread();
        // A panic has been said on stderr.
        let _ = tokio::task::spawn_blocking(move || engine.map(|thread| thread.join())).await;
        if let Some(store) = &self.engine.setup.store {
            store.flush().await;
        }
    }
}

/// The name of the empty prefix: prefixes of other models, dictionaries or settings have other names.
fn root(model: &Model, cache: &dyn KvCache, chunk: usize) -> Result<Key> {
    let facts = cache.state().map(|state| state.facts.to_string());
    Ok(Key::root(&[
        &model.fingerprint()?,
        &model.weights_fingerprint()?,
        &facts.unwrap_or_default(),
        &chunk.to_string(),
    ]))
}
