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

/// What happens to a request. The first event is `Read` or `Failed`, the last `Done` or `Failed`.
#[derive(Debug)]
pub(crate) enum Event {
    /// The prompt is read.
    Read {
        /// Number of its tokens that were not read anew.
        cached: usize,
        /// Log-probabilities of its tokens but the first, where they were asked for.
        logprobs: Vec<Logprob>,
    },
    /// One more token, and the text that became certain with it, often none.
    Token {
        text: String,
        logprob: Option<Logprob>,
    },
    /// The text is whole.
    Done {
        /// The end of the text, which was held back until now.
        text: String,
        reason: FinishReason,
    },
    Failed(Failure),
}

/// Log-probability of a token, and the likeliest ones in its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Logprob {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<(u32, f32)>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FinishReason {
    Stop,
    Length,
}

impl FinishReason {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Failure {
    /// Its cache would not fit the memory even if nobody else were there: bytes needed, and bytes there are.
    TooLarge { bytes: usize, budget: usize },
    /// It has waited as long as it may, or too many wait.
    Busy,
    /// The server ends.
    Ending,
    /// Something went wrong that is not the client's fault.
    Internal(String),
}
