//! The fields that say how a text is written: the same of chats and of completions.

use std::collections::BTreeMap;

use lexico_llm::sample::Sampling;
use serde::Deserialize;
use utoipa::ToSchema;

use super::error::ApiError;
use crate::engine::ChoiceSettings;

/// A string or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "a string or a list of strings is needed")]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// What a stream tells beside the text.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(default)]
pub(crate) struct StreamOptions {
    /// A last chunk, without choices, tells the numbers of tokens.
    pub(crate) include_usage: Option<bool>,
    /// Every chunk tells the numbers of tokens so far.
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// How a text is written.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct WritingFields {
    /// The model's name; any where it is left out.
    pub(crate) model: Option<String>,
    /// Max number of tokens to write.
    pub(crate) max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub(crate) stop: Option<OneOrMany>,
    /// Tokens that end the answer.
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    /// Goes on past the tokens that end a text.
    pub(crate) ignore_eos: Option<bool>,
    /// Number of tokens before which the answer does not end by itself.
    pub(crate) min_tokens: Option<usize>,
    /// 0 always takes the likeliest token, higher is more varied.
    #[schema(minimum = 0, maximum = 100)]
    pub(crate) temperature: Option<f32>,
    /// Probability that the tokens to draw from reach together.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub(crate) top_p: Option<f32>,
    /// Number of likeliest tokens to draw from; 0 or -1 for all.
    #[schema(minimum = -1)]
    pub(crate) top_k: Option<i32>,
    /// Least probability of a token to draw from, as a share of the likeliest token's.
    #[schema(minimum = 0, maximum = 1)]
    pub(crate) min_p: Option<f32>,
    /// Taken off the logits of tokens that were written.
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) presence_penalty: Option<f32>,
    /// Taken off the logit of a token for each time that it was written.
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Logits of tokens of the text so far are divided by it.
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Numbers from -100 to 100 that are added to the logits of tokens.
    pub(crate) logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed draws the same tokens.
    pub(crate) seed: Option<i64>,
    /// Number of answers.
    #[schema(minimum = 1, maximum = 16)]
    pub(crate) n: Option<usize>,
    /// Whether the answer comes as it is written, as server-sent events.
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
}

/// Max number of answers to one prompt.
const MAX_N: usize = 16;
/// Max number of texts, and of tokens, that end an answer.
const MAX_STOPS: usize = 64;
/// Max number of bytes of a text that ends an answer: every answer looks for it in each of its places.
const MAX_STOP: usize = 4096;
/// Max number of log-probabilities beside a token's own.
pub(crate) const MAX_LOGPROBS: usize = 20;
/// The words that count for `repetition_penalty`: all.
const WHOLE_TEXT: usize = usize::MAX;

/// Fails where a number is not in a range.
fn within(
    name: &str,
    value: Option<f32>,
    range: &str,
    sound: impl Fn(f32) -> bool,
) -> Result<(), ApiError> {
    match value {
        Some(value) if !(value.is_finite() && sound(value)) => {
            let reason = format!("{name} is {value}, and it must be {range}");
            Err(ApiError::field(name, reason))
        }
        _ => Ok(()),
    }
}

impl WritingFields {
    /// Checks the fields; returns how tokens are chosen. The log-probabilities wanted, and what the text must follow, are
    /// not among these fields.
    pub(crate) fn choice(&self, vocabulary: usize) -> Result<ChoiceSettings, ApiError> {
        within("temperature", self.temperature, "from 0 to 100", |x| {
            (0.0..=100.0).contains(&x)
        })?;
        within("top_p", self.top_p, "above 0 and at most 1", |x| {
            x > 0.0 && x <= 1.0
        })?;
        within("min_p", self.min_p, "from 0 to 1", |x| {
            (0.0..=1.0).contains(&x)
        })?;
        for (name, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            within(name, value, "from -2 to 2", |x| (-2.0..=2.0).contains(&x))?;
        }
        let penalty = self.repetition_penalty;
        within(
            "repetition_penalty",
            penalty,
            "above 0 and at most 100",
            |x| x > 0.0 && x <= 100.0,
        )?;
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            top_k => usize::try_from(top_k).map_err(|_| {
                ApiError::field(
                    "top_k",
                    "top_k must be a number of tokens, or 0 or -1 for all",
                )
            })?,
        };
        let mut bias = Vec::new();
        for (token, &value) in self.logit_bias.iter().flatten() {
            let name = format!("logit_bias.{token}");
            let Some(known) = token
                .parse()
                .ok()
                .filter(|&t: &u32| (t as usize) < vocabulary)
            else {
                let reason = format!("{token:?} is no token of the model's {vocabulary}");
                return Err(ApiError::field(name, reason));
            };
            within(&name, Some(value), "from -100 to 100", |x| {
                (-100.0..=100.0).contains(&x)
            })?;
            bias.push((known, value));
        }
        let stop_tokens = self.stop_token_ids.clone().unwrap_or_default();
        if stop_tokens.len() > MAX_STOPS {
            let reason = format!("more than {MAX_STOPS} tokens end the text");
            return Err(ApiError::field("stop_token_ids", reason));
        }
        Ok(ChoiceSettings {
            sampling: Sampling {
                temperature: self.temperature.unwrap_or(1.0),
                top_k,
                top_p: self.top_p.unwrap_or(1.0),
                min_p: self.min_p.unwrap_or(0.0),
                repetition_penalty: penalty.unwrap_or(1.0),
                repetition_window: WHOLE_TEXT,
                seed: self.seed.map_or_else(drawn_seed, |seed| seed as u64),
            },
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            bias: bias.into(),
            stop_tokens,
            min_tokens: self.min_tokens.unwrap_or(0),
            structure: None,
            logprobs: None,
        })
    }

    /// The texts that end an answer.
    pub(crate) fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match self.stop.clone() {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        if stops.len() > MAX_STOPS {
            let reason = format!("more than {MAX_STOPS} texts end the answer");
            return Err(ApiError::field("stop", reason));
        }
        if stops.iter().any(|stop| stop.len() > MAX_STOP) {
            let reason = format!("a text that ends the answer has more than {MAX_STOP} bytes");
            return Err(ApiError::field("stop", reason));
        }
        // Empty ones end nothing.
        Ok(stops.into_iter().filter(|stop| !stop.is_empty()).collect())
    }

    /// The number of answers.
    pub(crate) fn answers(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_N => Ok(n),
            n => {
                let reason = format!("n is {n}, and it must be from 1 to {MAX_N}");
                Err(ApiError::field("n", reason))
            }
        }
    }

    /// What a stream tells, where the answer is to be one.
    pub(crate) fn streams(&self) -> Result<Option<StreamOptions>, ApiError> {
        match (self.stream.unwrap_or(false), self.stream_options) {
            (true, options) => Ok(Some(options.unwrap_or_default())),
            (false, None) => Ok(None),
            (false, Some(_)) => Err(ApiError::field(
                "stream_options",
                "stream_options are for streams; set stream to true, or leave them out",
            )),
        }
    }
}

fn drawn_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}
