//! `/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's shape.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::App;
use super::body::Body;
use super::chat;
use super::error::{ApiError, Refusal};
use super::writing::computed;

/// A text or a conversation whose tokens are wanted.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct TokenizeFields {
    model: Option<String>,
    /// A text.
    prompt: Option<String>,
    /// A conversation, where there is no text.
    #[schema(value_type = Option<Vec<chat::ChatMessage>>)]
    messages: Option<Vec<Map<String, Value>>>,
    /// Whether the token that begins a text comes first; true by default.
    add_special_tokens: Option<bool>,
    /// Whether the answer's beginning follows a conversation; true by default.
    add_generation_prompt: Option<bool>,
    /// Whether what the tokens stand for is told too.
    return_token_strs: Option<bool>,
}

/// Tokens whose text is wanted.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Turn a text or a conversation into tokens
#[utoipa::path(
    post, path = "/tokenize", tag = "tokens", request_body = TokenizeFields,
    responses(
        (status = 200, description = "The tokens", body = Object),
        Refusal<'static>,
    ),
)]
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = app.service()?;
    let fields: TokenizeFields = body.read()?;
    drop(body);
    service.check_model(fields.model.as_deref())?;
    let names = fields.return_token_strs.unwrap_or(false);
    let tokens = computed(&service, move |service| {
        let tokenizer = &service.worker.model.tokenizer;
        let special = fields.add_special_tokens.unwrap_or(true);
        let (param, tokens) = match (fields.prompt, fields.messages) {
            (Some(text), None) => {
                let tokens = match special {
                    true => tokenizer.encode_first(&text),
                    false => tokenizer.encode_more(&text),
                };
                ("prompt", tokens)
            }
            (None, Some(messages)) => {
                let messages = chat::messages(messages)?;
                let answer = fields.add_generation_prompt.unwrap_or(true);
                let text = service.chat.render(&messages, answer);
                (
                    "messages",
                    text.and_then(|text| tokenizer.encode_more(&text)),
                )
            }
            _ => {
                return Err(ApiError::field(
                    "prompt",
                    "either prompt or messages are needed",
                ));
            }
        };
        tokens.map_err(|error| ApiError::field(param, error))
    })
    .await?;
    let mut document = json!({
        "count": tokens.len(), "max_model_len": service.worker.context(), "tokens": tokens,
    });
    if names {
        let names = tokens.iter().map(|&token| service.token_name(token));
        document["token_strs"] = names.collect();
    }
    Ok(Json(document))
}

/// Turn tokens into text
#[utoipa::path(
    post, path = "/detokenize", tag = "tokens", request_body = DetokenizeFields,
    responses(
        (status = 200, description = "The text", body = Object),
        Refusal<'static>,
    ),
)]
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = app.service()?;
    let fields: DetokenizeFields = body.read()?;
    drop(body);
    service.check_model(fields.model.as_deref())?;
    let text = computed(&service, move |service| {
        let known = service.worker.check_tokens(&fields.tokens);
        known.map_err(|failure| ApiError::of_prompt("tokens", failure))?;
        let text = service.worker.model.tokenizer.decode(&fields.tokens);
        text.map_err(|error| ApiError::field("tokens", error))
    })
    .await?;
    Ok(Json(json!({ "prompt": text })))
}

/// Tell the special tokens
#[utoipa::path(
    get, path = "/tokenizer_info", tag = "tokens",
    responses(
        (status = 200, description = "The special tokens by name", body = Object),
        (status = 401, description = "The key is missing or wrong"),
        (status = 503, description = "The model is being loaded"),
    ),
)]
pub(super) async fn info(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let service = app.service()?;
    let special = service.worker.model.tokenizer.special_tokens().iter();
    let special = special.map(|(name, token)| (name.clone(), token.as_str().into()));
    let mut document: Map<String, Value> = special.collect();
    document.insert(
        "tokenizer_class".to_owned(),
        "PreTrainedTokenizerFast".into(),
    );
    document.insert(
        "model_max_length".to_owned(),
        service.worker.context().into(),
    );
    Ok(Json(document.into()))
}
