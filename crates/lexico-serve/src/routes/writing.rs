//! From the fields of a request to texts, whole or as they are written.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Service;
use super::error::ApiError;
use super::fields::StreamOptions;
use crate::engine::{Call, ChoiceSettings, Event, Failure, FinishReason, Logprob, Request};

/// Texts to be written: `n` for each prompt, prompt after prompt.
pub(super) struct Order {
    pub(super) prompts: Vec<Vec<u32>>,
    /// The field that the prompts come from.
    pub(super) param: &'static str,
    pub(super) n: usize,
    pub(super) max_tokens: Option<usize>,
    /// Max number of tokens where the client names none.
    pub(super) usual_max_tokens: usize,
    pub(super) choice: ChoiceSettings,
    pub(super) stop: Arc<[String]>,
    pub(super) ignore_end: bool,
    pub(super) prompt_logprobs: bool,
}

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

/// What a text needs.
struct Needs {
    bytes: usize,
    max_tokens: usize,
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
    /// Has texts written; returns when the first prompt is read.
    pub(super) async fn order(&self, order: Order) -> Result<Orders, ApiError> {
        let asked = Instant::now();
        let setup = &self.engine.setup;
        let count = order.prompts.len() * order.n;
        let most = setup.parallel.saturating_add(setup.queue);
        if count > most {
            let reason = format!(
                "{count} texts are asked for, and the server takes at most {most} (--parallel and --max-waiting)"
            );
            return Err(ApiError::field(order.param, reason));
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
        let usage = Usage {
            prompt: order.prompts.iter().map(Vec::len).sum(),
            ..Usage::default()
        };
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
        let mut orders = Orders {
            first: None,
            events: receiver,
            count,
            n: order.n,
            read: vec![false; order.prompts.len()],
            usage,
        };
        orders.first = Some(orders.next().await?);
        Ok(orders)
    }

    /// What a text that goes on from a prompt needs, where it can be had.
    fn needs(&self, order: &Order, prompt: &[u32]) -> Result<Needs, ApiError> {
        let context = self.engine.setup.context;
        let length = prompt.len();
        if length == 0 {
            return Err(ApiError::field(order.param, "the prompt has no tokens"));
        }
        self.check_tokens(order.param, prompt)?;
        let wanted = order
            .max_tokens
            .unwrap_or(0)
            .max(usize::from(!order.prompt_logprobs));
        if length.saturating_add(wanted) > context {
            let reason = format!(
                "the model's context is {context} tokens; the prompt has {length}, and {wanted} more are asked for"
            );
            return Err(ApiError::context(order.param, reason));
        }
        let left = context - length;
        let max_tokens = order.max_tokens.unwrap_or(order.usual_max_tokens.min(left));
        let bytes = self.engine.setup.bytes_of(length, max_tokens);
        let bytes = bytes.map_err(ApiError::internal)?;
        let budget = self.engine.setup.memory.budget();
        match bytes > budget {
            true => Err(Failure::TooLarge { bytes, budget }.into()),
            false => Ok(Needs { bytes, max_tokens }),
        }
    }

    /// Refuses tokens that the model does not have.
    pub(super) fn check_tokens(&self, param: &str, tokens: &[u32]) -> Result<(), ApiError> {
        match tokens.iter().find(|&&t| t as usize >= self.vocabulary) {
            Some(token) => {
                let reason = format!("token {token} is none of the model's {}", self.vocabulary);
                Err(ApiError::field(param, reason))
            }
            None => Ok(()),
        }
    }

    /// The most tokens that text of so many bytes can have been meant to have: a text that has more in any case is refused
    /// before it is looked at.
    pub(super) fn check_length(&self, param: &str, text: &str) -> Result<(), ApiError> {
        let context = self.engine.setup.context;
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
                Event::Token { text, logprob } => {
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
