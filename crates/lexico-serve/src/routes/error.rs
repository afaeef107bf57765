//! What goes wrong, in OpenAI's envelope.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lexico::shown::shown_message;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{IntoResponses, ToSchema};

use crate::engine::Failure;

/// Seconds after which it is worth asking again.
const RETRY_AFTER: u64 = 2;

/// OpenAI's envelope.
#[derive(Serialize, ToSchema)]
pub(super) struct Envelope<'a> {
    error: Reason<'a>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Error)]
pub(super) struct Reason<'a> {
    message: &'a str,
    r#type: &'static str,
    /// The field of the request that is at fault.
    param: Option<&'a str>,
    code: Option<&'static str>,
}

/// What a path that takes a request's body may answer when it does not do what was asked.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is there for the OpenAPI document")]
pub(super) enum Refusal<'a> {
    #[response(status = 400, description = "A field is wrong, which `param` names")]
    Field(#[to_schema] Envelope<'a>),
    #[response(status = 401, description = "The key is missing or wrong")]
    Key(#[to_schema] Envelope<'a>),
    #[response(status = 404, description = "There is no such model")]
    Model(#[to_schema] Envelope<'a>),
    #[response(status = 413, description = "The body is too large")]
    Size(#[to_schema] Envelope<'a>),
    #[response(status = 429, description = "The server is full")]
    Full(#[to_schema] Envelope<'a>),
    #[response(status = 500, description = "Something went wrong in the server")]
    Internal(#[to_schema] Envelope<'a>),
    #[response(
        status = 503,
        description = "The model is being loaded, or the server is about to stop"
    )]
    Unready(#[to_schema] Envelope<'a>),
}

/// An answer that is none.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    /// The field of the request that is at fault.
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl std::fmt::Display) -> Self {
        Self {
            status,
            message: shown_message(message),
            param: None,
            code: None,
        }
    }

    /// A field of the request is wrong.
    pub(crate) fn field(param: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// The request is wrong as a whole.
    pub(crate) fn bad_request(message: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A text does not fit the model's context.
    pub(crate) fn context(param: &str, message: impl std::fmt::Display) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::field(param, message)
        }
    }

    pub(crate) fn unknown_model(name: &str, known: &str) -> Self {
        let message = format!("there is no model {name:?} here, only {known:?}");
        Self {
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..Self::new(StatusCode::NOT_FOUND, message)
        }
    }

    pub(crate) fn unknown_path(path: &str) -> Self {
        let message = format!("there is nothing at {path}; /openapi.json lists what there is");
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub(crate) fn method_not_allowed() -> Self {
        let message = "this path does not take this method; /openapi.json lists what it takes";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, message)
    }

    pub(crate) fn unauthorized() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "the request does not bear the server's key; send it as \"Authorization: Bearer KEY\"",
            )
        }
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("the request's body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    pub(crate) fn loading() -> Self {
        Self {
            code: Some("model_loading"),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "the model is being loaded")
        }
    }

    pub(crate) fn internal(message: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// The envelope.
    pub(crate) fn document(&self) -> Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let error = Reason {
            message: &self.message,
            r#type: kind,
            param: self.param.as_deref(),
            code: self.code,
        };
        json!(Envelope { error })
    }
}

impl ApiError {
    /// Why texts are not written whose prompts come from a field.
    pub(crate) fn of_prompt(param: &str, failure: Failure) -> Self {
        match failure {
            Failure::Refused(reason) => Self::field(param, reason),
            Failure::TooLong(reason) => Self::context(param, reason),
            failure => failure.into(),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(_) | Failure::TooLong(_) => Self::bad_request(failure),
            Failure::TooLarge { .. } => Self {
                code: Some("kv_memory_exceeded"),
                ..Self::field("max_tokens", failure)
            },
            Failure::Busy => Self {
                code: Some("server_busy"),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, failure)
            },
            Failure::Ending => Self::new(StatusCode::SERVICE_UNAVAILABLE, failure),
            Failure::Internal(reason) => Self::internal(reason),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.document())).into_response();
        let again = [
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::SERVICE_UNAVAILABLE,
        ];
        if again.contains(&self.status) {
            let value = HeaderValue::from(RETRY_AFTER);
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let value = HeaderValue::from_static("Bearer");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, value);
        }
        response
    }
}
