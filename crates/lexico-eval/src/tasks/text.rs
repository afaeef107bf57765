//! Chunks of a text, read on token by token: `perplexity`, and `divergence` from the full cache.

use std::cell::RefCell;
use std::ops::ControlFlow;

use lexico_llm::cache::{CacheSpec, KvCache};
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::sample::most_likely;
use lexico_llm::{Corpus, Model};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::task::{Detail, Measure, Outcome, Task, named};

/// Settings of [`TextTask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextOptions {
    /// Tokens of a chunk.
    pub context: usize,
    /// Tokens of a chunk that are read at once, as a prompt; the rest is read one by one and predicted.
    pub prompt: usize,
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

/// Chunks of a text, each read as a prompt and then token by token, as in decoding: the next token is predicted from
/// what the cache holds of all before.
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
    /// [`Error::Options`] for chunks without predictions or beyond the model's context, and for the perplexity of own text;
    /// those of the corpus.
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
            let read = self.read(model, &[&full], &prompts, on_step, &mut write)?;
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
    /// them, the token's place in its text, and the logits with each cache, and returns the token. Returns the caches,
    /// prompt by prompt.
    fn read(
        &self,
        model: &Model,
        caches: &[&CacheSpec],
        prompts: &[&[u32]],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
        visit: &mut dyn FnMut(usize, usize, &[Vec<f32>]) -> u32,
    ) -> Result<Option<Vec<Box<dyn KvCache>>>> {
        let made = prompts.iter().flat_map(|_| caches);
        let made = made.map(|spec| model.cache(spec));
        let mut held: Vec<Box<dyn KvCache>> = made.collect::<lexico_llm::Result<_>>()?;
        let (context, prompt) = (self.options.context, self.options.prompt);
        let each = caches.len();
        let mut next = Vec::with_capacity(prompts.len());
        for (number, (tokens, caches)) in prompts.iter().zip(held.chunks_mut(each)).enumerate() {
            let mut logits = Vec::with_capacity(each);
            for cache in caches {
                let mut sequences = [Sequence {
                    tokens,
                    cache: cache.as_mut(),
                }];
                let last = model.decoder.forward(&mut sequences, Logits::Last)?;
                let last = last.squeeze(0).and_then(|last| last.to_vec1::<f32>());
                let last = last.map_err(lexico_llm::Error::from)?;
                check_finite(&last)?;
                logits.push(last);
                if on_step().is_break() {
                    return Ok(None);
                }
            }
            next.push(visit(number, prompt, &logits));
        }
        for at in prompt + 1..context {
            let tokens = next
                .iter()
                .flat_map(|token| caches.iter().map(move |_| std::slice::from_ref(token)));
            let mut sequences: Vec<Sequence<'_>> = tokens
                .zip(&mut held)
                .map(|(tokens, cache)| Sequence {
                    tokens,
                    cache: cache.as_mut(),
                })
                .collect();
            let logits = model.decoder.forward(&mut sequences, Logits::Last)?;
            let logits: Vec<Vec<f32>> = logits.to_vec2().map_err(lexico_llm::Error::from)?;
            next.clear();
            for (number, logits) in logits.chunks(each).enumerate() {
                for logits in logits {
                    check_finite(logits)?;
                }
                next.push(visit(number, at, logits));
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
        settings
    }

    fn count(&self) -> usize {
        self.chunks.len()
    }

    fn run(
        &self,
        model: &Model,
        cache: &CacheSpec,
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Outcome>>> {
        let Some(chunks) = self.tokens(model, items, on_step)? else {
            return Ok(None);
        };
        let prompt = self.options.prompt;
        let prompts: Vec<&[u32]> = chunks.iter().map(|chunk| &chunk[..prompt]).collect();
        let predicted = self.options.context - prompt;
        let full: CacheSpec = "full".parse()?;
        let caches: &[&CacheSpec] = match self.measure {
            // The full cache need not be held against itself.
            TextMeasure::Divergence if cache.to_string() != "full" => &[&full, cache],
            _ => &[cache],
        };
        let mut values = vec![Vec::with_capacity(predicted); items.len()];
        let mut agreements = vec![0usize; items.len()];
        let mut visit = |chunk: usize, at: usize, logits: &[Vec<f32>]| {
            let token = chunks[chunk][at];
            let [first, last] = [&logits[0], &logits[logits.len() - 1]];
            values[chunk].push(match self.measure {
                TextMeasure::Perplexity => {
                    let likelihood = log_softmax(last).get(token as usize).copied();
                    -likelihood.unwrap_or(f64::NEG_INFINITY)
                }
                TextMeasure::Divergence => {
                    agreements[chunk] += usize::from(most_likely(first) == most_likely(last));
                    f64::from(divergence(&log_softmax(first), &log_softmax(last)) as f32)
                }
            });
            token
        };
        let Some(held) = self.read(model, caches, &prompts, on_step, &mut visit)? else {
            return Ok(None);
        };
        let own = held.chunks(caches.len()).filter_map(|caches| caches.last());
        let outcomes = own.zip(items).zip(values.into_iter().zip(agreements));
        let outcomes = outcomes.map(|((cache, item), (values, agreements))| {
            let fp16 = model.decoder.config().fp16_cache_bytes(cache.len());
            Outcome {
                id: item.to_string(),
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
            }
        });
        Ok(Some(outcomes.collect()))
    }
}

fn check_finite(logits: &[f32]) -> Result<()> {
    if logits.iter().all(|l| l.is_finite()) {
        Ok(())
    } else {
        Err(lexico_llm::Error::NotFinite.into())
    }
}

/// Logarithms of the probabilities.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let largest = f64::from(largest);
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum();
    let normaliser = largest + sum.ln();
    logits.iter().map(|&l| f64::from(l) - normaliser).collect()
}

/// `Σ p (ln p − ln q)` of logarithms of probabilities, in nats.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter()
        .zip(q)
        .map(|(p, q)| p.exp() * (p - q))
        .sum::<f64>()
        .max(0.0)
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
            let sum: f64 = log_softmax(&logits).iter().map(|l| l.exp()).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{logits:?}: {sum}");
        }
    }

    #[test]
    fn divergence_is_that_of_coins() {
        let coin = |p: f64| vec![p.ln(), (1.0 - p).ln()];
        // 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1)
        assert!((divergence(&coin(0.5), &coin(0.9)) - 0.510_825_623_765_990_7).abs() < 1e-12);
        assert_eq!(divergence(&coin(0.3), &coin(0.3)), 0.0);
        assert_eq!(most_likely(&[0.1, 0.7, 0.7]), 1);
    }
}
