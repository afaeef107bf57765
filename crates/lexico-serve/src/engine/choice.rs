//! From logits to the next token, as a client wants it.

use std::collections::HashMap;

use lexico_llm::sample::Sampler;
use llguidance::Matcher;

use super::request::{ChoiceSettings, Logprob};

/// Chooses the tokens of one text.
pub(super) struct Choice {
    sampler: Sampler,
    settings: ChoiceSettings,
    /// Tokens that end the text: the model's and the client's.
    ends: Vec<u32>,
    /// How often each token was written, where that counts.
    counts: HashMap<u32, u32>,
    written: usize,
}

/// A token that was chosen.
pub(super) struct Chosen {
    pub(super) token: u32,
    pub(super) logprob: Option<Logprob>,
    /// True where the structure that was asked for is complete.
    pub(super) complete: bool,
}

impl Choice {
    pub(super) fn new(
        settings: ChoiceSettings,
        model_ends: &[u32],
        prompt: &[u32],
    ) -> lexico_llm::Result<Self> {
        let mut sampler = Sampler::new(settings.sampling.clone())?;
        sampler.see(prompt);
        let mut ends = settings.stop_tokens.clone();
        ends.extend_from_slice(model_ends);
        Ok(Self {
            sampler,
            settings,
            ends,
            counts: HashMap::new(),
            written: 0,
        })
    }

    /// Chooses the next token by the logits of the whole vocabulary.
    pub(super) fn next(&mut self, mut logits: Vec<f32>) -> Result<Chosen, String> {
        let wanted = self.settings.logprobs;
        let raw = wanted.map(|top| (top, logits.clone()));
        let forbid = |logits: &mut [f32], token: u32| {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        };
        for &(token, bias) in self.settings.bias.iter() {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        let (presence, frequency) = (
            self.settings.presence_penalty,
            self.settings.frequency_penalty,
        );
        for (&token, &count) in &self.counts {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= presence + frequency * count as f32;
            }
        }
        if self.written < self.settings.min_tokens {
            self.ends.iter().for_each(|&t| forbid(&mut logits, t));
        }
        if let Some(matcher) = &mut self.settings.structure {
            let mask = matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
            for (token, logit) in (0..).zip(&mut logits) {
                if (token as usize) >= mask.len() || !mask.is_allowed(token) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let token = self.sampler.draw(logits).map_err(|e| e.to_string())?;
        self.written += 1;
        if presence != 0.0 || frequency != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
        let complete = match &mut self.settings.structure {
            Some(matcher) if !self.ends.contains(&token) => follow(matcher, token)?,
            _ => false,
        };
        Ok(Chosen {
            token,
            logprob: raw.map(|(top, logits)| logprob(&logits, token, top)),
            complete,
        })
    }

    /// Whether a token ends the text.
    pub(super) fn ends(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Whether a token ends the text that the client named.
    pub(super) fn is_stop_token(&self, token: u32) -> bool {
        self.settings.stop_tokens.contains(&token)
    }
}

/// Takes a token of a structure; returns whether it is complete.
fn follow(matcher: &mut Matcher, token: u32) -> Result<bool, String> {
    matcher.consume_token(token).map_err(|e| e.to_string())?;
    Ok(matcher.is_stopped())
}

/// The log-probability of a token by the logits of the vocabulary, and the likeliest ones.
pub(super) fn logprob(logits: &[f32], token: u32, top: usize) -> Logprob {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
    let normal = f64::from(largest) + sum.ln();
    let of = |token: u32| {
        let logit = logits.get(token as usize);
        // Numbers that JSON has: as vLLM, the least stands for none.
        logit.map_or(LEAST, |&l| ((f64::from(l) - normal) as f32).max(LEAST))
    };
    let mut likeliest: Vec<u32> = (0..logits.len() as u32).collect();
    let likelier = |a: &u32, b: &u32| {
        let [a_logit, b_logit] = [a, b].map(|&t| logits[t as usize]);
        b_logit.total_cmp(&a_logit).then(a.cmp(b))
    };
    let top = top.min(likeliest.len());
    if (1..likeliest.len()).contains(&top) {
        likeliest.select_nth_unstable_by(top - 1, likelier);
    }
    likeliest.truncate(top);
    likeliest.sort_unstable_by(likelier);
    Logprob {
        token,
        logprob: of(token),
        top: likeliest.into_iter().map(|t| (t, of(t))).collect(),
    }
}

/// The log-probability of a token that cannot be.
const LEAST: f32 = -9999.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use std::sync::Arc;

    use lexico_llm::sample::Sampling;

    use super::*;

    fn greedy() -> ChoiceSettings {
        ChoiceSettings {
            sampling: Sampling::default(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            bias: Arc::default(),
            stop_tokens: Vec::new(),
            min_tokens: 0,
            structure: None,
            logprobs: None,
        }
    }

    fn written(settings: ChoiceSettings, logits: &[f32], count: usize) -> Vec<u32> {
        let mut choice = Choice::new(settings, &[0], &[]).unwrap();
        let next = |_| choice.next(logits.to_vec()).unwrap().token;
        (0..count).map(next).collect()
    }

    #[test]
    fn penalties_grow_with_what_was_written() {
        let logits = [0.0, 3.0, 2.0, 1.2];
        assert_eq!(written(greedy(), &logits, 3), [1, 1, 1]);
        let presence = ChoiceSettings {
            presence_penalty: 1.5,
            ..greedy()
        };
        assert_eq!(written(presence, &logits, 4), [1, 2, 1, 1]);
        let frequency = ChoiceSettings {
            frequency_penalty: 1.1,
            ..greedy()
        };
        assert_eq!(written(frequency, &logits, 5), [1, 2, 1, 3, 2]);
    }

    #[test]
    fn biases_and_minima_change_what_is_taken() {
        let logits = [5.0, 3.0, 2.0];
        let bias = ChoiceSettings {
            bias: Arc::new([(2, 100.0), (99, 1.0)]),
            ..greedy()
        };
        assert_eq!(written(bias, &logits, 1), [2]);
        let patient = ChoiceSettings {
            min_tokens: 2,
            ..greedy()
        };
        assert_eq!(written(patient, &logits, 3), [1, 1, 0]);
        let stop = ChoiceSettings {
            min_tokens: 1,
            stop_tokens: vec![1],
            ..greedy()
        };
        assert_eq!(written(stop, &logits, 2), [2, 0]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_model_and_add_up() {
        let logits = [1f32, 3.0, 2.0, f32::NEG_INFINITY].map(|x| x);
        let all = logprob(&logits, 2, 4);
        let sum: f32 = all.top.iter().map(|(_, l)| l.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(
            all.top.iter().map(|(t, _)| *t).collect::<Vec<_>>(),
            [1, 2, 0, 3]
        );
        assert_eq!(all.logprob, all.top[1].1);
        assert_eq!(all.top[3].1, LEAST);
        assert!(logprob(&logits, 0, 0).top.is_empty());
        let settings = ChoiceSettings {
            logprobs: Some(1),
            bias: Arc::new([(0, 50.0)]),
            ..greedy()
        };
        let chosen = Choice::new(settings, &[], &[])
            .unwrap()
            .next(logits.to_vec())
            .unwrap();
        let reported = chosen.logprob.unwrap();
        assert_eq!((chosen.token, reported.top[0].0), (0, 1));
        assert_eq!(reported.logprob, logprob(&logits, 0, 0).logprob);
    }
}
