//! A server's life: it listens, loads, serves and stops.

use std::future::Future;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use axum_server::Handle;
use lexico_llm::Model;
use lexico_llm::cache::KvCache;
use lexico_llm::chat::ChatTemplate;
use tokio::sync::Semaphore;

use crate::engine::{Engine, Setup};
use crate::kv_events::KvEvents;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::prefix::{Key, PrefixStore, Prefixes};
use crate::routes::{App, Service, now, router};
use crate::{Error, Options, Result};

/// Time that a client may take to send the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);
/// Files and connections that are asked of the system.
const FILES: u64 = 1 << 16;

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    options: Options,
}

/// The template of a model that has none, as llama.cpp's server has it: ChatML.
const CHAT_ML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
                       '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\
                       {% endif %}";
const CHAT_ML_END: &str = "<|im_end|>";

impl Server {
    /// Listens, so that clients find a server that says that it is loading.
    ///
    /// # Errors
    /// [`Error::Listen`]; [`Error::Setting`] of one that cannot be.
    pub fn bind(mut options: Options) -> Result<Self> {
        let positive = [
            ("--parallel", options.parallel),
            ("--ubatch-size", options.chunk),
            ("--kv-memory", options.kv_memory),
            ("--ctx-size", options.context),
            ("--n-predict", options.max_tokens),
        ];
        for (setting, value) in positive {
            if value == 0 {
                let reason = "it must be at least 1".to_owned();
                return Err(Error::Setting { setting, reason });
            }
        }
        // Files of secrets end with a line end.
        options.api_key = options.api_key.map(|key| key.trim().to_owned());
        if options.api_key.as_deref() == Some("") {
            let reason = "an empty key would shut everybody out; leave it out for none".to_owned();
            return Err(Error::Setting {
                setting: "--api-key",
                reason,
            });
        }
        let (host, port) = &options.address;
        let listen = || {
            let addresses: Vec<SocketAddr> = (host.as_str(), *port).to_socket_addrs()?.collect();
            let listener = TcpListener::bind(&addresses[..])?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = listen().map_err(|reason| Error::Listen {
            host: host.clone(),
            port: *port,
            reason,
        })?;
        Ok(Self {
            listener,
            address,
            options,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loads the model, and serves until `stop` is ready. Then no text is begun any more, and those at hand are given
    /// [`Options::drain`] to end, unless `stop`, which is called anew, is ready once more.
    ///
    /// # Errors
    /// [`Error::Load`] with the error of `load`; [`Error::Setting`] of one that does not go with the model;
    /// [`Error::System`].
    pub fn run<E, S>(
        self,
        load: impl FnOnce() -> std::result::Result<Model, E> + Send + 'static,
        stop: impl Fn() -> S,
    ) -> Result<()>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        S: Future<Output = ()>,
    {
        // Where it cannot have as many, it serves fewer at once.
        let _ = rlimit::increase_nofile_limit(FILES);
        // The engine computes on threads of its own; these only pass bytes on.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let load = move || load().map_err(|error| Error::Load(error.into()));
        let served = runtime.block_on(self.serve(load, stop));
        // A load that was broken off is not waited for.
        runtime.shutdown_background();
        served
    }

    async fn serve<S: Future<Output = ()>>(
        self,
        load: impl FnOnce() -> Result<Model> + Send + 'static,
        stop: impl Fn() -> S,
    ) -> Result<()> {
        let metrics = Metrics::new(self.options.cache_bytes());
        let metrics = metrics.map_err(|error| Error::System(std::io::Error::other(error)))?;
        let app = Arc::new(App {
            metrics: Arc::new(metrics),
            options: self.options,
            service: OnceLock::new(),
            draining: AtomicBool::new(false),
        });
        let handle = Handle::new();
        let mut server = axum_server::from_tcp(self.listener)?
            .handle(handle.clone())
            .first_request_timeout(HEAD_PATIENCE)
            .accept_error_handler(|_, error| tracing::warn!(%error, "a connection was not taken"));
        server
            .http_builder()
            .http1()
            .header_read_timeout(HEAD_PATIENCE);
        let routes = router(Arc::clone(&app)).into_make_service();
        let serving = tokio::spawn(server.serve(routes));
        tracing::info!(address = %self.address, "listening; the model is being loaded");
        let loaded = tokio::select! {
            loaded = prepare(&app, load) => loaded,
            () = stop() => return Ok(()),
        };
        let service = Arc::new(loaded?);
        // It is set here alone.
        let _ = app.service.set(Arc::clone(&service));
        let config = service.model.decoder.config();
        tracing::info!(
            model = service.name,
            cache = %app.options.cache,
            context = service.engine.setup.context,
            kv_memory = app.options.kv_memory,
            full_cache_tokens = app.options.cache_bytes() / config.fp16_cache_bytes(1).max(1),
            "ready"
        );
        let mut serving = serving;
        tokio::select! {
            () = stop() => {}
            ended = &mut serving => {
                ended.map_err(std::io::Error::other)??;
            }
        }
        tracing::info!("stopping: no text is begun any more");
        app.draining.store(true, SeqCst);
        handle.graceful_shutdown(Some(app.options.drain));
        tokio::select! {
            () = stop() => handle.shutdown(),
            _ = &mut serving => {}
        }
        let store = service.engine.setup.store.clone();
        let ended = tokio::task::spawn_blocking(move || service.engine.end()).await;
        ended.map_err(std::io::Error::other)?;
        if let Some(store) = store {
            store.flush().await;
        }
        tracing::info!("stopped");
        Ok(())
    }
}

/// Waits for SIGTERM or Ctrl-C.
pub async fn signalled() {
    let interrupted = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminated) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminated.recv() => {}
                _ = interrupted => {}
            }
            return;
        }
    }
    // Where signals cannot be listened for they end the process.
    if interrupted.await.is_err() {
        std::future::pending().await
    }
}

/// Loads the model and starts all that serves it.
async fn prepare(
    app: &Arc<App>,
    load: impl FnOnce() -> Result<Model> + Send + 'static,
) -> Result<Service> {
    let options = app.options.clone();
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
        let mut model = load()?;
        let chat = chat_template(&mut model, own.chat_template.as_deref())?;
        // What is wrong with the cache's options shows before the first request.
        let cache = model.cache(&own.cache)?;
        let root = root(&model, cache.as_ref(), own.chunk)?;
        let saved = cache.state().is_some() && cache.fork().is_some();
        Ok::<_, Error>((model, chat, root, saved))
    });
    let (model, chat, root, saved) = read.await.map_err(std::io::Error::other)??;
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
            let opened = PrefixStore::open(place, options.prefix_store_bytes).await;
            Some(opened.map_err(|reason| Error::Setting {
                setting: "--prefix-store",
                reason,
            })?)
        }
    };
    let model = Arc::new(model);
    let memory = Memory::new(options.cache_bytes());
    let prefixes = Prefixes::new(Arc::clone(&memory), events);
    let context = options.context.min(model.decoder.config().context);
    // The cache of one text may have a limit of its own: lexico:memory=….
    let capacity = model.cache(&options.cache)?.capacity();
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
        metrics: Arc::clone(&app.metrics),
    })?;
    let pieces = model.tokenizer.pieces();
    Ok(Service {
        name: options.model_name.unwrap_or_else(|| model.name.clone()),
        longest_piece: pieces
            .iter()
            .map(|piece| piece.bytes.len())
            .max()
            .unwrap_or(1),
        vocabulary: model.decoder.config().vocabulary,
        pieces,
        engine,
        chat,
        structures: OnceLock::new(),
        computing: Arc::new(Semaphore::new(2 * lexico_llm::threads_in_use())),
        started: now(),
        model,
    })
}

/// The template that was given, else the model's own, else ChatML.
fn chat_template(model: &mut Model, given: Option<&str>) -> Result<ChatTemplate> {
    let special = model.tokenizer.special_tokens().clone();
    if let Some(source) = given {
        return Ok(ChatTemplate::parse(source, special)?);
    }
    if let Some(own) = model.chat_template()? {
        return Ok(own);
    }
    tracing::warn!(
        "the model has no chat template; chats are written as ChatML (--chat-template FILE takes another)"
    );
    model.stop_texts.push(CHAT_ML_END.to_owned());
    Ok(ChatTemplate::parse(CHAT_ML, special)?)
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
