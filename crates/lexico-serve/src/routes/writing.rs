//! From the fields of a request to texts, whole or as they are written.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::Service;
use super::error::ApiError;
use super::fields::StreamOptions;
use crate::engine::{Event, FinishReason, Logprob};
use crate::worker::Order;

/// Texts that are being written.
pub(super) struct Orders {
    /// The first event of all.
    first: Option<(usize, Event)>,
    events: UnboundedReceiver<(usize, Event)>,
    /// Number of texts.
    pub(super) count: usize,
    /// Number of texts of a prompt.
    n: usize,
    /// Which prompts were read.
    read: Vec<bool>,
    pub(super) usage: Usage,
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    prompt: usize,
    cached: usize,
    written: usize,
}

impl Usage {
    pub(super) fn document(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// A text that was written.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) text: String,
    pub(super) logprobs: Vec<Logprob>,
    pub(super) prompt_logprobs: Vec<Logprob>,
    pub(super) reason: Option<FinishReason>,
}

impl Service {
    /// Has texts written; returns when the first prompt is read. `param` is the field that the prompts come from.
    pub(super) async fn order(&self, order: Order, param: &str) -> Result<Orders, ApiError> {
        let (count, n, prompts) = (order.prompts.len() * order.n, order.n, order.prompts.len());
        let usage = Usage {
            prompt: order.prompts.iter().map(Vec::len).sum(),
            ..Usage::default()
        };
        let events = self.worker.order(order).await;
        let mut orders = Orders {
            first: None,
            events: events.map_err(|failure| ApiError::of_prompt(param, failure))?,
            count,
            n,
            read: vec![false; prompts],
            usage,
        };
        orders.first = Some(orders.next().await?);
        Ok(orders)
    }

    /// The most tokens that text of so many bytes can have been meant to have: a text that has more in any case is refused
    /// before it is looked at.
    pub(super) fn check_length(&self, param: &str, text: &str) -> Result<(), ApiError> {
        let context = self.worker.context();
        let least = text.len() / self.longest_piece.max(1);
        match least > context {
            true => {
                let reason = format!(
                    "the model's context is {context} tokens, and the prompt has more than {least}"
                );
                Err(ApiError::context(param, reason))
            }
            false => Ok(()),
        }
    }
}

impl Orders {
    /// The next event; a failure of one text is that of the request.
    async fn next(&mut self) -> Result<(usize, Event), ApiError> {
        let next = match self.first.take() {
            Some(first) => Some(first),
            None => self.events.recv().await,
        };
        match next {
            Some((_, Event::Failed(failure))) => Err(failure.into()),
            Some((index, event)) => {
                match &event {
                    // Further texts of a prompt begin from what the first has read.
                    Event::Read { cached, .. } => {
                        if let Some(read @ false) = self.read.get_mut(index / self.n) {
                            *read = true;
                            self.usage.cached += cached;
                        }
                    }
                    Event::Token { .. } => self.usage.written += 1,
                    Event::Done { .. } | Event::Failed(_) => {}
                }
                Ok((index, event))
            }
            None => Err(ApiError::internal("the engine has stopped")),
        }
    }

    /// Waits for all texts.
    pub(super) async fn written(&mut self) -> Result<Vec<Written>, ApiError> {
        let mut all: Vec<Written> = (0..self.count).map(|_| Written::default()).collect();
        let mut left = self.count;
        while left > 0 {
            let (index, event) = self.next().await?;
            let Some(written) = all.get_mut(index) else {
                continue;
            };
            match event {
                Event::Read { logprobs, .. } => written.prompt_logprobs = logprobs,
                Event::Token { text, logprob, .. } => {
                    written.text += &text;
                    written.logprobs.extend(logprob);
                }
                Event::Done { text, reason } => {
                    written.text += &text;
                    written.reason = Some(reason);
                    left -= 1;
                }
                Event::Failed(_) => {}
            }
        }
        Ok(all)
    }

    /// Sends what `chunks` makes of each event as server-sent events, as OpenAI does.
    pub(super) fn streamed<F>(self, options: StreamOptions, frame: Value, chunks: F) -> Response
    where
        F: FnMut(usize, Event) -> Vec<Value> + Send + 'static,
    {
        let left = self.count;
        let state = Streaming {
            orders: self,
            options,
            frame,
            chunks,
            ready: VecDeque::new(),
            left,
            over: false,
        };
        let stream = stream::unfold(state, |mut state| async move {
            let event = state.next().await?;
            Some((Ok::<_, Infallible>(event), state))
        });
        let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
        let mut response = Sse::new(stream).keep_alive(keep_alive).into_response();
        // Proxies are not to collect it.
        let no = axum::http::HeaderValue::from_static("no");
        response.headers_mut().insert("x-accel-buffering", no);
        response
    }
}

/// A stream under way. Where it is dropped its receiver is too, and the engine forgets the texts.
struct Streaming<F> {
    orders: Orders,
    options: StreamOptions,
    /// What all chunks have in common.
    frame: Value,
    chunks: F,
    ready: VecDeque<sse::Event>,
    /// Number of texts that are not whole yet.
    left: usize,
    over: bool,
}

impl<F: FnMut(usize, Event) -> Vec<Value>> Streaming<F> {
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            match self.orders.next().await {
                Ok((index, event)) => {
                    self.left -= usize::from(matches!(event, Event::Done { .. }));
                    for choice in (self.chunks)(index, event) {
                        self.push(json!([choice]), false);
                    }
                }
                Err(error) => {
                    let event = sse::Event::default().data(error.document().to_string());
                    self.ready.push_back(event);
                    self.end();
                }
            }
            if self.left == 0 && !self.over {
                if self.options.include_usage == Some(true) {
                    self.push(json!([]), true);
                }
                self.end();
            }
        }
    }

    fn push(&mut self, choices: Value, last: bool) {
        let mut chunk = self.frame.clone();
        chunk["choices"] = choices;
        if last || self.options.continuous_usage_stats == Some(true) {
            chunk["usage"] = self.orders.usage.document();
        } else if self.options.include_usage == Some(true) {
            chunk["usage"] = Value::Null;
        }
        let event = sse::Event::default().data(chunk.to_string());
        self.ready.push_back(event);
    }

    fn end(&mut self) {
        self.ready.push_back(sse::Event::default().data("[DONE]"));
        self.over = true;
    }
}

/// Runs work that takes the processor a while beside the connections.
pub(super) async fn computed<T: Send + 'static>(
    service: &Arc<Service>,
    work: impl FnOnce(&Service) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let turn = Arc::clone(&service.computing).acquire_owned().await;
    let own = Arc::clone(service);
    let work = move || {
        // The work goes on where the client leaves, and so its turn ends here.
        let _turn = turn;
        work(&own)
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| Err(ApiError::internal(panic)))
}
