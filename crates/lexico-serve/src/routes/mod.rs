//! What the server answers to whom.

mod body;
mod chat;
mod completions;
mod error;
mod fields;
mod operation;
mod page;
mod tokens;
mod writing;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use lexico_llm::TokenPiece;
use lexico_llm::chat::ChatTemplate;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::timeout::RequestBodyTimeoutLayer;

use crate::Options;
use crate::metrics::Metrics;
use crate::structure::Structures;
use crate::worker::Worker;
use error::ApiError;

/// Time that a client may take between two parts of a request's body.
const BODY_PATIENCE: Duration = Duration::from_secs(30);
/// The header that names a request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What all requests share.
pub(crate) struct App {
    pub(crate) options: Options,
    pub(crate) metrics: Arc<Metrics>,
    /// There once the model is loaded.
    pub(crate) service: OnceLock<Arc<Service>>,
    /// True once no text is begun any more.
    pub(crate) draining: AtomicBool,
}

/// A loaded model, and all that serves it.
pub(crate) struct Service {
    pub(crate) worker: Worker,
    pub(crate) chat: ChatTemplate,
    /// Texts that end an answer unless the client says otherwise.
    pub(crate) stop_texts: Vec<String>,
    /// What the tokens stand for, by number.
    pub(crate) pieces: Vec<TokenPiece>,
    /// Bytes of the longest of them.
    pub(crate) longest_piece: usize,
    /// Made when it is first needed.
    pub(crate) structures: OnceLock<Result<Structures, String>>,
    /// Turns of work that takes the processor a while.
    pub(crate) computing: Arc<Semaphore>,
    /// Seconds since 1970.
    pub(crate) started: u64,
}

impl App {
    /// The model, once it is loaded and while texts are begun.
    fn service(&self) -> Result<Arc<Service>, ApiError> {
        if self.draining.load(SeqCst) {
            return Err(crate::engine::Failure::Ending.into());
        }
        self.service.get().cloned().ok_or_else(ApiError::loading)
    }
}

impl Service {
    /// Refuses the name of another model.
    fn check_model(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(name) if name != self.worker.name => {
                Err(ApiError::unknown_model(name, &self.worker.name))
            }
            _ => Ok(()),
        }
    }

    /// What makes texts follow structures.
    fn structures(&self) -> Result<&Structures, ApiError> {
        let worker = &self.worker;
        let make = || Structures::new(&self.pieces, worker.vocabulary, worker.end_tokens());
        let made = self.structures.get_or_init(make).as_ref();
        made.map_err(|reason| {
            ApiError::bad_request(format!(
                "texts of this model cannot be made to follow a structure: {reason}"
            ))
        })
    }

    /// The bytes that a token stands for.
    fn bytes(&self, token: u32) -> &[u8] {
        let piece = self.pieces.get(token as usize);
        piece.map_or(&[], |piece| &piece.bytes)
    }

    /// A token's text, or its bytes where they are none, as OpenAI names it.
    fn token_name(&self, token: u32) -> String {
        let bytes = self.bytes(token);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| {
                name + &format!("\\x{byte:02x}")
            }),
        }
    }
}

/// The number of seconds since 1970.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// A name that nothing else has.
fn new_id(kind: &str) -> String {
    format!("{kind}{}", uuid::Uuid::new_v4().simple())
}

/// All paths.
pub(crate) fn router(app: Arc<App>) -> Router {
    let open = Router::new()
        .route("/", get(page::page))
        .route("/health", get(operation::health));
    let keyed = Router::new()
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(operation::models))
        .route("/v1/models/{*name}", get(operation::model))
        // Some clients leave the version out.
        .route("/chat/completions", post(chat::completions))
        .route("/completions", post(completions::completions))
        .route("/models", get(operation::models))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info))
        .route("/version", get(operation::version))
        .route("/metrics", get(operation::metrics))
        .route("/openapi.json", get(operation::openapi))
        .layer(from_fn_with_state(Arc::clone(&app), check_key));
    open.merge(keyed)
        .fallback(|request: Request| async move { ApiError::unknown_path(request.uri().path()) })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(DefaultBodyLimit::max(app.options.body_bytes))
        .layer(RequestBodyTimeoutLayer::new(BODY_PATIENCE))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("something went wrong while the request was answered")
                .into_response()
        }))
        .layer(cors(&app.options.allowed_origins))
        .layer(from_fn_with_state(Arc::clone(&app), observe))
        .with_state(app)
}

fn cors(origins: &[String]) -> CorsLayer {
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|o| HeaderValue::from_str(o).ok())),
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        // OpenAI's own client for pages sends some ten headers of its own.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID])
        .max_age(Duration::from_secs(3600))
}

/// Refuses requests that do not bear the key, where there is one.
async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = bearer(request.headers());
    match &app.options.api_key {
        Some(key) if !same_key(given, key) => ApiError::unauthorized().into_response(),
        _ => next.run(request).await,
    }
}

fn bearer(headers: &HeaderMap) -> &[u8] {
    let value = headers
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes);
    let value = value.unwrap_or_default();
    match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => &[],
    }
}

/// Compares in a time that tells nothing of the key: digests are of one length.
fn same_key(given: &[u8], key: &str) -> bool {
    let [given, key] = [given, key.as_bytes()].map(Sha256::digest);
    given.ct_eq(&key).into()
}

/// Names the request, counts it and writes a line on it.
async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).cloned();
    let given = given.filter(|id| id.len() <= 128 && id.to_str().is_ok());
    let path = request.extensions().get::<MatchedPath>();
    let mut observed = Observed {
        app,
        method: request.method().clone(),
        route: path.map_or("none", MatchedPath::as_str).to_owned(),
        id: given.or_else(|| HeaderValue::try_from(new_id("")).ok()),
        started: Instant::now(),
        status: CLIENT_GONE,
    };
    let mut response = next.run(request).await;
    observed.status = response.status().as_u16();
    if let Some(id) = observed.id.clone() {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// What proxies call the status of a request whose client left before it was answered.
const CLIENT_GONE: u16 = 499;

/// A request, which is counted and told of once it is over.
struct Observed {
    app: Arc<App>,
    method: Method,
    route: String,
    id: Option<HeaderValue>,
    started: Instant,
    status: u16,
}

impl Drop for Observed {
    fn drop(&mut self) {
        let (status, time) = (self.status, self.started.elapsed());
        self.app.metrics.request(&self.route, status, time);
        let id = self.id.as_ref().and_then(|id| id.to_str().ok());
        let id = id.unwrap_or_default();
        let (method, route) = (&self.method, &self.route);
        let milliseconds = time.as_millis() as u64;
        match route.as_str() {
            // They are asked for every few seconds.
            "/health" | "/metrics" => {
                tracing::debug!(%method, route, status, milliseconds, id, "answered");
            }
            _ => tracing::info!(%method, route, status, milliseconds, id, "answered"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_itself_is_taken() {
        let mut headers = HeaderMap::new();
        for (value, good) in [
            ("Bearer secret", true),
            ("bearer  secret ", true),
            ("Bearer secre", false),
            ("Bearer secrets", false),
            ("Basic secret", false),
            ("secret", false),
            ("Bearer", false),
            ("", false),
        ] {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            assert_eq!(same_key(bearer(&headers), "secret"), good, "{value:?}");
        }
        headers.clear();
        assert!(!same_key(bearer(&headers), "secret"));
    }
}
