//! Generation: prefill, then token after token.

use std::ops::{ControlFlow, Range};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cache::KvCache;
use crate::decoder::{Logits, Sequence};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::sample::{Sampler, Sampling};
use crate::tokenizer::TextStream;

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
    /// Tokens that an earlier call has generated of the same text, the last of which is what is to be read now:
    /// a character or a stop text may have begun in them.
    pub written: Vec<u32>,
    /// Whether a later call may go on with the text. Where it has not ended, what is not certain yet of its last
    /// characters is left to that call.
    pub goes_on: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            stop: Vec::new(),
            ignore_end: false,
            context: usize::MAX,
            written: Vec::new(),
            goes_on: false,
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// No tokens, of a text that had stopped for this reason.
    pub fn nothing(finish: Finish) -> Self {
        Self {
            text: String::new(),
            tokens: Vec::new(),
            finish,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
        }
    }

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
    let mut writing = Writing::new(model, cache.len(), prompt, options)?;
    sampler.see(prompt);
    while writing.goes_on(cache.len()) {
        let mut sequences = [Sequence {
            tokens: &writing.next,
            cache: &mut *cache,
        }];
        let logits = model.decoder.forward(&mut sequences, Logits::Last)?;
        let token = sampler.draw(logits.squeeze(0)?.to_vec1()?)?;
        let sure = writing.take(token)?;
        let flow = on_text(&sure);
        if writing.finish.is_none() && flow.is_break() {
            writing.finish = Some(Finish::Interrupted);
        }
    }
    let (generated, rest) = writing.end()?;
    if !rest.is_empty() {
        // Nothing follows that could be broken off.
        let _ = on_text(&rest);
    }
    Ok(generated)
}

/// A prompt of [`generate_batch`], and what holds its keys and values.
pub struct Prompt<'a> {
    /// What is added to what the cache holds.
    pub tokens: &'a [u32],
    /// As of [`generate`].
    pub cache: &'a mut dyn KvCache,
    /// When to end.
    pub options: &'a GenerateOptions,
}

/// Generates greedily from several prompts: each is read alone, then all are decoded together, so that every reading
/// of the weights serves all that still go on.
///
/// `on_step` is called after every prompt and every step, and may break off: `None` then.
///
/// # Errors
/// As [`generate`].
pub fn generate_batch(
    model: &Model,
    prompts: &mut [Prompt<'_>],
    on_step: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<Vec<Generated>>> {
    let mut writings = Vec::with_capacity(prompts.len());
    for prompt in prompts.iter() {
        writings.push(Writing::new(
            model,
            prompt.cache.len(),
            prompt.tokens,
            prompt.options,
        )?);
    }
    let mut greedy = Sampler::new(Sampling::default())?;
    let alone = (0..prompts.len()).map(|i| i..i + 1);
    let mut readings: Vec<Range<usize>> = alone.rev().collect();
    loop {
        let range = readings.pop().unwrap_or(0..prompts.len());
        let mut at_work = Vec::new();
        let mut sequences = Vec::new();
        let pairs = writings[range.clone()].iter_mut().zip(&mut prompts[range]);
        for (writing, prompt) in pairs {
            if !writing.goes_on(prompt.cache.len()) {
                continue;
            }
            at_work.push(writing);
            sequences.push(&mut *prompt.cache);
        }
        if at_work.is_empty() {
            break;
        }
        let mut sequences: Vec<Sequence<'_>> = sequences
            .into_iter()
            .zip(&at_work)
            .map(|(cache, writing)| Sequence {
                tokens: &writing.next,
                cache,
            })
            .collect();
        let logits = model.decoder.forward(&mut sequences, Logits::Last)?;
        for (writing, logits) in at_work.into_iter().zip(logits.to_vec2()?) {
            writing.take(greedy.draw(logits)?)?;
        }
        if on_step().is_break() {
            return Ok(None);
        }
    }
    let ended = writings.into_iter().map(|writing| Ok(writing.end()?.0));
    ended.collect::<Result<_>>().map(Some)
}

/// A generation under way.
struct Writing<'a> {
    model: &'a Model,
    options: &'a GenerateOptions,
    context: usize,
    stop: StopFilter<'a>,
    stream: TextStream<'a>,
    text: String,
    tokens: Vec<u32>,
    /// What the model is to read next.
    next: Vec<u32>,
    finish: Option<Finish>,
    started: Instant,
    prefill: Duration,
}

impl<'a> Writing<'a> {
    fn new(
        model: &'a Model,
        held: usize,
        prompt: &[u32],
        options: &'a GenerateOptions,
    ) -> Result<Self> {
        let context = model.decoder.config().context.min(options.context);
        if held + prompt.len() > context {
            return Err(Error::ContextFull {
                wanted: held + prompt.len(),
                context,
            });
        }
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let (mut stop, mut stream) = (StopFilter::new(&options.stop), model.tokenizer.stream());
        for &token in &options.written {
            // The earlier call has given it out.
            let _ = stop.push(&stream.push(token)?);
        }
        Ok(Self {
            model,
            options,
            context,
            stop,
            stream,
            text: String::new(),
            tokens: Vec::new(),
            next: prompt.to_vec(),
            finish: None,
            started: Instant::now(),
            prefill: Duration::ZERO,
        })
    }

    /// Whether there is a next token to come, where the cache holds `held`.
    fn goes_on(&mut self, held: usize) -> bool {
        if self.finish.is_none() && self.tokens.len() >= self.options.max_tokens {
            self.finish = Some(Finish::MaxTokens);
        }
        if self.finish.is_none() && held + self.next.len() > self.context {
            self.finish = Some(Finish::ContextFull);
        }
        self.finish.is_none()
    }

    /// Takes the next token; returns the text that became certain.
    fn take(&mut self, token: u32) -> Result<String> {
        if self.tokens.is_empty() {
            self.prefill = self.started.elapsed();
        }
        self.tokens.push(token);
        self.next = vec![token];
        let ended = !self.options.ignore_end && self.model.end_tokens.contains(&token);
        let piece = if ended {
            String::new()
        } else {
            self.stream.push(token)?
        };
        let sure = self.stop.push(&piece);
        self.text.push_str(&sure);
        if ended {
            self.finish = Some(Finish::End);
        } else if self.stop.found {
            self.finish = Some(Finish::Stop);
        }
        Ok(sure)
    }

    /// What was generated, and the end of its text, which was held back until now.
    fn end(mut self) -> Result<(Generated, String)> {
        let decode = self.started.elapsed() - self.prefill;
        let ended = matches!(self.finish, Some(Finish::End | Finish::Stop));
        let mut rest = String::new();
        if ended || !self.options.goes_on {
            rest = self.stop.push(&self.stream.finish()?);
            rest.push_str(&self.stop.finish());
        }
        let generated = Generated {
            text: self.text + &rest,
            tokens: self.tokens,
            finish: self.finish.unwrap_or(Finish::MaxTokens),
            prefill: self.prefill,
            decode,
        };
        Ok((generated, rest))
    }
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
