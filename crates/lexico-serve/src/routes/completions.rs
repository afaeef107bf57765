//! `/v1/completions`

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::body::Body;
use super::error::{ApiError, Refusal};
use super::fields::{MAX_LOGPROBS, WritingFields};
use super::writing::computed;
use super::{App, Service, new_id};
use crate::engine::{Event, Logprob};
use crate::worker::Order;

/// Tokens that are written where a request names no number, as OpenAI's.
const USUAL_MAX_TOKENS: usize = 16;
/// Prompts of a request at the most.
const MAX_PROMPTS: usize = 1024;

/// What a completion has beside the fields of all texts.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct CompletionFields {
    /// The text to go on from, or several, or their tokens.
    pub(crate) prompt: Prompt,
    /// Number of likeliest tokens whose log-probabilities are told in each place.
    #[schema(minimum = 0, maximum = 20)]
    pub(crate) logprobs: Option<usize>,
    /// Whether the answer begins with the prompt.
    pub(crate) echo: Option<bool>,
    /// Text after the answer: not possible here.
    #[schema(max_length = 0)]
    pub(crate) suffix: Option<String>,
}

/// A prompt, or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "a string, a list of strings, a list of tokens or a list of lists of tokens is needed"
)]
pub(crate) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

impl Prompt {
    fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::Lists(lists) => lists.len(),
        }
    }
}

/// A completion as the documentation shows it.
#[derive(ToSchema)]
#[allow(dead_code, reason = "both parts are read apart")]
pub(crate) struct CompletionRequest {
    #[schema(inline)]
    #[serde(flatten)]
    completion: CompletionFields,
    #[schema(inline)]
    #[serde(flatten)]
    writing: WritingFields,
}

/// Write what follows a text
#[utoipa::path(
    post, path = "/v1/completions", tag = "texts", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer, or a stream of its chunks", content(
            (Object = "application/json"), (String = "text/event-stream"))),
        Refusal<'static>,
    ),
)]
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    body: Body,
) -> Result<Response, ApiError> {
    let service = app.service()?;
    let writing: WritingFields = body.read()?;
    let fields: CompletionFields = body.read()?;
    drop(body);
    service.check_model(writing.model.as_deref())?;
    if fields
        .suffix
        .as_deref()
        .is_some_and(|suffix| !suffix.is_empty())
    {
        let reason = "text cannot be written into the middle of another here";
        return Err(ApiError::field("suffix", reason));
    }
    if fields.logprobs.is_some_and(|count| count > MAX_LOGPROBS) {
        let reason = format!("logprobs must be at most {MAX_LOGPROBS}");
        return Err(ApiError::field("logprobs", reason));
    }
    let echo = fields.echo.unwrap_or(false);
    let mut choice = writing.choice(service.worker.vocabulary)?;
    choice.logprobs = fields.logprobs;
    let (n, streams, mut stop) = (writing.answers()?, writing.streams()?, writing.stops()?);
    let ignore_end = writing.ignore_eos.unwrap_or(false);
    if !ignore_end {
        stop.extend(service.stop_texts.iter().cloned());
    }
    if fields.prompt.count().saturating_mul(n) > MAX_PROMPTS {
        let reason = format!("at most {MAX_PROMPTS} texts are written at once");
        return Err(ApiError::field("prompt", reason));
    }
    if writing.max_tokens == Some(0) && !echo {
        let reason = "at least one token must be asked for, unless the prompt is echoed";
        return Err(ApiError::field("max_tokens", reason));
    }
    let prompts = computed(&service, move |service| prompts(service, fields.prompt)).await?;
    let order = Order {
        prompts: prompts.iter().map(|(tokens, _)| tokens.clone()).collect(),
        n,
        max_tokens: writing.max_tokens,
        usual_max_tokens: USUAL_MAX_TOKENS,
        choice,
        stop: stop.into(),
        ignore_end,
        prompt_logprobs: echo && fields.logprobs.is_some(),
    };
    let mut orders = service.order(order, "prompt").await?;
    let frame = json!({
        "id": new_id("cmpl-"), "object": "text_completion", "created": super::now(), "model": service.worker.name,
    });
    let logprobs = fields.logprobs.is_some();
    let Some(options) = streams else {
        let written = orders.written().await?;
        let choices = written.into_iter().enumerate().map(|(index, written)| {
            let (tokens, prompt) = &prompts[index / n];
            let mut told = Told::default();
            let mut text = String::new();
            if echo {
                text += prompt;
                if logprobs {
                    told.prompt(&service, tokens, &written.prompt_logprobs);
                }
            }
            text += &written.text;
            written
                .logprobs
                .iter()
                .for_each(|own| told.push(&service, own));
            let reason = written.reason.map_or("stop", |reason| reason.name());
            let logprobs = logprobs.then(|| told.document());
            json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason })
        });
        let mut document = frame;
        document["choices"] = choices.collect();
        document["usage"] = orders.usage.document();
        return Ok(Json(document).into_response());
    };
    // Characters told so far, text by text.
    let mut offsets: HashMap<usize, usize> = HashMap::new();
    let chunks = move |index: usize, event: Event| {
        let chunk = |text: &str, logprobs: Value, reason: Value| json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason });
        let offset = offsets.entry(index).or_default();
        let mut told = Told {
            offset: *offset,
            ..Told::default()
        };
        let chunks = match event {
            Event::Read { logprobs: own, .. } => {
                let (tokens, prompt) = &prompts[index / n];
                if !echo {
                    return Vec::new();
                }
                if logprobs {
                    told.prompt(&service, tokens, &own);
                }
                let logprobs = if logprobs {
                    told.document()
                } else {
                    Value::Null
                };
                vec![chunk(prompt, logprobs, Value::Null)]
            }
            Event::Token { text, logprob, .. } => {
                if text.is_empty() && logprob.is_none() {
                    return Vec::new();
                }
                let logprobs = logprob.map(|own| {
                    told.push(&service, &own);
                    told.document()
                });
                vec![chunk(&text, logprobs.unwrap_or(Value::Null), Value::Null)]
            }
            Event::Done { text, reason } => vec![chunk(&text, Value::Null, reason.name().into())],
            Event::Failed(_) => Vec::new(),
        };
        *offset = told.offset;
        chunks
    };
    Ok(orders.streamed(options, frame, chunks))
}

/// Log-probabilities as completions tell them.
#[derive(Default)]
struct Told {
    tokens: Vec<String>,
    logprobs: Vec<Option<f32>>,
    top: Vec<Option<Map<String, Value>>>,
    offsets: Vec<usize>,
    /// Characters so far.
    offset: usize,
}

impl Told {
    /// Tells the tokens of a prompt, of the first of which nothing is known.
    fn prompt(&mut self, service: &Service, tokens: &[u32], logprobs: &[Logprob]) {
        if let Some(&first) = tokens.first() {
            self.token(service, first);
            self.logprobs.push(None);
            self.top.push(None);
        }
        logprobs.iter().for_each(|own| self.push(service, own));
    }

    fn push(&mut self, service: &Service, own: &Logprob) {
        self.token(service, own.token);
        self.logprobs.push(Some(own.logprob));
        let top = own.top.iter();
        let mut top: Map<String, Value> = top
            .map(|&(t, l)| (service.token_name(t), l.into()))
            .collect();
        // As OpenAI's, the token itself is always there.
        top.entry(service.token_name(own.token))
            .or_insert(own.logprob.into());
        self.top.push(Some(top));
    }

    fn token(&mut self, service: &Service, token: u32) {
        let name = service.token_name(token);
        self.offsets.push(self.offset);
        self.offset += name.chars().count();
        self.tokens.push(name);
    }

    fn document(&self) -> Value {
        json!({
            "tokens": self.tokens, "token_logprobs": self.logprobs, "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}

/// The tokens of each prompt, and its text.
fn prompts(service: &Service, prompt: Prompt) -> Result<Vec<(Vec<u32>, String)>, ApiError> {
    let tokenizer = &service.worker.model.tokenizer;
    let failed = |error: lexico_llm::Error| ApiError::field("prompt", error);
    let of_text = |text: String| {
        service.check_length("prompt", &text)?;
        Ok((tokenizer.encode_first(&text).map_err(failed)?, text))
    };
    let of_tokens = |tokens: Vec<u32>| {
        let context = service.worker.context();
        if tokens.len() > context {
            let length = tokens.len();
            let reason =
                format!("the model's context is {context} tokens; the prompt has {length}");
            return Err(ApiError::context("prompt", reason));
        }
        let known = service.worker.check_tokens(&tokens);
        known.map_err(|failure| ApiError::of_prompt("prompt", failure))?;
        let text = tokenizer.decode(&tokens).map_err(failed)?;
        Ok((tokens, text))
    };
    let empty = || ApiError::field("prompt", "there is no prompt");
    match prompt {
        Prompt::Text(text) => Ok(vec![of_text(text)?]),
        Prompt::Texts(texts) if texts.is_empty() => Err(empty()),
        Prompt::Texts(texts) => texts.into_iter().map(of_text).collect(),
        Prompt::Tokens(tokens) => Ok(vec![of_tokens(tokens)?]),
        Prompt::Lists(lists) => lists.into_iter().map(of_tokens).collect(),
    }
}
