//! A text that is being read or written.

use std::sync::Arc;
use std::time::Instant;

use lexico_llm::generate::WrittenText;
use lexico_llm::{Model, Result};

use super::choice::{Choice, Chosen, logprob};
use super::guarded::Guarded;
use super::request::{Event, FinishReason, Logprob, Request};
use crate::memory::Share;
use crate::metrics::Metrics;
use crate::prefix::{Key, Prefix};

/// A request that has its memory.
pub(super) struct Sequence<'m> {
    pub(super) index: usize,
    pub(super) prompt: Vec<u32>,
    /// Names of the prompt's prefixes, chunk by chunk.
    pub(super) keys: Vec<Key>,
    pub(super) cache: Guarded,
    /// The prefix to begin from, until it has begun.
    pub(super) prefix: Option<Prefix>,
    /// False until its prompt is being read.
    pub(super) begun: bool,
    /// Number of the prompt's tokens that the cache holds.
    pub(super) read: usize,
    /// Number of them that were not read anew.
    pub(super) cached: usize,
    /// Numbers of chunks after which the prefix is to be kept.
    pub(super) keep_after: Vec<usize>,
    /// The memory of what is not shared.
    pub(super) own: Share,
    /// The memory of its codes, chunk by chunk.
    pub(super) chunks: Vec<Arc<Share>>,
    /// Bytes of the codes when the last chunk had been read.
    pub(super) coded_bytes: usize,
    pub(super) prompt_logprobs: bool,
    logprobs: Vec<Logprob>,
    top_logprobs: usize,
    choice: Choice,
    text: Option<WrittenText<'m>>,
    /// The last token, which the cache does not hold yet.
    pub(super) last: Option<u32>,
    written: usize,
    max_tokens: usize,
    ignore_end: bool,
    events: tokio::sync::mpsc::UnboundedSender<(usize, Event)>,
    pub(super) asked: Instant,
    last_token_at: Option<Instant>,
    pub(super) over: bool,
}

impl<'m> Sequence<'m> {
    pub(super) fn new(
        model: &'m Model,
        request: Request,
        keys: Vec<Key>,
        cache: Guarded,
        (own, prefix): (Share, Option<Prefix>),
        asked: Instant,
    ) -> Result<Self> {
        let top_logprobs = request.choice.logprobs.unwrap_or(0);
        let choice = Choice::new(request.choice, &model.end_tokens, &request.prompt)?;
        let text = WrittenText::new(&model.tokenizer, request.stop.to_vec());
        Ok(Self {
            index: request.index,
            prompt: request.prompt,
            keys,
            cache,
            prefix,
            begun: false,
            read: 0,
            cached: 0,
            keep_after: Vec::new(),
            own,
            chunks: Vec::new(),
            coded_bytes: 0,
            prompt_logprobs: request.prompt_logprobs,
            logprobs: Vec::new(),
            top_logprobs,
            choice,
            text: Some(text),
            last: None,
            written: 0,
            max_tokens: request.max_tokens,
            ignore_end: request.ignore_end,
            events: request.events,
            asked,
            last_token_at: None,
            over: false,
        })
    }

    /// Whether its prompt is not read yet.
    pub(super) fn reads(&self) -> bool {
        self.read < self.prompt.len()
    }

    /// Whether nobody waits for it any more.
    pub(super) fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    pub(super) fn send(&mut self, event: Event) {
        // Where nobody takes it, the next step drops the sequence.
        let _ = self.events.send((self.index, event));
    }

    /// Takes log-probabilities of the prompt's tokens after `from`, by the logits at each.
    pub(super) fn take_prompt_logits(&mut self, from: usize, rows: &[Vec<f32>]) {
        for (logits, &token) in rows.iter().zip(&self.prompt[from + 1..]) {
            self.logprobs
                .push(logprob(logits, token, self.top_logprobs));
        }
    }

    /// Says that the prompt is read, and takes the first token by the last one's logits.
    pub(super) fn take_first(&mut self, logits: Vec<f32>, context: usize, metrics: &Metrics) {
        let logprobs = std::mem::take(&mut self.logprobs);
        let cached = self.cached;
        self.send(Event::Read { cached, logprobs });
        metrics.prompt_tokens(self.prompt.len(), cached);
        if self.max_tokens == 0 {
            return self.finish(FinishReason::Length, String::new());
        }
        metrics.first_token(self.asked.elapsed());
        let chosen = self.choice.next(logits);
        self.take(chosen, context, metrics);
    }

    /// Chooses the next token by the logits of the last one.
    pub(super) fn choose(&mut self, logits: Vec<f32>) -> std::result::Result<Chosen, String> {
        self.choice.next(logits)
    }

    /// Takes a token that was chosen; the context has room for `context` tokens.
    pub(super) fn take(
        &mut self,
        chosen: std::result::Result<Chosen, String>,
        context: usize,
        metrics: &Metrics,
    ) {
        let chosen = match chosen {
            Ok(chosen) => chosen,
            Err(reason) => return self.fail(reason),
        };
        let now = Instant::now();
        if let Some(before) = self.last_token_at.replace(now) {
            metrics.next_token(now - before);
        }
        metrics.generated_token();
        let Chosen {
            token,
            logprob,
            complete,
        } = chosen;
        self.written += 1;
        self.last = Some(token);
        let ended =
            self.choice.is_stop_token(token) || (self.choice.ends(token) && !self.ignore_end);
        let text = match (&mut self.text, ended) {
            (Some(text), false) => match text.push(token) {
                Ok(sure) => sure,
                Err(error) => return self.fail(error.to_string()),
            },
            _ => String::new(),
        };
        let stopped = self.text.as_ref().is_some_and(WrittenText::stopped);
        let held = self.prompt.len() + self.written;
        self.send(Event::Token {
            token,
            text,
            logprob,
        });
        if ended || stopped || complete {
            self.end(FinishReason::Stop);
        } else if self.written >= self.max_tokens || held >= context {
            self.end(FinishReason::Length);
        }
    }

    fn end(&mut self, reason: FinishReason) {
        match self.text.take().map(WrittenText::finish).transpose() {
            Ok(rest) => self.finish(reason, rest.unwrap_or_default()),
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn finish(&mut self, reason: FinishReason, text: String) {
        self.send(Event::Done { text, reason });
        self.over = true;
    }

    /// Ends it for a fault that is not the client's.
    pub(super) fn fail(&mut self, reason: String) {
        tracing::error!(reason, "a text could not be written");
        self.send(Event::Failed(super::Failure::Internal(reason)));
        self.over = true;
    }
}
