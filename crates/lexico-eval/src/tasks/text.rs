//! Chunks of a text, read on token by token: `perplexity`, and `divergence` from the full cache.

use std::cell::RefCell;
use std::ops::ControlFlow;

use lexico::threads::{Rayon, for_each};
use lexico_llm::cache::{CacheSpec, KvCache, ReadTogether};
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::sample::most_likely;
use lexico_llm::{Corpus, Model};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::task::{Detail, Measure, Outcome, Task, named, reading_groups, readings};

/// Settings of [`TextTask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextOptions {
    /// Tokens of a chunk.
    pub context: usize,
    /// Tokens of a chunk that are read at once, as a prompt; the rest is read some at a time and predicted.
    pub prompt: usize,
    /// Tokens that are read at a time behind the prompt. More than one are read faster; each sees the others of its step as they are, in any
    /// cache.
    pub step: usize,
    /// Max number of chunks.
    pub chunks: usize,
    /// Seed of the chunks that are taken of a text that has more.
    pub seed: u64,
    /// True where only the prompts are of the text, and the rest is what the model writes with the full cache, greedily
    /// and beyond any end of text: errors that build up while it writes.
    pub own_text: bool,
}

/// Measure of the predictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextMeasure {
    /// Likelihood of the text's own tokens.
    Perplexity,
    /// Divergence from the predictions with the full cache, which reads the same beside.
    Divergence,
}

/// Chunks of a text, each read as a prompt and then token by token, as in decoding, or some tokens at a time: the next token is predicted
/// from what the cache holds of all before.
pub struct TextTask {
    measure: TextMeasure,
    texts: Vec<String>,
    options: TextOptions,
    /// With own text, the prompts.
    chunks: Vec<Vec<u32>>,
    /// Own texts, as they are written; the same for every cache.
    written: RefCell<Vec<Option<Vec<u32>>>>,
}

impl TextTask {
    /// Takes some chunks of a corpus.
    ///
    /// # Errors
    /// [`Error::Options`] for chunks without predictions or beyond the model's context, a step of no token, and for the perplexity of own
    /// text; those of the corpus.
    pub fn new(
        model: &Model,
        corpus: &Corpus,
        measure: TextMeasure,
        options: TextOptions,
    ) -> Result<Self> {
        let (context, prompt) = (options.context, options.prompt);
        let max = model.decoder.config().context;
        if prompt == 0 || prompt >= context || context > max {
            return Err(Error::Options(format!(
                "a prompt of {prompt} tokens in chunks of {context} is impossible: it takes at least 1, fewer than \
                 the chunk's, and chunks no longer than the model's context of {max}"
            )));
        }
        if options.step == 0 {
            let reason = "a step of 0 tokens reads nothing; it takes at least 1";
            return Err(Error::Options(reason.to_owned()));
        }
        if options.own_text && measure == TextMeasure::Perplexity {
            let reason = "the model's own text has no perplexity to tell; ask for the divergence";
            return Err(Error::Options(reason.to_owned()));
        }
        let length = if options.own_text { prompt } else { context };
        let tokens = options.chunks.saturating_mul(length);
        let chunks = corpus.chunks(&model.tokenizer, length, tokens, options.seed)?;
        let chunks = chunks.collect::<lexico_llm::Result<Vec<_>>>()?;
        let whole = chunks.into_iter().filter(|chunk| chunk.len() == length);
        let chunks: Vec<Vec<u32>> = whole.take(options.chunks).collect();
        Ok(Self {
            measure,
            texts: corpus.names().to_vec(),
            options,
            written: RefCell::new(vec![None; chunks.len()]),
            chunks,
        })
    }

    /// The tokens of some chunks; `None` where it was broken off. Own text is written where it is not there yet.
    fn tokens(
        &self,
        model: &Model,
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Vec<u32>>>> {
        let chunks = items.iter().map(|&item| self.chunks[item].clone());
        let mut chunks: Vec<Vec<u32>> = chunks.collect();
        if !self.options.own_text {
            return Ok(Some(chunks));
        }
        let mut written = self.written.borrow_mut();
        if items.iter().any(|&item| written[item].is_none()) {
            let prompts = chunks.clone();
            let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
            let mut write = |chunk: usize, _: usize, logits: &[Vec<f32>]| {
                let token = most_likely(&logits[0]);
                chunks[chunk].push(token);
                token
            };
            let full: CacheSpec = "full".parse()?;
            let read = self.read(model, &[&full], &prompts, None, on_step, &mut write)?;
            if read.is_none() {
                return Ok(None);
            }
            for (&item, chunk) in items.iter().zip(chunks) {
                written[item] = Some(chunk);
            }
        }
        Ok(items.iter().map(|&item| written[item].clone()).collect())
    }

    /// Reads on from `prompts` with each of `caches`; at every token to predict, `visit` is given the prompt's place among
    /// them, the token's place in its text, and the logits with each cache, and returns the token. Where the texts are known, several tokens
    /// are read at a time. Returns the caches, prompt by prompt.
    fn read(
        &self,
        model: &Model,
        caches: &[&CacheSpec],
        prompts: &[&[u32]],
        texts: Option<&[Vec<u32>]>,
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
        visit: &mut dyn FnMut(usize, usize, &[Vec<f32>]) -> u32,
    ) -> Result<Option<Vec<Box<dyn KvCache>>>> {
        let made = prompts.iter().flat_map(|_| caches);
        let made = made.map(|spec| model.cache(spec));
        let mut held: Vec<Box<dyn KvCache>> = made.collect::<lexico_llm::Result<_>>()?;
        let (context, prompt) = (self.options.context, self.options.prompt);
        let each = caches.len();
        let mut next = Vec::with_capacity(prompts.len());
        for (number, (tokens, held)) in prompts.iter().zip(held.chunks_mut(each)).enumerate() {
            let mut logits = vec![Vec::new(); each];
            for group in reading_groups(caches, held) {
                let (places, held): (Vec<usize>, Vec<_>) = group.into_iter().unzip();
                let mut held = held.into_iter();
                let Some(first) = held.next() else { continue };
                let mut read = ReadTogether {
                    first,
                    others: held.collect(),
                };
                let last = model.decoder.forward_one(tokens, &mut read, Logits::Last)?;
                let last = last.squeeze(0).and_then(|last| last.to_vec1::<f32>());
                let last = last.map_err(lexico_llm::Error::from)?;
                check_finite(&last)?;
                for place in places {
                    logits[place].clone_from(&last);
                }
                if on_step().is_break() {
                    return Ok(None);
                }
            }
            next.push(visit(number, prompt, &logits));
        }
        let step = texts.map_or(1, |_| self.options.step);
        for first in (prompt + 1..context).step_by(step) {
            let count = step.min(context - first);
            let own = |number: usize| match texts {
                Some(texts) => &texts[number][first - 1..][..count],
                None => std::slice::from_ref(&next[number]),
            };
            let tokens =
                (0..prompts.len()).flat_map(|number| caches.iter().map(move |_| own(number)));
            let mut sequences: Vec<Sequence<'_>> = tokens
                .zip(&mut held)
                .map(|(tokens, cache)| Sequence {
                    tokens,
                    cache: cache.as_mut(),
                })
                .collect();
            let logits = model.decoder.forward(&mut sequences, Logits::All)?;
            let mut logits: Vec<Vec<f32>> = logits.to_vec2().map_err(lexico_llm::Error::from)?;
            next.clear();
            for (number, logits) in logits.chunks_mut(each * count).enumerate() {
                for logits in logits.iter() {
                    check_finite(logits)?;
                }
                for place in 0..count {
                    let of_place = logits.iter_mut().skip(place).step_by(count);
                    let of_place: Vec<Vec<f32>> = of_place.map(std::mem::take).collect();
                    let token = visit(number, first + place, &of_place);
                    if place + 1 == count {
                        next.push(token);
                    }
                }
            }
            if on_step().is_break() {
                return Ok(None);
            }
        }
        Ok(Some(held))
    }
}

impl Task for TextTask {
    fn name(&self) -> &'static str {
        match self.measure {
            TextMeasure::Perplexity => "perplexity",
            TextMeasure::Divergence => "divergence",
        }
    }

    fn measure(&self) -> Measure {
        match self.measure {
            TextMeasure::Perplexity => Measure::Perplexity,
            TextMeasure::Divergence => Measure::Divergence,
        }
    }

    fn settings(&self) -> Map<String, Value> {
        let mut checksum = crc32fast::Hasher::new();
        for token in self.chunks.iter().flatten() {
            checksum.update(&token.to_le_bytes());
        }
        let mut settings = named([
            ("texts", json!(self.texts)),
            ("context", json!(self.options.context)),
            ("prompt", json!(self.options.prompt)),
            (
                "tokens_crc32",
                json!(format!("{:08x}", checksum.finalize())),
            ),
        ]);
        if self.options.own_text {
            settings.insert("own_text".to_owned(), true.into());
        }
        if self.options.step > 1 {
            settings.insert("step".to_owned(), self.options.step.into());
        }
        settings
    }

    fn count(&self) -> usize {
        self.chunks.len()
    }

    fn steps(&self, caches: &[&CacheSpec], items: &[usize]) -> usize {
        let behind = self.options.context - self.options.prompt - 1;
        // The model's own texts are written first, a token at a time.
        let writing = if self.options.own_text {
            items.len() + behind
        } else {
            0
        };
        writing + items.len() * readings(caches) + behind.div_ceil(self.options.step)
    }

    fn run(
        &self,
        model: &Model,
        caches: &[&CacheSpec],
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Vec<Outcome>>>> {
        let Some(chunks) = self.tokens(model, items, on_step)? else {
            return Ok(None);
        };
        let prompt = self.options.prompt;
        let prompts: Vec<&[u32]> = chunks.iter().map(|chunk| &chunk[..prompt]).collect();
        let predicted = self.options.context - prompt;
        let full: CacheSpec = "full".parse()?;
        let divergence = self.measure == TextMeasure::Divergence;
        // What the others are held against.
        let beside = divergence && caches.first().is_none_or(|first| !first.same_as(&full));
        let full = beside.then_some(&full);
        let all: Vec<&CacheSpec> = full.into_iter().chain(caches.iter().copied()).collect();
        let each = all.len();
        let mut values = vec![Vec::with_capacity(predicted); each * items.len()];
        let mut agreements = vec![0usize; each * items.len()];
        let mut visit = |chunk: usize, at: usize, logits: &[Vec<f32>]| {
            let token = chunks[chunk][at];
            let first = Prediction::new(&logits[0]);
            let mut found = vec![(0.0, true); each];
            let measure = self.measure;
            for_each(&Rayon, found.iter_mut().zip(logits), |(found, logits)| {
                let own = Prediction::new(logits);
                *found = match measure {
                    TextMeasure::Perplexity => (own.loss(token), true),
                    TextMeasure::Divergence => {
                        let same = most_likely(first.logits) == most_likely(own.logits);
                        (f64::from(first.divergence(&own) as f32), same)
                    }
                };
            });
            for (place, (value, same)) in (each * chunk..).zip(found) {
                values[place].push(value);
                agreements[place] += usize::from(same);
            }
            token
        };
        let Some(held) = self.read(model, &all, &prompts, Some(&chunks), on_step, &mut visit)?
        else {
            return Ok(None);
        };
        let mut outcomes = vec![Vec::with_capacity(items.len()); each];
        for (place, ((cache, values), agreements)) in
            held.iter().zip(values).zip(agreements).enumerate()
        {
            let fp16 = model.decoder.config().fp16_cache_bytes(cache.len());
            outcomes[place % each].push(Outcome {
                id: items[place / each].to_string(),
                group: None,
                score: values.iter().sum::<f64>() / predicted as f64,
                share: cache.footprint().total() as f64 / fp16 as f64,
                prompt_positions: self.options.prompt,
                positions: cache.len(),
                detail: match self.measure {
                    TextMeasure::Perplexity => Detail::Likelihood {
                        tokens: predicted,
                        losses: values.into_iter().map(|value| value as f32).collect(),
                    },
                    TextMeasure::Divergence => Detail::Distributions {
                        divergences: values.into_iter().map(|value| value as f32).collect(),
                        agreement: agreements as f64 / predicted as f64,
                    },
                },
            });
        }
        Ok(Some(outcomes.split_off(usize::from(beside))))
    }
}

fn check_finite(logits: &[f32]) -> Result<()> {
    if logits.iter().all(|l| l.is_finite()) {
        Ok(())
    } else {
        Err(lexico_llm::Error::NotFinite.into())
    }
}

/// Logits of the next token, and the logarithm of the sum of their exponentials.
struct Prediction<'a> {
    logits: &'a [f32],
    normaliser: f64,
}

impl<'a> Prediction<'a> {
    fn new(logits: &'a [f32]) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let largest = f64::from(largest);
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum();
        Self {
            logits,
            normaliser: largest + sum.ln(),
        }
    }

    /// Logarithms of the probabilities.
    fn logarithms(&self) -> impl Iterator<Item = f64> + '_ {
        let logits = self.logits.iter().copied();
        logits.map(|logit| f64::from(logit) - self.normaliser)
    }

    /// The negative logarithm of a token's probability.
    fn loss(&self, token: u32) -> f64 {
        let own = self.logits.get(token as usize).copied();
        self.normaliser - own.map_or(f64::NEG_INFINITY, f64::from)
    }

    /// `Σ p (ln p − ln q)`, in nats, of these probabilities `p`.
    fn divergence(&self, other: &Self) -> f64 {
        let pairs = self.logarithms().zip(other.logarithms());
        pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_whatever_the_logits() {
        for logits in [
            vec![0.0f32, 1.0, 2.0],
            vec![1e4, 1e4 - 1.0],
            vec![-3e38, 3e38],
        ] {
            let sum: f64 = Prediction::new(&logits).logarithms().map(f64::exp).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{logits:?}: {sum}");
        }
    }

    #[test]
    fn divergence_is_that_of_coins() {
        let coin = |p: f64| [(p / (1.0 - p)).ln() as f32, 0.0];
        let divergence = |p: f64, q: f64| {
            let (p, q) = (coin(p), coin(q));
            Prediction::new(&p).divergence(&Prediction::new(&q))
        };
        // 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1)
        assert!((divergence(0.5, 0.9) - 0.510_825_623_765_990_7).abs() < 1e-7);
        assert_eq!(divergence(0.3, 0.3), 0.0);
        assert!((Prediction::new(&coin(0.25)).loss(0) - 4.0f64.ln()).abs() < 1e-7);
        assert_eq!(most_likely(&[0.1, 0.7, 0.7]), 1);
    }
}
