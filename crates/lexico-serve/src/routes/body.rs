//! Bodies of requests: JSON whose fields are named where they are wrong.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use lexico::shown::shown;
use serde::de::DeserializeOwned;

use super::App;
use super::error::ApiError;
use std::sync::Arc;

/// The bytes of a request's body.
pub(crate) struct Body(Bytes);

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, app).await;
        bytes
            .map(Self)
            .map_err(|rejection| match rejection.status() {
                axum::http::StatusCode::PAYLOAD_TOO_LARGE => {
                    ApiError::body_too_large(app.options.body_bytes)
                }
                _ => ApiError::bad_request(format!("the body cannot be read: {rejection}")),
            })
    }
}

impl Body {
    /// Reads the fields that `T` has, and ignores all others.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let mut json = serde_json::Deserializer::from_slice(&self.0);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            let reason = error.into_inner();
            if !reason.is_data() {
                return ApiError::bad_request(format!("the body is no JSON: {}", shown(reason)));
            }
            let reason = without_place(&reason.to_string());
            match path.as_str() {
                "." => match missing(&reason) {
                    Some(field) => ApiError::field(field.to_owned(), &reason),
                    None => ApiError::bad_request(format!("the body: {reason}")),
                },
                _ => ApiError::field(path.clone(), format!("{}: {reason}", shown(&path))),
            }
        })?;
        let end = json.end();
        end.map_err(|e| ApiError::bad_request(format!("the body is no JSON: {}", shown(e))))?;
        Ok(value)
    }
}

/// The reason without the line and column of the body, which clients do not see.
fn without_place(reason: &str) -> String {
    let end = reason.rfind(" at line ").unwrap_or(reason.len());
    shown(&reason[..end])
}

/// The name of the field that is not there.
fn missing(reason: &str) -> Option<&str> {
    reason.strip_prefix("missing field `")?.strip_suffix('`')
}
