//! Generation: prefill, then token after token.

use std::ops::{ControlFlow, Range};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cache::{KvCache, ReadTogether};
use crate::decoder::{Logits, Sequence};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::sample::{Sampler, Sampling};
use crate::tokenizer::{TextStream, Tokenizer};

/// Settings of [`generate`].
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Max number of tokens to generate; with 0 the prompt is not read either.
    pub max_tokens: usize,
    /// Texts that end the generation; they are not part of what is generated. Special tokens count by their text, although
    /// that is not generated either.
    pub stop: Vec<String>,
    /// Goes on past the model's end-of-text tokens.
    pub ignore_end: bool,
    /// Max number of positions of the cache; the model's own context is a limit too.
    pub context: usize,
    /// Tokens of the same text that an earlier call generated, the last of which is read now: a character or a stop
    /// text may have begun in them.
    pub written: Vec<u32>,
    /// Lets a later call go on with the text: where the text has not ended, its last characters are left to that call
    /// while they are not certain.
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

/// Reason why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended the text.
    End,
    /// A stop text came up.
    Stop,
    /// All tokens asked for are there.
    #[default]
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The caller stopped it.
    Interrupted,
}

/// Tokens and text of a generation; by default nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Generated {
    /// The text, without a stop text.
    pub text: String,
    /// The tokens, an end-of-text token included.
    pub tokens: Vec<u32>,
    /// Reason why it ended.
    pub finish: Finish,
    /// Time until the first token was known.
    pub prefill: Duration,
    /// Time for the tokens after the first.
    pub decode: Duration,
}

impl Generated {
    /// Returns tokens a second after the first one; `None` where there was only one.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        let steps = self.tokens.len().saturating_sub(1);
        (steps > 0).then(|| steps as f64 / self.decode.as_secs_f64().max(1e-9))
    }
}

/// Generates from `prompt`, which is added to what `cache` holds.
///
/// The cache afterwards holds the prompt and all generated tokens but the last; the sampler has
/// seen all of them. `on_text` is called once a token with the text that became certain, often
/// empty, and stops the generation by [`ControlFlow::Break`].
///
/// # Errors
/// [`Error::EmptyPrompt`], [`Error::ContextFull`] and [`Error::MemoryFull`] where the prompt does not fit,
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
    let mut writing = Writing::new(model, cache, prompt, options)?;
    sampler.see(prompt);
    while writing.goes_on(cache.len()) {
        let decoder = &model.decoder;
        let logits = decoder.forward_one(&writing.next, cache, Logits::Last)?;
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
    /// Tokens added to those that the caches hold.
    pub tokens: &'a [u32],
    /// Caches of the keys and values, as in [`generate`], each of which a text of its own is generated with. The prompt is
    /// computed once, with the first: see [`ReadTogether`].
    pub caches: Vec<&'a mut dyn KvCache>,
    /// Settings of its generation.
    pub options: &'a GenerateOptions,
}

/// Generates greedily from several prompts: each is read alone, then all are decoded together, so that every reading
/// of the weights serves all that still go on. Returns what was generated with each cache, prompt after prompt.
///
/// `on_step` is called after every prompt and every step, and may stop all of them: `None` then.
///
/// # Errors
/// Those of [`generate`].
pub fn generate_batch(
    model: &Model,
    prompts: &mut [Prompt<'_>],
    on_step: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<Vec<Generated>>> {
    let mut writings = Vec::with_capacity(prompts.len());
    for prompt in prompts.iter() {
        for cache in &prompt.caches {
            writings.push(Writing::new(
                model,
                &**cache,
                prompt.tokens,
                prompt.options,
            )?);
        }
    }
    let mut greedy = Sampler::new(Sampling::default())?;
    let mut read = 0;
    for prompt in prompts.iter_mut() {
        let Some((first, others)) = prompt.caches.split_first_mut() else {
            continue;
        };
        let own = &mut writings[read..read + 1 + others.len()];
        read += own.len();
        if !own[0].goes_on(first.len()) {
            continue;
        }
        let others = others
            .iter_mut()
            .map(|other| &mut **other as &mut dyn KvCache);
        let mut caches = ReadTogether {
            first: &mut **first,
            others: others.collect(),
        };
        let logits = model
            .decoder
            .forward_one(prompt.tokens, &mut caches, Logits::Last)?;
        let token = greedy.draw(logits.squeeze(0)?.to_vec1()?)?;
        for writing in own {
            writing.take(token)?;
        }
        if on_step().is_break() {
            return Ok(None);
        }
    }
    loop {
        let caches = prompts.iter_mut().flat_map(|prompt| &mut prompt.caches);
        let pairs = writings.iter_mut().zip(caches);
        let going = pairs.filter_map(|(writing, cache)| {
            writing.goes_on(cache.len()).then_some((writing, cache))
        });
        let (at_work, caches): (Vec<_>, Vec<_>) = going.unzip();
        if at_work.is_empty() {
            break;
        }
        let sequences = at_work.iter().zip(caches);
        let sequences = sequences.map(
            |(writing, cache): (&&mut Writing<'_>, &mut &mut dyn KvCache)| Sequence {
                tokens: &writing.next,
                cache: &mut **cache,
            },
        );
        let mut sequences: Vec<Sequence<'_>> = sequences.collect();
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

/// Refuses a text of `wanted` tokens that the context, or the cache's memory, has no room for; returns how many there is room for.
pub(crate) fn check_fits(
    model: &Model,
    cache: &dyn KvCache,
    options: &GenerateOptions,
    wanted: usize,
) -> Result<usize> {
    let context = model.decoder.config().context.min(options.context);
    let capacity = cache.capacity().unwrap_or(usize::MAX);
    match wanted {
        _ if wanted > context => Err(Error::ContextFull { wanted, context }),
        _ if wanted > capacity => Err(Error::MemoryFull { wanted, capacity }),
        0 => Err(Error::EmptyPrompt),
        _ => Ok(context.min(capacity)),
    }
}

/// A generation under way.
struct Writing<'a> {
    model: &'a Model,
    options: &'a GenerateOptions,
    context: usize,
    written: WrittenText<'a>,
    text: String,
    tokens: Vec<u32>,
    /// Tokens that the model reads next.
    next: Vec<u32>,
    finish: Option<Finish>,
    started: Instant,
    prefill: Duration,
}

impl<'a> Writing<'a> {
    fn new(
        model: &'a Model,
        cache: &dyn KvCache,
        prompt: &[u32],
        options: &'a GenerateOptions,
    ) -> Result<Self> {
        let context = check_fits(model, cache, options, cache.len() + prompt.len())?;
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let mut written = WrittenText::new(&model.tokenizer, options.stop.clone());
        for &token in &options.written {
            // The earlier call has given it out.
            let _ = written.push(token)?;
        }
        Ok(Self {
            model,
            options,
            context,
            written,
            text: String::new(),
            tokens: Vec::new(),
            next: prompt.to_vec(),
            finish: None,
            started: Instant::now(),
            prefill: Duration::ZERO,
        })
    }

    /// Returns true where a next token is to come and the cache holds `held`.
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
        let mut sure = String::new();
        if ended {
            self.finish = Some(Finish::End);
        } else {
            sure = self.written.push(token)?;
        }
        self.text.push_str(&sure);
        if self.written.stopped() {
            self.finish.get_or_insert(Finish::Stop);
        }
        Ok(sure)
    }

    /// Returns what was generated, and the end of its text, which was held back until now.
    fn end(self) -> Result<(Generated, String)> {
        let decode = self.started.elapsed() - self.prefill;
        let ended = matches!(self.finish, Some(Finish::End | Finish::Stop));
        let mut rest = String::new();
        if ended || !self.options.goes_on {
            rest = self.written.finish()?;
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

/// The text of tokens as they come, up to a stop text.
pub struct WrittenText<'t> {
    tokenizer: &'t Tokenizer,
    stop: StopFilter,
    stream: TextStream<'t>,
}

impl<'t> WrittenText<'t> {
    /// No text yet, which ends before the first of these stop texts; see [`GenerateOptions::stop`].
    pub fn new(tokenizer: &'t Tokenizer, stop: Vec<String>) -> Self {
        Self {
            tokenizer,
            stop: StopFilter::new(stop),
            stream: tokenizer.stream(),
        }
    }

    /// Takes a token; returns the text that became certain, often empty: no part of a stop text, and whole characters.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        let mut sure = self.stop.push(&self.stream.push(token)?);
        if let Some(text) = self.tokenizer.hidden_text(token) {
            sure += &self.stop.push_hidden(text);
        }
        Ok(sure)
    }

    /// Returns true where a stop text came up.
    pub fn stopped(&self) -> bool {
        self.stop.found
    }

    /// Returns the end of the text, which was held back until now.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        let mut rest = self.stop.push(&self.stream.finish()?);
        rest.push_str(&self.stop.rest());
        Ok(rest)
    }
}

/// Holds text back while it may be the beginning of a stop text.
struct StopFilter {
    stops: Vec<String>,
    held: String,
    /// Places in it of text that counts for stops and is not given out.
    hidden: Vec<Range<usize>>,
    found: bool,
}

impl StopFilter {
    fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
            hidden: Vec::new(),
            found: false,
        }
    }

    /// Takes the text of a special token, which is not given out; returns what cannot be part of a stop text.
    fn push_hidden(&mut self, text: &str) -> String {
        let start = self.held.len();
        self.hidden.push(start..start + text.len());
        self.push(text)
    }

    /// Takes more text; returns what cannot be part of a stop text.
    fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(text);
        let stops = || self.stops.iter().filter(|stop| !stop.is_empty());
        let found = stops().filter_map(|stop| self.held.find(stop.as_str()));
        if let Some(at) = found.min() {
            self.found = true;
            self.held.truncate(at);
            return self.rest();
        }
        let may_begin = |at: usize| stops().any(|stop| stop.starts_with(&self.held[at..]));
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let sure = starts.find(|&at| may_begin(at)).unwrap_or(self.held.len());
        self.take(sure)
    }

    /// All that is held back.
    fn rest(&mut self) -> String {
        self.take(self.held.len())
    }

    /// Takes the first bytes of what is held; returns them without what is hidden.
    fn take(&mut self, count: usize) -> String {
        let mut shown = String::new();
        let mut at = 0;
        for hidden in &self.hidden {
            shown.push_str(&self.held[at..hidden.start.clamp(at, count)]);
            at = hidden.end.clamp(at, count);
        }
        shown.push_str(&self.held[at..count]);
        self.held.drain(..count);
        let left = |at: usize| at.saturating_sub(count);
        let hidden = self.hidden.iter().map(|h| left(h.start)..left(h.end));
        let hidden = hidden.filter(|hidden| !hidden.is_empty());
        self.hidden = hidden.collect();
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool, String) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut filter = StopFilter::new(stops);
        // A piece that begins with a bar is hidden.
        let push = |piece: &&str| match piece.strip_prefix('|') {
            Some(hidden) => filter.push_hidden(hidden),
            None => filter.push(piece),
        };
        let out = pieces.iter().map(push).collect();
        let rest = filter.rest();
        (out, filter.found, rest)
    }

    #[test]
    fn hidden_text_stops_and_is_not_given_out() {
        for stops in [&["</s>"][..], &["b</s>"], &["</s>c"], &["x", "b</s>c"]] {
            let (out, found, rest) = filtered(stops, &["ab", "|</s>", "cd"]);
            let before = if stops.iter().any(|stop| stop.starts_with('b')) {
                "a"
            } else {
                "ab"
            };
            assert_eq!((out.concat().as_str(), found), (before, true), "{stops:?}");
            assert!(rest.is_empty());
        }
        for stops in [&["<s>"][..], &["</s>d"], &[], &["cd</s>"]] {
            let (out, found, rest) = filtered(stops, &["ab", "|</s>", "cd", "|</s", "e"]);
            assert_eq!(out.concat() + &rest, "abcde", "{stops:?}");
            assert!(!found, "{stops:?}");
        }
        // Of hidden text that a stop begins in, what is before is hidden too.
        let (out, found, _) = filtered(&["s>c"], &["ab", "|</s>", "|x", "c", "|</s>", "c"]);
        assert_eq!((out.concat().as_str(), found), ("abc", true));
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
