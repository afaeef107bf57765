//! Generation: prefill, then token after token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::cache::KvCache;
use crate::decoder::{Logits, Sequence};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::sample::Sampler;

/// Settings of [`generate`].
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to generate; with 0 the prompt is not read either.
    pub max_tokens: usize,
    /// Texts that end the generation; they are not part of what is generated.
    pub stop: Vec<String>,
    /// Whether to go on past the model's end-of-text tokens.
    pub ignore_end: bool,
    /// Most positions of the cache; the model's own context limits it too.
    pub context: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            stop: Vec::new(),
            ignore_end: false,
            context: usize::MAX,
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended the text.
    End,
    /// A stop text came up.
    Stop,
    /// As many tokens as asked for.
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The caller broke off.
    Interrupted,
}

/// What was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The text, without a stop text.
    pub text: String,
    /// The tokens, an end-of-text token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Time until the first token was known.
    pub prefill: Duration,
    /// Time for the tokens after the first.
    pub decode: Duration,
}

impl Generated {
    /// Tokens a second after the first one; `None` where there was only one.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        let steps = self
            .tokens
            .len()
            .checked_sub(1)
            .filter(|&steps| steps > 0)?;
        Some(steps as f64 / self.decode.as_secs_f64().max(1e-9))
    }
}

/// Generates from `prompt`, which is added to what `cache` holds.
///
/// The cache afterwards holds the prompt and all generated tokens but the last; the sampler has
/// seen all of them. `on_text` is called once a token with the text that became certain, often
/// empty, and may break off.
///
/// # Errors
/// [`Error::EmptyPrompt`], [`Error::ContextFull`] where the prompt does not fit,
/// [`Error::NotFinite`], and those of [`Decoder::forward`](crate::decoder::Decoder::forward); the
/// cache cannot be used any further then.
pub fn generate(
    model: &Model,
    cache: &mut dyn KvCache,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated> {
    let context = model.decoder.config().context.min(options.context);
    let mut stop = StopFilter::new(&options.stop);
    let mut stream = model.tokenizer.stream();
    let mut generated = Generated {
        text: String::new(),
        tokens: Vec::new(),
        finish: Finish::MaxTokens,
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
    };
    if cache.len() + prompt.len() > context {
        return Err(Error::ContextFull {
            wanted: cache.len() + prompt.len(),
            context,
        });
    }
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    sampler.see(prompt);
    let started = Instant::now();
    let mut next = prompt.to_vec();
    while generated.tokens.len() < options.max_tokens {
        if cache.len() + next.len() > context {
            generated.finish = Finish::ContextFull;
            break;
        }
        let mut sequences = [Sequence {
            tokens: &next,
            cache: &mut *cache,
        }];
        let logits = model.decoder.forward(&mut sequences, Logits::Last)?;
        let token = sampler.draw(logits.squeeze(0)?.to_vec1()?)?;
        if generated.tokens.is_empty() {
            generated.prefill = started.elapsed();
        }
        generated.tokens.push(token);
        next = vec![token];
        let ended = !options.ignore_end && model.end_tokens.contains(&token);
        let piece = if ended {
            String::new()
        } else {
            stream.push(token)?
        };
        let sure = stop.push(&piece);
        generated.text.push_str(&sure);
        let flow = on_text(&sure);
        if ended {
            generated.finish = Finish::End;
            break;
        }
        if stop.found {
            generated.finish = Finish::Stop;
            break;
        }
        if flow.is_break() {
            generated.finish = Finish::Interrupted;
            break;
        }
    }
    generated.decode = started.elapsed() - generated.prefill;
    let mut rest = stop.push(&stream.finish()?);
    rest.push_str(&stop.finish());
    if !rest.is_empty() {
        generated.text.push_str(&rest);
        // Nothing follows that could be broken off.
        let _ = on_text(&rest);
    }
    Ok(generated)
}

/// Holds text back while it may be the beginning of a stop text.
struct StopFilter<'a> {
    stops: &'a [String],
    held: String,
    found: bool,
}

impl<'a> StopFilter<'a> {
    fn new(stops: &'a [String]) -> Self {
        Self {
            stops,
            held: String::new(),
            found: false,
        }
    }

    /// Takes more text; returns what cannot be part of a stop text.
    fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(text);
        let stops = || self.stops.iter().filter(|stop| !stop.is_empty());
        if let Some(at) = stops()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min()
        {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let may_begin = |at: usize| stops().any(|stop| stop.starts_with(&self.held[at..]));
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let sure = starts.find(|&at| may_begin(at)).unwrap_or(self.held.len());
        self.held.drain(..sure).collect()
    }

    /// What was held back and no stop text followed.
    fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool, String) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut filter = StopFilter::new(&stops);
        let out = pieces.iter().map(|piece| filter.push(piece)).collect();
        (out, filter.found, filter.finish())
    }

    #[test]
    fn text_is_held_back_only_while_it_may_be_a_stop() {
        let (out, found, rest) = filtered(&["\n\n"], &["one", "\n", "two\n", "\nthree"]);
        assert_eq!(out, ["one", "", "\ntwo", ""]);
        assert!(found && rest.is_empty());
    }

    #[test]
    fn the_first_stop_wins_and_the_rest_is_given_out_at_the_end() {
        let (out, found, _) = filtered(&["end", "b"], &["a b end"]);
        assert_eq!((out[0].as_str(), found), ("a ", true));
        let (out, found, rest) = filtered(&["ende"], &["the end"]);
        assert_eq!(
            (out[0].as_str(), found, rest.as_str()),
            ("the ", false, "end")
        );
    }

    #[test]
    fn characters_stay_whole_and_empty_stops_count_for_nothing() {
        let (out, found, _) = filtered(&["", "é!"], &["caf", "é", "s"]);
        assert_eq!((out.concat().as_str(), found), ("cafés", false));
    }
}
