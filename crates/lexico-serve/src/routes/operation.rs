//! `/health`, `/v1/models`, `/version`, `/metrics`, `/openapi.json`

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa::OpenApi;

use super::error::ApiError;
use super::{App, Service, chat, completions, tokens};

/// The document of all paths.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "lexico serve",
        description = "An OpenAI-compatible server whose KV caches are held as codes. Errors come in OpenAI's envelope."
    ),
    paths(
        chat::completions,
        completions::completions,
        tokens::tokenize,
        tokens::detokenize,
        tokens::info,
        health,
        models,
        model,
        version,
        metrics
    )
)]
pub(super) struct Document;

/// Tell whether texts can be written
#[utoipa::path(
    get, path = "/health", tag = "operation",
    responses(
        (status = 200, description = "They can", body = Object),
        (status = 503, description = "The model is being loaded, or the server is about to stop"),
    ),
)]
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    app.service()?;
    Ok(Json(json!({ "status": "ok" })))
}

/// List the model
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    responses(
        (status = 200, description = "The model", body = Object),
        (status = 401, description = "The key is missing or wrong"),
        (status = 503, description = "The model is being loaded"),
    ),
)]
pub(super) async fn models(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let service = app.service()?;
    Ok(Json(
        json!({ "object": "list", "data": [document(&service)] }),
    ))
}

/// Describe the model
#[utoipa::path(
    get, path = "/v1/models/{name}", tag = "models",
    params(("name" = String, Path, description = "The model's name")),
    responses(
        (status = 200, description = "The model", body = Object),
        (status = 400, description = "The name is no text"),
        (status = 401, description = "The key is missing or wrong"),
        (status = 404, description = "There is no such model"),
        (status = 503, description = "The model is being loaded"),
    ),
)]
pub(super) async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let service = app.service()?;
    let Path(name) = name.map_err(ApiError::bad_request)?;
    service.check_model(Some(&name))?;
    Ok(Json(document(&service)))
}

fn document(service: &Service) -> Value {
    json!({
        "id": service.worker.name, "object": "model", "created": service.started, "owned_by": "lexico",
        "max_model_len": service.worker.context(),
    })
}

/// Tell the server's version
#[utoipa::path(
    get, path = "/version", tag = "operation",
    responses(
        (status = 200, description = "The version", body = Object),
        (status = 401, description = "The key is missing or wrong"),
    ),
)]
pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// Tell figures in Prometheus' text format
#[utoipa::path(
    get, path = "/metrics", tag = "operation",
    responses(
        (status = 200, description = "The figures", content_type = "text/plain", body = String),
        (status = 401, description = "The key is missing or wrong"),
    ),
)]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app.metrics.text().map_err(ApiError::internal)?;
    let kind = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    Ok((kind, text).into_response())
}

/// Returns the document of all paths.
pub(super) async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}
