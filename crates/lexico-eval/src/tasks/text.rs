//! Windows of a text, read on token by token: `perplexity`, and `divergence` from the full cache.

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
    /// Tokens of a window.
    pub context: usize,
    /// Those of them that are read at once, as a prompt; the rest is read one by one and predicted.
    pub prompt: usize,
    /// Most windows.
    pub windows: usize,
    /// Which windows are taken of a text that has more.
    pub seed: u64,
}

/// What is made of the predictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextMeasure {
    /// How likely the text's own tokens are.
    Perplexity,
    /// How far they are from those with the full cache, which reads the same beside.
    Divergence,
}

/// Windows of a text, each read as a prompt and then token by token, as in decoding: the next token is predicted from
/// what the cache holds of all before.
pub struct TextTask {
    measure: TextMeasure,
    texts: Vec<String>,
    options: TextOptions,
    windows: Vec<Vec<u32>>,
}

impl TextTask {
    /// Some windows of a corpus.
    ///
    /// # Errors
    /// [`Error::Options`] for windows without predictions or beyond the model's context; those of the corpus.
    pub fn new(
        model: &Model,
        corpus: &Corpus,
        measure: TextMeasure,
        options: TextOptions,
    ) -> Result<Self> {
        let TextOptions {
            context, prompt, ..
        } = options;
        let most = model.decoder.config().context;
        if prompt == 0 || prompt >= context || context > most {
            return Err(Error::Options(format!(
                "a prompt of {prompt} tokens in windows of {context} is impossible: it takes at least 1, fewer than \
                 the window's, and windows no longer than the model's context of {most}"
            )));
        }
        let tokens = options.windows.saturating_mul(context);
        let windows = corpus.windows(&model.tokenizer, context, tokens, options.seed)?;
        let windows = windows.collect::<lexico_llm::Result<Vec<_>>>()?;
        let whole = windows.into_iter().filter(|window| window.len() == context);
        Ok(Self {
            measure,
            texts: corpus.names().to_vec(),
            options,
            windows: whole.take(options.windows).collect(),
        })
    }

    /// Reads `windows` with each of `caches`; at every token to predict, `visit` is given the window's place among
    /// them, the token, and the logits with each cache. Returns the caches, window by window.
    fn read(
        &self,
        model: &Model,
        caches: &[&CacheSpec],
        windows: &[&Vec<u32>],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
        visit: &mut dyn FnMut(usize, u32, &[Vec<f32>]),
    ) -> Result<Option<Vec<Box<dyn KvCache>>>> {
        let made = windows.iter().flat_map(|_| caches);
        let made = made.map(|spec| model.cache(spec));
        let mut held: Vec<Box<dyn KvCache>> = made.collect::<lexico_llm::Result<_>>()?;
        let TextOptions {
            context, prompt, ..
        } = self.options;
        let each = caches.len();
        for (number, (window, caches)) in windows.iter().zip(held.chunks_mut(each)).enumerate() {
            let mut logits = Vec::with_capacity(each);
            for cache in caches {
                let mut sequences = [Sequence {
                    tokens: &window[..prompt],
                    cache: cache.as_mut(),
                }];
                let last = model.decoder.forward(&mut sequences, Logits::Last)?;
                logits.push(finite(last.squeeze(0).and_then(|l| l.to_vec1()))?);
                if on_step().is_break() {
                    return Ok(None);
                }
            }
            visit(number, window[prompt], &logits);
        }
        for at in prompt..context - 1 {
            let tokens = windows
                .iter()
                .flat_map(|window| caches.iter().map(move |_| &window[at..=at]));
            let mut sequences: Vec<Sequence<'_>> = tokens
                .zip(&mut held)
                .map(|(tokens, cache)| Sequence {
                    tokens,
                    cache: cache.as_mut(),
                })
                .collect();
            let logits = model.decoder.forward(&mut sequences, Logits::Last)?;
            let logits: Vec<Vec<f32>> = logits.to_vec2().map_err(lexico_llm::Error::from)?;
            for (number, (window, logits)) in windows.iter().zip(logits.chunks(each)).enumerate() {
                for logits in logits {
                    check_finite(logits)?;
                }
                visit(number, window[at + 1], logits);
            }
            if on_step().is_break() {
                return Ok(None);
            }
        }
        Ok(Some(held))
    }

    fn outcome(
        &self,
        model: &Model,
        window: usize,
        cache: &dyn KvCache,
        score: f64,
        detail: Detail,
    ) -> Outcome {
        let fp16 = model.decoder.config().fp16_cache_bytes(cache.len());
        Outcome {
            id: window.to_string(),
            group: None,
            score,
            share: cache.footprint().total() as f64 / fp16 as f64,
            prompt_positions: self.options.prompt,
            positions: cache.len(),
            detail,
        }
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
        for token in self.windows.iter().flatten() {
            checksum.update(&token.to_le_bytes());
        }
        named([
            ("texts", json!(self.texts)),
            ("context", json!(self.options.context)),
            ("prompt", json!(self.options.prompt)),
            (
                "tokens_crc32",
                json!(format!("{:08x}", checksum.finalize())),
            ),
        ])
    }

    fn len(&self) -> usize {
        self.windows.len()
    }

    fn prompt(&self, _item: usize) -> Option<&str> {
        None
    }

    fn run(
        &self,
        model: &Model,
        cache: &CacheSpec,
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Outcome>>> {
        let windows: Vec<&Vec<u32>> = items.iter().map(|&item| &self.windows[item]).collect();
        let predicted = self.options.context - self.options.prompt;
        match self.measure {
            TextMeasure::Perplexity => {
                let mut sums = vec![0.0; items.len()];
                let mut visit = |window: usize, token: u32, logits: &[Vec<f32>]| {
                    let likelihood = log_softmax(&logits[0]);
                    sums[window] -= likelihood
                        .get(token as usize)
                        .copied()
                        .unwrap_or(f64::NEG_INFINITY);
                };
                let Some(held) = self.read(model, &[cache], &windows, on_step, &mut visit)? else {
                    return Ok(None);
                };
                let outcomes = items
                    .iter()
                    .zip(held)
                    .zip(sums)
                    .map(|((&item, cache), sum)| {
                        let detail = Detail::Likelihood { tokens: predicted };
                        self.outcome(model, item, cache.as_ref(), sum / predicted as f64, detail)
                    });
                Ok(Some(outcomes.collect()))
            }
            TextMeasure::Divergence => {
                let full: CacheSpec = "full".parse()?;
                let mut divergences = vec![Vec::with_capacity(predicted); items.len()];
                let mut agreements = vec![0usize; items.len()];
                let mut visit = |window: usize, _: u32, logits: &[Vec<f32>]| {
                    let [full, other] = [&logits[0], &logits[logits.len() - 1]];
                    agreements[window] += usize::from(most_likely(full) == most_likely(other));
                    let divergence = divergence(&log_softmax(full), &log_softmax(other));
                    divergences[window].push(divergence as f32);
                };
                // The full cache need not be held against itself.
                let caches: &[&CacheSpec] = if cache.to_string() == "full" {
                    &[cache]
                } else {
                    &[&full, cache]
                };
                let Some(held) = self.read(model, caches, &windows, on_step, &mut visit)? else {
                    return Ok(None);
                };
                let own = held.chunks(caches.len()).filter_map(|caches| caches.last());
                let outcomes = own.zip(items).zip(divergences.into_iter().zip(agreements));
                let outcomes = outcomes.map(|((cache, &item), (divergences, agreements))| {
                    let sum: f64 = divergences.iter().map(|&d| f64::from(d)).sum();
                    let detail = Detail::Distributions {
                        divergences,
                        agreement: agreements as f64 / predicted as f64,
                    };
                    self.outcome(model, item, cache.as_ref(), sum / predicted as f64, detail)
                });
                Ok(Some(outcomes.collect()))
            }
        }
    }
}

fn finite(logits: candle_core::Result<Vec<f32>>) -> Result<Vec<f32>> {
    let logits = logits.map_err(lexico_llm::Error::from)?;
    check_finite(&logits)?;
    Ok(logits)
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
