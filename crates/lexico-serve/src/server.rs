//! A server's life: it listens, loads, serves and stops.

use std::future::Future;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum_server::Handle;
use lexico_llm::Model;
use lexico_llm::chat::ChatTemplate;
use tokio::sync::Semaphore;

use crate::metrics::Metrics;
use crate::routes::{App, Service, now, router};
use crate::worker::Worker;
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
        options.check()?;
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
        let app = Arc::new(App {
            metrics: Metrics::of(&self.options)?,
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
        let config = service.worker.model.decoder.config();
        tracing::info!(
            address = %self.address,
            model = service.worker.name,
            cache = %app.options.cache,
            context = service.worker.context(),
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
        service.worker.end().await;
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
    let worker = Worker::begin(&app.options, Arc::clone(&app.metrics), load).await?;
    let model = &worker.model;
    let template = app.options.chat_template.as_deref();
    let (chat, end) = chat_template(model, template)?;
    let pieces = model.tokenizer.pieces();
    Ok(Service {
        longest_piece: pieces
            .iter()
            .map(|piece| piece.bytes.len())
            .max()
            .unwrap_or(1),
        pieces,
        stop_texts: model.stop_texts.iter().cloned().chain(end).collect(),
        chat,
        structures: OnceLock::new(),
        computing: Arc::new(Semaphore::new(2 * lexico_llm::threads_in_use())),
        started: now(),
        worker,
    })
}

/// The template that was given, else the model's own, else ChatML, which has a text that ends answers.
fn chat_template(model: &Model, given: Option<&str>) -> Result<(ChatTemplate, Option<String>)> {
    let special = model.tokenizer.special_tokens().clone();
    if let Some(source) = given {
        return Ok((ChatTemplate::parse(source, special)?, None));
    }
    if let Some(own) = model.chat_template()? {
        return Ok((own, None));
    }
    tracing::warn!(
        "the model has no chat template; chats are written as ChatML (--chat-template FILE takes another)"
    );
    let chat_ml = ChatTemplate::parse(CHAT_ML, special)?;
    Ok((chat_ml, Some(CHAT_ML_END.to_owned())))
}
