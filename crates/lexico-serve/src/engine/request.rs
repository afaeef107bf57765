//! What a client wants, as the engine takes it, and what the engine answers.

use std::sync::Arc;

use lexico_llm::sample::Sampling;
use llguidance::Matcher;
use tokio::sync::mpsc::UnboundedSender;

/// A text to be written.
pub(crate) struct Request {
    /// Number of the text among those of one call.
    pub(crate) index: usize,
    /// At least one token, all of the model's vocabulary.
    pub(crate) prompt: Vec<u32>,
    /// The bytes that its cache takes at its end, as expected.
    pub(crate) bytes: usize,
    /// Max number of tokens to write; with 0 the prompt is read for its log-probabilities alone.
    pub(crate) max_tokens: usize,
    pub(crate) choice: ChoiceSettings,
    /// Texts that end it.
    pub(crate) stop: Arc<[String]>,
    /// Goes on past the tokens that end a text.
    pub(crate) ignore_end: bool,
    /// Log-probabilities of the prompt's tokens are wanted too.
    pub(crate) prompt_logprobs: bool,
    /// Where events go, each with the index; nobody is there any more where the client has gone.
    pub(crate) events: UnboundedSender<(usize, Event)>,
}

/// How the next token is chosen.
pub(crate) struct ChoiceSettings {
    pub(crate) sampling: Sampling,
    /// Number taken off the logits of tokens that were written.
    pub(crate) presence_penalty: f32,
    /// Number taken off the logit of a token for each time that it was written.
    pub(crate) frequency_penalty: f32,
    /// Numbers added to logits.
    pub(crate) bias: Arc<[(u32, f32)]>,
    /// Tokens that end the text beside the model's own.
    pub(crate) stop_tokens: Vec<u32>,
    /// Tokens before which none that ends the text is taken.
    pub(crate) min_tokens: usize,
    /// What the text must follow.
    pub(crate) structure: Option<Box<Matcher>>,
    /// Log-probabilities that are wanted beside the chosen token's.
    pub(crate) logprobs: Option<usize>,
}

/// What happens to a text. The first is `Read` or `Failed`, the last `Done` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The prompt is read.
    Read {
        /// Number of its tokens that were not read anew.
        cached: usize,
        /// Log-probabilities of its tokens but the first, where they were asked for.
        logprobs: Vec<Logprob>,
    },
    /// One more token, and the text that became certain with it, often none.
    Token {
        /// The token.
        token: u32,
        /// The text.
        text: String,
        /// The log-probability, where it was asked for.
        logprob: Option<Logprob>,
    },
    /// The text is whole.
    Done {
        /// The end of the text, which was held back until now.
        text: String,
        /// Why it ended.
        reason: FinishReason,
    },
    /// It will not be.
    Failed(Failure),
}

/// Log-probability of a token, and the likeliest ones in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprob {
    /// The token.
    pub token: u32,
    /// Its log-probability, by the model alone.
    pub logprob: f32,
    /// The likeliest tokens in its place with theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A token or a text that ends it.
    Stop,
    /// As many tokens as were asked for, or as the context has.
    Length,
}

impl FinishReason {
    /// OpenAI's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Why a text was not written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// It cannot be asked for so.
    #[error("{0}")]
    Refused(String),
    /// The model's context is too short for it.
    #[error("{0}")]
    TooLong(String),
    /// Its cache would not fit the memory even if nobody else were there.
    #[error(
        "the cache of this text would take {bytes} bytes at its end, and the server has {budget} for caches (24 of 25 parts of \
         --kv-memory): shorten the prompt or ask for fewer tokens"
    )]
    TooLarge {
        /// Bytes needed.
        bytes: usize,
        /// Bytes there are.
        budget: usize,
    },
    /// It has waited as long as it may, or too many wait.
    #[error("the server's memory or places are taken by others; ask again a little later")]
    Busy,
    /// The server ends.
    #[error("the server is about to stop")]
    Ending,
    /// Something went wrong that is not the client's fault.
    #[error("{0}")]
    Internal(String),
}
